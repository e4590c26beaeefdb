"""Parts of `benchmarks/gpu_check.py`: what is measured, how it is timed, and where it is written."""
