"""Share device code among ops: launches and their ahead-of-time compilation, walks of element-wise kernels."""
