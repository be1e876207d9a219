# Every target sets up a local virtual environment first; stamps make the next run quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# What the installed package is made of.
SOURCES := CMakeLists.txt pyproject.toml $(wildcard README.md) $(shell find core backends python -type f -not -name '*.py[co]' -not -name '*.so')

# The budget plugin prints seconds against tests/budget.toml.
PYTEST := PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=tests $(BIN)/python -m pytest -p budget
# One file at a time for each worker, in the order of tests/budget.py.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo qlora qlora-long test test-all lint format bench mutate docs matrix clean

help:
	@echo "make demo      quantize a real model, evaluate it, write a report"
	@echo "make qlora     train a small decoder, quantize it, train adapters through its 4-bit weights"
	@echo "make qlora-long the same on 40 MB of text, 90 minutes and more (Debian)"
	@echo "make test      the tests without the slow ones"
	@echo "make test-all  all tests"
	@echo "make lint      ruff, mypy, clang-format, typos, actionlint"
	@echo "make format    rewrite the sources as lint wants them"
	@echo "make bench     operations and optimizers beside bitsandbytes and torch, OpenMP sharing, call overhead"
	@echo "make mutate    break the kernels of core/kernels one place at a time, count what the samples notice; FILES=... for some"
	@echo "make docs      the documentation, warnings as errors: build/docs/index.html"
	@echo "make matrix    every row of .ci/matrix.json that this machine can run; HEAVY=1 for those that install gigabytes"
	@echo "make clean     remove .venv, build and dist"

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/lint-tools: requirements-lint.txt constraints.txt $(VENV)/created
	$(PIP) install --quiet -c constraints.txt -r requirements-lint.txt
	touch $@

# Seven architectures take nvcc minutes: only where there is a GPU.
CUDA := $(if $(wildcard /dev/nvidia0 /dev/dxg),AUTO,OFF)

# With SYCL on the CPU where its compiler has been fetched, as for the tests.
$(VENV)/package: $(SOURCES) constraints.txt $(VENV)/created $(wildcard build/sycl/made)
	$(PIP) install -c constraints.txt --config-settings=cmake.define.POLYBIT_CUDA=$(CUDA) .
	touch $@

# The last line's packages ask for other torch or transformers versions than they need here.
$(VENV)/tools: requirements-dev.txt requirements-docs.txt requirements-no-deps.txt constraints.txt $(VENV)/created
	$(PIP) install --quiet -c constraints.txt -r requirements-dev.txt -r requirements-docs.txt
	$(PIP) install --quiet -c constraints.txt --no-deps -r requirements-no-deps.txt
	touch $@

# An nvcc that is there already is good enough; the wheels are the compiler alone. A script, because nvcc finds its
# parts from the path that it was called by.
$(VENV)/nvcc: requirements-nvcc.txt $(VENV)/created
	command -v nvcc || { $(PIP) install --quiet --no-deps -r requirements-nvcc.txt && \
	  printf '#!/bin/sh\nexec "%s"/nvidia/cu13/bin/nvcc "$$@"\n' \
	    "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" > $(BIN)/nvcc && chmod +x $(BIN)/nvcc; }
	touch $@

# clang, HIP's headers and device libraries, to check that the GPU kernels compile for AMD. Where they cannot be had, the
# tests say so.
build/rocm/made: requirements-rocm.txt tools/rocm_root.py | $(VENV)/created
	-$(BIN)/python tools/rocm_root.py

# DPC++ as a library, and the CPU as an OpenCL device for it, of oneAPI 2026 and of 2025; x86-64 Linux alone has them.
# Where not, the tests say so.
build/sycl/made build/sycl-2025/made: build/%/made: requirements-%.txt | $(VENV)/created
	rm -rf build/$*
	-$(PIP) install --quiet --no-deps --ignore-installed --prefix build/$* -r $< && touch $@

# Intel's compiler for its GPUs, from SPIR-V: Debian 12's or Ubuntu's packages with what they need but the C and C++
# libraries, unpacked, not installed.
build/ocloc/made:
	rm -rf build/ocloc && mkdir -p build/ocloc
	-cd build/ocloc && apt-get -qq -oAPT::Sandbox::User=root download $$(apt-cache depends --recurse --no-recommends \
	    --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances intel-opencl-icd | \
	    grep -E '^[a-z]' | grep -vE '^(libc6|libgcc-s1|libstdc\+\+6|gcc-.*-base)$$') && \
	  for package in *.deb; do dpkg-deb --extract $$package . || exit; done && rm *.deb && touch made

demo: $(VENV)/package $(VENV)/tools
	POLYBIT_FALLBACK=error $(BIN)/python examples/demo.py

qlora: $(VENV)/package $(VENV)/tools
	POLYBIT_FALLBACK=error $(BIN)/python examples/qlora_cpu.py

qlora-long: $(VENV)/package $(VENV)/tools build/documentation
	POLYBIT_FALLBACK=error $(BIN)/python examples/qlora_cpu.py --text build/documentation --minutes 90 --hidden 384 \
	  --layers 6 --bf16 --checkpoint build/qlora.safetensors

# Three manuals from Debian 12's archive, 40 MB of text; nothing is installed.
build/documentation:
	mkdir -p $@.part && cd $@.part && apt-get download -q python3.11-doc git-doc linux-doc-6.1 && \
	  for package in *.deb; do dpkg-deb --extract $$package .; done && rm *.deb
	mv $@.part $@

test: build/sycl/made build/ocloc/made $(VENV)/package $(VENV)/tools $(VENV)/nvcc build/rocm/made
	$(PYTEST) -m "alone and not slow"
	$(PYTEST) $(PARALLEL) -m "not alone and not slow"

test-all: build/sycl/made build/sycl-2025/made build/ocloc/made $(VENV)/package $(VENV)/tools $(VENV)/nvcc build/rocm/made
	$(PYTEST) -m alone
	$(PYTEST) $(PARALLEL) -m "not alone"

# mypy needs torch and the typed dependencies.
lint: $(VENV)/tools $(VENV)/lint-tools
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files --show-diff-on-failure

format: $(VENV)/lint-tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/clang-format -i

# All of them run, also when one of them is slower than it should be.
BENCHMARKS := "ops.py" "openmp.py" "optim.py" "optim.py --only AdamW8bit --numel 1e8 --rounds 1" "overhead.py"

bench: $(VENV)/package $(VENV)/tools
	@status=0; for benchmark in $(BENCHMARKS); do \
	  POLYBIT_FALLBACK=error $(BIN)/python benchmarks/$$benchmark || status=1; done; exit $$status

mutate: $(VENV)/package
	$(BIN)/python tools/mutate.py $(FILES)

docs: $(VENV)/package $(VENV)/tools
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs

matrix:
	$(PYTHON) .ci/matrix.py run

clean:
	rm -rf $(VENV) build dist
