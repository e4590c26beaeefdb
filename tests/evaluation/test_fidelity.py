"""FID, KID, precision and recall, and the Inception score against closed forms and torch-fidelity's own run."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, calculate_metrics, register_feature_extractor

from fastddpm import load_pretrained
from fastddpm.evaluation import Evaluator, evaluate
from fastddpm.evaluation.frechet import frechet_distance
from fastddpm.evaluation.image_sets import ImageSet, of_sampler

KEYS = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "inception_score_mean",
    "inception_score_std": "inception_score_std",
}
WEIGHTS = torch.randn(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Linear:
    """Features and logits that are linear in the pixels of images [N, 3, 2, 2]; counts what it has seen."""

    name = "linear"

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        self.seen += len(images)
        rows = images.flatten(1).double() / 255
        return rows @ WEIGHTS, rows @ WEIGHTS[:, :5]


class LinearExtractor(FeatureExtractorBase):
    """The same, for torch-fidelity."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        rows = images.flatten(1).double() / 255
        made = {"features": rows @ WEIGHTS, "logits": rows @ WEIGHTS[:, :5]}
        return tuple(made[name] for name in self.features_list)


class Images(Dataset):
    def __init__(self, images: np.ndarray) -> None:
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def drawn(count: int, seed: int, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (count, 2, 2, 3), dtype=np.uint8)


def test_as_torch_fidelity_from_images_to_figures() -> None:
    register_feature_extractor("linear-test", LinearExtractor)
    samples, real = drawn(150, 1, 40, 230), drawn(230, 2)
    ours = evaluate(samples, real, features=Linear(), batch_size=32)
    theirs = calculate_metrics(
        input1=Images(samples),
        input2=Images(real),
        feature_extractor="linear-test",
        **dict.fromkeys(("fid", "kid", "prc", "isc"), True),
        kid_subset_size=150,
        cuda=False,
        verbose=False,
        save_cpu_ram=True,  # no worker processes
    )
    assert ours.kid_subset_size == 150
    for name, key in KEYS.items():
        assert getattr(ours, name) == pytest.approx(theirs[key], rel=1e-7, abs=1e-9), name
    assert ours.not_measured == {}
    assert (ours.num_samples, ours.num_real) == (150, 230)


def test_the_same_images_in_any_order() -> None:
    real = drawn(400, 3)
    same = evaluate(real[np.random.default_rng(0).permutation(400)], real, features=Linear())
    assert same.fid == pytest.approx(0, abs=1e-10)
    assert (same.precision, same.recall) == (1, 1)
    assert same.kid is not None
    assert same.kid <= 0  # unbiased: what two subsets share makes it less than nothing
    samples = drawn(300, 4)
    one = evaluate(samples, real, features=Linear(), metrics=["fid", "prc"])
    two = evaluate(samples[::-1].copy(), real[::-1].copy(), features=Linear(), metrics=["prc", "fid"])
    assert one.fid == pytest.approx(two.fid, rel=1e-9)
    assert (one.precision, one.recall) == (two.precision, two.recall)


def test_gaussians_in_closed_form() -> None:
    class Values:
        """The pixels themselves."""

        name = "pixels"

        def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
            return images.flatten(1).double(), None

    # Every pixel of every image is independent; so is each of a permutation of its values.
    rng = np.random.default_rng(5)
    column = np.clip(rng.normal(100, 10, 4000).round(), 0, 255)
    spread = column.std(ddof=1)
    a = np.stack([rng.permutation(column) for _ in range(12)], 1).astype(np.uint8).reshape(-1, 2, 2, 3)
    wider = np.clip(100 + 2 * (column - 100), 0, 255) + 5
    b = np.stack([rng.permutation(wider) for _ in range(12)], 1).astype(np.uint8).reshape(-1, 2, 2, 3)
    result = evaluate(a, b, features=Values(), metrics=["fid"])
    exact = 12 * ((wider.mean() - column.mean()) ** 2 + (wider.std(ddof=1) - spread) ** 2)
    assert result.fid == pytest.approx(exact, rel=0.01)  # sample correlations of 4,000 are about 1.6 %
    assert result.kid is None
    assert result.not_measured == {}


def test_precision_is_of_samples_and_recall_of_real_images() -> None:
    narrow = evaluate(drawn(300, 1, 110, 146), drawn(300, 2), features=Linear(), metrics=["prc"])
    assert narrow.precision is not None
    assert narrow.recall is not None
    assert narrow.precision > 0.9
    assert narrow.recall < 0.1


