#!/usr/bin/env bash
# Qwen3-8B, a LoRA adapter, on one GPU of 80 GB; from the repository:
#
#   launch/qwen3_8b_lora_1gpu.sh [--flag value ...]
#
# No layout: 56 GiB by the estimate, of which 38 are activations of two packs of 4,096 tokens. The configuration has the
# parts. On several GPUs pass NPROC_PER_NODE: each trains on packs of its own.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
export NPROC_PER_NODE=${NPROC_PER_NODE:-1}
exec "$here/sft.sh" "$here/../configs/qwen3_8b_lora_1gpu.yaml" "$@"
