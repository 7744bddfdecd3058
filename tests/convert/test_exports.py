"""A generator goes out: a folder, an adapter, a pipeline that needs nothing of this project, and its card."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from convert_weight import export_generator, pipeline
from convert_weight.exports import save_pipeline
from evaluation.standins import write_vae
from tests.conftest import random_sit, refused, run_cold_start, tree, words
from train_cc.io.class_names import KNOWN
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.models import SiT
from train_cc.models.generator import GenerationConfig
from train_cc.models.networks import sit
from train_cc.models.vae import images_to_uint8, load_decoder, load_vae
from train_cc.samplers import few_step_sample

SAMPLING = {"num_inference_steps": 2, "timestep_shift": 1.5}


LABELS = [3, "Ankle Boot", "top", 0]


NUMBERS = [3, 9, 0, 0]


LOAD = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
assert not any("train_cc" in name for name in sys.modules)
try:
    import train_cc
    raise SystemExit("this project is on the path: the test shows nothing")
except ImportError:
    pass
folders, labels = eval(sys.argv[1])
for name, folder in folders.items():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).to(dtype)
        pipeline.set_progress_bar_config(disable=True)
        draws = torch.Generator().manual_seed(7)
        images = pipeline(class_labels=labels, generator=draws, output_type="np").images
        np.save(f"{name}-{str(dtype).removeprefix('torch.')}.npy", images)
    assert pipeline(class_labels=3).images[0].size[0] in (8, 64)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Pipelines of pixels and of latents, and what a Python that knows nothing of this project sampled from them."""
    folder = tmp_path_factory.mktemp("shared")
    vae = write_vae(folder / "a_vae")
    models = {"pixels": random_sit(), "latents": random_sit(in_channels=4)}
    for name, model in models.items():
        decoder = load_vae(str(vae)) if name == "latents" else None
        save_pipeline(model, decoder, SAMPLING, KNOWN["fashion-mnist"], {}, folder / name)
    asked = repr(({name: str(folder / name) for name in models}, LABELS))
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-I", "-c", LOAD, asked]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kept in float32" not in done.stderr  # diffusers, of every cast
    return folder, models


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_a_shared_pipeline_samples_elsewhere_what_our_sampler_does(shared, name):
    """In fp32, at the steps and the shift that it was trained for; in half precision nearly so.

    Pixels bit for bit. Our decoder has its convolutions in channels_last, a pipeline's has not: they round differently.
    """
    folder, models = shared
    draws = torch.Generator().manual_seed(7)
    shape = (len(NUMBERS), *models[name].sample_shape)

    def noise(like=None):
        return torch.randn(shape, generator=draws)

    decode = load_decoder(str(folder / "a_vae") if name == "latents" else None)
    with torch.no_grad():
        x0 = few_step_sample(models[name], noise(), torch.tensor(NUMBERS), 2, 1.5, noise)
        expected = images_to_uint8(decode(x0)).numpy()
    arrays = {dtype: np.load(folder / f"{name}-{dtype}.npy") for dtype in ("float32", "bfloat16", "float16")}
    found = {dtype: (array * 255).round() for dtype, array in arrays.items()}
    exact = np.abs(found["float32"].astype(int) - expected)
    assert expected.std() > 5 and exact.max() <= (name == "latents") and exact.mean() < 1e-3
    for dtype, most in (("bfloat16", 12), ("float16", 4)):
        difference = np.abs(found[dtype].astype(int) - expected)
        assert difference.max() > 0 and difference.mean() < most, dtype


