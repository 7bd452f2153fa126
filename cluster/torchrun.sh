#!/bin/bash
# Several machines without a scheduler. On each of them, at about the same time:
#
#   HEAD=HOST RUN=runs/mine cluster/torchrun.sh --config configs/imagenet_v2.yaml --data.root IMAGENET
#
# HEAD is one of the machines and must survive: the others meet there. RUN is a folder that all of
# them share. NODES is how many there are, or FROM:TO to start with FROM and go on with what is
# left (default 1:4); a batch must divide by every number of GPUs that may be left. GPUS is how many
# each machine takes (default: all), JOB a name that no other job at HEAD has (default: moco).
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
# Without this torchrun (2.14) waits in vain when a machine joins later or leaves.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_NCCL_TRACE_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1    # NCCL's flight recorder
exec torchrun --nnodes "${NODES:-1:4}" --nproc-per-node "${GPUS:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29400" --rdzv-id "${JOB:-moco}" \
    train.py "$@" --resume auto --run.dir "$RUN"
