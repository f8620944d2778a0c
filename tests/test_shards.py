"""Tests in several processes: what each of them has, and what is left when some of them die."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from xml.etree import ElementTree

import pytest

TESTS = Path(__file__).parent
CONFTEST = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from shard import pytest_addoption, pytest_configure
"""
DTYPES = """
import pytest

@pytest.mark.parametrize("dtype", ["torch.float32", "torch.float16", "torch.bfloat16"])
@pytest.mark.parametrize("n", range({n}))
def test_{name}(n, dtype):
    pass

def test_{name}_without_dtype():
    pass
"""


def folder_of(tmp_path: Path, **files: str) -> Path:
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def collected(folder: Path, *options: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
         *options, "."],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def run_shards(folder: Path, *options: str, pytest_options=()):
    """(exit code, the lines printed, outcome of each test by JUnit, text of tests.log)"""
    done = subprocess.run(
        [sys.executable, TESTS / "run_shards.py", folder / "results", *options, "--", ".",
         *pytest_options],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == "", done.stderr
    outcomes = {}
    for case in ElementTree.parse(folder / "results/tests.xml").iter("testcase"):
        name = case.get("name")
        assert name not in outcomes, "a test is listed once"
        outcomes[name] = case[0].tag if len(case) else "passed"
    log = (folder / "results/tests.log").read_text()
    return done.returncode, done.stdout.splitlines(), outcomes, log


@pytest.mark.parametrize("count", [1, 3])
def test_the_shards_have_every_test_once_and_the_most_telling_first(tmp_path, count):
    folder = folder_of(
        tmp_path, test_a=DTYPES.format(name="a", n=3), test_b_gpu=DTYPES.format(name="b", n=2)
    )
    everything = collected(folder)
    assert len(everything) == 3 * 3 + 1 + 3 * 2 + 1
    shards = [collected(folder, "--shard", f"{i + 1}/{count}") for i in range(count)]
    assert shards[0] == collected(folder, "--shard", f"1/{count}"), "the same each time"
    # first the first of each shard, then the second of each
    turns = zip_longest(*shards, fillvalue="")
    in_order = [test for turn in turns for test in turn if test]
    assert sorted(in_order) == sorted(everything)
    ranks = [
        (2 if "float32" in test else 1 if "torch.float16" in test else 0, "test_a" in test)
        for test in in_order
    ]
    assert ranks == sorted(ranks) and len(set(ranks)) == 6


@pytest.mark.parametrize("share", ["0/3", "4/3", "3", "a/b"])
def test_a_share_that_is_none_is_refused(tmp_path, share):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--shard", share, "."],
        cwd=folder_of(tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 4
    assert f"--shard: is '{share}', need I/N with 1 <= I <= N" in done.stderr


MISHAPS = """
import os, time
import pytest

def test_passes(): pass
def test_fails(): assert 1 + 1 == 3
def test_skips(): pytest.skip("no such card")
@pytest.fixture
def broken(): raise OSError("no such file")
def test_has_a_broken_fixture(broken): pass
def test_ends_the_process(): os._exit(7)
def test_after_the_end(): pass
def test_hangs(): time.sleep(600)
def test_after_the_hanging(): pass
@pytest.mark.xfail
def test_is_expected_to_fail(): assert False
"""


@pytest.mark.parametrize("shards", ["1", "4"])
def test_what_became_of_each_test_is_known_whatever_the_processes_do(tmp_path, shards):
    folder = folder_of(tmp_path, test_mishaps=MISHAPS, test_unreadable="import no_such_module")
    code, lines, outcomes, log = run_shards(folder, "--shards", shards, "--patience", "4")
    assert code == 1
    assert outcomes == {
        "test_passes": "passed", "test_fails": "failure", "test_skips": "skipped",
        "test_has_a_broken_fixture": "error", "test_ends_the_process": "error",
        "test_after_the_end": "passed", "test_hangs": "error", "test_after_the_hanging": "passed",
        "test_is_expected_to_fail": "skipped", "test_unreadable.py": "error",
    }  # fmt: skip
    assert re.fullmatch(
        rf"3 passed, 1 failed, 4 errors, 2 skipped in {shards} process(es)? and \d+ s", lines[-1]
    )
    assert log.splitlines()[0] == lines[-1]
    for words in (
        "FAILED test_mishaps.py::test_fails: assert (1 + 1) == 3",
        "ERROR test_mishaps.py::test_has_a_broken_fixture: OSError: no such file",
        "ERROR test_mishaps.py::test_ends_the_process: the process ended with exit code 7",
        "ERROR test_mishaps.py::test_hangs: still running after 4 s, and killed",
        "ERROR test_unreadable.py: ModuleNotFoundError: No module named 'no_such_module'",
    ):
        assert words in lines
    assert "def test_fails(): assert 1 + 1 == 3" in log and "no such card" in log


SLEEPER = """
import pathlib, subprocess, time

def test_quick(): pass
def test_slow():
    child = subprocess.Popen(["sleep", "600"])
    pathlib.Path("child").write_text(str(child.pid))
    time.sleep(600)
def test_late(): pass
"""


def test_at_the_limit_everything_is_killed_and_the_results_so_far_stay(tmp_path):
    folder = folder_of(tmp_path, test_sleeper=SLEEPER)
    begin = time.monotonic()
    code, lines, outcomes, log = run_shards(folder, "--shards", "1", "--seconds", "4")
    assert time.monotonic() - begin < 60
    assert code == 1
    assert outcomes == {"test_quick": "passed", "test_slow": "skipped", "test_late": "skipped"}
    assert re.fullmatch(r"1 passed, 2 did not run in 1 process and \d+ s", lines[-1])
    assert "did not run within 4 s: test_sleeper.py::test_late" in log
    child = int((folder / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    if state.exists() and state.read_text().rsplit(")")[-1].split()[0] != "Z":
        os.kill(child, 9)
        pytest.fail("a test's own child outlived it")


# a CUDA context that a kernel broke fails everything that follows in its process
BROKEN_GPU = """
import sys, types

def lost():
    raise RuntimeError("an illegal memory access was encountered\\nand more")

sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(
    is_initialized=lambda: True, synchronize=lambda: None
))

def test_before(): sys.modules["torch"].cuda.synchronize()
def test_fails_otherwise(): assert False
def test_between(): sys.modules["torch"].cuda.synchronize()
def test_breaks(): sys.modules["torch"].cuda.synchronize = lost; assert False
def test_after(): sys.modules["torch"].cuda.synchronize()
"""


def test_a_broken_gpu_context_costs_the_one_test_that_broke_it(tmp_path):
    folder = folder_of(tmp_path, test_gpu=BROKEN_GPU)
    code, _, outcomes, log = run_shards(folder, "--shards", "1")
    assert code == 1
    assert Counter(outcomes.values()) == {"passed": 3, "failure": 2}
    assert outcomes["test_fails_otherwise"] == outcomes["test_breaks"] == "failure"
    assert log.count("the GPU is lost to this process: an illegal memory access") == 1


def test_the_exit_code_tells_good_from_nothing(tmp_path):
    folder = folder_of(tmp_path, test_good="def test_good(): pass")
    # more processes than tests: those without one are no failure
    assert run_shards(folder, "--shards", "2")[0] == 0
    assert run_shards(folder, "--shards", "2", pytest_options=["-k", "nothing"])[0] == 2
    code, lines, *_ = run_shards(folder, "--shards", "1", pytest_options=["--no-such-option"])
    assert code == 2 and "nothing was collected in the shards 1/1; see tests.log" in lines
