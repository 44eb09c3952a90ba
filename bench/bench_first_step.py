"""How soon the first training step of a new architecture has ended: ours, and torch.compile of the same network.

    pytest bench/bench_first_step.py -s

Two changes of architecture: a depth search moves from depth 2 to depth 3 of a ResNet-18 (images of MNIST's size, and of digits'), and
a student of ResNet-56's maps (3x32x32) is deepened from four units to seven; batch 128. Time runs from the decision, with the former
network trained for a step in the same process, through all that is made for the new one (network, weights, optimizer, on a GPU the
captured graph), to the end of its first step; "a later step" is what of it every step takes. torch.compile is given the network as
plain PyTorch and a batch that lies ready. Every figure comes from a process of its own: with empty caches of compiled kernels
("cold"), and with those that an earlier such process left ("warm"). Imports are not counted. The losses of both arms have to agree.
"""

import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import harness
import harness_cuda
from bench_step import BATCH, LR, backbone, resident
from odn_fast.data import Batches, Normalisation, Split
from odn_fast.engine import FitConfig, Training, autocast, classification_loss, label_loss, make_sgd, numbered
from odn_fast.engine.step import train_step
from odn_fast.models import StudentNetwork, deepen, extract, grown, initial_graph

REACH, REACH_SECONDS_CUDA = 20.0, 0.5
CASES = [("depth, 28x28", "fp32"), ("depth, 28x28", "bf16"), ("depth, 8x8", "bf16"), ("student, 32x32", "bf16")]
CASES = CASES[-2:] if harness.QUICK else CASES
MAPS = [(16, 32, 32)] * 9 + [(32, 16, 16)] * 9 + [(64, 8, 8)] * 9


class Expand:
    """From one depth to the next; the new depth starts from the weights that all start from."""

    def __init__(self, device, size):
        self.model, self.batches, self.loss = backbone(device), resident(device, (1, size, size)), classification_loss
        self.start = copy.deepcopy(self.model.state_dict())

    def network(self, new: bool, plain: bool) -> nn.Module:
        self.model.load_state_dict(self.start)
        depth = 3 if new else 2
        return self.model.extract(depth) if plain else self.model.at_depth(depth)


class Growth:
    """From a student to the deepened one, which takes over its weights."""

    def __init__(self, device, size):
        torch.manual_seed(0)
        split = Split(torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8), torch.randint(0, 10, (BATCH,))).to(device)
        self.batches = Batches(numbered(split), Normalisation(255, (0.5,) * 3, (0.25,) * 3), BATCH, seed=0)
        self.labels, self.loss = split.labels, label_loss(split.labels)
        self.graph = deepen(initial_graph((3, size, size), MAPS, 10), 0, 3)
        self.student = StudentNetwork(self.graph, seed=0).to(device, memory_format=torch.channels_last)

    def network(self, new: bool, plain: bool) -> nn.Module:
        network = grown(self.student, deepen(self.graph, 0, 3), 0) if new else copy.deepcopy(self.student)
        network.to(self.labels.device, memory_format=torch.channels_last)
        return extract(network) if plain else network


def ours(case: Expand | Growth, precision: str, device: str, new: bool) -> Callable[[], Callable[[], float]]:
    """Make the network and what trains it. Returns what takes a step, waits for its end and gives what reads the loss."""
    network, training = case.network(new, plain=False).train(), Training(LR)
    step = train_step(network, case.loss, make_sgd(network, LR, 0.9, 5e-4, device), case.batches, FitConfig(precision, device))

    def take():
        step.begin_epoch(training)
        step(next(case.batches.inputs("bench", 0)), training)
        step.wait()
        return lambda: training.loss_sum.item() / training.images

    return take


