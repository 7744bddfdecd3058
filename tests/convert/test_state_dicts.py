"""DiT and LightningDiT as published: against diffusers' own class, and against the structure written out."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from torch.nn import functional as F

from convert_weight import sit_convert
from convert_weight.state_dicts import convert
from tests.conftest import refused, words
from train_cc.io.errors import InputError
from train_cc.models import load_network
from train_cc.models.networks import sit

SIDE, CHANNELS, CLASSES, WIDTH, HEADS = 8, 4, 10, 48, 2


def spread(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


@pytest.fixture(scope="module")
def published():
    """A small DiT of diffusers with a learnt variance; its blocks share their embedders, as its authors' files do."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=2,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    spread(model)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    published.save_pretrained(folder / "transformer")
    sit_convert.main(words("--input", folder, "--save-dir", folder / "out", "--name", "dit", "--no-check"))
    return load_network(folder / "out" / "dit")


@pytest.mark.parametrize("step", [0, 1, 100, 300, 500, 700, 900, 999])
def test_a_dit_of_diffusers_is_read_at_eight_noise_levels(published, converted, step):
    """v = eps - x0 of the published network, and DDPMScheduler's noised samples put on the straight path."""
    scheduler = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    generator = torch.Generator().manual_seed(step)
    x0, noise = (torch.randn(3, CHANNELS, SIDE, SIDE, generator=generator) for _ in range(2))
    y = torch.tensor([0, 7, CLASSES])
    noised = scheduler.add_noise(x0, noise, torch.tensor([step] * 3))
    a, s = scheduler.alphas_cumprod[step].double().sqrt(), (1 - scheduler.alphas_cumprod[step].double()).sqrt()
    with torch.no_grad():
        eps = published(noised, torch.tensor([step] * 3), y).sample[:, :CHANNELS]
        own = sit.SiT.forward(converted, noised, torch.tensor([step] * 3), y)
        t = (s / (a + s)).float().expand(3)
        v = converted((noised.double() / (a + s)).float(), t, y)
    assert (own - eps).abs().max() < 1e-5 * eps.abs().max()
    expected = eps - (noised - s.float() * eps) / a.float()
    assert (v - expected).abs().max() < 1e-4 * expected.abs().max()
    x_t = noised / (a + s).float()
    assert (x_t - t[0] * v - (noised - s.float() * eps) / a.float()).abs().max() < 1e-4 * expected.abs().max()


def test_one_step_from_noise_is_that_of_the_last_step(published, converted):
    noise, y = torch.randn(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    clean = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).prod()
    with torch.no_grad():
        eps = published(noise, torch.tensor([999, 999]), y).sample[:, :CHANNELS].double()
        x0 = noise - converted(noise, torch.ones(2), y)
    expected = (noise - (1 - clean).sqrt() * eps) / clean.sqrt()
    torch.testing.assert_close(x0.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_the_loss_of_an_eps_network_is_that_of_its_eps(converted):
    t = torch.tensor([0.0, 0.3, 0.9, 0.99])
    torch.testing.assert_close(converted.loss_weight(t), (1 - t) ** 2, rtol=1e-4, atol=0)
    assert converted.loss_weight(torch.ones(1)).item() < 1e-4


def test_blocks_with_embedders_of_their_own_are_refused(published, tmp_path, capsys):
    state = published.state_dict()
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    published.save_pretrained(tmp_path / "transformer")
    torch.save(state | {name: state[name] + 1}, tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    message = refused(sit_convert.main, words("--input", tmp_path, "--save-dir", tmp_path / "out"), capsys=capsys)
    assert "differs from another block's" in message and not (tmp_path / "out").exists()


def rotated(x: torch.Tensor, side: int) -> torch.Tensor:
    """EVA-02's rotary positions of x (B, heads, side^2, D): pairs of columns, rows first."""
    half = x.shape[-1] // 2
    angles = torch.arange(side)[:, None] * 10000 ** (-torch.arange(0, half, 2) / half)
    angles = angles.repeat_interleave(2, dim=1)
    table = torch.cat([angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)], -1).flatten(0, 1)
    pairs = x.unflatten(-1, (-1, 2))
    return x * table.cos() + torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2) * table.sin()


