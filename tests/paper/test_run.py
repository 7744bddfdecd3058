"""train_cc/distillation/run.py: the roles of the estimator, by a LoRA and by a whole network (--fake-score full)."""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import build_run, flags, logged, refused, run_cold_start, spread_lora_b
from tests.run.test_processes import PARITY, job, processes
from tests.run.test_resume import assert_same_run, units
from tests.worlds import inputs
from train_cc import cold_start
from train_cc.distillation.loop import cycle
from train_cc.models import load_network

FULL = ("--fake-score", "full")


@pytest.mark.parametrize(
    "scale,interval,rows", [(1.0, (0, 1), 8), (2.0, (0, 1), 12), (2.0, (0, 0.5), 10), (2.0, (0, 1e-6), 8)]
)
def test_fake_and_real_in_one_call_are_those_of_two(teacher, tmp_path, scale, interval, rows):
    """A batch of 4: 4 rows for the fake score, 4 for the real one, as many more as are guided."""
    run = build_run(teacher, tmp_path / "run", "--real-guidance-scale", scale, "--real-guidance-interval", *interval)
    spread_lora_b(run.estimator)
    x, _, y = inputs()
    t, c, seen = torch.tensor([0.1, 0.4, 0.6, 0.9]), 0.6, []
    hook = run.estimator.register_forward_pre_hook(lambda network, args: seen.append(len(args[0])))
    v_fake, v_real = run.scores.both(x, t, t, y, c)
    hook.remove()
    assert seen == [rows] and not v_fake.requires_grad and not v_real.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(v_fake, run.estimator(x, t, y, 2.0), rtol=1e-4, atol=1e-5)
        v, v_null = run.estimator(x, t, y, 0.75 * c), run.estimator(x, t, torch.full_like(y, 10), 0.75 * c)
    guided = (t <= interval[1])[:, None, None, None]
    torch.testing.assert_close(v_real, torch.where(guided, v_null + scale * (v - v_null), v), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(v_fake, v_real, atol=1e-2)


def test_full_real_is_the_teacher_and_fake_a_copy_that_is_trained(teacher, tmp_path):
    run = build_run(teacher, tmp_path / "run", *FULL, "--learning-rate-estimator", 1e-3, "--real-guidance-scale", 1.5)
    expected, (x, t, y) = load_network(teacher), inputs()
    with torch.no_grad():
        v, null = expected(x, t, y), expected(x, t, torch.full_like(y, 10))
        assert torch.equal(run.scores.fake(x, t, y), v)
    cycle(run, 0)
    with torch.no_grad():
        fake, real = run.scores.both(x, t, t, y, 0.0)
        torch.testing.assert_close(real, null + 1.5 * (v - null))
        assert torch.equal(run.scores.teacher(x, t, y), v) and (fake - v).abs().max() > 1e-3
        torch.testing.assert_close(fake, run.plain_estimator.network(x, t, y))


def test_full_resumes_to_the_bit_and_only_as_it_began(teacher, tmp_path, capsys):
    straight = run_cold_start(teacher, tmp_path / "a", *FULL)
    run_cold_start(teacher, tmp_path / "b", *FULL, "--max-train-steps", 2)
    run_cold_start(teacher, tmp_path / "b", *FULL, "--auto-resume")
    assert_same_run(straight, tmp_path / "b", 3)
    assert {row["lora_scale_real"] for row in logged(straight)} == {0.0}  # no dynamic guidance
    arguments = flags(teacher, tmp_path / "c", "--resume-ckpt", units(straight, 3), "--max-train-steps", 4)
    message = refused(cold_start.main, arguments, capsys=capsys)
    assert "--fake-score is lora" in message and "--fake-score full" in message


def test_full_in_two_processes_trains_what_one_does_with_two_batches(teacher, tmp_path):
    more = [*PARITY, *FULL, "--max-train-steps", 2]
    run_cold_start(teacher, tmp_path / "one", *more, "--gradient-accumulation-steps", 2)
    processes(tmp_path, *(job(teacher, tmp_path / str(sharded), *more, sharded=sharded) for sharded in (False, True)))
    for name in ("accelerator_1/step-2/generator", "accelerator_1/step-2/ema", "accelerator_2/step-2/estimator"):
        one, *others = (load_file(tmp_path / f"{run}/checkpoints/{name}.safetensors") for run in ("one", False, True))
        for two in others:
            assert one.keys() == two.keys() and all((one[key] - two[key]).abs().max() < 1e-6 for key in one)


def test_a_plan_counts_both_networks_of_the_full_estimator(teacher, tmp_path, capsys):
    cold_start.main(flags(teacher, tmp_path / "run", *FULL, "--dry-run"))
    count = sum(p.numel() for p in load_network(teacher).parameters())
    assert f"estimator {count:,} trained, {count:,} frozen" in capsys.readouterr().out
