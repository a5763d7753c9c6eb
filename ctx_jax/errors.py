"""The one error for what a user can mend, a wrong file, field, flag or text; for the command line, exit code 2."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The message is one line that names the file or field, what was found and what was expected."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean …?)' for the nearest of the known names, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
