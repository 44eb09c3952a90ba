"""The shared training loop and its parts."""

import math
import signal

import pytest
import torch
from test_models import tiny
from torch import nn

from odn_fast.data import Batches, Normalisation, Split
from odn_fast.engine import (Convergence, CosineEpochs, FitConfig, FitData, Interrupted, Interrupts, SteppedEpochs, Training,
                             accuracy, classification_loss, confusion, fit, measure_latency, resolve_precision, tune_allocator)
from odn_fast.models import FoldedNetwork


def follow(rule, accuracies, lr=1.0):
    """Feed validation accuracies to a rule; returns (outcome, epochs, training)."""
    training = Training(lr)
    for value in accuracies:
        if rule.finished(training):
            break
        training.epoch += 1
        rule.after_epoch(training, value)
    return rule.finished(training), training.epoch, training


def test_converged_at_the_23rd_epoch_without_improvement():
    outcome, epochs, training = follow(Convergence(), [50.0] * 40)
    assert (outcome, epochs, training.counter) == ("converged", 24, 23)
    assert training.lr == pytest.approx(0.6 ** 4)  # at counters 5, 10, 15 and 20


def test_an_improvement_resets_the_counter_and_keeps_the_learning_rate():
    _, _, training = follow(Convergence(), [50.0] * 7 + [51.0] + [51.0] * 4)
    assert (training.counter, training.best_epoch, training.lr) == (4, 8, 0.6)


def test_searching_compares_tenths_and_fine_tuning_hundredths():
    for digits, better in [(1, False), (2, True)]:
        _, _, training = follow(Convergence(digits=digits), [97.61, 97.64])
        assert (training.best_accuracy == 97.64) is better


def test_passing_is_decided_after_rounding_and_ends_at_once():
    assert follow(Convergence(need=97.5), [97.0, 97.45, 99.0])[:2] == ("passed", 2)
    assert follow(Convergence(need=97.5), [97.44] * 3)[0] is None


def test_cap_and_exact_epochs():
    assert follow(Convergence(need=99, cap=3), [50, 60, 70, 80])[:2] == ("cap", 3)
    assert follow(Convergence(need=60, exactly=30), [70.0] * 40)[:2] == ("epochs", 30)


def test_the_authors_curve_is_followed_exactly():
    """Their loop, written out, on a recorded-looking curve of 120 epochs."""
    curve = [90 + 8 * (1 - math.exp(-epoch / 9)) + 0.3 * math.sin(1.7 * epoch) for epoch in range(120)]
    best, counter, lr, epochs = 0.0, 0, 0.01, 0
    for value in curve:
        epochs += 1
        if round(value, 1) > best:
            best, counter = round(value, 1), 0
        else:
            counter += 1
            if counter % 5 == 0:
                lr *= 0.6
        if counter >= 23:
            break
    outcome, ours, training = follow(Convergence(need=99.9), curve, lr=0.01)
    assert outcome == "converged" and (ours, training.lr) == (epochs, lr) and round(training.best_accuracy, 1) == best


@pytest.mark.parametrize("epochs, drops", [(10, (5, 8)), (400, (200, 300)), (5, (3, 4)), (2, (1, 2)), (1, (1, 1))])
def test_stages_drop_the_learning_rate_after_a_half_and_after_three_quarters(epochs, drops):
    rule = SteppedEpochs(epochs, 0.025)
    rates = [rule.learning_rate(Training(0.025, epoch=epoch)) for epoch in range(epochs)]
    assert rates == pytest.approx([0.025 * 0.1 ** sum(epoch >= drop for drop in drops) for epoch in range(epochs)])
    assert rule.finished(Training(0.025, epoch=epochs - 1)) is None and rule.finished(Training(0.025, epoch=epochs)) == "epochs"


