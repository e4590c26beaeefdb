"""What a machine can do, what a model does on it, and how far apart the two are.

`ceilings` measures matrix products, copies and latencies; `layers` and `kernels` say where the time of a step goes;
`causes` holds that against the ceilings; `model` puts it together per batch size, as `fastddpm profile` prints it;
`compare` and `plots` take what was written. `timing` is how everything here is timed.
"""
