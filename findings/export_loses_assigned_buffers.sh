#!/usr/bin/env bash
# A module may keep a state by putting a new tensor in the place of a buffer: `self.state = y`. torch.export (non-strict, its default)
# turns that into a write to the buffer where the module is the one that is exported, and loses it without a word where it is a
# submodule: the program has the state of the first call for good. One would expect both to go on, or an error.
#
# Seen with torch 2.13.0 on Linux x86-64, Python 3.11. Expected output:
#   torch 2.13.0
#   eager: [1.0, 2.0, 3.0]
#   exported, the module itself: [1.0, 2.0, 3.0]
#   exported, inside of another module: [1.0, 1.0, 1.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/assigned.py" <<'PYTHON'
import torch
from torch import nn


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.zeros(()))

    def forward(self, x):
        self.state = self.state + x
        return self.state * 1


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Sum()

    def forward(self, x):
        return self.inner(x)


x = torch.ones(())
print("torch", torch.__version__.split("+")[0])
eager = Outer()
print("eager:", [float(eager(x)) for _ in range(3)])
for name, module in (("the module itself", Sum()), ("inside of another module", Outer())):
    program = torch.export.export(module, (x,)).module()
    print(f"exported, {name}:", [float(program(x)) for _ in range(3)])
PYTHON
found=$("$folder/venv/bin/python" "$folder/assigned.py" 2>/dev/null)
echo "$found"
[ "$found" = "torch 2.13.0
eager: [1.0, 2.0, 3.0]
exported, the module itself: [1.0, 2.0, 3.0]
exported, inside of another module: [1.0, 1.0, 1.0]" ] || { echo "the behaviour has changed"; exit 1; }
