"""Run tests in several processes within a time limit: python tests/run_shards.py --help

Most of a GPU test's time is the compilation of its kernels, on one core of the CPU. FOLDER receives
tests.log (failures, what was skipped and what did not run, the slowest, each process's end) and
tests.xml (JUnit, a suite for each process). The last line of the output adds everything up.

A process that dies, or that one test holds up for longer than --patience, is started again without
the tests that it has been through. What was recorded before the limit is kept, whatever is killed.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import shard

FINISHED = (0, 1, 5)  # pytest's exit codes: all passed, some failed, nothing to do
BAD = ("failed", "error")
POLL_S, PROGRESS_S = 0.5, 20.0
NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd]")


@dataclass(frozen=True)
class Outcome:
    test: str
    outcome: str
    seconds: float
    text: str


class Process:
    """One shard: a pytest, and another in its place where it dies early."""

    def __init__(self, name: str, folder: Path, arguments: list[str]):
        self.name = name
        stem = name.replace("/", "-of-")
        self.record, self.log = folder / f"{stem}.json", folder / f"{stem}.log"
        # -m puts the current folder on the path, where kernels/ is
        safe_path = ["-P"] if sys.version_info >= (3, 11) else []
        self.command = [
            sys.executable, *safe_path, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider",
            "--continue-on-collection-errors", f"--shard={name}", f"--record={self.record}",
            *arguments,
        ]  # fmt: skip
        self.is_working = True
        self._start()

    def _start(self) -> None:
        self.began = time.time()
        self.ended_before = len(self.outcomes())
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,  # compilers that it starts are killed with it
            )  # fmt: skip

    def selected(self) -> list[str] | None:
        """The tests of this shard, in order; None until they are collected."""
        lists = [line["selected"] for line in shard.read(self.record) if "selected" in line]
        return lists[0] if lists else None

    def outcomes(self) -> dict[str, Outcome]:
        return {
            line["test"]: Outcome(**line) for line in shard.read(self.record) if "outcome" in line
        }

    def under_way(self) -> tuple[str, float] | None:
        """(the test that this process began and has not ended, when)."""
        last = next((line for line in reversed(shard.read(self.record)) if "test" in line), {})
        # one that an earlier process began has an outcome by now
        return (last["test"], last["began"]) if "began" in last else None

    def step(self, patience_s: float) -> None:
        """See to a process that ended or hangs."""
        code, test = self.process.poll(), self.under_way()
        if code in FINISHED:
            self.is_working = False
            return
        if code is None:
            if test is None or time.time() - test[1] < patience_s:
                return
            self.kill()
            words = f"still running after {patience_s:.0f} s, and killed"
        else:
            words = f"the process ended with exit code {code}"
        if test is not None:
            seconds = time.time() - test[1]
            shard.append(self.record, test=test[0], outcome="error", seconds=seconds, text=words)
        # a process that got nowhere would get nowhere again
        if len(self.outcomes()) > self.ended_before:
            self._start()
        else:
            self.is_working = False

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def summary(counts: Counter, n_missing: int, n_processes: int, seconds: float) -> str:
    words = {"passed": "passed", "failed": "failed", "error": "errors", "skipped": "skipped"}
    parts = [f"{counts[k]} {word}" for k, word in words.items() if counts[k] or k == "passed"]
    if n_missing:
        parts.append(f"{n_missing} did not run")
    processes = "1 process" if n_processes == 1 else f"{n_processes} processes"
    return f"{', '.join(parts)} in {processes} and {seconds:.0f} s"


def junit(processes, missing: dict[str, list[str]], why_missing: str) -> ElementTree.Element:
    root = ElementTree.Element("testsuites")
    seen: set[str] = set()  # a file that cannot be collected is an error of every process
    for process in processes:
        cases = [o for test, o in process.outcomes().items() if test not in seen]
        seen |= {o.test for o in cases}
        cases += [Outcome(test, "skipped", 0.0, why_missing) for test in missing[process.name]]
        counts = Counter(o.outcome for o in cases)
        suite = ElementTree.SubElement(
            root, "testsuite", name=f"shard {process.name}", tests=str(len(cases)),
            failures=str(counts["failed"]), errors=str(counts["error"]),
            skipped=str(counts["skipped"]), time=f"{sum(o.seconds for o in cases):.3f}",
        )  # fmt: skip
        for o in cases:
            file, _, name = o.test.partition("::")
            case = ElementTree.SubElement(
                suite, "testcase", classname=file.removesuffix(".py").replace("/", "."),
                name=NO_XML.sub("?", name or file), time=f"{o.seconds:.3f}",
            )  # fmt: skip
            if o.outcome != "passed":
                text = NO_XML.sub("?", o.text)
                tag = {"failed": "failure"}.get(o.outcome, o.outcome)
                inner = ElementTree.SubElement(case, tag, message=gist(text))
                inner.text = text
    return root


def gist(text: str) -> str:
    """What went wrong, in one line: the first that pytest marks with E, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    marked = [line[1:].strip() for line in lines if re.match(r"E\s", line)]
    return (marked or lines[-1:])[0][:200]