def compiled(case: Expand | Growth, precision: str, device: str, new: bool, x, y) -> Callable[[], Callable[[], float]]:
    network = torch.compile(case.network(new, plain=True).train(), dynamic=False)
    optimizer = make_sgd(network, LR, 0.9, 5e-4, device)

    def take():
        with autocast(precision, device):
            loss = nn.functional.cross_entropy(network(x).float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()
        return loss.item

    return take


def one(arm: str, name: str, precision: str, device: str) -> dict[str, float]:
    """In a process of its own: seconds to the end of the first steps of the former network and of the new one, its loss, and the
    seconds of a later step."""
    harness.prepare(threads=2 if device == "cpu" else None)
    change, _, size = name.partition(", ")
    case = {"depth": Expand, "student": Growth}[change](device, int(size.partition("x")[0]))
    x, y = next(case.batches.epoch("bench", 0))
    given = () if arm == "ours" else (x, case.labels[y] if change == "student" else y)
    figures = {}
    for key, new in (("former", False), ("new", True)):
        begin = time.perf_counter()
        take = {"ours": ours, "compiled": compiled}[arm](case, precision, device, new, *given)
        loss = take()
        figures[key] = time.perf_counter() - begin
    return figures | {"loss": loss(), "later": statistics.median(seconds(take) for _ in range(5))}


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def child(arm: str, name: str, precision: str, device: str, caches: Path) -> dict[str, float]:
    """What `one` says, of a process whose caches of compiled kernels lie in `caches`."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    done = subprocess.run([sys.executable, __file__, arm, name, precision, device], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, precision: str, device: str, folder: Path) -> dict[str, object]:
    """Both arms in alternating processes, ours three times: the first with empty caches, too."""
    runs = {arm: [] for arm in ("ours", "compiled")}
    for arm in ("ours", "compiled", "ours", "compiled", "ours"):
        runs[arm].append(child(arm, name, precision, device, folder / arm))
    losses = [run["loss"] for arm in runs.values() for run in arm]
    assert max(losses) <= min(losses) * (1 + (1e-4 if precision == "fp32" else 0.02)), f"losses do not agree: {losses}"
    warm = statistics.median(run["new"] for run in runs["ours"][device != "cpu":])  # on the CPU nothing of ours is compiled
    cold, again = runs["compiled"]
    return {"ours_s": warm, "ours_cold_s": runs["ours"][0]["new"], "compiled_cold_s": cold["new"], "compiled_warm_s": again["new"],
            "later_step_s": {arm: statistics.median(run["later"] for run in each) for arm, each in runs.items()},
            "cold_over_ours": cold["new"] / warm, "warm_over_ours": again["new"] / warm,
            "first_of_the_process_s": {arm: [run["former"] for run in each] for arm, each in runs.items()}}


def verdict(results: dict[str, dict]) -> dict[str, object]:
    sooner = [figures[key] for figures in results.values() for key in ("cold_over_ours", "warm_over_ours")]
    met = min(sooner) >= REACH
    print(f"sooner than torch.compile, cold or warm, at least {min(sooner):.1f} times, reach {REACH:g}: {'met' if met else 'MISSED'}")
    return {"geometric_mean": statistics.geometric_mean(sooner), "worst": min(sooner), "reach": REACH, "met": met}


def show(machine: dict, results: dict[str, dict]):
    print(f"\n{machine}\nto the end of the first step of a new architecture, seconds")
    rows = [(name, *(f"{each[key]:.3f}" for key in ("ours_s", "ours_cold_s")), f"{each['later_step_s']['ours']:.3f}",
             *(f"{each[key]:.2f}" for key in ("compiled_cold_s", "compiled_warm_s")), f"{each['later_step_s']['compiled']:.3f}",
             *(f"{each[key]:.1f}" for key in ("cold_over_ours", "warm_over_ours"))) for name, each in results.items()]
    print(harness.table([("change", "ours", "ours, cold", "a later step", "compiled, cold", "compiled, warm", "a later step", "cold / ours",
                          "warm / ours"), *rows]))


def test_first_step(tmp_path):
    folders = map(tmp_path.joinpath, map(str, range(len(CASES))))  # a compiler takes no spaces or commas in paths
    results = {f"{name}, {precision}": measure(name, precision, "cpu", folder) for (name, precision), folder in zip(CASES, folders)}
    show(harness.machine(), results)
    harness.report("first_step", {"batch": BATCH, "changes": results, "verdict": verdict(results)})


@harness_cuda.needs_gpu
def test_first_step_cuda(tmp_path):
    names = ("depth, 28x28", "student, 32x32")
    results = {f"{name}, bf16": measure(name, "bf16", "cuda", tmp_path / str(number)) for number, name in enumerate(names)}
    show(harness_cuda.machine(), results)
    seconds = [each["ours_s"] for each in results.values()]
    soon = {"geometric_mean": statistics.geometric_mean(seconds), "worst": max(seconds), "reach": REACH_SECONDS_CUDA,
            "met": max(seconds) < REACH_SECONDS_CUDA}
    harness_cuda.report("first_step_bfloat16", {"batch": BATCH, "changes": results, "verdicts": {
        "first step, sooner than torch.compile": verdict(results), "first step, seconds": soon}})


if __name__ == "__main__":
    print(json.dumps(one(*sys.argv[1:])))
