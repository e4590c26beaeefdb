"""Compile kernel variants ahead of time, without their GPU, and report what each uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastddpm_kernels.device.variant import Variant


@dataclass(frozen=True)
class Usage:
    """The resources that one compiled variant uses.

    Attributes:
        registers: per thread (on AMD vector registers, accumulation registers included).
        spills: bytes of local memory per thread on NVIDIA (stack frames included), spilled vector registers plus
            bytes of scratch on AMD; 0 is what one wants.
        shared: bytes of shared memory (LDS) per program.
        load_bits, store_bits: the widest access to global memory by one thread.
        instructions: in the machine code, both ways of every branch counted and loops once (NVIDIA; 0 on AMD).
        matrix: those of them for matrix products (HMMA, HGMMA, UTCHMMA and their like).
    """

    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int
    instructions: int = 0
    matrix: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def target(name: str) -> GPUTarget:
    """Return triton's target for a name such as "sm_90" or "gfx942".

    Raises:
        ValueError: the name is of neither form.
    """
    if match := re.fullmatch(r"sm_(\d+)a?", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx9[0-9a-f]+", name):
        return GPUTarget("hip", name, 64)
    raise ValueError(f"target is {name!r}, must be of the form sm_90 or gfx942")


def compile_variant(variant: Variant, target_name: str) -> Usage:
    """Compile `variant` as the JIT does on such a GPU, and return what it uses.

    Raises:
        Exception: whatever triton raises for a kernel that does not compile.
    """
    return usage(compiled(variant, target_name))


def compiled(variant: Variant, target_name: str) -> triton.compiler.CompiledKernel:
    """Return `variant` as compiled; see `compile_variant`."""
    names = variant.kernel.arg_names
    if wrong := set(names) ^ (set(variant.signature) | set(variant.constexprs)):
        raise ValueError(f"{variant.name}: arguments {sorted(wrong)} are in the kernel or in the variant, not in both")
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in variant.divisible]
    source = ASTSource(
        variant.kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in variant.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    gpu = target(target_name)
    num_warps, num_stages = variant.num_warps, variant.num_stages
    if gpu.warp_size == 64:
        num_warps, num_stages = variant.num_warps_of_64 or num_warps, variant.num_stages_of_64 or num_stages
    options = {"num_warps": num_warps, "num_stages": num_stages, **variant.options}
    return triton.compile(source, target=gpu, options=options)


def usage(kernel: triton.compiler.CompiledKernel) -> Usage:
    """Return what a compiled kernel uses."""
    return _nvidia_usage(kernel) if "cubin" in kernel.asm else _amd_usage(kernel)


def _nvidia_usage(compiled: triton.compiler.CompiledKernel) -> Usage:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        tool = triton.knobs.nvidia.nvdisasm.path
        code = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    accesses = re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d+))?\.[bfus](\d+)\b", compiled.asm["ptx"])
    width = {"ld": 0, "st": 0}
    for kind, lanes, bits in accesses:
        width[kind] = max(width[kind], int(lanes or 1) * int(bits))
    names = instructions(code)
    return Usage(
        used["REG"], used["LOCAL"] + used["STACK"], compiled.metadata.shared, width["ld"], width["st"], len(names),
        sum(re.match(r"(H|I|D|Q|UTC[HIQ])G?MMA\b", name) is not None for name in names),
    )  # fmt: skip


def instructions(code: str) -> list[str]:
    """Return the names of a kernel's instructions from what nvdisasm prints, without the padding at its end."""
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    while names and names[-1].partition(".")[0] in ("NOP", "BRA"):  # a jump to itself, and whole lines of cache
        names.pop()
    return names


def _amd_usage(compiled: triton.compiler.CompiledKernel) -> Usage:
    text = compiled.asm["amdgcn"]
    used = {key: int(value) for key, value in re.findall(r"^\s*\.?(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    names = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}
    width = {"load": 0, "store": 0}
    for kind, size in re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", text):
        key = re.sub(r"_d16.*", "", size)
        width[kind] = max(width[kind], names.get(key, 8))
    return Usage(
        registers=used.get("vgpr_count", 0),
        spills=used.get("vgpr_spill_count", 0) + used.get("private_segment_fixed_size", 0),
        shared=compiled.metadata.shared,
        load_bits=width["load"],
        store_bits=width["store"],
    )
