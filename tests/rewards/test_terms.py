"""Terms at x0: gradients through decoder and classifier, micro-batches, several rewards, tilts."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from evaluation.standins import write_dinov2, write_vae
from tests.conftest import assert_close_and_not_zero, build_run, reward_gradient, spread_lora_b
from train_cc import dmdr_refl
from train_cc.distillation import turns
from train_cc.draws import Draws
from train_cc.flow import interpolate
from train_cc.models import DINOv2Classifier
from train_cc.models.vae import load_decoder
from train_cc.objectives import dmd_direction, dmd_loss, velocity_matching_losses
from train_cc.rewards.terms import (
    GROWTH_INTERVAL,
    Reward,
    classifier_losses,
    effective_samples,
    rewards_at_x0,
    tilt_weights,
)
from train_cc.schedules import beta_times


@pytest.fixture(scope="module")
def latent_reward(tmp_path_factory):
    """(decoder, classifier, x0, y): a small VAE and a small DINOv2, both in the official layouts."""
    folder = tmp_path_factory.mktemp("reward")
    decode = load_decoder(str(write_vae(folder / "vae")))
    classifier = DINOv2Classifier.from_official(*write_dinov2(folder, width=64, depth=4, classes=10))
    x0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    return decode, classifier, x0, torch.arange(4)


def test_the_gradient_reaches_x0_through_decoder_and_classifier(latent_reward):
    decode, classifier, x0, y = latent_reward
    free = x0.clone().requires_grad_()
    loss = F.cross_entropy(classifier(decode(free)), y)
    (expected,) = torch.autograd.grad(loss, free)
    result = reward_gradient(classifier, decode, x0, y)
    assert (expected.abs().amax(dim=(1, 2, 3)) > 0).all()
    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(result.gradient, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    assert all(p.grad is None and not p.requires_grad for p in [*decode.parameters(), *classifier.parameters()])


def test_micro_batches_and_checkpointing_give_the_same_gradient(latent_reward):
    decode, classifier, x0, y = latent_reward
    # In float64, where what is left is a difference of method and not the rounding of other matrix sizes.
    decode, classifier, x0 = copy.deepcopy(decode).double(), copy.deepcopy(classifier).double(), x0.double()
    whole = reward_gradient(classifier, decode, x0, y)
    tolerance = 1e-6 * whole.gradient.abs().max().item()
    for micro_batch in (1, 2, 3):
        parts = reward_gradient(classifier, decode, x0, y, micro_batch)
        torch.testing.assert_close(parts.gradient, whole.gradient, rtol=1e-6, atol=tolerance)
        torch.testing.assert_close(parts.loss, whole.loss)
    decode.enable_gradient_checkpointing()
    classifier.enable_gradient_checkpointing()
    recomputed = reward_gradient(classifier, decode, x0, y, 2)
    torch.testing.assert_close(recomputed.gradient, whole.gradient, rtol=1e-6, atol=tolerance)


def test_loss_and_hits_of_a_classifier_a_sample():
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0], [0.0, 5.0, 1.0]])
    losses, figures = classifier_losses(torch.nn.Identity(), logits, torch.tensor([0, 1, 2]))
    assert figures["accuracy"].tolist() == [0, 1, 0]
    total = sum(math.exp(value) for value in (0, 5, 1))
    assert losses.tolist() == pytest.approx([math.log(total) - value for value in (0, 5, 1)], rel=1e-5)


def test_the_generators_gradient_is_that_of_both_losses_on_one_graph(teacher, tmp_path, reward_folder, monkeypatch):
    """With B spread, so that matching pulls; at a weight at which neither gradient hides the other."""
    more = ["--encoder-type", "classifier", "--reward-classifier", reward_folder, "--reward-weight", 4.0]
    run = build_run(teacher, tmp_path / "run", *more, stage=dmdr_refl)
    spread_lora_b(run.estimator)
    kept, direction = {}, turns.dmd_direction

    def direction_of(*tensors):
        kept["direction"] = direction(*tensors)
        return kept["direction"]

    monkeypatch.setattr(turns, "dmd_direction", direction_of)
    figures = turns.generator_turn(run, 0)
    kept |= {name: p.grad.clone() for name, p in run.generator.named_parameters() if p.grad is not None}

    draws = turns.chunk_draws(run, turns.GENERATOR_TURN, 0, 0)
    y = turns.draw_labels(run, draws)
    run.generator.zero_grad()
    x0 = turns.generate(run, draws, y)
    loss_reward = F.cross_entropy(run.judges["reward_classifier"](run.decode(x0)), y)
    loss_dmd = dmd_loss(x0, kept.pop("direction"))
    (loss_dmd + 4.0 * loss_reward).backward(retain_graph=True)
    torch.testing.assert_close(figures["loss_reward_classifier"], loss_reward.detach())
    expected = {name: p.grad for name, p in run.generator.named_parameters()}
    assert kept.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close_and_not_zero(kept[name], gradient, 1e-4, name)

    of_dmd, of_reward = (torch.autograd.grad(each, x0, retain_graph=True)[0] for each in (loss_dmd, 4.0 * loss_reward))
    assert 0.1 < of_reward.norm() / of_dmd.norm() < 10
    torch.testing.assert_close(figures["grad_norm_dmd_x0"], of_dmd.norm(), rtol=1e-4, atol=0)
    torch.testing.assert_close(figures["grad_norm_reward_classifier_x0"], of_reward.norm(), rtol=1e-4, atol=0)
    cosine = torch.cosine_similarity(of_dmd.flatten(), of_reward.flatten(), dim=0)
    torch.testing.assert_close(figures["grad_cosine_reward_classifier_x0"], cosine, rtol=1e-3, atol=1e-5)
    hits = run.judges["reward_classifier"](run.decode(x0)).argmax(dim=1) == y
    assert figures["accuracy_reward_classifier"] == hits.float().mean()


def test_several_rewards_share_one_decode_and_add_up():
    decoded, x0, y = [], torch.randn(5, 1, 4, 4), torch.zeros(5, dtype=torch.long)

    def decode(x):
        decoded.append(len(x))
        return x.tanh()

    rewards = [
        Reward("mean", 1.0, lambda images, y: (images.mean(dim=(1, 2, 3)), {})),
        Reward("square", 1.0, lambda images, y: (images.square().sum(dim=(1, 2, 3)), {})),
    ]
    first, second = rewards_at_x0(rewards, decode, x0, y, micro_batch=2)
    assert decoded == [2, 2, 1]
    free = x0.clone().requires_grad_()
    for term, loss in ((first, free.tanh().mean(dim=(1, 2, 3))), (second, free.tanh().square().sum(dim=(1, 2, 3)))):
        (expected,) = torch.autograd.grad(loss.mean(), free)
        assert expected.norm() > 0
        torch.testing.assert_close(term.gradient, expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(term.losses, loss.detach(), rtol=1e-5, atol=1e-6)


def test_tilt_weights():
    r = torch.tensor([0.0, 1.0, 2.0, 50.0])
    w = tilt_weights(r, 0.5, clip=1e9)
    assert w.mean().item() == pytest.approx(1)
    assert (w[0] / w[1]).item() == pytest.approx(math.exp(0.5)) and (w[1] / w[2]).item() == pytest.approx(math.exp(0.5))
    assert tilt_weights(torch.cat([torch.zeros(1), torch.full((99,), 50.0)]), 1.0).max() == 10
    assert effective_samples(torch.ones(8)) == 8 and effective_samples(torch.tensor([1.0, 0, 0])) == 1


def test_a_tilt_weighs_each_samples_loss(teacher, tmp_path, ink):
    """The estimator's gradient is that of the mean of w_i l_i, over both accumulated batches."""
    run = build_run(teacher, tmp_path / "run", "--tilt", 2, "python", ink, "--gradient-accumulation-steps", 2)
    spread_lora_b(run.estimator)
    batches = turns.estimator_batches(run, 0)[0]
    weights, _ = turns.tilt_batches(run, batches)
    rewards = torch.cat([((run.decode(x0) * 255).round() > 127).float().mean(dim=(1, 2, 3)) for _, _, x0 in batches])
    expected = torch.exp(-2 * (rewards - rewards.mean()))
    torch.testing.assert_close(torch.cat(weights), expected / expected.mean(), rtol=1e-5, atol=1e-6)
    assert len(weights) == 2 and torch.cat(weights).std() > 0
    turns.estimator_turn(run, 0, batches)
    gradients = {name: p.grad.clone() for name, p in run.estimator.named_parameters() if p.grad is not None}
    assert gradients and all(gradient.norm() > 0 for gradient in gradients.values())
    run.estimator.zero_grad()
    for draws, (own, (_, y, x0)) in enumerate(zip(weights, batches, strict=True)):
        fresh = turns.chunk_draws(run, turns.ESTIMATOR_TURN, 0, draws)
        fresh.integers(run.num_classes, len(y)), fresh.noise(len(y), *run.sample_shape), fresh.integers(1, len(y))
        x_t, noise, _, t = turns.renoise(run, fresh, x0, 1.0)
        v = run.estimator(x_t, t, y, lora_scale=run.method.lora_scale_fake)
        ((velocity_matching_losses(v, x0, noise) * own).mean() / 2).backward()
    for name, p in run.estimator.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-7)


