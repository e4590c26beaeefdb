"""Parts of `benchmarks/gpu_check.py`: how benchmarks are run, and what is kept and shown of them."""
