#!/usr/bin/env bash
# copy.deepcopy of a torch.fx.GraphModule loses its forward hooks, as that of every other nn.Module does not: a check of inputs, a
# normalization or a logger that was registered as a hook is silently gone in the copy. What averages, quantizes or converts a traced
# model works on a copy of it. Hooks of its submodules stay.
#
# Seen with torch 2.13.0 on Linux x86-64, Python 3.11. Expected output:
#   torch 2.13.0
#   Sequential: 1 hook, its copy: 1
#   GraphModule: 1 hook, its copy: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/program.py" <<'PYTHON'
import copy

import torch
from torch import fx, nn

print("torch", torch.__version__.split("+")[0])
for model in (nn.Sequential(nn.ReLU()), fx.symbolic_trace(nn.Sequential(nn.ReLU()))):
    calls = []
    model.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
    model(torch.ones(1))
    before = len(calls)
    copy.deepcopy(model)(torch.ones(1))
    print(f"{'GraphModule' if isinstance(model, fx.GraphModule) else 'Sequential'}: {before} hook, its copy: {len(calls) - before}")
PYTHON
cd "$folder"
found=$("$folder/venv/bin/python" program.py 2>/dev/null)
echo "$found"
[ "$found" = "torch 2.13.0
Sequential: 1 hook, its copy: 1
GraphModule: 1 hook, its copy: 0" ] || { echo "the behaviour has changed"; exit 1; }
