#!/usr/bin/env bash
# Triton 3.6's interpreter (TRITON_INTERPRET=1) cannot run a loop whose bound is not a constant once NumPy is 2.4 or newer: it turns
# the bound, an array of one element, into a Python integer, which NumPy warned about until 2.3 and refuses since. `for i in range(n)`
# and tl.range(n) fail alike, with an InterpreterError about 0-dimensional arrays that names neither the loop nor NumPy. Triton
# declares no NumPy at all, so no resolver sees it. The same kernel compiles and runs on a GPU, and in the interpreter of Triton 3.9.
#
# Seen with triton 3.6.0, numpy 2.3.5 and 2.4.6, torch 2.13.0 (for tensors only) on Linux x86-64, Python 3.11. Expected output:
#   triton 3.6.0, numpy 2.3.5: 10
#   triton 3.6.0, numpy 2.4.6: InterpreterError TypeError('only 0-dimensional arrays can be converted to Python scalars')
#   triton 3.9.0, numpy 2.4.6: 10
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
install torch==2.13.0
cat > "$folder/loop.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def add_up(p_total, n):
    total = 0
    for i in range(n):
        total += i
    tl.store(p_total, total)


total = torch.zeros(1, dtype=torch.int64)
try:
    add_up[(1,)](total, 5)
    found = str(int(total))
except Exception as error:
    found = f"{type(error).__name__} {error}"
print(f"triton {triton.__version__}, numpy {numpy.__version__}: {found}")
PYTHON
found=$(
    for versions in "3.6.0 2.3.5" "3.6.0 2.4.6" "3.9.0 2.4.6"; do
        read -r triton numpy <<< "$versions"
        install --no-deps --force-reinstall "triton==$triton" "numpy==$numpy"
        TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/loop.py" 2> /dev/null
    done
)
echo "$found"
[ "$found" = "triton 3.6.0, numpy 2.3.5: 10
triton 3.6.0, numpy 2.4.6: InterpreterError TypeError('only 0-dimensional arrays can be converted to Python scalars')
triton 3.9.0, numpy 2.4.6: 10" ] || { echo "the behaviour has changed"; exit 1; }
