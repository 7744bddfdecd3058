"""fp16 on a CPU: autocast and GradScaler("cpu"), in one process and in two, DDP and FSDP2.

This file is also the program that the processes run.
"""

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from evaluation.standins import write_vae
from tests import ROOT, rounded
from tests.conftest import flags, logged, random_sit, refused, spread_lora_b, trained
from train_cc import cold_start
from train_cc.distillation import loop
from train_cc.distillation.state import restore, save
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.models.estimator import ScoreEstimator
from train_cc.models.vae import load_decoder
from train_cc.rewards import terms
from train_cc.run.checkpoint import open_checkpoint
from train_cc.run.diagnostics import gathered
from train_cc.run.session import open_session
from train_cc.setup.build import build

LARGE = 2.0**120  # a scale that no gradient bears, nor after fifty halvings
GOOD = 2.0**8


def half_session(of_generator: float = GOOD, of_estimator: float = GOOD):
    """accelerate allows fp16 on a GPU alone: set up afterwards. The scales are those that the scalers start at."""
    AcceleratorState._reset_state(True)
    session = open_session("bf16")
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"
    session.generator_accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=of_generator)
    session.estimator_accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=of_estimator)
    return session


def half_run(teacher, output, *more, **scales):
    words = flags(teacher, output, "--ratio-update", 1, "--num-previews", 0, *more)
    run = build(cold_start.stage_parser().parse_args(words), half_session(**scales))
    spread_lora_b(run.plain_estimator)
    return run


@pytest.fixture(autouse=True)
def accelerate_forgets():
    yield
    AcceleratorState._reset_state(True)


def scales(run) -> list[float]:
    return [a.scaler.get_scale() for a in (run.session.generator_accelerator, run.session.estimator_accelerator)]


def moved(model, before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(gathered(now), gathered(before[name])) for name, now in trained(model).items())


# One process ------------------------------------------------------------------------------------------------------


def test_half_precision_computes_what_single_does(teacher, tmp_path):
    run = half_run(teacher, tmp_path / "half")
    _, half, _ = loop.cycle(run, 0)
    run = half_run(teacher, tmp_path / "single")
    AcceleratorState._reset_state(True)
    words = flags(teacher, tmp_path / "single", "--ratio-update", 1, "--num-previews", 0)
    single = build(cold_start.stage_parser().parse_args(words), open_session("no"))
    spread_lora_b(single.plain_estimator)
    _, row, _ = loop.cycle(single, 0)
    for name in ("loss_dmd", "score_gap", "grad_norm_generator"):
        assert row[name] > 0 and half[name] != row[name] and half[name] == pytest.approx(row[name], rel=0.03), name


def test_what_is_rounded_has_a_rounded_gradient():
    x, gradient = torch.tensor([1 / 3, 70_000.0], requires_grad=True), torch.tensor([1 / 7, 1e-9])
    out = rounded.Rounded.apply(x, torch.float16)
    out.backward(gradient)
    assert torch.equal(out, x.detach().half().float()) and torch.equal(x.grad, gradient.half().float())


def test_rounding_is_near_to_what_half_precision_computes(teacher, tmp_path):
    """`tests.rounded` stands for fp16 on machines that are slow in it: as far from fp32 as real fp16 is."""
    words = flags(teacher, tmp_path / "rounded", "--ratio-update", 1, "--num-previews", 0)
    moved_to = {}
    for way in ("single", "half", "rounded"):
        AcceleratorState._reset_state(True)
        with contextlib.ExitStack() as stack:
            for patch in rounded.rounds(torch.float16) if way == "rounded" else ():
                stack.enter_context(patch)
            if way == "half":
                run = half_run(teacher, tmp_path / way)
            else:
                session = rounded.scaled("no") if way == "rounded" else open_session("no")
                run = build(cold_start.stage_parser().parse_args(words), session)
                spread_lora_b(run.plain_estimator)
            loop.cycle(run, 0)
        moved_to[way] = torch.cat([p.detach().flatten() for p in run.plain_generator.parameters()])
    half, rounding = (torch.dist(moved_to[way], moved_to["single"]) for way in ("half", "rounded"))
    assert 0.5 < rounding / half < 2