def report(processes, outcomes: dict[str, Outcome], missing, why_missing: str) -> str:
    """The text of tests.log, but for its first line."""
    lines = []
    for o in outcomes.values():
        if o.outcome in BAD:
            lines += [f"{'_' * 8} {o.outcome.upper()} {o.test}", o.text, ""]
    reasons = Counter(o.text for o in outcomes.values()
                      if o.outcome == "skipped")  # fmt: skip
    lines += [f"skipped {n:5d}  {reason}" for reason, n in reasons.most_common()]
    slowest = sorted(outcomes.values(), key=lambda o: -o.seconds)[:20]
    lines += [f"took {o.seconds:8.2f} s  {o.test}" for o in slowest]
    lines += [f"{why_missing}: {test}" for tests in missing.values() for test in tests]
    for process in processes:
        log = process.log.read_text(errors="replace").splitlines()
        lines += ["", f"--- the end of process {process.name}", *log[-15:]]
    return "\n".join(lines)


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def run(options, scratch: Path) -> int:
    begin = time.monotonic()
    processes: list[Process] = []
    why_missing = "did not run"
    shown = 0.0
    signal.signal(signal.SIGTERM, interrupted)
    try:
        for index in range(options.shards):
            name = f"{index + 1}/{options.shards}"
            processes.append(Process(name, scratch, options.arguments))
        while any(p.is_working for p in processes):
            seconds = time.monotonic() - begin
            if seconds > options.seconds:
                why_missing = f"did not run within {options.seconds:.0f} s"
                break
            if seconds - shown >= PROGRESS_S:
                shown = seconds
                ended = [o for p in processes for o in p.outcomes().values()]
                n_tests = sum(len(p.selected() or []) for p in processes)
                bad = sum(o.outcome in BAD for o in ended)
                print(f"{seconds:.0f} s: {len(ended)} of {n_tests}, {bad} bad", flush=True)
            for process in processes:
                if process.is_working:
                    process.step(options.patience)
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        why_missing = "did not run before the interruption"
    finally:
        for process in processes:
            process.kill()
    seconds = time.monotonic() - begin
    outcomes = {test: o for p in processes for test, o in p.outcomes().items()}
    missing = {p.name: [t for t in p.selected() or [] if t not in outcomes] for p in processes}
    n_missing = sum(map(len, missing.values()))
    counts = Counter(o.outcome for o in outcomes.values())
    line = summary(counts, n_missing, len(processes), seconds)
    text = report(processes, outcomes, missing, why_missing)
    (options.folder / "tests.log").write_text(f"{line}\n\n{text}\n")
    tree = ElementTree.ElementTree(junit(processes, missing, why_missing))
    tree.write(options.folder / "tests.xml", encoding="utf-8", xml_declaration=True)
    for o in outcomes.values():
        if o.outcome in BAD:
            print(f"{o.outcome.upper()} {o.test}: {gist(o.text)}")
    uncollected = [p.name for p in processes if p.selected() is None]
    if uncollected:
        print(f"nothing was collected in the shards {', '.join(uncollected)}; see tests.log")
    print(line)
    if not outcomes and not n_missing:
        return 2
    return 1 if n_missing or uncollected or counts["failed"] or counts["error"] else 0


def main(argv=None) -> int:
    """0 if all passed or were skipped, 1 if one failed or did not run, 2 if there is no test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where tests.log and tests.xml go")
    parser.add_argument("--shards", type=int, required=True, help="how many processes")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all tests together")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds for one test")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:split])
    options.arguments = argv[split + 1 :]
    if options.shards < 1:
        parser.error(f"--shards is {options.shards}, need at least 1")
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        return run(options, Path(scratch))


if __name__ == "__main__":
    sys.exit(main())
