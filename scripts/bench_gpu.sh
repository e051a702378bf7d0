#!/usr/bin/env bash
# Makes the GPU tables of docs/speed.md in under 8 minutes on one GPU of 40 GiB or more; nothing is downloaded (random weights).
#   scripts/bench_gpu.sh
# A try of all steps without a GPU, minutes on two cores, most of them compiling; nothing but out/speed is written:
#   DEVICE=cpu MINUTES=20 LLAVA=llava-tiny NEXT=llava-next-tiny KEEP=9 KEEP_NEXT=25 METHODS=uniform BATCH=1 REPEATS=1 LONGEST=0.01 OUT=out/speed scripts/bench_gpu.sh
# Not measured yet, guessed for an H200: 30 to 45 s to compile a row, 25 to 50 s a round of all methods. MINUTES bounds everything: steps end
# there, the most wanted ones come first, and a step that failed or had no time is named at the end (exit code 1). A record is moved to OUT only
# when its step is done.
set -uo pipefail
cd "$(dirname "$0")/.."

DEVICE=${DEVICE:-cuda} LLAVA=${LLAVA:-llava-1.5-7b} NEXT=${NEXT:-llava-next-7b} KEEP=${KEEP:-64} KEEP_NEXT=${KEEP_NEXT:-160} BATCH=${BATCH:-1,8}
METHODS=${METHODS:-all} FEW=${FEW:-uniform} # FEW: compiled too; methods whose counts follow from the budget
REPEATS=${REPEATS:-3} LONGEST=${LONGEST:-0.2} MINUTES=${MINUTES:-7.5} OUT=${OUT:-eval/speed}
python=${PYTHON:-python}
mkdir -p "$OUT" && new=$(mktemp -d) || exit 1
trap 'rm -rf "$new"' EXIT
trap 'exit 130' INT TERM
end=$(awk -v m="$MINUTES" 'BEGIN { printf "%d", m * 60 }')
missed=()

step() { # NAME SECONDS COMMAND...: COMMAND writes $new/NAME.json
  local name=$1 wanted=$2 left=$((end - SECONDS)) code=0
  shift 2
  [ "$left" -ge "$wanted" ] || { missed+=("$name: not begun, $left s left of the $wanted it needs"); return; }
  echo "== $name, $left s left"
  timeout --signal=INT --kill-after=10 "$left" "$python" -m vtr bench --device "$DEVICE" --quiet --json "$new/$name.json" "$@" || code=$?
  if [ "$code" -eq 0 ]; then
    mv "$new/$name.json" "$OUT/.$name.part" && mv "$OUT/.$name.part" "$OUT/$name.json"
  else
    missed+=("$name: $([ "$code" -eq 124 ] && echo 'the time was over' || echo "failed with exit code $code, see above")")
  fi
}

part() { awk -v m="$MINUTES" -v share="$1" 'BEGIN { print m * share }'; }
cells() { step "$1" "$2" --batch "$BATCH" --repeats "$REPEATS" "${@:3}"; }

cells "$DEVICE-$NEXT-64" 60 --model "$NEXT" --keep "$KEEP_NEXT" --methods "$FEW" --schedule own --new-tokens 1,64 --compiled --minutes "$(part 0.38)"
step "$DEVICE-ops" 10 --ops --repeats "$REPEATS" --longest "$LONGEST"
cells "$DEVICE-$NEXT" 45 --model "$NEXT" --keep "$KEEP_NEXT" --methods "$METHODS" --new-tokens 1,4 --minutes "$(part 0.24)"
cells "$DEVICE-$LLAVA" 45 --model "$LLAVA" --keep "$KEEP" --methods "$METHODS" --new-tokens 1,4 --minutes "$(part 0.16)"
cells "$DEVICE-$LLAVA-64" 60 --model "$LLAVA" --keep "$KEEP" --methods "$FEW" --schedule own --new-tokens 1,64 --compiled --minutes "$(part 0.13)"

page=$([ "$OUT" = eval/speed ] && echo docs/speed.md || echo "$OUT/speed.md")
"$python" scripts/speed_page.py --page "$page" --records "$OUT" || missed+=("page: failed, see above")
echo "$SECONDS s"
[ "${#missed[@]}" -eq 0 ] || { printf 'bench_gpu.sh: missing: %s\n' "${missed[@]}" >&2; exit 1; }
