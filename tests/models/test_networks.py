"""Every network of `backbone.NETWORKS` conforms, and that of docs/teachers.md; a new one enters by its name."""

import hashlib
import json
import re
import shutil
from functools import cache

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from convert_weight import export_generator
from evaluation import generate
from tests import ROOT
from tests.conftest import TINY, flags, refused, run_cold_start, words
from tests.run.test_processes import PARITY, job, largest_difference, processes
from tests.run.test_resume import assert_same_run
from train_cc import cold_start, dmdr_refl
from train_cc.models import ScoreEstimator, load_network
from train_cc.models.backbone import CODE, NETWORKS, class_of, trust_code
from train_cc.models.lora import lora_layers
from train_cc.samplers import few_step_sample

OWN = "Mixer"  # of the page
OWN_CONFIG = {"in_channels": 1, "input_size": 8, "num_classes": 10, "patch": 2, "width": 32, "depth": 2}
NAMES = [*NETWORKS, OWN]
every = pytest.mark.parametrize("name", NAMES)
INPUTS = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.5, 1.0])
LABELS = torch.tensor([0, 3, 10])


@cache
def own_code() -> str:
    """The first Python block of the page."""
    return re.search(r"```python\n(.*?)```", (ROOT / "docs/teachers.md").read_text(), re.DOTALL)[1]


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> str:
    """SHA-256 of the page's network, which is trusted from now on."""
    folder = tmp_path_factory.mktemp("code")
    (folder / CODE).write_text(own_code())
    trust_code(folder)
    return hashlib.sha256(own_code().encode()).hexdigest()


def trust(name: str) -> tuple[str, ...]:
    return ("--trust-teacher-code",) if name == OWN else ()


@pytest.fixture(scope="module")
def random_network(code):
    def network_of(name: str):
        torch.manual_seed(0)
        own = name == OWN
        kind = {"_class_name": name} | ({"_code_sha256": code} if own else {})
        return spread(class_of(kind)(**OWN_CONFIG if own else TINY))

    return network_of


def spread(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, random_network):
    """A teacher of each network, of random weights."""
    made = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in made.items():
        random_network(name).save_pretrained(folder)
    return made


@every
def test_a_folder_names_its_network_and_holds_all_of_it(name, folders, random_network):
    network, again = random_network(name), load_network(folders[name])
    assert type(again).__name__ == name and not again.training
    state = load_file(again.files[0])
    assert state.keys() == {*dict(network.named_parameters()), *dict(network.named_buffers())}
    assert torch.equal(again(*INPUTS, LABELS), network(*INPUTS, LABELS))
    assert not re.search(r"^\s*(from|import) (train_cc|\.)", network.code, re.MULTILINE)


@every
def test_labels_are_never_dropped_and_the_null_class_is_the_last(name, random_network):
    network = random_network(name).train()
    assert torch.equal(network(*INPUTS, LABELS), network(*INPUTS, LABELS))
    assert network.null_class == 10 and network.sample_shape == (1, 8, 8)


@every
def test_the_lora_hits_each_block(name, random_network):
    teacher, estimator = random_network(name).requires_grad_(False), ScoreEstimator(random_network(name), 2)
    assert len(lora_layers(estimator)) == len(estimator.blocks) * len(estimator.network.estimator_targets)
    with torch.no_grad():
        plain, adapted = estimator(*INPUTS, LABELS, 0.0), estimator(*INPUTS, LABELS, 1.0)
        assert torch.equal(plain, teacher(*INPUTS, LABELS)) and torch.equal(plain, adapted)  # B is 0


@every
def test_checkpointing_changes_no_gradient(name, random_network):
    gradients = []
    for checkpointing in (False, True):
        network = random_network(name).train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        network(*INPUTS, LABELS).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_step_in_half_precision_is_near(name, dtype, random_network):
    network = random_network(name)
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = few_step_sample(network, noise, LABELS[[0, 1, 0, 1]])
        with torch.autocast("cpu", dtype):
            half = few_step_sample(network, noise, LABELS[[0, 1, 0, 1]])
    assert 0 < (half - exact).abs().mean() < 0.05 * exact.abs().mean()


MODES = {"whole": ("--ema-decay", 0.9), "LoRA": ("--use-lora-gen",)}


@every
@pytest.mark.parametrize("mode", MODES)
def test_a_run_resumes_to_the_bit_and_its_generator_is_sampled(name, mode, folders, tmp_path):
    more = (*MODES[mode], "--num-steps", 2, *trust(name))
    straight = run_cold_start(folders[name], tmp_path / "a", *more)
    run_cold_start(folders[name], tmp_path / "b", *more, "--max-train-steps", 2)
    run_cold_start(folders[name], tmp_path / "b", *more, "--auto-resume")
    assert_same_run(straight, tmp_path / "b", 3)
    assert type(load_network(straight / "generator")).__name__ == name
    for source in (straight / "generator", straight / "checkpoints/torch_units/step-3.pt"):
        target = ("--num-images", 3, "--output", tmp_path / f"{source.stem}.npz")
        generate.main(words("--generator", source, *target, *trust(name)))


@pytest.mark.parametrize("name", ["DiT", OWN, pytest.param("LightningDiT", marks=pytest.mark.slow)])
def test_rewards_and_a_pipeline_of_its_own_process(name, folders, tmp_path, reward_folder, capsys):
    """The export samples the pipeline in a process that knows nothing of this project."""
    more = ("--use-lora-gen", *trust(name))
    cold = run_cold_start(folders[name], tmp_path / "cold", "--max-train-steps", 1, *more)
    units = cold / "checkpoints/torch_units/step-1.pt"
    reward = ("--encoder-type", "none", "--reward", "classifier", 0.5, reward_folder, "--resume-ckpt", units)
    dmdr_refl.main(flags(folders[name], tmp_path / "dmdr", "--max-train-steps", 2, *reward, *more))
    units = tmp_path / "dmdr/checkpoints/torch_units/step-2.pt"
    targets = ("--pipeline", tmp_path / "p", "--adapter", tmp_path / "a")
    export_generator.main(words("--checkpoint", units, *targets, *trust(name)))
    assert "outputs verified" in capsys.readouterr().out and (tmp_path / "p/generator/network.py").exists()


