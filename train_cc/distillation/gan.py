"""DMD2's GAN (arXiv 2405.14867, section 4.3): a head on the fake score's features tells real data from samples.

Both are renoised as for matching. The features are those of the middle block: the head learns beside the fake score,
whose weights its loss reaches too, and the generator gets a term of its own at x0 (non-saturating, without R1).
"""

from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.nn.functional import layer_norm, softplus

from train_cc.distillation.run import LoraScores, Run
from train_cc.distillation.turns import renoise
from train_cc.draws import Draws
from train_cc.images import batches_of, open_images
from train_cc.io.errors import InputError
from train_cc.models.vae import encode_images, load_vae, require_latent_space
from train_cc.rewards.terms import GRADIENT_SCALE, Term
from train_cc.run.diagnostics import finite

HEAD_WEIGHT = 0.01  # of the head's loss beside the fake score's, DMD2's; Adam makes the head itself blind to it


class Head(nn.Module):
    """Features (B, N, D) -> logits (B,), positive for real data."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pool = AttentionPoolLatent(width, num_heads=8 if width % 8 == 0 else 1)
            self.logit = nn.Linear(width, 1)
        self.blocks = nn.ModuleList([pool])  # a unit of its own where weights are sharded

    def forward(self, features: Tensor) -> Tensor:
        return self.logit(self.blocks[0](layer_norm(features, features.shape[-1:])).clone()).float().mean(dim=1)


def real_data(run: Run, source: str, vae: str) -> tuple[Tensor, Tensor]:
    """--gan-data as the networks see it, on the CPU: x0 (N, C, H, W), encoded once where there is a VAE, labels (N,).

    Raises `InputError` for images that do not fit the teacher or the VAE.
    """
    images, encode = open_images(source, None, 3), lambda part: part.float() / 127.5 - 1
    if images.labels is None or images.num_classes > run.num_classes:
        raise InputError(f"--gan-data {source}: labels 0 to {run.num_classes - 1} are expected, one an image")
    if vae != "none":
        encoder = load_vae(vae)
        require_latent_space(run.latent_space, encoder, vae)
        encode = partial(encode_images, encoder)
    chunks = [chunk.tolist() for chunk in torch.arange(len(images)).split(250)]
    x0 = torch.cat([encode(part) for part in batches_of(images, chunks, workers=0)])
    if x0.shape[1:] != run.sample_shape:
        raise InputError(f"--gan-data {source} gives {tuple(x0.shape[1:])}, the teacher takes {run.sample_shape}")
    return x0, images.labels.long()


def build_gan(run: Run, source: str | None, vae: str, read: bool) -> tuple["Gan", Head]:
    """The terms, and the head on the width of the features. ``read``: off in a dry run. Raises `InputError`."""
    if not run.method.gan_weight or not source:
        raise InputError("--gan-weight and --gan-data are given together, or neither")
    blocks = run.plain_estimator.network.blocks
    blocks[len(blocks) // 2]._compiled_call_impl = None  # a compiled block would not call the hook of `middle`
    one = torch.zeros(1, *run.sample_shape, device=run.session.device)
    with torch.no_grad():
        width = middle(run.scores, run, one, one.new_zeros(1), one.new_zeros(1, dtype=torch.long)).shape[-1]
    data = real_data(run, source, vae) if read else (one.cpu(), torch.zeros(1, dtype=torch.long))
    return Gan(*data, run.method.gan_weight), Head(width, run.optimisation.seed)


@dataclass(frozen=True)
class Gan:
    """The two terms of the turns. ``weight``: of the generator's."""

    real: Tensor
    labels: Tensor
    weight: float

    def tell_apart(self, run: Run, draws: Draws, x0: Tensor, y: Tensor, c: float, weights: Tensor | None) -> Term:
        """The head's loss on real data and on samples: mean softplus(-D(real)) + mean softplus(D(sample))."""
        index = draws.integers(len(self.real), len(x0))
        real, of_real = (each[index].to(x0.device, non_blocking=True) for each in (self.real, self.labels))
        x_t, _, _, t = renoise(run, draws, torch.cat([real, x0.float()]), c)
        features = middle(run.scores, run, x_t, t, torch.cat([of_real, y]))
        on_real, on_samples = run.learners["gan"].network(features).chunk(2)
        loss = softplus(-on_real).mean() + softplus(on_samples).mean()
        right = ((on_real > 0).float().mean() + (on_samples < 0).float().mean()) / 2
        return Term(HEAD_WEIGHT * loss, None, {"loss_gan_head": loss.detach(), "accuracy_gan_head": right})

    def fool(self, run: Run, draws: Draws, x0: Tensor, y: Tensor, c: float, before: list[Term]) -> list[Term]:
        """The generator's term at x0: mean softplus(-D(sample)), its gradient through head and fake score."""
        x = x0.detach().float().requires_grad_()
        x_t, _, _, t = renoise(run, draws, x, c)
        # Not as they are replicated: their own gradients are not taken here.
        scores = run.roles(run.plain_estimator, run.method, run.num_classes)
        loss = softplus(-run.learners["gan"].plain(middle(scores, run, x_t, t, y))).mean()
        scale = GRADIENT_SCALE if run.scaled else 1.0
        (gradient,) = torch.autograd.grad(loss * scale, x)
        overflow = ~finite(gradient) if run.scaled else None
        return [Term(loss.detach(), self.weight / scale * gradient, {"loss_gan": loss.detach()}, "gan", overflow)]


def middle(scores: LoraScores, run: Run, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The features of the fake score's middle block, (B, N, D), as the estimator's output: FSDP2 begins there."""
    blocks, outputs = run.plain_estimator.network.blocks, []
    hooks = [blocks[len(blocks) // 2].register_forward_hook(lambda block, inputs, out: outputs.append(out))]
    hooks.append(run.plain_estimator.register_forward_hook(lambda estimator, inputs, out: outputs[0], prepend=True))
    try:
        return scores.fake(x_t, t, y)
    finally:
        for hook in hooks:
            hook.remove()
