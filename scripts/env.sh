# Sourced by the other scripts: goes to the repository's root, makes sure of the environment, defines `launch` and `run`.
# An active environment that satisfies requirements.txt is used as it is; so is one that uv made, after `uv pip` has
# installed what it lacks. Otherwise .venv, made and filled on first use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UNFINISHED=.dmdr-installing # is in an environment while we install into it: found later, that was interrupted

refuse() { echo "error: $1" >&2; exit 2; }

satisfied() { # PREFIX: does `python` have everything that requirements.txt asks for, installed to the end?
    [ ! -e "$1/$UNFINISHED" ] && python - <<'PYTHON' 2>/dev/null
from importlib.metadata import version
from packaging.requirements import Requirement  # of several libraries; where it is missing, they are
lines = [line.partition("#")[0].strip() for line in open("requirements.txt")]
for wanted in map(Requirement, filter(None, lines)):
    needed = wanted.marker is None or wanted.marker.evaluate()
    if needed and not wanted.specifier.contains(version(wanted.name), prereleases=True):
        raise SystemExit(1)
PYTHON
}

fill() { # PREFIX: install requirements.txt for `python`; after an interruption all of it, even what looks installed
    local again=""
    [ ! -e "$1/$UNFINISHED" ] || again=yes
    touch "$1/$UNFINISHED"
    echo "installing requirements.txt into $1 (once, some minutes)" >&2
    if python -m pip --version >/dev/null 2>&1; then
        python -m pip install --quiet --disable-pip-version-check ${again:+--ignore-installed} -r requirements.txt
    elif command -v uv >/dev/null; then
        uv pip install --quiet --python "$(command -v python)" ${again:+--reinstall} -r requirements.txt
    else
        refuse "$1 has neither pip nor uv to install requirements.txt with; install one, or remove $1"
    fi
    rm -f "$1/$UNFINISHED"
}

make_venv() { # venv writes bin/activate last: without it .venv is what an interrupted start has left
    [ ! -x .venv/bin/python ] || [ ! -f .venv/bin/activate ] || return 0
    if [ -e .venv ] && [ ! -f .venv/pyvenv.cfg ] && [ -n "$(find .venv/ -type f -print -quit)" ]; then
        refuse ".venv is here and is no Python environment; move it"
    fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        refuse "Python 3.10 or newer is needed; python3 is $(python3 --version 2>&1 || true)"
    python3 -m venv --clear .venv
}

active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
if [ -z "${SHOW_LAUNCH:-}" ] && { [ -z "$active" ] || ! satisfied "$active"; }; then
    # uv's environments have no pip inside: there nobody else installs
    if [ -n "$active" ] && grep -qs '^uv *=' "$active/pyvenv.cfg" && command -v uv >/dev/null; then
        fill "$active"
    else
        make_venv
        # shellcheck disable=SC1091
        source .venv/bin/activate
        satisfied "$PWD/.venv" || fill "$PWD/.venv"
    fi
fi
unset active

# launch MODULE FLAGS...: one process a visible GPU, or one CPU process; scripts/launch.py has the variables that override.
# SHOW_LAUNCH in the environment: only print NUM_PROCESSES, module and flags, each ended by a zero byte.
# `exec`: a signal to the script reaches the run itself. A script that goes on afterwards says `run launch`.
launch() {
    [ -z "${SHOW_LAUNCH:-}" ] || { printf '%s\0' "${NUM_PROCESSES:-}" "$@"; exit; }
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}" # of CUDA: fragments less
    exec python -m scripts.launch "$@"
}

# run COMMAND...: one of several commands of a script. A signal to the script alone is handed on to it, and ends the
# script when the command has ended: bash by itself would leave it running.
run() {
    local child code asked=""
    "$@" &
    child=$!
    trap 'asked=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
    while code=0; wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do :; done # a signal ends `wait`, too
    trap - TERM INT HUP
    [ -z "$asked" ] || exit 143
    return "$code"
}

one_process_unless_asked() { # what a small recipe calls first: its batch is that of one process
    [ -n "${ACCELERATE_CONFIG:-}${NUM_NODES:-}" ] || export NUM_PROCESSES="${NUM_PROCESSES:-1}"
}

two_folders() { # "$@": what a script of evaluation is given first
    [[ $# -ge 2 && "$1" != -* && "$2" != -* ]] ||
        refuse "two folders are expected: bash $0 GENERATOR_FOLDER OUTPUT_FOLDER [flags]"
}
