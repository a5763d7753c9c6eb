# Sourced by the scripts beside it: makes .venv in the checkout, installs the project into it, and activates it.
# usage: source scripts/environment.sh EXTRAS   ("" or e.g. "[test]"); PYTHON names another interpreter.

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
  done
fi
if [ -z "$python" ]; then
  echo "found no Python 3.11 or later; install one, or name it: PYTHON=/path/to/python bash $0" >&2
  exit 2
fi

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
venv=${VENV:-.venv}
if [ -x "$venv/bin/python" ] && [ "$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" != "$version" ]; then
  echo "== $venv is of another Python; making it anew"
  rm -rf "$venv"
fi
if [ ! -x "$venv/bin/python" ]; then
  echo "== making an environment in $venv (Python $version)"
  "$python" -m venv "$venv" || exit 1
fi
stamp="$venv/.installed$1-$(cksum < pyproject.toml | tr ' ' '-')"
if [ ! -e "$stamp" ]; then
  echo "== installing ctx_jax$1 and what it needs (a minute or two)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".$1" || exit 1
  touch "$stamp"
fi
# shellcheck disable=SC1091
source "$venv/bin/activate"
