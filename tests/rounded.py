"""Half precision on a CPU that is slow in it: each result is rounded as a GPU would round it.

    python -m tests.rounded fp16 --teacher runs/digits/teacher --vae none --mixed-precision no [flags of the cold start]
    python -m tests.rounded fp16 evaluation.generate [its flags: the images are decoded in fp16]

What the networks compute, weights, results and gradients, is rounded to half precision, and sums within an operation
stay in fp32, as in tensor cores. Scores are rounded to fp16, under bf16 too (docs/benchmarks.md: precision by role).
fp16 trains with a loss scale. Masters, moments, losses and the direction stay in fp32.
"""

import functools
import sys
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from evaluation import generate
from train_cc import cold_start
from train_cc.models.backbone import SiT
from train_cc.models.estimator import ScoreEstimator
from train_cc.models.networks import sit as network
from train_cc.models.vae import LatentSpace, VAEDecoder, pixels_to_images
from train_cc.run import session as sessions
from train_cc.setup import stage

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PRODUCTS = (F.linear, F.conv2d, torch.addmm, Tensor.addmm)  # their weights are cast


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype).to(gradient.dtype), None


class Rounding(TorchFunctionMode):
    """Every fp32 result of a function is rounded to ``dtype``, and so is its gradient."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def rounded(self, x: object) -> object:
        return Rounded.apply(x, self.dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            args = [self.rounded(x) for x in args]
        return self.rounded(func(*args, **kwargs or {}))


def rounds(dtype: torch.dtype) -> tuple[mock._patch, ...]:
    """Both networks round, but for the embedding of t, which is in fp32."""
    plain, embedding, read = SiT.forward, network.sinusoidal_embedding, ScoreEstimator.forward
    now = [dtype]

    @functools.wraps(plain)
    def forward(self, *inputs):
        with Rounding(now[0]):
            return plain(self, *inputs)

    def embedded(t, **options):
        with torch._C.DisableTorchFunction():
            return embedding(t, **options)

    def scoring(self, *inputs, **options):
        now[0] = dtype if torch.is_grad_enabled() else torch.float16
        try:
            return read(self, *inputs, **options)
        finally:
            now[0] = dtype

    return (
        mock.patch.object(SiT, "forward", forward),
        mock.patch.object(network, "sinusoidal_embedding", embedded),
        mock.patch.object(ScoreEstimator, "forward", scoring),
    )


def decodes(dtype: torch.dtype) -> mock._patch:
    """The decoder of latents rounds, weights too: as `evaluation.samples.sampling` has it in half precision."""

    def forward(self, x0):
        with Rounding(dtype):
            pixels = self.vae.decode(LatentSpace.of(self.vae.config).unscaled(x0)).sample
        return pixels_to_images(pixels)

    return mock.patch.object(VAEDecoder, "forward", forward)


def scaled(*given, opened=sessions.open_session, **options) -> sessions.Session:
    """A session whose accelerators scale their losses: accelerate allows it on a GPU alone."""
    session = opened(*given, **options)
    for accelerator in (session.generator_accelerator, session.estimator_accelerator):
        accelerator.scaler = torch.amp.GradScaler("cpu")
        accelerator.unscale_gradients = functools.partial(unscale, accelerator)
    return session


def unscale(accelerator, optimizer=None) -> None:
    for each in accelerator._optimizers:
        accelerator.scaler.unscale_(each.optimizer)


if __name__ == "__main__":
    precision = sys.argv.pop(1)
    if sys.argv[1:2] == ["evaluation.generate"]:
        del sys.argv[1]
        decodes(DTYPES[precision]).start()
        generate.main()
    else:
        for patch in rounds(DTYPES[precision]):
            patch.start()
        if precision == "fp16":
            mock.patch.object(stage, "open_session", scaled).start()
        cold_start.main()
