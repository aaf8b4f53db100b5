"""No write, alias or random number of PyTorch's operators is missed by the analysis: see operator_samples.py."""

import subprocess
import sys
from pathlib import Path

import pytest

PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_no_write_alias_or_random_number_is_missed(part):
    pytest.importorskip("expecttest", reason="torch.testing's samples need it")
    script = Path(__file__).with_name("operator_samples.py")
    done = subprocess.run([sys.executable, str(script), str(part), str(PARTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
