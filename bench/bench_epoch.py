"""What an epoch of the engine costs beyond its arithmetic.

    pytest bench/bench_epoch.py -s

ResNet-18 at depth 2, 1x28x28, batch 128, 12 steps. Training: the engine's epoch (data order, gather, normalise, metrics,
recorder) against the same steps on batches that lie ready. Validation: the search's (fold, batches, counting) against the
bare forward passes of the folded network. Both arms must end with the same weights.
"""

import copy

import pytest
import torch
from harness import measure, prepare, ratio, report, spread, table
from torch import nn

from odn_fast.config import ExpandConfig
from odn_fast.data import Batches, Normalisation, Split, evaluation_batches
from odn_fast.engine import (Convergence, FitConfig, FitData, Interrupts, Training, accuracy, autocast,
                             classification_loss, confusion)
from odn_fast.engine.fit import train_epoch
from odn_fast.models import FoldedNetwork, create
from odn_fast.record import RunFolder
from odn_fast.search.display import Silent
from odn_fast.search.recorder import Recorder
from odn_fast.search.state import RunState

BATCH, STEPS = 128, 12


def make_arms(precision, folder):
    """The engine's epoch and the bare steps, each on a network of its own; and the two networks."""
    torch.manual_seed(0)
    split = Split(torch.randint(0, 256, (BATCH * STEPS, 1, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (BATCH * STEPS,)))
    batches = Batches(split, Normalisation(255, (0.1307,), (0.3081,)), BATCH, seed=0)
    networks = [create("resnet18", 1, 10).to(memory_format=torch.channels_last).at_depth(2)]
    networks.append(copy.deepcopy(networks[0]))
    optimizers = [torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)
                  for network in networks]
    recorder = Recorder(folder, Silent(), Interrupts(), RunState(), {}, ExpandConfig())
    recorder.begin(batches, Convergence())
    resident = list(batches.epoch("depth 2", 0))

    def engine():
        train_epoch(networks[0], FitData(batches, "depth 2"), classification_loss, optimizers[0], FitConfig(precision),
                    recorder, Training(1e-4))

    def bare():
        networks[1].train()
        for x, y in resident:
            with autocast(precision, "cpu"):
                loss = nn.functional.cross_entropy(networks[1](x).float(), y)
            optimizers[1].zero_grad(set_to_none=True)
            loss.backward()
            optimizers[1].step()

    return engine, bare, networks, split, batches.normalisation


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_epoch(precision, tmp_path):
    prepare(threads=2)
    with RunFolder.create(tmp_path / "run", "") as folder:
        engine, bare, networks, split, normalisation = make_arms(precision, folder)
        engine(), bare()
        for (name, ours), theirs in zip(networks[0].state_dict().items(), networks[1].state_dict().values()):
            assert torch.equal(ours, theirs), name

        folded = FoldedNetwork(networks[0])
        resident = [x for x, _ in evaluation_batches(split, normalisation)]

        def validate():
            return accuracy(confusion(folded.refresh().eval(), evaluation_batches(split, normalisation), 10))

        @torch.inference_mode()
        def forward():
            return [folded(x) for x in resident]

        right = sum((logits.argmax(1) == y).sum().item() for logits, (_, y) in zip(forward(), evaluation_batches(split, normalisation)))
        assert validate() == pytest.approx(100 * right / len(split))
        measured = measure({"epoch": engine, "bare steps": bare, "validation": validate, "bare forward": forward},
                           repetitions=12, warm_up=1, patience=150)
    times = measured.times
    figures = {"epoch_over_bare_steps": ratio(times["epoch"], times["bare steps"]),
               "validation_over_bare_forward": ratio(times["validation"], times["bare forward"]),
               "reach": {"epoch_over_bare_steps": 1.03, "validation_over_bare_forward": 1.1}}
    print("\n" + table([("arm", "ms"), *((name, spread(values)) for name, values in times.items())]))
    print(f"{precision}: an epoch takes {figures['epoch_over_bare_steps']:.3f} x its bare steps (reach 1.03), "
          f"validation {figures['validation_over_bare_forward']:.3f} x a bare folded forward (reach 1.1)")
    report(f"epoch_{precision}", {"batch": BATCH, "steps": STEPS, **figures, "quiet": measured.quiet,
                                  "disturbed": measured.disturbed, "milliseconds": times})
