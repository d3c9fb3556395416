#!/usr/bin/env bash
# Qwen3-32B, every weight, on 2 nodes of 8 GPUs; from the repository, on every node:
#
#   NODE_RANK=0 MASTER_ADDR=node0 launch/qwen3_32b_full_2x8gpu.sh [--flag value ...]
#
# TP 8 x PP 2: tensor-parallel ranks are those of one node, a pipeline stage is a node, and nodes exchange activations
# only. 43 GiB of a GPU by the estimate; the configuration has the parts. Slurm needs no script of its own:
#   sbatch --nodes=2 launch/slurm.sbatch configs/qwen3_32b_full_2x8gpu.yaml
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
export NNODES=${NNODES:-2} MASTER_PORT=${MASTER_PORT:-29500}
exec "$here/multinode.sh" "$here/../configs/qwen3_32b_full_2x8gpu.yaml" "$@"
