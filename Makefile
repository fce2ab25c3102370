# Only names things: what they do is in scripts/setup.sh and in the turbo-gguf command. ARGS="..." is handed on, MODEL=... as --model.

PYTHON_VENV := .venv/bin/python
TURBO := .venv/bin/turbo-gguf
OVERLAY_SOURCES = $(shell find ggml-patches/overlay -type f \( -name '*.c' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))

# Tests of one thread, which run on all cores. Others have the machine to themselves, since llama.cpp's threads wait for each other in loops.
SIDE_BY_SIDE := tests/unit tests/codec tests/kernels/lanes
# Those of llama.cpp come first, since what others need can be compiled meanwhile (gpu-libraries).
ALONE := tests/llama $(filter-out tests/llama tests/data $(SIDE_BY_SIDE),$(patsubst %/,%,$(wildcard tests/*/)))

SOAK = $(if $(MINUTES),--minutes '$(MINUTES)') $(if $(TYPES),--types '$(TYPES)') $(if $(MODEL),--model '$(MODEL)')

.DEFAULT_GOAL := help
.PHONY: help ppl-gate test check release-check build-cpu build-cpu-debug build-rocm build-cuda build-vulkan build-rocm-all-pairs build-cuda-all-pairs
.PHONY: container-cpu container-rocm container-cuda try-container gpu-root gpu-libraries test-hip-emulated test-vulkan test-server kernel-report gpu-proof
.PHONY: soak soak-asan bench-cpu check-upstreams quality-matrix setup setup-dev clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

ppl-gate: setup ## the main job: build, measure and judge the turbo cache types, on MODEL=smollm2, too (set-up included)
	$(PYTHON_VENV) -m turbo_gguf.ppl-gate $(if $(MODEL),--model '$(MODEL)') $(ARGS)

test: setup-dev check ## all checks and tests (set-up included)
ifdef ARGS
	$(PYTHON_VENV) -m pytest $(ARGS)
else
	$(PYTHON_VENV) -m pytest -n auto $(SIDE_BY_SIDE)
	$(PYTHON_VENV) -m pytest $(ALONE) $(SIDE_BY_SIDE:%=--ignore=%)
endif

check: setup-dev ## lint, types, patch set, generated code, documents; old results are named
	$(PYTHON_VENV) -m ruff check .
	$(PYTHON_VENV) -m ruff format --check .
	$(PYTHON_VENV) -m mypy
	$(PYTHON_VENV) -m turbo_gguf.codec.codegen --check
	$(TURBO) patch check
	$(PYTHON_VENV) scripts/check_docs.py
	$(PYTHON_VENV) scripts/check_results.py
	.venv/bin/clang-format --dry-run -Werror --style=file:$$($(TURBO) upstream fetch)/.clang-format $(OVERLAY_SOURCES)

release-check: check ## what a release needs: all of check, the hooks on every upstream, and no old result
	$(TURBO) patch check --all
	$(PYTHON_VENV) scripts/check_results.py --strict

build-cpu build-cpu-debug build-rocm build-cuda build-vulkan build-rocm-all-pairs build-cuda-all-pairs: setup
	$(TURBO) build --preset $(@:build-%=%) $(ARGS)

build-cpu: ## compile the patched llama.cpp for this CPU
build-cpu-debug: ## the same with assertions and sanitizers
build-rocm: ## compile it for the AMD GPUs here (or GPU_TARGETS=gfx1100)
build-cuda: ## compile it for the NVIDIA GPUs here (or CUDAARCHS=89)
build-vulkan: ## compile it for GPUs with a Vulkan driver

container-cpu container-rocm container-cuda:
	python3 scripts/containers/images.py build $(@:container-%=%) $(ARGS)

container-cpu: ## build the container of llama-server with podman or docker (container-rocm, container-cuda likewise)

try-container: ## run the steps of the CPU's container in bare Debian roots, and ask its server (root rights, no podman or docker)
	python3 scripts/containers/bare_root.py cpu $(ARGS)

gpu-root: ## make a Debian root with HIP, Vulkan and a Vulkan driver for CPUs, for work without a GPU (root rights, 1.6 GB)
	@scripts/gpu_root.sh make

gpu-libraries: setup-dev ## compile what the tests in this root load, as they would at first use (half an hour)
	PYTHONPATH=tests/kernels:tests/kernels/emulated:tests/kernels/vulkan $(PYTHON_VENV) tests/kernels/gpu_libraries.py

test-hip-emulated: setup-dev ## all GPU operations on the emulator, result in eval/results (ten minutes; a part of it is in the tests)
	PYTHONPATH=tests/kernels $(PYTHON_VENV) tests/kernels/emulated/emulated_report.py $(ARGS)

test-vulkan: setup-dev ## the Vulkan backend on Mesa's driver for CPUs, result in eval/results (an hour or two; ARGS=--small for less; a part of it is in the tests)
	PYTHONPATH=tests/kernels:tests/kernels/vulkan $(PYTHON_VENV) tests/kernels/vulkan/lavapipe_report.py $(ARGS)

test-server: setup-dev ## upstream's server tests with f16, q8_0, turbo4t, turbo3t; table in build/report (ten minutes; a part is in the tests)
	PYTHONPATH=dev $(PYTHON_VENV) -m upstream_server $(ARGS)

soak: setup-dev ## hostile traffic on llama-server for MINUTES=120 (TYPES=..., MODEL=...); log in build/report/soak
	PYTHONPATH=dev:tests/llama $(PYTHON_VENV) -m soak $(SOAK) $(ARGS)

soak-asan: setup-dev ## the same with sanitizers, MINUTES=10 (compiles build-cpu-debug first)
	PYTHONPATH=dev:tests/llama $(PYTHON_VENV) -m soak --preset cpu-debug --minutes 10 $(SOAK) $(ARGS)

kernel-report: setup ## compile our GPU kernels for all architectures; registers and spills go to eval/results/kernels.md
	$(PYTHON_VENV) scripts/kernels/kernel_report.py $(ARGS)

gpu-proof: setup ## build for the GPU here, check and measure everything on it in half an hour; results in build/prove/results
	scripts/gpu/prove.sh $(ARGS)

bench-cpu: setup ## speed on the CPU: single ops, odd shapes, a whole model against depth (two to three idle hours)
	$(PYTHON_VENV) scripts/bench/bench_cpu.py $(ARGS)

quality-matrix: setup ## cache types on real and planted models: as typed, plain, each default alone; to build/report/matrix (25 idle minutes)
	$(PYTHON_VENV) scripts/bench/quality_matrix.py $(ARGS)

check-upstreams: setup ## compile and try every supported upstream (an hour; not part of the tests); result in eval/results
	$(TURBO) upstream try --all --report eval/results/upstreams.md $(ARGS)

setup: ## make .venv with what the package needs
	@scripts/setup.sh run

setup-dev: ## make .venv with what the tests need, too
	@scripts/setup.sh dev

clean: ## remove trees, builds and logs; keep downloads, results and .venv
	rm -rf build/trees build/builds build/oracle build/logs

distclean: ## remove all that was made, results and .venv too
	rm -rf build .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
