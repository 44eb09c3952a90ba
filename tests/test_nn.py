"""The modules against the same networks built of torch.nn layers alone."""

import copy
import re
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from cases import IMPLEMENTATIONS, ON_CPU, autocast, use_implementation
from odn_fast.nn import ChannelAttentionLoss, ResidualSeparableUnit, SeparableConvBNReLU
from odn_fast.ops import channel_attention, teacher_statistics
from odn_fast.reference import channel_attention as channel_attention_reference
from odn_fast.reference import separable_conv, separable_unit


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def implementation(request):
    with ExitStack() as stack:
        for reference in (channel_attention_reference, separable_conv, separable_unit):
            stack.enter_context(use_implementation(request.param, reference))
        yield request.param


class PlainConv(nn.Module):
    def __init__(self, c_in, c_out, stride=1, relu=True, eps=1e-5, momentum=0.1):
        super().__init__()
        self.depthwise = nn.Conv2d(c_in, c_in, 3, stride, padding=1, groups=c_in, bias=False)
        self.pointwise = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps, momentum)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x, residual=None):
        y = self.bn(self.pointwise(self.depthwise(x)))
        return self.relu(y if residual is None else y + residual)


class PlainUnit(nn.Module):
    def __init__(self, c_in, c_out, stride=1, skip="auto"):
        super().__init__()
        self.pool = nn.AvgPool2d(stride // 4, ceil_mode=True) if stride > 4 else nn.Identity()
        stride = min(stride, 4)
        self.first = PlainConv(c_in, c_out, min(stride, 2))
        self.second = PlainConv(c_out, c_out, max(stride // 2, 1))
        self.skip_pool = nn.AvgPool2d(stride, ceil_mode=True)
        self.identity = skip == "auto" and c_in == c_out and stride == 1
        self.skip = None
        if skip != "none" and not self.identity:
            self.skip = nn.ModuleDict({"pointwise": nn.Conv2d(c_in, c_out, 1, bias=False), "bn": nn.BatchNorm2d(c_out)})

    def forward(self, x):
        x = self.pool(x)
        s = x if self.identity else None
        if self.skip is not None:
            s = self.skip["bn"](self.skip["pointwise"](self.skip_pool(x)))
        return self.second(self.first(x), s)


# name: the module's class, its plain twin's, their arguments, the shape of x
NETWORKS = {
    "conv": (SeparableConvBNReLU, PlainConv, {"c": (5, 7)}, (3, 5, 7, 6)),
    "conv_stride": (SeparableConvBNReLU, PlainConv, {"c": (16, 8), "stride": 2}, (2, 16, 9, 7)),
    "conv_settings": (SeparableConvBNReLU, PlainConv, {"c": (3, 4), "relu": False, "eps": 0.01, "momentum": 0.3}, (4, 3, 5, 5)),
    "conv_cumulative": (SeparableConvBNReLU, PlainConv, {"c": (3, 4), "momentum": None}, (4, 3, 5, 5)),
    "unit_identity": (ResidualSeparableUnit, PlainUnit, {"c": (6, 6)}, (3, 6, 5, 4)),
    "unit_channels": (ResidualSeparableUnit, PlainUnit, {"c": (3, 16)}, (3, 3, 5, 4)),
    "unit_stride_2": (ResidualSeparableUnit, PlainUnit, {"c": (6, 6), "stride": 2}, (3, 6, 7, 9)),
    "unit_stride_4": (ResidualSeparableUnit, PlainUnit, {"c": (3, 8), "stride": 4}, (3, 3, 13, 11)),
    "unit_stride_8": (ResidualSeparableUnit, PlainUnit, {"c": (3, 4), "stride": 8}, (2, 3, 17, 16)),
    "unit_stride_12": (ResidualSeparableUnit, PlainUnit, {"c": (3, 4), "stride": 12, "skip": "none"}, (2, 3, 25, 16)),
    "unit_always": (ResidualSeparableUnit, PlainUnit, {"c": (6, 6), "skip": "always"}, (3, 6, 5, 4)),
    "unit_none": (ResidualSeparableUnit, PlainUnit, {"c": (6, 6), "skip": "none"}, (3, 6, 5, 4)),
}


def twins(name, dtype=torch.float64):
    """The module, its twin drawn with the same seed, and two inputs."""
    ours, plain, arguments, shape = NETWORKS[name]
    channels, rest = arguments["c"], {key: value for key, value in arguments.items() if key != "c"}
    networks = []
    for network in (ours, plain):
        torch.manual_seed(1)
        networks.append(network(*channels, **rest).to(dtype))
    inputs = [torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    return *networks, inputs


def check_equal(ours, plain):
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def check_step(ours, plain, x, *residual):
    """One forward and backward pass of both: y, every gradient and every buffer."""
    results = []
    for network in (ours, plain):
        network.zero_grad()
        inputs = [tensor.detach().requires_grad_() for tensor in (x, *residual)]
        y = network(*inputs)
        torch.manual_seed(2)
        y.backward(torch.randn(y.shape, dtype=y.dtype))
        gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
        results.append((y.detach(), [tensor.grad for tensor in inputs], gradients, network.state_dict()))
    check_equal(*results)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_module_is_its_plain_twin(name):
    ours, plain, inputs = twins(name)
    assert list(ours.state_dict()) == list(plain.state_dict())
    check_equal(ours.state_dict(), plain.state_dict())  # initialised alike
    for x in inputs:
        check_step(ours, plain, x)
    ours.eval(), plain.eval()
    check_step(ours, plain, inputs[0])
    with torch.no_grad():
        check_equal(ours(inputs[1]), plain(inputs[1]))


@pytest.mark.parametrize("relu", [True, False])
def test_residual(relu):
    torch.manual_seed(1)
    ours, plain = SeparableConvBNReLU(3, 5, relu=relu).double(), PlainConv(3, 5, relu=relu).double()
    plain.load_state_dict(ours.state_dict())
    x, residual = torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.randn(2, 5, 6, 5, dtype=torch.float64)
    check_step(ours, plain, x, residual)
    ours.eval(), plain.eval()
    check_step(ours, plain, x, residual)
    with torch.no_grad():
        check_equal(ours(x, residual), plain(x, residual))


def freeze_first(network):
    network.first.bn.eval()


def forget_statistics(network):
    for name, child in list(network.named_modules()):
        if isinstance(child, nn.BatchNorm2d):
            fresh = nn.BatchNorm2d(child.num_features, track_running_stats=False).double()
            network.get_submodule(name.rpartition(".")[0]).add_module("bn", fresh)


def stop_tracking(network):
    for child in network.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.track_running_stats = False


def set_eps(network):
    network.second.bn.eps = 0.1


@pytest.mark.parametrize("change", [freeze_first, forget_statistics, stop_tracking, set_eps])
@pytest.mark.parametrize("name", ["unit_identity", "unit_stride_2"])
def test_batch_norms_may_be_changed(name, change):
    ours, plain, inputs = twins(name)
    change(ours), change(plain)
    check_step(ours, plain, inputs[0])
    ours.eval(), plain.eval()
    with torch.no_grad():
        check_equal(ours(inputs[1]), plain(inputs[1]))


@pytest.mark.parametrize("name", ["conv_cumulative", "unit_stride_2"])
def test_an_empty_batch_leaves_the_buffers_alone(name):
    ours, _, inputs = twins(name)
    before = copy.deepcopy(ours.state_dict())
    y = ours(inputs[0][:0].requires_grad_())
    y.sum().backward()
    assert y.shape[0] == 0 and not any(parameter.grad.any() for parameter in ours.parameters())
    check_equal(ours.state_dict(), before)


def test_one_value_per_channel_raises_in_training():
    for network in (SeparableConvBNReLU(3, 4, stride=2), ResidualSeparableUnit(3, 4, stride=2)):
        x = torch.randn(1, 3, 2, 2)
        with pytest.raises(ValueError, match="expected more than 1 value per channel when training"):
            network(x)
        with torch.no_grad():
            assert network.eval()(x).shape == (1, 4, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["conv_stride", "unit_identity", "unit_stride_2"])
def test_precisions_run_and_stay_near(name, dtype):
    ours, exact, inputs = twins(name)
    ours.to(dtype)
    y, truth = ours(inputs[0].to(dtype)), exact(inputs[0])
    assert y.dtype == dtype and (y - truth).norm() <= 20 * torch.finfo(dtype).eps * truth.norm()
    ours.eval(), exact.eval()
    with torch.no_grad():
        y, truth = ours(inputs[1].to(dtype)), exact(inputs[1])
    assert y.dtype == dtype and (y - truth).norm() <= 20 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("name", ["conv", "unit_stride_2"])
def test_autocast(name):
    ours, _, inputs = twins(name, torch.float32)
    with autocast(torch.bfloat16):
        y = ours(inputs[0])
        y.sum().backward()
        with torch.no_grad():
            folded = ours.eval()(inputs[0])
    assert y.dtype == folded.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in ours.parameters())
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in ours.buffers())


@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
@pytest.mark.parametrize("name", ["conv_stride", "unit_stride_2"])
def test_compiles_in_one_graph(name):
    ours, plain, inputs = twins(name)
    torch._dynamo.reset()
    ours.compile(fullgraph=True, backend="aot_eager")
    check_step(ours, plain, inputs[0])
    ours.eval(), plain.eval()
    with torch.no_grad():
        check_equal(ours(inputs[1]), plain(inputs[1]))


def test_wrong_arguments_raise():
    for stride in (0, 3, 4, -1):
        with pytest.raises(ValueError, match=f"stride is {stride}, expected 1 or 2"):
            SeparableConvBNReLU(3, 4, stride)
    for stride in (0, 3, 6, 10, -4):
        with pytest.raises(ValueError, match=f"stride is {stride}, expected 1, 2 or a multiple of 4"):
            ResidualSeparableUnit(3, 4, stride)
    with pytest.raises(ValueError, match="skip is 'sometimes', expected one of auto, always, none"):
        ResidualSeparableUnit(3, 4, skip="sometimes")
    with pytest.raises(ValueError, match=re.escape("x has shape (2, 4, 5, 5)") + "|dw has shape"):
        SeparableConvBNReLU(3, 4)(torch.randn(2, 4, 5, 5))


def test_sizes_are_rounded_up():
    for stride in (1, 2, 4, 8, 16):
        for size in (1, 3, 8, 15, 17):
            y = ResidualSeparableUnit(2, 3, stride)(torch.randn(3, 2, size, size + 1))
            assert y.shape == (3, 3, -(-size // stride), -(-(size + 1) // stride))


@pytest.mark.parametrize("standardize", [True, False])
def test_channel_attention_loss_is_the_mean_square_of_what_the_projection_misses(standardize):
    student = torch.randn(3, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, 4, 4, dtype=torch.float64)
    module = ChannelAttentionLoss(standardize)
    assert not module.state_dict() and f"standardize={standardize}" in repr(module)
    expected = (student - channel_attention(student, teacher, standardize=standardize)).square().mean()
    (gradient,) = torch.autograd.grad(expected, student)
    for statistics in (None, teacher_statistics(teacher)):
        loss = module(student, teacher, statistics)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(loss, student)[0], gradient, rtol=1e-10, atol=1e-12)
