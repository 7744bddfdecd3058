"""Stage 0 of the small recipes: a classifier, to be the reward or, another one, the feature space of an evaluation.

`python -m train_cc.pretrain.classifier --dataset digits --output-dir runs/digits/classifier_reward`
"""

import argparse
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from train_cc.draws import Draws
from train_cc.io.errors import exits_on_input_error
from train_cc.io.write import check_output_dir
from train_cc.models.classifier import ImageClassifier, accuracy
from train_cc.pretrain.data import add_data_arguments, load_dataset, require_positive
from train_cc.pretrain.teacher import cosine_decay


def train_classifier(
    model: ImageClassifier, images: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace
) -> ImageClassifier:
    """Cross-entropy on images with added noise of a standard deviation uniform in [0, ``noise_augmentation``]."""
    device = next(model.parameters()).device
    images, labels = images.to(device).float() / 255, labels.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_decay(step, args.max_train_steps))
    progress = tqdm(range(args.max_train_steps), desc=args.architecture, mininterval=2)
    model.train()
    for step in progress:
        draws = Draws(args.seed, step, device=device)
        rows = draws.integers(len(labels), args.batch_size).to(device)
        spread = draws.uniform(args.batch_size).float().to(device).view(-1, 1, 1, 1) * args.noise_augmentation
        noisy = (images[rows] + spread * draws.noise_like(images[rows])).clamp(0, 1)
        loss = F.cross_entropy(model(noisy), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return model.requires_grad_(False).eval()


@exits_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_data_arguments(parser)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--architecture", default="test_resnet", help="any classifier of timm.list_models()")
    parser.add_argument("--image-size", type=int, default=32, help="images are resized to it inside the classifier")
    parser.add_argument("--noise-augmentation", type=float, default=0.0, help="largest standard deviation, in [0, 1]")
    parser.add_argument("--max-train-steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=30)
    args = parser.parse_args()
    require_positive(args, "image_size", "max_train_steps", "batch_size", "learning_rate")

    images, labels = load_dataset(args.dataset, args.data_dir)
    torch.manual_seed(args.seed)
    model = ImageClassifier(args.architecture, int(labels.max()) + 1, images.shape[1], args.image_size)
    check_output_dir(args.output_dir, args.overwrite)
    begin = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = train_classifier(model.to(device), images, labels, args)
    with torch.no_grad():
        logits = torch.cat([model(batch.to(device).float() / 255) for batch in images.split(512)]).cpu()
    model.save_pretrained(args.output_dir)
    print(
        f"{args.architecture}, accuracy on its training set {accuracy(logits, labels):.4f}, "
        f"{time.monotonic() - begin:.0f} s -> {args.output_dir}"
    )


if __name__ == "__main__":
    main()
