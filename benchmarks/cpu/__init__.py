"""What `cpu_check.py` measures on a CPU: whole calls, single evaluations, steps of the loop in a crowd, the start."""
