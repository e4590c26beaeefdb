"""Performance: what a machine can do (`profiling`) and which kernels are fastest on it (`tuning`)."""
