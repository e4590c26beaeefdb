"""The least time of a step at what this CPU can do, measured: its products, and reading its weights once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from fastddpm_kernels import native
from measuring import PRECISIONS

from fastddpm.perf.profiling import ceilings
from fastddpm.perf.profiling.timing import quantiles, repeat, timed

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = (512, 1024)  # of the matrix products
LEAST_READ = 2**26  # bytes of a sample: small buffers are read many times in a row


class Ceilings:
    """The ceilings of this process's CPU, threads and instruction set; each is measured when it is first asked for.

    Args:
        seconds: about how long one measurement may take.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._products: dict[str, dict[str, Any]] = {}
        self._reads: dict[int, dict[str, Any]] = {}

    def products(self, dtype: str) -> float:
        """Return the best operations per second of products and convolutions of a dtype, two to a multiplication."""
        if dtype not in self._products:
            short = PRECISIONS[DTYPES[dtype]]
            self._products[dtype] = ceilings.matmul_rate(CPU, short, SIZES, seconds=self.seconds, rounds=200)
        return float(self._products[dtype]["best"]) * 1e12

    def read(self, size: int) -> float:
        """Return the best bytes per second of reading `size` bytes again and again, from a cache if they fit one."""
        if size not in self._reads:
            self._reads[size] = read_rate(size, self.seconds)
        return float(self._reads[size]["best"]) * 1e9

    def floor(self, flops: int, weight_bytes: int, dtype: str) -> dict[str, Any]:
        """Return the seconds that a step cannot beat with that many products: the longer of the two.

        Args:
            flops: of the step by the definition of its layers. Winograd's convolutions need fewer.
            weight_bytes: of all weights in the network's dtype.
            dtype: of the network.

        Returns:
            "products_s", "weights_s" and "seconds", the longer of these.
        """
        parts = {"products_s": flops / self.products(dtype), "weights_s": weight_bytes / self.read(weight_bytes)}
        return {**parts, "seconds": max(parts.values())}

    def to_dict(self) -> dict[str, Any]:
        """Return what was measured, for JSON: TFLOP/s by dtype, GB/s by bytes."""
        return {
            "matmul_tflops": dict(self._products),
            "read_gb_s": {str(size): rate for size, rate in sorted(self._reads.items())},
            "capability": torch.backends.cpu.get_cpu_capability(),
        }


def read_rate(size: int, seconds: float) -> dict[str, Any]:
    """Measure GB/s of reading `size` bytes on all threads, by the best of torch's sum and the native checksum."""
    buffer = torch.ones(max(size // 4, 1))
    own, times = buffer.numel() * 4, max(1, LEAST_READ // max(size, 1))
    readers = {"sum": partial(torch.sum, buffer)}
    if native.why_not() is None:
        readers["checksum"] = partial(native.checksums, [buffer])
    best: dict[str, Any] = {}
    for name, reader in readers.items():

        def read(reader: Any = reader) -> None:
            for _ in range(times):
                reader()

        read()
        samples = repeat(partial(timed, read, CPU), seconds=seconds / len(readers), least=3, most=200)
        rates = [own * times / value / 1e9 for value in samples]
        if not best or max(rates) > best["best"]:
            best = {**quantiles(rates), "best": max(rates), "by": name}
    return best
