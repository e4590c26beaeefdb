"""Provide fused operations for denoising diffusion: noising, posterior-mean update, GroupNorm + SiLU, Philox noise.

Each op is one public function in a module of its name, with the same signature on every backend. This package
knows tensors, not diffusion models, and never imports `fastddpm`.
"""
