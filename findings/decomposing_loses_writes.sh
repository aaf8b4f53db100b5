#!/usr/bin/env bash
# Dropout in evaluation mode returns its input itself, so a write in place to its result is a write to its input. The exported program
# says so too. ExportedProgram.run_decompositions(), which makes programs functional, loses the write: the schema of aten.dropout
# promises a new tensor, and functionalisation believes it. Neither a warning nor an error tells.
#
# Seen with torch 2.13.0 on Linux x86-64, Python 3.11. Expected output:
#   torch 2.13.0
#   model 2.0, exported 2.0, decomposed 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/decompose.py" <<'PYTHON'
import torch
import torch.nn.functional as F


class Doubled(torch.nn.Module):
    def forward(self, x):
        y = x * 1
        F.dropout(y, 0.5, training=False).mul_(2)
        return y


x = torch.ones(3)
program = torch.export.export(Doubled(), (x,))
exported, decomposed = program.module()(x), program.run_decompositions({}).module()(x)
print("torch", torch.__version__.split("+")[0])
print(f"model {float(Doubled()(x)[0])}, exported {float(exported[0])}, decomposed {float(decomposed[0])}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/decompose.py" 2>/dev/null)
echo "$found"
[ "$found" = "torch 2.13.0
model 2.0, exported 2.0, decomposed 1.0" ] || { echo "the behaviour has changed"; exit 1; }
