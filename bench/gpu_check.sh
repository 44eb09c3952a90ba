#!/usr/bin/env bash
# Build, test and measure on this machine's NVIDIA GPU, offline: bench/gpu_check.sh [options]
#   --op NAME        this op alone; may be given again (default: all)
#   --minutes N      begin nothing later, and stop what still runs then (default: 8)
#   --wheels FOLDER  install missing packages from these wheels first
#   --tune           tune block sizes before the benches, for half of the time that is left
#   --search         measure whole searches on MNIST (in $ODN_FAST_DATA) and first steps too, first of all
#   --no-build, --no-tests, --no-sanitizer, --no-benches
# Needs python3 with torch (CUDA), triton, pytest, setuptools, pybind11, cmake and ninja. No step stops another. Each is entered into
# bench/results/<gpu>-<date>.json as it ends, with what failed, beside the benches' figures; its whole output, and a copy of that
# file, go to build/gpu_check or $OUT. A summary comes last. The status is 1 where a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."

ops=() wheels="" minutes=8 tune=0 search=0 build=1 tests=1 sanitizer=1 benches=1
while [ $# -gt 0 ]; do
  case "$1" in
    --op) ops+=("$2"); shift ;;
    --minutes) minutes="$2"; shift ;;
    --wheels) wheels="$2"; shift ;;
    --tune) tune=1 ;;
    --search) search=1 ;;
    --no-build) build=0 ;;
    --no-tests) tests=0 ;;
    --no-sanitizer) sanitizer=0 ;;
    --no-benches) benches=0 ;;
    *) sed -n '2,12p' "$0"; exit 2 ;;
  esac
  shift
done

log="${OUT:-build/gpu_check}"
mkdir -p "$log"
gpu="$(python3 -c 'import torch; print(torch.cuda.get_device_name())')" || { echo "gpu_check: PyTorch sees no CUDA device" >&2; exit 2; }
results="$(python3 bench/results_file.py path "$gpu")"
failed=()
declare -A process

left() { echo $((60 * minutes - SECONDS)); }

has() { python3 -c "import $1" 2>/dev/null; }

# begin NAME SECONDS COMMAND...: a step beside what follows, for so long at most. `end NAME` waits for it, enters it into the
# results and shows the end of its output if it failed.
begin() {
  local name="$1" most="$2" left; shift 2
  left="$(left)"
  [ "$left" -ge "$most" ] || most="$left"
  if [ "$most" -lt 5 ]; then
    echo "not begun: there is no time left" >"$log/$name.txt"
    echo "0 124" >"$log/$name.status"
    process[$name]=""
    return
  fi
  (
    start=$SECONDS status=0
    timeout -k 5 "$most" "$@" >"$log/$name.txt" 2>&1 || status=$?
    echo "$((SECONDS - start)) $status" >"$log/$name.status"
  ) &
  process[$name]=$!
}

end() {
  local name="$1" seconds status
  [ -z "${process[$name]}" ] || wait "${process[$name]}"
  read -r seconds status <"$log/$name.status" || seconds=0 status=1
  python3 bench/results_file.py step "$results" "$name" "$seconds" "$status" "$log/$name.txt"
  [ -z "${OUT:-}" ] || cp "$results" "$log"
  if [ "$status" = 0 ]; then
    echo "$SECONDS s  $name: $seconds s, $(tail -n 1 "$log/$name.txt" | cut -c1-200)"
  else
    failed+=("$name")
    echo "$SECONDS s  $name: FAILED with status $status after $seconds s"
    tail -n 25 "$log/$name.txt" | cut -c1-240
  fi
  return "$status"
}

step() { begin "$@"; end "$1"; }

# ---- what is measured, the most telling first: a bench, and which of its tests

kernels=(separable_conv separable_unit channel_attention batch_norm_act exit_heads augment)
planned=() compiled=()

