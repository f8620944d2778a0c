"""Progress of long work: a bar on a terminal, one line per step otherwise; always on stderr."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

BAR = 20  # characters


class Progress:
    """Shows steps of known number.

    total    number of steps
    label    what is being done
    stream   default sys.stderr, so that stdout stays free for results
    """

    def __init__(self, total: int, label: str, stream: TextIO | None = None):
        self.total, self.label = total, label
        self.stream = sys.stderr if stream is None else stream
        self.is_terminal = self.stream.isatty()
        self.start_s = time.perf_counter()
        self.first_step: int | None = None
        self.line_is_open = False

    def show(self, step: int, text: str) -> None:
        """`step` of `total` steps are done; `text` says how it stands."""
        if self.first_step is None:
            self.first_step = step - 1
        if not self.is_terminal:
            print(f"{self.label} {step}/{self.total}  {text}", file=self.stream, flush=True)
            return
        done = BAR * step // max(self.total, 1)
        elapsed_s = time.perf_counter() - self.start_s
        left_s = elapsed_s / max(step - self.first_step, 1) * (self.total - step)
        line = f"{self.label} [{'=' * done}{' ' * (BAR - done)}] {step}/{self.total}  {text}"
        line += f"  {clock(left_s)} left"
        width = shutil.get_terminal_size().columns - 1
        self.stream.write("\r" + line[:width].ljust(width))
        self.stream.flush()
        self.line_is_open = True

    def close(self) -> None:
        """End the bar's line, so that what follows starts on its own."""
        if self.line_is_open:
            self.stream.write("\n")
            self.stream.flush()
            self.line_is_open = False


class Silent(Progress):
    """Shows nothing: the default of library calls."""

    def __init__(self) -> None:
        super().__init__(0, "")

    def show(self, step: int, text: str) -> None:
        pass


def clock(seconds: float) -> str:
    """1:05 or 2:00:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
