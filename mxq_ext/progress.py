"""Progress of long work: a rich display on a terminal, otherwise a plain line now and then.

    with Progress() as p:
        for block in p.track(blocks, "calibrate"):
            ...

Nested steps share one display. ``Progress(quiet=True)`` prints nothing. All output goes to stderr, so that ``--json`` on
stdout stays clean.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
EVERY = 5.0  #: seconds at least between two lines of one stage in a log, its first and its last excepted


class Progress:
    """One display for a whole run; hand it down instead of making another."""

    def __init__(self, quiet: bool = False, stream=None):
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self._rich = None

    def __enter__(self) -> Progress:
        if not self.quiet and self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Rich

            self._rich = Rich(TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                              console=Console(file=self.stream))
            self._rich.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._rich is not None:
            self._rich.stop()
            self._rich = None

    def note(self, text: str) -> None:
        """One line that stays on the screen."""
        if self._rich is not None:
            self._rich.console.print(text, highlight=False, markup=False)
        elif not self.quiet:
            print(text, file=self.stream, flush=True)

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Iterates over ``items``, showing ``label`` and how many are done."""
        total = total if total is not None else len(items) if isinstance(items, Sequence) else None
        start = said = time.monotonic()
        task = self._rich.add_task(label, total=total) if self._rich is not None else None
        done = told = 0
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if task is not None:
                self._rich.advance(task)
            elif done == 1 or done == total or now - said >= EVERY:
                self.note(f"{label}: {done}/{total if total is not None else '?'} ({now - start:.1f} s)")
                said, told = now, done
        if task is None and told < done:
            self.note(f"{label}: {done}/{total if total is not None else '?'} ({time.monotonic() - start:.1f} s)")


#: For callers that pass no display.
SILENT = Progress(quiet=True)
