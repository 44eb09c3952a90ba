#!/usr/bin/env bash
# Build, test and measure on this machine's NVIDIA GPU, offline: bench/gpu_check.sh [options]
#   --op NAME        this op alone; may be given again (default: all)
#   --wheels FOLDER  install missing packages from these wheels first
#   --tune           tune block sizes before the benches
#   --search         measure whole searches on MNIST (in $ODN_FAST_DATA) and first steps too: some minutes more
#   --keep-going     measure although tests failed
#   --no-build, --no-tests, --no-sanitizer, --no-benches
# Needs python3 with torch (CUDA), triton, pytest, setuptools, pybind11, cmake and ninja. Full outputs go to
# build/gpu_check or $OUT, figures to bench/results/<gpu>-<date>.json; a summary comes last. The status is that of the worst step.
set -euo pipefail
cd "$(dirname "$0")/.."

ops=() wheels="" tune=0 search=0 keep_going=0 build=1 tests=1 sanitizer=1 benches=1
while [ $# -gt 0 ]; do
  case "$1" in
    --op) ops+=("$2"); shift ;;
    --wheels) wheels="$2"; shift ;;
    --tune) tune=1 ;;
    --search) search=1 ;;
    --keep-going) keep_going=1 ;;
    --no-build) build=0 ;;
    --no-tests) tests=0 ;;
    --no-sanitizer) sanitizer=0 ;;
    --no-benches) benches=0 ;;
    *) sed -n '2,11p' "$0"; exit 2 ;;
  esac
  shift
done

log="${OUT:-build/gpu_check}"
mkdir -p "$log"
failed=()

# attempt NAME COMMAND...: the command's output goes to a file, of which the end is shown if it fails.
attempt() {
  local name="$1" begin=$SECONDS; shift
  if "$@" >"$log/$name.txt" 2>&1; then
    echo "$name: $((SECONDS - begin)) s, $(tail -n 1 "$log/$name.txt" | cut -c1-200)"
  else
    echo "$name: FAILED after $((SECONDS - begin)) s"
    tail -n 40 "$log/$name.txt" | cut -c1-300
    return 1
  fi
}

fail() {
  failed+=("$1")
  [ "$keep_going" = 1 ] || exit 1
}

step() { attempt "$@" || fail "$1"; }

if [ -n "$wheels" ]; then
  step wheels python3 -m pip install --no-index --no-deps "$wheels"/*.whl
fi
if [ "$build" = 1 ]; then
  step build python3 -m pip install --no-build-isolation --no-deps -e .
fi
step doctor python3 -m odn_fast.doctor
cat "$log/doctor.txt"
python3 -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu_check: PyTorch sees no CUDA device")'

if [ "$tests" = 1 ]; then
  files=()
  for op in "${ops[@]}"; do files+=(tests/test_"$op"*.py); done
  if [ ${#files[@]} = 0 ]; then
    files=(tests)
    # Without pydantic only the ops can be tested: a search reads its configuration with it.
    python3 -c 'import pydantic' 2>/dev/null ||
      files=(tests/test_tune.py tests/test_choose.py tests/test_cuda_execution.py tests/test_nn.py $(for op in odn_fast/ops/[a-z]*.py; do ls tests/test_"$(basename "$op" .py)"*.py; done | sort -u))
  fi
  parallel=()
  # Neighbouring tests launch the same kernels, so that a process with neighbours compiles each of them once.
  python3 -c 'import xdist' 2>/dev/null && parallel=(-n "$(nproc)" --dist worksteal)
  step tests python3 -m pytest -q -m gpu --durations 10 "${parallel[@]}" "${files[@]}"
fi

checking=""
if [ "$sanitizer" = 1 ] && command -v compute-sanitizer >/dev/null; then
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 attempt sanitizer timeout 200 compute-sanitizer --error-exitcode 1 --report-api-errors no \
    python3 bench/small_calls.py "${ops[@]}" &
  checking=$!
fi

compiled=() files=()
if [ "$benches" = 1 ]; then
  for bench in bench/bench_*.py; do
    op="$(basename "${bench#bench/bench_}" .py)"
    grep -q needs_gpu "$bench" || continue
    [[ " first_step search " != *" $op "* ]] || [ "$search" = 1 ] || continue
    [ ${#ops[@]} = 0 ] || [[ " ${ops[*]} " = *" $op "* ]] || continue
    files+=("$bench")
    grep -q 'def cuda_cases' "$bench" && compiled+=("$op")
  done
  [ ${#compiled[@]} = 0 ] || step compile_ahead python3 bench/compile_ahead.py "${compiled[@]}"
fi
if [ -n "$checking" ]; then wait "$checking" || fail sanitizer; fi  # which may run beside compiling, not beside measuring

if [ "$tune" = 1 ]; then
  options=(--minutes 5)
  for op in "${ops[@]}"; do options+=(--op "$op"); done
  step tune python3 -m odn_fast.tune "${options[@]}"
  if [ -n "${OUT:-}" ]; then cp -r kernels/tuned "$log"; fi
fi

if [ ${#files[@]} != 0 ]; then
  attempt benches timeout $((400 + 500 * search)) python3 -m pytest -q -s -m gpu "${files[@]}" || failed+=(benches)
  step summary python3 bench/harness_cuda.py
  cat "$log/summary.txt"
  if [ -n "${OUT:-}" ]; then cp bench/results/nvidia-*-"$(date +%Y-%m-%d)".json "$log"; fi
fi

[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
