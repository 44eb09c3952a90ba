"""The chooser among an op's implementations on a GPU, tried with implementations that run anywhere."""

import subprocess
import sys

import pytest
import torch

from odn_fast.ops import _choose
from odn_fast.ops._choose import NAMES, CannotRun, Implementation, chosen, reasons, using
from odn_fast.ops._library import references

pytest.importorskip("triton", reason="the real reasons are those of Triton kernels, and Triton is not installed")

REFERENCE = Implementation("reference", lambda *args: "reference", lambda *args: [])


def implementation(name, *why_not):
    return Implementation(name, lambda *args: name, lambda *args: list(why_not))


def test_the_first_that_can_run_answers():
    able, unable = implementation("cuda"), implementation("cuda", "too odd")
    triton = implementation("triton")
    assert chosen("op", [able, triton, REFERENCE], ()) is able
    assert chosen("op", [unable, triton, REFERENCE], ()) is triton
    assert chosen("op", [unable, implementation("triton", "too wide"), REFERENCE], ()) is REFERENCE


def test_reasons_may_depend_on_the_arguments():
    small = Implementation("triton", lambda n: n, lambda n: [] if n < 10 else [f"{n} is too many"])
    assert chosen("op", [small, REFERENCE], (9,)) is small
    assert chosen("op", [small, REFERENCE], (10,)) is REFERENCE


@pytest.mark.parametrize("name", NAMES)
def test_the_forced_one_answers_though_others_come_first(name):
    candidates = [implementation("cuda"), implementation("triton"), REFERENCE]
    with using(name):
        assert chosen("op", candidates, ()).name == name
    assert chosen("op", candidates, ()).name == "cuda"


def test_a_forced_one_that_cannot_run_says_every_reason():
    candidates = [implementation("cuda"), implementation("triton", "x is torch.float64", "w is too long"), REFERENCE]
    with using("triton"), pytest.raises(CannotRun) as caught:
        chosen("some_op", candidates, ())
    assert str(caught.value) == "some_op: triton was asked for and cannot run: x is torch.float64; w is too long"
    assert isinstance(caught.value, RuntimeError)


def test_a_forced_one_that_an_op_lacks_is_missed():
    with using("cuda"), pytest.raises(CannotRun, match="cuda was asked for and there is none; there are triton, reference"):
        chosen("op", [implementation("triton"), REFERENCE], ())


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="implementation is 'cudnn', expected one of cuda, triton, reference"):
        with using("cudnn"):
            pass


def test_using_can_be_nested_and_ends_with_its_block():
    candidates = [implementation("cuda"), implementation("triton"), REFERENCE]
    with using("reference"):
        with pytest.raises(KeyError), using("triton"):
            assert chosen("op", candidates, ()).name == "triton"
            raise KeyError
        assert chosen("op", candidates, ()).name == "reference"
    assert chosen("op", candidates, ()).name == "cuda"


def test_one_op_may_be_forced_alone():
    candidates = [implementation("cuda"), implementation("triton"), REFERENCE]
    with using("triton", "one", "two"):
        assert [chosen(op, candidates, ()).name for op in ("one", "two", "three")] == ["triton", "triton", "cuda"]
        with using("reference", "two"):
            assert [chosen(op, candidates, ()).name for op in ("one", "two", "three")] == ["triton", "reference", "cuda"]
        with using("reference"):
            assert [chosen(op, candidates, ()).name for op in ("one", "two", "three")] == ["reference"] * 3
    assert chosen("one", candidates, ()).name == "cuda"


def test_cpu_tensors_are_not_concerned():
    x = torch.randn(4, 3, 5, 5)
    with using("cuda"):
        assert torch.ops.odn_fast.batch_norm_act_train(x, torch.ones(3), torch.zeros(3), None, 1e-5, True)[0].shape == x.shape


def test_devices_of_arguments_in_lists_are_found():
    x = torch.empty(2, device="meta")
    assert _choose.device_of(([x, x], None)).type == _choose.device_of((x, [x])).type == "meta"


# ---- the reasons of the kernels themselves


def batch_norm(dtype=torch.float32, device="cpu", size=4):
    x = torch.empty(1, 3, 1, 1, dtype=dtype, device=device).expand(2, 3, size, size)
    return x, torch.ones(3, device=device), torch.zeros(3, device=device), None, 1e-5, True


has_kernel = pytest.mark.skipif(
    "batch_norm_act_train" not in _choose._implementations, reason="batch_norm_act has no kernel for a GPU"
)


def of_triton(*args):
    why_not = reasons("batch_norm_act_train", *args)
    assert why_not["reference"] == [] and list(why_not)[-1] == "reference"
    return why_not["triton"]


@has_kernel
def test_float64_is_not_taken():
    assert any(
        reason == "x is torch.float64; the Triton kernels take torch.float32 and torch.bfloat16"
        for reason in of_triton(*batch_norm(torch.float64))
    )


@has_kernel
def test_more_elements_than_32_bits_count_are_not_taken():
    elements = 2 * 3 * 32768**2
    assert any(f"x has {elements} elements" in reason for reason in of_triton(*batch_norm(size=32768)))


@has_kernel
def test_every_reason_is_given():
    assert len(of_triton(*batch_norm(torch.float64, size=32768))) >= 2


@has_kernel
def test_what_can_run_has_none():
    from odn_fast.kernels._common import INTERPRETED

    device = "cpu" if INTERPRETED else "cuda"
    assert of_triton(*batch_norm(device=device)) == []
    assert of_triton(*batch_norm(torch.bfloat16, device)) == []


@has_kernel
def test_other_devices_are_not_taken():
    """In a process that compiles, as on a machine with a GPU."""
    program = """
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch
from odn_fast.ops._choose import reasons
x = torch.empty(2, 3, 4, 4, device="meta")
w = torch.empty(3, device="meta")
print(reasons("batch_norm_act_train", x, w, w, None, 1e-5, True)["triton"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['tensors are on meta, expected a CUDA device']", done.stdout + done.stderr


def test_without_triton_the_reason_says_how_to_get_it():
    program = """
import sys, warnings
sys.modules["triton"] = None
warnings.simplefilter("ignore")
from odn_fast.ops._choose import triton
print(triton("batch_norm_act", "batch_norm_act_train").why_not(1))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['Triton is not installed; get it with: pip install triton']", done.stdout + done.stderr


@pytest.mark.parametrize("op", references)
def test_every_op_has_a_triton_kernel_and_ends_with_its_reference(op):
    names = [candidate.name for candidate in _choose._implementations[op]]
    assert "triton" in names and names[-1] == "reference" and set(names) <= set(NAMES)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"odn_fast::{op}", "CUDA")
