"""Shapes, dtypes, layouts and implementations that op tests share."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from odn_fast import _extension
from odn_fast.ops import _choose
from odn_fast.ops._library import on_references, references

FLOATING = (torch.float32, torch.bfloat16, torch.float64)
GPU = ("triton", "cuda")  # of _choose.NAMES, tested on CUDA tensors
MARKS = {"triton": [pytest.mark.gpu], "cuda": [pytest.mark.gpu, pytest.mark.nvcc]}
ON_GPU = tuple(pytest.param(name, marks=MARKS[name]) for name in GPU if torch.cuda.is_available())
ON_CPU = ("reference", *_extension.instruction_sets())
IMPLEMENTATIONS = (*ON_CPU, *ON_GPU)
OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

# of separable convolutions, by name: N, C_in, C_out, H, W
SEPARABLE_SHAPES = {
    "odd": (3, 3, 17, 7, 5),
    "one_channel": (2, 1, 1, 5, 4),
    "one_position": (9, 17, 3, 1, 1),
    "one_row": (2, 16, 1, 1, 9),
    "one_image": (1, 16, 32, 6, 7),
    "narrow": (2, 40, 64, 9, 2),
    "wide": (2, 64, 40, 3, 18),
    "remainders": (2, 33, 50, 8, 13),
}


def _sliced(x: Tensor) -> Tensor:
    """Every second column of a map with a border: neither channels nor positions are adjacent."""
    n, c, h, w = x.shape
    larger = x.new_full((n, c + 1, h + 2, 2 * w + 1), torch.nan)
    larger[:, 1:, 1 : h + 1, 1::2] = x
    return larger[:, 1:, 1 : h + 1, 1::2]


def _channel_slice(x: Tensor) -> Tensor:
    """Some channels of a wider channels_last map."""
    n, c, h, w = x.shape
    wider = x.new_full((n, c + 3, h, w), torch.nan).contiguous(memory_format=torch.channels_last)
    wider[:, 2 : c + 2] = x
    return wider[:, 2 : c + 2]


def _overlapping(x: Tensor) -> Tensor:
    """Windows into one short line of memory; every element belongs to several positions."""
    return x.flatten().as_strided(x.shape, (1, 1, 1, 1)) if x.numel() else x


# Each takes a contiguous (N, C, H, W) tensor and gives one of the same shape, dtype and (unless noted) values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "sliced": _sliced,
    "channel_slice": _channel_slice,
    "expanded_images": lambda x: x[:1].expand(x.shape),  # the first image's values
    "expanded_positions": lambda x: x[..., :1, :1].expand(x.shape),  # the first position's values
    "overlapping": _overlapping,  # other values
}
REPEATING = ("expanded_images", "expanded_positions", "overlapping")


def has_kernel(op: str) -> bool:
    """Whether the extension brings a CPU kernel for an op; elsewhere its reference answers on every instruction set."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"odn_fast::{op}", "CPU")


@contextmanager
def use_implementation(name: str, reference: ModuleType) -> Iterator[None]:
    """Run an op's calls on one of IMPLEMENTATIONS, those of GPU on tensors that are on the GPU unless told otherwise.

    reference: the module odn_fast.reference.<stem>; it holds the references of the ops meant.
    """
    if name in GPU:
        with _on_gpu(name, reference):
            yield
        return
    if name != "reference":
        with _extension.use_instruction_set(name):
            yield
        return
    with on_references(reference.__name__):
        yield


@contextmanager
def _on_gpu(name: str, reference: ModuleType) -> Iterator[None]:
    """Tensors are made on the GPU, and PyTorch's own layers compute there in the dtype they are given."""
    ops = [op for op, function in references.items() if function.__module__ == reference.__name__]
    ops = [op for op in ops if any(name == one.name for one in _choose._implementations.get(op, ()))]
    if not ops:
        pytest.skip(f"{reference.__name__.rpartition('.')[2]} has no implementation {name}")
    with ExitStack() as stack:
        # cuDNN may compute a convolution by transforms, whose NaN spreads and whose rounding is another.
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "(?s).*deterministic")  # what PyTorch's own layers are need not be
        stack.enter_context(torch.device("cuda"))
        stack.enter_context(_choose.using(name, *ops))
        yield


def autocast(dtype: torch.dtype) -> torch.autocast:
    """Of the device on which tensors are made."""
    return torch.autocast(torch.get_default_device().type, dtype=dtype)


