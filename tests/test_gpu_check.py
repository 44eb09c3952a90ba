"""bench/gpu_check.sh, with a python3 that only says what it was asked: one step's failure hides no other, and all is on record."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHES = ["step", "separable_conv", "separable_unit", "channel_attention", "batch_norm_act", "exit_heads", "augment"]
OF_KERNELS = BENCHES[1:]
IN_ORDER = [*BENCHES, *(f"{name}_float32" for name in OF_KERNELS), "data"]
PYTHON = """#!/bin/sh
case "$*" in
  *results_file.py*) exec {python} "$@" ;;
  *get_device_name*) echo "NVIDIA Stub" ;;
  *get_device_capability*) echo 90 ;;
  *sysconfig*) echo {bin} ;;
  *"-c import "*) ;;
  *) echo "$* ${{ODN_FAST_BENCH_TRITON_ONLY+without}}" >>{calls}
     for word in $FAILING; do
       case "$*" in *"$word"*) echo "FAILED tests/some.py::$word - by $word"; echo "1 failed"; exit 1 ;; esac
     done
     echo "3 passed" ;;
esac
"""
CMAKE = """#!/bin/sh
echo "cmake $*" >>{calls}
case "$FAILING_BUILD $*" in yes*=OFF* | *build/cpu | no*) ;; *) exit 1 ;; esac
"""


@pytest.fixture
def check(tmp_path):
    """Runs the script in a folder of its own, given options and words of commands that fail: its status, output, results, commands."""
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    (tmp_path / "tests").mkdir()
    tools, calls, out = tmp_path / "bin", tmp_path / "calls.txt", tmp_path / "out"
    tools.mkdir()
    for name, content in {"python3": PYTHON.format(python=sys.executable, bin=tools, calls=calls),
                          "cmake": CMAKE.format(calls=calls),
                          "compute-sanitizer": "#!/bin/sh\necho checked\n"}.items():
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)

    def run(*options, failing="", build_fails=False):
        environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(out), "FAILING": failing,
                                    "FAILING_BUILD": "yes" if build_fails else "no"}
        environment.pop("ODN_FAST_BENCH_TRITON_ONLY", None)
        done = subprocess.run(["bash", tmp_path / "bench" / "gpu_check.sh", *options], env=environment, capture_output=True, text=True,
                              timeout=100)
        (results,) = (tmp_path / "bench" / "results").glob("nvidia-stub-*.json")
        assert (out / results.name).read_text() == results.read_text() and (out / "summary.txt").is_file(), done.stdout + done.stderr
        return done.returncode, done.stdout, json.loads(results.read_text()), calls.read_text().splitlines() if calls.exists() else []

    return run


def benches_of(calls):
    """The measured ones, in order, named as their steps are."""
    called = [call for call in calls if " bench/bench_" in call]
    names = [call.rpartition("bench/bench_")[2].partition(".py")[0] for call in called]
    return [f"{name}_float32" if "-k float32" in call else name for name, call in zip(names, called)]


def test_everything_is_run_and_entered(check):
    status, said, results, calls = check()
    assert status == 0 and "failed:" not in said, said
    assert benches_of(calls) == IN_ORDER
    names = ["install", "build", "compile_ahead", "doctor", "sanitizer", "tests", "tests_nvcc"]
    names += [f"first_calls_{name}" for name in OF_KERNELS] + [f"bench_{name}" for name in IN_ORDER]
    assert set(results["steps"]) == set(names)
    assert all(step["outcome"] == "ok" and "failures" not in step for step in results["steps"].values())
    assert not any(call.endswith("without") for call in calls if " bench/bench_" in call)


def test_what_fails_hides_nothing(check):
    status, said, results, calls = check(failing="nvcc bench_separable_conv.py doctor")
    failed = [name for name, step in results["steps"].items() if step["outcome"] != "ok"]
    assert status == 1 and said.splitlines()[-1].startswith("failed: "), said
    assert set(failed) >= {"tests_nvcc", "bench_separable_conv", "bench_separable_conv_float32", "doctor"} and "build" not in failed
    assert benches_of(calls) == IN_ORDER
    step = results["steps"]["bench_separable_conv"]
    assert step["failures"] == ["FAILED tests/some.py::bench_separable_conv.py - by bench_separable_conv.py"]
    assert "FAILED tests/some.py::bench_separable_conv.py" in said
    # What CUDA's own kernels did to their tests, they are not to do to the benches.
    assert all(call.endswith("without") for call in calls if " bench/bench_" in call)


def test_without_a_build_of_cuda_there_is_one_for_the_cpu(check):
    status, _, results, calls = check("--no-benches", "--no-tests", build_fails=True)
    assert status == 1 and results["steps"]["build"]["outcome"] == "failed with status 1"
    assert results["steps"]["build_without_cuda"]["outcome"] == "ok" and any("-DODN_FAST_CUDA=OFF" in call for call in calls)


def test_an_op_alone(check):
    _, _, results, calls = check("--op", "augment", "--no-build", "--no-sanitizer", "--no-tests")
    assert benches_of(calls) == ["augment", "augment_float32"]
    assert set(results["steps"]) == {"compile_ahead", "doctor", "bench_augment", "bench_augment_float32"}


def test_out_of_time_everything_is_left_out_and_said(check):
    status, _, results, calls = check("--minutes", "0")
    assert status == 1 and not calls
    assert all(step["last_line"] == "not begun: there is no time left" for step in results["steps"].values())
    assert {f"bench_{name}" for name in IN_ORDER} < set(results["steps"])


@pytest.fixture
def harness_cuda(monkeypatch, tmp_path):
    """The benches' harness, with figures that cost nothing: a case called "wrong" raises, after "broken" CUDA does not work."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import harness_cuda
    import results_file

    def measure_case(case, limits):
        if case.name == "wrong":
            raise AssertionError("ours is wrong")
        broken.append(case.name == "broken")
        return {"microseconds": {"step": {"ours": 1.0}}, "over": {"step": {"compiled": 2.0}}, "share_of_floor": {"step": 0.5}}

    broken = []
    for name, stand_in in {"ceilings": lambda: {"copy_GB_s": 4000.0}, "machine": lambda: {"gpu": "stub"}, "measure_case": measure_case,
                           "rows_of": lambda name, figures: [], "in_order": lambda: not any(broken)}.items():
        monkeypatch.setattr(harness_cuda, name, stand_in)
    monkeypatch.setattr(harness_cuda.torch.cuda, "get_device_name", lambda: "NVIDIA Stub")
    monkeypatch.setattr(harness_cuda.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    monkeypatch.setattr(harness_cuda, "content", lambda: json.loads(results_file.path_of("NVIDIA Stub").read_text()), raising=False)
    return harness_cuda


def named_cases(harness_cuda, *names):
    return [functools.partial(lambda name: harness_cuda.Case(name, {}, {}, {}), name) for name in names]


def test_a_wrong_case_costs_no_other_its_figures(harness_cuda):
    reach = [harness_cuda.Reach("step", "compiled", 1.5)]
    with pytest.raises(AssertionError, match="wrong: AssertionError: ours is wrong"):
        harness_cuda.run("norm", torch.float32, named_cases(harness_cuda, "first", "wrong", "last"), reach)
    bench = harness_cuda.content()["benches"]["norm_float32"]
    assert set(bench["cases"]) == {"first", "last"} and len(bench["failures"]) == 1
    assert bench["verdicts"]["step, over compiled"]["met"]


def test_where_cuda_ends_what_was_measured_is_kept(harness_cuda):
    with pytest.raises(AssertionError, match="what would follow broken is not measured: CUDA does not work any more"):
        harness_cuda.run("norm", torch.bfloat16, named_cases(harness_cuda, "first", "broken", "last"))
    assert set(harness_cuda.content()["benches"]["norm_bfloat16"]["cases"]) == {"first", "broken"}


def test_benches_of_ops_and_the_doctor_need_no_pydantic():
    """A machine with a GPU may have PyTorch and little else."""
    program = "import sys; sys.modules['pydantic'] = None; sys.path.insert(0, 'bench')\nimport odn_fast.doctor, odn_fast.tune\n"
    program += "\n".join(f"import bench_{name}" for name in OF_KERNELS)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
