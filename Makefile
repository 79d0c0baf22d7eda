# `make demo` and `make test` set everything up by themselves on a machine with Python 3.11 or later and a C++ compiler.
# VATT_CUDA=OFF builds the native module without CUDA; PYTHON=python3.12 chooses the interpreter.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# OpenMP's threads wait busily by default, which beside another busy program leaves a fraction of the speed. `vatt` sets
# this by itself (vatt_engine/cpus.py says why so much); it is for tests and benchmarks, which load torch without it.
export GOMP_SPINCOUNT ?= 1000

python_sources := vatt_engine kernels tests benchmarks setup.py

.PHONY: help setup demo ablation test test-cpus soak versions lint bench gpu clean
.DELETE_ON_ERROR:

help:
	@echo "make demo | ablation [SEEDS=3] | test [FAST=1] | test-cpus [CPUS="avx2 default"] [THREADS="1 2"] | soak | versions [PYTHONS="python3.12 ..."] | lint | bench [BENCH_ARGS=...] | gpu [PART=test|ops|step|data] | clean"

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: Python must be 3.11 or later, got " + sys.version.split()[0] + ". Set PYTHON=python3.12 or the like.")'
	$(PYTHON) -m venv $(VENV)

# Build requirements first, so that the build needs no isolation (and no second download) and is pinned like the rest.
# The native module is compiled while pip, which keeps one processor busy, fetches and unpacks the packages. CMake keeps
# its objects under build/: after a change in csrc only that is compiled. Of open_clip, a rival in the benchmarks, one
# file of losses is read; what else it would bring (torchvision) is not for every torch.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*) | $(PY)
	$(PIP) install -q -c constraints.txt --no-deps setuptools pybind11 cmake ninja open_clip_torch
	@mkdir -p build
	$(PY) setup.py build_ext --inplace > build/native.log 2>&1 & native=$$!; \
	VATT_NATIVE=OFF $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'; packages=$$?; \
	wait $$native || { cat build/native.log; exit 1; }; exit $$packages
	@$(PY) -c 'from vatt_engine import _C; print("native module:", f"CUDA {_C.cuda_archs}" if _C.has_cuda else "CPU only")'
	@touch $@

setup: $(VENV)/.installed

demo: setup
	rm -rf runs/demo
	$(VENV)/bin/vatt demo-data runs/demo/world
	$(VENV)/bin/vatt pretrain demo --data.train runs/demo/world/train.jsonl --out runs/demo/run
	$(VENV)/bin/vatt retrieve runs/demo/run --data runs/demo/world/heldout.jsonl

# Table 5 on a small world (docs/tasks.md), one folder per cell: the same command goes on where it was stopped.
SEEDS ?= 1
ABLATION := runs/ablation
ablation: setup
	$(VENV)/bin/vatt demo-data $(ABLATION)/world --num-train 1536 --num-heldout 24 --untold true
	$(VENV)/bin/vatt demo-data $(ABLATION)/test --num-train 256 --num-heldout 1 --untold true --seed 1
	awk 'match($$0, /"label": [0-9]+/) && ++seen[substr($$0, RSTART, RLENGTH)] <= 2' \
		$(ABLATION)/world/train.jsonl > $(ABLATION)/world/labelled.jsonl
	$(VENV)/bin/vatt ablate benchmarks/ablation.yaml --out $(ABLATION)/cells --data $(ABLATION)/world/train.jsonl \
		--seeds $(SEEDS) --scratch-lrs 0.0005 0.001 0.002 \
		--probes ACTIONS=$(ABLATION)/world/labelled.jsonl,$(ABLATION)/test/train.jsonl \
		SOUNDS/audio=$(ABLATION)/world/labelled.jsonl,$(ABLATION)/test/train.jsonl \
		--retrievals CAPTIONS=$(ABLATION)/world/heldout.jsonl

# A process per CPU, each with the tests of whole files, in the order of conftest.py, and one thread. A hundred of the
# processes that tests start import the package: they find its bytecode, whatever the shell says.
test: export PYTHONDONTWRITEBYTECODE :=
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(if $(FAST),-m "not slow and not soak and not oracle") tests

# The tests of numbers as other processors add them up: PyTorch, oneDNN, MKL or OpenBLAS, the C library and our native
# code are told to leave out AVX-512, or AVX too; each with one thread and with two. Tests of compiled code run as native
# alone: torch.compile passes -march=native all the same, and under these variables its code gave NaN (torch 2.13).
CPUS ?= native avx2 default
THREADS ?= 1 2
NUMERIC := $(addprefix tests/,ops models interop analysis test_testing.py test_losses.py test_class_loss.py test_native.py \
	test_benchmark_peers.py data/test_augment.py tasks/test_pretrain_ranks.py \
	$(addprefix engine/test_,strategies.py optim.py compile.py precision.py engine.py))
without_avx512 := -AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD
as_native :=
as_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell \
	GLIBC_TUNABLES=glibc.cpu.hwcaps=$(without_avx512) VATT_CPU_LEVEL=3
as_default := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
	OPENBLAS_CORETYPE=Nehalem GLIBC_TUNABLES=glibc.cpu.hwcaps=$(without_avx512),-AVX2,-AVX,-FMA VATT_CPU_LEVEL=1
numeric = @echo "== $(1), $(2) thread(s)" && $(as_$(1)) OMP_NUM_THREADS=$(2) $(PY) -m pytest -q --dist loadfile \
	$(if $(filter 1,$(2)),-n auto,-n 0) $(if $(filter-out native,$(1)),-k "not compile") $(NUMERIC)
define newline


endef
test-cpus: setup
	$(foreach cpu,$(CPUS),$(foreach threads,$(THREADS),$(call numeric,$(cpu),$(threads))$(newline)	))

# The oldest and the newest versions that pyproject.toml admits, each in a new environment that is removed afterwards.
# PYTHONS="python3.12 ..." chooses interpreters; an hour and 12 GB of disk.
versions: setup
	$(PY) -m tests.versions $(if $(PYTHONS),--pythons $(PYTHONS)) $(VERSIONS_ARGS)

# The full counts of kills, mutations, faults and steps; `make test` has the same tests with small counts.
soak: setup
	$(PY) -m pytest -m soak --timeout 3600 tests

lint: setup
	ruff check $(python_sources)
	ruff format --check $(python_sources)
	clang-format --dry-run -Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh)

# BENCH_ARGS="--results benchmarks/results" keeps the results; `python -m benchmarks.report` makes tables of them.
bench: setup
	$(PY) -m pytest benchmarks $(BENCH_ARGS)

# A machine with a GPU brings its own torch and need not reach a package index: nothing is installed here. Each call
# takes less than nine minutes and goes on where the last one stopped; results go to $OUT where that is set.
gpu:
	$(PYTHON) -m benchmarks.gpu $(PART) --results $(or $(OUT),benchmarks/results) $(GPU_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info vatt_engine/_C.*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