def leaves(tensors: Iterable[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Tensors to differentiate by, in `dtype` or their own; None stays None."""
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def run(function: Callable, inputs: Iterable[Tensor | None], grad_y: Tensor, settings: dict, truth: bool = False):
    """((y, mean, var), gradients of the tensors among `inputs`), in float64 from the same rounded values if `truth`."""
    inputs = leaves(inputs, torch.float64 if truth else None)
    results = function(*inputs, **settings)
    tensors = [tensor for tensor in inputs if tensor is not None]
    return [result.detach() for result in results], torch.autograd.grad(results[0], tensors, grad_y.to(results[0].dtype))


def names_device(message: str) -> str:
    """What a CPU op says, as said of the device on which tensors are made."""
    return message.replace("expected cpu", f"expected {torch.get_default_device()}")


def assert_accurate(
    result: Tensor, unfused: Tensor, truth: Tensor, arithmetic: torch.dtype, summand: float = 0.0
) -> None:
    """Largest error against `truth` (float64) at most twice that of PyTorch's unfused result.

    The floor, four units of rounding at the largest magnitude, is for what PyTorch happens to round exactly. It
    is 64 units in float64, where the truth is rounded as the result is. Where the truth is a sum that may cancel,
    `summand` is the size of a typical partial sum, whose rounding counts.
    """
    assert result.shape == truth.shape
    if truth.numel() == 0:
        return
    eps = max(torch.finfo(result.dtype).eps, torch.finfo(arithmetic).eps)
    floor = (64 if eps == torch.finfo(torch.float64).eps else 4) * eps * max(truth.abs().max().item(), summand)
    error, allowed = (result - truth).abs().max(), 2 * (unfused - truth).abs().max() + floor
    assert error <= allowed, f"error {error:.3e} is above {allowed:.3e}"


def assert_unchanged(gradient: Tensor, expected: Tensor, implementation: str) -> None:
    """The same bits whatever else needs a gradient; from a GPU's kernels, which then sum in other tiles, nearly so."""
    if implementation in GPU:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(gradient, expected)


def upstream_gradient(arguments: Tensor, dtype: torch.dtype, layout: str, relu: bool = True) -> Tensor:
    """A gradient for relu(arguments) or, without `relu`, for arguments.

    A ReLU's gradient jumps at zero, and rounding alone decides on which side a value next to zero falls. There the
    gradient is zero. Layouts that repeat values would repeat it elsewhere, so it is in NCHW instead.
    """
    grad = torch.randn(arguments.shape)
    if relu:
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float64: 0.0}[dtype]
        grad[arguments.abs() < tolerance * arguments.abs().max()] = 0
        layout = "nchw" if layout in REPEATING else layout
    return LAYOUTS[layout](grad.to(dtype))


def typical_sum(grad_y: Tensor, var: Tensor) -> float:
    """The size of a sum of terms of either sign, of which a parameter's gradient is what does not cancel.

    As many terms as one channel of grad_y has, divided by the least deviation if batch norm enlarges them.
    """
    return grad_y.double().norm().item() / grad_y.shape[1] ** 0.5 / min(1.0, var.min().sqrt().item())


def plain_separable_conv(x, dw, pw, bn_weight, bn_bias, stride=1, eps=1e-5):
    """Depthwise, pointwise, batch norm by PyTorch's own layers in x's dtype, parameters read in it: result, mean, var.

    In bfloat16 on maps narrower than the kernel, PyTorch's depthwise convolution leaves parts of the weight's gradient
    unwritten. So it computes in float32 here, from and to bfloat16.
    """
    arithmetic = torch.promote_types(x.dtype, torch.float32)
    between = F.conv2d(x.to(arithmetic), dw.to(x.dtype).to(arithmetic), stride=stride, padding=1, groups=x.shape[1])
    return plain_pointwise(between.to(x.dtype), pw, bn_weight, bn_bias, eps)


def plain_pointwise(x, pw, bn_weight, bn_bias, eps=1e-5):
    """Pointwise, batch norm by PyTorch's own layers: result, mean, var."""
    arithmetic = torch.promote_types(x.dtype, torch.float32)
    z = F.conv2d(x, pw.to(x.dtype))
    var, mean = torch.var_mean(z.detach().to(arithmetic), (0, 2, 3), correction=0)
    return F.batch_norm(z, None, None, bn_weight.to(arithmetic), bn_bias.to(arithmetic), training=True, eps=eps), mean, var


def separable_parameters(c_in: int, c_out: int, conv_dtype: torch.dtype, norm_dtype: torch.dtype) -> list[Tensor]:
    """dw, pw, bn_weight, bn_bias as after some training."""
    return [
        torch.randn(c_in, 1, 3, 3).div_(3).to(conv_dtype),
        torch.randn(c_out, c_in, 1, 1).div_(c_in**0.5).to(conv_dtype),
        (0.5 + torch.rand(c_out)).to(norm_dtype),
        (torch.randn(c_out) / 2).to(norm_dtype),
    ]
