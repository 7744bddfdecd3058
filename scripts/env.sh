# Sourced by the other scripts: goes to the repository's root, makes sure of the environment, defines `launch`.
# An active environment that satisfies requirements.txt is used as it is; otherwise .venv, made and filled on first use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

satisfied() { # does this Python have everything that requirements.txt asks for?
    "$1" - <<'PYTHON' 2>/dev/null
import re, sys
from importlib.metadata import version
from pip._vendor.packaging.requirements import Requirement
for line in open("requirements.txt"):
    line = re.sub("#.*", "", line).strip()
    if line and version(Requirement(line).name) not in Requirement(line).specifier:
        sys.exit(1)
PYTHON
}

if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && satisfied python; then
    :
else
    if [ ! -x .venv/bin/python ]; then
        python3 -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
    if ! satisfied python; then
        echo "installing requirements.txt into .venv (once, some minutes)"
        python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    fi
fi

visible_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^ ]' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# launch MODULE FLAGS...: one process a visible GPU, or one CPU process; NUM_PROCESSES and ACCELERATE_CONFIG override.
# One process needs no launcher: it starts sooner, and its exit code stays its own. `exec`: a signal to the script
# reaches the run itself. A script that goes on afterwards calls it in parentheses.
launch() {
    local gpus cores
    gpus=$(visible_gpus)
    cores=$(getconf _NPROCESSORS_ONLN)
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}" # to end the update and write a checkpoint
    if [ -n "${ACCELERATE_CONFIG:-}" ]; then
        exec accelerate launch --quiet --config_file "$ACCELERATE_CONFIG" \
            ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} --module "$@"
    fi
    export NUM_PROCESSES="${NUM_PROCESSES:-$((gpus > 0 ? gpus : 1))}"
    if [ "$gpus" -eq 0 ]; then
        # Large pages for large tensors: on a CPU much of a cycle is the kernel's zeroing of small ones (docs/results.md).
        export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > NUM_PROCESSES ? cores / NUM_PROCESSES : 1))}"
    fi
    if [ "$NUM_PROCESSES" -eq 1 ]; then
        exec python -m "$@"
    elif [ "$gpus" -gt 0 ]; then
        exec accelerate launch --quiet --config_file scripts/accelerate/ddp.yaml \
            --num_processes "$NUM_PROCESSES" --module "$@"
    else # without GPUs `accelerate launch` starts one process, whatever it is asked for, unless there is MPI
        exec torchrun --standalone --nproc_per_node "$NUM_PROCESSES" --module "$@"
    fi
}
