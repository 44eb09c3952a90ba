"""What compilers make of the kernels, for GPUs that need not be here: no spills, tensor cores, wide loads, few variants."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are Triton's, and Triton is not installed")

import compilation_cases

KIB = 1024
MOST_SHARED = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}
CHANNELS = ("C", "CI", "CO", "rows", "columns", "VECTOR")
STEMS = [case.__name__ for case in compilation_cases.CASES]


@pytest.fixture(scope="module")
def compile_kernels(tmp_path_factory):
    """compile_kernels(capability, what): descriptions of kernels, by what launched them, from two processes."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    program, done = Path(__file__).with_name("compile_kernels.py"), {}

    def run(capability: int, what: str) -> dict[str, list[dict]]:
        if (capability, what) not in done:
            shares = [STEMS[::2], STEMS[1::2]] if what != "grown" else [[]]
            children = [
                subprocess.Popen(
                    [sys.executable, program, str(capability), what, *stems],
                    env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
                for stems in shares
            ]  # fmt: skip
            found = {}
            for child in children:
                output, errors = child.communicate()
                assert child.returncode == 0, errors
                for line in output.splitlines():
                    kernel = json.loads(line)
                    found.setdefault(kernel["of"], []).append(kernel)
            done[capability, what] = found
        return done[capability, what]

    return run


def faults(kernel: dict) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    most = MOST_SHARED[kernel["capability"]]
    # Bytes are gathered; and channels that are no multiple of 8 (batch norm's kernels know only that) have no wide loads.
    channels = [int(value) for name, value in kernel["constants"].items() if name in CHANNELS]
    narrow = "*u8" in kernel["types"].values() or any(count % 8 for count in channels)
    wrong = {
        f"{kernel['stack']} bytes of stack": kernel["stack"] > 0,
        f"{kernel['spills']} spills": kernel["spills"] > 0,
        f"{kernel['shared']} bytes of shared memory, above {most}": kernel["shared"] > most,
        f"none of {kernel['dots']} products on tensor cores": kernel["dots"] > 0 and not kernel["tensor_core"],
        "no load of 8 bytes or more": kernel["wide_loads"] == 0 and not narrow,
    }
    return [words for words, is_so in wrong.items() if is_so]


def described(kernel: dict) -> str:
    keys = ("constants", "types", "num_warps", "num_stages", "registers", "shared")
    return f"{kernel['of']}: {kernel['kernel']} " + ", ".join(f"{key} {kernel[key]}" for key in keys)


def raise_errors(kernels: list[dict]) -> None:
    errors = [kernel["error"] for kernel in kernels if "error" in kernel]
    assert not errors, errors[0]


def check(kernels: list[dict]) -> None:
    raise_errors(kernels)
    bad = [f"{'; '.join(faults(kernel))}: {described(kernel)}" for kernel in kernels if faults(kernel)]
    assert not bad, "\n".join([f"{len(bad)} of {len(kernels)} kernels", *bad])


@pytest.mark.parametrize("stem", STEMS)
def test_kernels_for_hopper(compile_kernels, stem):
    check(compile_kernels(90, "few")[stem])


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("capability", MOST_SHARED)
def test_kernels_of_all_typical_shapes(compile_kernels, capability, stem):
    check(compile_kernels(capability, "all")[stem])


def test_other_sizes_compile_nothing_new(compile_kernels):
    """A network that grows finds its kernels ready: images, rows and columns make a variant by powers of two at most."""
    (name, first), (other_name, other) = compile_kernels(90, "grown").items()
    raise_errors([*first, *other])
    hashes = [{kernel["hash"] for kernel in kernels} for kernels in (first, other)]
    new = [described(kernel) for kernel in [*first, *other] if kernel["hash"] not in hashes[0] & hashes[1]]
    assert not new, "\n".join([f"{name} and {other_name} need kernels of their own:", *new])


def test_faults_are_found():
    fine = {
        "capability": 80, "stack": 0, "spills": 0, "shared": 0, "dots": 1, "tensor_core": 2, "wide_loads": 3,
        "types": {"x_ptr": "*bf16"}, "constants": {"VECTOR": "8"},
    }  # fmt: skip
    assert faults(fine) == []
    for change in ({"stack": 8}, {"spills": 1}, {"shared": 200 * KIB}, {"tensor_core": 0}, {"wide_loads": 0}):
        assert len(faults({**fine, **change})) == 1
