.PHONY: test quick lint bench

test:  ## everything that can run here
	pytest -n auto

quick:  ## what takes under a minute on two cores
	pytest -n auto -m "not slow" tests

lint:  ## style, types, the order of the rooms
	ruff check .
	mypy
	lint-imports

bench:  ## timings; every benchmark checks its result first
	pytest --benchmark-only
