"""One warm-up step over all depths, against the full network alone and against the authors' way.

    pytest bench/bench_warm_up.py -s

ResNet-18, 1x28x28, batch 128. Arms: `ours` (one backbone pass, each exit taken before the next block), `full depth`
(forward and backward of the deepest network alone, same precision and layout), `plain` (one backbone pass, exits in
PyTorch), `authors` (one forward and backward per depth, fp32, NCHW, as in their notebooks). Gradients are compared first.
"""

import copy

import pytest
import torch
from authors import plain, warm_up_gradients
from harness import QUICK, measure, prepare, ratio, report, spread, table
from torch import nn

from odn_fast.engine import autocast
from odn_fast.models import DepthNetwork, create

BATCH = 16 if QUICK else 128


def step(model, loss, precision):
    with autocast(precision, "cpu"):
        value = loss(model)
    for parameter in model.parameters():
        parameter.grad = None
    value.backward()


def plain_loss(model, x, y):
    return sum(nn.functional.cross_entropy(logits.float(), y) for logits in model.forward_exits(x))


def largest_difference(ours: DepthNetwork, other: DepthNetwork) -> float:
    """Largest relative L2 difference between the gradients of two networks, over parameters."""
    known = dict(other.named_parameters())
    differences = torch.stack([(a.grad - known[name].grad).norm() / known[name].grad.norm() for name, a in ours.named_parameters()])
    assert torch.isfinite(differences).all()
    return differences.max().item()


def errors(model, truth, precision, x, y):
    """How far the gradients of our step and of the plain one, as they are timed, lie from float64: largest, relative L2."""
    found = []
    for loss in (lambda network: network.exit_losses(x, y)[0].sum(), lambda network: plain_loss(network, x, y)):
        network = copy.deepcopy(model)
        step(network, loss, precision)
        found.append(largest_difference(network, truth))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_warm_up(precision):
    prepare(threads=2)
    torch.manual_seed(0)
    model = create("resnet18", 1, 10).to(memory_format=torch.channels_last).train()
    authors = plain(model)
    x_nchw, y = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    x = x_nchw.to(memory_format=torch.channels_last)

    truth, checked = copy.deepcopy(authors).double(), copy.deepcopy(model).double()
    warm_up_gradients(truth, x_nchw[:16].double(), y[:16])
    step(checked, lambda network: network.exit_losses(x[:16].double(), y[:16])[0].sum(), "fp32")
    difference = largest_difference(checked, truth)
    assert difference < 1e-10, difference

    arms = {
        "ours": lambda: step(model, lambda network: network.exit_losses(x, y)[0].sum(), precision),
        "full depth": lambda: step(model, lambda network: nn.functional.cross_entropy(network(x).float(), y), precision),
        "plain": lambda: step(model, lambda network: plain_loss(network, x, y), precision),
    }
    ours_error, plain_error = errors(model, truth, precision, x[:16], y[:16])
    assert ours_error <= 2 * plain_error, (ours_error, plain_error)
    close = measure(arms, repetitions=12, warm_up=2, patience=150)
    distant = measure({"ours": arms["ours"], "authors": lambda: warm_up_gradients(authors, x_nchw, y)}, repetitions=8, warm_up=1)
    near, far = close.times, distant.times
    figures = {
        "ours_over_full_depth": ratio(near["ours"], near["full depth"]),
        "plain_over_full_depth": ratio(near["plain"], near["full depth"]),
        "authors_over_ours": ratio(far["authors"], far["ours"]),
        "reach": {"ours_over_full_depth": 1.03, "authors_over_ours": 5 if precision == "fp32" else 9},
        "gradient_difference_fp64": difference,
        "gradient_error": {"ours": ours_error, "plain": plain_error},
        "quiet": close.quiet and distant.quiet,
        "disturbed": close.disturbed + distant.disturbed,
    }
    print("\n" + table([("arm", "ms"), *((name, spread(times)) for name, times in near.items()), ("authors", spread(far["authors"]))]))
    print(f"{precision}: ours is {figures['ours_over_full_depth']:.3f} x full depth alone (reach 1.03; plain PyTorch "
          f"{figures['plain_over_full_depth']:.3f}), the authors' way takes {figures['authors_over_ours']:.2f} x ours "
          f"(reach {figures['reach']['authors_over_ours']})")
    report(f"warm_up_{precision}", {"batch": BATCH, **figures, "milliseconds": {**near, "authors": far["authors"]}})
