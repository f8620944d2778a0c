"""`tilewright demo`: the whole engine on real text, side by side with stock transformers.

A finished phase is kept in OUT/phases and skipped by --resume.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import tilewright
from tilewright import demo_report, memory
from tilewright.data import encode, train_tokenizer
from tilewright.demo_clock import Clock
from tilewright.demo_phases import PHASES
from tilewright.demo_shared import EXTENDED, PRETRAINED, QUICK, Demo, Sizes
from tilewright.files import InputError, read_json, write_json
from tilewright.train import Interrupted


def run_demo(
    out: str | Path, *, seconds: float = 180.0, steps: tuple[int, int, int] | None = None,
    quick: bool = False, resume: bool = False, overwrite: bool = False, seed: int = 0,
) -> int:  # fmt: skip
    """Run the phases, print the table, write OUT/report.json and OUT/report.png; returns 0.

    seconds   what it may take: the numbers of steps follow from it and from the machine
    steps     fixed numbers of steps of the three trainings, whatever they take

    Interrupted (a KeyboardInterrupt): stopped by Ctrl-C; the message says how to go on.
    """
    if not 0 < seconds < math.inf:
        raise InputError(f"seconds is {seconds}, need a positive number")
    out = Path(out)
    sizes = QUICK if quick else Sizes()
    fixed = None if steps is None else list(steps)
    settings = {"sizes": asdict(sizes), "seconds": seconds, "steps": fixed, "seed": seed}
    _open(out, settings, resume, overwrite)
    start_s = time.perf_counter()
    spent_s = sum(_phase(out, name).get("seconds", 0.0) for name in PHASES)
    clock = Clock(seconds, spent_s)
    done: list[str] = []
    try:
        demo, text = _prepare(out, sizes, clock, steps, seed)
        for name, (what, phase) in PHASES.items():
            demo.results[name] = _phase(out, name)
            if demo.results[name]:
                _say(f"{name}: kept from the earlier run")
            else:
                _say(f"{name}: {what}")
                begin_s = clock.now_s()
                demo.results[name] = phase(demo)
                demo.results[name]["seconds"] = round(clock.now_s() - begin_s, 1)
                write_json(_phase_path(out, name), demo.results[name])
            done.append(name)
    except KeyboardInterrupt:
        kept = f"finished: {', '.join(done)}" if done else "nothing finished yet"
        same = f"--out {out}{' --quick' if quick else ''} --seconds {seconds:g}"
        raise Interrupted(
            f"stopped; {kept}; continue with: tilewright demo {same} --resume"
        ) from None
    report = {
        "settings": settings, "text": text, "revision": _revision(), **_machine(),
        "memory": memory.MEANING, "phases": demo.results,
        "seconds_of_this_run": round(time.perf_counter() - start_s, 1),
    }  # fmt: skip
    write_json(out / "report.json", report)
    has_plot = demo_report.write_png(out / "report.png", report)
    print(demo_report.as_text(report))
    print(f"\nreport  {out / 'report.json'}")
    print(f"plot    {out / 'report.png' if has_plot else 'none: matplotlib is not installed'}")
    print(f"models  {out / PRETRAINED}, {out / EXTENDED}")
    return 0


def _phase_path(out: Path, name: str) -> Path:
    return out / "phases" / f"{name}.json"


def _phase(out: Path, name: str) -> dict:
    """What an earlier run left of a phase; empty if it did not finish."""
    path = _phase_path(out, name)
    return read_json(path) if path.exists() else {}


def _say(text: str) -> None:
    print(f"demo {text}", file=sys.stderr, flush=True)


def _open(out: Path, settings: dict, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise InputError("resume and overwrite exclude each other: pass one of them")
    if out.exists() and not out.is_dir():
        raise InputError(f"out {out} is a file, need a folder")
    kept = out / "settings.json"
    if resume:
        if not kept.exists():
            raise InputError(f"out {out} holds no demo to resume; leave out --resume")
        before = read_json(kept)
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"resume: {name} was {before.get(name)} when the demo in {out} started and is "
                    f"{value} now; pass the same, or --overwrite to start anew"
                )
        return
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise InputError(
            f"out {out} is not empty; pass --resume to keep finished phases, --overwrite to "
            "replace them, or name another folder"
        )
    for path in (out / "phases").glob("*.json"):
        path.unlink()
    write_json(kept, settings)


def collect_text(
    train_bytes: int, held_out_bytes: int, is_held_out: Callable[[Path], bool] | None = None
) -> tuple[list[str], list[str], str]:
    """The standard library's own sources, cut into training and held-out files, and their folder.

    The order is that of a digest of each file's path, so that it mixes subjects and is the same on
    every machine with the same Python; files are taken until each part has its bytes.

    is_held_out   of a path below the folder; default each eighth file
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    files = [
        p for suffix in ("py", "txt", "rst") for p in folder.rglob(f"*.{suffix}")
        if not skipped & set(p.relative_to(folder).parts)
    ]  # fmt: skip
    files.sort(key=lambda p: hashlib.sha256(p.relative_to(folder).as_posix().encode()).digest())
    parts: tuple[list[str], list[str]] = ([], [])
    left = [train_bytes, held_out_bytes]
    for number, path in enumerate(files):
        if is_held_out is None:
            part = 1 if number % 8 == 0 else 0
        else:
            part = int(is_held_out(path.relative_to(folder)))
        if left[part] <= 0:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few tests hold other encodings on purpose
        if len(text) < 200:
            continue
        parts[part].append(text)
        left[part] -= len(text.encode())
        if max(left) <= 0:
            break
    if not parts[0] or not parts[1]:
        raise InputError(f"the standard library in {folder} has no source texts to train on")
    return parts[0], parts[1], str(folder)


def _prepare(
    out: Path, sizes: Sizes, clock: Clock, steps: tuple[int, int, int] | None, seed: int
) -> tuple[Demo, dict]:
    train, held_out, folder = collect_text(sizes.text_bytes, sizes.held_out_bytes)
    tokenizer = train_tokenizer(train, sizes.vocab_size, sizes.context)
    train_documents, held_out_documents = (encode(tokenizer, part) for part in (train, held_out))
    text = {
        "folder": folder, "train_files": len(train), "held_out_files": len(held_out),
        "train_tokens": sum(map(len, train_documents)),
        "held_out_tokens": sum(map(len, held_out_documents)),
        "sha256": hashlib.sha256("\0".join(train + held_out).encode()).hexdigest()[:16],
    }  # fmt: skip
    _say(f"text: {len(train)} training files, {text['train_tokens']} tokens, from {folder}")
    demo = Demo(out, sizes, clock, steps, seed, {}, train_documents, held_out_documents, tokenizer)
    return demo, text


def _revision() -> str:
    """The package's version, and its commit if it runs from a source tree."""
    folder = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return tilewright.__version__
    is_ours = commit.returncode == 0 and (folder.parent / "csrc").is_dir()
    return (
        f"{tilewright.__version__} {commit.stdout.strip()}" if is_ours else tilewright.__version__
    )


def _machine() -> dict:
    from tilewright.doctor import examine_machine, installed_version

    packages = ("torch", "transformers", "peft", "tokenizers", "numpy")
    return {
        "machine": examine_machine(),
        "versions": {
            "python": sys.version.split()[0], **{p: installed_version(p) for p in packages},
        },
    }  # fmt: skip
