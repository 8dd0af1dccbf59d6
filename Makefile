# make demo: set up everything and run the main job.   make test: set up and pass the tests.
# Needs Python 3.11, 3.12 or 3.13, a C++17 compiler and make; everything else comes into .venv.

PYTHON ?= python3
unexport PYTHON  # its choice is for .venv; scripts that the tests start have a choice of that name of their own
TORCH ?= torch==2.13.0
EDGELLM := tensorrt-edgellm==0.11.0 onnxscript onnx-ir  # TensorRT Edge-LLM's exporter
BIN := .venv/bin
NEW_ENOUGH = 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "make demo and make test need Python 3.11 or newer (transformers does), this is %d.%d: make PYTHON=python3.11, after removing .venv where it is there" % sys.version_info[:2])'
SOURCES = $$(git ls-files '*.c' '*.cpp' '*.cu' '*.cuh' '*.h')
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test lint format bench clean

demo: .venv/ready
	@echo "== xshare demo: the shipped model, its own routing against XShare (about 2 minutes on 2 cores)"
	$(BIN)/xshare demo

test: .venv/ready
	@echo "== the whole test suite (7 to 8 minutes on 2 cores)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile  # a worker for each core, one thread each

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

bench: .venv/ready
	$(BIN)/python benchmarks/route_cpu.py --json
	$(BIN)/python benchmarks/specialisation.py --json benchmarks/results/specialisation.json
	$(BIN)/xshare demo --json benchmarks/results/demo.json

# torch is pinned, since on a CPU machine a looser wish can bring gigabytes of CUDA libraries.
.venv/ready: pyproject.toml setup.py $(wildcard plugins/CMakeLists.txt plugins/*/*.h plugins/*/*/*.h plugins/*/*.cpp)
	@echo "== setting up .venv: PyTorch for the CPU, transformers, the native library (3 to 5 minutes)"
	@test -x $(BIN)/python || $(PYTHON) -c $(NEW_ENOUGH)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c $(NEW_ENOUGH)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,test,tensorrt]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps kernel-lens==2.0.1  # TensorRT's headers
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(EDGELLM)  # 200 MB; else its tests are skipped
	-$(BIN)/python -m xshare_trtllm.serving.install_tritonserver  # x86-64, Python 3.12 at most; else its tests are skipped
	@touch $@

clean:
	rm -rf .venv build *.egg-info xshare_trtllm/lib
