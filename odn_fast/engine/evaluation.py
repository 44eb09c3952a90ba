"""Accuracy, confusion and latency of a network at inference."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn

from .device import wait_for


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass: the median, and the quartiles around it, over `runs` runs."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int

    def figures(self) -> dict[str, float]:
        """As events and manifests name them."""
        return {"latency_ms": self.median_ms, "latency_low_ms": self.low_ms, "latency_high_ms": self.high_ms}


def confusion(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int,
              after_batch: Callable[[], None] = lambda: None) -> Tensor:
    """Counts (K, K): rows are true classes, columns predicted ones.

    `network` is used as it is (put it in eval mode); `after_batch` is called after every batch and may raise.
    """
    return exit_confusions(lambda x: [network(x)], batches, num_classes, after_batch)[0]


@torch.inference_mode()
def exit_confusions(exits: Callable[[Tensor], list[Tensor]], batches: Iterable[tuple[Tensor, Tensor]], num_classes: int,
                    after_batch: Callable[[], None] = lambda: None) -> Tensor:
    """Counts (D, K, K) of all depths from one pass; exits: x -> the logits (N, K) of every depth.

    They are added up on the device where the batches are, and read back once.
    """
    counts = None
    for x, y in batches:
        predicted = torch.stack([logits.argmax(1) for logits in exits(x)])
        if counts is None:
            counts = torch.zeros(len(predicted), num_classes * num_classes, dtype=torch.int64, device=y.device)
        counts.scatter_add_(1, predicted + y * num_classes, torch.ones_like(predicted))
        after_batch()
    return counts.cpu().view(-1, num_classes, num_classes)


def accuracy(counts: Tensor) -> float:
    """Percent of correct predictions in a confusion matrix."""
    return 100.0 * counts.trace().item() / counts.sum().item()


@torch.inference_mode()
def measure_latency(network: nn.Module, input_shape: tuple[int, int, int], seconds: float = 0.25) -> Latency:
    """Time forward passes of one image of zeros (C, H, W), after a warm-up: 5 at least, and up to 100 within `seconds`."""
    device = next(network.parameters()).device
    x = torch.zeros(1, *input_shape, device=device).to(memory_format=torch.channels_last)
    times: list[float] = []
    end = time.perf_counter() + seconds
    for run in range(3 + 100):
        start = time.perf_counter()
        network(x)
        wait_for(device)
        stop = time.perf_counter()
        if run >= 3:  # the first passes choose kernels and fill caches
            times.append(1e3 * (stop - start))
        if len(times) >= 5 and stop > end:
            break
    low, median, high = numpy.percentile(times, [25, 50, 75])
    return Latency(float(median), float(low), float(high), len(times))
