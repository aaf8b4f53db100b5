#!/usr/bin/env bash
# A backend of torch.compile may add tensors of its own to a graph's inputs: weights that it has folded, tables, scales. All sizes are
# plain integers while Dynamo compiles with its defaults, and the tensor added has a fixed size for ever. Yet AOTAutograd, which finds no note
# of Dynamo's on that tensor, gives every size of it above 1 a symbol, in Dynamo's own shape environment and without a source. Often that is
# harmless; where tracing needs a guard on such a size (here, that the output of a strided convolution is not empty), Dynamo cannot
# write it down and the whole compilation ends in "IndexError: list index out of range", long after the backend has returned.
# With StatefulSymbolicContext(dynamic_sizes=[DimDynamic.STATIC] * dim, …) in TracingContext.get().tensor_to_context the sizes stay numbers.
#
# Seen with torch 2.13.0 (2.14.1 does the same) on Linux x86-64, Python 3.11. Expected output:
#   torch 2.13.0
#   sizes of the second input: symbol, 1, symbol, symbol
#   IndexError: list index out of range
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/extra.py" <<'PYTHON'
import torch
import torch.nn.functional as F
from torch import fx
from torch._dynamo.backends.common import aot_autograd

extra = torch.ones(8, 1, 3, 3)


def eager(graph, inputs):
    sizes = graph.graph.find_nodes(op="placeholder")[1].meta["val"].shape
    print("sizes of the second input:", ", ".join(str(size) if type(size) is int else "symbol" for size in sizes))
    return graph.forward


def backend(graph, inputs):
    """Filters the first input by a tensor of the backend's own, as an optimiser that folds weights would."""
    larger = fx.symbolic_trace(lambda x, weight: (F.conv2d(x, weight, stride=2, padding=1, groups=8),))
    compiled = aot_autograd(fw_compiler=eager)(larger, [*inputs, extra])
    return lambda *inputs: compiled(*inputs, extra)


print("torch", torch.__version__.split("+")[0])
try:
    y = torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2, 8, 16, 16))
    print("result of size", tuple(y.shape))
except Exception as error:
    print(type(error).__name__ + ":", str(error).splitlines()[0])
PYTHON
found=$("$folder/venv/bin/python" "$folder/extra.py" 2>/dev/null)
echo "$found"
[ "$found" = "torch 2.13.0
sizes of the second input: symbol, 1, symbol, symbol
IndexError: list index out of range" ] || { echo "the behaviour has changed"; exit 1; }
