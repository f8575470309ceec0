#!/usr/bin/env bash
# Makes an environment of its own for a tool that reads what this project writes or serves, and prints its interpreter:
#   tools/peers.sh openpi | vla-eval | lerobot | tensorflow
# The environments lie in .peers beside .venv, and are kept. Status 3: the package registry cannot be reached, or has not
# what is asked for. tests/peers.py calls this.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  # openpi-client 0.1.2 does not name typing_extensions, which it imports.
  openpi) packages=(openpi-client==0.1.2 typing_extensions) ;;
  vla-eval) packages=(vla-eval==0.8.0) ;;
  lerobot) packages=(lerobot==0.4.4 lerobot-doctor==0.2.0) ;;
  tensorflow) packages=(tensorflow-cpu==2.21.0 tensorflow-datasets==4.9.10 array_record importlib_resources) ;;
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
    pip=("$python" -m pip --quiet --disable-pip-version-check --retries 1 --timeout 20)
    "${pip[@]}" install uv >&2 || {
      echo "no environment for $1: the package registry cannot be reached" >&2
      exit 3
    }
    # As in install.sh. pip does it where it is set up for an index that uv does not know.
    VIRTUAL_ENV=$folder "$folder/bin/uv" pip install --quiet "${packages[@]}" >&2 || "${pip[@]}" install "${packages[@]}" >&2 || {
      echo "no environment for $1: the package registry has no ${packages[*]} that can be installed for $("$python" -V)" >&2
      exit 3
    }
    echo "${packages[*]}" > "$folder/installed.txt"
  fi
fi
echo "$python"
