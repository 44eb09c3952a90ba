"""What the Triton kernels share: the one way to launch, compiling without a GPU, and device functions.

Kernels are written for Triton 3.6 to 3.9. Two rules keep compilation away from a growing network: integers are never
specialised (`@jit` below), and a launcher hands over only dense, 16-byte aligned tensors (`dense`), so a kernel has one
variant per combination of dtypes and compile-time constants.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

INTERPRETED = triton.knobs.runtime.interpret  # under TRITON_INTERPRET=1, read when Triton is first imported
OLDEST_CAPABILITY = (8, 0)
HOPPER = 90
DTYPES = (torch.float32, torch.bfloat16)
LARGEST = 2**31 - 1  # kernels index with 32 bits

_interpreted = tl.constexpr(INTERPRETED)


def jit(function):
    """`triton.jit` that specialises no integer: every parameter without a default that is no constexpr or pointer.

    A pointer's name ends in `_ptr`.
    """
    parameters = [name for name, note in function.__annotations__.items() if note is tl.constexpr]
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    run_time = [name for name in names if name not in parameters and not name.endswith("_ptr")]
    return triton.jit(function, do_not_specialize=run_time)


# ---- launching


_variants: dict = {}  # compiled kernels, by what they were compiled for
_recorded: list | None = None  # compiled kernels since `compiling` began
_compiled_for = HOPPER  # meanwhile


def launch(
    kernel, grid: tuple[int, ...], *arguments, num_warps: int, num_stages: int = 1, cooperative: bool = False, **constants
) -> None:
    """Run `kernel` on the current stream of the tensors' device.

    arguments: tensors (or None), integers, floats, and tuples of tensors of one dtype or of integers, as the kernel takes
    them, a tensor first; constants: its constexprs, in the kernel's order, after them. cooperative: all programs run at
    the same time, for `wait_for_all`, or the launch fails; it must follow from the kernel and its constants. Such a
    kernel begins when there is room for all of its programs beside what else runs: kernels of other streams may keep it
    waiting, and it them. A second launch of a variant goes past Triton's binder and hooks, which take longer than most
    of these kernels.
    """
    if 0 in grid:
        return
    if _recorded is None and not INTERPRETED:
        dtypes = [getattr(x[0] if type(x) is tuple else x, "dtype", None) for x in arguments]
        first = arguments[0][0] if type(arguments[0]) is tuple else arguments[0]
        device = first.get_device()
        key = (id(kernel), device, num_warps, num_stages, *constants.values(), *dtypes)  # hash(kernel) takes longer
        compiled = _variants.get(key)
        if compiled is not None:
            stream = torch._C._cuda_getCurrentRawStream(device)
            compiled.run(
                *grid, *(1,) * (3 - len(grid)), stream, compiled.function, compiled.packed_metadata, None, None, None,
                *arguments, *constants.values(),
            )  # fmt: skip
            return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if cooperative:
        options["launch_cooperative_grid"] = True
    if _recorded is not None:
        _recorded.append(kernel.warmup(*arguments, **constants, grid=grid, **options))
    elif INTERPRETED:
        kernel[grid](*arguments, **constants)
    else:
        _variants[key] = kernel[grid](*arguments, **constants, **options)


@contextlib.contextmanager
def compiling(capability: int, warp_size: int = 32) -> Iterator[list]:
    """Compile for a GPU that is not there: inside, launches run nothing and their compiled kernels fill the list.

    capability: 80, 90 or 100. Launchers take meta tensors. Not in an interpreted process; nothing can be launched in
    this process afterwards.
    """
    global _recorded, _compiled_for

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", capability, warp_size)

        def get_current_device(self):
            return capability  # a cache of its own for every target

        def get_current_stream(self, device):
            return 0

    _recorded, _compiled_for = [], capability
    triton.runtime.driver.set_active(Driver())
    try:
        yield _recorded
    finally:
        _recorded, _compiled_for = None, HOPPER


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, like its next_power_of_2, takes microseconds, as long as a launch."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device: what a persistent grid is a multiple of."""
    if tensor.device.type == "cuda":
        return _processors(tensor.device.index)
    return 2 if INTERPRETED else 132


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def device_name(device: torch.device) -> str:
    """As the tables of block sizes name it; that of an H200 where there is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "NVIDIA H200"


def is_hopper(tensor: Tensor) -> bool:
    """Whether the tensor's device is of compute capability 9.0, whose compiled kernels leave room for larger blocks."""
    return capability(tensor) == HOPPER


def capability(tensor: Tensor) -> int:
    """Compute capability of the tensor's device, or of the one that is compiled for: 80, 90, ..."""
    return _capability(tensor.device.index) if tensor.device.type == "cuda" else _compiled_for


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


# ---- what a launcher can take


def why_not(**tensors: Tensor | None) -> list[str]:
    """Reasons why no Triton kernel takes these tensors; [] if they are fine, which is found before any is written."""
    first = next(iter(tensors.values()))
    if not _device_reasons(first.device) and all(
        [tensor is None or (tensor.dtype in DTYPES and tensor.numel() <= LARGEST) for tensor in tensors.values()]
    ):
        return []
    reasons = []
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            reasons.append(f"{name} is {tensor.dtype}; the Triton kernels take torch.float32 and torch.bfloat16")
        if tensor.numel() > LARGEST:
            reasons.append(f"{name} has {tensor.numel()} elements; the Triton kernels index at most {LARGEST}")
    return reasons + _device_reasons(first.device)


