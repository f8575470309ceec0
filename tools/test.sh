#!/usr/bin/env bash
# Installs like quickstart.sh and runs all tests; arguments go to pytest, for example: tools/test.sh -m "not slow", or
# -n 0 FILE to run one file in one process
set -euo pipefail
cd "$(dirname "$0")/.."
# The compiler of TPUs is not of the dev extra, since where there is no TPU it says so at the start of every command.
EXTRAS=dev,tpu,torch source tools/install.sh

ruff check .
ruff format --check .
lint-imports
mypy
python -m pytest "$@"
