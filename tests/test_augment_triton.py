"""The Triton launcher of augment against the reference, bit for bit: interpreted on the CPU, compiled where there is a GPU."""

import pytest
import torch

from odn_fast.kernels import _tuned
from odn_fast.kernels import augment as kernels
from odn_fast.reference import augment as reference
from test_augment import SETTINGS, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"BLOCK": 64, "num_warps": 1, "num_stages": 1}  # several tiles, of rows and of columns


def check_bits(inputs, *settings):
    expected = reference.augment(*inputs, *settings)
    moved = [None if tensor is None else tensor.to(DEVICE) for tensor in inputs]
    assert kernels.why_not("augment", *moved, *settings) == []
    y = kernels.augment(*moved, *settings)
    assert y.dtype == settings[2] and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.cpu(), expected)


@pytest.mark.parametrize("padding, flip", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["odd", "digits"])
def test_bits(shape, dtype, padding, flip):
    check_bits(make_inputs(shape, count=4), padding, flip, dtype)


@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced", "expanded_images"])
def test_layouts(layout):
    check_bits(make_inputs("odd", layout, count=3), 2, True, torch.float32)


@pytest.mark.parametrize("shape", [(3, 3, 9, 10), (2, 17, 4, 5), (2, 1, 1, 150), (2, 2, 150, 1), (2, 70, 2, 2)], ids=str)
def test_tiles(shape):
    with _tuned.forced("augment", SMALL):
        check_bits(make_inputs(shape, count=2), 1, True, torch.float32)


def test_every_choice_of_blocks():
    for choice in kernels.candidates((3,)):
        with _tuned.forced("augment", choice):
            check_bits(make_inputs((2, 3, 40, 30), count=1), 4, True, torch.float32)


def test_unaligned_tensors():
    """Of any alignment, also after a launch with aligned ones."""
    images, index, scale, shift, key = make_inputs(count=4)
    check_bits([images, index, scale, shift, key], 2, True, torch.float32)
    sliced = [torch.cat([vector[:1], vector])[1:] for vector in (index, scale, shift, key)]
    check_bits([images.flatten()[1:211].view(2, 3, 7, 5), sliced[0] % 2, *sliced[1:]], 2, True, torch.float32)


@pytest.mark.parametrize("seed, epoch", [(0, 0), (-1, -1), (2**63 - 1, 1), (1 << 40, 1 << 33)])
def test_keys(seed, epoch):
    check_bits(make_inputs("digits", count=9, seed=seed, epoch=epoch), 4, True, torch.float32)


def test_empty_batch():
    images, index, scale, shift, key = make_inputs(count=0)
    check_bits([images, index, scale, shift, key], 2, True, torch.bfloat16)
    check_bits([images[:0], index, scale, shift, None], 0, False, torch.float32)


def test_an_image_that_is_not_there_is_not_a_number():
    inputs = [tensor.to(DEVICE) for tensor in make_inputs(count=5)]
    right = kernels.augment(*inputs, 2, True, torch.float32)
    for wrong in (-1, 6, 2**40):
        inputs[1][3] = wrong
        y = kernels.augment(*inputs, 2, True, torch.float32)
        assert y[3].isnan().all() and torch.equal(y[:3], right[:3]) and torch.equal(y[4:], right[4:])


def test_reasons():
    def reasons(images, index, scale, shift, key, dtype=torch.float32):
        return kernels.why_not("augment", images, index, scale, shift, key, 4, True, dtype)

    inputs = [tensor.to(DEVICE) for tensor in make_inputs()]
    images, index, scale, shift, key = inputs
    assert reasons(*inputs) == reasons(*inputs, dtype=torch.bfloat16) == []
    assert "dtype is torch.float64" in reasons(*inputs, dtype=torch.float64)[0]
    assert "scale is torch.float64" in reasons(images, index, scale.double(), shift, key)[0]
    assert "the batch has 2625000000 elements" in reasons(images, index[:1].expand(25_000_000), *inputs[2:])[0]
    far = torch.empty_strided((1, 3, 2, 2), (1, 1 << 30, 1, 1), dtype=torch.uint8, device="meta")
    assert "the Triton kernels take at most" in reasons(far, *inputs[1:])[0]


@pytest.mark.gpu
def test_a_captured_graph_goes_from_epoch_to_epoch():
    """index and key are read at every replay; `key[1] += 1` can be part of the graph."""
    images, index, scale, shift, key = (tensor.cuda() for tensor in make_inputs((50, 3, 32, 32), count=20, epoch=0))
    y = kernels.augment(images, index, scale, shift, key, 4, True, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        key[1] += 1
        y = kernels.augment(images, index, scale, shift, key, 4, True, torch.bfloat16)
    for epoch in (1, 2, 3):
        index.copy_(torch.randperm(50, device="cuda")[:20])
        graph.replay()
        assert key[1].item() == epoch
        inputs = [tensor.cpu() for tensor in (images, index, scale, shift, key)]
        assert torch.equal(y.cpu(), reference.augment(*inputs, 4, True, torch.bfloat16))


@pytest.mark.gpu
def test_more_than_four_gigabytes_of_images():
    """The place of an image takes 64 bits."""
    images = torch.randint(0, 256, (1_500_000, 3, 32, 32), dtype=torch.uint8, device="cuda")
    index = torch.tensor([1_499_999, 0, 1_398_101, 699_051], device="cuda")
    scale, shift, key = torch.rand(3, device="cuda"), torch.randn(3, device="cuda"), torch.tensor([1, 2], device="cuda")
    y = kernels.augment(images, index, scale, shift, key, 4, True, torch.float32)
    assert torch.equal(y, reference.augment(images, index, scale, shift, key, 4, True, torch.float32))
