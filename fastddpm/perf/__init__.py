"""Performance: measure what a machine can do (`profiling`) and find the fastest kernels on it (`tuning`)."""
