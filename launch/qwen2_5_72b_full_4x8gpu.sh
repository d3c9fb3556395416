#!/usr/bin/env bash
# Qwen2.5-72B, every weight, on 4 nodes of 8 GPUs; from the repository, on every node:
#
#   NODE_RANK=0 MASTER_ADDR=node0 launch/qwen2_5_72b_full_4x8gpu.sh [--flag value ...]
#
# TP 8 x PP 4: tensor-parallel ranks are those of one node, a pipeline stage is a node, and nodes exchange activations
# only. 50 GiB of a GPU by the estimate; the configuration has the parts. Slurm needs no script of its own:
#   sbatch --nodes=4 launch/slurm.sbatch configs/qwen2_5_72b_full_4x8gpu.yaml
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
export NNODES=${NNODES:-4} MASTER_PORT=${MASTER_PORT:-29500}
exec "$here/multinode.sh" "$here/../configs/qwen2_5_72b_full_4x8gpu.yaml" "$@"
