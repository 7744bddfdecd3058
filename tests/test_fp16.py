"""fp16 on a CPU: autocast and GradScaler("cpu"), in one process and in two, DDP and FSDP2.

This file is also the program that the processes run.
"""

import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from evaluation.standins import write_vae
from tests import rounded
from tests.conftest import flags, random_sit, refused, spread_lora_b, trained
from train_cc import cold_start
from train_cc.distillation import loop
from train_cc.distillation.state import restore, save
from train_cc.io.errors import exits_on_input_error
from train_cc.models.vae import load_decoder
from train_cc.run.checkpoint import open_checkpoint
from train_cc.run.diagnostics import gathered
from train_cc.run.session import open_session
from train_cc.setup.build import build

ROOT = Path(__file__).resolve().parents[1]
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
    command = [sys.executable, "-m", "scripts.launch", "tests.test_fp16", str(tmp_path), str(teacher)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1] and not told[0]["moved"]
    assert told[0]["scales"] == [[GOOD, GOOD], [GOOD / 2, GOOD]]


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
