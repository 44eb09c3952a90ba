"""Tuning without a GPU: kernels that only ask for blocks, and a clock that goes by what they were given."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from odn_fast import tune
from odn_fast.kernels import _tuned
from odn_fast.kernels._tuned import blocks

GPU = "NVIDIA H200"  # what a meta tensor is taken to be on
DEFAULT = {"BLOCK": 64, "num_warps": 4}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path / "tuned")
    _tuned.forget()
    yield tmp_path / "tuned"
    _tuned.forget()


def candidates(same):
    return [{"BLOCK": block} for block in (32, 64, 128, 256)]


class Calls:
    """A call of two kernels, the time it would take, and a result that is wrong at BLOCK 256 of the second."""

    def __init__(self, size=1000, channels=16):
        self.size, self.channels, self.given = size, channels, {}

    def __call__(self):
        x = torch.zeros(1)
        for kernel in ("first", "second"):
            self.given[kernel] = blocks(kernel, x, (self.channels,), self.size, DEFAULT)["BLOCK"]
        return (torch.ones(3) * (2 if self.given["second"] == 256 else 1),)

    def clock(self, call):
        self()
        return {32: 9.0, 64: 8.0, 128: 5.0, 256: 7.0}[self.given["first"]] + {32: 3.0, 64: 8.0, 128: 5.0, 256: 1.0}[self.given["second"]]


def tuned(calls, known=None, **settings):
    return tune.tune_call(calls, {"first": candidates, "second": candidates}, calls.clock, 1e-3, known or {}, **settings)


def test_each_kernel_gets_its_fastest_candidate_that_computes_the_same():
    found, share, refused = tuned(Calls())
    assert {key[0]: entry["blocks"] for key, entry in found.items()} == {"first": {"BLOCK": 128, "num_warps": 4},
                                                                        "second": {"BLOCK": 32, "num_warps": 4}}
    assert found["second", "float32", (16,), 1000]["microseconds"] == 8.0 and share == 0.5
    assert len(refused) == 1 and "second" in refused[0] and "differs" in refused[0]
    assert not _tuned._forced and _tuned._asked is None


def test_a_candidate_that_does_not_fit_is_refused():
    from triton.runtime.errors import OutOfResources
    calls = Calls()

    def call():
        result = calls()
        if calls.given["first"] == 128:
            raise OutOfResources(300000, 232448, "shared memory")
        return result

    found, _, refused = tune.tune_call(call, {"first": candidates}, calls.clock, 1e-3, {})
    assert found["first", "float32", (16,), 1000]["blocks"]["BLOCK"] == 256
    assert len(refused) == 1 and "300000" in refused[0]


def test_what_is_known_is_kept_and_not_tried_again():
    known = {("first", "float32", (16,), 1000): {"blocks": {"BLOCK": 256, "num_warps": 4}, "microseconds": 1.0}}
    calls = Calls()
    found, _, _ = tuned(calls, known)
    assert [key[0] for key in found] == ["second"] and found["second", "float32", (16,), 1000]["microseconds"] == 10.0


def test_nothing_is_written_of_a_kernel_that_was_not_tried_to_the_end():
    answers = iter([True] * 4 + [False] * 9)
    found, _, _ = tuned(Calls(), in_time=lambda: next(answers))
    assert [key[0] for key in found] == ["first"]


def test_same_kernel_at_two_channel_counts_is_forced_apart():
    calls = Calls(), Calls(channels=32)

    def call():
        return *calls[0](), *calls[1]()

    def clock(_):
        call()
        return (10.0 if calls[0].given["first"] == 32 else 20.0) + (10.0 if calls[1].given["first"] == 128 else 20.0)

    found, share, _ = tune.tune_call(call, {"first": candidates}, clock, 1e-3, {})
    assert found["first", "float32", (16,), 1000]["blocks"]["BLOCK"] == 32
    assert found["first", "float32", (32,), 1000]["blocks"]["BLOCK"] == 128 and share == 0.5


def entry(block, microseconds=1.0):
    return {"blocks": {"BLOCK": block, "num_warps": 4}, "microseconds": microseconds}


def asked(kernel, channels, size, dtype=torch.float32):
    return blocks(kernel, torch.empty(1, dtype=dtype, device="meta"), (channels,), size, DEFAULT)["BLOCK"]


def test_the_table_is_read_back_by_the_kernels():
    found = {("first", "float32", (16,), 100): entry(32), ("first", "float32", (16,), 10000): entry(128),
             ("first", "bfloat16", (16,), 100): entry(256)}
    assert asked("first", 16, 100) == 64
    path = tune.write_table(GPU, found, ["first"], {"torch": "2.11"})
    assert path.endswith("nvidia-h200.json")
    assert asked("first", 16, 100) == 32 and asked("first", 16, 900) == 32 and asked("first", 16, 1100) == 128
    assert asked("first", 16, 10**9) == 128 and asked("first", 16, 0) == 32
    assert asked("first", 16, 9, torch.bfloat16) == 256
    assert asked("first", 32, 100) == 64 and asked("second", 16, 100) == 64  # other channels, another kernel


def test_the_table_is_sorted_and_keeps_what_was_not_tuned_again(empty_folder):
    tune.write_table(GPU, {("second", "float32", (16,), 1): entry(32), ("gone", "float32", (16,), 1): entry(32),
                           ("first", "float32", (128,), 1): entry(32), ("first", "float32", (16,), 1): entry(32)},
                     ["first", "second", "gone"], {})
    tune.write_table(GPU, {("first", "float32", (16,), 1): entry(128), ("first", "bfloat16", (16,), 5): entry(64)}, ["first", "second"], {})
    text = (empty_folder / "nvidia-h200.json").read_text()
    table = json.loads(text)
    assert table["gpu"] == GPU and list(table["kernels"]) == ["first", "second"]
    assert [(e["dtype"], e["same"], e["blocks"]["BLOCK"]) for e in table["kernels"]["first"]] == [
        ("bfloat16", [16], 64), ("float32", [16], 128), ("float32", [128], 32)]
    tune.write_table(GPU, {}, ["first", "second"], {})
    assert (empty_folder / "nvidia-h200.json").read_text() == text


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kernels": 3}'])
def test_a_table_that_cannot_be_read_is_named_and_can_be_written_anew(empty_folder, text):
    empty_folder.mkdir()
    (empty_folder / "nvidia-h200.json").write_text(text)
    with pytest.raises(ValueError, match="nvidia-h200.json is no table.*odn_fast.tune"):
        asked("first", 16, 100)
    tune.write_table(GPU, {("first", "float32", (16,), 1): entry(128)}, ["first"], {})
    assert asked("first", 16, 100) == 128


def test_doctor_says_whether_this_gpu_was_tuned(empty_folder):
    from odn_fast.doctor import triton_lines
    assert len(triton_lines("")) == 1 and triton_lines("")[0].startswith("Triton: 3.")
    assert "not tuned for NVIDIA H200" in triton_lines(GPU)[1] and "python -m odn_fast.tune" in triton_lines(GPU)[1]
    path = tune.write_table(GPU, {("first", "float32", (16,), 1): entry(128)}, ["first"], {})
    assert triton_lines(GPU)[1] == f"block sizes: 1 measured on {GPU}, in {path}"
    (empty_folder / "nvidia-h200.json").write_text("{")
    _tuned.forget()
    assert "is no table" in triton_lines(GPU)[1]


def test_doctor_names_the_cuda_kernels():
    from odn_fast.doctor import cuda_line
    ops = ["odn_fast::b_cuda", "odn_fast::a", "odn_fast::a_cuda", "aten::c_cuda"]
    assert cuda_line("13.0.88 for 80-real 90", ops) == "CUDA kernels: a, b (nvcc 13.0.88 for 80-real 90)"
    assert cuda_line("left out: no nvcc that works", ops) == "CUDA kernels: left out: no nvcc that works; Triton's are used"


def test_doctor_says_how_to_get_triton(monkeypatch):
    from odn_fast.doctor import triton_lines
    monkeypatch.setitem(sys.modules, "triton", None)
    assert len(triton_lines(GPU)) == 1 and "pip install triton" in triton_lines(GPU)[0]


def test_every_candidate_of_the_kernels_is_a_choice_of_blocks():
    kernels = tune.candidates_of_kernels()
    assert kernels and all(callable(choices) for choices in kernels.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, "-m", "odn_fast.tune"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none")
def test_a_real_call_is_tuned():
    workload = next(workload for workload in tune.WORKLOADS if workload.op == "augment")
    found, share, _ = tune.tune_call(workload.call(), tune.candidates_of_kernels(), tune.microseconds, 1e-6, {})
    assert share <= 1 and {key[0] for key in found} == {"augment"}
    assert all(0 < entry["microseconds"] < 1e4 for entry in found.values())
