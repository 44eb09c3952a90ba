"""A training step at every depth against the authors' loop, and an epoch against its bare steps.

    pytest bench/bench_step.py -s

ResNet-18, 1x28x28, batch 128, images drawn. A step of ours is what the engine does at every step of an epoch: the batch gathered
from the resident set and normalised, forward, loss, backward, SGD, sums of losses and of correct images. The authors' step
takes its batch from a DataLoader over PIL images, computes in fp32 and NCHW, and reads two values back (`authors.py`). Given the
same batches, both have to end with the same weights: in float64 to 1e-9.

An epoch of the engine (recorder, order of the data, metrics) is measured against the same steps on batches that lie ready, whose
weights have to be the same bits; validation as a search does it against bare passes of the folded network.

On a GPU the captured step is measured at the wall, as an epoch runs it, beside its floors: compute, at the rate of a large bf16
product, and launches, its own graph nodes times what an empty one takes. It makes its batch as well; plain PyTorch, eager and by
torch.compile, is given batches that lie ready.
"""

import itertools
import statistics

import pytest
import torch
from torch import nn

import authors
import harness
import harness_cuda
from odn_fast.data import Batches, Normalisation, Split, evaluation_batches
from odn_fast.engine import (
    Convergence, FitConfig, FitData, Interrupts, Training, accuracy, autocast, classification_loss, confusion, make_sgd)
from odn_fast.engine.fit import train_epoch
from odn_fast.engine.step import train_step
from odn_fast.models import FoldedNetwork, create, profile
from odn_fast.record import RunFolder
from odn_fast.search.display import Silent
from odn_fast.search.expansion_state import RunState
from odn_fast.search.recorder import Recorder

BATCH, STEPS, LR = *((16, 3) if harness.QUICK else (128, 12)), 1e-4
SHAPE = (1, 28, 28)
REACH_EPOCH, REACH_VALIDATION, REACH_FLOOR = 1.03, 1.1, 1.15
DEPTHS = (1, 8) if harness.QUICK else range(1, 9)
CUDA_DEPTHS = (1, 2, 8)


def resident(device="cpu", shape=SHAPE):
    """Batches of a set of drawn images, as the engine takes them."""
    torch.manual_seed(0)
    split = Split(torch.randint(0, 256, (BATCH * STEPS, *shape), dtype=torch.uint8), torch.randint(0, 10, (BATCH * STEPS,)))
    return Batches(split.to(device), Normalisation(255, (0.1307,), (0.3081,)), BATCH, seed=0)


def backbone(device="cpu"):
    torch.manual_seed(0)
    return create("resnet18", 1, 10).to(device, memory_format=torch.channels_last).train()


def engine_step(network, batches, precision, device="cpu"):
    """A function that takes the next step of a training that never ends."""
    step = train_step(network, classification_loss, make_sgd(network, LR, 0.9, 5e-4, device), batches, FitConfig(precision, device))
    training = Training(LR)
    inputs = itertools.chain.from_iterable(batches.inputs("bench", epoch) for epoch in itertools.count())
    step.begin_epoch(training)
    return lambda: step(next(inputs), training)


def authors_step(network, batches):
    optimizer = authors.make_sgd(network.parameters(), LR)
    loader = authors.loader(batches.split, batches.normalisation, BATCH, shuffle=True)
    given = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: authors.train_step(network, optimizer, *next(given))


class Double(Batches):
    """The same batches in float64."""

    def batch(self, *inputs):
        x, y = super().batch(*inputs)
        return x.double(), y


