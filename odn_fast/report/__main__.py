"""python -m odn_fast.report RUN"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..record import RunError
from . import read_run, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m odn_fast.report", description=
        "Write report.html into the folder of a search, from its config.yaml and events.jsonl: what was found, accuracy, "
        "size and work of everything trained on the way, learning curves, settings. The page needs no network and no other file.",
        epilog="An unfinished run gives a report of what there is, which says so. Exit status: 2 if there is no run.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder that the search wrote (--out)")
    folder = parser.parse_args(arguments).run
    try:
        run = read_run(folder)
        path = write_report(folder)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    if run.result is None:
        print(f"{folder}: is unfinished, so its report is too; go on with --resume {folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
