"""What is known of pictures that cannot be read, and when there are too many."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from .errors import DataError, first_line


class Damage:
    """Pictures that cannot be read, by name. More than `limit` of them stop what is going on.

    Attributes:
        found: file -> what is wrong with it.
        tell: given one line for every such picture; may be called from any thread.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.found: dict[Path, str] = {}
        self.tell: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=2)
        self._lock = threading.Lock()

    def add(self, file: Path, error: DataError) -> None:
        """Report a picture, once. Raises `DataError` where it is one too many."""
        with self._lock:
            if file in self.found:
                return
            self.found[file] = first_line(error)
            count = len(self.found)
        if count > self.limit:
            raise DataError(f"{first_line(error)}; of the pictures read so far {count} cannot be, and corrupt_limit is {self.limit}: raise "
                            "--corrupt-limit (a run goes on with it and --resume), or start anew with whole pictures") from error
        self.tell(f"{first_line(error)}; another picture of its class stands in for it ({count} of at most {self.limit})")
