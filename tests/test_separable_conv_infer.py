"""separable_conv_infer: every implementation against float64, and as a citizen of PyTorch's dispatcher."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cases import (
    FLOATING,
    GPU,
    LAYOUTS,
    ON_CPU,
    OPCHECK,
    SEPARABLE_SHAPES,
    assert_accurate,
    autocast,
    has_kernel,
    names_device,
    separable_parameters,
)
from odn_fast.ops import separable_conv_infer
from odn_fast.reference import separable_conv as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

op = torch.ops.odn_fast.separable_conv_infer.default
KERNEL = has_kernel("separable_conv_infer")

ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "hard_swish": F.hardswish, "silu": F.silu}


def make_inputs(shape="odd", dtype=torch.float32, layout="channels_last", conv_dtype=None, bias_dtype=None,
                residual=None, stride=1):
    """x, dw, dw_bias, pw, pw_bias and residual; residual is None unless given a dtype."""
    n, c_in, c_out, h, w = SEPARABLE_SHAPES[shape] if isinstance(shape, str) else shape
    dw, pw, _, pw_bias = separable_parameters(c_in, c_out, conv_dtype or dtype, bias_dtype or dtype)
    output = (n, c_out, reference.output_size(h, stride), reference.output_size(w, stride))
    return [
        LAYOUTS[layout](2 * torch.randn(n, c_in, h, w).to(dtype)),
        dw,
        torch.randn(c_in).to(bias_dtype or dtype),
        pw,
        pw_bias,
        None if residual is None else LAYOUTS[layout](torch.randn(output).to(residual)),
    ]


def plain(x, dw, dw_bias, pw, pw_bias, residual=None, stride=1, act_dw="none", act_pw="relu"):
    """By PyTorch's own layers in x's dtype, parameters read in it."""
    dw, dw_bias, pw, pw_bias, residual = (
        None if tensor is None else tensor.to(x.dtype) for tensor in (dw, dw_bias, pw, pw_bias, residual)
    )
    between = ACTIVATIONS[act_dw](F.conv2d(x, dw, dw_bias, stride=stride, padding=1, groups=x.shape[1]))
    y = F.conv2d(between, pw, pw_bias)
    return ACTIVATIONS[act_pw](y if residual is None else y + residual)


def check_accuracy(inputs, *settings):
    y = separable_conv_infer(*inputs, *settings)
    assert y.dtype == inputs[0].dtype and y.is_contiguous(memory_format=torch.channels_last)
    true = plain(*(None if tensor is None else tensor.double() for tensor in inputs), *settings)
    assert_accurate(y, plain(*inputs, *settings), true, reference.compute_dtype(inputs[0]))


@pytest.mark.parametrize("layout, stride", [("nchw", 1), ("channels_last", 1), ("channels_last", 2)])
@pytest.mark.parametrize("shape", SEPARABLE_SHAPES)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_accuracy(implementation, layout, dtype, shape, stride):
    check_accuracy(make_inputs(shape, dtype, layout, stride=stride), stride)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(implementation, layout, dtype, stride):
    check_accuracy(make_inputs("odd", dtype, layout, residual=dtype, stride=stride), stride, "relu6", "none")


@pytest.mark.parametrize("act_dw, act_pw", list(itertools.product(ACTIVATIONS, repeat=2)))
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_activations(implementation, dtype, act_dw, act_pw):
    check_accuracy(make_inputs("remainders", dtype, residual=dtype), 1, act_dw, act_pw)


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATING, repeat=3)), ids=str)
def test_mixed_dtypes(implementation, dtypes):
    x, conv, bias = dtypes
    residual = FLOATING[(FLOATING.index(x) + FLOATING.index(conv) + FLOATING.index(bias)) % 3]
    check_accuracy(make_inputs("odd", x, conv_dtype=conv, bias_dtype=bias, residual=residual))


@pytest.mark.parametrize("dw_bias, pw_bias, residual", list(itertools.product([True, False], repeat=3)))
def test_biases_and_residual_are_optional(implementation, dw_bias, pw_bias, residual):
    inputs = make_inputs("remainders", residual=torch.float32)
    for index, given in ((2, dw_bias), (4, pw_bias), (5, residual)):
        inputs[index] = inputs[index] if given else None
    check_accuracy(inputs, 2 if not residual else 1, "silu", "hard_swish")


def test_strided_parameters(implementation):
    x, dw, dw_bias, pw, pw_bias, _ = make_inputs("remainders")
    dw, pw = dw.transpose(2, 3), pw.transpose(0, 1).contiguous().transpose(0, 1)
    check_accuracy([x, dw, dw_bias[:1].expand(dw_bias.shape), pw, pw_bias.repeat_interleave(2)[::2]])


def test_one_value_per_channel_and_no_image(implementation):
    check_accuracy(make_inputs((1, 16, 32, 1, 1)))
    check_accuracy(make_inputs((1, 3, 5, 2, 2), stride=2), 2)
    assert separable_conv_infer(*make_inputs((0, 3, 5, 4, 7)), stride=2).shape == (0, 5, 2, 4)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_finite_values_propagate(implementation, layout, activation):
    inputs = make_inputs("odd", layout=layout)
    for image, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        inputs[0][image, 1, 3, 2] = value
    y, other = (function(*inputs, 1, activation, activation) for function in (separable_conv_infer, plain))
    assert torch.equal(y.isnan(), other.isnan()) and torch.equal(y.isinf(), other.isinf())


@pytest.mark.parametrize("shape", [(33, 16, 32, 14, 14), (2, 40, 17, 61, 40)], ids=str)
def test_same_bits_twice_and_with_any_number_of_threads(implementation, shape):
    inputs, results = make_inputs(shape, residual=torch.float32), []
    own = KERNEL and implementation != "reference"
    for threads in (2, 1, 2) if own else (2, 2):  # the bits of PyTorch's own kernels depend on the threads
        torch.set_num_threads(threads)
        results.append(separable_conv_infer(*inputs))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_autocast(implementation):
    """x, residual and, on the CPU, convolution weights are read as bfloat16, biases, which hold batch norm, as they are."""
    inputs = make_inputs("odd", residual=torch.float32)
    with autocast(torch.bfloat16):
        y = separable_conv_infer(*inputs)
    for index in (0, 5) if implementation in GPU else (0, 1, 3, 5):
        inputs[index] = inputs[index].bfloat16()
    assert y.dtype == torch.bfloat16 and torch.equal(y, separable_conv_infer(*inputs))


def test_autocast_leaves_float64_alone(implementation):
    with autocast(torch.bfloat16):
        assert separable_conv_infer(*make_inputs(dtype=torch.float64)).dtype == torch.float64


# What opcheck asks does not depend on the instruction set.
@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(implementation, layout):
    for settings in ((1, "none", "relu"), (2, "relu6", "silu")):
        inputs = make_inputs(layout=layout, stride=settings[0], residual=torch.float32)
        utilities = OPCHECK if layout == "nchw" else OPCHECK[:3]  # the last is slow
        torch.library.opcheck(op, (*inputs, *settings), test_utils=utilities)


@pytest.mark.parametrize("shape", ["one_channel", "one_position", (0, 3, 5, 4, 4)], ids=str)
def test_opcheck_edges(shape):
    torch.library.opcheck(op, (*make_inputs(shape), 1, "none", "relu"), test_utils=OPCHECK)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)], ids=str)
def test_opcheck_mixed_dtypes(dtypes):
    inputs = make_inputs(dtype=dtypes[0], conv_dtype=dtypes[1], residual=torch.float32)
    torch.library.opcheck(op, (*inputs, 1, "none", "relu"), test_utils=OPCHECK)


def test_compiles_in_one_graph():
    inputs = make_inputs("odd", residual=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(separable_conv_infer, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), separable_conv_infer(*inputs))


def test_export_sees_one_op():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dw, self.dw_bias, self.pw, self.pw_bias = map(torch.nn.Buffer, make_inputs((1, 3, 5, 1, 1))[1:5])

        def forward(self, x):
            return separable_conv_infer(x, self.dw, self.dw_bias, self.pw, self.pw_bias)

    program = torch.export.export(
        Layer(), (torch.randn(4, 3, 5, 5),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    assert [node.target for node in program.graph.nodes if node.op == "call_function"].count(op) == 1
    assert program.module()(torch.randn(7, 3, 5, 5)).shape == (7, 5, 5, 5)


def test_it_has_no_gradient(implementation):
    inputs = make_inputs("odd")
    inputs[1].requires_grad_()
    y = separable_conv_infer(*inputs)
    with pytest.raises(RuntimeError, match="separable_conv_infer has no gradient; use separable_conv_train"):
        y.sum().backward()


@pytest.mark.parametrize("stride", [1, 2])
def test_flops_equal_the_unfused_ones(stride):
    counts = []
    for function in (separable_conv_infer, plain):
        with FlopCounterMode(display=False) as counter:
            function(*make_inputs("remainders"), stride)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# What to change among the arguments, and what is said of it.
BAD_INPUTS = {
    "flat x": ({"x": lambda t: t[0]}, "x has shape (3, 7, 5), expected (N, C, H, W)"),
    "no rows": ({"x": lambda t: t[:, :, :0]}, "x has shape (3, 3, 0, 5), expected (N, C, H, W) with C, H and W at least 1"),
    "half x": ({"x": lambda t: t.half()}, "x of shape (3, 3, 7, 5) has dtype torch.float16, expected torch.float32"),
    "wide dw": ({"dw": lambda t: t.new_ones(4, 1, 3, 3)}, "dw has shape (4, 1, 3, 3), expected (3, 1, 3, 3)"),
    "integer dw": ({"dw": lambda t: t.long()}, "dw of shape (3, 1, 3, 3) has dtype torch.int64"),
    "dw_bias": ({"dw_bias": lambda t: t[:2]}, "dw_bias has shape (2,), expected (3,)"),
    "pw matrix": ({"pw": lambda t: t[:, :, 0, 0]}, "pw has shape (17, 3), expected (C_out, 3, 1, 1) with C_out >= 1"),
    "wide pw": ({"pw": lambda t: torch.cat([t, t], 1)}, "pw has shape (17, 6, 1, 1), expected (17, 3, 1, 1)"),
    "pw on meta": ({"pw": lambda t: t.to("meta")}, "pw of shape (17, 3, 1, 1) is on meta, expected cpu as x"),
    "pw_bias": ({"pw_bias": lambda t: t[:, None]}, "pw_bias has shape (17, 1), expected (17,)"),
    "boolean pw_bias": ({"pw_bias": lambda t: t > 0}, "pw_bias of shape (17,) has dtype torch.bool"),
    "residual": ({"residual": lambda t: t[..., :1]}, "residual has shape (3, 17, 7, 1), expected (3, 17, 7, 5)"),
    "residual of stride 1": ({"stride": lambda _: 2}, "residual has shape (3, 17, 7, 5), expected (3, 17, 4, 3)"),
    "stride 0": ({"stride": lambda _: 0}, "stride is 0, expected 1 or 2"),
    "stride 3": ({"stride": lambda _: 3}, "stride is 3, expected 1 or 2"),
    "act_dw": ({"act_dw": lambda _: "gelu"}, "act_dw is 'gelu', expected one of none, relu, relu6, hard_swish, silu"),
    "act_pw": ({"act_pw": lambda _: "ReLU"}, "act_pw is 'ReLU', expected one of"),
}


@pytest.mark.parametrize("change, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_raise(implementation, change, message):
    names = ("x", "dw", "dw_bias", "pw", "pw_bias", "residual", "stride", "act_dw", "act_pw")
    inputs = dict(zip(names, [*make_inputs(residual=torch.float32), 1, "none", "relu"], strict=True))
    inputs.update({name: function(inputs[name]) for name, function in change.items()})
    with pytest.raises(ValueError, match=re.escape(names_device(message))):
        separable_conv_infer(**inputs)
    with pytest.raises(ValueError):  # without the public function's checks
        op(*inputs.values())
