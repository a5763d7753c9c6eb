#!/usr/bin/env bash
# One pre-training run on a slice of Cloud TPUs, from an empty project to the end of the run. docs/pods.md explains it.
#
#   bash scripts/pretrain_tpu_pod.sh create            asks for the slice, and waits until it is there
#   bash scripts/pretrain_tpu_pod.sh setup             this checkout, Python and the shared folder, on every machine
#   bash scripts/pretrain_tpu_pod.sh run [FIELDS]      trains, and starts again after a machine or a process was lost
#   bash scripts/pretrain_tpu_pod.sh delete
#
# What it is to be comes from variables:
#   PROJECT ZONE NAME    of the slice
#   ACCELERATOR          v5litepod-256 (v5e, 256 chips, 32 machines), v5p-512 (v5p, 256 chips, 64 machines), …
#   RUNTIME              v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p
#   SHARE                an NFS export that all the machines reach, 10.0.0.2:/share (Filestore has them)
#   DATA                 the corpus, a folder under the share: corpora/text
#   CONFIG               configs/bert_base.py
#   SPOT                 1 asks for machines that may be taken away
set -euo pipefail

: "${PROJECT:?}" "${ZONE:?}" "${NAME:?}"
where=(--project "$PROJECT" --zone "$ZONE")
mount=/mnt/ctx

everywhere() { # COMMAND on every machine of the slice at once
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command "$1"
}

create() {
  : "${ACCELERATOR:?}" "${RUNTIME:?}"
  gcloud services enable tpu.googleapis.com --project "$PROJECT"
  gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id "$NAME" \
    --accelerator-type "$ACCELERATOR" --runtime-version "$RUNTIME" ${SPOT:+--spot}
  while true; do
    state=$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format "value(state.state)")
    echo "$(date +%T) $NAME: $state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED) return 1 ;;
    esac
    sleep 30
  done
}

setup() {
  : "${SHARE:?}"
  archive=$(mktemp)
  trap 'rm -f "$archive"' EXIT
  git archive --format tar.gz --output "$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:ctx_jax.tar.gz" "${where[@]}" --worker=all
  # The machines come with a Python older than 3.11, which uv makes up for.
  everywhere "set -e
    mkdir -p ctx_jax && tar -xzf ctx_jax.tar.gz -C ctx_jax
    command -v ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ctx_jax/.venv
    ~/.local/bin/uv pip install --quiet --python ctx_jax/.venv/bin/python --editable ctx_jax 'jax[tpu]'
    sudo apt-get install -qq -y nfs-common
    sudo mkdir -p $mount && (mountpoint -q $mount || sudo mount -t nfs $SHARE $mount)
    sudo chmod 777 $mount"
}

run() {
  : "${DATA:?}" "${CONFIG:?}"
  for attempt in $(seq 100); do
    # What gcloud gives back when machines end with unlike codes is not documented: bad input is known by its words.
    code=0
    everywhere "cd ctx_jax && .venv/bin/ctx-jax pretrain $CONFIG --workdir $mount/runs/$NAME --data $mount/$DATA \
      --hosts.auto --hosts.connect-seconds 300 $* || (code=\$?; [ \$code != 2 ] || echo 'not tried again'; exit \$code)" \
      2>&1 | tee "$NAME.log" || code=$?
    [ "$code" = 0 ] && return
    grep -q "not tried again" "$NAME.log" && return 2
    echo "== attempt $attempt ended with $code; going on from the last checkpoint in 30 s"
    sleep 30
  done
  return 1
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

case ${1:-} in
  create | setup | run | delete) "$@" ;;
  *)
    sed -n '2,/^set -e/{s/^# \{0,1\}//;/^set -e/d;p}' "$0" >&2
    exit 2
    ;;
esac
