"""augment: every implementation against a plain loop over images, bit for bit, and as a citizen of PyTorch's dispatcher."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cases import FLOATING, GPU, LAYOUTS, ON_CPU, ON_GPU, OPCHECK, autocast, names_device
from odn_fast.data.dataset import Normalisation
from odn_fast.ops import augment, scale_and_shift
from odn_fast.reference import augment as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

op = torch.ops.odn_fast.augment.default

SHAPES = {  # of the resident set
    "odd": (6, 3, 7, 5),
    "digits": (9, 1, 8, 8),
    "one_pixel": (3, 1, 1, 1),
    "one_row": (4, 3, 1, 9),
    "one_column": (4, 2, 9, 1),
    "one_image": (1, 3, 6, 33),
    "channels": (3, 17, 5, 4),
    "bands": (2, 3, 140, 131),  # more than one band of rows, or tile
    "long_rows": (2, 1, 2, 17000),
}
SETTINGS = {"none": (0, False), "crop": (4, False), "flip": (0, True), "both": (2, True), "beyond": (40, True)}


def resident(shape="odd", layout="nchw"):
    """Random bytes in one of LAYOUTS, with 255 where the layout leaves gaps."""
    laid = LAYOUTS[layout](torch.randint(0, 256, SHAPES.get(shape, shape)).float())
    memory = laid.as_strided((laid.untyped_storage().nbytes() // 4,), (1,), 0).nan_to_num(255).to(torch.uint8)
    return memory.as_strided(laid.shape, laid.stride(), laid.storage_offset())


def make_inputs(shape="odd", layout="nchw", count=9, seed=-3, epoch=5):
    """images, index, scale, shift, key."""
    images = resident(shape, layout)
    channels = images.shape[1]
    index = torch.randint(0, len(images), (count,))
    return [images, index, 0.001 + torch.rand(channels), torch.randn(channels), torch.tensor([seed, epoch])]


def words(seed, epoch, sample):
    """Philox4x32-10 in Python's integers, as its paper writes it."""
    state = [half for value in (sample, epoch) for half in (value & reference.WORD, value >> 32 & reference.WORD)]
    keys = [seed & reference.WORD, seed >> 32 & reference.WORD]
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = divmod(0xD2511F53 * state[0], 2**32), divmod(0xCD9E8D57 * state[2], 2**32)
        state = [high_b ^ state[1] ^ keys[0], low_b, high_a ^ state[3] ^ keys[1], low_a]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return state


def plain(images, index, scale, shift, key=None, padding=0, flip=False, dtype=torch.float32):
    """One image after the other, on the CPU."""
    images, scale, shift = (tensor.cpu() for tensor in (images, scale, shift))
    height, width = images.shape[2:]
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    batch = []
    for sample in index.tolist():
        pixels = images[sample]
        if padding or flip:
            row, column, mirror, _ = words(*key.tolist(), sample)
            row, column = ((2 * padding + 1) * word // 2**32 for word in (row, column))
            pixels = F.pad(pixels, (padding,) * 4)[:, row : row + height, column : column + width]
            pixels = pixels.flip(2) if flip and mirror >= 2**31 else pixels
        product = pixels.to(arithmetic) * scale.to(arithmetic)[:, None, None]
        batch.append((product + shift.to(arithmetic)[:, None, None]).to(dtype))
    return torch.stack(batch) if batch else torch.empty(0, *images.shape[1:], dtype=dtype)


def check_bits(inputs, *settings):
    y, expected = augment(*inputs, *settings), plain(*inputs, *settings)
    assert y.dtype == expected.dtype and y.device == inputs[0].device
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.cpu(), expected)


@pytest.mark.parametrize("padding, flip", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bits(implementation, layout, dtype, shape, padding, flip):
    check_bits(make_inputs(shape, layout), padding, flip, dtype)


@pytest.mark.parametrize("padding, flip", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", ["odd", "digits", "channels"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(implementation, layout, shape, padding, flip):
    check_bits(make_inputs(shape, layout), padding, flip)


def test_strided_vectors(implementation):
    images, index, scale, shift, key = make_inputs()
    vectors = [torch.stack([vector, vector], 1)[:, 1] for vector in (index, scale, shift, key)]
    check_bits([images, *vectors], 4, True)
    check_bits([images, index[:1].expand(7), scale[:1].expand(3), shift[:1].expand(3), key[:1].expand(2)], 4, True)
    check_bits([images[1:, :, 1:, 1:], index[1:] % 5, scale, shift, key], 4, True)  # of any alignment


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_scale_and_shift_in_float64(implementation, dtype):
    images, index, scale, shift, key = make_inputs()
    check_bits([images, index, scale.double(), shift, key], 1, True, dtype)
    check_bits([images, index, scale.double().mul_(1 / 3), shift.double().mul_(1 / 3), key], 1, True, dtype)


@pytest.mark.parametrize("shape", [(7, 3, 9, 6), (7, 1, 28, 28)], ids=str)
@pytest.mark.parametrize("one", [255, 16])
def test_evaluation_is_normalisation(implementation, shape, one):
    mean, std = (0.4914, 0.4822, 0.4465)[: shape[1]], (0.2470, 0.2435, 0.2616)[: shape[1]]
    images, index = resident(shape), torch.tensor([3, 3, 0, 6, 1])
    y = augment(images, index, *scale_and_shift(mean, std, one))
    assert torch.equal(y, Normalisation(one, mean, std)(images[index]))
    expected = (images[index].double() / one - torch.tensor(mean)[:, None, None].double()) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=1e-6)


def test_numbers_that_are_not_finite(implementation):
    images, index, scale, shift, _ = make_inputs()
    images[0, 0, 0, 0], scale[0], scale[1], shift[2] = 0, float("inf"), float("nan"), float("-inf")
    inputs = [images, torch.zeros_like(index), scale, shift]
    torch.testing.assert_close(augment(*inputs).cpu(), plain(*inputs), equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 4, 5)], ids=["empty_set", "empty_batch"])
