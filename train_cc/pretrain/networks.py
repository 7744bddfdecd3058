"""The three networks of stage 0: what each is trained on, its loss, and what is saved."""

import argparse
import os
import zlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from train_cc.draws import Draws, rng_of
from train_cc.flow import interpolate
from train_cc.images import NUM_CLASSES, load_dataset
from train_cc.io.errors import InputError
from train_cc.io.products import apart
from train_cc.io.read import parsing, require_folder
from train_cc.models.backbone import Network, SiT, choose_attention
from train_cc.models.classifier import ImageClassifier, accuracy
from train_cc.models.generator import GenerationConfig
from train_cc.models.vae import (
    ENCODED_AT_ONCE,
    cached_latents,
    encode_images,
    latent_space_sha256,
    load_vae,
    new_vae,
    pixels_to_images,
)
from train_cc.objectives import velocity_matching_loss
from train_cc.pretrain.data import PURPOSES
from train_cc.pretrain.resumable import Finish, Training, make_network, warmed_cosine
from train_cc.run import devices
from train_cc.run.states import warmed_up_average
from train_cc.schedules import logit_normal_times

# First key of the draws, after the seed, as in the stages: no two networks share random numbers.
TEACHER, CLASSIFIER, VAE, DECODER = 21, 22, 23, 24
LATENTS = "latents.safetensors"
LOSS_IMAGES = 1_000  # images of the teacher's last loss
MEASURED_ON = 10_000  # images: the latents' spread
JUDGED_ON = 1_000  # test images: the PSNR
CLIP = 1.0  # of the gradients' norm: the first steps of a decoder are rough


# Teacher --------------------------------------------------------------------------------------------------------------


def teacher_training(model: Network, x: Tensor, labels: Tensor, args: argparse.Namespace) -> Training:
    """Flow matching: E (v(x_t, t, y) - (noise - x0))^2, y replaced by the null class at ``label_dropout``; EMA.

    ``x`` (N, C, H, W): pixels in [-1, 1], or scaled latents.
    """
    device = next(model.parameters()).device
    data, targets = x.to(device), labels.to(device)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    choose_attention(model, device, dtype)

    def update(step: int) -> Tensor:
        draws = Draws(args.seed, TEACHER, step, device=device)
        rows = draws.integers(len(targets), args.batch_size).to(device)
        y = targets[rows]
        dropped = draws.uniform(args.batch_size) < args.label_dropout
        return flow_matching_loss(model, data[rows], torch.where(dropped.to(device), model.null_class, y), draws, dtype)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    average = AveragedModel(model, multi_avg_fn=warmed_up_average(args.ema_decay))
    return Training(model, optimizer, update, average, warmed_cosine(args.warmup_steps))


def flow_matching_loss(model: Network, x0: Tensor, y: Tensor, draws: Draws, dtype: torch.dtype) -> Tensor:
    """At logit-normal times, with the network's products in ``dtype``. 0-d."""
    noise = draws.noise_like(x0)
    t = logit_normal_times(draws.noise(len(x0)))
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        v = model(interpolate(x0, noise, t), t, y)
    return velocity_matching_loss(v.float(), x0, noise)


@torch.no_grad()
def held_out_loss(model: Network, x: Tensor, labels: Tensor, seed: int) -> float:
    """The loss, in fp32, on images that nothing was trained on, or on the first of those that were: digits."""
    device = next(model.parameters()).device
    draws = Draws(seed, TEACHER, device=device)
    return flow_matching_loss(model, x.to(device), labels.to(device), draws, torch.float32).item()


def training_data(
    args: argparse.Namespace, split: str, number: int | None = None, parts: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Return the first ``number`` images, pixels in [-1, 1] or with --vae scaled latents (N, C, H, W), and labels (N,).

    Latents are computed once if they can be kept in folder ``parts``, beside the checkpoint.
    """
    images, labels = load_dataset(args.dataset, args.data_dir, split)
    images, labels = images[:number], labels[:number]
    if args.vae == "none":
        return images.float() / 127.5 - 1, labels
    if images.shape[1] != 3:
        raise InputError(
            f"--vae is {args.vae}, but --dataset {args.dataset} has {images.shape[1]} channel; three are needed"
        )
    vae = load_vae(args.vae)
    return (encode_images(vae, images) if parts is None else cached_latents(parts / LATENTS, vae, images)), labels


def check_teacher(args: argparse.Namespace, side: int) -> None:
    """Raises `InputError` for a network that does not fit inputs of ``side``, or this machine's memory."""
    if side % args.patch_size or args.hidden_size % (4 * args.num_heads):
        of = "image" if args.vae == "none" else "latent"
        raise InputError(
            f"--patch-size {args.patch_size} must divide the {of} side {side}, "
            f"and --hidden-size {args.hidden_size} be a multiple of 4 x --num-heads {args.num_heads}"
        )
    # 18 width^2 weights a block, with gradient, moments and average: missing later, it would be a killed process.
    needed, there = 20 * 18 * args.depth * args.hidden_size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"--hidden-size {args.hidden_size} with --depth {args.depth} needs {needed / 1e9:.0f} GB of memory, "
            f"this machine has {there / 1e9:.0f} GB"
        )


