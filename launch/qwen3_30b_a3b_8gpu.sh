#!/usr/bin/env bash
# Qwen3-30B-A3B, every weight, on the 8 GPUs of this machine; from the repository:
#
#   launch/qwen3_30b_a3b_8gpu.sh [--flag value ...]
#
# TP 4 x DP 2, experts EP 8: nearly all weights are experts, and only all eight GPUs together hold them. The
# configuration counts the memory.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
exec "$here/sft.sh" "$here/../configs/qwen3_30b_a3b_full_8gpu.yaml" "$@"
