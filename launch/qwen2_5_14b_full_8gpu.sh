#!/usr/bin/env bash
# Qwen2.5-14B, every weight, on the 8 GPUs of this machine; from the repository:
#
#   launch/qwen2_5_14b_full_8gpu.sh [--flag value ...]
#
# TP 4 x DP 2: 49 GiB of a GPU by the estimate, where TP 2 x DP 4 takes 76 GiB, or 64 with recomputation. The
# configuration has the parts.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
exec "$here/sft.sh" "$here/../configs/qwen2_5_14b_full_8gpu.yaml" "$@"