def test_decoding_with_rounding_is_near_to_half_precision(tmp_path):
    decoder, x0 = load_decoder(str(write_vae(tmp_path / "vae", channels=(16, 16, 16, 16)))), torch.randn(4, 4, 8, 8)
    with torch.no_grad():
        single, half = decoder(x0), copy.deepcopy(decoder).half()(x0)
        with rounded.decodes(torch.float16):
            rounding = decoder(x0)
    assert 0.5 < torch.dist(rounding, single) / torch.dist(half, single) < 2


@pytest.mark.parametrize("named", [True, False])
def test_a_vae_whose_config_says_so_is_in_fp32_and_the_log_says_it(tmp_path, named):
    random_sit(in_channels=4).save_pretrained(tmp_path / "sit")
    config = write_vae(tmp_path / "vae") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": named}))
    run = half_run(tmp_path / "sit", tmp_path / "run", "--vae", tmp_path / "vae", "--num-previews", 2)
    assert run.decode.vae.dtype == (torch.float32 if named else torch.float16)
    assert any("force_upcast" in note for note in run.session.notes) == named


@pytest.mark.parametrize("which", ["generator", "estimator"])
def test_an_overflow_is_skipped_by_the_network_that_has_it_alone(teacher, tmp_path, which):
    run = half_run(teacher, tmp_path / "run", **{f"of_{which}": LARGE})
    before = {name: trained(getattr(run, name)) for name in ("generator", "estimator")}
    _, row, _ = loop.cycle(run, 0)
    for name in ("generator", "estimator"):
        assert moved(getattr(run, name), before[name]) == (name != which)
    assert scales(run) == ([LARGE / 2, GOOD] if which == "generator" else [GOOD, LARGE / 2])
    if which == "generator":
        assert row["grad_norm_generator"] == float("inf") or row["grad_norm_generator"] != row["grad_norm_generator"]


def test_scalers_are_restored_each_its_own(teacher, tmp_path):
    run = half_run(teacher, tmp_path / "run", of_generator=LARGE)
    loop.cycle(run, 0)
    run.step = 1
    run.output.output_dir.mkdir()
    checkpoint = open_checkpoint(save(run))
    again = half_run(teacher, tmp_path / "again")
    assert scales(again) == [GOOD, GOOD]
    restore(again, checkpoint)
    assert scales(again) == scales(run) == [LARGE / 2, GOOD]


def test_fifty_overflows_in_a_row_are_an_error(teacher, tmp_path, capsys):
    @exits_on_input_error
    def main() -> None:
        loop.train(
            half_run(teacher, tmp_path / "run", "--max-train-steps", 60, "--checkpoint-steps", 100, of_generator=LARGE)
        )

    told = refused(main, capsys=capsys)
    assert "step 50: grad_norm_generator overflowed in fp16 50 times in a row" in told and "bf16" in told


def test_overflows_that_end_are_none(teacher, tmp_path):
    """The usual start: the scaler finds its scale within some updates."""
    run = half_run(teacher, tmp_path / "run", "--max-train-steps", 40, "--checkpoint-steps", 100, of_generator=2.0**40)
    loop.train(run)
    assert run.step == 40 and max(run.overflows.values()) == 0 and scales(run)[0] < 2.0**40


# Rewards, decoder and forwards ------------------------------------------------------------------------------------


def rewarded(classifier) -> list:
    return ["--encoder-type", "classifier", "--reward-classifier", classifier, "--reward-weight", 0.5]


