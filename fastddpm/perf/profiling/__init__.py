"""Measure what a machine can do, what a model does on it, and how far apart the two are.

`ceilings` measures matrix products, copies and latencies; `layers` and `kernels` show where the time of a step goes;
`causes` holds that against the ceilings; `model` joins them per batch size; `compare` and `plots` read the file that
was written. All of them time with `timing`.
"""