def test_statistics_in_place_of_images(tmp_path: Path) -> None:
    real, samples = drawn(200, 6), drawn(120, 7)
    features = Linear()(torch.from_numpy(real).permute(0, 3, 1, 2))[0].numpy()
    np.savez(tmp_path / "a.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    expected = evaluate(samples, real, features=Linear(), metrics=["fid"])
    result = evaluate(samples, tmp_path / "a.npz", features=Linear())
    assert result.fid == pytest.approx(expected.fid, rel=1e-9)
    assert result.num_real is None
    assert set(result.not_measured) == {"kid", "prc"}
    assert result.inception_score is not None
    assert "which do not say of how many images they are" in " ".join(result.notes)
    with pytest.raises(ValueError, match="metrics has kid, which cannot be measured: .*has statistics alone"):
        evaluate(samples, tmp_path / "a.npz", features=Linear(), metrics=["kid"])
    np.savez(tmp_path / "b.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match="b.npz has statistics of 64 features, but linear makes 10"):
        evaluate(samples, tmp_path / "b.npz", features=Linear())


def test_real_features_are_computed_once() -> None:
    features = Linear()
    evaluator = Evaluator(drawn(50, 1), features=features)
    first = evaluator(drawn(20, 2))
    seen = features.seen
    assert evaluator(drawn(20, 2)) == first
    assert features.seen == seen + 20 + 2  # two images of zeros are tried first


def test_nothing_is_drawn_where_it_cannot_work() -> None:
    def draw() -> Any:
        raise AssertionError("drawn")

    images = ImageSet("model", 50, (3, 2, 2), draw)
    with pytest.raises(ValueError, match="metrics has prc, which cannot be measured: there are 3 images, it needs 4"):
        evaluate(images, drawn(3, 0), features=Linear(), metrics=["prc"])
    with pytest.raises(ValueError, match="real has images of 2 x 2 but the samples are of 8 x 8"):
        evaluate(ImageSet("model", 50, (3, 8, 8), draw), drawn(3, 0), features=Linear())
    with pytest.raises(ValueError, match="the features 'digits' are of images"):
        evaluate(images, drawn(3, 0), features="digits")


def test_few_images_are_warned_of() -> None:
    many = np.random.default_rng(0).integers(0, 256, (10_000, 2, 2, 3), dtype=np.uint8)
    assert not any("biased" in note for note in evaluate(many, many, features=Linear(), metrics=["fid"]).notes)
    for samples, real in ((many[:9_999], many), (many, many[:9_999])):
        notes = evaluate(samples, real, features=Linear(), metrics=["fid"]).notes
        assert sum("an FID of 9,999 images is biased upwards" in note for note in notes) == 1
    assert evaluate(many[:50], many[:50], features=Linear(), metrics=["prc"]).notes == []


def test_without_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate(drawn(50, 1), drawn(60, 2), features=Linear()).fid
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    result = evaluate(drawn(50, 1), drawn(60, 2), features=Linear())
    assert result.fid == expected
    assert set(result.not_measured) == {"kid", "prc", "isc"}
    with pytest.raises(
        ValueError, match=r"metrics has kid, .*: torch-fidelity is missing; pip install fastddpm\[evalu"
    ):
        evaluate(drawn(50, 1), drawn(60, 2), features=Linear(), metrics=["kid"])
    assert evaluate("digits", "digits").fid == pytest.approx(0, abs=1e-9)  # offline, without it


def test_digits_of_several_seeds() -> None:
    sampler = load_pretrained().sampler(method="dpmsolver++", num_inference_steps=8)
    evaluator = Evaluator("digits", metrics=["fid"])
    labels = [i % 10 for i in range(60)]
    results = [evaluator(of_sampler(sampler, 60, seed=seed, class_labels=labels)) for seed in (0, 1, 0)]
    assert results[0] == results[2]
    assert results[0].fid != results[1].fid
    for result in results:
        assert result.recognised is not None
        assert result.recognised > 0.85
        assert result.fid is not None
        assert result.fid_of_real is not None
        assert result.fid < 2 * result.fid_of_real
    whole = evaluator(sampler.sample(60, seed=0, class_labels=labels))  # as a Trainer's metric would
    assert whole.fid == pytest.approx(results[0].fid, abs=1e-9)
    noise = evaluator(torch.rand(60, 1, 16, 16) * 2 - 1)
    assert noise.fid is not None
    assert results[0].fid is not None
    assert noise.fid > 10 * results[0].fid
    assert noise.recognised is None  # there are no labels


class Pooled:
    """Features that tell colours apart; grey images have three equal channels."""

    name = "pooled"

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        coloured = images.expand(-1, 3, -1, -1).float() / 255
        return torch.nn.functional.avg_pool2d(coloured, 4).flatten(1), None


def test_colours_count_whichever_side_lacks_them(tmp_path: Path) -> None:
    """The same pictures in a file, a folder and in memory have one distance to grey ones, either way round."""
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    grey = rng.integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    expected = frechet_distance(
        *(Pooled()(torch.from_numpy(images).permute(0, 3, 1, 2))[0].double().numpy() for images in (grey, real))
    )
    np.savez(tmp_path / "real.npz", real)
    np.savez(tmp_path / "grey.npz", grey.repeat(3, axis=3))
    for name, images in (("real", real), ("grey", grey[..., 0])):
        (tmp_path / name).mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{index:03d}.png")
    reals = [tmp_path / "real.npz", tmp_path / "real", real, [Image.fromarray(image) for image in real]]
    greys = [tmp_path / "grey.npz", tmp_path / "grey", grey, grey[..., 0], [Image.fromarray(x[..., 0]) for x in grey]]
    for a, b in itertools.product(reals, greys):
        for samples, other in ((a, b), (b, a)):
            fid = evaluate(samples, other, metrics=["fid"], features=Pooled()).fid
            assert fid == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(0.0594, abs=5e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["sfid"]}, "metrics has 'sfid', must be of fid, kid, prc, isc"),
        ({"metrics": []}, r"metrics is \[\], must be a list of at least one"),
        ({"metrics": "fid"}, "metrics is 'fid', must be a list"),
        ({"batch_size": 0}, "batch_size is 0, must be a positive integer"),
        ({"features": 3}, "features is a int, must be 'inception', 'digits', a path or callable with a name"),
        ({"features": "none.pt"}, "none.pt is missing; it must be a TorchScript or ONNX file"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        Evaluator(drawn(3, 0), **{"features": Linear(), **arguments})


def test_features_that_are_not_finite() -> None:
    class Broken(Linear):
        def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
            return super().__call__(images)[0] / 0, None

    with pytest.raises(ValueError, match="linear of real has values that are not finite"):
        evaluate(drawn(9, 0), drawn(9, 1), features=Broken())
