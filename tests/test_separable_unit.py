"""separable_unit: every implementation against float64, and as a citizen of PyTorch's dispatcher.

Rounding decides on which side of zero a ReLU's argument next to zero falls, and its gradient jumps there. Between the
convolutions, the biases of the first batch norm put the zero of every channel into the widest gap between its values;
at the end, the upstream gradient is zero near the jump (`upstream_gradient`). So the largest errors can be compared.
"""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cases import (
    FLOATING, GPU, LAYOUTS, ON_CPU, OPCHECK, assert_accurate, assert_unchanged, autocast, has_kernel, names_device,
    plain_pointwise, plain_separable_conv, separable_parameters, typical_sum, upstream_gradient,
)  # fmt: skip
from odn_fast.ops import separable_conv_train, separable_unit_train
from odn_fast.reference import separable_unit as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

op = torch.ops.odn_fast.separable_unit_train.default
backward_op = torch.ops.odn_fast.separable_unit_train_backward.default
KERNELS = has_kernel("separable_unit_train") and has_kernel("separable_unit_train_backward")

# name: (N, C_in, C_out, H, W), skip, stride
UNITS = {
    "identity": ((2, 16, 16, 6, 5), "identity", 1),
    "identity_remainder": ((3, 19, 19, 5, 7), "identity", 1),
    "narrow_identity": ((4, 1, 1, 7, 8), "identity", 1),
    "projection": ((2, 17, 32, 5, 6), "projection", 1),
    "pooled": ((3, 16, 32, 7, 9), "projection", 2),
    "pooled_even": ((3, 8, 40, 8, 6), "projection", 2),
    "pooled_twice": ((4, 3, 16, 13, 10), "projection", 4),
    "pooled_less_than_a_window": ((12, 5, 20, 3, 2), "projection", 4),
    "one_position": ((12, 33, 17, 1, 1), "projection", 1),
    "one_image": ((1, 48, 64, 6, 7), "none", 1),
    "no_skip_2": ((2, 3, 18, 9, 8), "none", 2),
    "no_skip_4": ((6, 16, 48, 9, 8), "none", 4),
}


def make_inputs(unit="pooled", dtype=torch.float32, layout="channels_last", conv_dtype=None, norm_dtype=None):
    """[x, first, second, skip], identity, stride; none requires grad yet."""
    (n, c_in, c_out, h, w), skip, stride = UNITS[unit] if isinstance(unit, str) else unit
    dtypes = conv_dtype or dtype, norm_dtype or dtype
    x = LAYOUTS[layout](torch.randn(n, c_in, h, w).to(dtype))
    first, second = separable_parameters(c_in, c_out, *dtypes), separable_parameters(c_out, c_out, *dtypes)
    first[3] = zeros_in_gaps(x, first, reference.STRIDES[stride][0]).to(first[3].dtype)
    projection = separable_parameters(c_in, c_out, *dtypes)[1:] if skip == "projection" else []
    return [x, first, second, projection], skip == "identity", stride


