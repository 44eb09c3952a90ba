"""engine/step.py: what a step does and leaves alone, and that nothing in an epoch waits for the device."""

import contextlib
import copy
import gc
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from odn_fast.data import Batches, Normalisation, Split
from odn_fast.engine import FitConfig, FitData, Training, classification_loss, load_optimizer, make_adam, make_sgd
from odn_fast.engine.fit import train_epoch
from odn_fast.engine.step import CapturedStep, CaptureError, set_learning_rate, train_step, unchanged
from odn_fast.models import DepthNetwork, create

on_gpu = pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none"))
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]


class Note:
    """A record that lets everything pass."""

    def step(self, model, optimizer, training):
        pass

    waiting = step


def batches_on(device, count=70, augment=True):
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator), torch.arange(count) % 10)
    return Batches(split.to(device), Normalisation(255, (0.5,) * 3, (0.25,) * 3), 16, seed=1, augment=augment)


def network_on(device, depth=2):
    torch.manual_seed(3)
    return create("resnet18", 3, 10).to(device, memory_format=torch.channels_last).at_depth(depth)


def states(model, optimizer):
    momenta = {f"momentum {i}": state["momentum_buffer"] for i, state in enumerate(optimizer.state.values())}
    return {name: tensor.clone() for name, tensor in (model.state_dict() | momenta).items()}


def train(device, epochs=2, config=None, depth=2):
    """Weights, running statistics and momenta after some epochs of 5 batches, the last one ragged; and the sums of the last."""
    model = network_on(device, depth)
    optimizer = make_sgd(model, 0.05, 0.9, 5e-4, device)
    batches, training = batches_on(device), Training(0.05)
    step = train_step(model, classification_loss, optimizer, batches, config or FitConfig(device=device))
    for epoch in range(epochs):
        set_learning_rate(optimizer, 0.05 / (1 + epoch))
        training.epoch, training.step, training.images, training.loss_sum, training.correct = epoch, 0, 0, None, None
        train_epoch(step, FitData(batches, "k"), Note(), training)
    return states(model, optimizer), training


class NoWaiting(TorchDispatchMode):
    """Raises where a value is read back from the device, or a size depends on one."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["depth", "all depths"])
def test_nothing_in_an_epoch_waits_for_the_device(precision, loss):
    network = create("resnet18", 3, 10)
    model, function = (network.at_depth(2), classification_loss) if loss == "depth" else (network, DepthNetwork.exit_losses)
    optimizer, batches = make_sgd(model, 0.05, 0.9, 5e-4, "cpu"), batches_on("cpu", 40)
    step, training = train_step(model, function, optimizer, batches, FitConfig(precision)), Training(0.05)
    with NoWaiting():
        assert train_epoch(step, FitData(batches, "k"), Note(), training) == 40
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():  # the check itself can fail
        training.loss_sum.sum().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trained_before", [False, True])
def test_unchanged_undoes_steps(device, trained_before):
    model = network_on(device)
    optimizer, batches = make_sgd(model, 0.05, 0.9, 5e-4, device), batches_on(device)
    step = train_step(model, classification_loss, optimizer, batches, FitConfig(device=device, capture=False))
    inputs = list(batches.inputs("k", 0))
    if trained_before:
        step(inputs[0], Training(0.05))
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    before, random = states(model, optimizer), torch.get_rng_state()
    with unchanged(model, optimizer):
        for each in inputs[1:3]:
            step.run(*each)
            torch.rand(3)
        assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    after = states(model, optimizer)
    for name, tensor in before.items():
        assert torch.equal(tensor, after.pop(name)), name
    assert all(not momentum.any() for momentum in after.values()) and bool(after) is not trained_before
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places


def test_a_step_after_undone_ones_is_the_first():
    expected, _ = train("cpu", epochs=1)
    model = network_on("cpu")
    optimizer, batches, training = make_sgd(model, 0.05, 0.9, 5e-4, "cpu"), batches_on("cpu"), Training(0.05)
    step = train_step(model, classification_loss, optimizer, batches, FitConfig())
    with unchanged(model, optimizer):
        step.run(*next(batches.inputs("other", 5)))
    train_epoch(step, FitData(batches, "k"), Note(), training)
    for name, tensor in states(model, optimizer).items():
        assert torch.equal(tensor, expected[name]), name


def test_sums_are_those_of_the_images():
    model = network_on("cpu").double()
    optimizer, batches, training = make_sgd(model, 0.0, 0.0, 0.0, "cpu"), batches_on("cpu"), Training(0.0)

    def loss(model, x, y):
        return classification_loss(model, x.double(), y)

    pairs = list(batches.epoch("k", 0))
    assert [len(y) for _, y in pairs] == [16, 16, 16, 16, 6]
    with torch.no_grad():
        expected = [loss(copy.deepcopy(model).train(), *pair) for pair in pairs]
    train_epoch(train_step(model, loss, optimizer, batches, FitConfig()), FitData(batches, "k"), Note(), training)
    total = sum(losses.double() * len(y) for (losses, _), (_, y) in zip(expected, pairs))
    torch.testing.assert_close(training.loss_sum, total, rtol=1e-6, atol=0)
    assert training.correct.item() == sum(correct.item() for _, correct in expected) and training.images == 70


def test_optimizers_go_on_from_what_was_saved():
    for make in (lambda model: make_sgd(model, 0.1, 0.9, 1e-4, "cpu"), lambda model: make_adam(model, 0.1, "cpu")):
        model = nn.Linear(3, 2)
        optimizer = make(model)
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        set_learning_rate(optimizer, 0.02)
        other = copy.deepcopy(model)
        resumed = make(other)
        load_optimizer(resumed, copy.deepcopy(optimizer.state_dict()))
        assert resumed.param_groups[0]["lr"] == 0.02
        for parameter in (*model.parameters(), *other.parameters()):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(), resumed.step()
        for first, second in zip(model.parameters(), other.parameters()):
            assert torch.equal(first, second)


@pytest.fixture
def captures(monkeypatch):
    """Stand-ins for CUDA's streams and graphs, so that captured steps run on the CPU: `made()` makes one, to be given nothing.

    capturing: an event, set for some time while a graph is captured; replayed: at every replay, whether it was; collecting: at
    every capture, whether the garbage collector was on.
    """
    capturing, replayed, collecting = threading.Event(), [], []

    class Graph:
        def replay(self):
            replayed.append(capturing.is_set())

    @contextlib.contextmanager
    def capture(*_, **__):
        capturing.set()
        collecting.append(gc.isenabled())
        time.sleep(0.2)
        yield
        capturing.clear()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {"Stream": lambda *_, **__: stream, "current_stream": lambda *_: stream, "graph_pool_handle": lambda: (0, 1),
                           "stream": lambda _: contextlib.nullcontext(), "CUDAGraph": Graph, "graph": capture}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def made():
        model, batches = network_on("cpu"), batches_on("cpu")
        step = CapturedStep(model, classification_loss, make_sgd(model, 0.05, 0.9, 5e-4, "cpu"), batches, FitConfig())
        return partial(step, next(batches.inputs("k", 0)), Training(0.05))

    return SimpleNamespace(made=made, capturing=capturing, replayed=replayed, collecting=collecting)


def test_no_graph_is_replayed_while_one_is_captured(captures):
    """By several trainings at once."""
    first, second = captures.made(), captures.made()
    first()  # is captured, and replayed
    other = threading.Thread(target=second)
    other.start()
    assert captures.capturing.wait(60)
    while other.is_alive():
        first()
    assert len(captures.replayed) > 2 and not any(captures.replayed)


def test_no_garbage_is_collected_while_a_graph_is_captured(captures):
    assert gc.isenabled()
    captures.made()()
    assert captures.collecting == [False] and gc.isenabled()


@pytest.fixture
def near(monkeypatch):
    """Asserts that two tensors are as near as two trainings come to each other on a GPU, whose libraries may choose anew."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_epoch_is_an_eager_one(precision, near):
    captured, sums = train("cuda", config=FitConfig(precision, "cuda"))
    eager, expected = train("cuda", config=FitConfig(precision, "cuda", capture=False))
    for name, tensor in eager.items():
        near(captured[name], tensor, msg=lambda text: f"{name}: {text}")
    near(sums.loss_sum, expected.loss_sum)
    assert torch.equal(sums.correct, expected.correct) and sums.images == expected.images == 70


