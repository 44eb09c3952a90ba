"""exit_heads: every implementation against float64, and as a citizen of PyTorch's dispatcher."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cases import FLOATING, GPU, LAYOUTS, ON_CPU, OPCHECK, assert_accurate, autocast, names_device
from odn_fast.ops import exit_heads
from odn_fast.reference import exit_heads as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

op = torch.ops.odn_fast.exit_heads.default
backward_op = torch.ops.odn_fast.exit_heads_backward.default

# name: batch, classes, (C, H, W) of every depth
SHAPES = {
    "odd": (5, 10, [(3, 7, 5), (17, 4, 4), (1, 3, 9)]),
    "one_of_everything": (1, 1, [(1, 1, 1)]),
    "resnet": (13, 26, [(64, 28, 28), (130, 7, 7), (256, 1, 1)]),
}


def make_inputs(shape="odd", dtype=torch.float32, layout="channels_last", weight_dtype=None, bias_dtype=None):
    """Features as after a ReLU and heads as a linear layer starts; none requires grad yet."""
    batch, classes, maps = SHAPES[shape] if isinstance(shape, str) else shape
    features = [LAYOUTS[layout](torch.randn(batch, *size).relu_().to(dtype)) for size in maps]
    weights = [torch.randn(classes, c).div_(c**0.5).to(weight_dtype or dtype) for c, _, _ in maps]
    biases = [torch.randn(classes).to(bias_dtype or dtype) for _ in maps]
    return features, weights, biases, torch.randint(classes, (batch,))


def unfused(features, weights, biases, target):
    """The op's first two results by PyTorch's own layers, in the op's dtype of arithmetic."""
    dtype = reference.compute_dtype(features[0])
    losses, correct = [], []
    for feature, weight, bias in zip(features, weights, biases, strict=True):
        logits = F.linear(feature.to(dtype).mean((2, 3)), weight.to(dtype), bias.to(dtype))
        losses.append(F.cross_entropy(logits, target))
        correct.append((logits.argmax(1) == target).sum())
    return torch.stack(losses), torch.stack(correct)


def run(function, inputs, truth=False):
    """(losses, correct, gradients), in float64 from the same rounded values if `truth`."""
    *lists, target = inputs
    lists = [[(x.double() if truth else x.detach()).requires_grad_() for x in tensors] for tensors in lists]
    losses, correct = function(*lists, target)
    slopes = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)  # every depth's loss has a slope of its own
    return losses.detach(), correct, torch.autograd.grad(losses @ slopes, sum(lists, []))


LONG_SUMS = [(2048, 10, [(64, 4, 4)]), (3, 10, [(64, 224, 224)])]  # many images, many positions


def check_accuracy(inputs):
    losses, correct, gradients = run(exit_heads, inputs)
    unfused_losses, _, unfused_gradients = run(unfused, inputs)
    true_losses, true_correct, true_gradients = run(unfused, inputs, truth=True)
    arithmetic = losses.dtype
    assert_accurate(losses, unfused_losses, true_losses, arithmetic)
    assert torch.equal(correct, true_correct)
    for argument, gradient, plain, true in zip(
        sum(inputs[:3], []), gradients, unfused_gradients, true_gradients, strict=True
    ):
        assert gradient.dtype == argument.dtype
        assert_accurate(gradient, plain, true, arithmetic)


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("shape", LONG_SUMS, ids=["images", "positions"])
def test_accuracy_of_long_sums(implementation, layout, shape):
    check_accuracy(make_inputs(shape, torch.float32, layout))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy(implementation, layout, dtype, shape):
    check_accuracy(make_inputs(shape, dtype, layout))


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATING, repeat=3)), ids=str)
def test_mixed_dtypes(implementation, dtypes):
    feature, weight, bias = dtypes
    check_accuracy(make_inputs(dtype=feature, weight_dtype=weight, bias_dtype=bias))


def test_strided_parameters_and_targets(implementation):
    features, weights, biases, target = make_inputs()
    weights = [weight.t().contiguous().t() for weight in weights]
    biases = [bias[:1].expand(bias.shape) for bias in biases]
    check_accuracy((features, weights, biases, target.repeat_interleave(2)[::2]))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gradcheck(implementation, layout):
    features, weights, biases, target = make_inputs((3, 4, [(3, 2, 3), (2, 1, 1)]), torch.float64, layout)
    tensors = [x.requires_grad_() for x in features + weights + biases]

    def losses(*tensors):
        return exit_heads(list(tensors[:2]), list(tensors[2:4]), list(tensors[4:]), target)[0]

    assert torch.autograd.gradcheck(losses, tensors)


