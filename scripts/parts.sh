# Parts of a job that do not wait for each other run side by side. Sourced after env.sh:
#
#     PARTS=3 LOGS=runs/digits/logs
#     part "teacher" "about 2 min" bash scripts/pretrain_digits.sh teacher          # prepared ...
#     part "classifiers" "about 1 min" bash scripts/pretrain_digits.sh classifiers
#     run_parts                                                                     # ... and both run to their end
#
# A part is a command, or a function that starts its commands by `run`. It shows one line and writes to a log of its
# own. The first part that fails stops the others, and the end of its log is shown. Each part keeps all the threads that
# it would have alone: beside another one a thread that waits sleeps at once, and the last part to run has all cores.
PARTS="${PARTS:-}" # of the whole job
LOGS="${LOGS:-logs}"
part_number=0
prepared=()

part() { # TITLE ABOUT COMMAND...
    prepared+=("$(printf '%q ' "$@")")
}

start_part() { # TITLE ABOUT COMMAND...: in the background. Sets `title` and `log`
    part_number=$((part_number + 1))
    title="$1" log="$LOGS/$part_number-${1//[^A-Za-z0-9]/_}.txt"
    mkdir -p "$LOGS"
    echo "[$part_number${PARTS:+/$PARTS}] $title, $2; log: $log"
    shift 2
    {
        [ "${#prepared[@]}" = 1 ] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-0}" # train_cc/io/threads.py
        # a signal to the part reaches the command itself
        [ "$(type -t "$1")" = function ] || exec "$@"
        "$@"
        exit # without it bash 5.2 complains of its own variables where a function fails
    } >"$log" 2>&1 </dev/null &
}

# A signal, too, stops all parts: they are asked to end, and waited for. Then the script ends.
run_parts() {
    local cores pids=() titles=() logs=() next=0 running=0 i code title log asked="" failed="" failed_with=0
    cores=$(python train_cc/io/threads.py)
    trap 'asked=yes; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT HUP
    while :; do
        if [ -z "$asked$failed" ] && [ "$next" -lt "${#prepared[@]}" ] && [ "$running" -lt "$cores" ]; then
            eval "start_part ${prepared[$next]}"
            pids[next]=$! titles[next]=$title logs[next]=$log
            next=$((next + 1)) running=$((running + 1))
            [ -z "$asked" ] || kill -TERM "$!" 2>/dev/null || true # the signal came while it was started
            continue
        fi
        [ "$running" -gt 0 ] || break
        sleep 0.2
        for i in "${!pids[@]}"; do
            kill -0 "${pids[$i]}" 2>/dev/null && continue
            code=0
            wait "${pids[$i]}" || code=$?
            unset "pids[$i]"
            running=$((running - 1))
            [ "$code" = 0 ] || [ -n "$asked$failed" ] || {
                failed=$i failed_with=$code
                kill -TERM "${pids[@]}" 2>/dev/null || true
            }
        done
    done
    trap - TERM INT HUP
    prepared=()
    [ -z "$asked" ] || exit 143
    [ -n "$failed" ] || return 0
    echo "error: the part \"${titles[$failed]}\" failed; the end of ${logs[$failed]}:" >&2
    tr '\r' '\n' <"${logs[$failed]}" | tail -n 15 >&2
    exit "$failed_with"
}

# Of stage 0 ---------------------------------------------------------------------------------------------------------------

finished() { # FOLDER: the network is there, and its record, where there is one, says that it is the finished one
    ls "$1/config.json" "$1"/*.safetensors >/dev/null 2>&1 &&
        { [ ! -f "$1/args.json" ] || grep -q '"finished"' "$1/args.json"; }
}

need() { # a command that was asked to stop ends well, but has not finished
    finished "$1" || { echo "$1 is not finished; the same command continues" >&2; exit 1; }
}
