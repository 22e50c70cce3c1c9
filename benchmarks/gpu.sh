#!/usr/bin/env bash
# One GPU measured within minutes, into one JSON: benchmarks/gpu.sh --help. PYTHON names the interpreter (python3).
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu.py" "$@"