def test_the_code_of_a_pipeline_is_this_projects_and_stands_alone(shared):
    folder, _ = shared
    for name, source in (("pipeline.py", pipeline.__file__), ("generator/network.py", sit.__file__)):
        text = (folder / "pixels" / name).read_text()
        assert text == Path(source).read_text()
        assert not re.search(r"^\s*(import|from) (train_cc|convert_weight|evaluation)", text, re.MULTILINE)
    index = json.loads((folder / "pixels" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "DMDRPipeline"] and index["generator"] == ["network", "SiT"]
    SiT.from_pretrained(folder / "pixels" / "generator")


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    more = ["--num-steps", 2, "--timestep-shift", 1.5, "--ema-decay", 0.5]
    return run_cold_start(teacher, tmp_path_factory.mktemp("run") / "run", *more)


def export(run, *more):
    export_generator.main(words("--checkpoint", run / "checkpoints/torch_units/step-3.pt", *more))


def test_a_pipeline_in_half_precision_is_half_as_large_and_samples_alike(run, tmp_path):
    export(run, "--pipeline", tmp_path / "half", "--half")
    whole, half = run / "generator" / WEIGHTS_NAME, tmp_path / "half" / "generator" / WEIGHTS_NAME
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    rounded = load_file(half)
    for name, weight in load_file(whole).items():
        assert rounded[name].dtype == torch.float16 and torch.equal(rounded[name], weight.half())


def test_a_card_has_the_recipe_the_hashes_and_the_figures(run, tmp_path, capsys):
    results = tmp_path / "results.json"
    rows = {"one | step": {"figures": {"FID": 2.468, "Recall": 0.74}, "images": 1800}}
    more = {"rows": {"another": {"figures": {"FID": 9.0}}}, "features": "inception"}
    features = f"classifier:{tmp_path / 'judge'}"
    results.write_text(json.dumps({"rows": rows, "features": features, "more_spaces": [more]}))
    export(run, "--pipeline", tmp_path / "p", "--results", results, "--class-names", "digits")
    card = (tmp_path / "p" / "README.md").read_text()
    weights = (tmp_path / "p" / "generator" / "diffusion_pytorch_model.safetensors").read_bytes()
    for told in (
        "library_name: diffusers",
        "It makes an image in 2 steps",
        'from_pretrained("p", trust_remote_code=True)',
        'class_labels="2"',
        "| `--ratio-update` | 2 |",
        hashlib.sha256(weights).hexdigest(),
        "| one \\| step | 1800 | 2.47 | 0.74 |",
        "Features: classifier:judge\n\n| ",
        "Features: inception\n\n| ",
        "| another |  | 9 |",
    ):
        assert told in card, told
    for file in (path for path in (tmp_path / "p").rglob("*") if path.is_file() and path.name != "args.json"):
        content = file.read_bytes()
        assert str(tmp_path).encode() not in content and str(run).encode() not in content, file
    (tmp_path / "other.json").write_text("{}")
    message = refused(export, run, "--pipeline", tmp_path / "q", "--results", tmp_path / "other.json", capsys=capsys)
    assert "no rows" in message and not (tmp_path / "q").exists()
    message = refused(export, run, "--output-dir", tmp_path / "q", "--push-to-hub", "a/b", capsys=capsys)
    assert "give --pipeline" in message


def test_a_checkpoint_becomes_a_generator_and_a_pipeline_that_know_their_steps(run, tmp_path):
    export(run, "--pipeline", tmp_path / "pipeline", "--output-dir", tmp_path / "generator")
    told = json.loads((tmp_path / "generator" / "generation_config.json").read_text())
    units = torch.load(run / "checkpoints/torch_units/step-3.pt", weights_only=True)
    assert told == {
        "num_inference_steps": 2,
        "timestep_shift": 1.5,
        "run": str(run),
        "step": 3,
        "weights": "ema",
        "teacher_sha256": units["teacher_sha256"],
        "rewards_sha256": [],
        "latent_space_sha256": None,
    }
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert (index["num_inference_steps"], index["timestep_shift"]) == (2, 1.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generator", "pipeline"]


def test_an_export_replaces_nothing_but_exports(run, tmp_path, capsys):
    before = tree(run)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("thesis")
    for flag in ("--output-dir", "--pipeline"):
        for folder in (run, run / "checkpoints", run.parent, tmp_path / "mine"):
            refused(export, run, flag, folder, "--overwrite", capsys=capsys)
    same = tmp_path / "new"
    refused(export, run, "--output-dir", same, "--pipeline", same, capsys=capsys)
    refused(export, run, "--output-dir", same, "--pipeline", same / "pipeline", capsys=capsys)
    assert tree(run) == before and not same.exists()
    for more in ([], ["--weights", "raw", "--overwrite"]):
        export(run, "--output-dir", same, *more)
        assert GenerationConfig.read(same).weights == ("raw" if more else "ema")
    refused(export, run, "--output-dir", same, capsys=capsys)


def test_a_finished_export_stays_and_of_two_folders_the_missing_one_is_made(run, tmp_path, capsys):
    here = shutil.copytree(run, tmp_path / "run")
    folders = ["--output-dir", tmp_path / "generator", "--pipeline", tmp_path / "pipeline"]
    export(here, *folders)
    before, when = tree(tmp_path), (tmp_path / "pipeline" / "model_index.json").stat().st_mtime_ns
    export(here, *folders)
    assert "there already" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "generator")  # as after a kill between the two
    export(here, *folders)
    assert tree(tmp_path) == before and (tmp_path / "pipeline" / "model_index.json").stat().st_mtime_ns == when
    path = here / "checkpoints/torch_units/step-3.pt"
    torch.save(torch.load(path, weights_only=True) | {"samples_seen": 1}, path)
    assert "not empty" in refused(export, here, *folders, capsys=capsys)


def test_export_of_a_checkpoint_equals_the_final_export(teacher, tmp_path, capsys):
    for name, more in (("plain", []), ("lora", ["--use-lora-gen"]), ("ema", ["--ema-decay", 0.5])):
        run = run_cold_start(teacher, tmp_path / name, *more)
        checkpoint = run / "checkpoints" / "torch_units" / "step-3.pt"
        export_generator.main(["--checkpoint", str(checkpoint), "--output-dir", str(tmp_path / f"{name}-export")])
        ours, theirs = (SiT.from_pretrained(f).state_dict() for f in (tmp_path / f"{name}-export", run / "generator"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    arguments = ["--checkpoint", str(tmp_path / "plain/checkpoints/torch_units/step-3.pt"), "--weights", "ema"]
    assert "no EMA" in refused(export_generator.main, [*arguments, "--output-dir", str(tmp_path / "e")], capsys=capsys)


def test_a_lora_generator_is_exported_as_an_adapter_that_peft_reads(teacher, tmp_path, capsys):
    """The average's where there is one. Without LoRA there is none, and nothing is written."""
    run = run_cold_start(teacher, tmp_path / "run", "--use-lora-gen", "--ema-decay", 0.5)
    adapter = tmp_path / "adapter"
    checkpoint = run / "checkpoints/torch_units/step-3.pt"
    export_generator.main(["--checkpoint", str(checkpoint), "--adapter", str(adapter)])
    assert "outputs verified" in capsys.readouterr().out
    assert {path.name for path in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == 16 and all(value.dtype == torch.float32 for value in weights.values())
    model = PeftModel.from_pretrained(SiT.from_pretrained(teacher), adapter).merge_and_unload()
    merged = SiT.from_pretrained(run / "generator").state_dict()
    moved = SiT.from_pretrained(teacher).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(merged[name], moved[name]) != name.endswith(LORA_WEIGHTS)
    plain = run_cold_start(teacher, tmp_path / "plain", "--max-train-steps", 1)
    words = ["--checkpoint", str(plain / "checkpoints/torch_units/step-1.pt"), "--adapter", str(tmp_path / "none")]
    assert "trained whole" in refused(export_generator.main, words, capsys=capsys)
    assert not (tmp_path / "none").exists()


LORA_WEIGHTS = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
