#!/usr/bin/env bash
# Qwen3-235B-A22B, every weight, on 16 nodes of 8 GPUs; from the repository, on every node:
#
#   NODE_RANK=0 MASTER_ADDR=node0 launch/qwen3_235b_a22b_16x8gpu.sh [--flag value ...]
#
# TP 4 x PP 8 x DP 4, experts EP 8: the ranks that share experts are those of one node, and a pipeline stage is two
# nodes. The configuration counts the memory. Slurm needs no script of its own:
#   sbatch --nodes=16 launch/slurm.sbatch configs/qwen3_235b_a22b_full_16x8gpu.yaml
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
export NNODES=${NNODES:-16} MASTER_PORT=${MASTER_PORT:-29500}
exec "$here/multinode.sh" "$here/../configs/qwen3_235b_a22b_full_16x8gpu.yaml" "$@"
