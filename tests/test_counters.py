"""Counters of the Triton kernels: launches that may run at the same time have different ones."""

import subprocess
import sys
import textwrap
import threading

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are Triton's, and Triton is not installed")

from odn_fast.kernels import _common

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = 32
CAPTURED = None


@pytest.fixture
def streams(monkeypatch):
    """Stands in for the stream that is current, per thread; there are few counters, and none has been given out."""

    class Streams(threading.local):
        current = 0

    streams = Streams()
    monkeypatch.setattr(_common, "_stream", lambda device: streams.current)
    monkeypatch.setattr(_common, "_COUNTERS", FEW)
    monkeypatch.setattr(_common, "_counters", {})
    return streams


def take(times: int = 1) -> list[torch.Tensor]:
    x = torch.empty(1, device=DEVICE)
    return [_common.counter(x) for _ in range(times)]


def addresses(counters: list[torch.Tensor]) -> list[int]:
    return [counter.data_ptr() for counter in counters]


def test_a_stream_has_one(streams):
    first = addresses(take(3 * FEW))
    streams.current = 1
    second = addresses(take(3 * FEW))
    streams.current = 0
    assert len(set(first)) == len(set(second)) == 1 and first != second
    assert set(addresses(take())) == set(first)


def test_captured_launches_never_share_one(streams):
    """Nor do they with launches of a stream; and what is zeroed for them stays theirs."""
    counters = take()
    for _ in range(3 * FEW // 5):  # several refills
        streams.current = CAPTURED
        counters += take(5)
        streams.current = 0
        take()
    assert len(set(addresses(counters))) == len(counters) > 2 * FEW
    for counter in counters:
        assert counter.dtype == torch.int32 and counter.data_ptr() % 16 == 0 and counter.tolist() == [0] * 4
        counter.fill_(1)
    streams.current = CAPTURED
    assert not any(counter.any() for counter in take(5))


def test_a_capture_must_not_come_first(streams):
    streams.current = CAPTURED
    with pytest.raises(RuntimeError, match="run the network once before"):
        take()
    streams.current = 0
    take()
    streams.current = CAPTURED
    take(FEW // 4)
    with pytest.raises(RuntimeError, match="run the network once before"):
        take(FEW)


def test_threads_never_share_one(streams):
    """Each with a stream of its own, and captures."""
    barrier, kept = threading.Barrier(4, timeout=60), [[] for _ in range(4)]

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(50):
            streams.current = number
            stream_counter = take()
            streams.current = CAPTURED
            kept[number] += take()
        kept[number] += stream_counter

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = [address for counters in kept for address in addresses(counters)]
    assert len(set(every)) == len(every) == 4 * 51


def test_allocated_outside_of_the_memory_and_stream_of_the_caller(streams, monkeypatch):
    """A thread and its stream may have a CUDA graph's memory; a new thread's have not."""
    zeros, threads = _common._Counters.zeros, []
    monkeypatch.setattr(_common._Counters, "zeros", lambda self: threads.append(threading.get_ident()) or zeros(self))
    take()
    assert len(threads) == 1 and threads[0] != threading.get_ident()


@pytest.mark.gpu
def test_first_call_under_reduce_overhead():
    program = textwrap.dedent(
        """
        import torch
        from odn_fast.ops import separable_conv_train

        def network(x, dw, pw, vector):
            return separable_conv_train(x, dw, pw, vector, vector, None, 1, 1e-5, True)[0] + 1

        x = torch.randn(8, 16, 8, 8, device="cuda").to(memory_format=torch.channels_last)
        weights = [torch.randn(shape, device="cuda") for shape in ((16, 1, 3, 3), (16, 16, 1, 1), (16,))]
        compiled = torch.compile(network, mode="reduce-overhead")
        results = [compiled(x, *weights).clone() for _ in range(5)]
        assert all(torch.equal(result, network(x, *weights)) for result in results)
        """
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
