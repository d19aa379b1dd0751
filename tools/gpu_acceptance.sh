#!/usr/bin/env bash
# The first thing to run on a machine with GPUs: checks in the order in which things would break, and a report.
# Usage: tools/gpu_acceptance.sh [--cpu] [--model FOLDER] [--only CHECK ...] [--out FOLDER]; docs/gpu-setup.md says more.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m tests.gpu.acceptance "$@"
