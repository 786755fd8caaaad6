#!/usr/bin/env bash
# One training on Slurm, on all GPUs or CPUs of the job's nodes. From the folder that contains .venv and slurm/:
#
#   sbatch [options of sbatch] slurm/train.sh [arguments of dist-train train]
#   sbatch --nodes=2 slurm/train.sh --preset block94          # two nodes, the same weights
#   sbatch --array=0-4%2 slurm/train.sh                       # seeds 0 to 4, two at a time
#
# This is the one file to edit for a cluster: dist-train submit uses its options and its set-up, too.
# A second # disables an option; options of the sbatch command override those in this file.

#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --time=01:00:00
##SBATCH --partition=gpu
##SBATCH --account=mine

# Whole nodes. To share nodes instead, request a part of each: --gpus-per-node=2 and --cpus-per-task=16.
#SBATCH --exclusive

# 120 seconds before the time limit, and when preempted, the job is saved and requeued; it then resumes.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

# set-up
# The job's one step uses all CPUs and GPUs of the job: by default srun binds all ranks to one CPU, and allocates no GPU
# of an exclusive node.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then export SLURM_GPUS_PER_NODE=${SLURM_GPUS_PER_NODE:-$SLURM_GPUS_ON_NODE}; fi
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate
# module load cuda
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export WANDB_MODE=offline
# end of set-up

exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 python -u -m dist_train.launch.node "$@"
