#!/usr/bin/env bash
# Unpack the wheels under FOLDER (.whl, or one of its parts) into TARGET, for processes whose PYTHONPATH ends in TARGET.
#
#   bench/wheels_install.sh FOLDER TARGET
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "${PYTHON:-python3}" "$root/bench/wheels.py" install "$@"
