"""exit_heads in Triton against float64; the kernels run interpreted where there is no GPU."""

import itertools
import math

import pytest
import torch

from cases import LAYOUTS, assert_accurate
from odn_fast.kernels import _tuned, exit_heads as kernels
from odn_fast.ops import _choose
from odn_fast.reference import exit_heads as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# name: batch, classes, (C, H, W) of every depth
SHAPES = {
    "odd": (3, 10, [(3, 7, 5), (17, 4, 4), (1, 3, 9)]),
    "wide": (2, 12, [(520, 2, 3), (72, 1, 1)]),
    "one_of_everything": (1, 1, [(1, 1, 1)]),
}


def make_inputs(shape="odd", dtype=torch.float32, parameters=torch.float32, layout="channels_last"):
    batch, classes, maps = SHAPES[shape] if isinstance(shape, str) else shape
    features = [LAYOUTS[layout](torch.randn(batch, *size).relu_().to(DEVICE, dtype)) for size in maps]
    weights = [torch.randn(classes, c).div_(c**0.5).to(DEVICE, parameters) for c, _, _ in maps]
    biases = [torch.randn(classes).to(DEVICE, parameters) for _ in maps]
    return features, weights, biases, torch.randint(classes, (batch,)).to(DEVICE)


def run(module, inputs, truth=False):
    """All results of both launchers, or references, as one list; in float64 from the same rounded values if `truth`."""
    *lists, target = inputs
    features, weights, biases = [[x.double() if truth else x for x in tensors] for tensors in lists]
    losses, correct, pooled, logit_gradients = module.exit_heads(features, weights, biases, target)
    slopes = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype, device=DEVICE)
    positions = [feature.shape[2] * feature.shape[3] for feature in features]
    gradients = module.exit_heads_backward(slopes, pooled, logit_gradients, weights, positions, features[0].dtype)
    return [losses, correct, pooled, logit_gradients, *gradients[0], *gradients[1], gradients[2]]


def check(inputs):
    results, plain, truth = run(kernels, inputs), run(reference, inputs), run(reference, inputs, truth=True)
    for result, unfused, true in zip(results, plain, truth, strict=True):
        assert result.dtype == unfused.dtype
        if result.dtype == torch.int64:
            assert torch.equal(result, true)
        else:
            assert_accurate(result, unfused, true, torch.float32)
    return results


@pytest.mark.parametrize("dtypes", list(itertools.product((torch.float32, torch.bfloat16), repeat=2)), ids=str)
def test_accuracy(dtypes):
    check(make_inputs("odd", *dtypes))


@pytest.mark.parametrize("shape", ["wide", "one_of_everything"])
def test_accuracy_of_other_shapes(shape):
    check(make_inputs(shape, torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    features, weights, biases, target = make_inputs(layout=layout)
    weights = [weight.t().contiguous().t() for weight in weights]
    biases = [bias[:1].expand(bias.shape) for bias in biases]
    check((features, weights, biases, target.repeat_interleave(2)[::2]))


@pytest.mark.parametrize("stages", [1, 3])
def test_sums_over_several_blocks(stages):
    """Of positions, channels, classes and images."""
    forward = {"TILE": 4096, "STAGES": stages, "WEIGHT_TILE": 256}
    backward = {"CHANNELS": 16, "CLASSES": 16, "IMAGES": 16}
    with _tuned.forced("exit_heads_forward", forward), _tuned.forced("exit_heads_backward", backward):
        check(make_inputs((17, 20, [(24, 9, 8)])))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_large_heads_in_several_launches(dtypes, monkeypatch):
    monkeypatch.setattr(kernels, "LARGEST_FUSED", 0)
    check(make_inputs("odd", *dtypes))


def test_slopes_may_be_expanded():
    """As the gradient of a sum is."""
    inputs = make_inputs()
    features, weights, *_ = inputs
    _, _, pooled, logit_gradients = kernels.exit_heads(*inputs)
    arguments = (pooled, logit_gradients, weights, [35, 16, 27], torch.float32)
    one = torch.tensor(0.5, device=DEVICE).expand(3)
    expanded = kernels.exit_heads_backward(one, *arguments)
    dense = kernels.exit_heads_backward(one.contiguous(), *arguments)
    for a, b in zip((*expanded[0], *expanded[1], expanded[2]), (*dense[0], *dense[1], dense[2]), strict=True):
        assert torch.equal(a, b)


def test_same_bits_twice():
    inputs = make_inputs()
    assert all(torch.equal(a, b) for a, b in zip(run(kernels, inputs), run(kernels, inputs), strict=True))


def test_depths_together_equal_depths_alone():
    features, weights, biases, target = make_inputs("wide")
    together = kernels.exit_heads(features, weights, biases, target)
    for depth in range(len(features)):
        alone = kernels.exit_heads(features[depth : depth + 1], weights[depth : depth + 1], biases[depth : depth + 1], target)
        for a, b in zip((0, 1, 3), alone[:2] + alone[3:], strict=True):
            assert torch.equal(together[a][depth], b[0])


def test_ties_and_nan_rows():
    features, weights = [torch.zeros(4, 2, 3, 3, device=DEVICE)], [torch.ones(5, 2, device=DEVICE)]
    bias = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0], device=DEVICE)
    target = torch.tensor([1, 2, 1, 0], device=DEVICE)
    assert kernels.exit_heads(features, weights, [bias], target)[1].tolist() == [2]
    bias[4] = torch.nan
    assert kernels.exit_heads(features, weights, [bias], target)[1].tolist() == [0]
    bias[0] = torch.nan
    assert kernels.exit_heads(features, weights, [bias], target)[1].tolist() == [0]
    assert kernels.exit_heads(features, weights, [torch.full_like(bias, -torch.inf)], target)[1].tolist() == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_features_propagate(value):
    inputs = make_inputs()
    inputs[0][1][2, 3, 1, 1] = value
    for result, plain in zip(run(kernels, inputs), run(reference, inputs), strict=True):
        assert torch.equal(result.isfinite(), plain.isfinite())


