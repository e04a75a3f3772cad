#!/bin/sh
# Every kernel on a real GPU: tests, then times, in under 8 minutes; see bench/gpu.py, whose options it takes.
# Installs nothing: PYTHON names an interpreter with CUDA's torch, triton, pydantic and, for the tests, pytest and
# hypothesis. Default: the project's own if its torch has CUDA, else python3.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    own=$root/.venv/bin/python
    if [ -x "$own" ] && "$own" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2> /dev/null; then
        PYTHON=$own
    fi
fi
# The floors as one package without an installation, by links (see the Makefile's `types`).
farm=$root/build/gpu/fewstep
mkdir -p "$farm"
for floor in platform kernels actors pipelines cluster; do
    ln -sfn "../../../$floor" "$farm/$floor"
done
PYTHONPATH=$root/build/gpu:$root${PYTHONPATH:+:$PYTHONPATH}
TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$root/build/triton}
export PYTHONPATH TRITON_CACHE_DIR
exec "$PYTHON" "$root/bench/gpu.py" "$@"
