#!/usr/bin/env bash
# The test suite on a fresh machine. Flags go to pytest: bash scripts/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m pytest "$@"