def test_huge_logits_do_not_overflow():
    features, weights, biases, target = make_inputs()
    check((features, [1e4 * weight for weight in weights], biases, target))


def test_targets_that_are_no_class_harm_no_other_image():
    features, weights, biases, target = make_inputs()
    expected = kernels.exit_heads(features, weights, biases, target)
    target[0], target[2] = -1, 10
    results = kernels.exit_heads(features, weights, biases, target)
    assert torch.equal(results[3][:, 1], expected[3][:, 1])
    assert (results[1] <= 1).all()


def test_empty_batch():
    results = run(kernels, make_inputs((0, 10, [(3, 4, 4), (5, 2, 2)])))
    expected = run(reference, make_inputs((0, 10, [(3, 4, 4), (5, 2, 2)])))
    for result, plain in zip(results, expected, strict=True):
        torch.testing.assert_close(result, plain, equal_nan=True)


def test_map_without_positions_is_nan_as_a_mean_is():
    assert kernels.exit_heads(*make_inputs((2, 10, [(3, 0, 4)])))[0].isnan().all()


def test_reasons():
    features, weights, biases, target = make_inputs()
    assert _choose.reasons("exit_heads", features, weights, biases, target) == {"triton": [], "reference": []}
    doubles = kernels.why_not("exit_heads", [x.double() for x in features], weights, biases, target)
    assert doubles == ["features is torch.float64; the Triton kernels take torch.float32 and torch.bfloat16"]
    mixed = kernels.why_not("exit_heads", features, [weights[0].bfloat16(), *weights[1:]], biases, target)
    assert mixed == ["weights has several dtypes; the Triton kernels take one"]
    many = kernels.why_not("exit_heads", 65 * features[:1], 65 * weights[:1], 65 * biases[:1], target)
    assert many == ["there are 65 depths; the Triton kernels take at most 64"]
    large = [torch.zeros((), device=DEVICE).expand(2**20, 512, 1, 1)] * 4  # each can be indexed, all their means cannot
    targets = target[:1].expand(2**20)
    assert kernels.why_not("exit_heads", large[:3], 3 * weights[:1], 3 * biases[:1], targets) == []
    assert kernels.why_not("exit_heads", large, 4 * weights[:1], 4 * biases[:1], targets) == [
        "there are 2147483648 pooled channels of all depths and images; the Triton kernels index at most 2147483647"
    ]
    _, _, pooled, logit_gradients = reference.exit_heads(features, weights, biases, target)
    backward = (torch.ones(3, device=DEVICE), pooled, logit_gradients, weights, [35, 16, 27])
    assert kernels.why_not("exit_heads_backward", *backward, torch.bfloat16) == []
    assert kernels.why_not("exit_heads_backward", *backward, torch.float64) == [
        "feature_dtype is torch.float64; the Triton kernels take torch.float32 and torch.bfloat16"
    ]
