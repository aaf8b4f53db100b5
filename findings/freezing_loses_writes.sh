#!/usr/bin/env bash
# With torch._inductor.config.freezing, a compiled model that writes to its input in place writes nothing and returns the input as it was:
# other values than eager and than Inductor without freezing, without a word. What has to be kept (a mutation that the caller sees) is
# lost where only weights should become constants.
#
# Seen with torch 2.13.0 (CPU) on Linux x86-64, Python 3.11. Expected output:
#   torch 2.13.0
#   freezing False: returned True, written True
#   freezing True: returned False, written False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/program.py" <<'PYTHON'
import torch
import torch._inductor.config
from torch import nn

print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)


class Doubles(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        x.mul_(2)
        return x, y


model, x = Doubles().eval(), torch.randn(2, 4, 6, 6)
for freezing in (False, True):
    torch._dynamo.reset()
    given = x.clone()
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        returned = torch.compile(model)(given)[0]
    print(f"freezing {freezing}: returned {torch.equal(returned, 2 * x)}, written {torch.equal(given, 2 * x)}")
PYTHON
cd "$folder"
found=$("$folder/venv/bin/python" program.py 2>/dev/null)
echo "$found"
[ "$found" = "torch 2.13.0
freezing False: returned True, written True
freezing True: returned False, written False" ] || { echo "the behaviour has changed"; exit 1; }