@on_gpu
def test_a_captured_epoch_reads_nothing_back():
    model = network_on("cuda")
    optimizer, batches, training = make_sgd(model, 0.05, 0.9, 5e-4, "cuda"), batches_on("cuda"), Training(0.05)
    step = train_step(model, classification_loss, optimizer, batches, FitConfig(device="cuda"))
    train_epoch(step, FitData(batches, "k"), Note(), training)
    training.step = 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_epoch(step, FitData(batches, "k"), Note(), training)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert training.images == 140


class Waiting(nn.Module):
    """A network that looks at a value of its input before it goes on."""

    def __init__(self):
        super().__init__()
        self.inner = network_on("cuda")

    def forward(self, x):
        return self.inner(x) * (1.0 if x.sum().item() > -1e9 else 2.0)


def _step_of_a_waiting_model():
    model = Waiting()
    optimizer, batches = make_sgd(model, 0.05, 0.9, 5e-4, "cuda"), batches_on("cuda")
    step = train_step(model, classification_loss, optimizer, batches, FitConfig(device="cuda"))
    train_epoch(step, FitData(batches, "k"), Note(), Training(0.05))


@on_gpu
def test_a_model_that_waits_is_refused_in_one_line():
    # In a process of its own: PyTorch's random generators and allocator do not recover from a capture that failed.
    with ProcessPoolExecutor(1, get_context("spawn")) as processes, pytest.raises(CaptureError, match="cannot be captured") as error:
        processes.submit(_step_of_a_waiting_model).result()
    assert "\n" not in str(error.value) and "run.capture=false" in str(error.value)


@on_gpu
def test_an_epoch_resumed_in_its_middle_goes_on_with_its_sums(near):
    whole, expected = train("cuda", epochs=1)
    model = network_on("cuda")
    optimizer, batches, training = make_sgd(model, 0.05, 0.9, 5e-4, "cuda"), batches_on("cuda"), Training(0.05)
    first = train_step(model, classification_loss, optimizer, batches, FitConfig(device="cuda"))
    for inputs in list(batches.inputs("k", 0))[:2]:
        first(inputs, training)
    training.loss_sum, training.correct = training.loss_sum.cpu().cuda(), training.correct.cpu().cuda()
    again = make_sgd(model, 0.05, 0.9, 5e-4, "cuda")
    load_optimizer(again, copy.deepcopy(optimizer.state_dict()))
    train_epoch(train_step(model, classification_loss, again, batches, FitConfig(device="cuda")), FitData(batches, "k"), Note(), training)
    near(training.loss_sum, expected.loss_sum)
    assert training.images == 70