def test_of_equal_epochs_of_a_retraining_the_later_is_the_best():
    rule, training = SteppedEpochs(4, 0.1), Training(0.1)
    improved = []
    for training.epoch, reached in enumerate((70.0, 90.0, 80.0, 90.0), 1):
        improved.append(rule.after_epoch(training, reached))
    assert improved == [True, True, False, True] and (training.best_accuracy, training.best_epoch) == (90.0, 4)
    assert not SteppedEpochs(4, 0.1).after_epoch(training, None)


def test_warm_up_anneals_by_half_a_cosine():
    rule = CosineEpochs(3, 1e-3)
    rates = [rule.learning_rate(Training(1e-3, epoch=epoch)) for epoch in range(3)]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.25e-3])
    assert rule.finished(Training(1e-3, epoch=2)) is None and rule.finished(Training(1e-3, epoch=3)) == "epochs"


def trained_statistics(model):
    for _ in range(3):
        model(torch.randn(8, 2, 6, 6, dtype=next(model.parameters()).dtype))
    return model.eval()


def test_folding_changes_nothing_but_rounding_and_follows_its_source():
    model = tiny()
    folded = FoldedNetwork(model.at_depth(3)).double()
    trained_statistics(model)
    nn.init.uniform_(model.stem[1].weight)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    assert not torch.allclose(folded(x), model(x, 3))
    folded.refresh()
    torch.testing.assert_close(folded(x), model(x, 3), rtol=1e-12, atol=1e-12)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_folding_leaves_what_it_cannot_fold():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
            self.plain = nn.BatchNorm2d(2, affine=False)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + self.plain(self.conv(y))

    model = Shared()
    trained_statistics(model)
    x = torch.randn(4, 2, 6, 6)
    torch.testing.assert_close(FoldedNetwork(model)(x), model(x))


def make_data(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (count,), generator=generator)
    images = torch.randint(0, 255, (count, 2, 6, 6), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), 0, labels] = 255  # a bright row tells the class
    return Split(images, labels), Normalisation(255, (0.5, 0.5), (0.3, 0.3))


class Note:
    """A record that keeps summaries and may stop the training."""

    def __init__(self, stop_at=None):
        self.summaries, self.steps, self.stop_at = [], 0, stop_at

    def step(self, model, optimizer, training):
        self.steps += 1
        if self.steps == self.stop_at:
            raise Interrupted(signal.SIGTERM)

    def waiting(self, model, optimizer, training): ...

    def epoch(self, model, optimizer, training, summary):
        self.summaries.append(summary)


