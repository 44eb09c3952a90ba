"""Every op on a GPU, beyond its values on small shapes: streams, graphs, compilation, repetition, memory, choice."""

import contextlib
import ctypes
import threading

import pytest
import torch
from torch import Tensor

import cuda_cases
from cases import upstream_gradient
from cuda_cases import CASES, TYPICAL
from odn_fast.ops import _choose
from odn_fast.ops._choose import CannotRun, reasons, using

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float32)
OPS = ("separable_conv_train", "separable_conv_infer", "separable_unit_train", "channel_attention",
       "channel_attention_loss", "batch_norm_act_train", "exit_heads", "augment")  # fmt: skip


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    different = [i for i, (a, b) in enumerate(zip(results, expected, strict=True)) if not torch.equal(a, b)]
    assert not different, f"results {different} of {len(expected)} differ"


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("typical", TYPICAL)
def test_typical_shapes_are_accurate(typical, dtype):
    check_accuracy(TYPICAL[typical](dtype), dtype)


def check_accuracy(case, dtype):
    """An error, as a norm, is at most twice that of PyTorch's own layers in `dtype`, all against those in float64.

    The floor, eight units of float32's rounding, is for what PyTorch happens to round exactly.
    """
    exact, grad = case.in_float64(), None
    plain = exact.plain or exact.function
    with using("reference"), torch.backends.cudnn.flags(enabled=False), torch.device(cuda_cases.DEVICE):
        if case.plain and case.leaves:
            grad = upstream_gradient(case.plain(*exact.tensors, relu=False)[0], dtype, "channels_last")
        unfused, true = case.run(plain, grad=grad), exact.run(plain, grad=grad)
    results, eps = case.run(grad=grad), torch.finfo(torch.float32).eps
    for index, (ours, theirs, truth, size) in enumerate(
        zip(results, unfused, true, exact.sizes(true, grad), strict=True)
    ):
        assert ours.shape == truth.shape and ours.dtype == theirs.dtype
        if not ours.is_floating_point():  # counts: bfloat16 decides ties
            continue
        errors = [(x.double() - truth).norm().item() for x in (ours, theirs)]
        allowed = 2 * errors[1] + 8 * eps * size
        assert errors[0] <= allowed, f"result {index}: error {errors[0]:.3e} is above {allowed:.3e}"


@pytest.mark.usefixtures("poisoned_memory")
def test_runs_on_the_current_stream_alone(name, dtype):
    """While the default stream is held up, another one gets its results, and does not wait for it."""
    case = CASES[name](dtype)
    expected = [tensor.cpu() for tensor in case.run()]
    side, busy = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(side):
        case.run()  # memory from the driver may wait
    torch.cuda.synchronize()
    with held_up():
        busy.record()
        with torch.cuda.stream(side):
            results = case.run()
        side.synchronize()
        assert not busy.query(), "it waited for the default stream"
        with torch.cuda.stream(side):
            results = [result.cpu() for result in results]
        assert not busy.query(), "reading waited for the default stream"
    assert_same(results, expected)


@contextlib.contextmanager
def held_up(seconds: float = 10.0):
    """The current stream waits for the end of the block, `seconds` at most, and takes no part of the device meanwhile.

    A kernel that spins would: it keeps kernels from running that need all processors at once.
    """
    go = torch.zeros(1, dtype=torch.int32).pin_memory()
    stream, address = torch.cuda.current_stream().cuda_stream, go.data_ptr()
    wait = ctypes.CDLL("libcuda.so.1").cuStreamWaitValue32_v2
    until_equal = 1
    status = wait(ctypes.c_void_p(stream), ctypes.c_uint64(address), ctypes.c_uint32(1), ctypes.c_uint(until_equal))
    assert status == 0, f"cuStreamWaitValue32 returned {status}"
    timer = threading.Timer(seconds, go.fill_, [1])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        go.fill_(1)
        torch.cuda.synchronize()


def test_beside_a_kernel_that_stays(name):
    """What needs all processors at once may wait for it, but neither is lost."""
    case = CASES[name](torch.bfloat16)
    expected = clones(case.run())
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    with torch.cuda.stream(side):
        results = [case.run() for _ in range(5)]
    torch.cuda.synchronize()
    for repetition in results:
        assert_same(repetition, expected)


