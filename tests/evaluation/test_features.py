"""Networks of features, from files that are not trusted more than they must be."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from fastddpm.evaluation.features import DigitFeatures, InceptionFeatures, NetworkFeatures


class Means(nn.Module):
    """The mean of each channel, as it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3))


class Detector(nn.Module):
    """Called as the detectors of StyleGAN and EDM are."""

    def forward(self, x: Tensor, return_features: bool = False, use_fp16: bool = False) -> Tensor:
        return x.float().mean((2, 3), keepdim=True) if return_features else x.float().amax((2, 3))


class Two(nn.Module):
    """Features and logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.float().mean((2, 3)), x.float().amax((2, 3))


class Maps(nn.Module):
    """No features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Fussy(nn.Module):
    """A convolution, which does not take integers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).mean((2, 3))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (5, 3, 6, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def scripted(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scripting is deprecated; the files are there
        torch.jit.save(torch.jit.script(network), str(path))
    return path


@pytest.mark.parametrize(("feature_input", "low", "high"), [("uint8", 0, 255), ("unit", 0, 1), ("signed", -1, 1)])
def test_torchscript_gets_the_values_asked_for(
    tmp_path: Path, images: Tensor, feature_input: str, low: float, high: float
) -> None:
    network = NetworkFeatures(scripted(Means(), tmp_path / "means.pt"), feature_input=feature_input)
    features, logits = network(images)
    expected = low + (high - low) * images.double().mean((2, 3)) / 255
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=1e-6)
    assert logits is None
    assert network.name.startswith("means.pt (")


def test_detectors_return_features_and_others_logits(tmp_path: Path, images: Tensor) -> None:
    features, logits = NetworkFeatures(scripted(Detector(), tmp_path / "a.pt"))(images)
    torch.testing.assert_close(features, images.float().mean((2, 3)))
    assert logits is None
    features, logits = NetworkFeatures(scripted(Two(), tmp_path / "b.pt"))(images)
    torch.testing.assert_close(features, images.float().mean((2, 3)))
    torch.testing.assert_close(logits, images.float().amax((2, 3)))


def test_grey_images_get_three_channels_where_asked(tmp_path: Path, images: Tensor) -> None:
    network = NetworkFeatures(scripted(Fussy(), tmp_path / "a.pt"), feature_input="unit", feature_channels=3)
    assert torch.equal(network(images[:, :1])[0], network(images[:, :1].expand(-1, 3, -1, -1))[0])


@pytest.mark.parametrize(
    ("network", "options", "channels", "message"),
    [
        (Fussy, {}, [0, 1, 2], r"x.pt cannot take uint8 \[5, 3, 6, 4\]: .*feature_input may be uint8, unit"),
        (Fussy, {"feature_input": "unit"}, [0], r"cannot take unit \[5, 1, 6, 4\]: .*feature_channels 3"),
        (Fussy, {"feature_input": "unit", "feature_channels": 3}, [0, 1, 2, 0], "4 channels, .*x.pt takes 3"),
        (Maps, {}, [0, 1, 2], r"x.pt returns \[5, 3, 6, 4\] for 5 images"),
        (Fussy, {"feature_input": "float"}, [0, 1, 2], "feature_input is 'float'"),
        (Fussy, {"feature_channels": 2}, [0, 1, 2], "feature_channels is 2"),
    ],
)
def test_what_a_network_cannot_take_or_must_not_return(
    tmp_path: Path, images: Tensor, network: Any, options: dict[str, Any], channels: list[int], message: str
) -> None:
    path = scripted(network(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        NetworkFeatures(path, **options)(images[:, channels])


class Trap:
    """Unpickling it would make a folder."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (Path("trapped"),)


def test_no_pickle_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"Conv2d_1a_3x3.conv.weight": Trap()}, "trap.pth")
    with pytest.raises(ValueError, match="trap.pth is not a file of weights that can be read"):
        InceptionFeatures("trap.pth")
    with pytest.raises(ValueError, match=r"trap.pth is not a TorchScript file \(torch.jit.save\)"):
        NetworkFeatures("trap.pth")
    assert not Path("trapped").exists()


