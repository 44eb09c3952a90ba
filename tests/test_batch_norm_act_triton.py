"""The Triton launchers of batch_norm_act against float64: interpreted on the CPU, compiled where there is a GPU."""

import contextlib

import pytest
import torch

from cases import LAYOUTS, assert_accurate, typical_sum, upstream_gradient
from odn_fast.kernels import _tuned
from odn_fast.kernels import batch_norm_act as kernels
from odn_fast.reference import batch_norm_act as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
NAMES = ("batch_norm_act_forward", "batch_norm_act_backward")
SHAPES = {"odd": (3, 17, 7, 5), "wide": (2, 40, 3, 18)}
RELU_AND_RESIDUAL = {"relu": (True, False), "relu_residual": (True, True), "residual": (False, True), "plain": (False, False)}

# How programs learn of each other's sums, with tiles so small that a few images fill some, the last in part.
_TILES = {"columns": 16, "rows": 16, "unroll": 2, "held": 2, "fewest": 32, "programs": 3}
SPLITS = {
    "alone": {**_TILES, "fewest": 1 << 20},
    "two_launches": {**_TILES, "grid": 0},
    "one_launch": {**_TILES, "grid": 1},
}
compiled_only = pytest.mark.skipif(DEVICE == "cpu", reason="interpreted programs run one after the other")


@pytest.fixture(params=["alone", "two_launches", pytest.param("one_launch", marks=compiled_only)])
def split(request):
    with contextlib.ExitStack() as stack:
        for name in NAMES:
            stack.enter_context(_tuned.forced(name, SPLITS[request.param]))
        yield request.param


def make_inputs(shape, dtype=torch.float32, norm_dtype=torch.float32, residual=None, mean=0.0):
    """x, weight, bias and residual, None unless given a dtype."""
    shape = SHAPES.get(shape, shape)
    x = (torch.randn(shape) + mean).to(dtype)
    weight, bias = (0.5 + torch.rand(shape[1])).to(norm_dtype), (torch.randn(shape[1]) / 2).to(norm_dtype)
    return x, weight, bias, None if residual is None else torch.randn(shape).to(residual)


def both(module, inputs, grad_y, relu=True, layout="channels_last", dtype=None, device="cpu", x_needs_grad=True):
    """Results and gradients of one module's forward and backward, on the CPU; maps in `layout`, all in `dtype` if given."""

    def placed(tensor):
        tensor = tensor.to(device=device, dtype=dtype)
        return LAYOUTS[layout](tensor) if tensor.dim() == 4 else tensor

    x, weight, bias, residual = (None if tensor is None else placed(tensor) for tensor in inputs)
    results = module.batch_norm_act_train(x, weight, bias, residual, EPS, relu)
    y, mean, var = results
    saved = y if relu and residual is not None else None
    gradients = module.batch_norm_act_train_backward(
        placed(grad_y), x, weight, bias, saved, mean, var, EPS, relu, x_needs_grad
    )
    return [result.cpu() for result in results], [gradient.cpu() for gradient in gradients]


def check_accuracy(inputs, layout="channels_last", relu=True):
    x, weight, bias, residual = inputs
    placed = [None if tensor is None else LAYOUTS[layout](tensor.double()) for tensor in (x, residual)]
    arguments = reference.batch_norm_act_train(placed[0], weight, bias, placed[1], EPS, False)[0]
    grad_y = upstream_gradient(arguments, x.dtype, "nchw", relu)
    unfused = both(reference, inputs, grad_y, relu, layout)
    true = both(reference, inputs, grad_y, relu, layout, dtype=torch.float64)
    ours = both(kernels, inputs, grad_y, relu, layout, device=DEVICE)
    for results, dtypes in ((ours[0], unfused[0]), (ours[1], unfused[1])):
        assert [result.dtype for result in results] == [result.dtype for result in dtypes]
    y, mean, var = zip(ours[0], unfused[0], true[0], strict=True)
    assert ours[0][0].is_contiguous(memory_format=torch.channels_last)
    assert_accurate(*y, torch.float32)
    assert_accurate(*mean, torch.float32, true[0][2].max().sqrt().item())
    assert_accurate(*var, torch.float32)
    for index, gradients in enumerate(zip(ours[1], unfused[1], true[1], strict=True)):
        assert_accurate(*gradients, torch.float32, typical_sum(grad_y, true[0][2]) if index in (1, 2) else 0.0)


@pytest.mark.parametrize("relu, residual", RELU_AND_RESIDUAL.values(), ids=RELU_AND_RESIDUAL)
@pytest.mark.parametrize("shape, dtype", [("odd", torch.bfloat16), ("wide", torch.float32)], ids=str)
def test_accuracy(split, shape, dtype, relu, residual):
    check_accuracy(make_inputs(shape, dtype, residual=dtype if residual else None), relu=relu)


@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (9, 3, 1, 1), (5, 179, 8, 13)], ids=str)
def test_accuracy_with_the_default_tiles(shape):
    check_accuracy(make_inputs(shape, torch.bfloat16, residual=torch.bfloat16))


