#!/usr/bin/env bash
# Validate the GPUs of this machine: every layout that they allow against one GPU, in one report.
#
#   launch/validate_cluster.sh --output_dir DIR [--parts parity,curves] [--resume] [--flag value ...]
#
# All visible GPUs, or NPROC_PER_NODE of them. docs/cluster.md says what the report holds and how to split a run over
# several short calls.
set -euo pipefail

if ! command -v braid >/dev/null; then
    echo "${0##*/}: braid is not on PATH; activate the environment it is installed in" >&2
    exit 2
fi
# Multicast over NVLink needs a fabric manager that virtual machines and containers often lack.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
exec braid validate "$@"
