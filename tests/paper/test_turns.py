"""train_cc/distillation/turns.py: accumulation, which network a turn trains, and every flag of the method."""

import functools

import pytest
import torch

from tests.conftest import assert_close_and_not_zero, build_run, spread_lora_b, trained
from train_cc.distillation import loop, turns
from train_cc.draws import Draws


def tiny_run(teacher, tmp_path, *more):
    """A run whose real and fake score differ, as they do from the first update on."""
    run = build_run(teacher, tmp_path / "run", *more)
    spread_lora_b(run.estimator)
    return run


class Sliced:
    """The draws of one large batch, cut to the rows of one chunk of it."""

    def __init__(self, draws, rows, total):
        self.draws, self.rows, self.total = draws, rows, total

    def noise(self, _, *shape):
        return self.draws.noise(self.total, *shape)[self.rows]

    def noise_like(self, x):
        return self.noise(*x.shape)

    def integers(self, high, _):
        return self.draws.integers(high, self.total)[self.rows]

    def uniform(self, _):
        return self.draws.uniform(self.total)[self.rows]


@pytest.mark.parametrize("num_steps", [1, 2])
def test_accumulating_two_batches_gives_the_gradients_of_one(teacher, tmp_path, monkeypatch, num_steps):
    def draws_of(run, turn, iteration, chunk):
        size = run.optimisation.batch_size
        return Sliced(Draws(run.optimisation.seed, turn, iteration), slice(chunk * size, (chunk + 1) * size), 8)

    monkeypatch.setattr(turns, "chunk_draws", draws_of)
    gradients = []
    for chunks in (1, 2):
        more = ("--batch-size", 8 // chunks, "--gradient-accumulation-steps", chunks, "--num-steps", num_steps)
        run = tiny_run(teacher, tmp_path, *more)
        turns.estimator_turn(run, 1, turns.estimator_batches(run, 1)[0])
        turns.generator_turn(run, 1)
        both = [*run.estimator.named_parameters(), *run.generator.named_parameters()]
        gradients.append({name: p.grad for name, p in both if p.grad is not None})
    one, two = gradients
    assert one.keys() == two.keys() and len([name for name in one if "lora" in name]) >= 4 and len(one) >= 24
    for name in one:
        assert_close_and_not_zero(two[name], one[name], 1e-4, name)


def test_the_estimators_turn_trains_its_lora_and_the_generators_turn_the_generator(teacher, tmp_path):
    run = tiny_run(teacher, tmp_path)

    def changes(accelerator, turn) -> set[str]:
        both = [*run.generator.named_parameters("generator"), *run.estimator.named_parameters("estimator")]
        before = {name: p.detach().clone() for name, p in both}
        turn()
        loop.update(run, accelerator)
        return {name for name, p in both if not torch.equal(p, before[name])}

    one, two = run.session.generator_accelerator, run.session.estimator_accelerator
    of_estimator = changes(two, lambda: turns.estimator_turn(run, 0, turns.estimator_batches(run, 0)[0]))
    assert of_estimator and all(name.startswith("estimator") and "lora_" in name for name in of_estimator)
    of_generator = changes(one, lambda: turns.generator_turn(run, 0))
    assert len(of_generator) > 20 and all(name.startswith("generator") for name in of_generator)


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("at_once,calls", [(11, [8, 4]), (320, [12])])
def test_the_samples_of_several_estimator_turns_at_once_are_those_of_each_alone(
    teacher, tmp_path, monkeypatch, num_steps, at_once, calls
):
    monkeypatch.setattr(turns, "SAMPLES_AT_ONCE", at_once)
    more = ["--num-steps", num_steps, "--gradient-accumulation-steps", 2, "--ratio-update", 3]
    run, rows = tiny_run(teacher, tmp_path, *more), []
    hook = run.generator.register_forward_pre_hook(lambda network, args: rows.append(len(args[0])))
    of_turns = turns.estimator_batches(run, 3)
    hook.remove()
    assert rows == 2 * calls if num_steps == 1 else rows[1::2] == 2 * calls
    assert len(of_turns) == 3 and all(len(batches) == 2 for batches in of_turns)
    for turn, batches in enumerate(of_turns):
        for chunk, (left, y, x0) in enumerate(batches):
            draws = turns.chunk_draws(run, turns.ESTIMATOR_TURN, 3 * 3 + turn, chunk)
            assert torch.equal(y, turns.draw_labels(run, draws))
            with torch.no_grad():
                expected = turns.generate(run, draws, y)
            torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(left.noise(2), draws.noise(2)) and torch.equal(left.uniform(2), draws.uniform(2))


# A flag's other value, and what else is switched on in both runs for it to matter
CHANGES = {
    "--seed": (31, []),
    "--num-steps": (2, []),
    "--timestep-shift": (2.0, ["--num-steps", 2]),
    "--ratio-update": (3, []),
    "--lora-init-spread": (0.2, []),
    "--lora-scale-fake": (1.0, []),
    "--lora-scale-real": (0.5, []),
    "--dynamic-steps": (5, []),
    "--renoise-alpha": (2.0, []),
    "--renoise-beta": (1.0, []),
    "--real-guidance-scale": (1.5, []),
    "--real-guidance-interval": ("0.0 0.4", ["--real-guidance-scale", 1.5]),
    "--gradient-accumulation-steps": (2, []),
    "--learning-rate-generator": (2e-3, []),
    "--learning-rate-estimator": (2e-3, []),
    "--weight-decay-generator": (0.5, []),
    "--weight-decay-estimator": (0.5, []),
    "--adam-beta1": (0.5, []),
    "--adam-beta1-generator": (0.0, []),
    "--adam-beta1-estimator": (0.0, []),
    "--adam-beta2": (0.9, []),
    "--adam-epsilon": (1e-3, []),
    "--max-grad-norm": (0.02, []),
    "--ema-decay": (0.05, ["--ema-decay", 0.09]),
    "--reward-weight": (5.0, ["REWARD"]),
    "--encoder-type": ("none", ["REWARD"]),
}


@pytest.fixture(scope="module")
def outcome(teacher, tmp_path_factory, reward_folder):
    """The weights after two cycles in the middle of the dynamic phase, by flags; the same flags are run once."""
    reward = ["--encoder-type", "classifier", "--reward-classifier", reward_folder, "--reward-weight", 1.0]
    folder = tmp_path_factory.mktemp("outcome")

    @functools.cache
    def of(*more) -> dict[str, torch.Tensor]:
        words = [word for item in more for word in (reward if item == "REWARD" else [item])]
        run = tiny_run(teacher, folder, "--batch-size", 8, "--adam-epsilon", 1e-4, "--max-grad-norm", 0.05, *words)
        for step in (1, 2):
            loop.cycle(run, step)
        average = run.ema.values if run.ema is not None else {}
        return trained(run.generator) | trained(run.estimator) | {f"ema {n}": p for n, p in average.items()}

    return of


@pytest.mark.parametrize("flag", CHANGES)
def test_every_flag_of_the_method_changes_the_weights(outcome, flag):
    value, others = CHANGES[flag]
    plain, changed = outcome(*others), outcome(*others, flag, *str(value).split())
    assert plain.keys() == changed.keys()
    assert any((plain[name] - changed[name]).abs().max() > 1e-7 for name in plain)


def test_activation_checkpointing_changes_nothing(outcome):
    more = ["--num-steps", 2, "--real-guidance-scale", 1.5, "--gradient-accumulation-steps", 2]
    plain, recomputed = outcome(*more), outcome(*more, "--gradient-checkpointing")
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_a_lora_generator_trains_a_lora_of_twice_the_rank(teacher, tmp_path):
    run = tiny_run(teacher, tmp_path, "--use-lora-gen", "--lora-rank", 3)
    ranks = {name: p.shape[0] for name, p in run.generator.named_parameters() if "lora_A" in name}
    assert len(ranks) == 2 * 4 and set(ranks.values()) == {6}
    before = trained(run.generator)
    loop.cycle(run, 0)
    assert all("lora_" in name and not torch.equal(p, before[name]) for name, p in trained(run.generator).items())
