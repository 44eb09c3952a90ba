"""From a configuration of growth to a teacher and a first student, with every refusal before anything is made."""

import hashlib

import torch
from torch import nn

from ..config import ConfigError, GrowConfig
from ..data import DataSet
from ..models import StudentGraph, count, initial_graph
from ..models.resnet import CifarResNet
from ..models.teachers import NETWORKS, Teacher, load_teacher, teacher_of
from .growth_rules import Limits


def teacher_network(config: GrowConfig, data: DataSet) -> nn.Module:
    """The named network that is to become the teacher, initialised from the seed without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return CifarResNet(NETWORKS[config.teacher.train], data.num_classes, data.input_shape[0])


def create_teacher(config: GrowConfig, data: DataSet) -> Teacher:
    """The teacher that the configuration names; one that is to be trained is untrained, and says its shapes and size."""
    if config.teacher.file is not None:
        return load_teacher(config.teacher.file, data.num_classes, data.input_shape, (data.normalisation.mean, data.normalisation.std))
    return trained_teacher(config, data, teacher_network(config, data))


def trained_teacher(config: GrowConfig, data: DataSet, network: nn.Module) -> Teacher:
    return teacher_of(network, None, data.input_shape, config.teacher.train)


def check_teacher(teacher: Teacher, data: DataSet):
    """Refuse a teacher from Python that does not fit the data."""
    if tuple(teacher.input_shape) != data.input_shape:
        raise ConfigError(f"teacher: takes images of {_by(teacher.input_shape)}, the data has {_by(data.input_shape)}")
    device = next(iter(teacher.state_dict().values())).device
    classes = teacher(torch.zeros(1, *teacher.input_shape, device=device)).shape[1]
    if classes != data.num_classes:
        raise ConfigError(f"teacher: has {classes} classes, the data has {data.num_classes}")


def teacher_checksum(teacher: Teacher) -> str:
    """SHA-256, in hex, over a teacher's weights."""
    digest = hashlib.sha256()
    for name, tensor in teacher.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def natural_width(teacher: Teacher) -> float:
    """A student's channels over its teacher's: 1/4 where residual blocks of three convolutions widen their maps by four.

    At full width the smallest student of a ResNet-50 would have a quarter of its parameters.
    """
    return 0.25 if any(name.endswith("conv3.weight") for name in teacher.state_dict()) else 1.0


def limits_of(config: GrowConfig, teacher: Teacher) -> Limits:
    """What a student may cost. A budget in parameters alone would allow shallow students of twice the teacher's FLOPs."""
    growth = config.growth
    if growth.budget_flops is not None:
        return Limits("flops", growth.budget_flops)
    return Limits("params", growth.budget, growth.max_flops or teacher.flops)


def first_student(config: GrowConfig, teacher: Teacher, data: DataSet) -> StudentGraph:
    """The graph that growth starts from. Raises ConfigError where it is beyond the budget already."""
    graph = initial_graph(data.input_shape, teacher.map_shapes, data.num_classes, config.growth.width, config.growth.skip)
    limits, cost = limits_of(config, teacher), count(graph)
    if limits.allow(cost):
        return graph
    smallest = f"the smallest student has {cost.params:,} parameters and {cost.flops:,} FLOPs"
    if limits.unit == "flops":
        raise ConfigError(f"budget_flops: {limits.budget:,} FLOPs are too few: {smallest}")
    if cost.params > limits.budget:
        raise ConfigError(f"budget: {limits.budget:,} parameters are too few: {smallest}")
    raise ConfigError(f"max_flops: {limits.max_flops:,} FLOPs are too few: {smallest}")


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
