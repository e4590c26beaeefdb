"""Measure a machine's limits and a model's speed on it, and explain the difference.

`ceilings` measures matrix products, copies and latencies. `layers` and `kernels` show where the time of a step goes.
`causes` compares that with the ceilings. `model` joins them per batch size. `compare` and `plots` read the file of
results. All measurements use `timing`.
"""
