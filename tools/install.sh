# Sourced by the other scripts: makes .venv in the repository and installs the project into it, again whenever setup.py or a
# requirements.txt has changed.
# EXTRAS names the extras of setup.py to install, dev by default.
extras=${EXTRAS:-dev}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: Python 3.11 or newer is needed and $python is $("$python" -V 2>&1); set PYTHON=/path/to/python3.11" >&2
  exit 2
}
required=$(cat setup.py como_jax/*/requirements.txt)
if [ "$required" != "$(cat ".venv/installed_$extras.txt" 2>/dev/null)" ]; then
  echo "Installing into $PWD/.venv"
  "$python" -m venv .venv
  pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check)
  # uv needs a third of pip's time. Where pip is set up for an index that uv does not know, pip does it.
  "${pip[@]}" install uv && VIRTUAL_ENV=$PWD/.venv .venv/bin/uv pip install --quiet --editable ".[$extras]" ||
    "${pip[@]}" install --editable ".[$extras]"
  printf '%s\n' "$required" > ".venv/installed_$extras.txt"
fi
source .venv/bin/activate
