"""The results file of a GPU and a day: what was checked and measured there, whether it succeeded or not.

    python bench/results_file.py path "NVIDIA H200"                        # where it lies
    python bench/results_file.py step FILE NAME SECONDS STATUS OUTPUT      # enter a step of gpu_check.sh that has ended
    python bench/results_file.py summary FILE                              # what is in it

It is free of torch, for it has to work where all else fails. Every entry says when it was made and of which sources; the
summary tells those of other sources than these apart.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
MOST_LINES = 300  # of a step's failures
TIMED_OUT = (124, 137)  # the status of `timeout`, and of one that had to kill


def path_of(gpu: str, date: str | None = None) -> Path:
    """bench/results/<gpu>-<date>.json, of today unless told otherwise."""
    name = f"{gpu} {date or datetime.date.today().isoformat()}".lower()
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", name) + ".json")


def sources() -> str:
    """A checksum of all that runs on the GPU or decides what does."""
    digest = hashlib.sha256()
    for folder, pattern in (("kernels", "*.py"), ("odn_fast", "**/*.py"), ("csrc", "*")):
        for path in sorted((ROOT / folder).glob(pattern)):
            digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def put(path: Path, group: str, name: str, entry: dict, **others: object) -> None:
    """Enter `entry` under content[group][name], in place of what was there; others: entries of the top level."""
    path.parent.mkdir(exist_ok=True)
    with holding(path.parent):  # steps that run beside each other enter what they find, too
        content = json.loads(path.read_text()) if path.is_file() else {}
        made = {"at": datetime.datetime.now().strftime("%H:%M:%S"), "sources": sources()}
        content.setdefault(group, {})[name] = entry | made
        content |= others
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        aside.replace(path)


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Only one process at a time holds a folder."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def entry(path: Path, group: str, name: str) -> dict | None:
    """What was entered of these sources, or None."""
    found = json.loads(path.read_text()).get(group, {}).get(name) if path.is_file() else None
    return found if found and found["sources"] == sources() else None


def step(name: str, seconds: float, status: int, output: Path) -> dict[str, object]:
    """The entry of a step that has ended: how, its last line, and where it failed, what pytest names or the last lines."""
    lines = output.read_text(errors="replace").splitlines() if output.is_file() else []
    outcome = "ok" if status == 0 else f"stopped after {seconds:g} s" if status in TIMED_OUT else f"failed with status {status}"
    ended = {"outcome": outcome, "seconds": seconds, "last_line": next((line for line in reversed(lines) if line.strip()), "")}
    if status:
        # As pytest's summary has them; without one, as they came up under pytest-xdist.
        named = [line for line in lines if re.match("(FAILED|ERROR) ", line)] or [
            line for line in lines if re.match(r"\[gw\d+\] .*(FAILED|ERROR) ", line)]
        ended["failures"] = named[:MOST_LINES] or lines[-30:]
    return ended


def summary(path: Path) -> str:
    """A line for each step, verdict and failure."""
    content, now = json.loads(path.read_text()), sources()

    def named(item: tuple[str, dict]) -> str:
        return item[0] if item[1].get("sources") == now else f"{item[0]} (of other sources)"

    lines = [str(content.get("machine", path.stem))]
    for item in sorted(content.get("steps", {}).items(), key=lambda item: item[1]["outcome"] != "ok"):
        each = item[1]
        lines.append(f"{named(item)}: {each['outcome']}, {each['seconds']:g} s; {each['last_line'][:160]}")
        lines += [f"  {failure[:200]}" for failure in each.get("failures", ())[:20]]
    for item in content.get("benches", {}).items():
        lines += _summary_of(named(item), item[1])
    return "\n".join(lines)


def _summary_of(bench: str, figures: dict) -> Iterable[str]:
    for name, verdict in figures.get("verdicts", {}).items():
        met = "met" if verdict["met"] else "MISSED"
        yield f"{bench}, {name}: {verdict['geometric_mean']:.2f}, worst {verdict['worst']:.2f}, reach {verdict['reach']}: {met}"
    cases = [case for case in figures.get("cases", {}).values() if "microseconds" in case]
    for phase in sorted({phase for case in cases for phase in case["microseconds"]}):
        having = [case for case in cases if phase in case["microseconds"]]
        means = {
            over: statistics.geometric_mean(ratios)
            for over in ("fastest", "eager", "compiled")
            if (ratios := [case["over"][phase][over] for case in having if over in case["over"][phase]])
        }
        share = statistics.geometric_mean(case["share_of_floor"][phase] for case in having)
        over = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
        yield f"  {bench} {phase}, {len(having)} cases: over {over}; {share:.0%} of the floor"
    yield from (f"  {bench} FAILED: {failure}" for failure in figures.get("failures", ()))


def main(command: str, *arguments: str) -> None:
    if command == "path":
        print(path_of(*arguments))
    elif command == "step":
        file, name, seconds, status, output = arguments
        put(Path(file), "steps", name, step(name, float(seconds), int(status), Path(output)))
    elif command == "summary":
        print(summary(Path(*arguments)))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