def setup(lr=0.05):
    model = tiny(dtype=torch.float32)
    split, normalisation = make_data()
    batches = Batches(split, normalisation, 16, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def validate(after_batch):
        model.eval()
        return accuracy(confusion(model, [(normalisation(split.images), split.labels)], 5, after_batch))

    return model, FitData(batches, "depth 3", validate), optimizer


def run_fit(model, data, optimizer, record, rule, training):
    return fit(model, data, classification_loss, optimizer, FitConfig(), record, rule, training)


def test_fit_learns_and_keeps_the_best_weights():
    model, data, optimizer = setup()
    training, record = Training(0.05), Note()
    outcome = run_fit(model, data, optimizer, record, Convergence(need=95.0, cap=40), training)
    assert outcome == "passed" and training.best_accuracy >= 94.95 and training.best_epoch == training.epoch
    assert record.summaries[-1]["losses"][0] < record.summaries[0]["losses"][0]
    assert record.steps == training.epoch * data.batches.steps_per_epoch
    for name, value in model.state_dict().items():
        assert torch.equal(value, training.best_weights[name]), name


def test_fit_reports_sums_over_images_not_batches():
    """60 images in batches of 16: the last one has 12."""
    model, data, optimizer = setup(lr=1e-12)
    losses, record = [], Note()
    for x, y in data.batches.epoch("depth 3", 0):
        model.train()
        losses.append(nn.functional.cross_entropy(model(x), y, reduction="sum").item())
    run_fit(model, data, optimizer, record, Convergence(cap=1), Training(1e-12))
    assert record.summaries[0]["losses"][0] == pytest.approx(sum(losses) / 60, rel=1e-5)


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
def test_fit_goes_on_from_any_step_to_the_same_bits(stop_at):
    model, data, optimizer = setup()
    run_fit(model, data, optimizer, Note(), Convergence(cap=3), straight := Training(0.05))
    again, data, optimizer_again = setup()
    training = Training(0.05)
    with pytest.raises(Interrupted):
        run_fit(again, data, optimizer_again, Note(stop_at), Convergence(cap=3), training)
    run_fit(again, data, optimizer_again, Note(), Convergence(cap=3), training)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert (training.epoch, training.best_accuracy) == (straight.epoch, straight.best_accuracy)


def test_the_time_of_an_interrupted_epoch_is_that_of_both_its_parts():
    model, data, optimizer = setup()
    training, record = Training(0.05), Note()
    with pytest.raises(Interrupted):
        run_fit(model, data, optimizer, Note(3), Convergence(cap=1), training)
    assert training.epoch_seconds > 0 and training.seconds == 0
    training.epoch_seconds += 100  # as if they had taken that long
    run_fit(model, data, optimizer, record, Convergence(cap=1), training)
    assert 100 < training.seconds < 150 and record.summaries[0]["seconds"] == training.seconds and training.epoch_seconds == 0
    assert record.summaries[0]["images_per_second"] > 12 / 100  # of the images seen since


def test_divergence_stops_with_the_last_good_weights():
    model, data, optimizer = setup(lr=0.01)
    training = Training(0.01)
    run_fit(model, data, optimizer, Note(), Convergence(cap=2), training)
    good = {name: value.clone() for name, value in training.best_weights.items()}
    training.lr = 1e30
    assert run_fit(model, data, optimizer, Note(), Convergence(cap=9), training) == "diverged"
    for name, value in model.state_dict().items():
        assert torch.equal(value, good[name]), name


def test_confusion_counts_rows_as_true_classes():
    logits = torch.eye(3)[[0, 1, 1, 2]]
    counts = confusion(lambda x: x, [(logits, torch.tensor([0, 0, 1, 2]))], 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]] and accuracy(counts) == 75.0


def test_latency_has_quartiles_in_order():
    latency = measure_latency(nn.Conv2d(1, 1, 1), (1, 4, 4), seconds=0.01)
    assert 0 < latency.low_ms <= latency.median_ms <= latency.high_ms and latency.runs >= 5


def test_precision_names():
    assert resolve_precision("fp32", "cpu") == "fp32" and resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("auto", "cpu") in ("fp32", "bf16")
    with pytest.raises(ValueError, match="expected auto, fp32 or bf16"):
        resolve_precision("fp16", "cpu")


def test_tuned_allocator_keeps_large_blocks():
    """A freed block of 64 MB stays with the process, so that its pages do not fault again."""
    import resource
    if not tune_allocator():
        pytest.skip("this C library has no mallopt")
    for _ in range(2):
        torch.ones(16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(16 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2 * 16384  # four blocks are 65,536 pages


def test_a_signal_waits_where_it_is_deferred_and_raises_elsewhere():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may have it ignored
    with Interrupts() as interrupts:
        with interrupts.deferred():
            signal.raise_signal(signal.SIGTERM)
            assert interrupts.pending == signal.SIGTERM
            with pytest.raises(Interrupted):  # a second one does not wait
                signal.raise_signal(signal.SIGINT)
    with Interrupts(), pytest.raises(Interrupted) as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.value.exit_status == 130
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            assert interrupts.pending is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_network_that_ends_an_epoch_with_weights_that_are_not_finite_is_not_kept():
    """The last step's loss was finite, its update was not."""
    model, data, _ = setup()
    batches = Batches(*make_data(), 60, seed=3)  # one step an epoch
    optimizer = torch.optim.SGD(model.parameters(), lr=1e39, fused=True)
    training = Training(1e39)
    outcome = run_fit(model, FitData(batches, "depth 3", data.validate), optimizer, Note(), Convergence(cap=3), training)
    assert outcome == "diverged" and training.best_weights is None
