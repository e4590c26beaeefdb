"""Device code that ops share: launches and their compilation ahead of time, walks of element-wise kernels."""
