#!/usr/bin/env bash
# Makes the tables of docs/results.md: every method on both embedded checkpoints. Finished cells are kept; stop and start again as you like.
#   scripts/results.sh                 all 2500 questions: several hours on 2 cores
#   LIMIT=40 scripts/results.sh        the first 40 of each family
#   MODELS=tiny-llava METHODS=full,random,fastv scripts/results.sh
set -euo pipefail
cd "$(dirname "$0")/.."

METHODS=${METHODS:-full,none,random,uniform,pool,resize,divprune,fastv,tome,flowcut,dart,todre,globalcom2}
MODELS=${MODELS:-tiny-llava tiny-llava-next}
OUT=${OUT:-out/results}
limit=${LIMIT:+--limit $LIMIT}

for model in $MODELS; do
    case $model in
        *next) keep=640,320,160 ;;
        *) keep=192,128,64,32 ;;
    esac
    # shellcheck disable=SC2086
    python -m vtr eval --model "$model" --methods "$METHODS" --keep $keep --seeds "${SEEDS:-0,1,2,3,4}" --share-tower --out "$OUT" $limit --quiet
    # times: few questions, the tower in every cell
    python -m vtr eval --model "$model" --methods "$METHODS" --keep $keep --seeds 0 --limit 4 --out "$OUT-times" --quiet
done
python -m vtr report "$OUT" --times "$OUT-times" --out docs/results.md
