"""What a search says while it works: a live line on a terminal, plain lines elsewhere."""

import sys
import time

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text


class Display:
    """Prints to standard output. `Silent` is its counterpart for use from Python."""

    def __init__(self):
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._shown = 0.0

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
        Console(file=self._console.file, width=100, highlight=False, no_color=not self._console.is_terminal).print(table)

    def step(self, text: str):
        """The live line of the epoch under way; terminals only."""
        now = time.monotonic()
        if not self._console.is_terminal or now - self._shown < 0.25:
            return
        self._shown = now
        if self._live is None:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        self._live.update(Text(text, overflow="ellipsis", no_wrap=True), refresh=True)

    def epoch(self, text: str):
        """The line of an epoch that has ended, in place of the live one."""
        self.close()
        self._console.print(text, markup=False)

    def close(self):
        if self._live is not None:
            self._live.stop()
            self._live = None


class Silent:
    """Says nothing."""

    def message(self, text: str): ...
    def warning(self, text: str): ...
    def depths(self, rows: list[dict]): ...
    def step(self, text: str): ...
    def epoch(self, text: str): ...
    def close(self): ...
