#!/usr/bin/env bash
# Installs like quickstart.sh, then checks style, imports and types and runs the everyday tests: about a quarter of an hour on
# two CPU cores. With --all it runs the slow tests too, in three quarters of an hour, and with WITH_LIBERO=1 those of LIBERO's
# simulator among them, which takes a minute of installing, as root on Debian or Ubuntu, and two of testing. Other arguments go
# to pytest: tools/test.sh -n 0 FILE
# With --all, openpi's client is installed into .peers (tools/peers.sh) and tried, where the package registry is in reach.
# COMO_PEERS=all tools/test.sh --all also installs LeRobot (8 GB) and TensorFlow (1.5 GB), in minutes, and opens exports with
# them, see como_jax/export/labels/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
which=(-m "not slow")
if [ "${1:-}" = --all ]; then
  which=()
  shift
fi
# The compiler of TPUs is not of the dev extra, since where there is no TPU it says so at the start of every command.
EXTRAS=dev,tpu,torch source tools/install.sh

ruff check .
ruff format --check .
lint-imports
mypy
python -m pytest "${which[@]}" "$@"
