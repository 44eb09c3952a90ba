"""channel_attention and its loss: every implementation against float64, and as citizens of PyTorch's dispatcher."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cases import FLOATING, LAYOUTS, ON_CPU, OPCHECK, assert_accurate, autocast, names_device
from odn_fast.ops import TeacherStatistics, channel_attention, channel_attention_loss, teacher_statistics
from odn_fast.reference import channel_attention as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ops = torch.ops.odn_fast

# name: batch, (C_s, H, W) of the student, (C_t, H', W') of the teacher
SHAPES = {
    "odd": (3, (17, 7, 5), (3, 7, 5)),
    "one_of_everything": (2, (1, 1, 1), (1, 1, 1)),
    "wide": (6, (3, 5, 9), (70, 5, 9)),
    "many_positions": (2, (16, 32, 32), (16, 32, 32)),
    "many_channels": (3, (130, 8, 8), (64, 8, 8)),
    "larger_teacher": (2, (5, 4, 3), (6, 9, 6)),
    "larger_student": (2, (5, 9, 6), (6, 4, 3)),
    "crossed": (2, (5, 9, 3), (6, 4, 6)),
}


def make_inputs(shape="odd", dtype=torch.float32, layout="channels_last", teacher_dtype=None, teacher_layout=None):
    """A student's and a teacher's map as after a ReLU; none requires grad yet."""
    batch, student, teacher = SHAPES[shape] if isinstance(shape, str) else shape
    return (
        LAYOUTS[layout](torch.randn(batch, *student).relu_().to(dtype)),
        LAYOUTS[teacher_layout or layout](torch.randn(batch, *teacher).mul_(2).relu_().to(teacher_dtype or dtype)),
    )


def unfused_projection(student, teacher, standardize=True):
    """The projected map by PyTorch's own functions, in the op's dtype of arithmetic."""
    dtype = reference.compute_dtype(student, teacher)
    size = [min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    student, teacher = (F.adaptive_avg_pool2d(x.to(dtype), size) for x in (student, teacher))
    q, k = query, key = student.flatten(2), teacher.flatten(2)
    if standardize:
        query, key = ((x - x.mean(2, keepdim=True)) / (x.std(2, correction=0, keepdim=True) + 1e-3) for x in (q, k))
    weights = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(q.shape[2]), 2)
    return (weights @ k).unflatten(2, size), student


def unfused(student, teacher, standardize=True):
    projected, student = unfused_projection(student, teacher, standardize)
    return F.mse_loss(projected, student)


def run(function, inputs, truth=False, **options):
    """(value, student's gradient), in float64 from the same rounded values if `truth`."""
    student, teacher = ((x.double() if truth else x.detach()) for x in inputs)
    student.requires_grad_()
    value = function(student, teacher, **options)
    return value.detach(), torch.autograd.grad(value, student)[0]


def slope(x):
    """A gradient of the projected map, the same in every dtype."""
    return (torch.arange(x.numel()).reshape(x.shape) % 7 / 4 - 0.5).to(x.dtype)


def weighted(project):
    """A scalar of the projected map whose gradient is different everywhere."""

    def scalar(student, teacher, **options):
        projected = project(student, teacher, **options)
        projected = projected[0] if isinstance(projected, tuple) else projected
        return (projected * slope(projected)).sum()

    return scalar


def check_accuracy(inputs, **options):
    plain, true = run(unfused, inputs, **options), run(unfused, inputs, truth=True, **options)
    arithmetic = reference.compute_dtype(*inputs)
    for result in (
        run(channel_attention_loss, inputs, **options),
        *([run(with_statistics, inputs, **options)] if inputs[0].shape[2:] == inputs[1].shape[2:] else []),
    ):
        assert result[0].dtype == arithmetic and result[1].dtype == inputs[0].dtype
        for ours, theirs, truth in zip(result, plain, true, strict=True):
            assert_accurate(ours, theirs, truth, arithmetic)


def with_statistics(student, teacher, **options):
    teacher = teacher.to(reference.compute_dtype(student, teacher))
    return channel_attention_loss(student, teacher, statistics=teacher_statistics(teacher), **options)


def check_projection_accuracy(inputs, **options):
    true, _ = unfused_projection(*(x.double() for x in inputs), **options)
    plain, _ = unfused_projection(*inputs, **options)
    ours = channel_attention(*inputs, **options)
    assert ours.dtype == inputs[0].dtype
    assert_accurate(ours, plain.to(ours.dtype), true, reference.compute_dtype(*inputs))
    gradients = [run(weighted(f), inputs, **options)[1] for f in (channel_attention, unfused_projection)]
    truth = run(weighted(unfused_projection), inputs, truth=True, **options)[1]
    assert_accurate(*gradients, truth, reference.compute_dtype(*inputs))


# In float64 the truth is rounded too, which over many positions is as much as anyone's error.
DTYPES_AND_SHAPES = [
    (dtype, shape) for dtype in FLOATING for shape in SHAPES if (dtype, shape) != (torch.float64, "many_positions")
]


@pytest.mark.parametrize("dtype, shape", DTYPES_AND_SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy(implementation, layout, dtype, shape):
    check_accuracy(make_inputs(shape, dtype, layout))


@pytest.mark.parametrize("dtype, shape", DTYPES_AND_SHAPES, ids=str)
def test_accuracy_of_the_projected_map(implementation, dtype, shape):
    check_projection_accuracy(make_inputs(shape, dtype))


@pytest.mark.parametrize("shape", ["odd", "wide", "many_positions", "larger_teacher"])
def test_accuracy_without_standardisation(implementation, shape):
    inputs = make_inputs(shape)
    check_accuracy(inputs, standardize=False)
    check_projection_accuracy(inputs, standardize=False)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(FLOATING, 2)), ids=str)
