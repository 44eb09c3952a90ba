# Everything a fresh machine needs is set up here: Python >= 3.10, a C++ compiler and git are enough.
#   make search     a depth search on digits, half a minute once set up; prints where the report is
#   make test       the tests, in about ten minutes
#   make test-all   the slow tests too, and the op tests under the address and undefined-behaviour sanitizers
#   make bench      the benchmarks
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# One stamp per PyTorch that was asked for: another TORCH sets up again.
READY := $(VENV)/.ready-$(shell echo "$(TORCH)" | cksum | cut -d' ' -f1)
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)

# NVIDIA DALI is 250 MB, in half a minute; where it cannot be had, its tests say that they are skipped.
WITH_DALI := $(VENV)/.with-dali

.PHONY: setup search test test-all sanitize bench clean

setup: $(READY)

$(READY): $(BUILD_INPUTS)
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) cmake ninja pybind11 "setuptools>=77" wheel
	$(PIP) --no-build-isolation -e ".[test]"
	rm -f $(VENV)/.ready-*
	touch $(READY)

$(WITH_DALI): $(READY)
	$(PIP) "nvidia-dali-cuda130>=2.4" || echo "without DALI: its tests will be skipped"
	touch $(WITH_DALI)

search: $(READY)
	$(BIN)/python -m odn_fast.search expand --dataset digits --model resnet18 --batch-size 128 \
		--epochs-cap 8 --target-accuracy 98 --tolerance 0.5

test: $(WITH_DALI)
	$(BIN)/python -m pytest -q -m "not slow"

test-all: $(WITH_DALI)
	$(BIN)/python -m pytest -q
	$(MAKE) sanitize

OP_TESTS := $(patsubst odn_fast/ops/%.py,tests/test_%.py,$(wildcard odn_fast/ops/[a-z]*.py)) tests/test_separable_conv_infer.py
SANITIZED = PYTHONPATH="$(CURDIR)/build/sanitize/tree" ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)"

# A build of its own, in a copy of the package, so that the ordinary one stays as it is.
sanitize: $(READY)
	rm -rf build/sanitize/tree && mkdir -p build/sanitize/tree && cp -r odn_fast build/sanitize/tree/
	$(BIN)/cmake -G Ninja -S . -B build/sanitize -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" -DODN_FAST_SANITIZE=ON \
		-DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -DODN_FAST_OUTPUT="$(CURDIR)/build/sanitize/tree/odn_fast"
	$(BIN)/cmake --build build/sanitize
	cd build/sanitize/tree && $(SANITIZED) ../../../$(BIN)/python -c "from odn_fast import _extension as e; \
		assert e.available, e.reason; assert 'sanitize' in e.__file__, e.__file__"
	$(SANITIZED) $(BIN)/pytest -q --capture=sys $(OP_TESTS) -k "not compiles and not export"

bench: $(WITH_DALI)
	$(BIN)/python -m pytest -q -s bench

clean:
	rm -rf $(VENV) build *.egg-info odn_fast/_C*.so
