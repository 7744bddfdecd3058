"""`--fake-score full`: the fake score is a trained copy of the teacher, the real score the teacher itself."""

import json

import torch
from safetensors.torch import load_file

from tests.conftest import build_run, flags, refused, run_cold_start
from tests.run.test_processes import PARITY, job, processes
from tests.run.test_resume import assert_same_run
from train_cc import cold_start
from train_cc.distillation.loop import cycle
from train_cc.models import load_network

FULL = ("--fake-score", "full")
INPUTS = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.4, 0.7, 1.0])
LABELS = torch.tensor([0, 3, 9, 10])


def test_real_is_the_teacher_and_fake_a_copy_that_is_trained(teacher, tmp_path):
    run = build_run(teacher, tmp_path / "run", *FULL, "--learning-rate-estimator", 1e-3, "--real-guidance-scale", 1.5)
    expected = load_network(teacher)
    x, t = INPUTS
    with torch.no_grad():
        v, null = expected(x, t, LABELS), expected(x, t, torch.full_like(LABELS, 10))
        assert torch.equal(run.scores.fake(x, t, LABELS), v)
    cycle(run, 0)
    with torch.no_grad():
        fake, real = run.scores.both(x, t, t, LABELS, 0.0)
        torch.testing.assert_close(real, null + 1.5 * (v - null))
        assert torch.equal(run.scores.teacher(x, t, LABELS), v) and (fake - v).abs().max() > 1e-3
        torch.testing.assert_close(fake, run.plain_estimator.network(x, t, LABELS))


def test_it_resumes_to_the_bit_and_only_as_it_began(teacher, tmp_path, capsys):
    straight = run_cold_start(teacher, tmp_path / "a", *FULL)
    run_cold_start(teacher, tmp_path / "b", *FULL, "--max-train-steps", 2)
    run_cold_start(teacher, tmp_path / "b", *FULL, "--auto-resume")
    assert_same_run(straight, tmp_path / "b", 3)
    rows = (straight / "loss_logs/loss_gen_log.jsonl").read_text().splitlines()
    assert {json.loads(row)["lora_scale_real"] for row in rows} == {0.0}  # no dynamic guidance
    units = straight / "checkpoints/torch_units/step-3.pt"
    message = refused(
        cold_start.main, flags(teacher, tmp_path / "c", "--resume-ckpt", units, "--max-train-steps", 4), capsys=capsys
    )
    assert "--fake-score is lora" in message and "--fake-score full" in message


def test_two_processes_train_what_one_does_with_two_batches(teacher, tmp_path):
    more = [*PARITY, *FULL, "--max-train-steps", 2]
    run_cold_start(teacher, tmp_path / "one", *more, "--gradient-accumulation-steps", 2)
    processes(tmp_path, *(job(teacher, tmp_path / str(sharded), *more, sharded=sharded) for sharded in (False, True)))
    for sharded in (False, True):
        for name in ("accelerator_1/step-2/generator", "accelerator_1/step-2/ema", "accelerator_2/step-2/estimator"):
            files = [tmp_path / run / f"checkpoints/{name}.safetensors" for run in ("one", str(sharded))]
            one, two = map(load_file, files)
            assert one.keys() == two.keys() and all((one[key] - two[key]).abs().max() < 1e-6 for key in one)


def test_a_plan_counts_both_networks_of_the_estimator(teacher, tmp_path, capsys):
    held = {}
    for kind in ("lora", "full"):
        cold_start.main(flags(teacher, tmp_path / "run", "--fake-score", kind, "--dry-run"))
        held[kind] = capsys.readouterr().out
    count = sum(p.numel() for p in load_network(teacher).parameters())
    assert f"estimator {count:,} trained, {count:,} frozen" in held["full"]