@pytest.mark.parametrize("padding, flip", [(0, False), (2, True)])
def test_empty(implementation, shape, padding, flip):
    scale, key = torch.ones(3), torch.tensor([0, 0])
    empty = torch.empty(0, dtype=torch.int64)
    y = augment(torch.empty(shape, dtype=torch.uint8), empty, scale, scale, key, padding, flip, torch.bfloat16)
    assert y.shape == (0, 3, 4, 5) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [-1, 6, 2**40, -(2**63)])
@pytest.mark.parametrize("padding, flip", [(0, False), (2, True)])
def test_an_index_outside_the_set(implementation, wrong, padding, flip):
    inputs = make_inputs(seed=1)
    right = augment(*inputs, padding, flip)
    inputs[1][4] = wrong
    if implementation not in GPU:
        with pytest.raises(ValueError, match=re.escape(f"index[4] is {wrong}, expected an image in [0, 6)")):
            augment(*inputs, padding, flip)
    else:
        y = augment(*inputs, padding, flip)
        assert y[4].isnan().all() and torch.equal(y[:4], right[:4]) and torch.equal(y[5:], right[5:])


# ---- randomness


VECTORS = {  # counter, key, result: of the authors' Random123 library
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((reference.WORD,) * 4, (reference.WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("counter, key, expected", VECTORS.values(), ids=VECTORS)
def test_philox_is_the_published_one(counter, key, expected):
    found = reference.philox([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
    assert tuple(word.item() for word in found) == expected
    sample, epoch, seed = (low + (high << 32) for low, high in (counter[:2], counter[2:], key))
    assert tuple(words(seed, epoch, sample)) == expected


@pytest.mark.parametrize("padding", [1, 4])
def test_crops_and_flips_are_uniform(padding):
    """Chi-squared over (row, column, flip), and over what follows what in the set: both within five deviations."""
    count, places = 100_000, 2 * padding + 1
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        row, column, mirror = reference.draw(torch.arange(count), torch.tensor([seed, epoch]), padding)
        cells = (row * places + column) * 2 + mirror
        for of, cell_count in ((cells, 2 * places**2), (row[1:] * places + row[:-1], places**2), (mirror[1:] * 2 + mirror[:-1], 4)):
            expected = len(of) / cell_count
            squares = ((torch.bincount(of, minlength=cell_count) - expected) ** 2 / expected).sum().item()
            freedom = cell_count - 1
            assert abs(squares - freedom) < 5 * (2 * freedom) ** 0.5


def test_an_image_does_not_depend_on_its_batch(implementation):
    inputs = make_inputs("digits")
    inputs[1] = torch.arange(9)
    y = augment(*inputs, 4, True)
    order = torch.tensor([7, 2, 2, 0, 8])
    assert torch.equal(augment(inputs[0], order, *inputs[2:], 4, True), y[order])
    assert torch.equal(augment(inputs[0], order[3:4], *inputs[2:], 4, True), y[:1])


def test_every_epoch_and_seed_is_another(implementation):
    """Also where they differ only beyond 32 bits."""
    inputs = make_inputs((64, 1, 12, 12), count=0)
    inputs[1] = torch.arange(64)
    keys = list(itertools.product((0, 1, 2**32, -1), repeat=2))
    batches = [augment(*inputs[:4], torch.tensor(key), 4, True) for key in keys]
    for first, second in itertools.combinations(batches, 2):
        same = (first == second).flatten(1).all(1).sum().item()
        assert same <= 6  # 64 / 162 are expected
    assert torch.equal(batches[3], augment(*inputs[:4], torch.tensor(keys[3]), 4, True))


def test_the_key_is_not_read_where_nothing_is_random(implementation):
    inputs = make_inputs()
    assert torch.equal(augment(*inputs), augment(*inputs[:4]))


def test_same_bits_with_any_number_of_threads(implementation):
    inputs = make_inputs((40, 3, 32, 32), count=70)
    expected = augment(*inputs, 4, True)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(augment(*inputs, 4, True), expected)


# ---- the dispatcher


def test_autocast_changes_nothing(implementation):
    inputs = make_inputs()
    with autocast(torch.bfloat16):
        y = augment(*inputs, 4, True)
    assert y.dtype == torch.float32 and torch.equal(y, augment(*inputs, 4, True))


# What opcheck asks does not depend on the instruction set.
@pytest.mark.parametrize("implementation", [*ON_CPU[:2], *ON_GPU], indirect=True)
@pytest.mark.parametrize("padding, flip, dtype", [(0, False, torch.float32), (4, True, torch.bfloat16)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(implementation, layout, padding, flip, dtype):
    utilities = OPCHECK if layout in ("nchw", "channels_last") else OPCHECK[:3]  # the last is slow
    torch.library.opcheck(op, (*make_inputs(layout=layout), padding, flip, dtype), test_utils=utilities)


@pytest.mark.parametrize("shape, count", [("one_pixel", 2), ("digits", 1), ("odd", 0)])
def test_opcheck_edges(shape, count):
    *inputs, key = make_inputs(shape, count=count)
    torch.library.opcheck(op, (*inputs, key, 1, True, torch.float64), test_utils=OPCHECK)
    torch.library.opcheck(op, (*inputs, None, 0, False, torch.float32), test_utils=OPCHECK)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    inputs = make_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: 2 * augment(*inputs, 4, True), fullgraph=True, backend=backend)
    assert torch.equal(compiled(*inputs), 2 * augment(*inputs, 4, True))


def test_export_sees_one_op():
    class Layer(torch.nn.Module):
        def forward(self, images, index, scale, shift, key):
            return augment(images, index, scale, shift, key, 4, True)

    inputs = make_inputs()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Layer(), tuple(inputs), dynamic_shapes=(None, {0: batch}, None, None, None))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(op) == 1
    inputs[1] = inputs[1][:4]
    assert torch.equal(program.module()(*inputs), augment(*inputs, 4, True))


def test_it_counts_no_flops():
    with FlopCounterMode(display=False) as counter:
        augment(*make_inputs(), 4, True)
    assert counter.get_total_flops() == 0 and op._overloadpacket in set(counter.flop_registry)


# ---- errors


# What to change among the arguments, and what is said of it.
BAD_INPUTS = {
    "flat images": ({"images": lambda t: t[0]}, "images has shape (3, 7, 5), expected (M, C, H, W)"),
    "no channels": ({"images": lambda t: t[:, :0]}, "images has shape (6, 0, 7, 5), expected (M, C, H, W) with C, H and W"),
    "no rows": ({"images": lambda t: t[:, :, :0]}, "images has shape (6, 3, 0, 5)"),
    "images of floats": ({"images": lambda t: t.float()}, "images of shape (6, 3, 7, 5) has dtype torch.float32, expected torch.uint8"),
    "map of indices": ({"index": lambda t: t[:, None]}, "index has shape (9, 1), expected (N,)"),
    "short indices": ({"index": lambda t: t.int()}, "index of shape (9,) has dtype torch.int32, expected torch.int64"),
    "index on meta": ({"index": lambda t: t.to("meta")}, "index of shape (9,) is on meta, expected cpu as images"),
    "one scale": ({"scale": lambda t: t[:1]}, "scale has shape (1,), expected (3,)"),
    "rounded scale": ({"scale": lambda t: t.bfloat16()}, "scale of shape (3,) has dtype torch.bfloat16, expected torch.float32"),
    "shift map": ({"shift": lambda t: t[:, None]}, "shift has shape (3, 1), expected (3,)"),
    "shift on meta": ({"shift": lambda t: t.to("meta")}, "shift of shape (3,) is on meta, expected cpu as images"),
    "half a key": ({"key": lambda t: t[:1]}, "key has shape (1,), expected (2,)"),
    "floating key": ({"key": lambda t: t.double()}, "key of shape (2,) has dtype torch.float64, expected torch.int64"),
    "no key": ({"key": lambda _: None}, "key is None, expected (2,) int64"),
    "negative padding": ({"padding": lambda _: -1}, "padding is -1, expected 0 to 1048576"),
    "endless padding": ({"padding": lambda _: 2**40}, "padding is 1099511627776, expected 0 to 1048576"),
    "half precision": ({"dtype": lambda _: torch.float16}, "dtype is torch.float16, expected torch.float32, torch.bfloat16"),
}


@pytest.mark.parametrize("change, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_raise(implementation, change, message):
    names = ("images", "index", "scale", "shift", "key", "padding", "flip", "dtype")
    arguments = dict(zip(names, (*make_inputs(), 4, True, torch.float32), strict=True))
    arguments.update({name: function(arguments[name]) for name, function in change.items()})
    with pytest.raises(ValueError, match=re.escape(names_device(message))):
        augment(**arguments)
    with pytest.raises(ValueError):
        op(*arguments.values())


def test_scale_and_shift_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="mean has 1 numbers and std 2, expected one of each a channel"):
        scale_and_shift([0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="expected no zero among them"):
        scale_and_shift([0.5], [0.0])
