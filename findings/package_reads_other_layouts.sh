#!/usr/bin/env bash
# An AOTInductor package reads its inputs by the example's dtype, sizes and strides, and looks at none of them: a channels_last image,
# which the exported program takes as any other, gives other values, and a float64 image numbers without meaning, with no error. AOTI_RUNTIME_CHECK_INPUTS=1 in the environment of whoever *loads* the package turns a check on; by default it is off.
# Who serves packages must set it, or bring inputs into the example's form first.
#
# Seen with torch 2.13.0 on Linux x86-64, Python 3.11. Expected output:
#   torch 2.13.0
#   as the example: equal to the model
#   channels_last, the same values: runs, equal False
#   float64, the same values: runs, equal False
#   channels_last with AOTI_RUNTIME_CHECK_INPUTS=1: RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 setuptools
cat > "$folder/program.py" <<'PYTHON'
import os
import subprocess
import sys

import torch
from torch import nn


def outcome(run, given, wanted):
    try:
        found = run(given)
    except Exception as error:
        return type(error).__name__
    return f"runs, equal {torch.allclose(found.float(), wanted, atol=1e-3)}"


torch.manual_seed(0)
model, x = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
last = x.contiguous(memory_format=torch.channels_last)
with torch.no_grad():
    y = model(x)
    if len(sys.argv) > 1:
        print(outcome(torch._inductor.aoti_load_package("model.pt2"), last, y))
        sys.exit()
    torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path="model.pt2")
    run = torch._inductor.aoti_load_package("model.pt2")
    print("torch", torch.__version__.split("+")[0])
    print("as the example:", "equal to the model" if torch.allclose(run(x), y, atol=1e-4) else "other values")
    print("channels_last, the same values:", outcome(run, last, y))
    print("float64, the same values:", outcome(run, x.double(), y))
checked = subprocess.run([sys.executable, __file__, "load"], env=os.environ | {"AOTI_RUNTIME_CHECK_INPUTS": "1"}, capture_output=True, text=True)
print("channels_last with AOTI_RUNTIME_CHECK_INPUTS=1:", checked.stdout.strip())
PYTHON
cd "$folder"
found=$("$folder/venv/bin/python" program.py 2>/dev/null)
echo "$found"
[ "$found" = "torch 2.13.0
as the example: equal to the model
channels_last, the same values: runs, equal False
float64, the same values: runs, equal False
channels_last with AOTI_RUNTIME_CHECK_INPUTS=1: RuntimeError" ] || { echo "the behaviour has changed"; exit 1; }
