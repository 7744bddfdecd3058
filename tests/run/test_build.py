"""train_cc/setup/build.py and arguments.py: the compiler, the optimizers, what is recomputed, and the range of fp16."""

import copy
import importlib.util
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from functorch.compile import make_boxed_func
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.common import aot_autograd

from evaluation.standins import write_dinov2, write_vae
from tests.conftest import build_run, flags, logged, random_sit, refused, run_cold_start
from tests.worlds import half_run, inputs, kept_bytes, rewarded
from train_cc import cold_start
from train_cc.io.errors import InputError
from train_cc.models.estimator import ScoreEstimator
from train_cc.run.session import open_session
from train_cc.setup.arguments import build_parser, validate
from train_cc.setup.build import build, compiler_works, prepare_scores


@pytest.fixture(autouse=True)
def accelerate_forgets():
    yield
    AcceleratorState._reset_state(True)


# The compiler


@pytest.mark.slow
def test_compiled_blocks_train_the_same(teacher, tmp_path):
    plain = logged(run_cold_start(teacher, tmp_path / "a"))
    torch._dynamo.utils.counters.clear()
    compiled = logged(run_cold_start(teacher, tmp_path / "b", "--compile"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for one, other in zip(plain, compiled, strict=True):
        figures = [{name: value for name, value in row.items() if value is not None} for row in (one, other)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-3, abs=1e-5)


def broken(*args):
    raise RuntimeError("no g++")


@pytest.mark.parametrize("backward", [False, True])
def test_a_compiler_that_fails_is_found_first(teacher, tmp_path, monkeypatch, capsys, backward):
    """Inductor may be well for the forward only: asked for, it is an error, and else a line in the log."""
    if backward:
        backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph), bw_compiler=broken)
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    else:
        monkeypatch.setattr(torch, "compile", broken)
    message = refused(cold_start.main, flags(teacher, tmp_path / "run", "--compile"), capsys=capsys)
    assert "--compile" in message and "no g++" in message and not (tmp_path / "run").exists()
    session = SimpleNamespace(device=torch.device("cuda"), notes=[])
    with torch._dynamo.config.patch(suppress_errors=True, recompile_limit=8, optimize_ddp=True):
        assert not compiler_works("auto", session)
    (note,) = session.notes
    assert note.startswith("WARNING") and "no g++" in note


# Optimizers and trackers


def test_a_library_that_is_not_installed_is_refused(teacher, tmp_path, capsys, monkeypatch):
    (tmp_path / "here" / "wandb").mkdir(parents=True)  # as wandb leaves it where a run was started: no library
    monkeypatch.syspath_prepend(tmp_path / "here")
    libraries = ("wandb", "torchao")
    there = [path for path in sys.path if not any((Path(path) / name / "__init__.py").exists() for name in libraries)]
    monkeypatch.setattr("sys.path", there)
    for name in libraries:
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert importlib.util.find_spec("wandb") is not None
    for more, name in ((["--report-to", "wandb"], "wandb"), (["--optimizer", "adamw8bit"], "torchao")):
        message = refused(cold_start.main, flags(teacher, tmp_path / "run", *more), capsys=capsys)
        assert f"pip install {name}" in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=str)
def test_moments_in_8_bits_are_not_sharded(teacher, tmp_path, capsys, monkeypatch, more):
    """They cannot be saved: refused before anything is loaded, by a plan too. DDP and one process take them."""
    words = [*flags(teacher, tmp_path / "run", "--optimizer", "adamw8bit"), *more]
    monkeypatch.setattr("train_cc.setup.arguments.installed", lambda name: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    validate(build_parser("").parse_args(words))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    message = refused(cold_start.main, words, capsys=capsys)
    assert "--optimizer adamw8bit under FSDP2" in message and "allowed: adamw" in message
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    validate(build_parser("").parse_args(words))


@pytest.mark.slow
def test_eight_bit_moments_train_and_resume(teacher, tmp_path):
    """torchao compiles its step, on a CPU too; moments of small tensors stay fp32, hence the wider teacher."""
    pytest.importorskip("torchao")
    random_sit(hidden_size=64).save_pretrained(tmp_path / "sit")
    more = ["--optimizer", "adamw8bit", "--lora-rank", 64, "--max-train-steps"]
    whole = run_cold_start(tmp_path / "sit", tmp_path / "a", *more, 3)
    run_cold_start(tmp_path / "sit", tmp_path / "b", *more, 2)
    resumed = run_cold_start(tmp_path / "sit", tmp_path / "b", *more, 3, "--auto-resume")
    assert logged(whole) == logged(resumed)
    plain = run_cold_start(tmp_path / "sit", tmp_path / "c", "--lora-rank", 64)
    for row, other in zip(logged(whole), logged(plain), strict=True):  # near to AdamW with whole moments, not the same
        assert row["loss_dmd"] == pytest.approx(other["loss_dmd"], rel=0.02)
        assert row["loss_dmd"] != other["loss_dmd"]


def test_each_network_has_the_numbers_that_its_flags_give_it(teacher, tmp_path):
    more = ["--adam-beta1", 0.5, "--adam-beta1-estimator", 0, "--weight-decay-estimator", 0.2]
    more += ["--gan-weight", 0.01, "--gan-data", "digits", "--learning-rate-gan", 0.3]
    groups = [each.optimizer.param_groups[0] for each in build_run(teacher, tmp_path, *more).learners.values()]
    assert [group["betas"][0] for group in groups] == [0.5, 0, 0.5] and all(group["fused"] for group in groups)
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 0.3]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.2, 0.0]


# What is recomputed


