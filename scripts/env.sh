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
# With several nodes: NUM_NODES, NODE_RANK, MAIN_ADDRESS, MAIN_PORT; NUM_PROCESSES counts those of all nodes.
# One process needs no launcher: it starts sooner, and its exit code stays its own. `exec`: a signal to the script
# reaches the run itself. A script that goes on afterwards calls it in parentheses.
launch() {
    local gpus cores config nodes word
    gpus=$(visible_gpus)
    cores=$(getconf _NPROCESSORS_ONLN)
    nodes="${NUM_NODES:-1}"
    config="${ACCELERATE_CONFIG:-}"
    if [ -n "$config" ] && [ ! -f "$config" ]; then
        echo "error: ACCELERATE_CONFIG is $config, which does not exist; there are: $(echo scripts/accelerate/*.yaml)" >&2
        exit 2
    fi
    if [ -n "$config" ] && [ "$gpus" -gt 0 ]; then # without GPUs its number, meant for GPUs, says nothing
        NUM_PROCESSES="${NUM_PROCESSES:-$(sed -n 's/^num_processes: *//p' "$config")}"
    fi
    export NUM_PROCESSES="${NUM_PROCESSES:-$((gpus > 0 ? gpus * nodes : 1))}"
    if [ -n "$config" ]; then # what accelerate's own launcher would hand on, for the other ways to start
        ACCELERATE_MIXED_PRECISION=$(sed -n "s/^mixed_precision: *'*\([a-z0-9]*\).*/\1/p" "$config")
        ACCELERATE_USE_FSDP=$(grep -q '^distributed_type: FSDP' "$config" && echo true || echo false)
        export ACCELERATE_MIXED_PRECISION ACCELERATE_USE_FSDP
    fi
    for word in "$@"; do # a plan of a run on any machine needs none of its processes
        if [ "$word" = --dry-run ]; then
            WORLD_SIZE="$NUM_PROCESSES" exec python -m "$@"
        fi
    done
    # When a process fails, the others are asked to end, and killed after this many seconds; so long has an update with
    # its checkpoint to end in when the job itself is asked to.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-50}"
    if [ "$gpus" -eq 0 ]; then
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > NUM_PROCESSES ? cores / NUM_PROCESSES : 1))}"
    fi
    if [ "$NUM_PROCESSES" -eq 1 ]; then
        exec python -m "$@"
    elif [ "$gpus" -eq 0 ]; then # without GPUs `accelerate launch` starts one process, whatever it is asked for
        exec torchrun --standalone --nproc_per_node "$NUM_PROCESSES" --module "$@"
    elif [ "$nodes" -gt 1 ]; then
        exec accelerate launch --quiet --config_file "${config:-scripts/accelerate/nodes.yaml}" \
            --num_machines "$nodes" --num_processes "$NUM_PROCESSES" \
            --machine_rank "${NODE_RANK:?is missing: the number of this node, from 0}" \
            --main_process_ip "${MAIN_ADDRESS:?is missing: the address of node 0}" \
            --main_process_port "${MAIN_PORT:-29500}" --module "$@"
    else
        exec accelerate launch --quiet --config_file "${config:-scripts/accelerate/ddp.yaml}" \
            --num_processes "$NUM_PROCESSES" --module "$@"
    fi
}
