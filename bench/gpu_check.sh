#!/usr/bin/env bash
# bench/gpu_check.sh OUT.json [WHEEL]: what it does and what it takes stands in gpu_check.py.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
