"""CUDA graphs of a loop's body: the only part of the package that is specific to CUDA.

`captured` records a body and runs it any number of times, `while_graph` runs all steps in one launch, and
`capture_check` says why a body cannot be recorded. Importing this needs neither CUDA nor cuda-bindings.
"""

from fastddpm.sampling.cuda_graph.capture_check import CaptureError, explain
from fastddpm.sampling.cuda_graph.captured import MODES, CapturedBody, tuned, why_not

__all__ = ["MODES", "CaptureError", "CapturedBody", "explain", "tuned", "why_not"]