def test_networks_decoder_and_judge_recompute(tmp_path):
    """Of a block its input is kept, where without --gradient-checkpointing some twenty tensors are."""
    random_sit(in_channels=4).save_pretrained(tmp_path / "sit")
    backbone, head = write_dinov2(tmp_path / "dinov2", width=64, depth=4, classes=10)
    words = ["--vae", write_vae(tmp_path / "vae", channels=(16, 16, 16, 16)), "--encoder-type", "dinov2"]
    words += ["--dinov2-backbone", backbone, "--dinov2-head", head]
    images, (_, t, y) = torch.rand(2, 3, 64, 64), inputs(8)
    x = torch.randn(8, 4, 8, 8)
    kept = []
    for more in ([], ["--reward-checkpointing", "--gradient-checkpointing"]):
        run = build_run(tmp_path / "sit", tmp_path / "run", *words, *more)
        decode, judge, generator, estimator = run.decode, run.judges["reward_dinov2"], run.generator, run.estimator
        kept.append(
            [
                kept_bytes(generator, lambda g=generator: g(x, t, y)),
                kept_bytes(estimator, lambda e=estimator: e(x, t, y, lora_scale=2.0)),
                kept_bytes(decode, lambda d=decode: d(x[:2].clone().requires_grad_())),
                kept_bytes(judge, lambda j=judge: j(images.clone().requires_grad_())),
            ]
        )
    assert all(0 < few < 0.5 * many for many, few in zip(*kept, strict=True))


# The range of fp16


def large_class(model) -> None:
    model.y_embedder.embedding_table.weight[3] *= 3e3


def large_class_of_many(model) -> None:
    model.y_embedder.embedding_table.weight[777] *= 3e3


def within_the_margin(model) -> None:
    """Finite in fp16 on these inputs; other samples may have four times as much."""
    model.blocks[1].mlp.fc2.bias[0] = 2e4


def at_the_end(model) -> None:
    """The velocity, at no time noise: only a later step of a sampler sees what it leads to."""
    model.final_layer.linear.bias += 3e4


class OnCPU(ScoreEstimator):
    """An estimator that is on a GPU, and stays on the CPU."""

    def to(self, device):
        return self

    def overflowing_block(self, dtype, device):
        return super().overflowing_block(dtype, torch.device("cpu"))


@pytest.mark.parametrize(
    "change,classes", [(large_class, 10), (large_class_of_many, 1000), (within_the_margin, 10), (at_the_end, 10)]
)
@torch.no_grad()
def test_a_teacher_that_leaves_the_range_for_some_class_or_sample_is_found(change, classes):
    """Asked for fp16 it is an error, and else a line in the log; a CPU has no fast fp16."""
    model = random_sit(num_classes=classes)
    session = SimpleNamespace(device=SimpleNamespace(type="cuda"), sharded=False, notes=[])
    estimator = OnCPU(copy.deepcopy(model), 4)
    prepare_scores(estimator, Path("the/teacher"), session, torch.bfloat16)
    assert estimator.score_dtype == torch.float16 and not session.notes
    change(model)
    estimator = OnCPU(model, 4)
    assert estimator.overflowing_block(torch.bfloat16, None) is None
    with pytest.raises(InputError, match=r"fp16 overflows in .* of the/teacher"):
        prepare_scores(estimator, Path("the/teacher"), session, torch.float16)
    prepare_scores(estimator, Path("the/teacher"), session, torch.bfloat16)
    assert estimator.score_dtype is None and "bf16" in session.notes.pop()
    session.device = torch.device("cpu")
    prepare_scores(estimator, Path("the/teacher"), session, torch.float16)
    assert not session.notes


def scale_weight(file: Path, name: str, factor: float) -> None:
    state = load_file(file)
    state[name] *= factor
    save_file(state, file)


def test_a_decoder_that_leaves_the_range_is_refused(tmp_path):
    random_sit(in_channels=4).save_pretrained(tmp_path / "teacher")
    vae = write_vae(tmp_path / "vae")
    more = ["--vae", vae, "--num-previews", 4]
    half_run(tmp_path / "teacher", tmp_path / "run", *more)
    scale_weight(vae / "diffusion_pytorch_model.safetensors", "decoder.conv_in.weight", 1e6)
    with pytest.raises(InputError, match=f"decoder.conv_in of the decoder {vae} .*--mixed-precision bf16"):
        half_run(tmp_path / "teacher", tmp_path / "run", *more)
    AcceleratorState._reset_state(True)
    args = cold_start.stage_parser().parse_args(flags(tmp_path / "teacher", tmp_path / "run", *more))
    build(args, open_session("bf16"))


@pytest.mark.parametrize("reward", [True, False])
def test_a_judge_that_leaves_the_range_is_refused(teacher, classifier, tmp_path, reward):
    judge = Path(shutil.copytree(classifier, tmp_path / "judge"))
    more = rewarded(judge) if reward else ["--holdout-classifier", judge]
    half_run(teacher, tmp_path / "run", *more)
    scale_weight(judge / "model.safetensors", "fc.weight", 1e6)
    name = "reward classifier" if reward else "holdout"
    with pytest.raises(InputError, match=f"fp16 overflows in network.fc of the {name} .*--mixed-precision bf16"):
        half_run(teacher, tmp_path / "run", *more)


@pytest.mark.parametrize("upcast", [True, False])
def test_a_vae_whose_config_says_so_is_in_fp32_and_the_log_says_it(tmp_path, upcast):
    random_sit(in_channels=4).save_pretrained(tmp_path / "sit")
    config = write_vae(tmp_path / "vae") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": upcast}))
    run = half_run(tmp_path / "sit", tmp_path / "run", "--vae", tmp_path / "vae", "--num-previews", 2)
    assert run.decode.vae.dtype == (torch.float32 if upcast else torch.float16)
    assert any("force_upcast" in note for note in run.session.notes) == upcast
