"""Find the fastest choices of ops for the shapes that a model runs on this device, and keep them.

What an op may choose stands in its own `tuning.py`. `shapes` says which shapes a model runs, `search` measures,
`compiling` compiles ahead, `store` writes the table that `fastddpm_kernels.tuned` reads.
"""
