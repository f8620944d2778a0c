"""bench/gpu_check.sh: its steps on a small project of its own, and on this one without a GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tilewright.bench import gpu_attention, on_gpu

pytest.importorskip("triton", reason="gpu_check.sh needs triton")

ROOT = Path(__file__).resolve().parent.parent
FILES = {"summary.md", "machine.txt", "tests.log", "tests.xml", "bench.log"}

# laid out as the project is, and without a compiler: setuptools alone builds it
PROJECT = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "tilewright"
version = "0"
[tool.setuptools]
packages = ["tilewright", "tilewright.bench"]
package-dir = {"tilewright" = "engine", "tilewright.bench" = "bench"}
[tool.pytest.ini_options]
markers = ["gpu"]
""",
    "engine/__init__.py": "",
    "engine/__main__.py": "print('the doctor came')",
    "engine/ops/__init__.py": "",
    "kernels/some/__init__.py": "",
    "bench/__init__.py": "",
    "tests/conftest.py": "from shard import pytest_addoption, pytest_configure",
    "tests/test_some.py": """
import pathlib
import pytest, tilewright

@pytest.mark.gpu
@pytest.mark.parametrize("n", range(3))
def test_some(n):
    assert pathlib.Path(tilewright.__file__).parent.parent.name == "site"

def test_without_a_gpu(): raise AssertionError("not marked")
""",
}
BENCHMARK = """
import pathlib, sys, time

folder, budget_flag, budget, dry = sys.argv[1:]
assert budget_flag == "--budget" and dry == "--dry-run"
print("{name} had", budget)
pathlib.Path(folder, "{name}.json").write_text('{{"budget": ' + budget + "}}")
pathlib.Path(folder, "{name}.md").write_text("the table of {name}")
{end}
"""


