#!/usr/bin/env bash
# Makes an environment of its own for a tool that reads what this project writes or serves, and prints its interpreter:
#   tools/peers.sh openpi | vla-eval | lerobot | tensorflow
# The environments lie in .peers beside .venv, and are kept. Status 3: the package registry cannot be reached.
# tests/peers.py calls this. lerobot and tensorflow are large (about 3 GB and 2 GB, minutes), so these tests run
# only where COMO_PEERS=all is set.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  # openpi-client 0.1.2 does not name typing_extensions, which it imports.
  openpi) packages=(openpi-client==0.1.2 typing_extensions) ;;
  vla-eval) packages=(vla-eval==0.8.0) ;;
  lerobot) packages=("lerobot>=0.4.4,<0.5" lerobot-doctor) ;;
  tensorflow) packages=(tensorflow-cpu tensorflow-datasets importlib_resources array-record) ;;
  *) echo "error: name one of openpi, vla-eval, lerobot, tensorflow" >&2; exit 2 ;;
esac
folder=$PWD/.peers/$1
python=$folder/bin/python
if [ "$(cat "$folder/installed.txt" 2>/dev/null)" != "${packages[*]}" ]; then
  mkdir -p .peers
  # Several processes of the tests may ask for the same one.
  exec 9> ".peers/$1.lock"
  flock 9
  if [ "$(cat "$folder/installed.txt" 2>/dev/null)" != "${packages[*]}" ]; then
    rm -rf "$folder"
    "${PYTHON:-python3}" -m venv "$folder" >&2
    "$python" -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 20 "${packages[@]}" >&2 || {
      echo "the package registry cannot be reached, or has no ${packages[*]} for this Python" >&2
      exit 3
    }
    echo "${packages[*]}" > "$folder/installed.txt"
  fi
fi
echo "$python"
