#!/usr/bin/env bash
# FakeTensorProp, PyTorch's pass that notes the shape of every node of a graph without computing anything, changes the module's
# real buffers where the graph writes them: a counter counts, running statistics move. Two things meet: get_attr hands the real
# buffer to the node, and under FakeTensorMode(allow_non_fake_inputs=True) a call without any fake argument is run for real.
# With the module's attributes made fake first (FakeTensorMode.from_tensor), nothing changes.
#
# Seen with torch 2.13.0 on Linux x86-64, Python 3.11. Expected output:
#   torch 2.13.0
#   buffer before 0.0, after propagation 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/propagate.py" <<'PYTHON'
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp


class Counter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x * self.calls


x = torch.ones(3)
graph = torch.export.export(Counter(), (x,)).module(check_guards=False)
before = float(graph.calls)
FakeTensorProp(graph, FakeTensorMode(allow_non_fake_inputs=True)).propagate(x)
print("torch", torch.__version__.split("+")[0])
print(f"buffer before {before}, after propagation {float(graph.calls)}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/propagate.py" 2>/dev/null)
echo "$found"
[ "$found" = "torch 2.13.0
buffer before 0.0, after propagation 1.0" ] || { echo "the behaviour has changed"; exit 1; }