def project(tmp_path: Path, **changes: str) -> Path:
    root = tmp_path / "project"
    files = {**PROJECT, **{name.replace("__", "/") + ".py": text for name, text in changes.items()}}
    files |= {
        f"bench/gpu_{name}.py": files.get(
            f"bench/gpu_{name}.py", BENCHMARK.format(name=name, end="")
        )
        for name in ("a", "b")
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    shutil.copy(ROOT / "bench/gpu_check.sh", root / "bench")
    for name in ("run_shards.py", "shard.py"):
        shutil.copy(ROOT / "tests" / name, root / "tests")
    return root


def environment(tmp_path: Path) -> dict:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    changes = {"PYTHON": sys.executable, "TMPDIR": str(tmp_path / "scratch")}
    return {**os.environ, **changes, "OMP_NUM_THREADS": "1"}  # nproc heeds it


def check(root: Path, tmp_path: Path):
    """(exit code, summary.md, folder of results), having left nothing behind."""
    results = tmp_path / "results"
    done = subprocess.run(
        [root / "bench/gpu_check.sh", results, "--dry-run"],
        env=environment(tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert list((tmp_path / "scratch").iterdir()) == []
    text = (results / "summary.md").read_text()
    assert done.stdout in text and f"exit code {done.returncode} after" in text
    return done.returncode, text, results


def test_each_step_leaves_its_files_and_each_benchmark_has_its_share(tmp_path):
    code, text, results = check(project(tmp_path), tmp_path)
    assert code == 0, text + (results / "machine.txt").read_text()
    assert {p.name for p in results.iterdir()} == FILES | {"a.json", "b.json"}
    assert re.search(r"^- build: \d+ s", text, re.M)
    n = len(os.sched_getaffinity(0))
    assert re.search(
        rf"^- tests: exit code 0 after \d+ s; 3 passed in {n} process(es)? and", text, re.M
    )
    assert "the doctor came" in (results / "machine.txt").read_text()
    cases = list(ElementTree.parse(results / "tests.xml").iter("testcase"))
    assert len(cases) == 3
    assert "the table of a\nthe table of b" in re.sub(r"\n+", "\n", text)
    budgets = [json.loads((results / f"{n}.json").read_text())["budget"] for n in "ab"]
    # what the first leaves is the second's; all end within nine minutes
    assert 150 < budgets[0] < budgets[1] < 9 * 60
    assert (results / "bench.log").read_text().count(" had ") == 2


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path):
    root = project(
        tmp_path,
        tests__test_some="import pytest\n@pytest.mark.gpu\ndef test_wrong(): assert 1 == 2",
        bench__gpu_a=BENCHMARK.format(name="a", end="sys.exit('a is wrong by 1 %')"),
    )
    broken = PROJECT["pyproject.toml"].replace("setuptools.build_meta", "no_such_backend")
    (root / "pyproject.toml").write_text(broken)
    code, text, results = check(root, tmp_path)
    assert code == 1
    assert {p.name for p in results.iterdir()} == FILES | {"a.json", "b.json"}
    assert re.search(r"^- build: failed after \d+ s, see machine.txt", text, re.M)
    assert re.search(r"^- tests: exit code 1 after \d+ s; 0 passed, 1 failed in", text, re.M)
    assert "  - FAILED tests/test_some.py::test_wrong: assert 1 == 2" in text
    assert re.search(r"^- benchmark a: exit code 1 .*\n(  .*\n)*  a is wrong by 1 %$", text, re.M)
    assert re.search(r"^- benchmark b: exit code 0 ", text, re.M)
    assert "the table of a" in text and "the table of b" in text


SLEEPS = "import os, pathlib, time\npathlib.Path({path!r}).write_text(str(os.getpid()))\n{sleep}"


@pytest.mark.parametrize("step", ["tests", "benchmarks"])
def test_a_signal_ends_all_of_it(tmp_path, step):
    sleep = "time.sleep(300)"
    if step == "tests":
        sleep = f"import pytest\n@pytest.mark.gpu\ndef test_sleeps(): {sleep}"
    sleeps = SLEEPS.format(path=str(tmp_path / "pid"), sleep=sleep)
    name = {"tests": "tests__test_some", "benchmarks": "bench__gpu_a"}[step]
    script = project(tmp_path, **{name: sleeps}) / "bench/gpu_check.sh"
    process = subprocess.Popen(
        [script, tmp_path / "results", "--dry-run"], env=environment(tmp_path),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1.0)
    process.terminate()
    assert process.wait(timeout=30) == 143
    sleeper = int((tmp_path / "pid").read_text())
    if is_alive(sleeper):
        os.kill(sleeper, 9)
        pytest.fail("what the script started outlived it")
    assert list((tmp_path / "scratch").iterdir()) == []


def is_alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")")[-1].split()[0] != "Z"


def test_what_it_cannot_do_it_says(tmp_path):
    script = ROOT / "bench/gpu_check.sh"
    for arguments, words in (
        ([], "usage: bench/gpu_check.sh DIR"),
        ([tmp_path, "--wet-run"], "usage: bench/gpu_check.sh DIR"),
        ([tmp_path], "torch sees no CUDA device; --dry-run does what can be done without one"),
    ):
        hidden = {**environment(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([script, *arguments], env=hidden, capture_output=True, text=True)
        assert done.returncode == 2
        assert words in done.stderr


@pytest.mark.slow
def test_the_dry_run_passes_here(tmp_path):
    code, text, results = check(ROOT, tmp_path)
    built = "- build: failed" not in text  # needs pybind11, cmake and ninja beside this Python
    assert code == (0 if built else 1), text
    benchmarks = {p.stem.removeprefix("gpu_") for p in (ROOT / "bench").glob("gpu_*.py")}
    assert benchmarks and {p.name for p in results.iterdir()} == FILES | {
        f"{name}.json" for name in benchmarks
    }
    found = re.search(r"^- tests: exit code 0 after \d+ s; 0 passed, (\d+) skipped in", text, re.M)
    assert found and int(found[1]) > 900, text
    assert "did not run" not in text


# --- the attention benchmark ---


def test_the_prediction_is_the_readmes():
    readme = (ROOT / "kernels/attention/README.md").read_text()
    (words,) = re.findall(r"A prediction, not verified on a GPU: [^;]+", readme)
    words = " ".join(words.split())
    assert f"at least {gpu_attention.PREDICTED_TFLOPS:.0f} TFLOP/s" in words
    assert "forward, D 128, causal, 8192 tokens and more, on an H200" in words
    predicted = [
        name
        for name, case in gpu_attention.CASES.items()
        if "L" in case and gpu_attention.is_predicted(case, "fwd")
    ]
    assert predicted == [
        "causal-8k-d128", "causal-16k-d128", "causal-8k-d128-gqa4", "causal-8k-d128-flex"
    ]  # fmt: skip


def measured(name, tflops, mode="fwd", variant="tilewright"):
    return {
        "case": name, "shape": gpu_attention.CASES[name], "mode": mode, "variant": variant,
        "times": {}, "tflops": tflops,
    }  # fmt: skip


@pytest.mark.parametrize(("slower", "verdict"), [(450.0, "holds"), (449.0, "does not hold")])
def test_the_slowest_case_decides_on_the_prediction(slower, verdict):
    rows = [
        measured("causal-8k-d128", 500.0),
        measured("causal-16k-d128", slower),
        # what the prediction is not about
        measured("causal-8k-d128", 10.0, mode="fwd+bwd"),
        measured("causal-8k-d128", 11.0, variant="torch flash"),
        measured("causal-8k-d64", 12.0),
        measured("causal-2k-d128", 13.0),
        measured("shifted-8k-g2k-d128", 14.0),
        measured("full-8k-d128", 15.0),
        measured("decode-b8-8k-gqa4", 16.0),
    ]
    line = gpu_attention.outcome_of_prediction([{**row, "times": {"n": 1}} for row in rows])
    assert line.endswith(
        f"Measured: causal-8k-d128 500, causal-16k-d128 {slower:.0f} TFLOP/s; it {verdict}."
    )
    assert gpu_attention.outcome_of_prediction(rows[2:]).endswith("Not measured here.")


def test_what_was_measured_before_a_cut_is_on_disk(tmp_path, monkeypatch):
    def measure(name, case, mode, device, seconds):
        if name == third:
            assert [row["case"] for row in json.loads(path.read_text())["rows"]] == [first, first]
            raise KeyboardInterrupt
        if name == second:
            raise RuntimeError("off by 1 %")
        return [measured(name, 1.0, mode) | {"times": None, "why_not": "made up", "ours_over": 1.0}]

    path = tmp_path / "attention.json"
    cases = list(gpu_attention.CASES.items())
    (first, _), (second, _), (third, _), *_ = cases
    monkeypatch.setattr(gpu_attention, "measure", measure)
    monkeypatch.setattr(on_gpu.machine, "measure", broken_ceilings)
    with pytest.raises(KeyboardInterrupt):
        gpu_attention.main([str(tmp_path), "--dry-run"])
    record = json.loads(path.read_text())
    assert record["wrong"] == [
        f"{second} {m}: RuntimeError: off by 1 %" for m in ("fwd", "fwd+bwd")
    ]
    assert record["ceilings"]["how"] == "not measured: RuntimeError: no such product"
    table = (tmp_path / "attention.md").read_text()
    assert "made up" in table and f"Wrong: {second} fwd: RuntimeError: off by 1 %" in table


def broken_ceilings(device):
    raise RuntimeError("no such product")
