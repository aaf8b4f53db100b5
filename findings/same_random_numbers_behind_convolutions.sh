#!/usr/bin/env bash
# torch 2.13.0, Inductor on a CPU. `torch._inductor.config.fallback_random` is there so that compiled code draws eager's random numbers.
# Behind a convolution `rand_like` draws others: Inductor lays the convolution's result out as channels_last, although neither its input
# nor its filters are, and `rand_like` fills memory in its order, so that every element gets another element's number. Dropout and
# `bernoulli` behind the same convolution are eager's own. Without `layout_optimization` all three are. The result's strides are those
# of eager in every case, so that nothing outside shows it.
# Seen: rand_like off by 0.95 with layout_optimization, 0.0 without; dropout 0.0 and bernoulli 0.0 in both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore - <<'EOF'
import torch
from torch import nn

torch._inductor.config.fallback_random = True
torch.manual_seed(0)
conv, x = nn.Conv2d(4, 4, 3, padding=1).eval(), torch.randn(2, 4, 6, 6)


def uniform(x):
    y = conv(x)
    return y + torch.rand_like(y)


def dropout(x):
    return nn.functional.dropout(conv(x), 0.5, True)


def bernoulli(x):
    y = conv(x)
    return y * torch.bernoulli(torch.full_like(y, 0.5))


found = {}
for optimised in (True, False):
    torch._inductor.config.layout_optimization = optimised
    for draw in (uniform, dropout, bernoulli):
        torch.compiler.reset()
        compiled = torch.compile(draw)
        results = []
        with torch.no_grad():
            for run in (draw, compiled):
                torch.manual_seed(3)
                results.append(run(x))
        eager, fast = results
        assert eager.stride() == fast.stride() == (144, 36, 6, 1)
        found[draw.__name__, optimised] = float((eager - fast).abs().max())
        print(torch.__version__, f"layout_optimization={optimised}", draw.__name__, f"off by {found[draw.__name__, optimised]:.2g}")
assert found.pop(("uniform", True)) > 0.5
assert max(found.values()) < 1e-6
EOF
