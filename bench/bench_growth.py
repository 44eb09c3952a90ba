"""A stage's step of growth on the CPU: with the fused ops against their references, and with kept teacher maps against live ones.

    pytest bench/bench_growth.py -s

The students are those that growth makes of CIFAR-10 and ResNet-56 in its first stages: 7 units towards the final node (stage 3),
then a node at q = 13 whose edge from the image has 4 units (stage 5). Images and weights are drawn; batch 128. A step is
forward, the loss of a stage (labels and the teacher's maps through channel attention), backward and SGD. An arm runs several steps,
so that putting the references in place of the kernels, which happens in the time of their arm, counts little. Losses of all
arms are compared first.
"""

import contextlib
import itertools

import harness
import pytest
import torch

from odn_fast.data import Normalisation, Split
from odn_fast.engine import autocast
from odn_fast.engine.distillation import TeacherMaps, growth_loss
from odn_fast.models import StudentNetwork
from odn_fast.models.resnet import CifarResNet
from odn_fast.models.student_graph import deepen, initial_graph, widen
from odn_fast.models.teachers import teacher_of
from odn_fast.ops._library import on_references

BATCH, STEPS, IMAGES = 128, 3, 512
REACH = {"references": 1.8, "live teacher": 2.0}


def students(map_shapes):
    """The graphs of stages 3 and 5."""
    third = deepen(deepen(initial_graph((3, 32, 32), map_shapes, 10), 0, 3), 0, 3)
    fourth = widen(third, 0, 13, map_shapes[12])
    return third, deepen(fourth, next(edge.id for edge in fourth.edges if edge.source == 0 and edge.target != 1), 3)


def make_arm(graph, teacher, split, limit, precision, around=contextlib.nullcontext):
    """A function that trains a student of its own for some steps and returns the last loss."""
    normalisation, labels = Normalisation(255, (0.0,) * 3, (1.0,) * 3), torch.arange(IMAGES) % 10
    network = StudentNetwork(graph, seed=0).to(memory_format=torch.channels_last).train()
    maps = TeacherMaps(teacher, split, normalisation, limit, precision, "cpu")
    maps.want([node.q for node in graph.supervised])
    loss = growth_loss(graph, maps, labels, torch.tensor(0.5), standardize=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, weight_decay=3e-4, fused=True)
    positions = torch.arange(IMAGES).split(BATCH)
    batches = itertools.cycle([(normalisation(split.images[rows]), rows) for rows in positions])

    def steps():
        with around():
            for _ in range(STEPS):
                x, rows = next(batches)
                with autocast(precision, "cpu"):
                    losses, _ = loss(network, x, rows)
                optimizer.zero_grad(set_to_none=True)
                losses.sum().backward()
                optimizer.step()
        return losses.detach().sum().item()

    return steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bench_growth(precision):
    harness.prepare(threads=2)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    network = CifarResNet(56, 10)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # running statistics become those of the images, so that maps are of an ordinary size
    with torch.no_grad():
        network.train()(images[:BATCH] / 255)
    teacher = teacher_of(network, None, (3, 32, 32), "ResNet-56").to(memory_format=torch.channels_last)
    split = Split(images, torch.arange(IMAGES))
    third, fifth = students(teacher.map_shapes)
    cases = {
        "references": {"ours": make_arm(fifth, teacher, split, 1 << 32, precision),
                       "baseline": make_arm(fifth, teacher, split, 1 << 32, precision, on_references)},
        "live teacher": {"ours": make_arm(third, teacher, split, 1 << 32, precision),
                         "baseline": make_arm(third, teacher, split, 0, precision)},
    }
    results = {}
    for name, arms in cases.items():
        first = {arm: steps() for arm, steps in arms.items()}
        assert abs(first["ours"] / first["baseline"] - 1) < (1e-3 if precision == "fp32" else 0.03), first
        measured = harness.measure(arms, repetitions=15, warm_up=1, patience=60)
        times = {arm: [t / STEPS for t in each] for arm, each in measured.times.items()}
        results[name] = {"ratio": harness.ratio(times["baseline"], times["ours"]), "reach": REACH[name], "quiet": measured.quiet,
                         "milliseconds_a_step": {arm: harness.spread(each) for arm, each in times.items()}}
    print(f"\n{harness.machine()}\ngrowth, {precision}, milliseconds a step")
    rows = [(name, *figures["milliseconds_a_step"].values(), f"{figures['ratio']:.2f}", figures["reach"])
            for name, figures in results.items()]
    print(harness.table([("against", "ours", "baseline", "ratio", "reach"), *rows]))
    harness.report(f"growth_{precision}", {"batch": BATCH, "steps_an_arm": STEPS, "cases": results})
