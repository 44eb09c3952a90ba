"""engine/precision.py: bf16 trains as well as fp32, and keeps its weights, statistics and losses in fp32."""

import statistics

import pytest
import torch

from odn_fast.data import Batches, evaluation_batches, load
from odn_fast.engine import Convergence, FitConfig, FitData, Training, accuracy, classification_loss, confusion, fit, make_sgd
from odn_fast.engine.step import train_step
from odn_fast.models import FoldedNetwork, create

SEEDS, EPOCHS, IMAGE = 5, 6, 100 / 600  # percent that one of the images counted is worth
STUDENT_T = 2.776  # of 4 degrees of freedom, at 95 %


class Note:
    def step(self, *_):
        pass

    waiting = epoch = step


def reached(precision, seed):
    """Percent of digits' validation and test images that are right after some epochs at depth 1."""
    data = load("digits", seed=seed)
    torch.manual_seed(seed)
    network = create("resnet18", 1, 10).to(memory_format=torch.channels_last).at_depth(1)
    batches = Batches(data.train, data.normalisation, 64, seed)
    fit(network, FitData(batches, "depth 1", lambda _: 0.0), classification_loss, make_sgd(network, 0.01, 0.9, 5e-4, "cpu"),
        FitConfig(precision), Note(), Convergence(exactly=EPOCHS), Training(0.01))
    folded = FoldedNetwork(network)
    counts = sum(confusion(folded, evaluation_batches(split, data.normalisation), 10) for split in (data.validation, data.test))
    return accuracy(counts)


@pytest.mark.slow
def test_bf16_is_as_accurate_as_fp32_over_seeds():
    pairs = [(reached("bf16", seed), reached("fp32", seed)) for seed in range(SEEDS)]
    differences = [half - full for half, full in pairs]
    noise = STUDENT_T * statistics.stdev(differences) / SEEDS ** 0.5 + IMAGE
    print(f"\nbf16 and fp32: {pairs}; mean difference {statistics.mean(differences):+.2f} points, noise {noise:.2f}")
    assert min(full for _, full in pairs) > 80, "nothing was learned, so nothing is compared"
    assert abs(statistics.mean(differences)) <= noise
    assert noise < 3, "the comparison is too noisy to tell anything"


def test_bf16_keeps_weights_statistics_and_losses_in_fp32():
    data = load("digits")
    network = create("resnet18", 1, 10).at_depth(1)
    optimizer = make_sgd(network, 0.01, 0.9, 5e-4, "cpu")
    batches, seen = Batches(data.train, data.normalisation, 64, 0), []

    def loss(model, x, y):
        losses, correct = classification_loss(model, x, y)
        seen.append((model.stem(x).dtype, losses.dtype))
        return losses, correct

    train_step(network, loss, optimizer, batches, FitConfig("bf16"))(next(batches.inputs("k", 0)), Training(0.01))
    assert seen == [(torch.bfloat16, torch.float32)]
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    floating = [tensor for tensor in (*network.state_dict().values(), *momenta) if tensor.is_floating_point()]
    assert momenta and all(tensor.dtype == torch.float32 for tensor in floating)