def check_both_ways_agree():
    """Loader and resident set give the same images; on the same batches both ways come to the same weights."""
    batches, places = resident(), torch.arange(BATCH)
    pictures = authors.Pictures(batches.split, batches.normalisation)
    x, y = batches.batch(places, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(torch.stack([pictures[place][0] for place in places.tolist()]), x, atol=1e-6, rtol=1e-6)
    assert [pictures[place][1] for place in places.tolist()] == y.tolist()

    double = Double(batches.split, batches.normalisation, 16, seed=0)
    ours = backbone().double().at_depth(2)
    theirs = authors.plain(backbone().double()).at_depth(2)
    optimizer, take = authors.make_sgd(theirs.parameters(), LR), engine_step(ours, double, "fp32")
    for x, y in itertools.islice(double.epoch("bench", 0), 5):
        take()
        authors.train_step(theirs, optimizer, x.contiguous(), y)
    reached = theirs.state_dict()
    for name, mine in ours.state_dict().items():
        torch.testing.assert_close(mine, reached[name], atol=1e-9, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step(precision):
    harness.prepare(threads=2)
    check_both_ways_agree()
    batches, depths, quiet = resident(), {}, True
    for depth in DEPTHS:
        theirs = authors.plain(backbone()).at_depth(depth)
        arms = {"ours": engine_step(backbone().at_depth(depth), batches, precision), "authors": authors_step(theirs, batches)}
        measured = harness.measure(arms, repetitions=12, warm_up=2, patience=40)
        times, quiet = measured.times, quiet and measured.quiet
        depths[depth] = {"authors_over_ours": harness.ratio(times["authors"], times["ours"]), "quiet": measured.quiet,
                         "milliseconds": {name: harness.spread(values) for name, values in times.items()}}
    rows = [(depth, *figures["milliseconds"].values(), f"{figures['authors_over_ours']:.2f}") for depth, figures in depths.items()]
    print(f"\n{harness.machine()}\na training step, {precision}, batch {BATCH}, milliseconds")
    print(harness.table([("depth", "ours", "authors", "authors / ours"), *rows]))
    harness.report(f"step_{precision}", {"batch": BATCH, "quiet": quiet, "depths": depths})


# ---- an epoch


def epoch_arms(precision, folder):
    """The engine's epoch and the bare steps, each on a network of its own; and the two networks."""
    batches = resident()
    networks = [backbone().at_depth(2), backbone().at_depth(2)]
    recorder = Recorder(folder, Silent(), Interrupts(), RunState(), {}, checkpoint_minutes=60)
    recorder.begin(batches, Convergence(), "bench", lambda training: "")
    step = train_step(networks[0], classification_loss, make_sgd(networks[0], LR, 0.9, 5e-4, "cpu"), batches, FitConfig(precision))
    optimizer, ready = make_sgd(networks[1], LR, 0.9, 5e-4, "cpu"), list(batches.epoch("bench", 0))

    def engine():
        train_epoch(step, FitData(batches, "bench"), recorder, Training(LR))

    def bare():
        networks[1].train()
        for x, y in ready:
            with autocast(precision, "cpu"):
                loss = nn.functional.cross_entropy(networks[1](x).float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return engine, bare, networks, batches


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_epoch(precision, tmp_path):
    harness.prepare(threads=2)
    with RunFolder.create(tmp_path / "run", "") as folder:
        engine, bare, networks, batches = epoch_arms(precision, folder)
        engine(), bare()
        for (name, ours), theirs in zip(networks[0].state_dict().items(), networks[1].state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name

        folded = FoldedNetwork(networks[0])
        ready = [x for x, _ in evaluation_batches(batches.split, batches.normalisation)]

        def validate():
            return accuracy(confusion(folded.refresh(), evaluation_batches(batches.split, batches.normalisation), 10))

        def forward():
            with torch.inference_mode():
                return [folded(x) for x in ready]

        right = sum((logits.argmax(1) == y).sum().item()
                    for logits, (_, y) in zip(forward(), evaluation_batches(batches.split, batches.normalisation), strict=True))
        assert validate() == pytest.approx(100 * right / len(batches.split))
        arms = {"epoch": engine, "bare steps": bare, "validation": validate, "bare forward": forward}
        measured = harness.measure(arms, repetitions=12, warm_up=1, patience=150)
    times = measured.times
    figures = {"epoch_over_bare_steps": harness.ratio(times["epoch"], times["bare steps"]),
               "validation_over_bare_forward": harness.ratio(times["validation"], times["bare forward"]),
               "reach": {"epoch_over_bare_steps": REACH_EPOCH, "validation_over_bare_forward": REACH_VALIDATION}}
    print("\n" + harness.table([("arm", "ms"), *((name, harness.spread(values)) for name, values in times.items())]))
    print(f"{precision}: an epoch takes {figures['epoch_over_bare_steps']:.3f} x its bare steps (reach {REACH_EPOCH}), "
          f"validation {figures['validation_over_bare_forward']:.3f} x a bare folded forward (reach {REACH_VALIDATION})")
    harness.report(f"epoch_{precision}", {"batch": BATCH, "steps": STEPS, **figures, "quiet": measured.quiet,
                                          "disturbed": measured.disturbed, "milliseconds": times})


# ---- on a GPU


def cuda_arms(depth, batches):
    """Steps in bf16 on the device: the captured one, and plain PyTorch on a batch that lies ready, eager and by torch.compile."""
    arms = {"ours": engine_step(backbone("cuda").at_depth(depth), batches, "bf16", "cuda")}
    x, y = next(batches.epoch("bench", 0))
    for name in ("eager", "compiled"):
        network = backbone("cuda").extract(depth).train()
        optimizer = make_sgd(network, LR, 0.9, 5e-4, "cuda")
        called = torch.compile(network, dynamic=False) if name == "compiled" else network

        def step(called=called, optimizer=optimizer):
            with autocast("bf16", "cuda"):
                loss = nn.functional.cross_entropy(called(x).float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        arms[name] = step
    return arms


def check_first_losses(depth, batches):
    """The first loss of the captured step and that of plain fp32 PyTorch on the same weights and batch."""
    network, training = backbone("cuda").at_depth(depth), Training(LR)
    inputs = next(batches.inputs("bench", 0))
    x, y = batches.batch(*inputs)
    plain = nn.functional.cross_entropy(backbone("cuda").extract(depth)(x), y).item()
    step = train_step(network, classification_loss, make_sgd(network, LR, 0.9, 5e-4, "cuda"), batches, FitConfig("bf16", "cuda"))
    step.begin_epoch(training)
    step(inputs, training)
    ours = training.loss_sum.item() / training.images
    assert ours == pytest.approx(plain, rel=0.02), (ours, plain)


def graph_nodes(depth, batches):
    """Nodes of a step's graph, beside the copies of its inputs, and microseconds of a step in a graph of several."""
    network = backbone("cuda").at_depth(depth)
    step = train_step(network, classification_loss, make_sgd(network, LR, 0.9, 5e-4, "cuda"), batches, FitConfig("bf16", "cuda"))
    inputs = tuple(tensor.clone() for tensor in next(batches.inputs("bench", 0)))
    times, nodes = harness_cuda.measure({"ours": lambda: step.run(*inputs)}, calls=4)
    return nodes["ours"], statistics.median(times["ours"])


@harness_cuda.needs_gpu
def test_step_cuda():
    torch.backends.cudnn.benchmark = True
    limits, batches, depths = harness_cuda.ceilings(), resident("cuda"), {}
    for depth in CUDA_DEPTHS:
        check_first_losses(depth, batches)
        nodes, in_graph = graph_nodes(depth, batches)
        walls = {name: harness_cuda.wall(step, calls=100) for name, step in cuda_arms(depth, batches).items()}
        work = 3 * 2 * BATCH * profile(backbone(), SHAPE, depth).macs
        floor = {"compute": work / limits["bf16_product_TFLOP_s"] / 1e6, "launches": nodes * limits["graph_node_us"]}
        depths[depth] = {"wall_us": walls, "in_graph_us": in_graph, "nodes": nodes, "floor_us": floor,
                         "over_floor": walls["ours"] / max(floor.values()),
                         "over": {name: walls[name] / walls["ours"] for name in ("eager", "compiled")}}
        harness_cuda.enter("step_bfloat16", cuda_report(limits, depths))
    print(f"\n{harness_cuda.machine()}\na training step, bf16, batch {BATCH}, microseconds at the wall; {harness_cuda.rounded(limits)}")
    rows = [(depth, *(f"{each['wall_us'][name]:.0f}" for name in ("ours", "eager", "compiled")), f"{each['in_graph_us']:.0f}",
             each["nodes"], *(f"{each['floor_us'][name]:.0f}" for name in ("compute", "launches")), f"{each['over_floor']:.2f}")
            for depth, each in depths.items()]
    print(harness.table([("depth", "ours", "eager", "compiled", "ours in a graph", "nodes", "compute floor", "launch floor",
                          "ours / larger floor"), *rows]))
    harness_cuda.report("step_bfloat16", cuda_report(limits, depths))


def cuda_report(limits, depths):
    ratios = [each["over_floor"] for each in depths.values()]
    verdict = {"geometric_mean": statistics.geometric_mean(ratios), "worst": max(ratios), "reach": REACH_FLOOR,
               "met": max(ratios) <= REACH_FLOOR}
    return {"batch": BATCH, "ceilings": limits, "depths": depths, "verdicts": {"step, times its larger floor": verdict}}
