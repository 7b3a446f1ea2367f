#!/bin/bash
# A run on two nodes of eight GPUs each, one process per GPU. Submit it again to resume: sbatch configs/cluster/slurm.sh
#SBATCH --job-name=rmscope
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --output=rmscope-%j.log
set -euo pipefail

# RUN must be a folder that all nodes see.
RUN=${RUN:-/shared/runs/mine}
CONFIG=${CONFIG:-configs/riggs2024.yaml}

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
  -m rmscope.cli run "$CONFIG" --out "$RUN"
