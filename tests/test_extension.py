"""Loading the extension, doing without it, and the threads it runs on."""

import subprocess
import sys
import textwrap

import pytest
import torch

from odn_fast import _extension

built = pytest.mark.skipif(not _extension.available, reason=f"the extension is not used: {_extension.reason}")


def run_in_child(program: str) -> str:
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout


@built
def test_each_instruction_set_can_be_forced():
    best = _extension.instruction_set()
    assert _extension.instruction_sets()[0] == best
    assert _extension.instruction_sets()[-1] == "baseline"
    for name in _extension.instruction_sets():
        with _extension.use_instruction_set(name):
            assert _extension.instruction_set() == name
        assert _extension.instruction_set() == best


def test_unknown_instruction_set_names_those_available():
    with pytest.raises(ValueError, match="'quantum' is not available, expected one of"):
        with _extension.use_instruction_set("quantum"):
            pass


@built
def test_build_information():
    information = _extension.build_information()
    assert information["torch"] == torch.__version__
    assert information["compiler"]


@built
def test_a_library_built_against_another_torch_is_not_loaded(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    module, reason = _extension._load()
    assert module is None
    assert "torch 0.0.1 is running" in reason


@built
def test_parallel_for_uses_two_threads_of_one_runtime():
    # In a child process, because other packages (scikit-learn) bring an OpenMP runtime of their own.
    out = run_in_child(
        """
        import re, torch
        from odn_fast import _C
        torch.set_num_threads(2)
        print(_C.parallel_threads())
        maps = open("/proc/self/maps").read()
        print(len(set(re.findall(r"\\S*/lib(?:gomp|omp|iomp5)[^/\\s]*", maps))))
        """
    )
    assert out.split() == ["2", "1"]


def test_without_the_extension_it_warns_once_and_answers_the_same():
    out = run_in_child(
        """
        import sys, warnings
        sys.modules["odn_fast._C"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch
            import odn_fast
            from odn_fast import _extension, ops
            from odn_fast.reference import exit_heads as reference

            features = [torch.randn(4, 3, 5, 5), torch.randn(4, 7, 2, 2)]
            weights = [torch.randn(10, 3, requires_grad=True), torch.randn(10, 7, requires_grad=True)]
            biases = [torch.randn(10), torch.randn(10)]
            target = torch.randint(10, (4,))
            for _ in range(2):
                losses, correct = ops.exit_heads(features, weights, biases, target)
            losses.sum().backward()
        expected = reference.exit_heads(features, weights, biases, target)
        assert torch.equal(losses, expected[0]) and torch.equal(correct, expected[1])
        assert weights[1].grad.isfinite().all()
        assert not _extension.available and _extension.reason
        assert _extension.instruction_sets() == () and _extension.instruction_set() == ""
        print(*(str(w.message) for w in caught if "odn_fast" in str(w.message)), sep="\\n")
        """
    )
    (line,) = out.splitlines()
    assert "slower" in line and "pip install --no-build-isolation -e ." in line
