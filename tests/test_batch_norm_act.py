"""batch_norm_act: every implementation against float64, and as a citizen of PyTorch's dispatcher.

A ReLU's gradient jumps where its argument crosses zero, and rounding alone decides on which side a value next to zero
falls. So the upstream gradient is zero wherever the true argument lies within rounding of zero: whatever side the mask
falls on there, nothing changes, and the largest errors of all gradients can be compared.
"""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cases import FLOATING, LAYOUTS, ON_CPU, OPCHECK, assert_accurate, autocast, has_kernel, leaves, names_device, run, typical_sum
from odn_fast.ops import batch_norm_act
from odn_fast.reference import batch_norm_act as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

op = torch.ops.odn_fast.batch_norm_act_train.default
backward_op = torch.ops.odn_fast.batch_norm_act_train_backward.default
KERNELS = has_kernel("batch_norm_act_train") and has_kernel("batch_norm_act_train_backward")

SHAPES = {
    "odd": (3, 17, 7, 5),
    "one_channel": (2, 1, 5, 4),
    "one_position": (9, 3, 1, 1),
    "one_row": (2, 16, 1, 9),
    "one_image": (1, 32, 6, 7),
    "narrow": (2, 64, 9, 2),
    "wide": (2, 40, 3, 18),
    "remainders": (5, 179, 8, 13),
}


def make_inputs(shape="odd", dtype=torch.float32, layout="channels_last", norm_dtype=None, residual=None, mean=0.0):
    """x, weight, bias and residual, None unless given a dtype; none requires grad yet."""
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    x = LAYOUTS[layout]((torch.randn(shape) + mean).to(dtype))
    weight, bias = 0.5 + torch.rand(shape[1]), torch.randn(shape[1]) / 2
    added = None if residual is None else LAYOUTS[layout](torch.randn(shape).to(residual))
    return [x, weight.to(norm_dtype or dtype), bias.to(norm_dtype or dtype), added]


def plain(x, weight, bias, residual=None, eps=1e-5, relu=True):
    arithmetic = torch.promote_types(x.dtype, torch.float32)
    var, mean = torch.var_mean(x.detach().to(arithmetic), (0, 2, 3), correction=0)
    y = F.batch_norm(x, None, None, weight.to(arithmetic), bias.to(arithmetic), training=True, eps=eps)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.relu() if relu else y, mean, var


def upstream(inputs, settings, layout="channels_last"):
    """A gradient for y, zero where the ReLU's true argument is within rounding of zero."""
    arguments = plain(*leaves(inputs, torch.float64), **{**settings, "relu": False})[0]
    grad = torch.randn(arguments.shape)
    if settings.get("relu", True):
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float64: 0.0}[inputs[0].dtype]
        grad[arguments.abs() < tolerance * arguments.abs().max()] = 0
    return LAYOUTS[layout](grad.to(inputs[0].dtype))


def check_accuracy(inputs, layout="channels_last", **settings):
    grad_y = upstream(inputs, settings, layout)
    ours, unfused = (run(function, inputs, grad_y, settings) for function in (batch_norm_act, plain))
    true = run(plain, inputs, grad_y, settings, truth=True)
    arithmetic, x = ours[0][1].dtype, inputs[0]
    assert arithmetic == ours[0][2].dtype == reference.compute_dtype(x)
    assert ours[0][0].dtype == x.dtype and ours[0][0].is_contiguous(memory_format=torch.channels_last)
    y, mean, var = zip(ours[0], unfused[0], true[0], strict=True)
    assert_accurate(*y, arithmetic)
    assert_accurate(*mean, arithmetic, true[0][2].max().sqrt().item())
    assert_accurate(*var, arithmetic)
    tensors = [tensor for tensor in inputs if tensor is not None]
    for index, (tensor, *gradients) in enumerate(zip(tensors, ours[1], unfused[1], true[1], strict=True)):
        assert gradients[0].dtype == tensor.dtype
        assert_accurate(*gradients, arithmetic, typical_sum(grad_y, true[0][2]) if index in (1, 2) else 0.0)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_accuracy(implementation, layout, dtype, shape, residual):
    check_accuracy(make_inputs(shape, dtype, layout, residual=dtype if residual else None), layout)


@pytest.mark.parametrize("residual, relu", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(implementation, layout, dtype, residual, relu):
    check_accuracy(make_inputs("odd", dtype, layout, residual=dtype if residual else None), layout, relu=relu, eps=0.1)


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATING, repeat=3)), ids=str)
def test_mixed_dtypes(implementation, dtypes):
    x, norm, residual = dtypes
    check_accuracy(make_inputs("odd", x, norm_dtype=norm, residual=residual))


