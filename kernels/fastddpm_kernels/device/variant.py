"""What `fastddpm_kernels.aot` needs to know to compile one specialisation of a kernel without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastddpm_kernels import tuned as _tuned


@dataclass(frozen=True)
class Variant:
    """One specialisation of a Triton kernel.

    Attributes:
        name: what the report calls it, for instance `"group_norm_silu.apply[fp16,film]"`.
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
        target: the only one that it is for, or None.
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


def packaged_variants(
    ops: Sequence[str], make: Callable[[_tuned.Key, _tuned.Choice], list[Variant]]
) -> list[Variant]:
    """Those that the package's tuned tables run, each for the GPU it was found on."""
    return [
        replace(variant, target=target)
        for op in ops
        for target, key, choice in _tuned.packaged(op)
        for variant in make(key, choice)
    ]
