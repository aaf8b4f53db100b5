#!/usr/bin/env bash
# A pooling with ceil_mode written as ONNX has PyTorch's size and values in ONNX Runtime. OpenVINO reads the same valid file otherwise:
# at operator set 18 it keeps last windows that start outside of the image (another shape), and an average over windows that reach
# beyond the padding has other values. Networks of the GoogLeNet and SqueezeNet kind have such poolings; who needs both engines writes explicit padding.
#
# Seen with torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, openvino 2026.4.1 on Linux x86-64, Python 3.11. Expected output:
#   torch 2.13.0, onnxruntime 1.32.0, openvino 2026.4.1
#   max_pool2d(2, 3), 6x9 pixels: PyTorch (2, 3), ONNX Runtime (2, 3) equal, OpenVINO (3, 4)
#   max_pool2d(2, 2, 1), 7x8 pixels: PyTorch (4, 5), ONNX Runtime (4, 5) equal, OpenVINO (5, 5)
#   avg_pool2d(3, 3, 1), 6x9 pixels: PyTorch (3, 4), ONNX Runtime (3, 4) equal, OpenVINO (3, 4) other values
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 openvino==2026.4.1
cat > "$folder/program.py" <<'PYTHON'
import onnxruntime
import openvino
import torch
from torch import nn

torch.manual_seed(0)
print(f"torch {torch.__version__.split('+')[0]}, onnxruntime {onnxruntime.__version__}, openvino {openvino.__version__.split('-')[0]}")
for name, pool, size in (
    ("max_pool2d(2, 3)", nn.MaxPool2d(2, 3, ceil_mode=True), (6, 9)),
    ("max_pool2d(2, 2, 1)", nn.MaxPool2d(2, 2, 1, ceil_mode=True), (7, 8)),
    ("avg_pool2d(3, 3, 1)", nn.AvgPool2d(3, 3, 1, ceil_mode=True), (6, 9)),
):
    x = torch.randn(1, 2, *size)
    torch.onnx.export(pool, (x,), "model.onnx", dynamo=True, opset_version=18, verbose=False, external_data=False)
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    compiled = openvino.compile_model("model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    own, text = pool(x), []
    for engine, y in (("ONNX Runtime", session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), ("OpenVINO", compiled([x.numpy()])[0])):
        same = "" if y.shape != own.shape else " equal" if torch.allclose(torch.from_numpy(y), own, atol=1e-4) else " other values"
        text.append(f"{engine} {y.shape[2:]}{same}")
    print(f"{name}, {size[0]}x{size[1]} pixels: PyTorch {tuple(own.shape[2:])}, {', '.join(text)}", flush=True)
PYTHON
cd "$folder"
found=$("$folder/venv/bin/python" program.py 2>/dev/null)
echo "$found"
[ "$found" = "torch 2.13.0, onnxruntime 1.32.0, openvino 2026.4.1
max_pool2d(2, 3), 6x9 pixels: PyTorch (2, 3), ONNX Runtime (2, 3) equal, OpenVINO (3, 4)
max_pool2d(2, 2, 1), 7x8 pixels: PyTorch (4, 5), ONNX Runtime (4, 5) equal, OpenVINO (5, 5)
avg_pool2d(3, 3, 1), 6x9 pixels: PyTorch (3, 4), ONNX Runtime (3, 4) equal, OpenVINO (3, 4) other values" ] || { echo "the behaviour has changed"; exit 1; }
