"""The Triton launchers of channel_attention against its float64 reference; interpreted where there is no GPU."""

import pytest
import torch

from cases import LAYOUTS

pytest.importorskip("triton")

from odn_fast.kernels import _tuned
from odn_fast.kernels import channel_attention as kernels
from odn_fast.ops._choose import reasons
from odn_fast.reference import channel_attention as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT, BFLOAT = torch.float32, torch.bfloat16
TOLERANCE = {FLOAT: 1e-5, BFLOAT: 2**-7}  # products in three parts of TF32, or bfloat16

# of student and teacher: batch, C_s, C_t, H, W, and dtypes
CASES = {
    "float32": (2, 17, 3, 7, 5, FLOAT, FLOAT),
    "bfloat16": (2, 17, 3, 7, 5, BFLOAT, BFLOAT),
    "wide": (1, 20, 24, 9, 17, FLOAT, FLOAT),
    "wide bfloat16": (1, 20, 24, 9, 17, BFLOAT, BFLOAT),
    "mixed": (2, 3, 18, 4, 5, FLOAT, BFLOAT),
    "one of everything": (2, 1, 1, 1, 1, FLOAT, FLOAT),
    "many channels": (1, 17, 140, 3, 3, FLOAT, FLOAT),
    "many channels bfloat16": (1, 5, 70, 3, 3, BFLOAT, BFLOAT),
}


def make_maps(case, layout="channels_last"):
    """Maps as after a ReLU, one channel dead and one constant where there are enough."""
    batch, c_s, c_t, height, width, student_dtype, teacher_dtype = CASES[case] if isinstance(case, str) else case
    student, teacher = (torch.randn(batch, c, height, width).relu_() for c in (c_s, c_t))
    if c_s > 2:
        student[:, 0], student[:, 1] = 0, 0.75
    return (
        LAYOUTS[layout](student.to(student_dtype)).to(DEVICE), LAYOUTS[layout](2 * teacher.to(teacher_dtype)).to(DEVICE)
    )


def doubles(*tensors):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in tensors]


def assert_near(result, truth, scale=1.0):
    """Errors as a share of the largest value."""
    assert result.shape == truth.shape and result.dtype in TOLERANCE
    if truth.numel():
        error = (result.double() - truth).abs().max()
        assert error <= scale * TOLERANCE[result.dtype] * truth.abs().max(), f"error {error:.3e} of {truth.abs().max():.3e}"


def check_loss(student, teacher, standardize=True, loose=1.0):
    """Without and with statistics, without and with gradient."""
    nothing = (None, None, None)
    loss, gradient = reference.channel_attention_loss(*doubles(student, teacher), *nothing, standardize, True)
    for statistics in (nothing, kernels.channel_attention_statistics(teacher)):
        ours, slope = kernels.channel_attention_loss(student, teacher, *statistics, standardize, True)
        assert_near(ours, loss, loose)
        assert_near(slope, gradient, loose)
        assert slope.dtype == student.dtype and slope.is_contiguous(memory_format=torch.channels_last)
        alone, nothing_else = kernels.channel_attention_loss(student, teacher, *statistics, standardize, False)
        assert torch.equal(alone, ours) and nothing_else.shape == (0,)


def check_projection(student, teacher, standardize=True):
    projected = kernels.channel_attention(student, teacher, standardize)
    assert_near(projected, reference.channel_attention(*doubles(student, teacher), standardize))
    assert projected.dtype == student.dtype and projected.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn(student.shape).to(student)
    truth = reference.channel_attention_backward(*doubles(grad, student, teacher), standardize)
    gradient = kernels.channel_attention_backward(grad, student, teacher, standardize)
    if truth.abs().max() > 0:
        assert_near(gradient, truth, 2.0)
    assert gradient.dtype == student.dtype


@pytest.mark.parametrize("case", CASES)
def test_accuracy(case):
    maps = make_maps(case)
    check_loss(*maps)
    check_projection(*maps)


