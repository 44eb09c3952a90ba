"""A whole depth search against the authors' loop: time, with the accuracy beside it.

    ODN_FAST_DATA=~/data pytest bench/bench_search.py -s

ResNet-18, three epochs of warm-up, then 20 epochs at depth 1 and 20 at depth 2; batch 128; digits, and MNIST with 6,000 training
images (from ODN_FAST_DATA). Both arms read the same data, start from the same weights, use the same recipe, validate after every
epoch and read the test split once; both have the allocator tuned. Ours is what a user calls, with everything that it leaves: events,
checkpoints, artefacts, latencies, report. The authors' is in `authors.py`: fp32, one image at a time through PIL. Every search runs
in a process of its own, the arms taking turns; imports are not counted. Accuracies must not lie below the authors' by more than
chance explains. MNIST takes one search an arm, and 40 minutes in all on two cores; digits three, and minutes.

On a GPU: MNIST, all 50,000 training images, 82 and 80 epochs as in the authors' notebooks. Their loop would take long: it runs
a few epochs of each phase, and its time is what as many as ours would take at that pace.
"""

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

import authors
import harness
import harness_cuda
from odn_fast import data as data_sets
from odn_fast.models import create
from odn_fast.search import expand

BATCH, SEED = 128, 0
ARMS = ("authors", "ours bf16", "ours fp32")
REACH = {"ours bf16": 2.2, "ours fp32": 1.3}
REACH_CUDA, REACH_SECONDS_CUDA = 8.0, 15.0


@dataclass(frozen=True)
class Work:
    """What is searched: a data set, cut to `images` training images, with these epochs of warm-up and of depths 1, 2, ..."""

    dataset: str
    images: int | None = None
    warm_up: int = 3
    epochs: tuple[int, ...] = (20, 20)
    device: str = "cpu"


DIGITS, MNIST, MNIST_WHOLE = Work("digits"), Work("mnist", 6000), Work("mnist", None, 3, (82, 80), "cuda")
QUICK = Work("digits", 200, 1, (1, 1))


def ours(work: Work, precision: str, folder: str) -> dict:
    begin = time.perf_counter()
    result = expand("resnet18", dataset=work.dataset, data_dir=os.environ.get("ODN_FAST_DATA", "data"), limit_train=work.images,
                    target=100, tolerance=0, warm_up_epochs=work.warm_up, epochs_per_depth=list(work.epochs), batch_size=BATCH,
                    seed=SEED, precision=precision, device=work.device, out=folder, **({"threads": 2} if work.device == "cpu" else {}))
    seconds = time.perf_counter() - begin
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    ended = [event for event in events if event["event"] == "depth" and event["phase"] == "search"]
    assert [event["epochs"] for event in ended] == list(work.epochs), "a depth passed: the arms did not do the same work"
    return {"seconds": seconds, "epochs_seconds": sum(event["seconds"] for event in events if event["event"] == "epoch"),
            "first_step_seconds": [event["first_step_seconds"] for event in ended], "depth": result.depth,
            "validation": [event["best_accuracy"] for event in ended], "test": result.test_accuracy}


def theirs(work: Work) -> dict:
    begin = time.perf_counter()
    data = data_sets.load(work.dataset, os.environ.get("ODN_FAST_DATA", "data"), seed=SEED)
    data = data.limit_train(work.images, SEED) if work.images else data
    torch.manual_seed(SEED)
    model = create("resnet18", data.input_shape[0], data.num_classes)
    found = authors.search(model, data, BATCH, work.warm_up, list(work.epochs), work.device)
    return {"seconds": time.perf_counter() - begin, **found}


def one(arm: str, work: str, folder: str) -> dict:
    """In a process of its own: one search. work: the fields of a `Work`, as JSON."""
    work = Work(**json.loads(work))
    harness.prepare(threads=2 if work.device == "cpu" else None)
    return theirs(work) if arm == "authors" else ours(work, arm.split()[1], folder)


