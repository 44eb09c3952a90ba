import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin slow other processes down, and tests with them

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported; the kernels then run on CPU tensors

from cases import IMPLEMENTATIONS, use_implementation
from odn_fast.ops._choose import CannotRun


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests of Triton kernels are GPU tests where there is one, and run interpreted elsewhere."""
    for item in items:
        if torch.cuda.is_available():
            if item.path.stem.endswith("_triton"):
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and PyTorch sees none here"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """What an implementation of a GPU cannot take is skipped with its reasons; a kernel's error is its test's."""
    try:
        result = yield
    except CannotRun as error:
        pytest.skip(str(error))
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result


def pytest_runtest_logfinish():
    """An illegal address or the like ends CUDA in its process. Under pytest-xdist, another process takes over."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(autouse=True)
def two_threads_and_a_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Every implementation of the ops whose references are in what the test's file calls `reference`."""
    with use_implementation(request.param, request.module.reference):
        yield request.param


@pytest.fixture
def poisoned_memory():
    """Fill memory from torch.empty with NaN (the largest value for integers), so that reading it shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