def train_teacher(args: argparse.Namespace) -> None:
    """The command, its flags parsed. Raises `InputError`."""
    held_out = "train" if args.dataset == "digits" else "test"
    x, labels = training_data(args, held_out, LOSS_IMAGES)
    check_teacher(args, x.shape[-1])

    def prepare(parts: Path) -> tuple[Training, Finish]:
        torch.manual_seed(rng_of(args.seed, TEACHER).initial_seed())
        model = SiT(
            input_size=x.shape[-1],
            in_channels=x.shape[1],
            patch_size=args.patch_size,
            hidden_size=args.hidden_size,
            depth=args.depth,
            num_heads=args.num_heads,
            num_classes=NUM_CLASSES,
        )
        training = teacher_training(model.to(devices.device()), *training_data(args, "train", parts=parts), args)
        teacher = training.average.module

        def finish(folder: Path) -> str:
            teacher.save_pretrained(folder)
            if args.vae != "none":
                GenerationConfig(latent_space_sha256=latent_space_sha256(load_vae(args.vae))).write(folder)
            loss = held_out_loss(teacher, x, labels, args.seed)
            return f"teacher of {args.dataset}: loss {loss:.4f} on {LOSS_IMAGES} {held_out} images"

        return training, finish

    make_network("pretrain.teacher", args, prepare)


