#!/bin/sh
# Make the environment in VENV: sh install.sh VENV [PYTHON]
#
# uv is used when it is there, otherwise venv and pip. On a machine without an NVIDIA driver the
# CPU build of torch is asked for first; the usual Linux build brings gigabytes of GPU libraries.
set -eu

venv=$1
python=${2:-python3}
unset PYTHONDONTWRITEBYTECODE  # Data-Juicer starts three times slower without bytecode on disk

"$python" - <<'CHECK'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"Python 3.11 or 3.12 is needed, this is {sys.version.split()[0]}; "
             "name another one: make PYTHON=python3.12 ...")
CHECK

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }
torch_version=$(sed -n 's/^torch==//p' constraints.txt)

if command -v uv >/dev/null 2>&1; then
    uv venv --quiet --allow-existing --python "$python" "$venv"
    VIRTUAL_ENV=$(cd "$venv" && pwd)
    export VIRTUAL_ENV
    backend=auto
    has_gpu || backend=cpu
    uv pip install --torch-backend "$backend" "torch==$torch_version" \
        || uv pip install "torch==$torch_version"
    uv pip install --compile-bytecode --constraint constraints.txt --editable '.[dev]'
else
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade "pip>=24"
    if ! has_gpu; then
        # A wheel that pip's own configuration offers, else uv's knowledge of where CPU builds are.
        "$venv/bin/python" -m pip install --quiet "torch==$torch_version+cpu" 2>/dev/null || {
            "$venv/bin/python" -m pip install --quiet uv
            "$venv/bin/uv" pip install --python "$venv/bin/python" --torch-backend cpu \
                "torch==$torch_version"
        } || echo "no CPU build of torch $torch_version can be had; installing the usual one"
    fi
    "$venv/bin/python" -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
fi
touch "$venv/.ready"
