#!/usr/bin/env bash
# The test suite on a fresh machine, in two processes. Flags go to pytest, which then runs in one: bash scripts/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ $# -eq 0 ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    set -- -n 2 --dist loadfile
fi
exec python -m pytest "$@"
