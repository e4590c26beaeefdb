"""Provide networks that turn images into features, in which distances between sets of images are measured."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastddpm.common.files import read_weights, sha256
from fastddpm.common.images import from_uint8
from fastddpm.evaluation.frechet import DigitJudge

INPUTS = ("uint8", "unit", "signed")
# What works without a network connection or torch-fidelity.
WITHOUT_INCEPTION = (
    "without it there are Inception weights from a file (--inception-weights), other networks (--feature-network), and "
    "for digits the features 'digits'"
)


class Features(Protocol):
    """Turn images into features.

    Attributes:
        name: what they are, in a few words; figures of different features cannot be compared.
    """

    name: str

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return features, floating point [N, D], and logits of classes [N, K] or None, of images uint8 [N, C, H, W].

        Raises:
            ValueError: images of that shape have no such features.
        """


class DigitFeatures:
    """Project on 32 principal components of scikit-learn's digits: the bundled model's features, without a download.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
    """

    def __init__(self) -> None:
        self._judge = DigitJudge()
        self.name = self._judge.name

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        images = self._grey(images)
        if tuple(images.shape[1:]) != (1, 16, 16):
            raise ValueError(f"the features 'digits' are of images [1, 16, 16], these are {list(images.shape[1:])}")
        return torch.from_numpy(self._judge.features(from_uint8(images))), None

    def recognised(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of digits uint8 [N, 1, 16, 16] that a classifier takes for their labels [N]."""
        return self._judge.recognised(from_uint8(self._grey(images)), labels) or 0.0

    @staticmethod
    def _grey(images: Tensor) -> Tensor:
        """Return images whose three channels are equal as grey ones; others as they are."""
        equal = images.shape[1] == 3 and bool((images[:, :1] == images[:, 1:]).all())
        return images[:, :1] if equal else images


class InceptionFeatures:
    """Run torch-fidelity's Inception v3, as published for FID in 2015: 2048 features and the logits.

    It resizes like TensorFlow 1, so that figures can be compared with published ones.

    Args:
        weights: path of the weights as torch-fidelity has them (`weights-inception-2015-12-05-6726825d.pth`), or of a
            safetensors file with the same names; None to take them from torch's cache or download them into it. No
            pickle in it is executed.
        device: where it runs.

    Raises:
        ModuleNotFoundError: torch-fidelity is missing.
        FileNotFoundError: there is no file at `weights`.
        ValueError: the weights cannot be downloaded, read, or are others.
    """

    def __init__(self, weights: str | os.PathLike[str] | None = None, *, device: torch.device | str = "cpu") -> None:
        require_torch_fidelity("Inception features need it")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = _downloaded_inception() if weights is None else Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; it must be a file of Inception weights")
        try:
            state = read_weights(path)
        except ValueError as error:
            reason = str(error).removeprefix(f"{path} ").removeprefix("cannot be read: ")[:120]
            raise ValueError(f"{path} is not a file of weights that can be read: {reason}") from None
        self.name = f"Inception v3, 2048 features (weights {sha256(path)[:8]})"
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):  # it draws weights first
            # torch-fidelity unpickles what it is given: it is given what has just been read without.
            copy = Path(folder) / "inception.pth"
            torch.save(state, copy)
            try:
                self._network = FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(copy)
                )
            except RuntimeError as error:
                first = " ".join(line.strip() for line in str(error).splitlines()[1:2]) or str(error)
                raise ValueError(f"{path} are not the weights of FID's Inception v3: {first[:160]}") from None
        self._device = torch.device(device)
        self._network.to(self._device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != 3:
            raise ValueError(f"images have {images.shape[1]} channels, Inception v3 takes 1 or 3")
        features, logits = self._network(images.to(self._device))
        return features, logits


class NetworkFeatures:
    """Run a network in a file: TorchScript (`torch.jit.save`) or ONNX (needs onnxruntime).

    It is called with images [N, C, H, W] and returns features [N, D] (further axes of size 1 are dropped), or
    (features, logits). Where a TorchScript network has an argument `return_features`, as the detectors of StyleGAN and
    EDM have, it is set. An ONNX network of a fixed batch is given as many at once. A TorchScript file holds a program,
    which is run: open only files that you trust.

    Args:
        path: the file; `.onnx` is ONNX, all else TorchScript.
        feature_input: what the network takes: "uint8" integers from 0 to 255, "unit" floats in [0, 1], "signed" in
            [-1, 1].
        feature_channels: how many it takes; 3 gives grey images three equal channels, None gives images as they are.
        device: where a TorchScript network runs; ONNX runs on CUDA if onnxruntime can.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: onnxruntime is missing.
        ValueError: the file cannot be read, or `feature_input` or `feature_channels` is not known.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        feature_input: str = "uint8",
        feature_channels: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        path = Path(path)
        if feature_input not in INPUTS:
            raise ValueError(f"feature_input is {feature_input!r}, must be one of {', '.join(INPUTS)}")
        if feature_channels not in (None, 1, 3):
            raise ValueError(f"feature_channels is {feature_channels!r}, must be 1, 3 or None")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; it must be a TorchScript or ONNX file")
        self._path, self._input, self._channels = path, feature_input, feature_channels
        self._device = torch.device(device)
        self._run = self._onnx() if path.suffix.lower() == ".onnx" else self._torchscript()
        self.name = f"{path.name} ({sha256(path)[:8]})"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if self._channels not in (None, images.shape[1]):
            raise ValueError(f"images have {images.shape[1]} channels, {self._path} takes {self._channels}")
        given = {"uint8": lambda: images, "unit": lambda: images.float() / 255, "signed": lambda: from_uint8(images)}
        try:
            outputs = self._run(given[self._input]())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # TorchScript's and onnxruntime's own kinds
            reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), repr(error))
            raise ValueError(
                f"{self._path} cannot take {self._input} {list(images.shape)}: {reason[:160]} (feature_input may be "
                f"{', '.join(INPUTS)}; feature_channels 3 gives grey images three channels)"
            ) from None
        rows = [output.flatten(1) if output.ndim > 2 else output for output in outputs[:2]]
        for output, whole in zip(rows, outputs, strict=False):
            if output.ndim != 2 or len(output) != len(images) or sum(size > 1 for size in whole.shape[1:]) > 1:
                raise ValueError(
                    f"{self._path} returns {list(whole.shape)} for {len(images)} images, must return features [N, D]"
                )
        return rows[0], rows[1] if len(rows) > 1 else None

    def _torchscript(self) -> Callable[[Tensor], list[Tensor]]:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.jit.load.*deprecated", category=FutureWarning)
                network = torch.jit.load(str(self._path), map_location=self._device).eval()
        except RuntimeError as error:
            raise ValueError(
                f"{self._path} is not a TorchScript file (torch.jit.save): {str(error).splitlines()[0][:120]}"
            ) from None
        schema = network.forward.schema.arguments
        arguments = {"return_features": True} if any(a.name == "return_features" for a in schema) else {}

        def run(images: Tensor) -> list[Tensor]:
            output = network(images.to(self._device), **arguments)
            return [output] if isinstance(output, Tensor) else list(output)

        return run

    def _onnx(self) -> Callable[[Tensor], list[Tensor]]:
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"onnxruntime is missing, which runs {self._path}; pip install onnxruntime", name="onnxruntime"
            ) from None
        usable = onnxruntime.get_available_providers()
        wanted = ["CUDAExecutionProvider"] if self._device.type == "cuda" else []
        try:
            session = onnxruntime.InferenceSession(
                str(self._path), providers=[name for name in [*wanted, "CPUExecutionProvider"] if name in usable]
            )
        except Exception as error:  # its own kinds
            raise ValueError(f"{self._path} is not an ONNX file: {str(error).splitlines()[0][:120]}") from None
        declared = session.get_inputs()[0]
        dtypes = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}
        fitting = ("uint8",) if declared.type == "tensor(uint8)" else ("unit", "signed")
        if declared.type not in dtypes or self._input not in fitting:
            raise ValueError(
                f"feature_input is {self._input!r}, but {self._path} takes {declared.type}: must be "
                f"{' or '.join(fitting)}"
            )
        if self._channels is None and len(declared.shape) == 4 and declared.shape[1] in (1, 3):
            self._channels = declared.shape[1]

        # torch.onnx.export writes the size of its example as the only one, unless it is told not to.
        fixed = next((size for size in declared.shape[:1] if isinstance(size, int)), None)

        def run(images: Tensor) -> list[Tensor]:
            sizes = zip(declared.shape[1:], images.shape[1:], strict=False)
            if len(declared.shape) != 4 or any(isinstance(size, int) and size != given for size, given in sizes):
                raise ValueError(f"it takes {declared.shape}")
            array = np.ascontiguousarray(images.cpu().numpy().astype(dtypes[declared.type]))
            parts: list[list[np.ndarray]] = []
            for start in range(0, len(array), fixed or len(array)):
                part = array[start : start + (fixed or len(array))]
                missing = 0 if fixed is None else fixed - len(part)
                filled = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
                parts.append([output[: len(part)] for output in session.run(None, {declared.name: filled})])
            return [torch.from_numpy(np.concatenate(outputs)) for outputs in zip(*parts, strict=True)]

        return run


def require_torch_fidelity(reason: str) -> None:
    """Raise ModuleNotFoundError with `reason` and the alternatives unless torch-fidelity is installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ModuleNotFoundError(
            f"torch-fidelity is missing: {reason}; pip install fastddpm[evaluate]; {WITHOUT_INCEPTION}",
            name="torch_fidelity",
        )


def _downloaded_inception() -> Path:
    """Return the weights in torch's cache, which torch-fidelity uses too; download them if they are missing."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    name = URL_INCEPTION_V3.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        prefix = name.removesuffix(".pth").rpartition("-")[2]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=prefix, progress=False)
        except (OSError, RuntimeError) as error:  # no connection, no room; another hash
            raise ValueError(
                f"Inception weights are not in {path} and cannot be downloaded ({error}); {WITHOUT_INCEPTION}"
            ) from None
    return path
