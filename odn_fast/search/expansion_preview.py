"""The table of depths before a search: exact sizes, measured latency, estimated time of an epoch."""

import copy
import time
from dataclasses import asdict

import torch

from ..data import DataSet
from ..engine import autocast, classification_loss, measure_latency, wait_for
from ..models import DepthNetwork, FoldedNetwork, profile

_LONGEST_TRIAL = 2.0  # seconds: a full-depth step that would take longer is estimated from its multiply-adds


def depth_rows(model: DepthNetwork, data: DataSet, batch_size: int, precision: str, device: str) -> list[dict]:
    """One row per depth: params, state_bytes, macs, paper_flops, latency of one image (ms), estimated seconds an epoch.

    Latency is that of the folded fp32 network. The time of a training step is measured at depth 1 and at full depth on
    copies, and interpolated by multiply-adds between them; validation is added at the folded network's speed,
    and reading of pictures that are not in memory at that of the first batch.
    """
    rows = []
    for depth in range(1, model.max_depth + 1):
        latency = measure_latency(FoldedNetwork(model.at_depth(depth)).to(device), data.input_shape, seconds=0.1)
        size = asdict(profile(model, data.input_shape, depth))
        rows.append({"depth": depth, **size, **latency.figures(), "latency_runs": latency.runs})
    shallow, deep = rows[0]["macs"], rows[-1]["macs"]
    first = _step_seconds(model, 1, data, batch_size, precision, device)
    slope = first / shallow
    if slope * deep < _LONGEST_TRIAL and deep > shallow:
        last = _step_seconds(model, model.max_depth, data, batch_size, precision, device)
        slope = max(0.0, last - first) / (deep - shallow)
    forward = _validation_seconds(model, data, batch_size, device) / shallow
    steps = max(1, round(len(data.train) / batch_size))
    reading = _reading_seconds(data, batch_size)
    for row in rows:
        step = first + slope * (row["macs"] - shallow)
        computing = steps * step + forward * row["macs"]
        # A GPU computes while pictures are read; on the CPU, both take turns.
        row["seconds_per_epoch"] = max(computing, reading) if torch.device(device).type == "cuda" else computing + reading
    return rows


def _step_seconds(model: DepthNetwork, depth: int, data: DataSet, batch_size: int, precision: str, device: str) -> float:
    network = copy.deepcopy(model.at_depth(depth)).train()
    x, y = _first_images(data, batch_size, device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with autocast(precision, device):
            losses, _ = classification_loss(network, x, y)
        losses.sum().backward()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _validation_seconds(model: DepthNetwork, data: DataSet, batch_size: int, device: str) -> float:
    """Estimated time of the whole validation split at depth 1."""
    x, _ = _first_images(data, batch_size, device)
    network = FoldedNetwork(model.at_depth(1)).to(device)
    with torch.inference_mode():
        network(x)
        wait_for(device)
        start = time.perf_counter()
        network(x)
        wait_for(device)
        return (time.perf_counter() - start) * len(data.validation) / len(x)


def _reading_seconds(data: DataSet, batch_size: int) -> float:
    """Estimated time in which an epoch's pictures are read and decoded; 0 where the images are in memory."""
    if not data.decodes:
        return 0.0
    start = time.perf_counter()
    images, _ = _first(data, batch_size)
    return (time.perf_counter() - start) * (len(data.train) + len(data.validation)) / len(images)


def _first_images(data: DataSet, batch_size: int, device: str):
    images, labels = _first(data, batch_size)
    return data.normalisation(images).to(device, memory_format=torch.channels_last), labels.to(device)


def _first(data: DataSet, count: int):
    """The first training images as they are, with their labels; of pictures, no more are read."""
    return next(iter(data.train.at(torch.arange(min(count, len(data.train)))).in_order(count)))
