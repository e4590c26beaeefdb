"""Bad input of every command: one line that names what is wrong, exit code 2, nothing written."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm import NoiseSchedule, UNet, save_pretrained

TASKS = ("edit", "inpaint", "interpolate", "upscale")
WITH_COUNT = ("edit 3", "inpaint 3", "upscale 3", "evaluate", "evaluate --precision")
SMALL = "--width 8 --batch-size 4 --steps 1 --device cpu"

# (command, a word of the message). MODEL is a model of 8x8 images, TWO one of two channels, PICTURES a folder of two
# classes, b.npz holds 4x4 images, net.pt is a network of features, old.json is no profile.
BAD = [
    ("sample --nonsense", "unrecognized arguments: --nonsense"),
    ("sample --steps 0", "--steps: '0' must be an integer of at least 1"),
    ("sample --steps 2.5", "'2.5' must be an integer"),
    ("sample --steps 1001", "--steps is 1001"),
    ("sample --steps ddim25", "--steps is 'ddim25' but timestep_spacing"),
    ("sample -n -3", "--num-samples: '-3'"),
    ("sample --class-labels 11", "--class-labels has 11, every label must be from 0 to 9"),
    ("sample --class-labels 10", "--class-labels has 10"),
    ("sample --class-labels a,b", "'a,b' must be integers separated by commas"),
    ("sample MODEL --class-labels 1", "the model has no classes"),
    ("sample --seed -1", "--seed: '-1'"),
    ("sample --seed 18446744073709551616", "'18446744073709551616' must be an integer from 0 to 2**64 - 1"),
    ("sample --batch-size 0", "--batch-size"),
    ("sample --device quantum", "--device is 'quantum'"),
    ("sample --dtype int8", "--dtype: invalid choice: 'int8'"),
    ("sample --backend fast", "--backend: invalid choice: 'fast'"),
    ("sample --eta 1", "--eta is 1.0 but method is 'ddpm'"),
    ("sample --eta 1 --method lms", "but method is 'lms'; eta is a setting of method 'ddim', 'euler_a'"),
    ("sample --eta 1 --method dpmsolver++", "but method is 'dpmsolver++'"),
    ("sample --timesteps 5,6", "--timesteps has 5 before 6"),
    ("sample --timesteps 99999999999999999999,0", "--timesteps has 99999999999999999999, every one"),
    ("sample --timesteps 9,x", "'9,x' must be integers"),
    ("sample --timesteps 9,3 --spacing trailing", "--timesteps is given and so is --spacing"),
    ("sample --timesteps 9,3 --steps 2", "--steps is 2 but timesteps are given"),
    ("sample --method fast", "--method: 'fast' must be one of ddpm, ddim, "),
    ("sample --spacing random", "--spacing: invalid choice"),
    ("sample --trajectory a.gif", "--trajectory is a.gif, its suffix must be .png"),
    ("sample -o a.png --trajectory a.png", "must be different files"),
    ("sample -o a.jpg", "--output is a.jpg, its suffix"),
    ("sample -o .png", "must have a name before its suffix"),
    ("sample -o folder.png", "which is a folder"),
    ("sample -o file", "which is a file"),
    ("sample -o /proc/none/a.png", "--output is /proc/none/a.png, which cannot be written"),
    ("sample missing-folder", "missing-folder is not a folder"),
    ("sample 'no\nfolder\x1b'", r"no\nfolder\x1b is not a folder"),
    *[(f"{task} -n 1000000000000", "--num-samples") for task in ("sample -o a.npz", "sample -o a.png", *WITH_COUNT)],
    ("sample --shard-size 2 -o shards -n 1000000000000", "--num-samples 1000000000000: labels would take"),
    ("sample MODEL -n 13000 -o a.gif", "a .gif of all samples has 524 x 67604 pixels, may have at most 65535 a side"),
    ("upscale 3 -n 2000 -o a.gif", "a .gif of all samples has 104004 x 56 pixels, may have at most 65535 a side"),
    ("interpolate 3 4 --frames 1000000000000", "--frames: 1000000000000 images of 16 x 16 would take"),
    ("profile --batch 1000000000000", "--batch: 1000000000000 images of 16 x 16 would take"),
    ("tune --device cpu --batch 1000000000000", "--batch: 1000000000000 images of 16 x 16 would take"),
    ("sample image.png", "image.png cannot be read: it begins with"),
    ("sample file", "file cannot be read: it begins with"),
    ("sample b.npz", "it is a zip of arr_0.npy, must be a file that torch saved"),
    ("sample old.json", "old.json is a configuration, must be the folder that holds it"),
    ("sample empty", "empty"),
    ("sample bare.pt", "--flags are missing, must be given: bare.pt"),
    ("sample bare.pt --flags='--seed 1'", "seed is no flag of guided_diffusion"),
    ("sample bare.pt --flags='image_size 8'", "must be names and values"),
    ("sample bare.pt --flags=--image_size", "must be names and values"),
    ("sample bare.pt --flags=\"'\"", "must be names and values"),
    ("sample bare.pt --image-size 8 --flags='--image_size 16'", "--image-size is 8 but --flags has it too"),
    *[(f"sample TWO -o a{suffix}", "2 channels") for suffix in (".png", ".gif", "")],
    ("sample nowhere --prompt a", "nowhere is not a folder"),
    ("sample empty --prompt a", "has no model_index.json"),
    ("sample MODEL --image-size 8", "--image-size is given but MODEL is no file"),
    ("sample MODEL --variant fp16", "has neither diffusion_pytorch_model.fp16"),
    ("edit --strength 0", "'0' must be a number in (0, 1]"),
    ("edit --strength 0.5,1.5", "'1.5' must be a number"),
    ("interpolate --strength x", "'x' must be a number"),
    ("edit 11", "INPUT is 11, a label must be from 0 to 9"),
    ("edit none.png", "none.png: No such file"),
    ("edit 3 --class-label 12", "--class-label is 12"),
    ("edit 3 --class-label x", "'x' must be an integer"),
    ("edit 3 --model nowhere", "nowhere is not a folder"),
    ("edit 3 --class-label none --guidance-scale 2", "--guidance-scale needs --class-label"),
    ("edit image.png --guidance-scale 2", "--guidance-scale needs --class-label where an input is a picture"),
    ("edit --model MODEL", "INPUT is missing"),
    ("inpaint 3 --fill hole", "--fill is hole"),
    *[(f"train PICTURES {SMALL} --set trainer.{name}=1000000000000", f"{name} is 1000000000000, must be")
      for name in ("num_workers", "num_samples")],
    ("edit 3 --input-seed 18446744073709551616", "--input-seed: '18446744073709551616' must be an integer from 0 to"),
    ("train PICTURES --seed 18446744073709551616", "--seed: '18446744073709551616' must be an integer from 0 to"),
    ("inpaint 3 --resamples 99999999999", "--resamples is 99999999999, which makes 1799999999"),
    ("inpaint 3 --resamples 3 --method ddim", "--resamples is 3 but method is 'ddim'"),
    ("interpolate 3", "INPUT is given 1 times"),
    ("interpolate 3 8 --method ddpm", "with noise at its steps"),
    ("interpolate 3 8 --guidance-scale 2", "--guidance-scale needs --class-label"),
    ("upscale 3 --factor 3", "--factor is 3, must divide"),
    ("upscale 3 --noise-level -1", "--noise-level is -1.0"),
    ("upscale 3 --model MODEL", "no small image beside those it draws"),
    *[(f"{task} 3 3 -o a.jpg", "its suffix must be") for task in TASKS],
    *[(f"{task} 3 3 --steps 1001", "--steps is 1001") for task in TASKS],
    ("train", "FOLDER is missing"),
    ("train nowhere", "nowhere is not a folder"),
    ("train empty", "holds no picture"),
    ("train PICTURES --steps 0", "at least 1"),
    ("train PICTURES --width 1", "--width: '1' must be an integer of at least 2"),
    ("train PICTURES --config none.toml", "none.toml is missing"),
    ("train PICTURES --width 1000000 --steps 1", "million parameters would take"),
    ("train PICTURES --width 8 --image-size 9000 --steps 1", "the model's data have 9000 x 9000 pixels"),
    ("train b.npz --width 8 --batch-size 1000000000000 --steps 1", "train_batch_size 1000000000000: the images would"),
    (f"train PICTURES {SMALL} -o PICTURES/results", "which is inside "),
    ("train PICTURES --image-size 9 --steps 1 --set model.block_out_channels=[8,8] --set model.norm_num_groups=4 --set "
     "\"model.down_block_types=['DownBlock2D','DownBlock2D']\" --set "
     "\"model.up_block_types=['UpBlock2D','UpBlock2D']\"",
     "sample_size is 9"),
    (f"train PICTURES {SMALL} --learning-rate -1", "train_lr is -1.0"),
    ("train PICTURES --set lr", "'lr' must be SECTION.KEY=VALUE"),
    ("train PICTURES --set trainer.lr=1", "[trainer] has no key lr"),
    ("train PICTURES --set trainer.train_learning_rate=1", "keys are results_folder"),
    ("train PICTURES --set training.lr=1", "no section [training]"),
    ("train PICTURES --set trainer.metric=fid", "metric is 'fid'"),
    ("train PICTURES --set data.folder=3", "[data] folder is 3"),
    (f"train PICTURES {SMALL} --set diffusion.beta_start=-1", "beta_start is -1, which beta_schedule"),
    (f"train PICTURES {SMALL} --set diffusion.trained_betas=[0.1,2.0]", "trained_betas[1] is 2"),
    (f"train PICTURES {SMALL} --set diffusion.trained_betas=[0.1] --set diffusion.beta_end=0.3", "beta_end is 0.3"),
    (f"train PICTURES {SMALL} --set diffusion.trained_betas=[0.1] --set diffusion.num_train_timesteps=9", "is 9"),
    (f"train PICTURES {SMALL} --set diffusion.beta_schedule=linear --set diffusion.beta_start=x", "must be in (0, 1)"),
    (f"train PICTURES {SMALL} --set diffusion.rescale_betas_zero_snr=0", "must be true or false"),
    (f"train PICTURES {SMALL} --set trainer.results_folder=5", "results_folder is 5"),
    (f"train PICTURES {SMALL} --set model.sample_size=big", "sample_size is 'big'"),
    (f"train PICTURES {SMALL} --set diffusion.variance_type=learned_range --set diffusion.loss=hybrid "
     "--set model.out_channels=1", "returns 1 channels for data of 1"),
    ("evaluate --precision fp8", "--precision is 'fp8'"),
    ("evaluate --precision float16,", "--precision is ''"),
    ("evaluate --precision tf32 --device cpu", "it needs CUDA"),
    ("evaluate --precision --dtype float16", "--dtype is float16, but --precision compares several"),
    ("evaluate --precision --device meta", "--device is 'meta'"),
    ("evaluate --precision --json a.txt", "--json is a.txt, its suffix must be .json"),
    ("evaluate --precision --json /proc/none/a.json", "--json is /proc/none/a.json"),
    ("evaluate nowhere --precision", "nowhere is not a folder"),
    ("evaluate --precision --steps 2000", "--steps is 2000"),
    ("evaluate --precision -n 1", "at least 2"),
    ("evaluate --precision --guidance-scale nan", "--guidance-scale is nan"),
    ("evaluate MODEL", "REAL is missing"),
    ("evaluate b.npz", "REAL is missing"),
    ("evaluate MODEL none.npz --feature-network net.pt", "none.npz is missing"),
    ("evaluate MODEL digits", "16 x 16 but the samples are of 8 x 8"),
    ("evaluate b.npz b.npz --feature-network digits", "'digits' are of images [1, 16, 16]"),
    ("evaluate MODEL b.npz --feature-network net.pt", "4 x 4 but the samples are of 8 x 8"),
    ("evaluate MODEL b.npz --feature-network no.pt", "no.pt is missing"),
    ("evaluate MODEL b.npz --inception-weights no.pth", "no.pth is missing"),
    ("evaluate MODEL b.npz --inception-weights b.npz", "it is a zip of arr_0.npy"),
    ("evaluate --inception-weights a --feature-network b", "--inception-weights is given and so is --feature-net"),
    ("evaluate --metrics fid,ppl", "--metrics has 'ppl'"),
    ("evaluate --metrics isc", "--metrics has isc, which cannot be measured"),
    ("evaluate --feature-input float", "--feature-input: invalid choice"),
    ("evaluate --save-samples a.png", "its suffix must be .npz"),
    ("evaluate b.npz digits -n 5", "--num-samples is given, but MODEL is b.npz"),
    ("evaluate b.npz digits --eta 0", "--eta is given, but MODEL is b.npz"),
    ("evaluate b.npz --precision", "--precision is given, but MODEL is b.npz"),
    ("profile --batch 0", "at least 1"),
    ("profile --budget 0", "'0' must be a positive number of seconds"),
    ("profile --json a.txt", "--json is a.txt"),
    ("profile --trace a.txt", "--trace is a.txt"),
    ("profile --json a.json --trace a.json", "must be different files"),
    ("profile --plot a.jpg", "one of .png, .svg"),
    ("profile --compare missing.json", "missing.json is missing"),
    ("profile --compare old.json", "--compare is old.json, which is no profile"),
    ("profile --compare part.json", "which is not a whole profile"),
    ("profile --compare gpu.json", "which `fastddpm profile` did not write"),
    ("profile --batch 1 --compare gpu.json gpu.json", "--batch is given, but --compare names two files"),
    ("profile --compare a b c", "--compare has 3 files"),
    ("profile --device nonsense", "--device is 'nonsense'"),
    ("profile nowhere", "nowhere"),
    ("tune --device cpu --ops conv4d", "--ops has 'conv4d', must be of group_norm_silu"),
    ("tune --device cpu --ops pointwise_conv", "--ops is pointwise_conv; on cpu there is conv"),
    ("tune --device cpu --into-package", "--into-package is given, but a CPU's table"),
    ("tune --budget 0", "positive number of seconds"),
    ("tune --show --clear", "not allowed with argument"),
    ("tune --device cpu --training --method ddim", "--method is given, but --training"),
    ("tune --device cpu --show --ops conv", "--ops is given, but --show is of a whole table"),
    ("tune --device cpu nowhere", "nowhere"),
    ("info --model nowhere", "nowhere is not a folder"),
    ("info --batch-size 2", "--batch-size is 2 but --model is not given"),
    ("info --json", "--json is given but --model is not"),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, feature_network: Path, tiny: dict[str, Any]) -> Path:
    """The files that the commands name."""
    folder = tmp_path_factory.mktemp("files")
    save_pretrained(folder / "MODEL", UNet(**tiny), NoiseSchedule.linear())
    two = UNet(**tiny | {"in_channels": 2, "out_channels": 2})
    save_pretrained(folder / "TWO", two, NoiseSchedule.linear())
    (folder / "net.pt").symlink_to(feature_network)
    torch.save({"time_embed.0.weight": torch.zeros(8, 2)}, folder / "bare.pt")
    np.savez(folder / "b.npz", np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4, 1))
    for name in ("image.png", "PICTURES/a/0.png", "PICTURES/b/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16)).save(folder / name)
    for name in ("folder.png", "empty"):
        (folder / name).mkdir()
    (folder / "file").write_text("precious")
    (folder / "old.json").write_text('{"schema": null}')
    (folder / "part.json").write_text('{"schema": "fastddpm.profile/1"}')
    (folder / "gpu.json").write_text('{"schema": "fastddpm.gpu_check/1", "sections": {}}')
    return folder


@pytest.mark.parametrize(("command", "words"), BAD)
def test_bad_input(command: str, words: str, files: Path, here: Path, refused: Callable[..., str]) -> None:
    for path in files.iterdir():
        Path(path.name).symlink_to(path)
    assert words in refused(*shlex.split(command))