def zeros_in_gaps(x, parameters, stride):
    """Biases that put each channel's zero into the widest gap among the middle half of its values."""
    dw, pw, bn_weight, bn_bias = (tensor.double() for tensor in parameters)
    values = plain_separable_conv(x.double(), dw, pw, bn_weight, torch.zeros_like(bn_bias), stride)[0]
    values = values.transpose(0, 1).flatten(1).sort(1).values
    middle = values[:, values.shape[1] // 4 : values.shape[1] - values.shape[1] // 4]
    widest = middle.diff(dim=1).argmax(1, keepdim=True)
    return -(middle.gather(1, widest) + middle.gather(1, widest + 1)).flatten() / 2


def plain(x, first, second, skip=(), identity=False, stride=1, eps=1e-5, relu=True):
    """By PyTorch's own layers, in x's dtype."""
    strides = reference.STRIDES[stride]
    between, *statistics = plain_separable_conv(x, *first, strides[0], eps)
    y, *more_statistics = plain_separable_conv(between.relu(), *second, strides[1], eps)
    statistics = list(zip(statistics, more_statistics, strict=True))
    if identity:
        y = y + x
    elif skip:
        pool = F.avg_pool2d(x, stride, ceil_mode=True) if stride > 1 else x
        s, *skip_statistics = plain_pointwise(pool, *skip, eps)
        statistics = [(*both, third) for both, third in zip(statistics, skip_statistics, strict=True)]
        y = y + s
    return y.relu() if relu else y, *statistics


def flat(inputs):
    x, *lists = inputs
    return [x, *itertools.chain(*lists)]


def grouped(tensors):
    x, *parameters = tensors
    return [x, parameters[:4], parameters[4:8], parameters[8:]]


def leaves(inputs, dtype=None):
    return grouped([tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in flat(inputs)])


def run(function, inputs, grad_y, settings, truth=False):
    """([y, *means, *variances], gradients of x and all parameters), in float64 from the same values if `truth`."""
    inputs = leaves(inputs, torch.float64 if truth else None)
    y, means, variances = function(*inputs, **settings)
    gradients = torch.autograd.grad(y, flat(inputs), grad_y.to(y.dtype))
    return [y.detach(), *means, *variances], gradients


def check_accuracy(inputs, identity, stride, layout="channels_last", eps=1e-5):
    settings = {"identity": identity, "stride": stride, "eps": eps}
    arguments = plain(*leaves(inputs, torch.float64), **settings, relu=False)[0].detach()
    grad_y = upstream_gradient(arguments, inputs[0].dtype, layout)
    ours, unfused = (run(function, inputs, grad_y, settings) for function in (separable_unit_train, plain))
    true = run(plain, inputs, grad_y, settings, truth=True)
    x, arithmetic = inputs[0], reference.compute_dtype(inputs[0])
    assert ours[0][0].dtype == x.dtype and ours[0][0].is_contiguous(memory_format=torch.channels_last)
    assert all(statistic.dtype == arithmetic for statistic in ours[0][1:])
    means = range(1, len(true[0]) // 2 + 1)
    variances = torch.cat(true[0][means.stop :])
    for index, results in enumerate(zip(ours[0], unfused[0], true[0], strict=True)):
        # The statistics are those of the maps as they are stored, in x's dtype.
        assert_accurate(*results, x.dtype, variances.max().sqrt().item() if index in means else 0.0)
    for tensor, *gradients in zip(flat(inputs), ours[1], unfused[1], true[1], strict=True):
        assert gradients[0].dtype == tensor.dtype
        assert_accurate(*gradients, arithmetic, 0.0 if tensor is x else typical_sum(grad_y, variances))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_accuracy(implementation, layout, dtype, unit):
    inputs, identity, stride = make_inputs(unit, dtype, layout)
    check_accuracy(inputs, identity, stride, layout)


@pytest.mark.parametrize("unit", ["identity", "pooled"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(implementation, layout, dtype, unit):
    inputs, identity, stride = make_inputs(unit, dtype, layout)
    check_accuracy(inputs, identity, stride, layout, eps=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_upstream_gradient_may_have_any_strides(implementation, layout):
    inputs, identity, stride = make_inputs("pooled")
    settings, grad_y = {"identity": identity, "stride": stride}, LAYOUTS[layout](torch.randn(3, 32, 4, 5))
    dense = grad_y.clone(memory_format=torch.channels_last)
    gradients = (run(separable_unit_train, inputs, grad, settings)[1] for grad in (grad_y, dense))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATING, repeat=3)), ids=str)
def test_mixed_dtypes(implementation, dtypes):
    check_accuracy(*make_inputs("pooled", *dtypes[:1], conv_dtype=dtypes[1], norm_dtype=dtypes[2]))


def test_parameters_of_several_dtypes_and_strides(implementation):
    (x, first, second, skip), identity, stride = make_inputs("pooled")
    first[1], second[0], skip[1] = first[1].bfloat16(), second[0].double(), skip[1].bfloat16()
    second[1], second[2] = second[1].transpose(0, 1).contiguous().transpose(0, 1), second[2][:1].expand(second[2].shape)
    check_accuracy([x, first, second, skip], identity, stride)


@pytest.mark.parametrize("unit", [((32, 16, 16, 16, 16), "identity", 1), ((16, 16, 32, 17, 16), "projection", 2)], ids=str)
def test_accuracy_of_long_sums(implementation, unit):
    check_accuracy(*make_inputs(unit))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("unit", [((3, 2, 2, 3, 3), "identity", 1), ((3, 2, 3, 3, 3), "projection", 1),
                                  ((3, 1, 2, 5, 4), "projection", 2), ((3, 1, 2, 7, 5), "none", 4)], ids=str)
def test_gradcheck(implementation, layout, unit):
    inputs, identity, stride = make_inputs(unit, torch.float64, layout)
    tensors = flat(leaves(inputs))
    assert torch.autograd.gradcheck(
        lambda *tensors: separable_unit_train(*grouped(tensors), identity=identity, stride=stride)[0], tensors
    )


def test_it_equals_two_separable_convolutions():
    """The first with its ReLU, the second with the skip as its residual."""
    (x, first, second, _), _, _ = make_inputs("identity", torch.float64)
    between, *first_statistics = separable_conv_train(x, *first)
    y, *second_statistics = separable_conv_train(between, *second, residual=x)
    unit_y, *statistics = separable_unit_train(x, first, second, identity=True)
    torch.testing.assert_close(unit_y, y)
    torch.testing.assert_close(statistics, [list(pair) for pair in zip(first_statistics, second_statistics, strict=True)])


@pytest.mark.filterwarnings("ignore:var_mean")  # of nothing, in the plain network
@pytest.mark.parametrize("unit", [((0, 3, 3, 4, 4), "identity", 1), ((0, 3, 5, 5, 4), "projection", 2)], ids=str)
def test_empty_batch(implementation, unit):
    inputs, identity, stride = _empty_inputs(*unit)
    settings, grad_y = {"identity": identity, "stride": stride}, torch.empty(0, unit[0][2], 3 if stride == 2 else 4, 4 // stride)
    (y, *statistics), gradients = run(separable_unit_train, inputs, grad_y, settings)
    assert y.shape == grad_y.shape and not torch.cat(statistics).any()
    for gradient, other in zip(gradients, run(plain, inputs, grad_y, settings)[1], strict=True):
        torch.testing.assert_close(gradient, other)


def _empty_inputs(shape, skip, stride):
    """There is no gap among no values."""
    (x, *parameters), identity, stride = make_inputs(((2, *shape[1:]), skip, stride))
    return [x[:0], *parameters], identity, stride


NON_FINITE = {"x": (0, (1, 2, 3, 1)), "first pw": (2, (4, 1, 0, 0)), "second bias": (8, (3,)), "skip bias": (11, (3,))}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", NON_FINITE)
def test_non_finite_values_propagate(implementation, where, value):
    inputs, identity, stride = make_inputs("pooled")
    argument, index = NON_FINITE[where]
    flat(inputs)[argument][index] = value
    settings, grad_y = {"identity": identity, "stride": stride}, torch.randn(3, 32, 4, 5)
    (y, *statistics), gradients = run(separable_unit_train, inputs, grad_y, settings)
    (plain_y, *plain_statistics), plain_gradients = run(plain, inputs, grad_y, settings)
    assert torch.equal(y.isnan(), plain_y.isnan()) and torch.equal(y.isinf(), plain_y.isinf())
    for ours, other in zip([*statistics, *gradients], [*plain_statistics, *plain_gradients], strict=True):
        assert torch.equal(ours.isfinite(), other.isfinite())


@pytest.mark.parametrize("unit", [((33, 16, 16, 14, 14), "identity", 1), ((9, 17, 40, 31, 30), "projection", 2)], ids=str)
def test_same_bits_twice_and_with_any_number_of_threads(implementation, unit):
    inputs, identity, stride = make_inputs(unit)
    n, _, c, h, w = unit[0]
    grad_y, results = torch.randn(n, c, -(-h // stride), -(-w // stride)), []
    own = KERNELS and implementation != "reference"
    for threads in (2, 1, 2) if own else (2, 2):  # the bits of PyTorch's own kernels depend on the threads
        torch.set_num_threads(threads)
        values, gradients = run(separable_unit_train, inputs, grad_y, {"identity": identity, "stride": stride})
        results.append([*values, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast(implementation):
    """x and, on the CPU, convolution weights are read as bfloat16, batch norm stays as it is; backward follows."""
    inputs, identity, stride = make_inputs("pooled")
    read = (0,) if implementation in GPU else (0, 1, 2, 5, 6, 9)
    cast = grouped([t.bfloat16() if i in read else t for i, t in enumerate(flat(inputs))])
    settings, grad_y = {"identity": identity, "stride": stride}, torch.randn(3, 32, 4, 5).bfloat16()
    expected, expected_gradients = run(separable_unit_train, cast, grad_y, settings)
    with autocast(torch.bfloat16):
        results, gradients = run(separable_unit_train, inputs, grad_y, settings)
    assert results[0].dtype == torch.bfloat16 and all(result.dtype == torch.float32 for result in results[1:])
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    for tensor, gradient, other in zip(flat(inputs), gradients, expected_gradients, strict=True):
        assert gradient.dtype == tensor.dtype and torch.equal(gradient, other.float())


# What opcheck asks does not depend on the instruction set.
@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(implementation, layout):
    check_op(*make_inputs("pooled", layout=layout), OPCHECK[:3])  # the last is slow


@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
@pytest.mark.parametrize("unit", ["identity", "pooled", "narrow_identity", "one_position", "no_skip_4"])
def test_opcheck_units(implementation, unit):
    check_op(*make_inputs(unit))


def test_opcheck_mixed_dtypes_and_empty_batch():
    check_op(*make_inputs("pooled", torch.bfloat16, conv_dtype=torch.float32, norm_dtype=torch.float32))
    check_op(*_empty_inputs((2, 3, 3, 4, 4), "identity", 1))


def check_op(inputs, identity, stride, utilities=OPCHECK):
    settings = identity, stride, 1e-5
    with torch.no_grad():
        y, _, variances, zs, z_means = op(*inputs, *settings)
    for x_needs_grad in (True, False):
        arguments = (torch.ones_like(y), *inputs, y, zs, z_means, variances, *settings, x_needs_grad)
        torch.library.opcheck(backward_op, arguments, test_utils=utilities)
    torch.library.opcheck(op, (*leaves(inputs), *settings), test_utils=utilities)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    inputs, identity, stride = make_inputs("pooled")
    settings, grad_y = {"identity": identity, "stride": stride}, torch.randn(3, 32, 4, 5)
    torch._dynamo.reset()
    compiled = torch.compile(separable_unit_train, fullgraph=True, backend=backend)
    ours, other = (run(function, inputs, grad_y, settings) for function in (separable_unit_train, compiled))
    for results in zip([*ours[0], *ours[1]], [*other[0], *other[1]], strict=True):
        torch.testing.assert_close(*results)


def test_export_sees_one_op():
    class Unit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tensors = torch.nn.ParameterList(flat(make_inputs("pooled")[0])[1:])

        def forward(self, x):
            return separable_unit_train(*grouped([x, *self.tensors]), stride=2)[0]

    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Unit(), (torch.randn(4, 16, 5, 5),), dynamic_shapes=({0: batch},))
    assert [node.target for node in program.graph.nodes if node.op == "call_function"].count(op) == 1
    assert program.module()(torch.randn(7, 16, 5, 5)).shape == (7, 32, 3, 3)


def test_differentiates_once(implementation):
    inputs, identity, stride = make_inputs("identity")
    x, *parameters = leaves(inputs)
    y = separable_unit_train(x, *parameters, identity, stride)[0]
    with pytest.raises(RuntimeError, match="separable_unit_train can be differentiated only once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.autograd.grad(y.sum(), x, retain_graph=True)[0].isfinite().all()
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("unit", ["identity", "pooled", "no_skip_2"])
def test_only_what_needs_a_gradient_gets_one(implementation, unit):
    inputs, identity, stride = make_inputs(unit)
    settings = {"identity": identity, "stride": stride}
    grad_y = torch.randn_like(separable_unit_train(*inputs, **settings)[0])
    _, gradients = run(separable_unit_train, inputs, grad_y, settings)
    for needs_grad, expected in enumerate(gradients):
        arguments = [tensor.clone().requires_grad_(index == needs_grad) for index, tensor in enumerate(flat(inputs))]
        y, means, variances = separable_unit_train(*grouped(arguments), **settings)
        assert y.requires_grad and not any(statistic.requires_grad for statistic in (*means, *variances))
        y.backward(grad_y)
        assert [index for index, tensor in enumerate(arguments) if tensor.grad is not None] == [needs_grad]
        assert_unchanged(arguments[needs_grad].grad, expected, implementation)
    assert not separable_unit_train(*inputs, **settings)[0].requires_grad


@pytest.mark.parametrize("x_needs_grad", [True, False])
@pytest.mark.parametrize("unit", ["identity", "projection", "pooled", "pooled_twice", "no_skip_2"])
def test_flops_equal_the_unfused_ones(unit, x_needs_grad):
    inputs, identity, stride = make_inputs(unit)
    arguments = leaves(inputs)
    arguments[0].requires_grad_(x_needs_grad)
    counts = []
    for function in (separable_unit_train, plain):
        with FlopCounterMode(display=False) as counter:
            y = function(*arguments, identity=identity, stride=stride)[0]
            counts.append(counter.get_total_flops())
            y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[:2] == counts[2:] and 0 < counts[0] < counts[1]


def put(index, value):
    """A function that puts value(entry) into a list's place `index`."""
    return lambda tensors: [value(tensor) if place == index else tensor for place, tensor in enumerate(tensors)]


# What to change among x, first, second, skip, identity and stride of "pooled", and what is said of it.
BAD_INPUTS = {
    "flat x": ({"x": lambda t: t[0]}, "x has shape (16, 7, 9), expected (N, C, H, W)"),
    "no columns": ({"x": lambda t: t[..., :0]}, "x has shape (3, 16, 7, 0), expected (N, C, H, W) with C, H and W at least 1"),
    "half x": ({"x": lambda t: t.half()}, "x of shape (3, 16, 7, 9) has dtype torch.float16, expected torch.float32"),
    "stride 0": ({"stride": lambda _: 0}, "stride is 0, expected 1, 2 or 4"),
    "stride 3": ({"stride": lambda _: 3}, "stride is 3, expected 1, 2 or 4"),
    "stride 8": ({"stride": lambda _: 8}, "stride is 8, expected 1, 2 or 4"),
    "short first": ({"first": lambda t: t[:3]}, "first has 3 entries, expected 4"),
    "long second": ({"second": lambda t: [*t, t[3]]}, "second has 5 entries, expected 4"),
    "short skip": ({"skip": lambda t: t[:1]}, "skip has 1 entries, expected none, or 3"),
    "first dw": ({"first": put(0, lambda t: t[:2])}, "first[0] has shape (2, 1, 3, 3), expected (16, 1, 3, 3)"),
    "first pw": ({"first": put(1, lambda t: t[:, :2])}, "first[1] has shape (32, 2, 1, 1), expected (32, 16, 1, 1)"),
    "no outputs": ({"first": put(1, lambda t: t[:0])}, "first[1] has shape (0, 16, 1, 1), expected (C_out, 16, 1, 1)"),
    "first weight": ({"first": put(2, lambda t: t[:2])}, "first[2] has shape (2,), expected (32,)"),
    "first bias": ({"first": put(3, lambda t: t[:, None])}, "first[3] has shape (32, 1), expected (32,)"),
    "second dw": ({"second": put(0, lambda t: t[:16])}, "second[0] has shape (16, 1, 3, 3), expected (32, 1, 3, 3)"),
    "second pw": ({"second": put(1, lambda t: t[:5])}, "second[1] has shape (5, 32, 1, 1), expected (32, 32, 1, 1)"),
    "second weight": ({"second": put(2, lambda t: t[0])}, "second[2] has shape (), expected (32,)"),
    "second bias": ({"second": put(3, lambda t: t.long())}, "second[3] of shape (32,) has dtype torch.int64"),
    "skip pw": ({"skip": put(0, lambda t: t[:, :5])}, "skip[0] has shape (32, 5, 1, 1), expected (32, 16, 1, 1)"),
    "skip weight": ({"skip": put(1, lambda t: t[:5])}, "skip[1] has shape (5,), expected (32,)"),
    "skip bias on meta": ({"skip": put(2, lambda t: t.to("meta"))}, "skip[2] of shape (32,) is on meta, expected cpu as x"),
    "identity and skip": ({"identity": lambda _: True}, "identity with x of shape (3, 16, 7, 9), stride 2 and 3 entries in skip"),
    "identity, other channels": ({"identity": lambda _: True, "skip": lambda _: [], "stride": lambda _: 1}, "expected 32 channels"),
    "one value": ({"x": lambda t: t[:1, :, :2, :2]}, "leaves one value per channel, (1, 32, 1, 1); expected more than 1"),
}


@pytest.mark.parametrize("change, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_raise(implementation, change, message):
    inputs, identity, stride = make_inputs("pooled")
    arguments = dict(zip(("x", "first", "second", "skip", "identity", "stride"), [*inputs, identity, stride], strict=True))
    arguments.update({name: function(arguments[name]) for name, function in change.items()})
    with pytest.raises(ValueError, match=re.escape(names_device(message))):
        separable_unit_train(**arguments)
    with pytest.raises(ValueError):  # without the public function's checks
        op(*arguments.values(), 1e-5)


# What to change among the arguments of the backward op.
BAD_GRADIENTS = {
    "grad_y": {"grad_y": lambda t: t[:, :, 1:]},
    "integer grad_y": {"grad_y": lambda t: t.long()},
    "x": {"x": lambda t: t[1:]},
    "short first": {"first": lambda t: t[1:]},
    "first pw": {"first": put(1, lambda t: t[:, :2])},
    "second dw": {"second": put(0, lambda t: t[:2])},
    "second bias": {"second": put(3, lambda t: t[:2])},
    "short skip": {"skip": lambda t: t[1:]},
    "skip pw": {"skip": put(0, lambda t: t[:2])},
    "no skip, three maps": {"skip": lambda _: []},
    "y": {"y": lambda t: t[:, 1:]},
    "y of another dtype": {"y": lambda t: t.double()},
    "two of three zs": {"zs": lambda t: t[:2]},
    "smaller z": {"zs": put(1, lambda t: t[:, :, 1:])},
    "z of another dtype": {"zs": put(2, lambda t: t.bfloat16())},
    "two of three z_means": {"z_means": lambda t: t[:2]},
    "z_mean": {"z_means": put(0, lambda t: t[:2])},
    "two of three variances": {"vars": lambda t: t[:2]},
    "variance of another dtype": {"vars": put(0, lambda t: t.double())},
    "identity": {"identity": lambda _: True},
    "stride 1": {"stride": lambda _: 1},
    "stride 3": {"stride": lambda _: 3},
}


@pytest.mark.parametrize("change", BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_bad_backward_inputs_raise(implementation, change):
    inputs, identity, stride = make_inputs("pooled")
    y, _, variances, zs, z_means = op(*inputs, identity, stride, 1e-5)
    names = ("grad_y", "x", "first", "second", "skip", "y", "zs", "z_means", "vars", "identity", "stride", "eps", "x_needs_grad")
    values = (torch.ones_like(y), *inputs, y, zs, z_means, variances, identity, stride, 1e-5, True)
    arguments = dict(zip(names, values, strict=True))
    assert backward_op(*arguments.values())[0].isfinite().all()
    arguments.update({name: function(arguments[name]) for name, function in change.items()})
    with pytest.raises(ValueError, match="separable_unit"):
        backward_op(*arguments.values())
