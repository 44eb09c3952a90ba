"""CUDA sources compile for every architecture that is built, without a GPU and without torch, and spill no registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from odn_fast import _extension
from odn_fast.ops._choose import reasons

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc on the PATH or in /usr/local/cuda/bin")


def test_there_are_sources():
    assert "separable_conv_cuda" in [path.stem for path in SOURCES]


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, architecture, tmp_path):
    command = [NVCC, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v,--warn-on-spills", "-Xcompiler", "-Wall",
               "-c", source, "-o", tmp_path / "kernels.o"]  # fmt: skip
    nvcc = subprocess.run(command, capture_output=True, text=True)
    assert nvcc.returncode == 0, nvcc.stderr
    kernels = nvcc.stderr.count("Compiling entry function")
    assert kernels >= 1 and "warning" not in nvcc.stderr, nvcc.stderr
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", nvcc.stderr) == [("0", "0")] * kernels, nvcc.stderr


@pytest.mark.slow
@needs_nvcc
def test_channels_that_are_taken_have_a_tile_at_any_size(tmp_path):
    source = Path(__file__).with_name("separable_conv_cuda_tilings.cu")
    command = [NVCC, "-std=c++17", "-O1", "-arch=sm_90", "-I", ROOT / "csrc", source, "-o", tmp_path / "tilings"]
    nvcc = subprocess.run(command, capture_output=True, text=True)
    assert nvcc.returncode == 0, nvcc.stderr
    tilings = subprocess.run([tmp_path / "tilings"], capture_output=True, text=True, check=True)
    assert tilings.stdout == ""


@pytest.mark.skipif(not _extension.available, reason=f"the extension is not used: {_extension.reason}")
def test_the_extension_says_whether_it_has_cuda_kernels():
    built = _extension.build_information()["CUDA"]
    assert built.startswith("left out: ") or re.match(r"\d+\.\d+", built), built


@pytest.mark.skipif(hasattr(torch.ops.odn_fast, "separable_conv_infer_cuda"), reason="there are CUDA kernels")
def test_without_cuda_kernels_the_reason_says_why():
    x, dw, pw = torch.randn(2, 16, 4, 4), torch.randn(16, 1, 3, 3), torch.randn(16, 16, 1, 1)
    (reason,) = reasons("separable_conv_infer", x, dw, None, pw, None, None, 1, "none", "relu")["cuda"]
    built_without = "the extension was built without CUDA kernels"
    assert reason.startswith(built_without if _extension.available else "the compiled extension is not used")