def child(arm: str, work: Work, folder: Path) -> dict:
    done = subprocess.run([sys.executable, __file__, arm, json.dumps(asdict(work)), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{arm}: {figures['seconds']:.1f} s", flush=True)
    return figures


def lowest_acceptable(accuracy: float, images: int) -> float:
    """Percent: below an accuracy by three deviations of the difference of two such, each of `images` images, or by a point."""
    share = min(max(accuracy / 100, 0.02), 0.98)
    return accuracy - max(1.0, 300 * math.sqrt(2 * share * (1 - share) / images))


def check_accuracies(runs: dict[str, list[dict]], images: int):
    """Of the deepest depth: what the arms reach, in the mean over their runs."""
    reached = {arm: statistics.mean(run["validation"][-1] for run in each) for arm, each in runs.items()}
    for arm, accuracy in reached.items():
        assert accuracy >= lowest_acceptable(reached["authors"], images), f"{arm} is less accurate, so its speed says nothing: {reached}"


@pytest.mark.parametrize("name, rounds", [("digits", 3), ("mnist", 1)])
def test_search(name, rounds, tmp_path):
    if name == "mnist" and "ODN_FAST_DATA" not in os.environ:
        pytest.skip("needs the official MNIST files: set ODN_FAST_DATA to the folder that holds them")
    if name == "mnist" and harness.QUICK:
        pytest.skip("digits shows whether this works")
    work, rounds = (QUICK, 1) if harness.QUICK else ({"digits": DIGITS, "mnist": MNIST}[name], rounds)
    runs: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for number, place in itertools.product(range(rounds), range(len(ARMS))):
        arm = ARMS[(number + place) % len(ARMS)]
        runs[arm].append(child(arm, work, tmp_path / f"{arm.replace(' ', '-')}-{number}"))
    if not harness.QUICK:  # after an epoch, accuracies are those of no training
        check_accuracies(runs, 300 if name == "digits" else 10_000)
    times = {arm: [run["seconds"] for run in each] for arm, each in runs.items()}
    over = {arm: harness.ratio(times["authors"], times[arm]) for arm in REACH}
    training = {arm: statistics.median(run["epochs_seconds"] for run in runs[arm]) for arm in REACH}
    print(f"\n{harness.machine()}\n{work}, {rounds} searches an arm, medians; accuracies in percent")
    rows = [(arm, f"{statistics.median(times[arm]):.1f}", f"{training[arm]:.1f}" if arm in training else "",
             *(f"{statistics.mean(run['validation'][place] for run in each):.2f}" for place in range(len(work.epochs))),
             f"{statistics.mean(run['test'] for run in each):.2f}", f"{over[arm]:.2f}" if arm in over else "", REACH.get(arm, ""))
            for arm, each in runs.items()]
    print(harness.table([("arm", "seconds", "in epochs", *(f"depth {depth}" for depth in range(1, len(work.epochs) + 1)), "test",
                          "authors / ours", "reach"), *rows]))
    harness.report(f"search_{name}", {"work": asdict(work), "searches_an_arm": rounds, "authors_over_ours": over, "reach": REACH,
                                      "runs": runs})


@harness_cuda.needs_gpu
def test_search_cuda(tmp_path):
    if "ODN_FAST_DATA" not in os.environ:
        pytest.skip("needs the official MNIST files: set ODN_FAST_DATA to the folder that holds them")
    tried = Work("mnist", None, 1, (2, 2), "cuda")
    mine, other = child("ours bf16", MNIST_WHOLE, tmp_path / "ours"), child("authors", tried, tmp_path / "authors")
    paces = [seconds / epochs for seconds, epochs in zip(other["phase_seconds"], (tried.warm_up, *tried.epochs), strict=True)]
    whole = sum(pace * epochs for pace, epochs in zip(paces, (MNIST_WHOLE.warm_up, *MNIST_WHOLE.epochs), strict=True))
    ratio = whole / mine["seconds"]
    assert mine["validation"][-1] > 98.5, mine
    print(f"\n{harness_cuda.machine()}\nMNIST, {MNIST_WHOLE.warm_up} + {MNIST_WHOLE.epochs} epochs: {mine['seconds']:.1f} s, of which "
          f"{mine['epochs_seconds']:.1f} s in epochs; validation {mine['validation'][-1]:.2f} %, test {mine['test']:.2f} %; the "
          f"authors' loop at the pace of {tried.warm_up} + {tried.epochs} epochs: {whole:.0f} s")
    verdicts = {
        "MNIST search, seconds": {"geometric_mean": mine["seconds"], "worst": mine["seconds"], "reach": REACH_SECONDS_CUDA,
                                  "met": mine["seconds"] <= REACH_SECONDS_CUDA},
        "MNIST search, over the authors' loop at its pace": {"geometric_mean": ratio, "worst": ratio, "reach": REACH_CUDA,
                                                             "met": ratio >= REACH_CUDA}}
    harness_cuda.report("search_bfloat16", {"work": asdict(MNIST_WHOLE), "ours": mine, "authors_tried": other,
                                            "authors_seconds_at_this_pace": whole, "verdicts": verdicts})


if __name__ == "__main__":
    print(json.dumps(one(*sys.argv[1:])))
