#!/usr/bin/env bash
# Installs vtr (editable, with what the tests need) into an environment and creates that when it is missing. Does nothing when nothing changed.
# Usage: [EXTRAS=dev] [CONSTRAINTS=FILE (the tested versions; empty: none)] scripts/install.sh ENVIRONMENT [REQUIREMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."
env=$1 python=$1/bin/python stamp=$1/.vtr-installed log=$1/vtr-install.log
shift
constraints=${CONSTRAINTS-constraints/tested.txt}
wanted="$PWD ${EXTRAS:=dev,eval,docs} ${constraints:-no constraints} $*"
export PIP_DISABLE_PIP_VERSION_CHECK=1

fresh() {
    [[ -x $python && -f $stamp && $(<"$stamp") == "$wanted" ]] || return 1
    for file in setup.cfg setup.py pyproject.toml $constraints; do [[ $stamp -nt $file ]] || return 1; done
}

new_environment() {
    for base in ${bases:=${PYTHON:-python3 python3.13 python3.12 python3.11}}; do
        if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$base" -m venv "$env" && return
            echo "install.sh: $base cannot create $env; install the venv package of your system (Debian: python3-venv)" >&2
            exit 1
        fi
    done
    echo "install.sh: vtr needs Python 3.11 or newer, found none of: $bases; set PYTHON=..." >&2
    exit 1
}

# On a terminal, pip's progress as one line that overwrites itself; otherwise nothing.
status_line() {
    if [[ -t 1 ]]; then
        awk '/^ *(Collecting|Downloading|Building|Installing)/ { sub(/^ +/, ""); printf "\r\033[K%.78s", $0; fflush() } END { printf "\r\033[K" }'
    else
        cat >/dev/null
    fi
}

if fresh; then exit; fi
[[ -x $python ]] || new_environment
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
old=$("$python" -m pip show vtr 2>/dev/null || true) # what this distribution was called once
[[ $old != *"Editable project location: $PWD"* ]] || "$python" -m pip uninstall --quiet --yes vtr
echo "Installing vtr into $env (the first time this loads several GB; log: $log)"
if ! "$python" -m pip install -e ".[$EXTRAS]" ${constraints:+-c "$constraints"} "$@" 2>&1 | tee "$log" | status_line; then
    tail -n 20 "$log" >&2
    echo "install.sh: pip failed, see $log" >&2
    exit 1
fi
echo "$wanted" >"$stamp"
