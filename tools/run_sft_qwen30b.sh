#!/usr/bin/env bash
# The reference job: Qwen3-Coder-30B-A3B-Instruct on this node's 4 GPUs. Usage: tools/run_sft_qwen30b.sh DATASET [--set ...]
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 DATASET [--set section.key=value ...]" >&2; exit 2; }
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec torchrun --nproc-per-node 4 "$tools/train.py" --config "$tools/../configs/qwen3_coder_30b.toml" --dataset "$@"
