"""One training step: batch, forward, loss, backward, optimizer, sums of what is measured. On a GPU, one captured graph.

Eager, a step of a shallow network spends more time in Python than in kernels. A CUDA graph of the whole step has no
Python in it, and needs no compiler: it is captured in the time of a few steps, again for every architecture.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import Source
from ..nn import deferred_statistics
from ..record import RunError
from .convergence import Training
from .device import collecting_no_garbage, wait_for
from .precision import autocast

Loss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]

_WARM_UP = 3  # steps before a capture: kernels are chosen and compiled, libraries allocate
_capturing = threading.Lock()  # CUDA captures one graph at a time
_replaying = threading.Lock()  # before PyTorch 2.13, a graph that draws random numbers must not be replayed while one is captured


@dataclass(frozen=True)
class FitConfig:
    """How steps are computed: `precision` fp32 or bf16 (autocast) on `device`; `capture`: as CUDA graphs, on a GPU."""

    precision: str = "fp32"
    device: str = "cpu"
    capture: bool = True


class CaptureError(RunError):
    """A step that cannot be captured as a CUDA graph; the message is one line."""


class TrainStep:
    """Forward, loss, backward and optimizer step on the batch that `source` makes of a step's inputs.

    Args:
        model, optimizer: changed in place.
        loss: (model, x, y) -> losses (D,), correct (D,); the sum of the losses is minimised.
    """

    def __init__(self, model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, source: Source, config: FitConfig):
        self.model, self.loss, self.optimizer, self.source, self.config = model, loss, optimizer, source, config

    def begin_epoch(self, training: Training):
        """Take over the sums of an epoch that is under way."""

    def __call__(self, inputs: tuple[Tensor, ...], training: Training):
        """Take one step, and count it in `training`. Nothing is read back from the device."""
        total, correct, images = self.run(*inputs)
        training.loss_sum = total if training.loss_sum is None else training.loss_sum + total
        training.correct = correct if training.correct is None else training.correct + correct
        training.images += images
        training.step += 1

    def wait(self):
        """Until the device has done what it was given."""
        wait_for(self.config.device)

    def run(self, *inputs: Tensor) -> tuple[Tensor, Tensor, int]:
        """One step: (D,) float64 sums of losses over its images, (D,) int64 numbers of correct images, number of images."""
        x, y = self.source.batch(*inputs)
        with autocast(self.config.precision, self.config.device), deferred_statistics():
            losses, correct = self.loss(self.model, x, y)
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach().double() * len(y), correct, len(y)


class CapturedStep(TrainStep):
    """The same as one CUDA graph for every shape of inputs; its sums are added up on the device, in place.

    Raises `CaptureError` where the step waits for the device, as a model with `.item()` in it does.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], int]] = {}
        self._sums: tuple[Tensor, Tensor] | None = None
        self._pool = torch.cuda.graph_pool_handle()  # shared: the graphs of one training never run at once
        # One for every capture: each stream that multiplies matrices has a workspace for ever, which graphs replayed beside each
        # other must not share. Of a priority of its own: streams are handed out again after 32 of a priority, and no training
        # may launch on a stream that another one is capturing.
        self._stream = torch.cuda.Stream(self.config.device, priority=-1)

    def begin_epoch(self, training: Training):
        if self._sums is None:
            return
        for total, present in zip(self._sums, (training.loss_sum, training.correct)):
            total.zero_() if present is None else total.copy_(present)

    def __call__(self, inputs: tuple[Tensor, ...], training: Training):
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._captured(inputs, training)
        graph, given, images = self._graphs[shapes]
        torch._foreach_copy_(list(given), list(inputs))
        with _replaying:
            graph.replay()
        training.loss_sum, training.correct = self._sums
        training.images += images
        training.step += 1

    def _captured(self, inputs: tuple[Tensor, ...], training: Training) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], int]:
        given = tuple(tensor.clone() for tensor in inputs)
        with _capturing:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream), unchanged(self.model, self.optimizer):
                for _ in range(_WARM_UP):
                    total, correct, images = self.run(*given)
                if self._sums is None:
                    self._sums = torch.zeros_like(total), torch.zeros_like(correct)
                    self.begin_epoch(training)
            torch.cuda.current_stream().wait_stream(self._stream)
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            try:
                with (_replaying, collecting_no_garbage(),
                      torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")):
                    total, correct, images = self.run(*given)
                    torch._foreach_add_(list(self._sums), [total, correct])
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise CaptureError("the training step cannot be captured as a CUDA graph, because it waits for the GPU or allocates "
                                   "outside PyTorch; change the model, or give --set run.capture=false "
                                   f"({str(error).strip().splitlines()[0]})") from error
        return graph, given, images


def train_step(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, source: Source, config: FitConfig) -> TrainStep:
    """The step for this device: captured on a GPU unless `config.capture` is off."""
    captured = config.capture and _on_gpu(config.device)
    return (CapturedStep if captured else TrainStep)(model, loss, optimizer, source, config)


@contextlib.contextmanager
def unchanged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Training steps taken inside leave no trace: weights, buffers, momenta, random state, in the same memory.

    Momenta that did not exist before stay, as zeros, which a first step treats alike; so do other states of an optimizer.
    """
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    kept = [tensor.detach().clone() for tensor in tensors]
    known = set(map(id, tensors))
    with torch.random.fork_rng(sorted({tensor.get_device() for tensor in tensors if tensor.is_cuda})), torch.no_grad():
        with torch.enable_grad():
            yield
        for tensor, before in zip(tensors, kept):
            tensor.copy_(before)
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and id(value) not in known:
                    value.zero_()


# ---- optimizers


def make_sgd(model: nn.Module, lr: float, momentum: float, weight_decay: float, device: str) -> torch.optim.SGD:
    """SGD in one launch."""
    return _named(lr, torch.optim.SGD(model.parameters(), _rate(lr, device), momentum, weight_decay=weight_decay, fused=True))


def make_adam(model: nn.Module, lr: float, device: str) -> torch.optim.Adam:
    """Adam in one launch."""
    optimizer = torch.optim.Adam(model.parameters(), _rate(lr, device), fused=True, capturable=_on_gpu(device))
    optimizer._warned_capturable_if_run_uncaptured = True  # steps before a capture are none to warn of
    return _named(lr, optimizer)


def _named(lr: float, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """With the learning rate that a training begins with as a number in its defaults, whatever its groups hold."""
    optimizer.defaults["lr"] = lr
    return optimizer


def _rate(lr: float, device: str) -> Tensor | float:
    """On a GPU a tensor, so that a captured step reads the present learning rate."""
    return torch.tensor(lr, device=device) if _on_gpu(device) else lr


def _on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float):
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict):
    """Go on from a state dict read from a file; learning rates that are tensors stay on their device."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates):
        if isinstance(rate, Tensor):
            group["lr"] = rate.copy_(torch.as_tensor(group["lr"]))
