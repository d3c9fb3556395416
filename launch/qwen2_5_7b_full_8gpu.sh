#!/usr/bin/env bash
# Qwen2.5-7B, every weight, on the 8 GPUs of this machine; from the repository:
#
#   launch/qwen2_5_7b_full_8gpu.sh [--flag value ...]
#
# TP 2 x DP 4: 41 GiB of a GPU by the estimate, where DP 8 alone takes 71 GiB, too close to 80 GB. The configuration has
# the parts.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
exec "$here/sft.sh" "$here/../configs/qwen2_5_7b_full_8gpu.yaml" "$@"
