#!/usr/bin/env bash
# torch.onnx drops divisor_override of an average pooling without a word: the file divides by the kernel's size. And it writes
# interpolation with antialias=True so that only some geometries come out right: given a size, ONNX Runtime has PyTorch's values while
# OpenVINO has others; given a scale_factor whose result is not whole (9 rows by 0.5), or align_corners, both have others.
# Whoever exports pre-processing or anti-aliased networks has to compare values, in each engine that will serve them.
#
# Seen with torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, openvino 2026.4.1 on Linux x86-64, Python 3.11. Expected output:
#   torch 2.13.0, onnxruntime 1.32.0, openvino 2026.4.1
#   avg_pool2d(divisor_override=3): ONNX Runtime other values, OpenVINO other values
#   antialias, size (4, 5): ONNX Runtime equal, OpenVINO other values
#   antialias, scale_factor 0.5: ONNX Runtime other values, OpenVINO other values
#   antialias, size (4, 5), align_corners: ONNX Runtime other values, OpenVINO other values
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 openvino==2026.4.1
cat > "$folder/program.py" <<'PYTHON'
import onnxruntime
import openvino
import torch
import torch.nn.functional as F
from torch import nn


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def resize(**how):
    return lambda x: F.interpolate(x, mode="bilinear", antialias=True, **how)


torch.manual_seed(0)
x = torch.randn(2, 3, 9, 8)
print(f"torch {torch.__version__.split('+')[0]}, onnxruntime {onnxruntime.__version__}, openvino {openvino.__version__.split('-')[0]}")
for name, function in {
    "avg_pool2d(divisor_override=3)": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "antialias, size (4, 5)": resize(size=(4, 5)),
    "antialias, scale_factor 0.5": resize(scale_factor=0.5),
    "antialias, size (4, 5), align_corners": resize(size=(4, 5), align_corners=True),
}.items():
    torch.onnx.export(Call(function), (x,), "model.onnx", dynamo=True, verbose=False, external_data=False)
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    compiled = openvino.compile_model("model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = {"ONNX Runtime": session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], "OpenVINO": compiled([x.numpy()])[0]}
    same = [f"{engine} {'equal' if torch.allclose(torch.from_numpy(y), function(x), atol=1e-4) else 'other values'}" for engine, y in found.items()]
    print(f"{name}: {', '.join(same)}", flush=True)
PYTHON
cd "$folder"
found=$("$folder/venv/bin/python" program.py 2>/dev/null)
echo "$found"
[ "$found" = "torch 2.13.0, onnxruntime 1.32.0, openvino 2026.4.1
avg_pool2d(divisor_override=3): ONNX Runtime other values, OpenVINO other values
antialias, size (4, 5): ONNX Runtime equal, OpenVINO other values
antialias, scale_factor 0.5: ONNX Runtime other values, OpenVINO other values
antialias, size (4, 5), align_corners: ONNX Runtime other values, OpenVINO other values" ] || { echo "the behaviour has changed"; exit 1; }