def test_strided_parameters(implementation):
    x, weight, bias, _ = make_inputs("remainders")
    check_accuracy([x, weight[:1].expand(weight.shape), bias.repeat_interleave(2)[::2], None])


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(64, 16, 16, 16), (3, 32, 61, 60)], ids=["images", "positions"])
def test_accuracy_of_long_sums(implementation, dtype, shape):
    check_accuracy(make_inputs(shape, dtype))


@pytest.mark.parametrize("residual", [None, torch.float32], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", [(4, 24, 9, 8), (16, 64, 28, 28)], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mean", [10.0, -1000.0])
def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(implementation, layout, mean, shape, residual):
    check_accuracy(make_inputs(shape, layout=layout, residual=residual, mean=mean), layout)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("residual, relu", [(True, True), (False, True), (True, False), (False, False)])
def test_gradcheck(implementation, layout, residual, relu):
    inputs = make_inputs((3, 3, 4, 3), torch.float64, layout, residual=torch.float64 if residual else None)
    tensors = [tensor for tensor in leaves(inputs) if tensor is not None]
    assert torch.autograd.gradcheck(lambda *tensors: batch_norm_act(*tensors, relu=relu)[0], tensors)


def test_constant_channels_have_no_variance(implementation):
    x, weight, bias, _ = make_inputs("remainders")
    x = torch.full_like(x, 0.1)
    y, mean, var = batch_norm_act(x, weight, bias, relu=False)
    assert (var < 1e-12).all()
    torch.testing.assert_close(mean, x[0, :, 0, 0])
    torch.testing.assert_close(y, bias[:, None, None].expand(y.shape), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:var_mean")  # of nothing, in the plain network
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
def test_empty_batch(implementation, layout):
    inputs = make_inputs((0, 5, 4, 4), layout=layout, residual=torch.float32)
    (y, mean, var), gradients = run(batch_norm_act, inputs, torch.empty(0, 5, 4, 4), {})
    assert y.shape == (0, 5, 4, 4) and mean.tolist() == var.tolist() == [0.0] * 5
    for gradient, other in zip(gradients, run(plain, inputs, torch.empty(0, 5, 4, 4), {})[1], strict=True):
        torch.testing.assert_close(gradient, other)


NON_FINITE = {"x": (0, (1, 2, 3, 1)), "weight": (1, (3,)), "bias": (2, (3,)), "residual": (3, (1, 6, 2, 2))}
INFINITE = list(itertools.product(("x", "bias", "residual"), (float("inf"), float("-inf"))))


@pytest.mark.parametrize("where, value", [*((where, float("nan")) for where in NON_FINITE), *INFINITE])
def test_non_finite_values_propagate(implementation, where, value):
    inputs = make_inputs("odd", residual=torch.float32)
    argument, index = NON_FINITE[where]
    inputs[argument][index] = value
    grad_y = torch.randn(SHAPES["odd"])
    (y, *statistics), gradients = run(batch_norm_act, inputs, grad_y, {})
    (plain_y, *plain_statistics), plain_gradients = run(plain, inputs, grad_y, {})
    assert torch.equal(y.isnan(), plain_y.isnan()) and torch.equal(y.isinf(), plain_y.isinf())
    for ours, other in zip([*statistics, *gradients], [*plain_statistics, *plain_gradients], strict=True):
        assert torch.equal(ours.isfinite(), other.isfinite())


@pytest.mark.parametrize("shape", [(33, 32, 14, 14), (2, 17, 61, 40)], ids=str)
@pytest.mark.parametrize("residual", [None, torch.float32], ids=["alone", "residual"])
def test_same_bits_twice_and_with_any_number_of_threads(implementation, shape, residual):
    inputs, grad_y, results = make_inputs(shape, residual=residual), torch.randn(shape), []
    own = KERNELS and implementation != "reference"
    for threads in (2, 1, 2) if own else (2, 2):  # the bits of PyTorch's own kernels depend on the threads
        torch.set_num_threads(threads)
        values, gradients = run(batch_norm_act, inputs, grad_y, {})
        results.append([*values, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast(implementation):
    """x and residual are read as bfloat16, the rest as it is; backward follows forward."""
    inputs = make_inputs("odd", residual=torch.float32)
    cast = [t if i in (1, 2) else t.bfloat16() for i, t in enumerate(inputs)]
    grad_y = torch.randn(SHAPES["odd"]).bfloat16()
    expected, expected_gradients = run(batch_norm_act, cast, grad_y, {})
    with autocast(torch.bfloat16):
        results, gradients = run(batch_norm_act, inputs, grad_y, {})
    assert [result.dtype for result in results] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    for tensor, gradient, other in zip(inputs, gradients, expected_gradients, strict=True):
        assert gradient.dtype == tensor.dtype and torch.equal(gradient, other.float())


@pytest.mark.parametrize("dtype, target", [(torch.float32, torch.float16), (torch.float64, torch.bfloat16)], ids=str)
def test_autocast_to_another_dtype_and_of_float64_changes_nothing(implementation, dtype, target):
    inputs = make_inputs("odd", dtype)
    with autocast(target):
        y = batch_norm_act(*inputs)[0]
    assert y.dtype == dtype and torch.equal(y, batch_norm_act(*inputs)[0])


# What opcheck asks does not depend on the instruction set.
@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
@pytest.mark.parametrize("residual, relu", [(torch.float32, True), (torch.float32, False), (None, True)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(implementation, layout, residual, relu):
    utilities = OPCHECK if layout in ("nchw", "channels_last") else OPCHECK[:3]  # the last is slow
    check_op(make_inputs("odd", layout=layout, residual=residual), relu, utilities)


@pytest.mark.parametrize("shape", ["one_channel", "one_position", (0, 3, 4, 4)], ids=str)
def test_opcheck_edges(shape):
    check_op(make_inputs(shape))


@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)], ids=str)
def test_opcheck_mixed_dtypes(implementation, dtypes):
    check_op(make_inputs(dtype=dtypes[0], norm_dtype=dtypes[1], residual=torch.float32))


def check_op(inputs, relu=True, utilities=OPCHECK):
    with torch.no_grad():
        y, mean, var = op(*inputs, 1e-5, relu)
    saved = (y if inputs[3] is not None and relu else None, mean, var)
    for x_needs_grad in (True, False):
        backward = (torch.ones_like(y), *inputs[:3], *saved, 1e-5, relu, x_needs_grad)
        torch.library.opcheck(backward_op, backward, test_utils=utilities)
    torch.library.opcheck(op, (*leaves(inputs), 1e-5, relu), test_utils=utilities)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    inputs, grad_y = make_inputs("odd", residual=torch.float32), torch.randn(SHAPES["odd"])
    torch._dynamo.reset()
    compiled = torch.compile(batch_norm_act, fullgraph=True, backend=backend)
    results, gradients = run(batch_norm_act, inputs, grad_y, {})
    compiled_results, compiled_gradients = run(compiled, inputs, grad_y, {})
    for ours, other in zip([*results, *gradients], [*compiled_results, *compiled_gradients], strict=True):
        torch.testing.assert_close(ours, other)


def test_export_sees_one_op():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(torch.rand(3)), torch.nn.Parameter(torch.rand(3))

        def forward(self, x):
            return batch_norm_act(x, self.weight, self.bias, x)

    program = torch.export.export(
        Layer(), (torch.randn(4, 3, 5, 5),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(op) == 1
    assert program.module()(torch.randn(7, 3, 5, 5))[0].shape == (7, 3, 5, 5)


def test_x_may_be_its_own_residual(implementation):
    x, weight, bias, _ = make_inputs("remainders")
    grad_y, results = torch.randn(x.shape), []
    for function in (batch_norm_act, plain):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(function(leaf, weight, bias, leaf)[0], leaf, grad_y)[0])
    torch.testing.assert_close(*results)


def test_differentiates_once(implementation):
    inputs = leaves(make_inputs("odd"))
    y = batch_norm_act(*inputs)[0]
    with pytest.raises(RuntimeError, match="batch_norm_act_train can be differentiated only once"):
        torch.autograd.grad(y.sum(), inputs[1], create_graph=True)
    assert torch.autograd.grad(y.sum(), inputs[1], retain_graph=True)[0].isfinite().all()
    assert torch.autograd.grad(y.sum(), inputs[1])[0].isfinite().all()


@pytest.mark.parametrize("relu", [True, False])
def test_only_what_needs_a_gradient_gets_one(implementation, relu):
    inputs, grad_y = make_inputs("odd", residual=torch.bfloat16), torch.randn(SHAPES["odd"])
    _, gradients = run(batch_norm_act, inputs, grad_y, {"relu": relu})
    for needs_grad, expected in enumerate(gradients):
        arguments = [tensor.clone().requires_grad_(index == needs_grad) for index, tensor in enumerate(inputs)]
        y, mean, var = batch_norm_act(*arguments, relu=relu)
        assert y.requires_grad and not mean.requires_grad and not var.requires_grad
        y.backward(grad_y)
        assert [tensor.grad is not None for tensor in arguments] == [index == needs_grad for index in range(4)]
        assert torch.equal(arguments[needs_grad].grad, expected)
    assert not batch_norm_act(*inputs)[0].requires_grad


def test_flops_equal_the_unfused_ones():
    inputs = leaves(make_inputs("odd", residual=torch.float32))
    with FlopCounterMode(display=False) as counter:
        batch_norm_act(*inputs)[0].sum().backward()
    assert counter.get_total_flops() == 0
    assert {op._overloadpacket, backward_op._overloadpacket} <= set(counter.flop_registry)


# What to change among x, weight, bias and residual, and what is said of it.
BAD_INPUTS = {
    "flat x": ({"x": lambda t: t[0]}, "x has shape (17, 7, 5), expected (N, C, H, W)"),
    "no channels": ({"x": lambda t: t[:, :0]}, "x has shape (3, 0, 7, 5), expected (N, C, H, W) with C, H and W at least 1"),
    "no rows": ({"x": lambda t: t[:, :, :0]}, "x has shape (3, 17, 0, 5)"),
    "integer x": ({"x": lambda t: t.long()}, "x of shape (3, 17, 7, 5) has dtype torch.int64, expected torch.float32"),
    "half x": ({"x": lambda t: t.half()}, "has dtype torch.float16"),
    "weight on meta": ({"weight": lambda t: t.to("meta")}, "weight of shape (17,) is on meta, expected cpu as x"),
    "weight map": ({"weight": lambda t: t[:, None]}, "weight has shape (17, 1), expected (17,)"),
    "long bias": ({"bias": lambda t: torch.cat([t, t])}, "bias has shape (34,), expected (17,)"),
    "boolean bias": ({"bias": lambda t: t > 0}, "bias of shape (17,) has dtype torch.bool"),
    "one residual": ({"residual": lambda t: t[:1]}, "residual has shape (1, 17, 7, 5), expected (3, 17, 7, 5)"),
    "residual on meta": ({"residual": lambda t: t.to("meta")}, "residual of shape (3, 17, 7, 5) is on meta"),
    "complex residual": ({"residual": lambda t: t.cfloat()}, "residual of shape (3, 17, 7, 5) has dtype torch.complex64"),
    "one value": (
        {"x": lambda t: t[:1, :, :1, :1], "residual": lambda _: None},
        "x has shape (1, 17, 1, 1), which leaves one value per channel",
    ),
}


@pytest.mark.parametrize("change, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_raise(implementation, change, message):
    names = ("x", "weight", "bias", "residual")
    inputs = dict(zip(names, make_inputs(residual=torch.float32), strict=True))
    inputs.update({name: function(inputs[name]) for name, function in change.items()})
    with pytest.raises(ValueError, match=re.escape(names_device(message))):
        batch_norm_act(**inputs)
    with pytest.raises(ValueError):  # without the public function's checks
        op(*inputs.values(), 1e-5, True)


# What to change among the arguments of the backward op.
BAD_GRADIENTS = {
    "grad_y of another size": {"grad_y": lambda t: t[:, :, 1:]},
    "grad_y of fewer images": {"grad_y": lambda t: t[1:]},
    "flat grad_y": {"grad_y": lambda t: t[0]},
    "integer grad_y": {"grad_y": lambda t: t.long()},
    "flat x": {"x": lambda t: t[0]},
    "integer x": {"x": lambda t: t.long()},
    "other channels in x": {"x": lambda t: t[:, :2]},
    "weight": {"weight": lambda t: t[:1]},
    "bias": {"bias": lambda t: t[:, None]},
    "smaller y": {"y": lambda t: t[:, :, :, 1:]},
    "y of another dtype": {"y": lambda t: t.double()},
    "mean": {"mean": lambda t: t[1:]},
    "mean of another dtype": {"mean": lambda t: t.double()},
    "var": {"var": lambda t: t[None]},
    "var of another dtype": {"var": lambda t: t.bfloat16()},
}


@pytest.mark.parametrize("change", BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_bad_backward_inputs_raise(implementation, change):
    x, weight, bias, residual = make_inputs(residual=torch.float32)
    y, mean, var = op(x, weight, bias, residual, 1e-5, True)
    arguments = {
        "grad_y": torch.ones_like(y), "x": x, "weight": weight, "bias": bias, "y": y, "mean": mean, "var": var,
        "eps": 1e-5, "relu": True, "x_needs_grad": True,
    }  # fmt: skip
    assert all(gradient.isfinite().all() for gradient in backward_op(*arguments.values()))
    arguments.update({name: function(arguments[name]) for name, function in change.items()})
    with pytest.raises(ValueError, match="batch_norm_act_train_backward"):
        backward_op(*arguments.values())
