# What both jobs do. Ten minutes before the time limit (USR1) the run is asked to save and end, and the job to be queued
# again; the launcher's --auto-resume continues it. SIGTERM (preemption, scancel) asks the run alone: a preempted job is
# queued again by Slurm itself.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
launcher="${1:?a launcher of scripts/ is missing}"
[ -f "$launcher" ] || { echo "error: $launcher does not exist; a launcher of scripts/ is expected" >&2; exit 2; }

export NUM_NODES="${SLURM_NNODES:-1}"
if [ "$NUM_NODES" -gt 1 ]; then
    MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node must not meet each other
    export MAIN_ADDRESS MAIN_PORT
fi

# One task per node: the launcher there starts a process per GPU. Slurm 22.05 to 23.02 hands the cores on only if they are
# named again; without them all processes would share one core.
cores="${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}"
srun --ntasks-per-node=1 $cores --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' job "$@" &
step=$! requeue="" asked=""
ask() { # the run saves after its update; once is enough, since Slurm tells its processes too
    trap '' USR1 TERM INT # a second signal would end the second `wait`, and bash forget the step's exit code
    asked=yes
    kill -TERM "$step" 2>/dev/null
}
trap 'requeue=yes; ask' USR1
trap ask TERM INT

wait "$step"
code=$?
if [ -n "$asked" ]; then # a signal ends `wait` before the step has ended
    wait "$step"
    last=$?
    [ "$last" -eq 127 ] || code=$last # 127: it was waited for already
fi
if [ -n "$requeue" ] && [ "$code" -eq 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
