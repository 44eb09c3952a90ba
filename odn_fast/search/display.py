"""What a search says while it works: a live line on a terminal, plain lines elsewhere."""

import io
import os
import sys
import threading
import time

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text


class _Output(Console):
    """Standard output. A run outlives whoever reads it (`| head`, a `tee` that was stopped): its folder holds what it finds."""

    def on_broken_pipe(self):
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes as it ends
        print("warning: nobody reads what is printed any more; the run goes on, and its folder holds what it finds", file=sys.stderr)


class Display:
    """Prints to standard output, from any thread. `Silent` is its counterpart for use from Python."""

    def __init__(self):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a name that this terminal has no letters for ends no run
        self._console = _Output(file=sys.stdout, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._shown = 0.0
        self._steps: dict[str, str] = {}
        self._lock = threading.Lock()

    def message(self, text: str):
        self._console.print(text, markup=False)

    def warning(self, text: str):
        self._console.print(f"warning: {text}", style="yellow", markup=False)

    def depths(self, rows: list[dict]):
        """The table of depths before training: parameters, size, work, latency and estimated time."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for title in ("depth", "parameters", "MB", "multiply-adds", "latency ms (quartiles)", "est. s/epoch"):
            table.add_column(title, justify="right")
        for row in rows:
            table.add_row(
                str(row["depth"]), f"{row['params']:,}", f"{row['state_bytes'] / 1e6:.2f}", f"{row['macs'] / 1e6:.2f} M",
                f"{row['latency_ms']:.2f} ({row['latency_low_ms']:.2f}-{row['latency_high_ms']:.2f})",
                f"{row['seconds_per_epoch']:.1f}" if row["seconds_per_epoch"] is not None else "-")
        _Output(file=self._console.file, width=100, highlight=False, no_color=not self._console.is_terminal).print(table)

    def step(self, title: str, text: str):
        """The live line of the epoch that the training called `title` is in, below those of others; terminals only."""
        if not self._console.is_terminal:
            return
        with self._lock:
            self._steps[title] = text
            now = time.monotonic()
            if now - self._shown < 0.25:
                return
            self._shown = now
            if self._live is None:
                self._live = Live(console=self._console, transient=True, auto_refresh=False)
                self._live.start()
            self._live.update(Text("\n".join(self._steps.values()), overflow="ellipsis", no_wrap=True), refresh=True)

    def epoch(self, title: str, text: str):
        """The line of an epoch (or of a training) that has ended, in place of the live one."""
        with self._lock:
            self._steps.pop(title, None)
            self._stop()
            self._console.print(text, markup=False)

    def close(self):
        """End the live lines of all trainings."""
        with self._lock:
            self._steps.clear()
            self._stop()

    def _stop(self):
        if self._live is not None:
            self._live.stop()
            self._live = None


class Silent:
    """Says nothing."""

    def message(self, text: str): ...
    def warning(self, text: str): ...
    def depths(self, rows: list[dict]): ...
    def step(self, title: str, text: str): ...
    def epoch(self, title: str, text: str): ...
    def close(self): ...
