"""Describe kernel launches, and the specialisations that `fastddpm_kernels.aot` compiles without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels import tuned


@dataclass(frozen=True)
class Variant:
    """One specialisation of a Triton kernel.

    Attributes:
        name: its name in the report, for instance `"group_norm_silu.apply[fp16,film]"`.
        kernel: the `@triton.jit` function.
        signature: type of every argument that is not a constexpr, e.g. `{"x": "*fp16", "n": "i32"}`.
        constexprs: value of every constexpr argument (also of run-time arguments that the JIT would specialise
            to a constant, such as a stride of 1 or a pointer that is None).
        num_warps, num_stages: as the launcher would pass them.
        num_warps_of_64, num_stages_of_64: the same on GPUs with 64 threads to a warp, where the launcher passes
            other numbers there.
        options: further compiler options that the launcher passes.
        divisible: integer arguments to be compiled as multiples of 16. Pointers always are, because torch's
            allocations are 256-byte aligned; without this what is compiled is not what runs.
        target: the only target that it is for, or None.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    num_warps_of_64: int | None = None
    num_stages_of_64: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    target: str | None = None

    def per_element(self, instructions: int) -> float | None:
        """Return the instructions of a thread for each element of its program's block, None without such a block.

        Each way of a branch counts, and a loop over tiles once.
        """
        block = self.constexprs.get("BLOCK", self.constexprs.get("BLOCK_P", 0) * self.constexprs.get("BLOCK_C", 0))
        return round(instructions * 32 * self.num_warps / block, 1) if block and instructions else None


_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Descriptor:
    """A tensor that a kernel reads in blocks, by a tensor descriptor.

    Attributes:
        tensor: its last dimension contiguous.
        block: the shape of a block.
    """

    tensor: Tensor
    block: tuple[int, ...]

    def made(self) -> Any:
        """Return the kernel's argument."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(self.tensor, list(self.block))

    def signature(self) -> str:
        return f"tensordesc<{_POINTERS[self.tensor.dtype][1:]}{list(self.block)}>"


@dataclass(frozen=True)
class Launch:
    """One kernel launch. Ahead-of-time compilation uses the same record, so it compiles exactly what runs."""

    name: str
    kernel: Any
    programs: int
    args: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    num_warps: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        args = {name: value.made() if isinstance(value, Descriptor) else value for name, value in self.args.items()}
        self.kernel[(self.programs,)](**args, **self.constexprs, num_warps=self.num_warps, **self.options)

    def variant(self, tag: str) -> Variant:
        """Return the specialisation that the JIT would make for these arguments (meta tensors suffice)."""
        signature: dict[str, str] = {}
        constexprs = dict(self.constexprs)
        divisible = []
        for name, value in self.args.items():
            if value is None or (isinstance(value, int) and value == 1):
                constexprs[name] = value
            elif isinstance(value, Tensor):
                signature[name] = _POINTERS[value.dtype]
            elif isinstance(value, Descriptor):
                signature[name] = value.signature()
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    divisible.append(name)
        return Variant(
            f"{self.name}[{tag}]", self.kernel, signature, constexprs, self.num_warps, divisible=tuple(divisible)
        )


def run_launches(launches: Sequence[Launch], x: Tensor) -> None:
    """Launch on the device of `x`."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return run_launches(launches, x)
    for launch in launches:
        launch.run()


def packaged_variants(ops: Sequence[str], make: Callable[[tuned.Key, tuned.Choice], list[Variant]]) -> list[Variant]:
    """Return the variants of the package's tuned tables, each for the GPU it was found on."""
    return [
        replace(variant, target=target)
        for op in ops
        for target, key, choice in tuned.packaged(op)
        for variant in make(key, choice)
    ]