def test_mixed_dtypes_and_layouts(implementation, dtypes):
    student, teacher = dtypes
    inputs = make_inputs("wide", student, "sliced", teacher, "nchw")
    check_accuracy(inputs)
    check_projection_accuracy(inputs)


def test_accuracy_far_from_zero(implementation):
    """Channels that hardly vary around a large mean; the loss itself is dominated by the means."""
    student, teacher = make_inputs("many_channels")
    check_accuracy((student * 0.1 + 100, teacher * 0.1 + 99))


@pytest.mark.parametrize("shape", ["wide", "many_positions", "many_channels"])
@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-6])
def test_small_losses_are_accurate(implementation, shape, share):
    """A student close to its projection: its squares nearly cancel in the Gram form of the loss.

    Allowed beyond PyTorch's own error is what rounding the maps themselves once does to the results.
    """
    student, teacher = make_inputs(shape)
    for _ in range(60):  # to the fixed point, then `share` of its squares away
        student = unfused_projection(student, teacher)[0]
    student = student + share**0.5 * student.std() * torch.randn_like(student)
    inputs = student.contiguous(memory_format=torch.channels_last), teacher
    plain, true = run(unfused, inputs), run(unfused, inputs, truth=True)
    squares, eps = student.square().mean(), torch.finfo(torch.float32).eps
    assert true[0] < 3 * share * squares
    for loss, gradient in (run(channel_attention_loss, inputs), run(with_statistics, inputs)):
        assert abs(loss - true[0]) <= 2 * abs(plain[0] - true[0]) + 4 * eps * (true[0] * squares) ** 0.5
        errors = [(x - true[1]).abs().max() for x in (gradient, plain[1])]
        assert errors[0] <= 3 * errors[1] + 4 * eps * 2 / student.numel() * student.abs().max()


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("shape", [(2, (3, 3, 2), (4, 3, 2)), (1, (4, 5, 4), (3, 2, 2))], ids=str)
def test_gradcheck(implementation, shape, standardize):
    student, teacher = make_inputs(shape, torch.float64)
    student = (student + 0.1 * torch.randn_like(student)).requires_grad_()
    for function in (channel_attention, channel_attention_loss):
        assert torch.autograd.gradcheck(lambda q, f=function: Again.apply(f, q, teacher, standardize), [student])