def test_one_depth_at_a_time_equals_all_at_once(implementation):
    """Between the blocks or after the backbone: the gradients that reach the blocks are the same."""
    first, second = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1)
    x, target = torch.randn(6, 3, 8, 8).contiguous(memory_format=torch.channels_last), torch.randint(10, (6,))
    weights = [torch.randn(10, 8, requires_grad=True) for _ in range(2)]
    biases = [torch.randn(10, requires_grad=True) for _ in range(2)]
    leaves = [*first.parameters(), *second.parameters(), *weights, *biases]

    one = first(x).relu()
    at_once = exit_heads([one, second(one).relu()], weights, biases, target)
    one = first(x).relu()
    early = exit_heads([one], weights[:1], biases[:1], target)
    late = exit_heads([second(one).relu()], weights[1:], biases[1:], target)
    one_at_a_time = torch.cat([early[0], late[0]])

    if implementation in GPU:  # how sums are split there depends on the number of depths
        torch.testing.assert_close(at_once[0], one_at_a_time)
    else:
        assert torch.equal(at_once[0], one_at_a_time)
    assert torch.equal(at_once[1], torch.cat([early[1], late[1]]))
    for a, b in zip(
        torch.autograd.grad(at_once[0].sum(), leaves), torch.autograd.grad(one_at_a_time.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
def test_empty_batch(implementation, layout):
    features, weights, biases, target = make_inputs((0, 10, [(3, 4, 4), (5, 2, 2)]), layout=layout)
    losses, correct, gradients = run(exit_heads, (features, weights, biases, target))
    expected, _, expected_gradients = run(unfused, (features, weights, biases, target))
    assert losses.isnan().all() and expected.isnan().all()
    assert correct.tolist() == [0, 0]
    for gradient, plain in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, plain, equal_nan=True)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
def test_map_without_positions_is_nan_as_a_mean_is(implementation, layout):
    features, weights, biases, target = make_inputs((2, 10, [(3, 0, 4)]), layout=layout)
    assert exit_heads(features, weights, biases, target)[0].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_non_finite_features_propagate(implementation, layout, value):
    inputs = make_inputs("odd", layout=layout)
    inputs[0][1][2, 3, 1, 1] = value
    losses, correct, gradients = run(exit_heads, inputs)
    expected, _, expected_gradients = run(unfused, inputs)
    assert losses.isnan().tolist() == expected.isnan().tolist() == [False, True, False]
    for gradient, plain in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient.isfinite(), plain.isfinite())


def test_huge_logits_do_not_overflow(implementation):
    features, weights, biases, target = make_inputs()
    check_accuracy((features, [1e4 * weight for weight in weights], biases, target))


def test_ties_and_nan_rows(implementation):
    """The first of equal logits is predicted; a row holding NaN is wrong, even where the target's logit leads."""
    features, weights = [torch.zeros(4, 2, 3, 3)], [torch.ones(5, 2)]
    bias = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])
    target = torch.tensor([1, 2, 1, 0])
    assert exit_heads(features, weights, [bias], target)[1].tolist() == [2]
    bias[4] = torch.nan
    assert exit_heads(features, weights, [bias], target)[1].tolist() == [0]
    bias[0] = torch.nan
    assert exit_heads(features, weights, [bias], target)[1].tolist() == [0]
    assert exit_heads(features, weights, [torch.full((5,), -torch.inf)], target)[1].tolist() == [1]


@pytest.mark.parametrize("shape", [(128, 10, [(64, 14, 14), (200, 7, 7)]), (70001, 3, [(2, 1, 1)])], ids=str)
def test_same_bits_twice_and_with_any_number_of_threads(implementation, shape):
    inputs = make_inputs(shape)
    results = []
    for threads in (2, 2) if implementation == "reference" else (2, 1, 2):  # PyTorch's own kernels: bits depend on threads
        torch.set_num_threads(threads)
        losses, correct, gradients = run(exit_heads, inputs)
        results.append([losses, correct, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast_changes_nothing(implementation):
    """Features stay as they are, head parameters are read as they are, losses stay float32."""
    inputs = make_inputs(dtype=torch.bfloat16, weight_dtype=torch.float32, bias_dtype=torch.float32)
    plain = run(exit_heads, inputs)
    with autocast(torch.bfloat16):
        cast = run(exit_heads, inputs)
    assert cast[0].dtype == torch.float32
    assert torch.equal(plain[0], cast[0]) and torch.equal(plain[1], cast[1])
    assert all(torch.equal(a, b) for a, b in zip(plain[2], cast[2], strict=True))


# What opcheck asks does not depend on the instruction set.
@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["odd", "one_of_everything"])
def test_opcheck(implementation, layout, shape):
    check_op(make_inputs(shape, torch.float32, layout))


@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)], ids=str)
def test_opcheck_mixed_dtypes(implementation, dtypes):
    check_op(make_inputs(dtype=dtypes[0], weight_dtype=dtypes[1]))


