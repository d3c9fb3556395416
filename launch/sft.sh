#!/usr/bin/env bash
# Train on the GPUs of this machine:
#
#   launch/sft.sh CONFIG.yaml [--flag value ...]
#
# NPROC_PER_NODE is the number of visible GPUs unless it is set. Without a GPU it stays unset, and the configuration
# decides (nproc_per_node, default 1).
set -euo pipefail

usage() {
    echo "usage: ${0##*/} CONFIG.yaml [--flag value ...]" >&2
    exit 2
}

# GPUs that a process on this machine can use; 0 where there are none.
visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        # Set but empty hides all GPUs.
        local -a ids
        IFS=, read -r -a ids <<<"$CUDA_VISIBLE_DEVICES"
        echo "${#ids[@]}"
    elif command -v nvidia-smi >/dev/null; then
        # MIG slices are listed indented below their GPU. Where the driver does not answer there is no GPU to use.
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

[[ $# -ge 1 && $1 != -* ]] || usage
config=$1
shift
if [[ ! -f $config ]]; then
    echo "${0##*/}: configuration $config does not exist" >&2
    exit 2
fi
if ! command -v braid >/dev/null; then
    echo "${0##*/}: braid is not on PATH; activate the environment it is installed in" >&2
    exit 2
fi
if [[ -z ${NPROC_PER_NODE:-} ]]; then
    gpus=$(visible_gpus)
    if [[ $gpus -gt 0 ]]; then
        export NPROC_PER_NODE=$gpus
    fi
fi
# exec: a signal for this script reaches the launcher, which ends its ranks.
exec braid sft --config "$config" "$@"