# VAE ------------------------------------------------------------------------------------------------------------------


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)), the mean over all numbers of the latents. 0-d."""
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()


def vae_training(vae: AutoencoderKL, images: Tensor, args: argparse.Namespace) -> Training:
    """L1 + ``kl_weight`` KL; with ``decoder_of`` the decoder only, L1 + ``feature_weight`` times the squared distance
    of a classifier's features, relative to their variance."""
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
            kinds = f"takes {judge.in_channels} channel(s), the images have {images.shape[1]}"
            raise InputError(f"--classifier {args.classifier} {kinds}: give one of the same data set")
        with torch.no_grad():
            spread = judge.features_and_logits(images[:512].to(device).float() / 255)[0].var(0).mean()

    def batch(step: int) -> tuple[Draws, Tensor]:
        draws = Draws(args.seed, first_key, step, device=device)
        rows = draws.integers(len(images), args.batch_size)
        x = images[rows].to(device).float() / 127.5 - 1
        return draws, x.contiguous(memory_format=torch.channels_last)

    def update_all(step: int) -> Tensor:
        draws, x = batch(step)
        with half:
            posterior = vae.encode(x).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            reconstruction = vae.decode(mean + std * draws.noise_like(mean)).sample.float()
        return F.l1_loss(reconstruction, x) + args.kl_weight * kl_divergence(mean, std)

    def update_decoder(step: int) -> Tensor:
        draws, x = batch(step)
        with half, torch.no_grad():
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * draws.noise_like(posterior.mean)
            features = judge.features_and_logits(pixels_to_images(x))[0].float()
        with half:
            reconstruction = vae.decode(z).sample.float()
            decoded = judge.features_and_logits(pixels_to_images(reconstruction))[0].float()
        distance = (decoded - features).square().mean() / spread
        return F.l1_loss(reconstruction, x) + args.feature_weight * distance

    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = AveragedModel(vae, multi_avg_fn=warmed_up_average(args.ema_decay))
    update = update_all if judge is None else update_decoder
    return Training(vae, optimizer, update, average, warmed_cosine(50), max_grad_norm=CLIP)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """dB, the mean over images of what the latents' means decode to; grey values from 0 to 1."""
    values = []
    for part in images.split(ENCODED_AT_ONCE):
        x = (part.to(vae.device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        decoded = pixels_to_images(vae.decode(vae.encode(x).latent_dist.mean).sample)
        values.append(-10 * (decoded - pixels_to_images(x)).square().mean(dim=(1, 2, 3)).log10())
    return torch.cat(values).mean().item()


def save_vae(vae: AutoencoderKL, images: Tensor, folder: Path, measure: bool) -> None:
    """``measure``: choose the scaling factor so that the networks see latents of standard deviation 1."""
    vae.eval()
    if measure:
        vae.register_to_config(scaling_factor=1.0)
        spread = encode_images(vae, images[:MEASURED_ON]).std().item()
        vae.register_to_config(scaling_factor=1 / spread)
    vae.save_pretrained(folder)


def check_vae(args: argparse.Namespace, shape: tuple[int, int, int]) -> None:
    """Raises `InputError` for flags that do not go together, or with images of ``shape``."""
    if shape[0] != 3:
        raise InputError(f"--dataset is {args.dataset}, {shape[0]} channel: a VAE is for images of three channels")
    if (args.decoder_of is None) != (args.classifier is None):
        pair = f"--decoder-of is {args.decoder_of}, --classifier is {args.classifier}"
        raise InputError(f"{pair}: only the decoder is trained against a classifier's features; give both, or neither")
    if args.decoder_of is not None:
        require_folder(args.decoder_of, "a VAE folder", "config.json")
        apart((("--decoder-of", args.decoder_of), ("--output-dir", args.output_dir)))
    if wrong := [width for width in args.channels if width % args.groups]:
        raise InputError(f"--groups is {args.groups}, which does not divide --channels {wrong[0]}")
    if shape[1] % 2 ** (len(args.channels) - 1):
        raise InputError(f"--channels has {len(args.channels)} stages: sides of {shape[1]} cannot be halved so often")


def train_vae(args: argparse.Namespace) -> None:
    """The command, its flags parsed. Raises `InputError`."""
    images, _ = load_dataset(args.dataset, args.data_dir)
    check_vae(args, tuple(images.shape[1:]))

    def prepare(parts: Path) -> tuple[Training, Finish]:
        torch.manual_seed(rng_of(args.seed, VAE).initial_seed())
        fresh = args.decoder_of is None
        vae = new_vae(tuple(args.channels), args.groups, args.layers, images.shape[-1]) if fresh else None
        vae = (vae or load_vae(str(args.decoder_of))).to(devices.device())
        training = vae_training(vae.to(memory_format=torch.channels_last), images, args)
        average = training.average.module

        def finish(folder: Path) -> str:
            save_vae(average, images, folder, fresh)
            held_out, _ = load_dataset(args.dataset, args.data_dir, "test")
            quality = f"PSNR {psnr(average, held_out[:JUDGED_ON]):.2f} dB on test images"
            return f"VAE of {args.dataset}: {quality}, scaling factor {average.config.scaling_factor:.4f}"

        return training, finish

    make_network("pretrain.vae", args, prepare)


# Classifier -----------------------------------------------------------------------------------------------------------


def draws_key(args: argparse.Namespace) -> tuple[int, ...]:
    """Key of initialisation and draws: reward and evaluation classifiers of a seed must not share random numbers."""
    return args.seed, CLASSIFIER, PURPOSES.index(args.purpose), zlib.crc32(args.architecture.encode())


def classifier_training(model: ImageClassifier, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Training:
    """Cross-entropy on images with added noise of a standard deviation uniform in [0, ``noise_augmentation``]."""
    device = next(model.parameters()).device
    data, targets = images.to(device).float() / 255, labels.to(device)

    def update(step: int) -> Tensor:
        draws = Draws(*draws_key(args), step, device=device)
        torch.manual_seed(rng_of(*draws_key(args), step, 2).initial_seed())  # dropout and stochastic depth draw there
        rows = draws.integers(len(targets), args.batch_size).to(device)
        spread = draws.uniform(args.batch_size).float().to(device).view(-1, 1, 1, 1) * args.noise_augmentation
        noisy = (data[rows] + spread * draws.noise_like(data[rows])).clamp(0, 1)
        return F.cross_entropy(model(noisy), targets[rows])

    return Training(model, torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05), update)


def new_classifier(args: argparse.Namespace, images: Tensor) -> ImageClassifier:
    """A fresh classifier that was tried on two images. Raises `InputError` where it cannot take them."""
    torch.manual_seed(rng_of(*draws_key(args)).initial_seed())
    expected = f"a classifier for images of {images.shape[1]} channel(s) at --image-size {args.image_size}"
    with parsing(f"--architecture {args.architecture}", expected, "does not work"), torch.no_grad():
        model = ImageClassifier(
            args.architecture, num_classes=NUM_CLASSES, in_channels=images.shape[1], image_size=args.image_size
        )
        logits = model.eval()(images[:2].float() / 255)
    if logits.shape != (len(images[:2]), NUM_CLASSES):
        raise InputError(f"--architecture {args.architecture} is no classifier: it makes {tuple(logits.shape)}")
    return model.train()


def train_classifier(args: argparse.Namespace) -> None:
    """The command, its flags parsed. Raises `InputError`."""
    images, labels = load_dataset(args.dataset, args.data_dir)

    def prepare(parts: Path) -> tuple[Training, Finish]:
        model = new_classifier(args, images).to(devices.device())

        @torch.no_grad()
        def finish(folder: Path) -> str:
            model.save_pretrained(folder)
            model.eval()
            held_out = "train" if args.dataset == "digits" else "test"
            x, y = load_dataset(args.dataset, args.data_dir, held_out)
            logits = torch.cat([model(batch.to(devices.device()).float() / 255) for batch in x.split(512)]).cpu()
            where = "its training set" if held_out == "train" else "test images"
            return f"{args.architecture}, accuracy on {where} {accuracy(logits, y):.4f}"

        return classifier_training(model, images, labels, args), finish

    make_network("pretrain.classifier", args, prepare)