def two_modes(share: torch.Tensor, spread: float = 0.2):
    """The velocity of (1 - share) N(-1, spread^2) + share N(1, spread^2), in closed form."""

    def velocity(x, t):
        t = t.float().view(-1, 1, 1, 1)
        keep, variance = 1 - t, ((1 - t) * spread) ** 2 + t**2
        of_mode = [(-1.0, torch.log(1 - share)), (1.0, torch.log(share))]
        which = torch.stack([log - (x - keep * mode) ** 2 / (2 * variance) for mode, log in of_mode]).softmax(dim=0)
        shrink = keep * spread**2 / variance
        x0 = sum(part * (mode + shrink * (x - keep * mode)) for part, (mode, _) in zip(which, of_mode, strict=True))
        return (x - x0) / t

    return velocity


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_tilts_fixed_point_is_the_tilted_teacher(beta):
    """Two modes, reward 1 at the right one: its share becomes that of p_teacher exp(beta r) / Z, within 5 %.

    The fake score learns its share by the weighted loss; the generator, a threshold on its noise, by matching.
    """
    teacher, steps = torch.tensor(0.3), 300
    threshold, logit = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    optimizers = [torch.optim.Adam([threshold], lr=0.05), torch.optim.Adam([logit], lr=0.1)]
    decays = [torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, steps) for optimizer in optimizers]

    def sample(draws):
        z = draws.noise(1024, 1, 1, 2)
        return torch.tanh(30 * (z[..., :1] - threshold)) + 0.2 * z[..., 1:]

    for step in range(steps):
        for turn in range(2):
            draws = Draws(3, step, turn)
            x0 = sample(draws).detach()
            t, noise = beta_times(draws.uniform(len(x0)), 1, 1), draws.noise_like(x0)
            weights = tilt_weights((x0.flatten() > 0).float(), beta)
            optimizers[1].zero_grad()
            v = two_modes(logit.sigmoid())(interpolate(x0, noise, t), t)
            (velocity_matching_losses(v, x0, noise) * weights).mean().backward()
            optimizers[1].step()
        draws = Draws(3, step, 2)
        x0 = sample(draws)
        t, noise = beta_times(draws.uniform(len(x0)), 1, 1), draws.noise_like(x0)
        x_t = interpolate(x0.detach(), noise, t)
        v_real, v_fake = two_modes(teacher)(x_t, t), two_modes(logit.detach().sigmoid())(x_t, t)
        optimizers[0].zero_grad()
        dmd_loss(x0, dmd_direction(v_real, v_fake, x0, noise)).backward()
        optimizers[0].step()
        for decay in decays:
            decay.step()
    share = 1 - torch.special.ndtr(threshold.detach()).item()
    assert share == pytest.approx(0.3 * math.exp(beta) / (0.3 * math.exp(beta) + 0.7), rel=0.05)


def test_a_lowered_scale_grows_again_and_never_beyond_its_start():
    reward = Reward("r", 1.0, None)
    reward.adapt_scale(True)
    for turn in range(3 * GROWTH_INTERVAL):
        assert reward.backoff == (0.5 if turn < GROWTH_INTERVAL else 1)
        reward.adapt_scale(False)