class Again(torch.autograd.Function):
    """Computes the function anew for every backward pass: gradcheck takes several, the loss allows one."""

    @staticmethod
    def forward(ctx, function, student, teacher, standardize):
        ctx.function = lambda q: function(q, teacher, standardize=standardize)
        ctx.save_for_backward(student)
        return ctx.function(student)

    @staticmethod
    def backward(ctx, grad):
        student = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            return None, torch.autograd.grad(ctx.function(student), student, grad)[0], None, None


def test_statistics_are_those_of_the_rows(implementation):
    _, teacher = make_inputs("wide")
    rows = teacher.double().flatten(2)
    mean, std, gram = teacher_statistics(teacher.requires_grad_())
    centred = rows - rows.mean(2, keepdim=True)
    for ours, true in (
        (mean, rows.mean(2)), (std, rows.std(2, correction=0)), (gram, centred @ centred.mT),
        (gram + rows.shape[2] * mean[:, :, None] * mean[:, None, :], rows @ rows.mT),
    ):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, true.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
def test_empty_batch(implementation, layout):
    inputs = make_inputs((0, (3, 4, 4), (5, 4, 4)), layout=layout)
    loss, gradient = run(channel_attention_loss, inputs)
    assert loss.isnan() and run(unfused, inputs)[0].isnan() and gradient.shape == (0, 3, 4, 4)
    assert run(with_statistics, inputs)[0].isnan()
    assert run(weighted(channel_attention), inputs)[1].shape == (0, 3, 4, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("of_teacher", [True, False])
def test_non_finite_values_propagate(implementation, value, of_teacher):
    inputs = make_inputs("many_positions")
    inputs[of_teacher][1, 2, 3, 4] = value
    for options in ({}, {"standardize": False}):
        loss, gradient = run(channel_attention_loss, inputs, **options)
        expected, expected_gradient = run(unfused, inputs, **options)
        assert not loss.isfinite() and not expected.isfinite()
        assert torch.equal(gradient.isfinite(), expected_gradient.isfinite())


def test_huge_logits_do_not_overflow(implementation):
    student, teacher = make_inputs()
    check_accuracy((100 * student, 100 * teacher), standardize=False)


def test_same_bits_twice_and_with_any_number_of_threads(implementation):
    inputs = make_inputs((37, (20, 9, 9), (33, 9, 9)))
    results = []
    for threads in (2, 2) if implementation == "reference" else (2, 1, 2):  # PyTorch's own: bits depend on threads
        torch.set_num_threads(threads)
        functions = (channel_attention_loss, with_statistics, weighted(channel_attention))
        results.append([x for function in functions for x in run(function, inputs)])
        results[-1] += [channel_attention(*inputs), *teacher_statistics(inputs[1])]
        results[-1].pop(4)  # the sum over the projected map is PyTorch's
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", ["odd", "larger_student"])
def test_autocast_changes_nothing(implementation, shape):
    inputs = make_inputs(shape, torch.float32, teacher_dtype=torch.bfloat16)
    plain = [*run(channel_attention_loss, inputs), channel_attention(*inputs)]
    with autocast(torch.bfloat16):
        cast = [*run(channel_attention_loss, inputs), channel_attention(*inputs)]
    assert cast[0].dtype == torch.float32
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, cast, strict=True))


# What opcheck asks does not depend on the instruction set.
@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["odd", "one_of_everything"])
def test_opcheck(implementation, layout, shape):
    check_ops(make_inputs(shape, torch.float32, layout))


@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)], ids=str)
def test_opcheck_mixed_dtypes(implementation, dtypes):
    check_ops(make_inputs(dtype=dtypes[0], teacher_dtype=dtypes[1]))


