"""The name of the proofs that need more than kernels: a frozen network, and the loop as CUDA graphs."""

from fastddpm_kernels.proving import Suite

PROOFS = Suite("fastddpm.sampling.verify")
