# Sourced by the other scripts: makes .venv in the repository and installs the project into it, again whenever setup.py or a
# requirements.txt has changed.
# EXTRAS names the extras of setup.py to install, dev by default. WITH_LIBERO=1 adds LIBERO's simulator where that can be done.
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
if [ "${WITH_LIBERO:-}" = 1 ] && [ "$required" != "$(cat .venv/installed_libero.txt 2>/dev/null)" ]; then
  # 340 MB, and OpenGL without a screen. Without them its tests are skipped, with a message.
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update && apt-get install --yes --no-install-recommends libosmesa6 libegl1 libgl1 libegl-mesa0 libgles2; } >/dev/null 2>&1 ||
      echo "warning: no OpenGL for LIBERO: apt-get install libosmesa6 libegl1 libgl1 libegl-mesa0 libgles2 failed" >&2
  fi
  headless=$(.venv/bin/python -c 'from importlib.metadata import version; print(version("opencv-python-headless"))')
  install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
  uv_install=(env "VIRTUAL_ENV=$PWD/.venv" .venv/bin/uv pip install --quiet)
  # LIBERO brings OpenCV with windows, whose files replace those of the one without.
  if { "${uv_install[@]}" --editable '.[libero]' || "${install[@]}" --editable '.[libero]'; } &&
    "${install[@]}" --force-reinstall --no-deps "opencv-python-headless==$headless"; then
    printf '%s\n' "$required" > .venv/installed_libero.txt
  else
    echo "warning: LIBERO could not be installed, and its tests are skipped" >&2
  fi
fi
source .venv/bin/activate
