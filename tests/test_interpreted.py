"""The Triton kernels in Triton's interpreter, on the CPU, each room in a process of its own.

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
# fewer would mean that the child did not collect what is written there
WANTED = {
    "attention": 120, "decode": 60, "linear": 170, "linear_delta": 66, "loss": 33, "moe": 54,
    "norm": 85, "optim": 69, "sparse": 27,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("room", WANTED)
def test_the_kernels_in_the_interpreter(room):
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
         TESTS / "interpreted" / f"triton_{room}.py"],
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
    assert passed and int(passed[1]) >= WANTED[room], child.stdout[-2000:]
    assert "skipped" not in summary[0], child.stdout[-2000:]


def test_every_room_of_the_folder_is_run():
    found = {p.stem.removeprefix("triton_") for p in (TESTS / "interpreted").glob("triton_*.py")}
    assert found == set(WANTED)
