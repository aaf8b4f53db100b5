#!/usr/bin/env bash
# Triton's `do_not_specialize` does not reach into tuples: of an argument that is one, every number that is 1 or divisible by 16 still makes
# a kernel of its own (a 1 even becomes a constant), without a word. Whoever gathers sizes in a tuple compiles anew for sizes that one
# kernel served before.
#
# Seen with triton 3.6.0 and 3.9.0 (torch 2.13.0 for a tensor only), no GPU needed, on Linux x86-64, Python 3.11. Expected output:
#   triton 3.6.0, plain: 1 kernels
#   triton 3.6.0, in_a_tuple: 3 kernels
#   triton 3.9.0, plain: 1 kernels
#   triton 3.9.0, in_a_tuple: 3 kernels
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
install torch==2.13.0 numpy==2.3.5
cat > "$folder/tuples.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


class Driver:
    """As much of one as compiling asks for: no GPU is needed."""

    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@triton.jit(do_not_specialize=["n"])
def plain(p, n):
    tl.store(p, n)


@triton.jit(do_not_specialize=["sizes"])
def in_a_tuple(p, sizes):
    tl.store(p, sizes[0])


triton.runtime.driver._active = Driver()
p = torch.zeros(1, dtype=torch.int32)
for kernel, form in ((plain, lambda n: n), (in_a_tuple, lambda n: (n,))):
    keys = set()
    triton.knobs.runtime.jit_cache_hook = lambda *_, key, **__: keys.add(key) or True
    for n in (1, 16, 17):
        kernel.warmup(p, form(n), grid=(1,))
    print(f"triton {triton.__version__}, {kernel.fn.__name__}: {len(keys)} kernels")
PYTHON
found=$(
    for version in 3.6.0 3.9.0; do
        install --no-deps --force-reinstall "triton==$version"
        "$folder/venv/bin/python" "$folder/tuples.py" 2> /dev/null
    done
)
echo "$found"
[ "$found" = "triton 3.6.0, plain: 1 kernels
triton 3.6.0, in_a_tuple: 3 kernels
triton 3.9.0, plain: 1 kernels
triton 3.9.0, in_a_tuple: 3 kernels" ] || { echo "the behaviour has changed"; exit 1; }
