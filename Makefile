# Everything runs in an environment of its own, built on first use and reused until a requirement changes.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: demo test lint docs readme wheel fuzz sanitize sanitize-native arm mutate zoo bench-cpu bench-gpu bench-gpu-chains clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/bench-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/lcnn-compile demo

test: lint docs
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/ready
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --builder html docs docs/_build

readme: $(VENV)/ready
	$(BIN)/python benchmarks/readme.py

# Every property test with 20,000 examples, for hours; HYPOTHESIS_EXAMPLES says how many instead.
fuzz: $(VENV)/ready
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -n 2 -m hypothesis -k "not triton"

# The tests of the C++ kernels under AddressSanitizer and UBSan; compiling for it takes a minute per instruction set.
sanitize: $(VENV)/ready
	LCNN_CPU_SANITIZE=1 CXX=$${CXX:-g++} \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest tests/test_cpu_kernels.py tests/test_cpu_gradients.py tests/test_program*.py tests/test_int8_kernels.py tests/test_int8_programs.py tests/test_operator_safety.py tests/test_passes.py \
		-k "not without_kernels and not damaged and not concurrent"

# liblcnn.so under the same sanitizers, on 20,000 damaged model files.
sanitize-native: $(VENV)/ready
	$(BIN)/python -W ignore tests/native/sanitize.py

# liblcnn.so for ARM, run by an emulator: needs g++-aarch64-linux-gnu and qemu-user.
arm: $(VENV)/ready
	$(BIN)/python -W ignore tests/native/arm.py

# A wheel with the kernels of every instruction set, tagged with the oldest system that it runs on.
wheel: $(VENV)/ready
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/auditwheel repair --wheel-dir dist build/wheel/lcnn_compile-*.whl

# Break the code in known ways, one at a time in a copy, and see that the tests notice; an hour or two. See tests/mutate.py.
mutate: $(VENV)/ready
	$(BIN)/python tests/mutate.py

# Architectures of timm and torchvision against the dense networks, an hour or two; an interrupted run goes on. ZOO='--only …' chooses.
zoo: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torchvision timm
	OMP_NUM_THREADS=1 LCNN_TUNE=0 $(BIN)/python benchmarks/zoo.py $(ZOO)

bench-cpu: $(VENV)/bench-ready
	$(BIN)/lcnn-compile bench all

bench-gpu:
	$(PYTHON) benchmarks/gpu.py

bench-gpu-chains:
	$(PYTHON) benchmarks/gpu_chains.py

clean:
	rm -rf $(VENV) build dist docs/_build demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
