"""The command line as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fastddpm_kernels import backend as _backend
from PIL import Image

from fastddpm import NoiseSchedule, UNet, UNetConfig, save_pretrained
from fastddpm.cli import main
from fastddpm.cli import options as options_of_the_command
from fastddpm.interop.pretrained import BUNDLED, load_pretrained

FAST = ["--steps", "2"]
TASKS = ("edit", "inpaint", "interpolate", "upscale")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_sample_writes_a_labelled_grid_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", *FAST]) == 0
    out = capsys.readouterr().out
    for part in ("100 images, 2 steps", "images/s", "ms per image and step", "device ", "backend ", "wrote samples"):
        assert part in out
    with Image.open("samples.png") as picture:
        assert min(picture.size) >= 500
    assert [path.name for path in Path().iterdir()] == ["samples.png"]


def test_npz_holds_images_and_labels() -> None:
    assert main(["sample", *FAST, "--class-labels", "3,1,4", "--num-samples", "5", "-o", "a.npz"]) == 0
    with np.load("a.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 16, 16, 1)
        assert arrays["arr_1"].tolist() == [3, 1, 4, 3, 1]


def test_one_image_per_label_given() -> None:
    assert main(["sample", *FAST, "--class-labels", "7,7", "--output", "deep/folder"]) == 0
    assert sorted(path.name for path in Path("deep/folder").iterdir()) == ["00000-class7.png", "00001-class7.png"]


def test_gif_shows_the_denoising() -> None:
    assert main(["sample", "--steps", "60", "-n", "4", "--batch-size", "3", "-o", "a.gif"]) == 0
    with Image.open("a.gif") as movie:
        assert movie.n_frames > 20
        assert movie.size[0] > 100


def test_seed_and_batch_size() -> None:
    for name, extra in (("a", []), ("b", ["--batch-size", "2"]), ("c", ["--seed", "1"])):
        assert main(["sample", *FAST, "-n", "5", "-o", f"{name}.npz", *extra]) == 0
    a, b, c = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in "abc")
    assert np.abs(a - b).max() <= 1  # the network rounds otherwise for another batch
    assert np.abs(a - c).max() > 50


def test_options_reach_the_sampler(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "ddim", "--eta", "0.5", "--guidance-scale", "2", "--dtype", "bfloat16", "--backend", "eager"]
    assert main(["sample", *FAST, "-n", "2", "--device", "cpu", *options]) == 0
    out = capsys.readouterr().out
    assert "network bfloat16" in out
    assert "backend eager" in out
    assert main(["sample", *FAST, "-n", "2", "--device", "cpu"]) == 0
    frozen = load_pretrained().sampler(device="cpu").network.frozen
    assert frozen is not None
    assert f"backend {frozen.backend}\n" in capsys.readouterr().out  # of the network; a step has no native kernel
    assert ("auto", *_backend.BACKENDS) == options_of_the_command.BACKENDS


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--method", "dpmsolver++", "--steps", "7"], 7),
        (["--timesteps", "900,500,20"], 3),
        (["--spacing", "trailing", "--steps", "4"], 4),
        (["--spacing", "guided_diffusion", "--steps", "ddim25"], 25),
        (["--spacing", "guided_diffusion", "--steps", "3,2,1"], 6),
        (["--thresholding", "--steps", "3"], 3),
    ],
)
def test_samplers_and_their_steps(options: list[str], steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "-n", "2", *options]) == 0
    assert f"2 images, {steps} steps" in capsys.readouterr().out


def test_trajectory_is_a_strip_of_the_same_samples(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["sample", "-n", "3", "--steps", "12", "--batch-size", "2"]
    assert main([*options, "-o", "a.npz", "--trajectory", "strip.png"]) == 0
    assert "wrote strip.png" in capsys.readouterr().out
    assert main([*options, "-o", "b.npz"]) == 0
    a, b = (np.load(f"{name}.npz")["arr_0"] for name in "ab")
    assert np.array_equal(a, b)
    with Image.open("strip.png") as picture:
        pixels = np.asarray(picture)
    # Six rows, x and x0 of each sample; the last cell of the first is the sample, at three pixels to one.
    assert pixels.shape[0] == 16 + 6 * 52 + 4
    assert np.array_equal(pixels[20 : 20 + 48 : 3, -52:-4:3, :1], a[0])


# -- tasks that start from images -------------------------------------------------------------------------------------


def save(name: str, values: np.ndarray) -> None:
    Image.fromarray(values).save(name)


@pytest.mark.parametrize(
    ("arguments", "rows", "columns"),
    [
        (["edit"], 10, 4),
        (["edit", "3", "8", "--strength", "0.5,1", "-n", "2"], 2, 5),
        (["inpaint"], 10, 6),
        (["inpaint", "3", "-n", "1", "--method", "ddim"], 1, 3),
        (["interpolate"], 5, 11),
        (["interpolate", "3", "8", "--frames", "4", "--via", "noise", "--method", "ddpm"], 1, 6),
        (["interpolate", "3", "8", "--method", "dpmsolver++", "--steps", "6"], 1, 11),
    ],
)
def test_tasks_draw_a_row_per_input(
    arguments: list[str], rows: int, columns: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([arguments[0], *FAST, *arguments[1:], "-o", "a.png"]) == 0
    assert capsys.readouterr().out.endswith("wrote a.png\n")
    with Image.open("a.png") as picture:
        assert picture.height == 16 + rows * 52 + 4
        assert columns * 52 < picture.width < columns * 56 + 60
    assert [path.name for path in Path().iterdir()] == ["a.png"]


def test_inputs_are_files_of_any_size_or_labels() -> None:
    assert main(["sample", "--class-labels", "3", "--steps", "25", "--method", "dpmsolver++", "-o", "three"]) == 0
    drawn = np.asarray(Image.open("three/00000-class3.png"))
    Image.fromarray(255 - drawn).resize((160, 160), Image.Resampling.BOX).save("paper.png")
    common = ["--steps", "1000", "--strength", "0.001"]  # one step from almost no noise: nearly the input
    for name, inputs in (("label", ["3"]), ("file", ["three/00000-class3.png"]), ("large", ["paper.png", "--invert"])):
        assert main(["edit", *inputs, *common, "-o", f"{name}.npz"]) == 0
        with np.load(f"{name}.npz") as arrays:
            assert np.abs(arrays["arr_0"][0, :, :, 0].astype(int) - drawn).mean() < 4
            assert arrays["arr_1"].tolist() == ([3] if name == "label" else [10])


def test_inpainting_keeps_what_is_not_filled(capsys: pytest.CaptureFixture[str]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    save("image.png", image)
    fill = np.zeros((16, 16), np.uint8)
    fill[2:5, 3:9] = 255
    save("fill.png", fill)
    regions = {"top": np.s_[:8], "right": np.s_[:, 8:], "center": np.s_[4:12, 4:12], "fill.png": np.s_[2:5, 3:9]}
    for region, where in regions.items():
        assert main(["inpaint", "image.png", "--fill", region, "-n", "2", *FAST, "-o", "a.npz"]) == 0
        same = np.load("a.npz")["arr_0"][:, :, :, 0] == image
        kept = np.ones((16, 16), bool)
        kept[where] = False
        assert same[:, kept].all()
        assert same[:, ~kept].mean() < 0.5


def test_a_class_can_be_taken_from_an_input_named_or_none() -> None:
    for option, label in (([], 3), (["--class-label", "8"], 8), (["--class-label", "none"], 10)):
        assert main(["edit", "3", *FAST, *option, "-o", "a.npz"]) == 0
        assert np.load("a.npz")["arr_1"].tolist() == [label] * 3
    assert main(["interpolate", "3", "8", *FAST, "--class-label", "none", "-o", "a.png"]) == 0


def test_animations_and_folders_of_tasks() -> None:
    assert main(["edit", "3", *FAST, "--strength", "1", "-o", "e.gif", "--trajectory", "t.png"]) == 0
    assert main(["inpaint", "3", "--steps", "20", "--jump-length", "5", "-o", "i.gif"]) == 0
    assert main(["interpolate", "3", "8", *FAST, "--frames", "5", "-o", "p.gif"]) == 0
    frames = {name: Image.open(f"{name}.gif").n_frames for name in "eip"}
    assert frames["e"] == 2
    assert frames["i"] > 30
    assert frames["p"] == 8  # 0 1 2 3 4 3 2 1
    assert main(["interpolate", "3", "8", *FAST, "--frames", "5", "-o", "path"]) == 0
    assert len(list(Path("path").iterdir())) == 5
    assert Path("t.png").exists()


def test_upscaling_draws_what_reduces_to_the_input() -> None:
    assert main(["upscale", "3", "8", "--input-seed", "2", "-n", "3", "--steps", "50", "-o", "a.npz"]) == 0
    assert main(["upscale", "3", "8", "--input-seed", "2", "-n", "3", "--steps", "50", "-o", "a.png"]) == 0
    drawn = np.load("a.npz")["arr_0"][..., 0].astype(float)
    small = drawn.reshape(2, 3, 4, 4, 4, 4).mean((3, 5))
    with Image.open("a.png") as picture:
        pixels = np.asarray(picture)[:, :, 0].astype(float)
    assert pixels.shape[0] == 16 + 2 * 52 + 4
    step = (pixels.shape[1] - 4) / 5  # label, original, given, drawn three times
    given = np.stack([pixels[20 + 52 * row : 68 + 52 * row, -52 * 4 : -52 * 4 + 48][6::12, 6::12] for row in (0, 1)])
    assert step > 52
    assert np.abs(small - given[:, None]).mean() < 15
    assert np.abs(small - given[::-1, None]).mean() > 30


def upscaler(folder: str) -> None:
    """Saves an untrained model that reads an image of three channels beside the two it draws."""
    config = UNetConfig(
        sample_size=8,
        in_channels=4,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        attention_head_dim=None,
    )
    save_pretrained(folder, UNet(config), NoiseSchedule.linear(10))


def test_another_upscaler_reads_files(capsys: pytest.CaptureFixture[str]) -> None:
    upscaler("model")
    save("large.png", np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    save("small.png", np.zeros((4, 4), np.uint8))
    command = ["upscale", "--model", "model", "--factor", "2", "--noise-level", "0.1", *FAST]
    assert main([*command, "large.png", "small.png", "-n", "2", "-o", "a.npz"]) == 0
    assert np.load("a.npz")["arr_0"].shape == (4, 8, 8, 1)
    capsys.readouterr()
    assert main([*command, "3"]) == 2
    assert "INPUT is 3, a label, but --model is not the bundled one" in capsys.readouterr().err
    assert main(command) == 2
    assert "name picture files" in capsys.readouterr().err
    assert main(["upscale", "--model", str(BUNDLED), "small.png", "--factor", "2"]) == 2
    assert "--model reads 1 channels, no small image beside those it draws" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "--strength", "0"], "argument --strength: '0' must be a number in (0, 1]"),
        (["edit", "--strength", "0.5,1.5"], "argument --strength: '1.5' must be a number in (0, 1]"),
        (["interpolate", "--strength", "x"], "argument --strength: 'x' must be a number in (0, 1]"),
        (["edit", "11"], "INPUT is 11, a label must be from 0 to 9"),
        (["edit", "none.png"], "none.png: No such file or directory"),
        (["edit", "3", "--class-label", "12"], "--class-label is 12, must be from 0 to 9"),
        (["edit", "3", "--model", "nowhere"], "nowhere is not a folder"),
        (["edit", "3", "--class-label", "x"], "argument --class-label: 'x' must be an integer of at least 0"),
        (["edit", "3", "--class-label", "none", "--guidance-scale", "2"], "--guidance-scale needs --class-label"),
        (["inpaint", "3", "--fill", "hole"], "--fill is hole, must be top, bottom, left, right, center or a picture"),
        (["inpaint", "3", "--resamples", "3", "--method", "ddim"], "--resamples is 3 but method is 'ddim'"),
        (["interpolate", "3"], "INPUT is given 1 times, must be pairs"),
        (["interpolate", "3", "8", "--method", "ddpm"], "--method is 'ddpm' with noise at its steps"),
        (["interpolate", "3", "8", "--guidance-scale", "2"], "--guidance-scale needs --class-label"),
        (["upscale", "3", "--factor", "3"], "--factor is 3, must divide the model's size 16 x 16"),
        (["upscale", "3", "--noise-level", "-1"], "--noise-level is -1.0, must be a finite number"),
        *[([task, "3", "3", "-o", "a.jpg"], "--output is a.jpg, its suffix must be") for task in TASKS],
        *[([task, "3", "3", "--steps", "1001"], "--steps is 1001, must be an integer from 1 to") for task in TASKS],
    ],
)
def test_bad_input_of_tasks_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(Path().iterdir())


def test_guidance_towards_a_class_needs_the_class(capsys: pytest.CaptureFixture[str]) -> None:
    save("image.png", np.zeros((16, 16), np.uint8))
    assert main(["edit", "image.png", "--guidance-scale", "2", *FAST]) == 2
    assert "--guidance-scale needs --class-label where an input is a picture file" in capsys.readouterr().err
    assert main(["edit", "image.png", "--guidance-scale", "2", "--class-label", "3", *FAST]) == 0
    Path("image.png").rename("11")
    assert main(["edit", "11", *FAST]) == 0  # a file of that name comes before a label


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: '0' must be an integer of at least 1"),
        (["--steps", "2.5"], "argument --steps: '2.5' must be an integer"),
        (["--steps", "1001"], "--steps is 1001, must be an integer from 1 to 1000"),
        (["--num-samples", "-3"], "argument -n/--num-samples: '-3' must be an integer"),
        (["--class-labels", "11"], "--class-labels has 11, every label must be from 0 to 9"),
        (["--class-labels", "10"], "--class-labels has 10, every label must be from 0 to 9"),
        (["--class-labels", "a,b"], "argument --class-labels: 'a,b' must be integers separated by commas"),
        (["--seed", "-1"], "argument --seed: '-1' must be"),
        (["--seed", str(2**64)], "--seed is 18446744073709551616, must be from 0 to 2**64 - 1"),
        (["--batch-size", "0"], "argument --batch-size"),
        (["--device", "quantum"], "--device is 'quantum', which cannot be used"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--backend", "fast"], "argument --backend: invalid choice: 'fast'"),
        (["--eta", "1"], "--eta is 1.0 but method is 'ddpm'"),
        (["--eta", "1", "--method", "dpmsolver++"], "--eta is 1.0 but method is 'dpmsolver++'"),
        (["--timesteps", "5,6"], "--timesteps has 5 before 6, every one must be lower"),
        (["--timesteps", "9,x"], "argument --timesteps: '9,x' must be integers separated by commas"),
        (["--timesteps", "9,3", "--spacing", "trailing"], "--timesteps is given and so is --spacing"),
        (["--timesteps", "9,3", "--steps", "2"], "--steps is 2 but timesteps are given"),
        (["--steps", "ddim25"], "--steps is 'ddim25' but timestep_spacing is 'leading'"),
        (["--spacing", "random"], "argument --spacing: invalid choice: 'random'"),
        (["--trajectory", "a.gif"], "--trajectory is a.gif, its suffix must be .png"),
        (["--output", "a.jpg"], "--output is a.jpg, its suffix must be"),
        (["--output", "/proc/none/a.png"], "--output is /proc/none/a.png, which cannot be written"),
        (["missing-folder"], "missing-folder is not a folder"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["sample", *arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(Path().iterdir())


def test_triton_without_a_gpu_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["sample", *FAST, "--device", "cpu", "--backend", "triton"]) == 2
    assert "backend 'triton' cannot run here: triton kernels need a GPU" in capsys.readouterr().err


def test_output_of_another_kind_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder.png").mkdir()
    Path("file").write_text("precious")
    assert main(["sample", "-o", "folder.png"]) == 2
    assert main(["sample", "-o", "file"]) == 2
    assert Path("file").read_text() == "precious"
    assert capsys.readouterr().err.count("\n") == 2


def test_info_names_versions_devices_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for part in ("torch", "triton", "cpu", "q_sample", "reverse_step", "group_norm_silu", "eager"):
        assert part in out


def test_the_installed_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("fastddpm 0.")
    bad = subprocess.run([sys.executable, "-m", "fastddpm", "sample", "nowhere"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert "nowhere" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_info_computes_nothing_for_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--model", "nowhere"], "nowhere is not a folder"),
        (["--batch-size", "2"], "--batch-size is 2 but --model is not given"),
    ):
        assert main(["info", *arguments]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""