@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
def test_opcheck_empty_batch(implementation):
    # Not test_aot_dispatch_dynamic: it takes the losses, NaN and NaN, for different.
    check_op(make_inputs((0, 10, [(3, 4, 4)])), OPCHECK[:3])


def check_op(inputs, utilities=OPCHECK):
    features, weights, biases, target = inputs
    with torch.no_grad():
        losses, _, pooled, logit_gradients = op(*inputs)
    positions = [feature.shape[2] * feature.shape[3] for feature in features]
    slopes = torch.ones_like(losses)
    backward = (slopes, pooled, logit_gradients, weights, positions, features[0].dtype)
    torch.library.opcheck(backward_op, backward, test_utils=utilities)
    for tensor in features + weights + biases:
        tensor.requires_grad_()
    torch.library.opcheck(op, inputs, test_utils=utilities)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    features, weights, biases, target = make_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(exit_heads, fullgraph=True, backend=backend)
    losses, correct, gradients = run(exit_heads, (features, weights, biases, target))
    compiled_losses, compiled_correct, compiled_gradients = run(compiled, (features, weights, biases, target))
    assert torch.equal(losses, compiled_losses) and torch.equal(correct, compiled_correct)
    for gradient, other in zip(gradients, compiled_gradients, strict=True):
        torch.testing.assert_close(gradient, other)


def test_export_sees_one_op():
    class Heads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 10)

        def forward(self, feature, target):
            return exit_heads([feature], [self.head.weight], [self.head.bias], target)

    inputs = (torch.randn(4, 3, 5, 5), torch.randint(10, (4,)))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Heads(), inputs, dynamic_shapes=({0: batch}, {0: batch}))
    assert [node.target for node in program.graph.nodes if node.op == "call_function"].count(op) == 1
    wider = (torch.randn(7, 3, 5, 5), torch.randint(10, (7,)))
    assert program.module()(*wider)[0].isfinite().all()


def test_differentiates_once():
    features, weights, biases, target = make_inputs()
    weights[0].requires_grad_()
    losses, _ = exit_heads(features, weights, biases, target)
    with pytest.raises(RuntimeError, match="exit_heads can be differentiated only once"):
        torch.autograd.grad(losses.sum(), weights[:1], create_graph=True)
    assert torch.autograd.grad(losses.sum(), weights[:1], retain_graph=True)[0].isfinite().all()
    assert torch.autograd.grad(losses.sum(), weights[:1])[0].isfinite().all()


def test_only_what_needs_a_gradient_gets_one():
    features, weights, biases, target = make_inputs()
    biases[1].requires_grad_()
    losses, correct = exit_heads(features, weights, biases, target)
    assert losses.requires_grad and not correct.requires_grad
    losses.sum().backward()
    assert biases[1].grad is not None and biases[0].grad is None and weights[1].grad is None
    assert not exit_heads(features, weights, [bias.detach() for bias in biases], target)[0].requires_grad


def test_flops_equal_the_unfused_ones():
    inputs = make_inputs("resnet")
    counts = []
    for function in (exit_heads, unfused):
        with FlopCounterMode(display=False) as counter:
            run(function, inputs)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


