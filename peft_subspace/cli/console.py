"""What the commands print: progress, tables, errors. rich is imported when there is a terminal or a table."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 10.0  # seconds between plain lines


def size(count: float) -> str:
    """Bytes in words: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds in words: 2 min 5 s."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def say(text: str, quiet: bool = False) -> None:
    """A line for the user; results of commands go to stdout, this too."""
    if not quiet:
        print(text, flush=True)


def warn(text: str) -> None:
    """A line that is shown even if quiet."""
    print(f"Warning: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> None:
    """Why a command ended."""
    print(f"Error: {text}", file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar with bytes per second and the time left on a terminal, a line every ten seconds elsewhere.

    Yields:
        A function that is called with the bytes that were finished, from any thread.
    """
    if quiet:
        yield lambda count: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)
            yield lambda count: bar.advance(task, count)
    else:
        yield _Lines(title, total)


class _Lines:
    """Plain lines, for logs."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.done, self.started, self.said = 0, time.monotonic(), time.monotonic()
        self.lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self.lock:
            self.done += count
            now = time.monotonic()
            if now - self.said >= EVERY:
                self.said = now
                rate = self.done / (now - self.started)
                left = duration((self.total - self.done) / rate) if rate else "?"
                print(
                    f"{self.title}: {size(self.done)} of {size(self.total)}, {size(rate)}/s, {left} left",
                    file=sys.stderr,
                    flush=True,
                )
