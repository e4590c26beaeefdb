"""Names of precisions, and TensorFloat-32's switch, which must leave torch as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from fastddpm.networks.precision import FLOAT16_MAX, PRECISIONS, parse_precision, tf32, why_not_tf32


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_names_and_dtypes(name: str) -> None:
    dtype = getattr(torch, name)
    assert parse_precision(name, "cpu") == (dtype, False)
    assert parse_precision(dtype, torch.device("cpu")) == (dtype, False)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("fp8", ValueError, "dtype is 'fp8', must be one of float32, tf32, float16, bfloat16"),
        ("torch.float16", ValueError, "dtype is 'torch.float16', must be one of"),
        ("", ValueError, "dtype is '', must be one of"),
        (torch.float64, ValueError, "dtype is torch.float64, must be one of float32, tf32, float16, bfloat16"),
        (16, TypeError, "dtype is of int, must be a torch.dtype or one of float32"),
        (None, TypeError, "dtype is of NoneType"),
        ("tf32", ValueError, "dtype is 'tf32', which cpu cannot run: it needs CUDA of capability 8.0 or more"),
    ],
)
def test_bad_precisions(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_precision(value, "cpu")  # type: ignore[arg-type]


def test_names_the_argument() -> None:
    with pytest.raises(ValueError, match="--precision is 'fp8'"):
        parse_precision("fp8", "cpu", "--precision")


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((10, 0), True)])
def test_tf32_by_capability(capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    if runs:
        assert parse_precision("tf32", "cuda") == (torch.float32, True)
    else:
        with pytest.raises(ValueError, match="its capability is 7.5, must be 8.0 or more"):
            parse_precision("tf32", "cuda")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in (why_not_tf32("cuda") or "")


def test_tf32_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    assert why_not_tf32("cuda:1") == "CUDA is not available"


def test_range_of_float16() -> None:
    assert FLOAT16_MAX == 65504
    assert PRECISIONS[0] == "float32"


# -- the switch -------------------------------------------------------------------------------------------------------

CUDA, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def read(function: Callable[[], object]) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function()
        except RuntimeError:
            return "torch raises"


def new_settings() -> tuple:
    return (
        CUDA.fp32_precision,
        CUDNN.conv.fp32_precision,
        CUDNN.rnn.fp32_precision,
        CUDNN.fp32_precision,
        torch.backends.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


def old_settings() -> tuple:
    readers = (lambda: CUDA.allow_tf32, lambda: CUDNN.allow_tf32, torch.get_float32_matmul_precision)
    return tuple(read(reader) for reader in readers)


@pytest.fixture(autouse=True)
def _as_at_the_start() -> Iterator[None]:
    new, old = new_settings(), old_settings()
    yield
    torch.set_float32_matmul_precision(old[2])
    CUDNN.allow_tf32 = old[1]
    torch.backends.fp32_precision, CUDNN.fp32_precision = new[4], new[3]
    CUDA.fp32_precision, CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = new[:3]
    torch.backends.mkldnn.matmul.fp32_precision = new[5]
    assert (new_settings(), old_settings()) == (new, old)


def nothing() -> None:
    pass


def old_products() -> None:
    CUDA.allow_tf32 = True


def old_all_off() -> None:
    CUDA.allow_tf32 = False
    CUDNN.allow_tf32 = False


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def new_convolutions() -> None:
    CUDNN.conv.fp32_precision = "ieee"
    CUDNN.rnn.fp32_precision = "ieee"


def new_products() -> None:
    CUDA.fp32_precision = "tf32"


def new_everywhere() -> None:
    torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    "before", [nothing, old_products, old_all_off, medium, new_convolutions, new_products, new_everywhere]
)
def test_switch_sets_and_restores(before: Callable[[], None], enabled: bool) -> None:
    before()
    new, old = new_settings(), old_settings()
    with tf32(enabled):
        wanted = "tf32" if enabled else "ieee"
        assert new_settings()[:3] == (wanted, wanted, wanted)
        # Who reads the old setting inside gets an answer, and the same one.
        assert old_settings()[:2] == (enabled, enabled)
        if before is not new_everywhere:  # which holds for the CPU too, so that there is no one answer
            assert old_settings()[2] == ("high" if enabled else "highest")
        with tf32(not enabled):
            assert CUDA.fp32_precision == ("ieee" if enabled else "tf32")
        assert new_settings()[:3] == (wanted, wanted, wanted)
    assert new_settings() == new
    # What torch refused to tell before, since only one of the two was set, it may tell now.
    assert [a for a, b in zip(old_settings(), old, strict=True) if b != "torch raises"] == [
        b for b in old if b != "torch raises"
    ]


def test_switch_restores_after_an_error() -> None:
    new, old = new_settings(), old_settings()
    with pytest.raises(KeyError), tf32(True):
        raise KeyError
    assert (new_settings(), old_settings()) == (new, old)


def test_threads_that_overlap_leave_all_as_it_was() -> None:
    """The first to enter leaves first, while the second still computes."""
    new, old = new_settings(), old_settings()
    first, second = tf32(False), tf32(False)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert new_settings()[:3] == ("ieee",) * 3
    second.__exit__(None, None, None)
    assert (new_settings(), old_settings()) == (new, old)


def test_switch_gives_no_advice() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tf32(True):
            pass


@pytest.mark.gpu
@pytest.mark.parametrize("enabled", [True, False])
def test_switch_changes_what_cuda_computes(enabled: bool) -> None:
    if why_not_tf32("cuda") is not None:
        pytest.skip(f"no TensorFloat-32: {why_not_tf32('cuda')}")
    x = torch.randn(1, 64, 64, 64, device="cuda")
    w = torch.randn(64, 64, 3, 3, device="cuda")
    with tf32(enabled):
        product = x[0, 0] @ x[0, 1]
        convolution = torch.nn.functional.conv2d(x, w)
    exact = x[0, 0].double() @ x[0, 1].double(), torch.nn.functional.conv2d(x.double(), w.double())
    for result, expected in zip((product, convolution), exact, strict=True):
        error = (result - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert bool(error > 2e-5) == enabled
