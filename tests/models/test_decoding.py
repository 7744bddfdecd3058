"""The decoder of samples: fp16 on a GPU if images are the same. Here half precision is asked for on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation import generate
from evaluation.samples import sampling
from evaluation.standins import write_vae
from tests import ROOT
from tests.conftest import random_sit, refused, words
from train_cc.models.vae import load_decoder

MOST = 65504  # of fp16
OVERFLOW = [34, 36]  # images of seed 8 whose activations are the largest of the first 40, and not among the first 32


def largest_activation(decoder, x0) -> float:
    seen = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: seen.append(out.abs().max().item()))
        for module in decoder.vae.decoder.modules()
        if not list(module.children())
    ]
    with torch.no_grad():
        decoder(x0)
    for hook in hooks:
        hook.remove()
    return max(seen)


@pytest.fixture(scope="module")
def near_the_limit(tmp_path_factory):
    """A latent model, and a VAE whose first 32 images of seed 8 stay below fp16's largest number by a thousandth."""
    folder = tmp_path_factory.mktemp("near")
    random_sit(in_channels=4).save_pretrained(folder / "latent")
    vae = write_vae(folder / "vae")
    flags = ("--generator", folder / "latent", "--output", "s", "--seed", 8, "--num-steps", 1, "--timestep-shift", 1)
    args = generate.build_parser().parse_args(words(*flags))
    x0 = sampling.samples_of(sampling.open_source(folder / "latent").load(), range(32), torch.arange(32) % 10, args)
    for _ in range(2):
        scale_first(vae, MOST / 1.001 / largest_activation(load_decoder(str(vae)), x0))
    return folder


def scale_first(vae: Path, factor: float) -> None:
    """Multiply what the decoder's first convolution gives by ``factor``, in the file."""
    file = vae / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for name in ("weight", "bias"):
        state[f"decoder.conv_in.{name}"] *= factor
    save_file(state, file)


CHOOSE = sampling.decoder_of


@pytest.fixture
def half(monkeypatch):
    monkeypatch.setattr(sampling, "decoder_of", lambda *args: CHOOSE(*args[:-1], True))


def made(folder, output, *more):
    common = ("--generator", folder / "latent", "--vae", folder / "vae", "--seed", 8, "--num-images", 40)
    generate.main(words(*common, "--num-steps", 1, "--output", output, *more))
    with np.load(output) as file:
        return file["arr_0"], json.loads(str(file["provenance"]))["decoder"]


def test_an_image_that_overflows_later_is_decoded_in_fp32(near_the_limit, half, tmp_path, monkeypatch, capsys):
    images, decoder = made(near_the_limit, tmp_path / "half.npz")
    assert decoder == "fp16, 2 images fp32"
    assert "note: 2 images overflowed in fp16: decoded in fp32" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "decoder_of", CHOOSE)
        wide, decoder = made(near_the_limit, tmp_path / "wide.npz")
    assert decoder == "fp32" and capsys.readouterr().err.count("note") == 0
    further = np.abs(images.astype(int) - wide)
    assert images.std() > 5 and further[OVERFLOW].max() <= 1 and (further > 1).mean() < 1e-3
    assert further.max() > 0


def test_parts_continued_with_another_batch_have_the_same_images(near_the_limit, half, tmp_path, monkeypatch):
    whole, _ = made(near_the_limit, tmp_path / "whole.npz")
    write, written = sampling.write_part, []

    def stopped(path, **content):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, **content)

    monkeypatch.setattr(sampling, "write_part", stopped)
    with pytest.raises(SystemExit):
        made(near_the_limit, tmp_path / "cut.npz", "--shard-size", 18)
    monkeypatch.setattr(sampling, "write_part", write)
    images, decoder = made(near_the_limit, tmp_path / "cut.npz", "--shard-size", 18, "--batch-size", 5)
    assert decoder == "fp16, 2 images fp32"
    assert np.abs(images.astype(int) - whole).max() <= 1


def test_images_that_fp32_cannot_decode_blame_the_vae(half, tmp_path, capsys):
    random_sit(in_channels=4).save_pretrained(tmp_path / "latent")
    scale_first(write_vae(tmp_path / "vae"), 1e38)
    message = refused(lambda: made(tmp_path, tmp_path / "s.npz"), capsys=capsys)
    assert "decoded images 0 to 39 hold NaN or infinity" in message and f"--vae {tmp_path / 'vae'}" in message
    assert "guidance" not in message and not (tmp_path / "s.npz").exists()


ON_EACH_RANK = """
import os, sys
import torch
from accelerate import PartialState
from evaluation.samples.sampling import decoder_of
PartialState(cpu=True)
rank = int(os.environ["RANK"])
x0 = torch.ones(2, 4, 8, 8) * (1 if rank else 1e9)
_, precision, _ = decoder_of(sys.argv[1], None, (4, 8, 8), torch.device("cpu"), lambda: x0, True)
print(f"rank {rank}: {precision}", flush=True)
os._exit(0)  # gloo's threads can end a process by SIGABRT while Python goes (pytorch/pytorch#190489)
"""


def test_the_main_process_chooses_for_all(tmp_path):
    vae = write_vae(tmp_path / "vae")
    (tmp_path / "choose.py").write_text(ON_EACH_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += words(tmp_path / "choose.py", vae)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment)
    assert [done.stdout.count(f"rank {rank}: fp32") for rank in (0, 1)] == [1, 1]
