#!/usr/bin/env bash
# Trains on two nodes with eight GPUs each, one process for each GPU:
#   sbatch docs/launch/slurm.sh configs/r50_3x.py /shared/runs/r50
#SBATCH --job-name=solov2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before the end every process is told, and the run is saved: submit it again.
#SBATCH --signal=TERM@300
set -euo pipefail
config=$1 workdir=$2
shift 2

# srun starts the processes, which find each other by its variables. One that fails ends all.
srun --kill-on-bad-exit=1 python train.py --config="$config" --workdir="$workdir" \
  --distributed=on --config.data.num_workers=8 "$@"
