#!/usr/bin/env bash
# A sweep on all nodes of a Slurm job: Ray's head on the first, workers on the others, `vtr sweep` on top. Arguments are those of `vtr sweep`.
#   sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 64 scripts/sweep_slurm.sh eval/sweeps/llava-1.5-7b.yaml --jobs 32
#SBATCH --job-name vtr-sweep
#SBATCH --ntasks-per-node 1
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=${RAY_PORT:-6379}
address=${nodes[0]}:$port
cpus=${SLURM_CPUS_PER_TASK:-1}

start() { srun --nodes 1 --ntasks 1 --nodelist "$1" ray start --block --num-cpus "$cpus" --disable-usage-stats "${@:2}" & }

start "${nodes[0]}" --head --port "$port" --include-dashboard false
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
until ray status --address "$address" >/dev/null 2>&1; do sleep 2; done
for node in "${nodes[@]:1}"; do start "$node" --address "$address"; done

vtr sweep "$@" --ray "$address"
