#!/usr/bin/env bash
# The truth about a GPU in one command that ends within its budget: correctness, launch path, headline rows, peers, models.
#
#   bench/gpu.sh OUT [--call first|second|tensorrt|rest] [--seconds N] [--only PATTERN] [--steps A,B] [--again TESTS] [--resume] [--dry-run]
#
# Needs python3 with torch, triton, numpy, pytest and pytest-benchmark; runs from a checkout, nothing installed. Everything is
# under OUT, in at most nine files, and usable when the command is cut short: each measurement is flushed as it is made.
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
shift
python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null || ! "$python" -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in ("torch", "triton", "numpy", "pytest", "pytest_benchmark")))'; then
  echo "bench/gpu.sh: $python must have torch, triton, numpy, pytest and pytest-benchmark; name another python by PYTHON=..." >&2
  exit 2
fi
case "$out" in /*) ;; *) out=$PWD/$out ;; esac
cd "$root"
exec "$python" -m bench.gpu "$out" "$@"
