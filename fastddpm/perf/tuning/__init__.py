"""Finds, for the shapes that a model runs, the fastest choices of its ops on this device, and keeps them.

`task`, `norms` and `convolutions` say what there is to choose, `shapes` which shapes there are, `search` measures,
`store` writes the table that `fastddpm_kernels.tuned` reads, and `automatic` does all that before a loop that asks.
"""
