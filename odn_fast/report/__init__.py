"""report.html: what a search found, as one page that needs nothing but itself.

Every sentence and figure on the page is taken from `config.yaml` and `events.jsonl` of a run folder; an unfinished run
gives a report of what there is and says that it is unfinished.
"""

from pathlib import Path

from ..record import RunError, write_atomically
from . import expand, grow_views, growth
from .page import figures, page, resume_lead
from .run import Run, read_run

__all__ = ["Run", "read_run", "write_report"]

# What a kind of run says: subject, missed, headline, cards, notes, warnings, sections.
_KINDS = {"expand": expand, "grow": growth, "grow-views": grow_views}


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all, and return its path.

    Raises:
        RunError: no run folder there, or a file cannot be read or written; one line that says what to do.
    """
    folder = Path(folder)
    run = read_run(folder)
    path = folder / "report.html"
    text = _document(run)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); make the folder writable, or free space") from None
    return path


def _document(run: Run) -> str:
    """The page of a run, finished or not."""
    kind, start, result = _KINDS[run.kind], run.last("start"), run.result
    title = f"{run.name}: {kind.subject(start)}" if start else run.name
    state, lead = "unfinished", resume_lead(run.name)
    if result:
        state, lead = "missed" if kind.missed(result) else "met", figures(kind.cards(run))
    return page(title, state, kind.headline(run), lead, kind.notes(run), kind.warnings(run), kind.sections(run))
