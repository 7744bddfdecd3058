"""Stage 0 of the latent recipe: a small diffusers `AutoencoderKL`, f = 4, 4 latent channels.

`python -m train_cc.pretrain.vae --output-dir runs/fashion/vae_first` trains all of it. Then the decoder alone, so that
the latents, and a teacher of them, stay:
`python -m train_cc.pretrain.vae --decoder-of runs/fashion/vae_first --classifier runs/fashion/classifier_reward
--output-dir runs/fashion/vae`
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.flags import DECAY, Parser, integer, number, path
from train_cc.io.products import product, record
from train_cc.io.read import require_folder
from train_cc.pretrain.data import DATASETS, add_data_arguments, add_training_arguments, load_dataset

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

    from train_cc.pretrain.resumable import Training

MEASURED_ON = 10_000  # images: the latents' spread
JUDGED_ON = 1_000  # test images: the PSNR
CLIP = 1.0  # of the gradients' norm: the first steps of a decoder are rough


def kl_divergence(mean: "Tensor", std: "Tensor") -> "Tensor":
    """KL(N(mean, std^2) || N(0, 1)), the mean over all numbers of the latents. 0-d."""
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()


def vae_training(vae: "AutoencoderKL", images: "Tensor", args: argparse.Namespace) -> "Training":
    """L1 + ``kl_weight`` KL; with ``decoder_of`` the decoder alone, L1 + ``feature_weight`` times the squared distance
    of a classifier's features, relative to their variance."""
    import torch
    from torch.nn import functional as F
    from torch.optim.swa_utils import AveragedModel

    from train_cc.draws import Draws
    from train_cc.models.classifier import ImageClassifier
    from train_cc.models.vae import pixels_to_images
    from train_cc.pretrain.resumable import DECODER, VAE, Training, warmed_cosine
    from train_cc.run.ema import warmed_up_average

    device, first_key = vae.device, VAE if args.decoder_of is None else DECODER
    half = torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16")
    judge, spread = None, None
    if args.decoder_of is not None:
        vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)
        if vae.post_quant_conv is not None:
            vae.post_quant_conv.requires_grad_(True)
        judge = ImageClassifier.from_pretrained(args.classifier).to(device)
        if judge.in_channels != images.shape[1]:
            told = f"takes {judge.in_channels} channel(s), the images have {images.shape[1]}"
            raise InputError(f"--classifier {args.classifier} {told}: give one of the same data set")
        with torch.no_grad():
            spread = judge.features_and_logits(images[:512].to(device).float() / 255)[0].var(0).mean()

    def batch(step: int) -> "tuple[Draws, Tensor]":
        draws = Draws(args.seed, first_key, step, device=device)
        rows = draws.integers(len(images), args.batch_size)
        x = images[rows].to(device).float() / 127.5 - 1
        return draws, x.contiguous(memory_format=torch.channels_last)

    def update_all(step: int) -> "Tensor":
        draws, x = batch(step)
        with half:
            posterior = vae.encode(x).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            reconstruction = vae.decode(mean + std * draws.noise_like(mean)).sample.float()
        return F.l1_loss(reconstruction, x) + args.kl_weight * kl_divergence(mean, std)

    def update_decoder(step: int) -> "Tensor":
        draws, x = batch(step)
        with half, torch.no_grad():
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * draws.noise_like(posterior.mean)
            features = judge.features_and_logits(pixels_to_images(x))[0].float()
        with half:
            reconstruction = vae.decode(z).sample.float()
            found = judge.features_and_logits(pixels_to_images(reconstruction))[0].float()
        distance = (found - features).square().mean() / spread
        return F.l1_loss(reconstruction, x) + args.feature_weight * distance

    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = AveragedModel(vae, multi_avg_fn=warmed_up_average(args.ema_decay))
    update = update_all if judge is None else update_decoder
    return Training(vae, optimizer, update, average, warmed_cosine(50), max_grad_norm=CLIP)


