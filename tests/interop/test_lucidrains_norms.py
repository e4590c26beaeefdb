"""Networks of denoising_diffusion_pytorch that are not frozen: fused norms, other dtypes and memory formats, graphs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("denoising_diffusion_pytorch", reason="needs denoising_diffusion_pytorch")

from lucidrains_objects import CLOSE, NETWORKS, both, diffusion, fast, guided_diffusion, same, unet

from fastddpm.interop.lucidrains.models import (
    FusedBlock,
    FusedRMSNorm,
    GuidedPredictor,
    Predictor,
    cast_embeddings,
    fuse_norms,
)
from fastddpm.sampling.cuda_graph import explain


@pytest.mark.parametrize("name", list(NETWORKS))
def test_fused_norms_are_theirs(name: str) -> None:
    model, (x, *more) = NETWORKS[name]()
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    kinds = {type(module).__name__ for module in model.modules()}
    fused, count = fuse_norms(model)
    assert {type(module).__name__ for module in model.modules()} == kinds
    blocks = sum(isinstance(module, FusedBlock) for module in fused.modules())
    norms = sum(isinstance(module, FusedRMSNorm) for module in fused.modules())
    assert blocks == sum(type(module).__name__ == "Block" for module in model.modules()) > 0
    assert blocks + norms == count == sum(type(module).__name__ == "RMSNorm" for module in model.modules())
    assert fused.state_dict().keys() == model.state_dict().keys()
    assert all(mine is theirs for mine, theirs in zip(fused.parameters(), model.parameters(), strict=True))
    t = torch.tensor([3, 17])
    named = {"cond_drop_prob": 0.0} if more else {}
    torch.set_default_dtype(torch.float64)  # which is that of their time embedding
    try:
        expected, out = (network(x.double(), t, *more, **named) for network in (model, fused))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_fused_norms_in_triton(backend: str) -> None:
    theirs = diffusion(unet(dim_mults=(1,)), sampling_timesteps=1)
    same(both(theirs, fast(theirs, freeze=False, fuse_norms=True, backend=backend), "sample", 1))


def test_channels_last() -> None:
    theirs = diffusion(sampling_timesteps=5)
    ours = fast(theirs, freeze=False, channels_last=True, fuse_norms=True)
    formats = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, out: (
            formats.append(out.is_contiguous(memory_format=torch.channels_last))
            if isinstance(module, FusedBlock)
            else None
        )
    )
    try:
        same(both(theirs, ours, "sample", 2))
    finally:
        hook.remove()
    assert formats
    assert all(formats)
    assert theirs.model.init_conv.weight.is_contiguous()


def test_modules_that_are_listened_to_stay() -> None:
    model = unet()
    model.mid_block1.block1.register_forward_hook(lambda *_: None)
    fused, count = fuse_norms(model)
    assert type(fused.mid_block1.block1).__name__ == "Block"
    assert count == fuse_norms(unet())[1]  # its norm is replaced instead


def test_fused_norms_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = diffusion()
    monkeypatch.setattr(FusedBlock, "forward", lambda self, x, scale_shift=None: self.proj(x))
    with pytest.raises(RuntimeError, match="differs by .*; fuse_norms=False"):
        fast(theirs, freeze=False, fuse_norms=True)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_graph_can_hold_the_networks(name: str) -> None:
    model, (x, *more) = NETWORKS[name]()
    t = torch.tensor([3, 17])
    for network in (model, cast_embeddings(fuse_norms(model)[0])):
        for guided in (True, False):
            predictor: nn.Module = Predictor(network)
            if more:
                predictor = GuidedPredictor(network, guided=guided, rescaled=True, device=x.device)
            with torch.no_grad():
                assert explain(partial(predictor.eval(), x, t, *more)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [None, 6])
def test_samples_on_a_gpu(steps: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # for theirs
    theirs = diffusion(unet(self_condition=True), sampling_timesteps=steps).cuda()
    same(both(theirs, fast(theirs, dtype="float32"), "sample", 2), 10 * CLOSE)
    ours = fast(theirs, noise="philox", freeze=False, channels_last=True)
    torch.testing.assert_close(ours.sample(2, seed=1), ours.sample(2, seed=1), rtol=0, atol=CLOSE)
    guided = guided_diffusion(sampling_timesteps=steps).cuda()
    accelerated, classes = fast(guided, dtype="float32"), torch.tensor([1, 2], device="cuda")
    for cond_scale in (2.0, 5.0):  # of one captured graph
        same(both(guided, accelerated, "sample", classes, cond_scale), 10 * CLOSE)