def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(split):
    check_accuracy(make_inputs((4, 16, 9, 8), mean=-1000.0))


@pytest.mark.parametrize(
    "x, norm, residual",
    [(torch.bfloat16, torch.float32, torch.float32), (torch.float32, torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_mixed_dtypes(x, norm, residual):
    check_accuracy(make_inputs("odd", x, norm_dtype=norm, residual=residual))


@pytest.mark.parametrize("layout", ["nchw", "sliced", "channel_slice"])
def test_layouts(layout):
    check_accuracy(make_inputs("odd", residual=torch.float32), layout)


def test_strided_parameters():
    x, weight, bias, _ = make_inputs("wide")
    check_accuracy((x, weight[:1].expand(weight.shape), bias.repeat_interleave(2)[::2], None))


@pytest.mark.parametrize("argument", ["x", "residual", "weight"])
def test_nan_reaches_what_it_should(argument):
    inputs = make_inputs("odd", residual=torch.float32)
    {"x": inputs[0][1, 2, 3], "residual": inputs[3][1, 2, 3], "weight": inputs[1][2:3]}[argument][0] = float("nan")
    grad_y = torch.randn(SHAPES["odd"])
    ours, expected = both(kernels, inputs, grad_y, device=DEVICE), both(reference, inputs, grad_y)
    for result, other in zip([*ours[0], *ours[1]], [*expected[0], *expected[1]], strict=True):
        assert torch.equal(result.isnan(), other.isnan())


@pytest.mark.parametrize("residual", [None, torch.float32], ids=["alone", "residual"])
def test_empty_batch(residual):
    inputs = make_inputs((0, 5, 4, 4), residual=residual)
    grad_y = torch.empty(0, 5, 4, 4)
    ours, expected = both(kernels, inputs, grad_y, device=DEVICE), both(reference, inputs, grad_y)
    for result, other in zip([*ours[0], *ours[1]], [*expected[0], *expected[1]], strict=True):
        assert torch.equal(result, other)


def test_without_the_gradient_of_x(split):
    inputs, grad_y = make_inputs("odd", residual=torch.float32), torch.randn(SHAPES["odd"])
    everything = both(kernels, inputs, grad_y, device=DEVICE)[1]
    less = both(kernels, inputs, grad_y, device=DEVICE, x_needs_grad=False)[1]
    assert less[0].shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(less[1:], everything[1:], strict=True))


def test_reasons():
    x, weight, bias, residual = (t.to(DEVICE) for t in make_inputs("odd", residual=torch.float32))
    vector = torch.zeros_like(weight)

    def forward(*args):
        return kernels.why_not("batch_norm_act_train", *args, EPS, True)

    def backward(*args):
        return kernels.why_not("batch_norm_act_train_backward", *args, vector, vector, EPS, True, True)

    assert forward(x, weight, bias, residual) == forward(x, weight, bias, None) == []
    assert backward(x, x, weight, bias, None) == backward(x, x, weight, bias, x) == []
    assert "x is torch.float64" in forward(x.double(), weight, bias, None)[0]
    assert "residual has shape (2, 17, 7, 5), expected (3, 17, 7, 5)" in forward(x, weight, bias, residual[1:])[0]
    assert "weight has shape (16,)" in forward(x, weight[1:], bias, None)[0]
    assert "expected (N, C, H, W)" in forward(x[0], weight, bias, None)[0]
    assert "one value per channel" in forward(x[:1, :, :1, :1], weight, bias, None)[0]
    assert "grad_y has shape (3, 17, 6, 5)" in backward(x[:, :, 1:], x, weight, bias, None)[0]


@pytest.mark.gpu
@compiled_only
@pytest.mark.parametrize("shape", [(128, 64, 32, 32), (128, 256, 8, 8), (128, 512, 4, 4), (64, 2048, 4, 4)], ids=str)
@pytest.mark.parametrize("grid", [0, 1], ids=["two_launches", "one_launch"])
def test_same_bits_in_every_launch_and_in_a_graph(shape, grid):
    """Programs that did not wait for the sums of all others would give other bits sooner or later."""
    x, weight, bias, residual = (t.cuda() for t in make_inputs(shape, torch.bfloat16, residual=torch.bfloat16))
    grad_y = torch.randn_like(x)

    def run():
        y, mean, var = kernels.batch_norm_act_train(x, weight, bias, residual, EPS, True)
        return y, mean, var, *kernels.batch_norm_act_train_backward(
            grad_y, x, weight, bias, y, mean, var, EPS, True, True
        )

    with _tuned.forced(NAMES[0], {"grid": grid}), _tuned.forced(NAMES[1], {"grid": grid}):
        first = run()
        differences = torch.zeros(len(first), device="cuda")
        for _ in range(200):
            differences += torch.stack([(a != b).sum() for a, b in zip(run(), first, strict=True)])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for _ in range(50):
            graph.replay()
            differences += torch.stack([(a != b).sum() for a, b in zip(captured, first, strict=True)])
    assert differences.tolist() == [0.0] * len(first)
