#!/usr/bin/env bash
# Makes the GPU tables of docs/speed.md in under 8 minutes on one GPU of 40 GiB or more; nothing is downloaded (random weights).
#   scripts/bench_gpu.sh
# A try without a GPU:
#   DEVICE=cpu LLAVA=llava-tiny NEXT=llava-next-tiny KEEP=9 KEEP_NEXT=25 METHODS=uniform MINUTES=1 LONGEST=0.01 OUT=out/speed scripts/bench_gpu.sh
# MINUTES bounds the rounds that are counted; every cell counts one round at least.
set -euo pipefail
cd "$(dirname "$0")/.."

DEVICE=${DEVICE:-cuda}
LLAVA=${LLAVA:-llava-1.5-7b}
NEXT=${NEXT:-llava-next-7b}
KEEP=${KEEP:-64}
KEEP_NEXT=${KEEP_NEXT:-160}
BATCH=${BATCH:-1,8}
MINUTES=${MINUTES:-6}
OUT=${OUT:-eval/speed}
METHODS=${METHODS:-all}
FEW=${FEW:-uniform,divprune,visionzip,fastv,flowcut,globalcom2}
python=${PYTHON:-python}
mkdir -p "$OUT"

part() { "$python" -c "import sys; print(float(sys.argv[1]) * float(sys.argv[2]))" "$MINUTES" "$1"; }
bench() { "$python" -m vtr bench --device "$DEVICE" --batch "$BATCH" --quiet "$@"; }

# every method with short answers, then a few with 64 tokens, then the selection functions by themselves
bench --model "$LLAVA" --keep "$KEEP" --methods "$METHODS" --new-tokens 1,8 --repeats 5 --minutes "$(part 0.35)" --json "$OUT/$DEVICE-$LLAVA.json"
bench --model "$NEXT" --keep "$KEEP_NEXT" --methods "$METHODS" --new-tokens 1,8 --repeats 5 --minutes "$(part 0.4)" --json "$OUT/$DEVICE-$NEXT.json"
bench --model "$NEXT" --keep "$KEEP_NEXT" --methods "$FEW" --new-tokens 1,64 --repeats 5 --minutes "$(part 0.2)" --json "$OUT/$DEVICE-$NEXT-64.json"
"$python" -m vtr bench --ops --device "$DEVICE" --repeats 5 --longest "${LONGEST:-0.2}" --json "$OUT/$DEVICE-ops.json" --quiet
if [ "$OUT" = eval/speed ]; then "$python" -m vtr bench --page docs/speed.md; fi
