#!/usr/bin/env bash
# One training on Slurm, over all that the job's nodes have. From the folder that has .venv and slurm/ in it:
#
#   sbatch [options of sbatch] slurm/train.sh [arguments of dist-train train]
#   sbatch --nodes=2 slurm/train.sh --preset block94          # two nodes, the same weights
#   sbatch --array=0-4%2 slurm/train.sh                       # seeds 0 to 4, two at a time
#
# This is the one file to edit for a cluster: dist-train submit takes its options and its set-up from here, too.
# A second # switches an option off; what is given to sbatch itself goes before all of them.

#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --time=01:00:00
##SBATCH --partition=gpu
##SBATCH --account=mine

# Whole nodes. To share them instead, say how much: --gpus-per-node=2 and --cpus-per-task=16.
#SBATCH --exclusive

# Saved, and back into the queue, 120 seconds before the time limit and when preempted; it then resumes.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

# set-up
# What the job has on a node is for its one step there: of itself srun would bind all ranks to one CPU, and take no GPU of
# a whole node.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then export SLURM_GPUS_PER_NODE=${SLURM_GPUS_PER_NODE:-$SLURM_GPUS_ON_NODE}; fi
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate
# module load cuda
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export WANDB_MODE=offline
# end of set-up

exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 python -u -m dist_train.launch.node "$@"