BAD_INPUTS = {
    "no depth": (lambda f, w, b, t: ([], [], [], t), "features is empty"),
    "weights missing": (lambda f, w, b, t: (f, w[:2], b, t), "weights has 2 entries, expected 3"),
    "biases missing": (lambda f, w, b, t: (f, w, b[:1], t), "biases has 1 entries, expected 3"),
    "flat features": (lambda f, w, b, t: ([x.flatten(1) for x in f], w, b, t), r"features[0] has shape (5, 105)"),
    "another batch": (lambda f, w, b, t: ([f[0], f[1][:4], f[2]], w, b, t), "features[1] has shape (4, 17, 4, 4)"),
    "other channels": (lambda f, w, b, t: (f, w[::-1], b, t), "weights[0] has shape (10, 1), expected (10, 3)"),
    "other classes": (lambda f, w, b, t: (f, [w[0], w[1][:9], w[2]], b, t), "weights[1] has shape (9, 17), expected"),
    "no classes": (lambda f, w, b, t: (f, [x[:0] for x in w], b, t), "expected (K, 3) with K >= 1"),
    "weight vector": (lambda f, w, b, t: (f, [w[0][0], *w[1:]], b, t), "weights[0] has shape (3,)"),
    "bias shape": (lambda f, w, b, t: (f, w, [b[0][:, None], *b[1:]], t), "biases[0] has shape (10, 1)"),
    "target shape": (lambda f, w, b, t: (f, w, b, t[:4]), "target has shape (4,), expected (5,)"),
    "half features": (lambda f, w, b, t: ([x.half() for x in f], w, b, t), "has dtype torch.float16"),
    "two feature dtypes": (lambda f, w, b, t: ([f[0], f[1].double(), f[2]], w, b, t), "features[1] has dtype"),
    "integer weights": (lambda f, w, b, t: (f, [x.long() for x in w], b, t), "weights[0] of shape (10, 3) has dtype"),
    "complex biases": (lambda f, w, b, t: (f, w, [x.cfloat() for x in b], t), "biases[0] of shape (10,) has dtype"),
    "int32 target": (lambda f, w, b, t: (f, w, b, t.int()), "has dtype torch.int32, expected torch.int64"),
    "target on meta": (lambda f, w, b, t: (f, w, b, t.to("meta")), "is on meta, expected cpu"),
    "weight on meta": (lambda f, w, b, t: (f, [x.to("meta") for x in w], b, t), "is on meta, expected cpu"),
    "negative target": (lambda f, w, b, t: (f, w, b, t - 100), "target"),
    "target too large": (lambda f, w, b, t: (f, w, b, t + 10), "target"),
}


@pytest.mark.parametrize("change, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_raise(implementation, change, message):
    if implementation in GPU and message == "target":
        pytest.skip("targets are looked at on the CPU alone")
    inputs = change(*make_inputs())
    with pytest.raises(ValueError, match=re.escape(names_device(message))):
        exit_heads(*inputs)
    with pytest.raises(ValueError):  # without the public function's checks
        op(*inputs)


BAD_GRADIENTS = {
    "slopes": lambda g, p, l, w, n, d: (g[:2], p, l, w, n, d),
    "slopes shape": lambda g, p, l, w, n, d: (g[:, None], p, l, w, n, d),
    "narrow pooled": lambda g, p, l, w, n, d: (g, p[:, 1:], l, w, n, d),
    "short pooled": lambda g, p, l, w, n, d: (g, p[1:], l, w, n, d),
    "pooled dtype": lambda g, p, l, w, n, d: (g, p.double(), l, w, n, d),
    "logits shape": lambda g, p, l, w, n, d: (g, p, l[0], w, n, d),
    "fewer classes": lambda g, p, l, w, n, d: (g, p, l[..., 1:], w, n, d),
    "logits dtype": lambda g, p, l, w, n, d: (g, p, l.bfloat16(), w, n, d),
    "weights missing": lambda g, p, l, w, n, d: (g, p, l, w[:2], n, d),
    "wide weight": lambda g, p, l, w, n, d: (g, p, l, [w[1], *w[1:]], n, d),
    "weight vector": lambda g, p, l, w, n, d: (g, p, l, [w[0][0], *w[1:]], n, d),
    "positions missing": lambda g, p, l, w, n, d: (g, p, l, w, n[1:], d),
    "feature dtype": lambda g, p, l, w, n, d: (g, p, l, w, n, torch.float64),
    "integer dtype": lambda g, p, l, w, n, d: (g, p, l, w, n, torch.int32),
    "nothing": lambda g, p, l, w, n, d: (g[:0], p, l, [], [], d),
}


@pytest.mark.parametrize("change", BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_bad_backward_inputs_raise(implementation, change):
    features, weights, biases, target = make_inputs()
    _, _, pooled, logit_gradients = op(features, weights, biases, target)
    arguments = (torch.ones(3), pooled, logit_gradients, weights, [35, 16, 27], torch.float32)
    assert backward_op(*arguments)[2].isfinite().all()
    with pytest.raises(ValueError, match="exit_heads"):
        backward_op(*change(*arguments))