@functools.cache
def _device_reasons(device: torch.device) -> list[str]:
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return [f"{device_name(device)} has compute capability {capability}, expected at least 8.0"]
        try:
            triton.runtime.driver.active.get_current_target()
        except Exception as error:  # where Triton finds no C compiler, say, which it needs to launch
            return [f"Triton cannot launch here: {' '.join(str(error).split())}"]
    elif not INTERPRETED:
        return [f"tensors are on {device}, expected a CUDA device"]
    return []


def dense(x: Tensor) -> Tensor:
    """A map as channels_last, a vector or matrix as contiguous, 16-byte aligned: itself, or a copy."""
    if is_dense(x):
        return x
    return torch.empty_like(x, memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format).copy_(x)


def is_dense(x: Tensor) -> bool:
    contiguous = x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.is_contiguous()
    # Where an extent is 1, a stride that PyTorch calls channels_last may be any number; the kernels compute their own.
    return contiguous and x.data_ptr() % 16 == 0  # 0 where there is no memory


def dot_dtype(dtype: torch.dtype):
    """What products of maps of `dtype` are computed in. The interpreter's bfloat16 arithmetic is wrong."""
    return tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else tl.float32


_COUNTERS = 1 << 16  # of 16 bytes, allocated at a time


class _Counters:
    """Zeroed counters of one device. None is ever given up or used for something else: graphs know only its address."""

    def __init__(self, device: torch.device):
        self.device = device
        self.of_stream: dict[int, Tensor] = {}
        self.chunks: list[Tensor] = []
        self.rows = iter(range(0))  # of the last chunk, that are left; next is one step to all threads
        self.lock = threading.Lock()

    def take(self, stream: int | None) -> Tensor:
        """That of launches on `stream`, which follow each other; None: one that nothing else gets."""
        if stream is None:
            return self.own()
        if self.are_few():
            self.refill()
        counter = self.of_stream.get(stream)
        return self.of_stream.setdefault(stream, self.own()) if counter is None else counter

    def own(self) -> Tensor:
        row = next(self.rows, None)
        if row is None:
            raise RuntimeError("run the network once before its CUDA graph is captured: kernels allocate on first use")
        return self.chunks[row // _COUNTERS][row % _COUNTERS]

    def are_few(self) -> bool:
        return self.rows.__length_hint__() < _COUNTERS // 4

    def refill(self) -> None:
        with self.lock:
            if self.are_few():
                # What this thread or its stream allocates may belong to a CUDA graph: torch.compile warms up in the
                # memory of one, and takes it back. A thread of its own has no part in that.
                with ThreadPoolExecutor(1) as thread:
                    self.chunks.append(thread.submit(self.zeros).result())
                self.rows = iter(range((len(self.chunks) - 1) * _COUNTERS, len(self.chunks) * _COUNTERS))

    def zeros(self) -> Tensor:
        size = {"size": (_COUNTERS, 4), "dtype": torch.int32, "device": self.device}
        if self.device.type != "cuda":
            return torch.zeros(**size)
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            zeros = torch.zeros(**size)
        stream.synchronize()  # all streams use them
        return zeros


_counters: dict[torch.device, _Counters] = {}


def counter(tensor: Tensor) -> Tensor:
    """A zeroed int32 for `is_last`, which leaves it zeroed. Launches in flight together get different ones.

    Launches that are captured in a CUDA graph have each their own for ever, as graphs may be replayed at the same time.
    Raises RuntimeError when one is captured before any was launched, or thousands after the last that was.
    """
    device = tensor.device
    if tensor.is_meta:
        return tensor.new_empty(4, dtype=torch.int32)
    counters = _counters.get(device) or _counters.setdefault(device, _Counters(device))
    return counters.take(_stream(device))


def _stream(device: torch.device) -> int | None:
    """The stream that is current; None while it is being captured."""
    if device.type != "cuda":
        return 0
    return None if torch.cuda.is_current_stream_capturing() else torch._C._cuda_getCurrentRawStream(device.index)


# ---- device functions


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """fp32 values as `dtype`, to nearest even. The interpreter alone would truncate to bfloat16."""
    if _interpreted and dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        v = tl.where(v == v, nearest.to(tl.float32, bitcast=True), v)
    return v.to(dtype)


@triton.jit
def relu(v):
    """NaN stays NaN, as in PyTorch."""
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def is_last(counter_ptr, programs):
    """Whether all other programs of this launch have called this: they have, and what they stored can be loaded.

    Loads of it need cache_modifier=".cg". Resets the counter for the next launch.
    """
    tl.debug_barrier()
    done = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    last = done == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def wait_for_all(counter_ptr, first, programs):
    """Wait until all programs of a cooperative launch have called this; what they stored before can then be loaded.

    first: true in exactly one of them. Loads need cache_modifier=".cg". Not in the interpreter, which runs one program
    after the other.
    """
    # The arrivals of one launch add up to 2^31: they flip the sign of the second integer and leave the rest as it was,
    # so nothing needs to be reset.
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr + 1, tl.where(first, 2147483647 - (programs - 2), 1), sem="release")
    now = before
    while (before ^ now) >= 0:
        now = tl.atomic_add(counter_ptr + 1, 0, sem="acquire")
    tl.debug_barrier()