wanted() { [ ${#ops[@]} = 0 ] || [[ " ${ops[*]} " = *" $1 "* ]]; }

plan() {
  local op
  for op in "${@:2}"; do
    wanted "$op" || continue
    planned+=("$op $1")
    [ "$1" = float32 ] || ! grep -q 'def cuda_cases' "bench/bench_$op.py" || compiled+=("$op")
  done
}
if [ "$benches" = 1 ]; then
  [ "$search" = 0 ] || plan "not float32" search first_step
  plan "not float32" step "${kernels[@]}"
  plan float32 "${kernels[@]}"
  plan "not float32" data
fi

# ---- build; meanwhile, without CUDA's own kernels, a first call of everything, and what torch.compile has to compile

[ -z "$wheels" ] || step wheels 60 python3 -m pip install --no-index --no-deps "$wheels"/*.whl
if [ "$build" = 1 ]; then
  step install 90 env ODN_FAST_BUILD_EXTENSION=0 python3 -m pip install --no-build-isolation --no-deps -e .
  scripts="$(python3 -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"
  architecture="$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')"
  cmake="cmake -G Ninja -S . -DPython_EXECUTABLE=$(command -v python3) -DCMAKE_CUDA_ARCHITECTURES=$architecture"
  begin build 240 env PATH="$scripts:$PATH" bash -c "$cmake -B build/gpu && cmake --build build/gpu"
fi
first=()
[ "$tests" = 0 ] || for op in "${kernels[@]}"; do wanted "$op" && first+=("$op"); done
for op in "${first[@]}"; do begin "first_calls_$op" 150 python3 bench/small_calls.py "$op"; done
[ ${#compiled[@]} = 0 ] || begin compile_ahead 150 env ODN_FAST_BENCH_TRITON_ONLY=1 python3 bench/compile_ahead.py "${compiled[@]}"
for op in "${first[@]}"; do end "first_calls_$op"; done
[ ${#compiled[@]} = 0 ] || end compile_ahead
if [ "$build" = 1 ] && ! end build; then
  step build_without_cuda 120 env PATH="$scripts:$PATH" bash -c "$cmake -DODN_FAST_CUDA=OFF -B build/cpu && cmake --build build/cpu"
fi
step doctor 60 python3 -m odn_fast.doctor
cat "$log/doctor.txt"

# ---- tests; beside them the sanitizer, which may not run beside measurements

checking=0
if [ "$sanitizer" = 1 ] && command -v compute-sanitizer >/dev/null; then
  checking=1
  begin sanitizer 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --report-api-errors no \
    python3 bench/small_calls.py "${ops[@]}"
fi
if [ "$tests" = 1 ]; then
  files=()
  for op in "${ops[@]}"; do files+=(tests/test_"$op"*.py); done
  if [ ${#files[@]} = 0 ]; then
    files=(tests)
    # Without pydantic only the ops can be tested: a search reads its configuration with it.
    if ! has pydantic; then
      files=(tests/test_tune.py tests/test_choose.py tests/test_counters.py tests/test_cuda_execution.py tests/test_nn.py)
      for op in odn_fast/ops/[a-z]*.py; do files+=(tests/test_"$(basename "$op" .py)"*.py); done
    fi
  fi
  # -v: if it is stopped, what failed until then is on record.
  pytest=(python3 -m pytest -v --tb short --durations 10)
  # Neighbouring tests launch the same kernels, so that a process with neighbours compiles each of them once.
  ! has xdist || pytest+=(-n "$(nproc)" --dist worksteal --max-worker-restart 200)
  # What hangs on a GPU cannot be interrupted; this ends its process.
  ! has pytest_timeout || pytest+=(--timeout 120 --timeout-method thread)
  step tests 240 "${pytest[@]}" -m "gpu and not nvcc" "${files[@]}"
  step tests_nvcc 90 "${pytest[@]}" -m "gpu and nvcc" "${files[@]}" || export ODN_FAST_BENCH_TRITON_ONLY=1
fi
[ "$checking" = 0 ] || end sanitizer

# ---- measurements, each in a process of its own: one that CUDA gives up takes no other with it

if [ "$tune" = 1 ]; then
  options=(--minutes "$(python3 -c "print($(left) / 120)")")
  for op in "${ops[@]}"; do options+=(--op "$op"); done
  step tune 600 python3 -m odn_fast.tune "${options[@]}"
  [ -z "${OUT:-}" ] || cp -r kernels/tuned "$log"
fi
for each in "${planned[@]}"; do
  read -r op chosen <<<"$each"
  name="bench_$op"
  [ "$chosen" != float32 ] || name+="_float32"
  step "$name" $((120 + 300 * search)) python3 -m pytest -q -s -p no:cacheprovider -m gpu -k "$chosen" "bench/bench_$op.py"
done

python3 bench/results_file.py summary "$results" | tee "$log/summary.txt"
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
