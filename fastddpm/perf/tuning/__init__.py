"""Find the fastest choices of ops for the shapes that a model runs on this device, and keep them.

An op's own `tuning.py` lists its choices. `shapes` finds the shapes that a model runs, `search` measures, `compiling`
compiles ahead, `store` writes the table that `fastddpm_kernels.tuned` reads.
"""
