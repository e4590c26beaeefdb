"""Device code: the only place in the project that imports triton.

One module per op, of the op's name: the `@triton.jit` kernels, their launchers, and `aot_variants()`, which
lists every specialisation that `fastddpm_kernels.aot` compiles. Imported lazily, by the op files, when the
`triton` backend is chosen.
"""
