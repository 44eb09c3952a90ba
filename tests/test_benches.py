"""Every bench of the CPU runs and finds its results right; what it measures is thrown away.

Each is given two repetitions, and torch.compile hands functions back as they are.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHES = sorted(path.name for path in ROOT.glob("bench/bench_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("bench", BENCHES)
def test_bench_runs(bench, tmp_path):
    results = {path.name: path.stat().st_mtime_ns for path in ROOT.glob("bench/results/*")}
    environment = os.environ | {"ODN_FAST_BENCH_QUICK": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment.pop("TRITON_INTERPRET", None)  # the tests' own
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", "--basetemp", str(tmp_path / "of")]
    command = [sys.executable, "-m", "pytest", *options, bench]
    done = subprocess.run(command, cwd=ROOT / "bench", env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout, done.stdout[-1000:]
    assert {path.name: path.stat().st_mtime_ns for path in ROOT.glob("bench/results/*")} == results, "a quick run left figures"
