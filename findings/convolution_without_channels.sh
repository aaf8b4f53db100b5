#!/usr/bin/env bash
# A convolution without input channels (what is left when pruning has removed them all) sums over nothing, so its output should be
# its bias: F.linear does so. F.conv2d returns a tensor without any output channels instead, though weight and bias have eight,
# and so do its meta kernel and what torch.compile makes of it: the layers behind it then fail, or work on nothing.
#
# Seen with torch 2.13.0 on Linux x86-64, Python 3.11. Expected output:
#   torch 2.13.0
#   linear, weight [8, 0]: shape (2, 8), all ones: True
#   conv2d, weight [8, 0, 3, 3]: shape (2, 0, 6, 6)
#   conv2d on meta tensors: shape (2, 0, 6, 6)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/empty.py" <<'PYTHON'
import torch
import torch.nn.functional as F

bias = torch.ones(8)
y = F.linear(torch.zeros(2, 0), torch.zeros(8, 0), bias)
print("torch", torch.__version__.split("+")[0])
print(f"linear, weight [8, 0]: shape {tuple(y.shape)}, all ones: {bool((y == 1).all())}")
x, weight = torch.zeros(2, 0, 8, 8), torch.zeros(8, 0, 3, 3)
print("conv2d, weight [8, 0, 3, 3]: shape", tuple(F.conv2d(x, weight, bias).shape))
print("conv2d on meta tensors: shape", tuple(F.conv2d(x.to("meta"), weight.to("meta"), bias.to("meta")).shape))
PYTHON
found=$("$folder/venv/bin/python" "$folder/empty.py" 2>/dev/null)
echo "$found"
[ "$found" = "torch 2.13.0
linear, weight [8, 0]: shape (2, 8), all ones: True
conv2d, weight [8, 0, 3, 3]: shape (2, 0, 6, 6)
conv2d on meta tensors: shape (2, 0, 6, 6)" ] || { echo "the behaviour has changed"; exit 1; }
