"""Speed that shows without a GPU: what a step asks of torch, what it allocates, where torch.compile would break.

The plans of a GPU run here on meta tensors, which have shapes and no values: every operation that would launch a kernel
is counted, and every new block of memory. A kernel too many is a failed count here, not a slower benchmark there.
Registers, spills and shared memory of the kernels themselves are held in `tests/kernels/test_aot.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels import backend as _backend
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastddpm import NoiseSchedule, Sampler, UNet
from fastddpm.networks.frozen import FrozenUNet, Program
from fastddpm.networks.network import Network
from fastddpm.process.tables import ddpm_table
from fastddpm.sampling.batch import Batch
from fastddpm.sampling.loop import Body, Loop, buffer_shapes
from fastddpm.sampling.settings import LoopSettings

META = torch.device("meta")
BATCH = 8
# google/ddpm-cifar10-32.
CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
SMALL = CIFAR10 | {
    "sample_size": 8,
    "block_out_channels": (16, 16, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
ATTENTION = "scaled_dot_product_attention"

# Of one step of the frozen CIFAR-10 U-Net on CUDA: torch's operations, and the kernels of triton.
OPERATIONS = {
    "aten.index_select.out": 1,  # the row of the time table
    "aten.cudnn_convolution.out": 49,
    "aten.cudnn_convolution_transpose.default": 3,
    "aten.addmm.out": 6,  # queries, keys and values
    ATTENTION: 6,
    "aten.add_.Tensor": 1,  # the bias of the last convolution
}
KERNELS = {"group_norm_silu.one_pass": 51, "pointwise_conv.pointwise_conv": 13, "residual_add.residual_add": 4}
# What the loop adds: the reverse step, of one kernel, and the counter.
LOOP = {"fastddpm.reverse_step_inplace.default": 1, "aten.add_.Tensor": 1}
# Memory that a step takes anew, in blocks: torch has no form of these that writes to a given place.
ALLOCATING = {"aten.cudnn_convolution_transpose.default": 3, ATTENTION: 6}
# Of one call of the U-Net as it is written, in plain torch: at most.
PLAIN_STEP = {"convolutions": 77, "norms": 51, "products": 54, "attentions": 6, "all": 356}


class Counting(TorchDispatchMode):
    """Counts what launches a kernel (what makes new memory or writes to old), and the memory that is new.

    Operations without a kernel for meta tensors are answered by an empty result of the right shape.

    Attributes:
        launched: how often, by name.
        blocks: how many new blocks of memory, by name of the operation.
        bytes: of all new blocks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.blocks: Counter[str] = Counter()
        self.bytes = 0
        self._attention = _Attention(self)

    def __enter__(self) -> Counting:
        self._attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {block(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = answer(func, args, kwargs)
        new = [t for t in tree_leaves(result) if isinstance(t, Tensor) and block(t) not in before]
        self.note(str(func), new, func._schema.is_mutable)
        return result

    def note(self, name: str, new: list[Tensor], writes: bool = False) -> None:
        """An operation that returned `new` memory or wrote to some that was there."""
        if new or writes:
            self.launched[name] += 1
        for tensor in new:
            self.blocks[name] += 1
            self.bytes += tensor.untyped_storage().nbytes()


class _Attention(TorchFunctionMode):
    """Counts attention as one kernel, as it is on CUDA; on meta tensors torch would take it apart."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        q, v = args[0], args[2]
        with torch._C._DisableTorchDispatch():
            out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)  # as its kernels leave it
        self.counting.note(ATTENTION, [out])
        return out


def block(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.aten.cudnn_convolution.out:
        return kwargs["out"]
    if func is torch.ops.aten.cudnn_convolution_transpose.default:
        n, _, h, w = args[0].shape
        return args[0].new_empty(n, 2 * h, 2 * w, args[1].shape[1]).permute(0, 3, 1, 2)
    return func(*args, **kwargs)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Ops take meta tensors for those of a GPU with triton, and their kernels are counted instead of launched."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    why_not, launched = _backend.why_not, Counter[str]()

    def none(backend: str, device_type: str, *more: Any) -> str | None:
        return None if (backend, device_type) == ("triton", "meta") else why_not(backend, device_type, *more)

    def note(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched[f"{kernel.fn.__module__.split('.')[1]}.{kernel.fn.__name__.strip('_')}"] += 1

    monkeypatch.setattr(_backend, "why_not", none)
    for kind in (InterpretedFunction, JITFunction):  # without a GPU, and with one
        monkeypatch.setattr(kind, "run", note)
    return launched


@pytest.fixture
def frozen() -> FrozenUNet:
    with META:
        unet = UNet(**CIFAR10)
    return FrozenUNet(unet, torch.float16, META)


def loaded(program: Program) -> Program:
    """As if its time table had been filled; meta tensors have nothing to fill it with."""
    program.loads = 1
    return program


def test_a_frozen_step_launches_what_it_did(frozen: FrozenUNet, launches: Counter[str]) -> None:
    program = loaded(frozen.bind(frozen.new_input((BATCH, 3, 32, 32)), torch.zeros(5, dtype=torch.int64, device=META)))
    step = torch.zeros(1, dtype=torch.int64, device=META)
    with Counting() as counting:
        out = program(step)
    assert out.shape == (BATCH, 3, 32, 32)
    assert counting.launched == OPERATIONS
    assert launches == KERNELS
    counted = sum(instruction.kernels for instruction in program.instructions)
    assert (counting.launched + launches).total() == counted, "the instructions say otherwise"


def test_a_step_of_the_loop_allocates_nothing_but_what_torch_forces(frozen: FrozenUNet, launches: Counter[str]) -> None:
    table = ddpm_table(NoiseSchedule.linear(), [900, 500, 0])
    network = Network(lambda x, t: x)
    network.device = META
    settings = LoopSettings(backend="triton", clip_range=1.0)
    network.bind = lambda inputs, timesteps, *_: loaded(frozen.bind(inputs, timesteps))  # type: ignore[method-assign]
    network.new_input = frozen.new_input  # type: ignore[method-assign]
    batch = Batch(keys=torch.zeros(BATCH, 2, dtype=torch.int64))
    loop = Loop(network, buffer_shapes(table, (BATCH, 3, 32, 32), batch, settings, network), settings)
    for _ in range(2):  # the second is as the first
        launches.clear()
        with Counting() as counting:
            loop.body(Body(network=True, guided=False))
        assert counting.launched == Counter(OPERATIONS) + Counter(LOOP)
        assert launches == KERNELS
        assert counting.blocks == ALLOCATING
    upsampled = sum(side**2 * 256 for side in (8, 16, 32))
    attended = 5 * 16**2 * 256 + 4**2 * 256  # five times at 16x16 pixels, once in the middle
    assert counting.bytes == 2 * BATCH * (upsampled + attended)


def test_a_call_of_the_plain_unet_launches_at_most() -> None:
    with META:
        unet = UNet(**CIFAR10).eval()
        x, t = torch.empty(BATCH, 3, 32, 32), torch.empty(BATCH, dtype=torch.int64)
    unet.backend = "eager"
    with torch.no_grad(), Counting() as counting:
        unet(x, t)
    found = {
        "convolutions": counting.launched["aten.convolution.default"],
        "norms": counting.launched["aten.native_group_norm.default"],
        "products": sum(counting.launched[f"aten.{name}.default"] for name in ("addmm", "bmm", "mm")),
        "attentions": counting.launched[ATTENTION],
        "all": counting.launched.total(),
    }
    assert {name: count for name, count in found.items() if count > PLAIN_STEP[name]} == {}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("native", "one_thread")
def test_a_native_step_allocates_nothing(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """On the CPU, with real values, after the first step."""
    if dtype == torch.bfloat16:
        request.getfixturevalue("native_bfloat16")
    unet = UNet(**SMALL).eval()
    frozen = FrozenUNet(unet, dtype, "cpu", backend="native")
    program = frozen.bind(frozen.new_input((2, 3, 8, 8)), torch.tensor([900, 500, 0]))
    step = torch.zeros(1, dtype=torch.int64)
    program(step)
    with Counting() as counting:
        program(step)
    assert not counting.blocks


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_loop_on_the_cpu_does_the_same_in_every_step(backend: str) -> None:
    """Twice the steps are exactly twice the operations and the memory: nothing grows, nothing is made again.

    The noise of all steps is made in the first one, which is not counted.
    """
    if (reason := _backend.why_not(backend, "cpu")) is not None:
        pytest.skip(reason)
    unet = UNet(**SMALL).eval()
    sampler = Sampler(unet, NoiseSchedule.linear(), num_inference_steps=24)
    sampler.network.frozen = FrozenUNet(unet, torch.float32, "cpu", backend=backend)
    seen: list[tuple[Counter[str], int]] = []
    with Counting() as counting:
        sampler.sample(1, seed=0, callback=lambda *_: seen.append((counting.launched.copy(), counting.bytes)))
    counted = [(after - before, size - old) for (before, old), (after, size) in pairwise(seen)]
    assert len(counted) == 23
    assert all(step == counted[0] for step in counted[:-1])  # the last adds no noise
