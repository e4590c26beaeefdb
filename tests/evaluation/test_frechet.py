"""The Frechet distance against closed forms, and the judge of digits against the script that judged the model."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from fastddpm.evaluation.frechet import DigitJudge, distance_of_real, frechet_distance


@pytest.fixture(scope="module")
def judge() -> DigitJudge:
    return DigitJudge()


def with_moments(mean: np.ndarray, cov: np.ndarray, count: int = 500) -> np.ndarray:
    """Features whose sample mean and covariance are the given ones."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return white @ np.linalg.cholesky(cov).T + mean


def test_of_gaussians_with_diagonal_covariance() -> None:
    a = with_moments(np.array([0.0, 0.0, 0.0]), np.diag([1.0, 4.0, 9.0]))
    b = with_moments(np.array([1.0, -2.0, 0.0]), np.diag([4.0, 4.0, 1.0]), count=300)
    # |mean|^2 = 5, and the squared differences of standard deviations, 1 + 0 + 4.
    assert frechet_distance(a, b) == pytest.approx(10, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(10, abs=1e-9)


def test_of_one_feature() -> None:
    a, b = np.array([[0.0], [2.0]]), np.array([[3.0], [3.0], [3.0]])
    assert frechet_distance(a, b) == pytest.approx(2**2 + 2)  # variance 2 against 0


def test_of_covariances_that_do_not_commute(digits: ModuleType) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((400, 8)) @ rng.standard_normal((8, 8)), rng.standard_normal((300, 8)) + 0.3
    assert frechet_distance(a, b) == pytest.approx(digits.frechet(a, b), rel=1e-9)


def test_of_the_same_and_of_few() -> None:
    rng = np.random.default_rng(2)
    few = rng.standard_normal((5, 32))  # a singular covariance
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(few, few + 1) == pytest.approx(32, abs=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), r"a has shape \[1, 3\], must be features \[N, D\] of at least two"),
        (np.zeros((5, 3)), np.zeros(3), r"b has shape \[3\]"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), "b has values that are not finite"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "a has 3 features and b 4"),
    ],
)
def test_bad_features(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_judge_sees_as_the_script_does(judge: DigitJudge, digits: ModuleType) -> None:
    from sklearn.decomposition import PCA

    counts, labels = digits.source()
    images = digits.render(counts)
    rows = digits.flat(images)
    features = PCA(32, svd_solver="full").fit(rows).transform(rows)
    assert judge.real.shape == (1797, 32)
    ours = judge.features(images[:200])
    np.testing.assert_allclose(np.abs(ours), np.abs(features[:200]), rtol=1e-5, atol=1e-5)  # up to signs
    mine = frechet_distance(judge.real[:900], judge.real[900:])
    assert mine == pytest.approx(digits.frechet(features[:900], features[900:]), rel=1e-5)
    assert judge.recognised(images[:300], labels[:300]) == 1
    assert judge.recognised(images[:300], (labels[:300] + 1) % 10) == 0
    turned = digits.render(counts[:300]).flip(3)
    assert (judge.recognised(turned, labels[:300]) or 0) < 0.6


def test_what_is_to_be_expected_of_real_digits(judge: DigitJudge) -> None:
    few, many = distance_of_real(judge.real, 50), distance_of_real(judge.real, 900)
    assert few > 4 * many > 0  # biased upwards
    assert many == pytest.approx(0.66, abs=0.1)  # as the bundled model's README has it, of halves
    assert distance_of_real(judge.real, 10_000) == distance_of_real(judge.real, 1797 // 2)


def test_digits_have_one_shape(judge: DigitJudge) -> None:
    with pytest.raises(ValueError, match=r"images has shape \[2, 3, 16, 16\], must have \[N, 1, 16, 16\]"):
        judge.features(torch.zeros(2, 3, 16, 16))


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sklearn", "sklearn.datasets", "sklearn.svm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-learn is missing, .*pip install fastddpm\[examples\]"):
        DigitJudge()