@every
def test_a_checkpoint_of_another_network_is_refused(name, folders, tmp_path, capsys):
    run = run_cold_start(folders[name], tmp_path / "run", "--max-train-steps", 1, "--num-previews", 0, *trust(name))
    units = run / "checkpoints/torch_units/step-1.pt"
    for other in {*NAMES} - {name}:
        more = flags(folders[other], tmp_path / "other", "--resume-ckpt", units, *trust(other))
        assert "does not fit this run's model" in refused(cold_start.main, more, capsys=capsys)


def test_two_shards_train_what_one_process_does(folders, tmp_path):
    jobs = []
    for name in NAMES:
        more = [*PARITY, "--max-train-steps", 2, *trust(name)]
        run_cold_start(folders[name], tmp_path / name, *more, "--gradient-accumulation-steps", 2)
        jobs.append(job(folders[name], tmp_path / f"{name}_sharded", *more, sharded=True))
    assert all(each["sharded"] == each["of"] > 20 for each in processes(tmp_path, *jobs))
    for name in NAMES:
        assert largest_difference(tmp_path / name, tmp_path / f"{name}_sharded", 2) < 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"SiT"}))
def test_a_block_keeps_as_much_as_sits_and_is_planned(name, folders, tmp_path, capsys):
    """The peak of the size S, at 256 tokens: the residual stream, attention and MLP of its twelve blocks."""
    peaks = {}
    for each in ("SiT", name):
        network = class_of({"_class_name": each})(depth=12, hidden_size=384, num_heads=6)
        network.save_config(tmp_path / each)
        more = ("--vae", "stabilityai/sd-vae-ft-ema", "--num-previews", 0, "--batch-size", 64, "--dry-run")
        cold_start.main(flags(tmp_path / each, tmp_path / "run", *more))
        peaks[each] = float(re.search(r"peak, training, generator turn: ([\d.]+) GiB", capsys.readouterr().out)[1])
    assert 0.9 < peaks[name] / peaks["SiT"] < 1.15


def test_own_code_is_recorded_and_a_run_goes_on_only_with_it(folders, code, tmp_path, capsys):
    folder = shutil.copytree(folders[OWN], tmp_path / "teacher")
    run = run_cold_start(folder, tmp_path / "run", "--max-train-steps", 2, "--trust-teacher-code")
    assert json.loads((run / "args.json").read_text())["sha256"]["teacher_code"] == code
    assert (run / "generator" / CODE).read_text() == own_code()
    (folder / CODE).write_text(own_code().replace("nn.GELU()", "nn.ReLU()"))
    more = flags(folder, run, "--max-train-steps", 3, "--auto-resume", "--trust-teacher-code")
    assert "does not fit this run's model" in refused(cold_start.main, more, capsys=capsys)


def test_a_dit_of_noise_is_refused_in_bf16_and_with_another_prediction(folders, tmp_path, capsys):
    more = flags(folders["DiT"], tmp_path / "run", "--mixed-precision", "bf16")
    AcceleratorState._reset_state(True)
    try:
        assert "prediction is of noise, and one step multiplies" in refused(cold_start.main, more, capsys=capsys)
    finally:
        AcceleratorState._reset_state(True)
    folder = shutil.copytree(folders["DiT"], tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    for name, value, allowed in (("prediction", "x0", "eps, v"), ("last_step", 1000, "999"), ("beta_end", 2, "1")):
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        message = refused(cold_start.main, flags(folder, tmp_path / "run"), capsys=capsys)
        assert f"{name} is {value}; allowed: " in message and allowed in message


BROKEN = {
    "not trusted": (lambda code: code + "\n", "has not been run: read it, and give --trust-teacher-code"),
    "no class": (lambda code: code.replace("class Mixer", "class Other"), "has no class Mixer"),
    "raises": (lambda code: "1 / 0", "cannot be run (ZeroDivisionError: division by zero)"),
    "no blocks": (lambda code: code.replace("self.blocks", "self.layers"), "has no blocks"),
    "no target": (lambda code: code.replace('("mlp.0",)', '("mlp.9",)'), "has no nn.Linear mlp.9"),
    "lacks": (lambda code: code.replace("generator_targets", "targets"), "lacks generator_targets"),
    "cannot be called": (lambda code: code.replace("patch, patch)", "patch, 0)"), "cannot be built of {'in_channels"),
    "another shape": (lambda code: code.replace("return nn", "return x[:1]; nn"), "returns (1, 1, 8, 8) of inputs"),
    "no shape": (lambda code: code.replace("num_classes", "classes"), "lacks num_classes"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_code_is_one_message_and_untrusted_code_is_not_run(case, folders, tmp_path, capsys):
    change, expected = BROKEN[case]
    folder = shutil.copytree(folders[OWN], tmp_path / "teacher")
    marker = f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n"
    (folder / CODE).write_text(marker + change(own_code()))
    more = () if case == "not trusted" else ("--trust-teacher-code",)
    assert expected in refused(cold_start.main, flags(folder, tmp_path / "run", *more), capsys=capsys)
    assert (tmp_path / "was_run").exists() == bool(more) and not (tmp_path / "run").exists()
