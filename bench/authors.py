"""The authors' way to train, plainly: what whole steps, epochs and searches are compared with.

As the paper and its notebooks have it: fp32, NCHW, a DataLoader whose data set makes a tensor of one PIL image at a time,
two values read back from the device at every step, SGD that is not fused, warm-up with one forward and backward pass per
depth.
"""

import copy
import itertools
import time
from collections.abc import Iterable

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, Dataset

from odn_fast.data import DataSet, Normalisation, Split
from odn_fast.models import DepthNetwork


class Single(Dataset):
    """One image at a time, cropped out of `padding`, flipped and normalised with tensor operations.

    images (N, C, H, W) uint8; scale: the raw value that stands for 1; mean and std: one number a channel.
    """

    def __init__(self, images, padding, flip, mean, std, scale=255.0):
        self.images, self.padding, self.flip, self.scale = images, padding, flip, scale
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __len__(self):
        return len(self.images)

    def tensor(self, place: int) -> Tensor:
        """Image (C, H, W) with values from 0 to 1."""
        return self.images[place].float().div(self.scale)

    def __getitem__(self, place):
        x = self.tensor(place)
        if self.padding:
            height, width = x.shape[1:]
            row, column = torch.randint(2 * self.padding + 1, (2,)).tolist()
            x = F.pad(x, (self.padding,) * 4)[:, row : row + height, column : column + width]
        if self.flip and torch.rand(()) < 0.5:
            x = x.flip(2)
        return (x - self.mean) / self.std


class Pictures(Single):
    """Images of one channel with their labels, each by way of a PIL image, as torchvision's data sets give them."""

    def __init__(self, split: Split, normalisation: Normalisation):
        from PIL import Image  # here, so that benches of ops run where it is missing

        super().__init__(split.images, 0, False, normalisation.mean, normalisation.std, normalisation.scale)
        self.picture = Image.fromarray
        self.labels = split.labels.tolist()

    def tensor(self, place: int) -> Tensor:
        picture = self.picture(self.images[place, 0].numpy())
        return torch.from_numpy(numpy.array(picture))[None].float().div(self.scale)

    def __getitem__(self, place):
        return super().__getitem__(place), self.labels[place]


def loader(split: Split, normalisation: Normalisation, batch_size: int, shuffle: bool) -> DataLoader:
    return DataLoader(Pictures(split, normalisation), batch_size=batch_size, shuffle=shuffle, num_workers=0)


def plain(model: DepthNetwork) -> DepthNetwork:
    """A copy that computes with PyTorch's modules alone, in NCHW."""
    copied = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    copied.stem = fx.symbolic_trace(copied.stem)
    copied.blocks = nn.ModuleList(fx.symbolic_trace(block) for block in copied.blocks)
    return copied.train(model.training)


def make_sgd(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> tuple[float, int]:
    """Loss and number of correct images, both read back."""
    optimizer.zero_grad()
    logits = network(x)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    optimizer.step()
    return loss.item(), (logits.argmax(1) == y).sum().item()


def warm_up_gradients(model: DepthNetwork, x: Tensor, y: Tensor) -> tuple[float, int]:
    """One forward and backward pass per depth: gradients, sum of losses and of correct images, read back at every depth."""
    model.zero_grad()
    total, correct = 0.0, 0
    for depth in range(model.max_depth, 0, -1):
        logits = model(x, depth)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        total += loss.item()
        correct += (logits.argmax(1) == y).sum().item()
    return total, correct


@torch.no_grad()
def validate(network: nn.Module, batches: DataLoader, device: str) -> float:
    """Percent of correct images."""
    network.eval()
    loss, correct = 0.0, 0
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        logits = network(x)
        loss += F.cross_entropy(logits, y).item()
        correct += (logits.argmax(1) == y).sum().item()
    return 100 * correct / len(batches.dataset)


def warm_up(model: DepthNetwork, batches: DataLoader, epochs: int, lr: float, device: str):
    """All depths, the learning rate annealed by half a cosine."""
    optimizer = make_sgd(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        model.train()
        for x, y in batches:
            warm_up_gradients(model, x.to(device), y.to(device))
            optimizer.step()
        schedule.step()


def train_depth(model: DepthNetwork, depth: int, data: DataSet, batch_size: int, epochs: int, lr: float, device: str) -> float:
    """Train stem, blocks and head of one depth; every fifth epoch without improvement takes lr x 0.6. Leaves the best weights.

    Returns the best validation accuracy in percent.
    """
    network = model.at_depth(depth)
    optimizer = make_sgd(network.parameters(), lr)
    training = loader(data.train, data.normalisation, batch_size, shuffle=True)
    validation = loader(data.validation, data.normalisation, batch_size, shuffle=False)
    best, weights, counter = -1.0, None, 0
    for _ in range(epochs):
        network.train()
        for x, y in training:
            train_step(network, optimizer, x.to(device), y.to(device))
        reached = validate(network, validation, device)
        if round(reached, 1) > round(best, 1):
            best, weights, counter = reached, copy.deepcopy(network.state_dict()), 0
            continue
        counter += 1
        if counter % 5 == 0:
            for group in optimizer.param_groups:
                group["lr"] *= 0.6
    network.load_state_dict(weights)
    return best


def search(model: DepthNetwork, data: DataSet, batch_size: int, warm_up_epochs: int, epochs: list[int], device: str) -> dict:
    """Warm-up, then the first depths for the given numbers of epochs each, the best of which is tested.

    data lies in the processor's memory. Returns the found depth, the best validation accuracies by depth and the test accuracy in
    percent, and the seconds of warm-up and of every depth.
    """
    model = plain(model).to(device)
    clock = [time.perf_counter()]
    warm_up(model, loader(data.train, data.normalisation, batch_size, shuffle=True), warm_up_epochs, 1e-3, device)
    clock.append(time.perf_counter())
    start, reached, trained = copy.deepcopy(model.state_dict()), [], []
    for depth, number in enumerate(epochs, 1):
        model.load_state_dict(start)
        reached.append(train_depth(model, depth, data, batch_size, number, 0.01 if depth == 1 else 0.005, device))
        trained.append(copy.deepcopy(model.state_dict()))
        clock.append(time.perf_counter())
    found = max(range(len(epochs)), key=lambda place: round(reached[place], 1))
    model.load_state_dict(trained[found])
    test = validate(model.at_depth(found + 1), loader(data.test, data.normalisation, batch_size, shuffle=False), device)
    return {"depth": found + 1, "validation": reached, "test": test,
            "phase_seconds": [end - begin for begin, end in itertools.pairwise(clock)]}