def test_a_reward_whose_gradient_overflows_is_dropped_and_finds_its_scale(teacher, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(terms, "GRADIENT_SCALE", 2.0**30)
    more = ["--max-train-steps", 25, "--checkpoint-steps", 25, *rewarded(classifier)]
    run = half_run(teacher, tmp_path / "run", *more)
    before = trained(run.plain_generator)
    _, row, _ = loop.cycle(run, 0)
    assert row["overflow_gradient_reward_classifier"] == 1 and "overflow_generator" not in row
    assert moved(run.plain_generator, before) and run.rewards[0].backoff == 0.5  # matching went on
    loop.train(run)
    rows = logged(tmp_path / "run")
    counted = [row.get("overflow_gradient_reward_classifier", 0) for row in rows]
    lost = [row["grad_norm_reward_classifier_x0"] is None for row in rows]
    assert 5 < sum(counted) < 24 and counted == lost and counted == sorted(counted, reverse=True)
    assert rows[-1]["grad_norm_reward_classifier_x0"] > 0 and run.rewards[0].backoff < 2.0**-5


def test_a_run_with_overflows_is_resumed_to_the_bit(teacher, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(terms, "GRADIENT_SCALE", 2.0**30)
    straight = half_run(teacher, tmp_path / "straight", "--checkpoint-steps", 2, *rewarded(classifier))
    loop.train(straight)
    checkpoint = open_checkpoint(tmp_path / "straight/checkpoints/torch_units/step-2.pt")
    assert checkpoint.units["reward_scales"] == {"classifier": {"backoff": 0.25, "good_turns": 0}}
    again = half_run(teacher, tmp_path / "again", *rewarded(classifier))
    restore(again, checkpoint)
    loop.train(again)
    assert logged(tmp_path / "again") == logged(tmp_path / "straight")[2:]
    assert again.rewards[0].backoff == straight.rewards[0].backoff == 0.125
    assert again.overflows == straight.overflows
    for name, value in trained(straight.plain_generator).items():
        assert torch.equal(value, trained(again.plain_generator)[name])
    del checkpoint.units["reward_scales"], checkpoint.units["overflows"]
    restore(again, checkpoint)
    assert again.rewards[0].backoff == 1 and not again.overflows


def test_a_lowered_scale_grows_again_and_never_beyond_its_start():
    reward = terms.Reward("r", 1.0, None)
    reward.adapt_scale(True)
    for _ in range(terms.GROWTH_INTERVAL):
        assert reward.backoff == 0.5
        reward.adapt_scale(False)
    for _ in range(2 * terms.GROWTH_INTERVAL):
        assert reward.backoff == 1
        reward.adapt_scale(False)


def overflow_once(module: torch.nn.Module, call: int) -> None:
    """The output of ``module``'s call of this number is infinite."""
    calls = []

    def hook(module, inputs, out):
        calls.append(None)
        return out * float("inf") if len(calls) == call + 1 else out

    module.register_forward_hook(hook)


# A cycle of one estimator turn calls the generator for it and in its own turn, and the estimator twice.
@pytest.mark.parametrize(
    "network,call,column,kept",
    [
        ("plain_generator", 2, "overflow_generator", "plain_estimator"),
        ("plain_generator", 3, "overflow_generator", "plain_generator"),
        ("plain_estimator", 2, "overflow_estimator", "plain_estimator"),
        ("plain_estimator", 3, "overflow_scores", "plain_generator"),
    ],
)
def test_an_overflow_in_a_forward_skips_the_update_and_is_counted(teacher, tmp_path, network, call, column, kept):
    run = half_run(teacher, tmp_path / "run")
    overflow_once(getattr(run, network), call)
    loop.cycle(run, 0)
    before = {name: trained(getattr(run, name)) for name in ("plain_generator", "plain_estimator")}
    rows, row, _ = loop.cycle(run, 1)
    loop.stop_unless_finite(run, [*rows, row])
    for name in before:
        assert moved(getattr(run, name), before[name]) == (name != kept)
    assert {**rows[0], **row}[column] == 1
    rows, row, _ = loop.cycle(run, 2)
    loop.stop_unless_finite(run, [*rows, row])
    assert not [name for name in {**rows[0], **row} if name.startswith("overflow")]
    assert moved(getattr(run, kept), before[kept])


def test_an_overflow_of_the_decoder_drops_the_rewards(teacher, classifier, tmp_path):
    run = half_run(teacher, tmp_path / "run", *rewarded(classifier))
    decode, before = run.decode, trained(run.plain_generator)
    run.decode = lambda x0: decode(x0) * float("inf")
    rows, row, _ = loop.cycle(run, 0)
    loop.stop_unless_finite(run, [*rows, row])
    assert row["overflow_decoder"] == 1 and moved(run.plain_generator, before)
    assert "overflow_reward_classifier" not in row and run.rewards[0].backoff == 1


def test_a_sample_that_overflows_never_enters_the_window_of_a_frechet_reward(teacher, real, tmp_path):
    more = ["--reward", "frechet", 1, real, "--frechet-window", 500, "--max-train-steps", 8]
    run = half_run(teacher, tmp_path / "run", *more)
    overflow_once(run.plain_generator, 1)  # fills the window
    overflow_once(run.plain_generator, 130)
    loop.train(run)
    assert all(memory.sums.m.isfinite().all() for memory in run.memories.values())
    assert [row for row in logged(tmp_path / "run") if "overflow_generator" in row]
    assert logged(tmp_path / "run")[-1]["grad_norm_reward_frechet_x0"] > 0


def test_a_reward_that_overflows_for_ever_stops_the_run_and_good_weights_are_saved(
    teacher, classifier, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(terms, "GRADIENT_SCALE", 2.0**100)
    monkeypatch.setattr(loop, "MOST_OVERFLOWS", 3)
    more = ["--max-train-steps", 9, "--checkpoint-steps", 100, "--keep-checkpoints", 1, *rewarded(classifier)]
    run = half_run(teacher, tmp_path / "run", *more)
    message = refused(exits_on_input_error(loop.train), run, capsys=capsys)
    assert "step 3" in message and "reward_classifier" in message and "--mixed-precision bf16" in message
    assert "checkpoint of step 3 is kept" in message and len(logged(tmp_path / "run")) == 3
    again = half_run(teacher, tmp_path / "again", *more)
    restore(again, open_checkpoint(tmp_path / "run/checkpoints/torch_units/step-3.pt"))
    assert again.step == 3 and not again.overflows and not moved(again.plain_generator, trained(run.plain_generator))


USERS_REWARD = """
calls = []
def f(images, y):
    calls.append(0)
    return images.flatten(1).mean(1) * (float("nan") if len(calls) == 3 else 1)
"""


@pytest.mark.parametrize("half", [True, False])
def test_nan_that_is_no_overflow_stops_at_once_and_good_weights_are_saved(teacher, tmp_path, capsys, half):
    """A user's function is called once before the run begins."""
    (tmp_path / "mine.py").write_text(USERS_REWARD)
    more = ["--reward", "python", 1, f"{tmp_path / 'mine.py'}:f", "--checkpoint-steps", 100, "--ratio-update", 1]
    more += ["--num-previews", 0]
    if half:
        run = half_run(teacher, tmp_path / "run", *more)
        message = refused(exits_on_input_error(loop.train), run, capsys=capsys)
    else:
        message = refused(cold_start.main, flags(teacher, tmp_path / "run", *more), capsys=capsys)
    assert "step 2: " in message and "loss_reward_f is nan" in message and "step 2 is kept" in message
    again = half_run(teacher, tmp_path / "again", *more[:4])
    restore(again, open_checkpoint(tmp_path / "run/checkpoints/torch_units/step-2.pt"))
    assert all(value.isfinite().all() for value in trained(again.plain_generator).values())


# The check at the start -------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


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


@pytest.mark.parametrize(
    "change,classes", [(large_class, 10), (large_class_of_many, 1000), (within_the_margin, 10), (at_the_end, 10)]
)
def test_a_teacher_that_leaves_the_range_for_some_class_or_sample_is_found(change, classes):
    model = random_sit(num_classes=classes)
    estimator = ScoreEstimator(copy.deepcopy(model), 4)
    assert estimator.overflowing_block(torch.float16, CPU) is None
    with torch.no_grad():
        change(model)
    estimator = ScoreEstimator(model, 4)
    assert estimator.overflowing_block(torch.float16, CPU)
    assert estimator.overflowing_block(torch.bfloat16, CPU) is None


def test_a_decoder_that_leaves_the_range_is_refused(tmp_path):
    random_sit(in_channels=4).save_pretrained(tmp_path / "teacher")
    vae = write_vae(tmp_path / "vae")
    more = ["--vae", vae, "--num-previews", 4]
    half_run(tmp_path / "teacher", tmp_path / "run", *more)
    scale_weight(vae / "diffusion_pytorch_model.safetensors", "decoder.conv_in.weight", 1e6)
    with pytest.raises(InputError, match=f"decoder.conv_in of the decoder {vae} .*--mixed-precision bf16"):
        half_run(tmp_path / "teacher", tmp_path / "run", *more)
    words = flags(tmp_path / "teacher", tmp_path / "run", *more)
    AcceleratorState._reset_state(True)
    build(cold_start.stage_parser().parse_args(words), open_session("bf16"))


@pytest.mark.parametrize("reward", [True, False])
def test_a_judge_that_leaves_the_range_is_refused(teacher, classifier, tmp_path, reward):
    judge = Path(shutil.copytree(classifier, tmp_path / "judge"))
    more = rewarded(judge) if reward else ["--holdout-classifier", judge]
    half_run(teacher, tmp_path / "run", *more)
    scale_weight(judge / "model.safetensors", "fc.weight", 1e6)
    name = "reward classifier" if reward else "holdout"
    with pytest.raises(InputError, match=f"fp16 overflows in network.fc of the {name} .*--mixed-precision bf16"):
        half_run(teacher, tmp_path / "run", *more)


def scale_weight(file: Path, name: str, factor: float) -> None:
    state = load_file(file)
    state[name] *= factor
    save_file(state, file)


# Two processes ----------------------------------------------------------------------------------------------------


def worker(folder: Path, teacher: Path) -> None:
    """Two cycles; the first is good, in the second process 1 alone overflows. Notes what each process then has."""
    sharded = os.environ["ACCELERATE_USE_FSDP"] == "true"
    run = half_run(teacher, folder / "run")
    assert run.session.sharded == sharded and run.session.world_size == 2
    loop.cycle(run, 0)
    before, scale = trained(run.generator), scales(run)
    overflow_in_process_1(run, sharded)
    loop.cycle(run, 1)
    after = {name: gathered(value).sum().item() for name, value in trained(run.generator).items()}
    told = {"moved": moved(run.generator, before), "scales": [scale, scales(run)], "sums": after}
    (folder / f"told-{run.session.rank}.json").write_text(json.dumps(told))


def overflow_in_process_1(run, sharded: bool) -> None:
    """DDP reduces whole gradients: a loss overflows. FSDP2 leaves each process its part: one part does."""
    if run.session.rank != 1:
        return
    if not sharded:
        backward = run.session.generator_accelerator.backward
        run.session.generator_accelerator.backward = lambda loss: backward(loss * float("inf"))
        return
    turn = loop.generator_turn

    def overflowing(run, step):
        figures = turn(run, step)
        gradient = next(p.grad for p in run.generator.parameters() if p.grad.to_local().numel())
        gradient.to_local().fill_(float("inf"))
        return figures

    loop.generator_turn = overflowing


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_an_overflow_in_one_process_is_skipped_by_both(teacher, tmp_path, sharded):
    environment = os.environ | {"NUM_PROCESSES": "2", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_FSDP"] = str(sharded).lower()
    command = [sys.executable, "-m", "scripts.launch", "tests.run.test_fp16", str(tmp_path), str(teacher)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1] and not told[0]["moved"]
    assert told[0]["scales"] == [[GOOD, GOOD], [GOOD / 2, GOOD]]


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
