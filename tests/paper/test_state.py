"""train_cc/distillation/state.py: parts that a checkpoint brings back, and the export. Resuming: run/test_resume.py."""

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.conftest import logged, run_cold_start, trained
from tests.worlds import GOOD, LARGE, half_run, rewarded, scales
from train_cc.distillation import loop
from train_cc.distillation.state import restore, save
from train_cc.models import SiT
from train_cc.rewards import terms
from train_cc.run.checkpoint import open_checkpoint


@pytest.fixture(autouse=True)
def accelerate_forgets():
    yield
    AcceleratorState._reset_state(True)


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


def test_export_is_the_ema_where_there_is_one(teacher, tmp_path):
    run = run_cold_start(teacher, tmp_path / "run", "--ema-decay", 0.9)
    exported = SiT.from_pretrained(run / "generator").state_dict()
    files = (run / f"checkpoints/accelerator_1/step-3/{name}.safetensors" for name in ("ema", "generator"))
    average, raw = map(load_file, files)
    assert len(average) > 10 and all(torch.equal(exported[name], average[name]) for name in average)
    assert max((average[name] - raw[name]).abs().max().item() for name in average) > 1e-5
