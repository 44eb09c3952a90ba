"""SIGINT and SIGTERM that wait for a moment at which nothing is lost."""

import contextlib
import signal
import threading
from pathlib import Path


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after its state was saved in `folder`. `exit_status` is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number
        self.folder: Path | None = None


class Interrupts:
    """While entered, the first signal is kept in `pending` where it is deferred and raises `Interrupted` elsewhere.

    A second signal of either kind raises at once. Outside the main thread, where Python allows no handlers, nothing
    is caught.
    """

    def __init__(self):
        self.pending: int | None = None
        self._deferred = False
        self._previous: dict[int, object] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # whoever started us wants it ignored
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextlib.contextmanager
    def deferred(self):
        """Inside, the caller looks at `pending` whenever its state is whole."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    def _handle(self, number: int, _frame):
        second = self.pending is not None
        self.pending = number
        if second or not self._deferred:
            raise Interrupted(number)
