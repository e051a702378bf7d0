#!/usr/bin/env bash
# One of several processes that share a sweep's folder, on its own GPU. For launchers that start a process per GPU:
#   accelerate launch --num_processes 8 --no_python scripts/sweep_rank.sh eval/sweeps/llava-1.5-7b.yaml
set -euo pipefail
rank=${LOCAL_RANK:-${SLURM_LOCALID:-0}}
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
    export CUDA_VISIBLE_DEVICES=${devices[$((rank % ${#devices[@]}))]}
else
    export CUDA_VISIBLE_DEVICES=$rank
fi
exec python -m vtr sweep "$@" --quiet
