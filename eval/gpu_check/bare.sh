#!/bin/sh
# Run a command with the system's Python, torch and Triton where there is no virtual environment and no network: the
# wheels in the folder WHEELS are unpacked into a folder of their own, once, and nothing of the system is changed.
#
#   sh eval/gpu_check/bare.sh WHEELS -m eval.gpu_check --json gpu.json
#
# PYTHON names another interpreter than python3, SLALOM_SITE another folder for the wheels than /tmp/slalom-site.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3} site=${SLALOM_SITE:-/tmp/slalom-site}
if [ $# -lt 2 ] || ! ls "$1"/*.whl >/dev/null 2>&1 && [ ! -e "$site/complete" ]; then
    echo "bare.sh: got '${1:-}'; usage: bare.sh WHEELS ARGUMENTS-OF-PYTHON..., WHEELS a folder with *.whl" >&2
    exit 2
fi
wheels=$1
shift
if [ ! -e "$site/complete" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
    touch "$site/complete"
fi
export PYTHONPATH="$root:$site" PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-32}"
exec "$python" "$@"
