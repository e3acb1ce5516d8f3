#!/usr/bin/env bash
# The whole truth about a GPU in one command: correctness, sanitizer, inlining, graphs, limits, host time, the matrix, models.
#
#   bench/gpu.sh OUT [--budget SECONDS] [--only PATTERN] [--steps A,B] [--resume [CSV]] [--dry-run]
#
# Needs python3 with torch, triton, numpy, pytest and pytest-benchmark; runs from a checkout, nothing installed. Everything
# is under OUT, in at most six files, and usable when the command is cut short: each measurement is flushed as it is made.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
out=${1:-}
case "$out" in
  "" | -*)
    sed -n '4p' "${BASH_SOURCE[0]}" | cut -c5- >&2
    exit 2
    ;;
esac
mkdir -p "$out"
out=$(cd "$out" && pwd)
shift
cd "$root"
exec "${PYTHON:-python3}" -m bench.gpu "$out" "$@"