@pytest.mark.parametrize("implementation", ON_CPU[:2], indirect=True)
def test_opcheck_empty_batch(implementation):
    # Not test_aot_dispatch_dynamic: it takes the losses, NaN and NaN, for different.
    check_ops(make_inputs((0, (3, 4, 4), (5, 4, 4))), OPCHECK[:3])


def check_ops(inputs, utilities=OPCHECK):
    student, teacher = inputs
    statistics = teacher_statistics(teacher.to(reference.compute_dtype(*inputs)))
    grad = slope(student)

    def check(op, *arguments):
        torch.library.opcheck(op.default, arguments, test_utils=utilities)

    check(ops.channel_attention_statistics, teacher)
    check(ops.channel_attention_backward, grad, student, teacher, True)
    check(ops.channel_attention_loss_backward, torch.tensor(0.5), grad)
    check(ops.channel_attention_loss, student, teacher, None, None, None, True, False)
    student.requires_grad_()
    check(ops.channel_attention, student, teacher, True)
    check(ops.channel_attention_loss, student, teacher, None, None, None, True, True)
    check(ops.channel_attention_loss, student, teacher, *statistics, False, True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", [channel_attention_loss, with_statistics, weighted(channel_attention)])
def test_compiles_in_one_graph(backend, function):
    inputs = make_inputs("larger_student" if function is channel_attention_loss else "odd")
    torch._dynamo.reset()
    result = run(torch.compile(function, fullgraph=True, backend=backend), inputs)
    for ours, compiled in zip(run(function, inputs), result, strict=True):
        torch.testing.assert_close(ours, compiled, rtol=1e-4, atol=1e-6)


def test_export_sees_one_op():
    class Distance(torch.nn.Module):
        def forward(self, student, teacher):
            return channel_attention_loss(student, teacher)

    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Distance(), make_inputs(), dynamic_shapes=({0: batch}, {0: batch}))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(ops.channel_attention_loss.default) == 1
    assert program.module()(*make_inputs((7, *SHAPES["odd"][1:]))).isfinite()


def test_differentiates_once():
    student, teacher = make_inputs()
    student.requires_grad_()
    for function in (channel_attention_loss, weighted(channel_attention)):
        with pytest.raises(RuntimeError, match="can be differentiated only once, so create_graph=True"):
            torch.autograd.grad(function(student, teacher), student, create_graph=True)
    loss = channel_attention_loss(student, teacher)
    assert torch.autograd.grad(loss, student, retain_graph=True)[0].isfinite().all()
    with pytest.raises(RuntimeError, match="gives its gradient away in the first backward pass"):
        torch.autograd.grad(loss, student)


def test_the_gradient_is_scaled_and_given_away(implementation):
    student, teacher = make_inputs()
    gradient = run(channel_attention_loss, (student, teacher))[1]
    scaled = run(lambda *inputs: 3 * channel_attention_loss(*inputs), (student, teacher))[1]
    torch.testing.assert_close(scaled, 3 * gradient)
    both = run(lambda *inputs: channel_attention_loss(*inputs) + inputs[0].square().sum(), (student, teacher))[1]
    torch.testing.assert_close(both, gradient + 2 * student)


def test_only_the_student_gets_a_gradient_and_only_if_it_needs_one(implementation):
    student, teacher = make_inputs()
    teacher.requires_grad_()
    assert not channel_attention_loss(student, teacher).requires_grad
    assert not channel_attention(student, teacher).requires_grad
    assert ops.channel_attention_loss(student, teacher, None, None, None, True, False)[1].shape == (0,)
    student.requires_grad_()
    (channel_attention_loss(student, teacher) + channel_attention(student, teacher).sum()).backward()
    assert student.grad is not None and teacher.grad is None
    with torch.no_grad():
        assert not channel_attention_loss(student, teacher).requires_grad


