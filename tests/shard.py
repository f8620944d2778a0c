"""pytest in several processes that share one selection of tests; run_shards.py starts them.

    --shard I/N      run every N-th test from the I-th on, in an order that tells most first
    --record FILE    append a line of JSON as a test begins and one as it ends; tests of which FILE
                     says that they ended are left out, so that a process that died can be followed
                     by another

Which tests a shard has depends on the selection alone, so a shard can be repeated by itself.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import pytest

# what tells most first: the dtype that models train in, then the one they also run in
DTYPE_RANKS = {"torch.bfloat16": 0, "torch.float16": 1, "torch.float32": 2}
TEXT_CHARACTERS = 6000  # of a failure's text: the end of a traceback says most


def part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"is {text!r}, need I/N with 1 <= I <= N")
    return int(match[1]), int(match[2])


def pytest_addoption(parser):
    group = parser.getgroup("shards")
    group.addoption("--shard", type=part, metavar="I/N", help="run the I-th of N parts")
    group.addoption("--record", type=Path, metavar="FILE", help="what became of each test")


def pytest_configure(config):
    share, record = config.getoption("shard"), config.getoption("record")
    if share is not None or record is not None:
        config.pluginmanager.register(Shard(share or (1, 1), record))


def rank(item) -> tuple[int, bool]:
    """By dtype, and of one dtype first the files of what nothing but a GPU can show."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    dtype_rank = max((DTYPE_RANKS.get(str(value), 0) for value in params.values()), default=0)
    return dtype_rank, not item.path.stem.endswith("_gpu")


def read(path: Path | None) -> list[dict]:
    """The lines of a record; one that a killed process left unfinished is no line."""
    if path is None or not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def append(path: Path, **line) -> None:
    with path.open("a", encoding="utf-8") as file:
        # begins on a line of its own, whatever was cut before it
        file.write(f"\n{json.dumps(line)}\n")


def lost_device() -> str | None:
    """What CUDA says if a kernel has broken this process's context: all that follows would fail."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


class Shard:
    """Selects the tests of this process; with a record writes {"selected": [tests]}, then
    {"test", "began"} and {"test", "outcome", "seconds", "text"} for each. An outcome is passed,
    skipped, failed or error."""

    def __init__(self, share: tuple[int, int], record: Path | None):
        self.index, self.count = share
        self.record = record
        self.session = None
        self.outcome, self.seconds, self.text = "passed", 0.0, ""

    def write(self, **line) -> None:
        if self.record is not None:
            append(self.record, **line)

    def pytest_sessionstart(self, session):
        self.session = session

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(self, config, items):
        mine = sorted(items, key=rank)[self.index - 1 :: self.count]
        ended = {line["test"] for line in read(self.record) if "outcome" in line}
        self.write(selected=[item.nodeid for item in mine])
        left = [item for item in mine if item.nodeid not in ended]
        chosen = set(left)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = left

    def pytest_collectreport(self, report):
        if report.failed:
            text = report.longreprtext[-TEXT_CHARACTERS:]
            self.write(test=report.nodeid, outcome="error", seconds=0.0, text=text)

    def pytest_runtest_logstart(self, nodeid):
        self.outcome, self.seconds, self.text = "passed", 0.0, ""
        self.write(test=nodeid, began=time.time())

    def pytest_runtest_logreport(self, report):
        self.seconds += report.duration
        if report.failed:
            self.outcome = "failed" if report.when == "call" else "error"
            self.text += report.longreprtext[-TEXT_CHARACTERS:]
        elif report.skipped and self.outcome == "passed":
            self.outcome = "skipped"
            where_and_why = report.longrepr
            self.text = "expected failure"
            if isinstance(where_and_why, tuple):
                self.text = where_and_why[2].removeprefix("Skipped: ")

    def pytest_runtest_logfinish(self, nodeid):
        self.write(test=nodeid, outcome=self.outcome, seconds=self.seconds, text=self.text)
        if self.outcome in ("failed", "error"):
            words = lost_device()
            if words is not None:
                self.session.shouldstop = f"the GPU is lost to this process: {words}"