SIZES = {
    "sweeps": {"at_once": 0, "tile": 32},
    "at once": {"at_once": 1, "block_columns": 64},
    "at once, in parts": {"at_once": 1, "block_columns": 16},
}


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("case", ["wide", "wide bfloat16"])
def test_kernels_of_the_loss(case, sizes, standardize):
    with _tuned.forced("channel_attention_loss", {**SIZES[sizes], "block_rows": 16}):
        check_loss(*make_maps(case), standardize=standardize)


@pytest.mark.parametrize("case", ["wide", "wide bfloat16"])
def test_projection_without_standardisation(case):
    check_projection(*make_maps(case), standardize=False)


@pytest.mark.parametrize("case", ["wide", "wide bfloat16"])
def test_statistics(case):
    _, teacher = make_maps(case)
    truth = reference.channel_attention_statistics(teacher.double())
    for ours, true in zip(kernels.channel_attention_statistics(teacher), truth, strict=True):
        assert ours.dtype == FLOAT
        assert_near(ours, true)


def test_accuracy_far_from_zero():
    student, teacher = make_maps("wide")
    maps = student * 0.1 + 100, teacher * 0.1 + 99
    check_loss(*maps, loose=100)  # PyTorch's own errors are about 100 times those near zero
    check_projection(*maps)


@pytest.mark.parametrize("layout", ["nchw", "sliced", "expanded_images"])
def test_layouts(layout):
    student, teacher = make_maps((2, 5, 4, 3, 4, FLOAT, BFLOAT), layout)
    check_loss(student, teacher)
    check_projection(student, teacher)


@pytest.mark.parametrize("of_teacher", [False, True])
def test_nan_stays_where_it_belongs(of_teacher):
    maps = make_maps((2, 5, 4, 3, 4, FLOAT, FLOAT))
    maps[of_teacher][1, 2, 1, 1] = torch.nan
    loss, gradient = kernels.channel_attention_loss(*maps, None, None, None, True, True)
    assert loss.isnan()
    truth = reference.channel_attention_loss(*maps, None, None, None, True, True)[1]
    assert torch.equal(gradient.isnan(), truth.isnan())


def test_empty_batch():
    maps = make_maps((0, 3, 4, 2, 2, FLOAT, FLOAT))
    loss, gradient = kernels.channel_attention_loss(*maps, *kernels.channel_attention_statistics(maps[1]), True, True)
    assert loss.isnan() and loss.dtype == FLOAT and gradient.shape == maps[0].shape
    assert kernels.channel_attention(*maps, True).shape == maps[0].shape
    assert kernels.channel_attention_backward(maps[0], *maps, True).shape == maps[0].shape
    assert kernels.channel_attention_loss_backward(loss, maps[0]).shape == maps[0].shape


def test_same_bits_twice():
    maps = make_maps((5, 20, 7, 4, 5, FLOAT, FLOAT))
    runs = [kernels.channel_attention_loss(*maps, None, None, None, True, True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
def test_the_gradient_is_scaled(layout, dtype):
    gradient = LAYOUTS[layout](torch.randn(3, 5, 7, 11).to(dtype)).to(DEVICE)
    slope = torch.tensor(-1.7, device=DEVICE)
    scaled = kernels.channel_attention_loss_backward(slope, gradient)
    assert_near(scaled, slope.double() * gradient.double(), 0.5)
    assert scaled.stride() == torch.empty_like(gradient).stride()


def test_says_why_not():
    student, teacher = make_maps((1, 3, 4, 2, 2, FLOAT, FLOAT))
    rest = (None, None, None, True, True)
    assert kernels.why_not("channel_attention_loss", student, teacher, *rest) == []
    assert "torch.float64" in kernels.why_not("channel_attention_loss", student.double(), teacher, *rest)[0]
    assert "6000 channels" in kernels.why_not("channel_attention_statistics", teacher.repeat(1, 1500, 1, 1))[0]
    assert "shape" in kernels.why_not("channel_attention_backward", student, student, teacher[..., 1:], True)[0]
    assert reasons("channel_attention_statistics", teacher) == {"triton": [], "reference": []}