def lightning(state: dict, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """LightningDiT's forward, from its published description: data at t = 1, v = data - noise."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, shift, scale):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * state[f"{name}.weight"]
        return x * (1 + scale[:, None]) + shift[:, None]

    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=2).flatten(2).transpose(1, 2)
    h = h + state["pos_embed"]
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][y])
    for block in ("blocks.0", "blocks.1"):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(f"{block}.adaLN_modulation.1", c).chunk(6, 1)
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", h, shift_a, scale_a))
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotated(q, SIDE // 2), rotated(k, SIDE // 2)
        attended = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        h = h + gate_a[:, None] * linear(f"{block}.attn.proj", attended.transpose(1, 2).flatten(2))
        gate, value = linear(f"{block}.mlp.w12", norm(f"{block}.norm2", h, shift_m, scale_m)).chunk(2, -1)
        h = h + gate_m[:, None] * linear(f"{block}.mlp.w3", F.silu(gate) * value)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    out = linear("final_layer.linear", norm("final_layer.norm_final", h, shift, scale))
    side = SIDE // 2
    return out.view(len(x), side, side, 2, 2, CHANNELS).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def lightning_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inner = int(2 / 3 * WIDTH * 4)
    shapes = {"pos_embed": (1, 16, WIDTH), "x_embedder.proj": (WIDTH, CHANNELS, 2, 2), "t_embedder.mlp.0": (WIDTH, 256)}
    shapes |= {"t_embedder.mlp.2": (WIDTH, WIDTH), "final_layer.linear": (4 * CHANNELS, WIDTH)}
    shapes |= {"final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH), "final_layer.norm_final.weight": (WIDTH,)}
    shapes |= {"y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH), "feat_rope.freqs_cos": (16, WIDTH // HEADS)}
    for block in ("blocks.0", "blocks.1"):
        shapes |= {f"{block}.norm1.weight": (WIDTH,), f"{block}.norm2.weight": (WIDTH,)}
        shapes |= {f"{block}.attn.qkv": (3 * WIDTH, WIDTH), f"{block}.attn.proj": (WIDTH, WIDTH)}
        shapes |= {f"{block}.mlp.w12": (2 * inner, WIDTH), f"{block}.mlp.w3": (WIDTH, inner)}
        shapes |= {f"{block}.adaLN_modulation.1": (6 * WIDTH, WIDTH)}
    state = {}
    for name, shape in shapes.items():
        plain = name.endswith(".weight") or name in ("pos_embed", "feat_rope.freqs_cos")
        state[name if plain else f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.2
        if not plain:
            state[f"{name}.bias"] = torch.randn(shape[:1], generator=generator) * 0.2
    return state


def test_a_lightning_dit_is_the_published_structure_with_time_reversed():
    state = lightning_state()
    network, notes = convert({"ema": {f"module.{name}": value for name, value in state.items()}}, num_heads=HEADS)
    x, t = (
        torch.randn(3, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(4)),
        torch.tensor([0.1, 0.5, 0.9]),
    )
    y = torch.tensor([0, 4, CLASSES])
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, y), -lightning(state, x, 1 - t, y), rtol=1e-5, atol=1e-5)
    assert type(network).__name__ == "LightningDiT" and "data at time 1" in " ".join(notes)


def test_a_lightning_dit_with_qk_norm_is_refused():
    state = lightning_state() | {"blocks.0.attn.q_norm.weight": torch.ones(WIDTH // HEADS)}
    with pytest.raises(InputError, match="qk-norm, which is not supported"):
        convert(state, num_heads=HEADS)