def test_flops_equal_the_unfused_ones():
    inputs = make_inputs("wide")
    for function, plain in ((channel_attention_loss, unfused), (channel_attention, unfused_projection)):
        counts = []
        for f in (function, plain):
            for run_it in (lambda f=f: f(*inputs), lambda f=f: run(weighted(f), inputs)):
                with FlopCounterMode(display=False) as counter:
                    run_it()
                counts.append(counter.get_total_flops())
        assert counts[:2] == counts[2:] and counts[1] == 2 * counts[0] > 0


def change_statistics(**changes):
    def change(student, teacher):
        statistics = teacher_statistics(teacher)._asdict()
        return student, teacher, TeacherStatistics(**{k: changes.get(k, lambda x: x)(x) for k, x in statistics.items()})

    return change


BAD_INPUTS = {
    "flat student": (lambda q, k: (q.flatten(1), k), "student has shape (3, 595), expected (N, C, H, W)"),
    "flat teacher": (lambda q, k: (q, k.flatten(2)), "teacher has shape (3, 3, 35), expected (N, C, H, W)"),
    "another batch": (lambda q, k: (q, k[:2]), "teacher has shape (2, 3, 7, 5), expected (3, C_t"),
    "no channels": (lambda q, k: (q, k[:, :0]), "teacher has shape (3, 0, 7, 5)"),
    "no positions": (lambda q, k: (q[..., :0], k), "student has shape (3, 17, 7, 0)"),
    "half student": (lambda q, k: (q.half(), k), "student of shape (3, 17, 7, 5) has dtype torch.float16"),
    "integer teacher": (lambda q, k: (q, k.long()), "teacher of shape (3, 3, 7, 5) has dtype torch.int64"),
    "teacher on meta": (lambda q, k: (q, k.to("meta")), "is on meta, expected cpu as student"),
    "other mean": (change_statistics(mean=lambda x: x[:, 1:]), "statistics.mean has shape (3, 2)"),
    "other std": (change_statistics(std=lambda x: x[:2]), "statistics.std has shape (2, 3)"),
    "other gram": (change_statistics(gram=lambda x: x[0]), "statistics.gram has shape (3, 3), dtype"),
    "gram dtype": (change_statistics(gram=lambda x: x.double()), "expected (3, 3, 3) and torch.float32"),
    "mean on meta": (change_statistics(mean=lambda x: x.to("meta")), "statistics.mean has shape (3, 3), dtype torch.float32 on meta"),
    "pooled later": (lambda q, k: (q[..., :2], k, teacher_statistics(k)), "expected a teacher pooled before"),
}


@pytest.mark.parametrize("change, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_raise(implementation, change, message):
    student, teacher, *statistics = change(*make_inputs())
    with pytest.raises(ValueError, match=re.escape(names_device(message.replace(", dtype", " and dtype")))):
        channel_attention_loss(student, teacher, statistics=statistics[0] if statistics else None)
    given = statistics[0] if statistics else (None, None, None)
    functions = [lambda *maps: ops.channel_attention_loss(*maps, *given, True, True)]
    functions += [] if statistics else [channel_attention, lambda *maps: ops.channel_attention(*maps, True)]
    for function in functions:
        with pytest.raises(ValueError):
            function(student, teacher)


def test_bad_arguments_of_the_ops_raise(implementation):
    student, teacher = make_inputs()
    mean, std, gram = teacher_statistics(teacher)
    for op, arguments in (
        (ops.channel_attention_loss, (student, teacher, mean, None, gram, True, True)),
        (ops.channel_attention_loss, (student, teacher[..., 1:], None, None, None, True, True)),
        (ops.channel_attention, (student, teacher[..., 1:], True)),
        (ops.channel_attention_statistics, (teacher[0],)),
        (ops.channel_attention_backward, (student[:2], student, teacher, True)),
        (ops.channel_attention_backward, (student.long(), student, teacher, True)),
        (ops.channel_attention_backward, (student, student, teacher[:, :, 1:], True)),
        (ops.channel_attention_loss_backward, (mean, student)),
    ):
        with pytest.raises(ValueError, match="channel_attention|teacher_statistics"):
            op(*arguments)
