# Sourced by the other scripts: makes .venv in the repository and installs the project into it, once for every setup.py.
# EXTRAS names the extras of setup.py to install, dev by default.
extras=${EXTRAS:-dev}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: Python 3.11 or newer is needed and $python is $("$python" -V 2>&1); set PYTHON=/path/to/python3.11" >&2
  exit 2
}
if ! cmp -s setup.py ".venv/installed_$extras.py"; then
  echo "Installing into $PWD/.venv"
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
  cp setup.py ".venv/installed_$extras.py"
fi
source .venv/bin/activate