def psnr(vae: "AutoencoderKL", images: "Tensor") -> float:
    """dB, the mean over images of what the latents' means decode to; grey values from 0 to 1."""
    import torch

    from train_cc.models.vae import ENCODED_AT_ONCE, pixels_to_images

    found = []
    with torch.no_grad():
        for part in images.split(ENCODED_AT_ONCE):
            x = (part.to(vae.device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            shown = pixels_to_images(vae.decode(vae.encode(x).latent_dist.mean).sample)
            found.append(-10 * (shown - pixels_to_images(x)).square().mean(dim=(1, 2, 3)).log10())
    return torch.cat(found).mean().item()


def save(vae: "AutoencoderKL", images: "Tensor", folder: Path, measure: bool) -> None:
    """``measure``: choose the scaling factor so that the networks see latents of standard deviation 1."""
    from train_cc.models.vae import encode_images

    vae.eval()
    if measure:
        vae.register_to_config(scaling_factor=1.0)
        spread = encode_images(vae, images[:MEASURED_ON]).std().item()
        vae.register_to_config(scaling_factor=1 / spread)
    vae.save_pretrained(folder)


def command_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_data_arguments(parser)
    add_training_arguments(parser, max_train_steps=2400)
    parser.set_defaults(dataset=DATASETS[1], batch_size=16)
    parser.add_argument(
        "--channels", type=integer(8, 1024), nargs="+", default=[16, 32, 64], help="widths of the stages, of which "
        "each but the first halves the sides"
    )  # fmt: skip
    parser.add_argument("--layers", type=integer(1, 8), default=1, help="residual blocks per stage of the encoder")
    parser.add_argument("--groups", type=integer(1, 64), default=8, help="groups of the normalisation")
    parser.add_argument(
        "--kl-weight", type=number(0, 1e3), default=1e-4, help="of the KL per latent number, against the L1 per pixel"
    )
    parser.add_argument("--ema-decay", type=DECAY, default=0.995, help="of the average that is saved")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no", help="of the convolutions")
    parser.add_argument("--decoder-of", type=path, help="a VAE folder whose decoder alone is trained further")
    parser.add_argument("--classifier", type=path, help="with --decoder-of: the folder of pretrain/classifier.py")
    parser.add_argument(
        "--feature-weight", type=number(0, 1e3), default=0.1, help="with --decoder-of: of the features' distance"
    )
    return parser


def check(args: argparse.Namespace, shape: tuple[int, int, int]) -> None:
    """Raises `InputError` for flags that do not go together, or with images of ``shape``."""
    if shape[0] != 3:
        raise InputError(f"--dataset is {args.dataset}, {shape[0]} channel: a VAE is for images of three channels")
    if (args.decoder_of is None) != (args.classifier is None):
        told = f"--decoder-of is {args.decoder_of}, --classifier is {args.classifier}"
        raise InputError(f"{told}: the decoder alone is trained against a classifier's features; give both, or neither")
    if args.decoder_of is not None:
        require_folder(args.decoder_of, "a VAE folder", "config.json")
        if args.decoder_of.resolve() == args.output_dir.resolve():
            raise InputError(
                f"--decoder-of and --output-dir are both {args.output_dir}; the VAE that is read must stay"
            )
    if wrong := [width for width in args.channels if width % args.groups]:
        raise InputError(f"--groups is {args.groups}, which does not divide --channels {wrong[0]}")
    if shape[1] % 2 ** (len(args.channels) - 1):
        raise InputError(f"--channels has {len(args.channels)} stages: sides of {shape[1]} cannot be halved so often")


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = command_parser().parse_args(argv)
    images, _ = load_dataset(args.dataset, args.data_dir)
    check(args, tuple(images.shape[1:]))
    import torch  # what is wrong with the command line has been said

    from train_cc.draws import rng_of
    from train_cc.models.vae import load_vae, new_vae
    from train_cc.pretrain.resumable import VAE, train
    from train_cc.run import devices

    device = devices.device()
    content = record("pretrain.vae", vars(args))
    with product(args.output_dir, content, args.overwrite, keep=True) as place:
        if place is None:
            return
        torch.manual_seed(rng_of(args.seed, VAE).initial_seed())
        began, fresh = time.monotonic(), args.decoder_of is None
        vae = new_vae(tuple(args.channels), args.groups, args.layers, images.shape[-1]) if fresh else None
        vae = (vae or load_vae(str(args.decoder_of))).to(device)
        vae = vae.to(memory_format=torch.channels_last)
        training = vae_training(vae, images, args)
        average = training.average.module
        if not train(training, place.parts, args, "pretrain.vae"):
            return
        save(average, images, place.new, fresh)
        held_out, _ = load_dataset(args.dataset, args.data_dir, "test")
        print(
            f"VAE of {args.dataset}: PSNR {psnr(average, held_out[:JUDGED_ON]):.2f} dB on test images, scaling factor "
            f"{average.config.scaling_factor:.4f}, {time.monotonic() - began:.0f} s -> {args.output_dir}"
        )


if __name__ == "__main__":
    main()
