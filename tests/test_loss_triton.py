"""The Triton kernel of the loss room in Triton's interpreter, on the CPU, in a process of its own.

TRITON_INTERPRET has to be set before triton is first imported, and other tests of the same run need
the real compiler.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
WANTED = 33  # fewer would mean that the child did not collect what is written there


@pytest.mark.slow
def test_the_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
         TESTS / "interpreted" / "triton_loss.py"],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", child.stdout)
    summary = child.stdout.strip().splitlines()[-1:]
    print("in the interpreter:", *summary)
    assert child.returncode == 0, child.stdout[-20000:]
    assert passed and int(passed[1]) >= WANTED, child.stdout[-2000:]
    assert "skipped" not in summary[0], child.stdout[-2000:]
