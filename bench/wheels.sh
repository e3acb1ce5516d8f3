#!/usr/bin/env bash
# Gather the peers' wheels that bench/wheels.txt names into .whl/1, .whl/2, ..., for a machine without a network.
#
#   bench/wheels.sh [PART...]
#
# Prints the size of each part and fails if one does not fit a transfer beside the repository. What is there is kept.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "${PYTHON:-python3}" "$root/bench/wheels.py" gather "$root/.whl" "$@"
