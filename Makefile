.PHONY: test long quick lint bench

test:  ## five minutes on two cores
	pytest -n auto

long:  ## and what takes minutes: every random case and compiled variant, native code for other CPUs, whole benchmarks
	pytest -n auto --long

# A thousand tests that touch every room.
QUICK = tests/test_layout.py tests/common tests/process tests/kernels/test_backend.py tests/kernels/test_philox.py \
	tests/kernels/test_residual_add.py tests/networks/test_unet_config.py tests/networks/test_weights.py \
	tests/sampling/test_run.py tests/sampling/test_loop.py tests/sampling/test_pool.py tests/sampling/test_bad_input.py \
	tests/interop/test_lucidrains_tables.py tests/evaluation/test_frechet.py tests/training/test_data.py \
	tests/cli/test_sample.py

quick:  ## under a minute on two cores
	pytest -n auto -m "not slow" $(QUICK)

lint:  ## style, types, the order of the rooms
	ruff check .
	mypy
	lint-imports

bench:  ## timings; every benchmark checks its result first
	pytest --benchmark-only
