#!/usr/bin/env bash
# torch.export with dynamic_shapes={0: Dim("batch", min=1)} promises a program for every batch from one up. Where forward asks
# `if x.shape[0] == 1`, the branch for larger batches is taken in for all of them: called with one sample, the program returns
# another result than the model, and no guard complains. Sizes 0 and 1 are assumed away while tracing (as torch.compile does, which
# then guards), and a Dim's min=1 does not bring them back; max and min from 2 up are guarded.
# Who exports with a dynamic batch has to run the program once on a single sample and compare.
#
# Seen with torch 2.13.0 on Linux x86-64, Python 3.11. Expected output:
#   torch 2.13.0
#   model, one sample: 0.0
#   exported, strict=False, one sample: 2.0
#   exported, strict=True, one sample: 2.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/export.py" <<'PYTHON'
import torch
from torch.export import Dim, export


class Single(torch.nn.Module):
    def forward(self, x):
        return x * 0 if x.shape[0] == 1 else x + 1


model, many, one = Single(), torch.ones(3, 2), torch.ones(1, 2)
print("torch", torch.__version__.split("+")[0])
print("model, one sample:", float(model(one)[0, 0]))
for strict in (False, True):
    program = export(model, (many,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=strict)
    print(f"exported, strict={strict}, one sample:", float(program.module()(one)[0, 0]))
PYTHON
found=$("$folder/venv/bin/python" "$folder/export.py" 2>/dev/null)
echo "$found"
[ "$found" = "torch 2.13.0
model, one sample: 0.0
exported, strict=False, one sample: 2.0
exported, strict=True, one sample: 2.0" ] || { echo "the behaviour has changed"; exit 1; }
