#!/usr/bin/env bash
# One node's part of a run over several. Start it on every node with the same arguments:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500 launch/multinode.sh CONFIG.yaml [--flag value ...]
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 MASTER_PORT=29500 launch/multinode.sh CONFIG.yaml [--flag value ...]
#
# MASTER_ADDR is the node with NODE_RANK 0; under Slurm NODE_RANK defaults to SLURM_NODEID. Model, data and output_dir
# must lie at the same paths on every node, and output_dir on a file system that the nodes share.
set -euo pipefail

fail() {
    echo "${0##*/}: $1" >&2
    exit 2
}

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

[[ -z ${RANK:-} ]] || fail "RANK is set: this process is a rank already; start \`braid sft\` itself"
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT; do
    [[ -n ${!name:-} ]] || fail "$name is not set; every node needs NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT"
done
for name in NNODES NODE_RANK MASTER_PORT; do
    [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || fail "$name must be a whole number, not ${!name}"
done
((NNODES >= 1)) || fail "NNODES must be at least 1"
((NODE_RANK < NNODES)) || fail "NODE_RANK must be below NNODES $NNODES, not $NODE_RANK"
((MASTER_PORT >= 1 && MASTER_PORT <= 65535)) || fail "MASTER_PORT must be a port, not $MASTER_PORT"
export NNODES NODE_RANK MASTER_ADDR MASTER_PORT

# A task of srun would be taken for a rank of the run; here it is the launcher of a node's ranks.
unset SLURM_PROCID

exec "$here/sft.sh" "$@"
