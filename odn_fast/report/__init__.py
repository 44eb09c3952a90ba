"""report.html: what a search found, as one page that needs nothing but itself.

Every sentence and figure on the page is taken from `config.yaml` and `events.jsonl` of a run folder; an unfinished run
gives a report of what there is and says that it is unfinished.
"""

from pathlib import Path

from ..record import RunError, write_atomically
from . import expand, grow_views, growth
from .run import Run, read_run

__all__ = ["Run", "read_run", "write_report"]

_DOCUMENTS = {"expand": expand.document, "grow": growth.document, "grow-views": grow_views.document}


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all, and return its path.

    Raises:
        RunError: no run folder there, or a file cannot be read or written; one line that says what to do.
    """
    folder = Path(folder)
    run = read_run(folder)
    path = folder / "report.html"
    text = _DOCUMENTS[run.kind](run)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); make the folder writable, or free space") from None
    return path
