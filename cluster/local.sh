#!/usr/bin/env bash
# A Ray cluster of several node processes and an S3 server on this machine: cluster/local.sh up 3, cluster/local.sh down.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python="$here/../.venv/bin/python"
if [ ! -x "$python" ]; then # installed into the active environment instead
    python=python
    python -c "import boto3" 2>/dev/null || { echo "error: no .venv here; make setup makes it" >&2; exit 2; }
fi
exec "$python" "$here/local.py" "$@"
