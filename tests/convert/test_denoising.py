"""What a network predicts is told from its own samples: small ones of every kind are trained and converted."""

import math
from functools import cache

import pytest
import torch

from convert_weight import denoising, sit_convert
from tests.conftest import refused
from train_cc.io.errors import InputError
from train_cc.models import SiT, load_network

CONFIG = {"input_size": 4, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 4}


def data(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two kinds of 4 x 4 pictures per class, with little noise."""
    means = torch.randn(4, 2, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    y = torch.randint(4, (count,))
    return means[y, torch.randint(2, (count,))] + 0.2 * torch.randn(count, 1, 4, 4), y


def path(kind: str, count: int) -> tuple[torch.Tensor, ...]:
    """x_t = alpha x0 + sigma noise, the network's time, target = of_x0 x0 + of_noise noise, at random times."""
    predicts, schedule, *more = kind.split()
    u = torch.rand(count)
    if schedule == "straight":
        alpha, sigma, time = 1 - u, u, u
    elif schedule == "cosine":
        alpha, sigma, time = (u * math.pi / 2).cos(), (u * math.pi / 2).sin(), u
    else:
        index = torch.randint(1000, (count,))
        if schedule == "ddpm-linear":
            clean = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
        else:
            at = torch.arange(1001).double() / 1000
            bar = ((at + 0.008) / 1.008 * math.pi / 2).cos().square()
            clean = (1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumprod(0).float()
        alpha, sigma, time = clean[index].sqrt(), (1 - clean[index]).sqrt(), index.float()
    zero, one = torch.zeros(count), torch.ones(count)
    targets = {"eps": (zero, one), "x0": (one, zero), "v": (-sigma, alpha)}
    targets["velocity"] = (-one, one) if schedule == "straight" else (-math.pi / 2 * sigma, math.pi / 2 * alpha)
    of_x0, of_noise = targets[predicts]
    if "reversed" in more:
        time = 1 - time
        if predicts == "velocity":
            of_x0, of_noise = -of_x0, -of_noise
    return alpha, sigma, time, of_x0, of_noise


@cache
def trained(kind: str, seed: int, steps: int = 300, batch: int = 128) -> SiT:
    torch.manual_seed(seed)
    model = SiT(**CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        x0, y = data(batch)
        alpha, sigma, time, of_x0, of_noise = (each.view(-1, 1, 1, 1) for each in path(kind, batch))
        noise = torch.randn_like(x0)
        y = torch.where(torch.rand(batch) < 0.1, 4, y)
        out = model(alpha * x0 + sigma * noise, time.flatten(), y)
        optimizer.zero_grad()
        (out - of_x0 * x0 - of_noise * noise).square().mean().backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def two_sets(state: dict) -> dict:
    """As with learnt variance: the output's channels once more, as a DiT's or the SiT authors' files have them."""
    out = dict(state)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        value = state[name].unflatten(0, (4, 1))
        out[name] = torch.cat([value, torch.randn_like(value)], dim=1).flatten(0, 1)
    return out


def convert(state, folder, *more):
    torch.save(state, folder / "in.pt")
    words = ["--input", folder / "in.pt", "--save-dir", folder / "out", "--name", "m", "--num-heads", 2, *more]
    sit_convert.main([str(word) for word in words])
    return load_network(folder / "out" / "m")


CASES = [(f"velocity straight{more}", seed) for more in ("", " reversed") for seed in (0,)]
REFUSED = [(f"eps {schedule}", seed, "predicts eps") for schedule in ("ddpm-linear", "ddpm-cosine") for seed in (0,)]
REFUSED += [(f"eps straight{more}", 0, "predicts eps") for more in ("", " reversed")]
REFUSED += [
    ("v ddpm-linear", 0, "predicts v"),
    ("v ddpm-cosine", 0, "predicts v"),
    ("x0 ddpm-cosine", 0, "predicts x0"),
]
REFUSED += [(f"velocity cosine{more}", 0, "on a cosine path") for more in ("", " reversed")]


@pytest.mark.parametrize("kind,seed", CASES)
def test_a_flow_model_converts_in_its_direction_of_time_alone(tmp_path, capsys, kind, seed):
    model = trained(kind, seed)
    right, wrong = ("data-at-1", "data-at-0") if "reversed" in kind else ("data-at-0", "data-at-1")
    message = refused(convert, model.state_dict(), tmp_path, "--time-direction", wrong, "--check", capsys=capsys)
    assert f"--time-direction {right}" in message and not (tmp_path / "out").exists()
    found = convert(two_sets(model.state_dict()), tmp_path, "--time-direction", right, "--check")
    x, t, y = torch.randn(3, 1, 4, 4), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 3, 4])
    expected = -model(x, 1 - t, y) if "reversed" in kind else model(x, t, y)
    torch.testing.assert_close(found(x, t, y), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind,seed,words", REFUSED)
def test_what_is_no_flow_model_is_refused_by_its_kind(tmp_path, capsys, kind, seed, words):
    state = trained(kind, seed).state_dict()
    for each, more in ((state, ()), (two_sets(state), ())):
        assert words in refused(convert, each, tmp_path, *more, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_a_dit_is_converted_if_it_predicts_noise_at_ddpms_steps(tmp_path, capsys):
    """The authors' file: eps with a learnt variance, which is dropped; nothing in it says what it predicts."""
    model = trained("eps ddpm-linear", 0)
    found = convert(two_sets(model.state_dict()), tmp_path, "--network", "DiT")
    x, t, y = torch.randn(3, 1, 4, 4), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 3, 4])
    clean = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    angle = torch.atan2((1 - clean).sqrt(), clean.sqrt())
    step = torch.tensor([float(torch.searchsorted(angle, a.double())) for a in torch.atan2(t, 1 - t)])
    norm = (t**2 + (1 - t) ** 2).sqrt().view(-1, 1, 1, 1)
    eps, t = model(x / norm, step, y), t.view(-1, 1, 1, 1)
    expected = (eps - x) / (1 - t)  # x0 = (x - t eps) / (1 - t)
    assert (found(x, t.flatten(), y) - expected).square().mean() < 1e-3 * expected.square().mean()  # a step is rounded
    for kind in ("velocity straight", "v ddpm-linear"):
        state = trained(kind, 0).state_dict()
        message = refused(convert, state, tmp_path, "--network", "DiT", "--name", "other", capsys=capsys)
        assert "this is no DiT that predicts eps" in message and not (tmp_path / "out" / "other").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_do_not_pass_the_check(value):
    class Broken:
        sample_shape, null_class = (1, 8, 8), 10

        def __call__(self, x, t, y):
            return torch.full_like(x, value)

    with pytest.raises(InputError, match="not finite"):
        denoising.require_denoising(Broken())