def onnx_network(path: Path, dtype: int, channels: int | str, batch: int | str = "n", height: int | str = "h") -> Path:
    """Means of channels and a second output, their maxima."""
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    nodes = [
        helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["y", "axes"], ["means"], keepdims=0),
        helper.make_node("ReduceMax", ["y", "axes"], ["maxima"], keepdims=0),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "c"]) for name in ("means", "maxima")]
    given = helper.make_tensor_value_info("x", dtype, [batch, channels, height, "w"])
    graph = helper.make_graph(nodes, "means", [given], outputs, [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.save(model, str(path))
    return path


def test_onnx(tmp_path: Path, images: Tensor) -> None:
    features, logits = NetworkFeatures(onnx_network(tmp_path / "a.onnx", TensorProto.UINT8, 3))(images)
    torch.testing.assert_close(features, images.float().mean((2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, images.float().amax((2, 3)))
    grey = images[:, :1]  # the channels are those that the file declares
    features, _ = NetworkFeatures(onnx_network(tmp_path / "b.onnx", TensorProto.FLOAT, 3), feature_input="unit")(grey)
    torch.testing.assert_close(features, (grey.float() / 255).mean((2, 3)).expand(-1, 3), rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"feature_input is 'uint8', but .*b.onnx takes tensor\(float\): must be unit or"
    ):
        NetworkFeatures(tmp_path / "b.onnx")
    with pytest.raises(ValueError, match="c.onnx cannot take uint8"):
        NetworkFeatures(onnx_network(tmp_path / "c.onnx", TensorProto.UINT8, 7))(images)
    (tmp_path / "d.onnx").write_bytes(b"no")
    with pytest.raises(ValueError, match="d.onnx is not an ONNX file"):
        NetworkFeatures(tmp_path / "d.onnx")


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_onnx_of_a_fixed_batch(tmp_path: Path, images: Tensor, batch: int) -> None:
    """As torch.onnx.export writes it, of one image for the most part."""
    network = NetworkFeatures(onnx_network(tmp_path / "a.onnx", TensorProto.UINT8, 3, batch, 6))
    features, logits = network(images)
    torch.testing.assert_close(features, images.float().mean((2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, images.float().amax((2, 3)))
    with pytest.raises(ValueError, match=rf"cannot take uint8 \[5, 3, 4, 6\]: it takes \[{batch}, 3, 6, 'w'\]"):
        network(images.transpose(2, 3))


def test_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ModuleNotFoundError, match="onnxruntime is missing, which runs .*a.onnx; pip install onnxruntime"
    ):
        NetworkFeatures(onnx_network(tmp_path / "a.onnx", TensorProto.UINT8, 3))


class Bare(FeatureExtractorInceptionV3):
    """Inception v3 with random weights."""

    def load_state_dict(self, *_: object, **__: object) -> None:  # type: ignore[override]
        pass


def test_inception_is_torch_fidelity_s(tmp_path: Path, images: Tensor) -> None:
    torch.save({}, tmp_path / "none.pth")
    theirs = Bare("bare", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "none.pth"))
    save_file(theirs.state_dict(), tmp_path / "inception.safetensors")
    ours = InceptionFeatures(tmp_path / "inception.safetensors")
    for mine, expected in zip(ours(images[:2]), theirs(images[:2]), strict=True):
        assert torch.equal(mine, expected)
    grey = images[:1, :1]
    assert torch.equal(ours(grey)[0], theirs(grey.expand(-1, 3, -1, -1))[0])
    assert ours.name.startswith("Inception v3, 2048 features (weights ")
    with pytest.raises(ValueError, match="images have 4 channels, Inception v3 takes 1 or 3"):
        ours(images[:1, [0, 1, 2, 0]])


def test_other_weights_are_not_inception_s(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth are not the weights of FID's Inception v3"):
        InceptionFeatures(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="none.pth is missing; it must be a file of Inception weights"):
        InceptionFeatures(tmp_path / "none.pth")


def test_without_a_connection_it_says_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(ValueError, match=r"cannot be downloaded \(no connection\); .*--feature-network.*'digits'"):
        InceptionFeatures()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ModuleNotFoundError, match=r"torch-fidelity is missing: .*pip install fastddpm\[evaluate\]; "):
        InceptionFeatures()


def test_digits(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"the features 'digits' are of images \[1, 16, 16\], these are \[3, 6, 4\]"):
        DigitFeatures()(images)
