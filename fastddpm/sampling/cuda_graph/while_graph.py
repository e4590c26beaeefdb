"""A CUDA graph that repeats another one as often as a counter on the device says, by a WHILE conditional node.

torch has no public way to build one, so this calls the driver through cuda-bindings, which is imported when it is
needed (https://docs.nvidia.com/cuda/cuda-c-programming-guide/#conditional-graph-nodes).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from fastddpm.sampling.cuda_graph.capture_check import CaptureError

# WHILE nodes came with CUDA 12.4; NeMo, which has run networks in them for long, asks for 12.6.
DRIVER = (12, 6)

# Ends the body: one step less to go, and whether there is another.
SOURCE = """
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);

extern "C" __global__ void fastddpm_next_step(unsigned long long handle, long long* remaining)
{
    long long left = *remaining - 1;
    *remaining = left;
    cudaGraphSetConditional(handle, left > 0);
}
"""
_ASSIGN_DEFAULT = 1  # CU_GRAPH_COND_ASSIGN_DEFAULT: each launch starts with the handle at its default
_kernels: dict[int, Any] = {}  # by index of the device; modules stay loaded


def why_not(device: torch.device) -> str | None:
    """Return why `device`, an existing CUDA device, cannot run a WHILE node, or None if it can. Never raises."""
    if torch.version.hip is not None:
        return "ROCm has no conditional graph nodes"
    try:
        from cuda import bindings
        from cuda.bindings import driver, nvrtc
    except Exception as error:  # a broken installation raises more than ImportError
        return f"cuda-bindings cannot be imported ({first_line(error)}); pip install cuda-bindings"
    if not hasattr(driver, "cuGraphConditionalHandleCreate"):
        return f"cuda-bindings {bindings.__version__} has no conditional graph nodes; pip install -U cuda-bindings"
    try:
        version = _call(driver.cuDriverGetVersion)
        _call(nvrtc.nvrtcVersion)
    except Exception as error:
        return f"cuda-bindings finds no driver or no NVRTC ({first_line(error)})"
    have = version // 1000, version % 1000 // 10
    if have < DRIVER:
        return f"the driver is for CUDA {have[0]}.{have[1]}, conditional nodes need {DRIVER[0]}.{DRIVER[1]}"
    return None


@functools.lru_cache
def compile_kernel(capability: tuple[int, int]) -> bytes:
    """Compile the kernel that ends the body with NVRTC: a cubin for GPUs of `capability`, no GPU needed.

    A driver older than the toolkit refuses PTX, so make PTX only if NVRTC does not know the GPU.

    Raises:
        CaptureError: NVRTC could not compile it, or only for newer GPUs.
    """
    from cuda.bindings import nvrtc

    wanted = 10 * capability[0] + capability[1]
    known = [arch for arch in _call(nvrtc.nvrtcGetSupportedArchs) if arch <= wanted]
    if not known:
        raise CaptureError(f"NVRTC does not compile for GPUs of compute capability {capability[0]}.{capability[1]}")
    native = max(known) // 10 == capability[0]  # cubins run on all later minor versions
    program = _call(nvrtc.nvrtcCreateProgram, SOURCE.encode(), b"fastddpm_next_step.cu", 0, [], [])
    try:
        option = f"--gpu-architecture={'sm' if native else 'compute'}_{max(known)}".encode()
        try:
            _call(nvrtc.nvrtcCompileProgram, program, 1, [option])
        except CaptureError as error:
            log = bytearray(_call(nvrtc.nvrtcGetProgramLogSize, program))
            _call(nvrtc.nvrtcGetProgramLog, program, log)
            raise CaptureError(f"{error}: {log.decode(errors='replace')}") from None
        size, get = (
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if native else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        )
        code = bytearray(_call(size, program))
        _call(get, program, code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(code)


class WhileGraph:
    """An executable graph of one WHILE node, whose body is another graph.

    The body is a child graph, which the driver copies, and is not captured into the node. So torch itself captures it,
    with its memory pool, checks and errors, and one capture serves all modes.
    """

    def __init__(self, body: int, device: torch.device) -> None:
        """Build the graph around `body`, the `cudaGraph_t` of one step on `device`, the current device.

        The memory that `body` works on must outlive this object.

        Raises:
            CaptureError: the driver refused, for example because `body` has nodes that a WHILE node cannot hold.
        """
        from cuda.bindings import driver

        self._launch = driver.cuGraphLaunch
        self._destroy = driver.cuGraphExecDestroy
        with torch.inference_mode(False):  # it is written both inside and outside inference mode
            self._remaining = torch.zeros(1, dtype=torch.int64, device=device)
        kernel = _kernel(device)
        context = _call(driver.cuCtxGetCurrent)
        graph = _call(driver.cuGraphCreate, 0)
        try:
            # Default 1: a launch always runs the body once, and `launch` is never asked for less.
            handle = _call(driver.cuGraphConditionalHandleCreate, graph, context, 1, _ASSIGN_DEFAULT)
            node = driver.CUgraphNodeParams()
            node.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
            node.conditional.handle = handle
            node.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
            node.conditional.size = 1
            node.conditional.ctx = context
            _call(driver.cuGraphAddNode, graph, *_no_dependencies(), node)
            inside = node.conditional.phGraph_out[0]
            step = _call(driver.cuGraphAddChildGraphNode, inside, [], 0, driver.CUgraph(body))
            values = ctypes.c_uint64(int(handle)), ctypes.c_uint64(self._remaining.data_ptr())
            arguments = (ctypes.c_void_p * 2)(*(ctypes.addressof(value) for value in values))
            end = driver.CUDA_KERNEL_NODE_PARAMS()
            end.func = kernel
            end.gridDimX = end.gridDimY = end.gridDimZ = 1
            end.blockDimX = end.blockDimY = end.blockDimZ = 1
            end.kernelParams = ctypes.addressof(arguments)  # read during the next call
            _call(driver.cuGraphAddKernelNode, inside, [step], 1, end)
            self._executable = _call(driver.cuGraphInstantiate, graph, 0)
        finally:
            driver.cuGraphDestroy(graph)  # the executable graph is a copy

    def launch(self, count: int, stream: torch.cuda.Stream) -> None:
        """Enqueue `count` >= 1 runs of the body on `stream`, the current stream."""
        self._remaining.fill_(count)  # a kernel argument: no copy, nothing to wait for
        _call(self._launch, self._executable, stream.cuda_stream)

    def close(self) -> None:
        """Free the graph, which must not be running."""
        executable, self._executable = self._executable, None
        if executable is not None:
            self._destroy(executable)


def _kernel(device: torch.device) -> Any:
    """Return the loaded kernel for `device`, the current device. The caller keeps other threads out."""
    from cuda.bindings import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _kernels:
        code = ctypes.create_string_buffer(compile_kernel(torch.cuda.get_device_capability(device)))
        module = _call(driver.cuModuleLoadData, ctypes.addressof(code))
        _kernels[index] = _call(driver.cuModuleGetFunction, module, b"fastddpm_next_step")
    return _kernels[index]


def _no_dependencies() -> tuple[Any, ...]:
    """Return the arguments of `cuGraphAddNode` for a node without dependencies; CUDA 13 adds edge data to them."""
    from cuda import bindings

    return ([], [], 0) if int(bindings.__version__.split(".")[0]) >= 13 else ([], 0)


def _call(function: Any, *args: Any) -> Any:
    """Return the result of a cuda-bindings call without its status: None, a value or a tuple. Raise CaptureError."""
    status, *values = function(*args)
    if int(status) != 0:
        raise CaptureError(f"{function.__name__} returned {status.name}")
    return values[0] if len(values) == 1 else tuple(values) or None


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