def test_two_streams_at_once(name, dtype):
    cases = [CASES[name](dtype) for _ in range(2)]
    expected = [case.run() for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for case, stream, kept in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(case.run())
    torch.cuda.synchronize()
    for kept, right in zip(results, expected, strict=True):
        for repetition in kept:
            assert_same(repetition, right)


def test_in_a_cuda_graph(name, dtype):
    case = CASES[name](dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            case.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run()
    for _ in range(3):
        fresh = CASES[name](dtype).tensors
        for tensor, value in zip(case.tensors, fresh, strict=True):
            tensor.copy_(value)
        for _ in range(5):
            graph.replay()
        replayed = clones(captured)
        assert_same(replayed, case.run(tensors=fresh))


def test_two_replays_of_different_graphs_at_once(name):
    """Each graph was captured with counters of its own."""
    cases = [CASES[name](torch.bfloat16) for _ in range(2)]
    expected = [case.run() for case in cases]
    graphs, captured, streams = [torch.cuda.CUDAGraph() for _ in cases], [], [torch.cuda.Stream() for _ in cases]
    for case, graph in zip(cases, graphs, strict=True):
        with torch.cuda.graph(graph):
            captured.append(case.run())
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for results, right in zip(captured, expected, strict=True):
        assert_same(results, right)


def test_same_bits_a_hundred_times(name, dtype):
    """Also stresses reductions by the program that finishes last."""
    case = CASES[name](dtype)
    expected = clones(case.run())
    different = torch.zeros(len(expected), dtype=torch.int64, device="cuda")
    for _ in range(100):
        different += torch.stack([a.ne(b).sum() for a, b in zip(case.run(), expected, strict=True)])
    assert not different.any(), f"numbers of differing elements: {different.tolist()}"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(name, backend):
    case = CASES[name](torch.bfloat16)
    torch._dynamo.reset()
    results = case.run(torch.compile(case.function, fullgraph=True, backend=backend))
    for ours, eager in zip(results, case.run(), strict=True):
        torch.testing.assert_close(ours, eager)


def opcheck_arguments(case) -> tuple:
    tensors = [t.requires_grad_(i in case.leaves) for i, t in enumerate(case.tensors)]
    return {
        "separable_conv_train": lambda *t: (*t, 1, 1e-5, True),
        "separable_conv_infer": lambda *t: (*t, None, 1, "relu6", "relu"),
        "separable_unit_train": lambda x, *p: (x, list(p[:4]), list(p[4:8]), list(p[8:]), len(p) == 8, 1, 1e-5),
        "channel_attention": lambda *t: (*t, True),
        "channel_attention_loss": lambda *t: (*t, None, None, None, True, True),
        "batch_norm_act_train": lambda *t: (*t, 1e-5, True),
        "exit_heads": lambda f, w, b, target: ([f], [w], [b], target),
        "augment": lambda *t: (*t, *case.settings),
    }[case.op](*tensors)


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("make", [
    lambda dtype: cuda_cases.separable_conv(dtype, 3, 16, 17, 7),
    lambda dtype: cuda_cases.separable_infer(dtype, 3, 16, 17, 7),
    lambda dtype: cuda_cases.unit(dtype, 3, 16, 16, 7),
    lambda dtype: cuda_cases.unit(dtype, 3, 16, 17, 7),
    lambda dtype: cuda_cases.attention(dtype, 3, 16, 17, 7),
    lambda dtype: cuda_cases.attention_loss(dtype, 3, 16, 17, 7),
    lambda dtype: cuda_cases.batch_norm(dtype, 3, 17, 7),
    lambda dtype: cuda_cases.heads(dtype, 3, (17, 7)),
    lambda dtype: cuda_cases.augmented(dtype, 3, 3, 7),
], ids=["conv", "infer", "identity", "projection", "attention", "loss", "norm", "heads", "augment"])  # fmt: skip
def test_opcheck(make, dtype):
    case = make(dtype)
    torch.library.opcheck(getattr(torch.ops.odn_fast, case.op).default, opcheck_arguments(case))


MIB = 2**20
# name: case with maps of 64 MiB, maps that forward and backward may hold beyond their arguments
MEMORY = {
    "separable_conv": (lambda: cuda_cases.separable_conv(torch.bfloat16, 128, 64, 64, 64), 2, 3),  # y, z; dd, dx, dr
    "separable_infer": (lambda: cuda_cases.separable_infer(torch.bfloat16, 128, 64, 64, 64), 1, 0),
    "unit_identity": (lambda: cuda_cases.unit(torch.bfloat16, 128, 64, 64, 64), 3, 4),  # y, two z; dx, three between
    "attention": (lambda: cuda_cases.attention(torch.bfloat16, 128, 64, 64, 64), 1, 1),
    "attention_loss": (lambda: cuda_cases.attention_loss(torch.bfloat16, 128, 64, 64, 64), 1, 1),
    "batch_norm": (lambda: cuda_cases.batch_norm(torch.bfloat16, 128, 64, 64), 1, 2),
    "exit_heads": (lambda: cuda_cases.heads(torch.bfloat16, 128, (64, 64)), 0, 0),
    "augment": (lambda: cuda_cases.augmented(torch.bfloat16, 2048, 4, 64), 1, 0),
}


def peak(function) -> tuple[object, float]:
    """What the function returns, and the most memory it held at once beyond what there was before, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    return result, (torch.cuda.max_memory_allocated() - before) / MIB


@pytest.mark.parametrize("make, forward_maps, backward_maps", MEMORY.values(), ids=MEMORY)
def test_memory(make, forward_maps, backward_maps):
    case = make()
    case.run()  # what is kept for good, such as counters, is there now
    tensors = [t.requires_grad_(i in case.leaves) for i, t in enumerate(case.tensors)]
    results, forward = peak(lambda: case.function(*tensors))
    assert forward <= 64 * forward_maps + 16, f"forward holds {forward:.0f} MiB"
    if case.leaves:
        grad = cuda_cases.slope(results[0])
        _, backward = peak(lambda: torch.autograd.grad(results[0], [tensors[i] for i in case.leaves], grad))
        assert backward <= 64 * backward_maps + 16, f"backward holds {backward:.0f} MiB"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_tensors(name):
    case = CASES[name](torch.bfloat16)
    expected = case.run()
    results = case.run(tensors=[tensor.to("cuda:1") for tensor in case.tensors])
    assert all(result.device.index == 1 for result in results)
    assert_same([result.to("cuda:0") for result in results], expected)


# ---- the choice of implementation


def op_arguments(op: str, dtype: torch.dtype = torch.bfloat16, size: int = 7) -> tuple:
    make = {
        "separable_conv_train": lambda: cuda_cases.separable_conv(dtype, 3, 16, 16, size),
        "separable_conv_infer": lambda: cuda_cases.separable_infer(dtype, 3, 16, 16, size),
        "separable_unit_train": lambda: cuda_cases.unit(dtype, 3, 16, 16, size),
        "channel_attention": lambda: cuda_cases.attention(dtype, 3, 16, 16, size),
        "channel_attention_loss": lambda: cuda_cases.attention_loss(dtype, 3, 16, 16, size),
        "batch_norm_act_train": lambda: cuda_cases.batch_norm(dtype, 3, 16, size),
        "exit_heads": lambda: cuda_cases.heads(dtype, 3, (16, size)),
        "augment": lambda: cuda_cases.augmented(dtype, 3, 3, size),
    }
    return tuple(opcheck_arguments(make[op]()))


@pytest.mark.parametrize("op", OPS)
def test_kernels_answer_where_they_can(op):
    assert reasons(op, *op_arguments(op))["triton"] == []
    why_not = reasons(op, *op_arguments(op, torch.float64))
    assert why_not["reference"] == [] and any("torch.float64" in reason for reason in why_not["triton"])


@pytest.mark.parametrize("op", OPS)
def test_a_forced_implementation_runs_or_says_why_not(op):
    function = getattr(torch.ops.odn_fast, op)
    for name in _choose.NAMES:
        why_not = reasons(op, *op_arguments(op, torch.float64)).get(name, ["there is none"])
        with using(name), torch.no_grad():
            if not why_not:
                function(*op_arguments(op, torch.float64))
                continue
            with pytest.raises(CannotRun) as caught:
                function(*op_arguments(op, torch.float64))
        assert all(reason in str(caught.value) for reason in why_not)
    with using("triton"), torch.no_grad():
        function(*op_arguments(op))


def test_the_forced_implementation_also_answers_backward():
    case = cuda_cases.batch_norm(torch.float64, 3, 16, 7)
    tensors = [t.requires_grad_() for t in case.tensors]
    y = case.function(*tensors)[0]
    with using("triton"), pytest.raises(CannotRun, match="batch_norm_act_train_backward.*float64"):
        y.sum().backward()
