"""Statistics of images, summed in parts that survive a kill: what evaluation/statistics.py runs."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from evaluation.samples.parts import PART, in_parts, is_whole_part, write_part
from train_cc.images import FolderImages, Images, batches_of, choose_workers, open_images
from train_cc.io.class_names import order_of
from train_cc.io.errors import InputError
from train_cc.io.products import library_versions, need_space, writing
from train_cc.io.read import read_npz
from train_cc.models.features import FeatureSpace, load_space, without_tf32
from train_cc.rewards.statistics import read_space
from train_cc.run.devices import SHARDS_TIMEOUT, open_processes

# Moments ----------------------------------------------------------------------------------------------------------


def part_moments(features: Tensor, labels: Tensor | None) -> dict[str, np.ndarray]:
    """Mean, scatter about it (its upper triangle) and sums per class of (B, D) features, in float64."""
    f = features.double()
    mean = f.mean(dim=0)
    scatter = (f - mean).T @ (f - mean)
    content = {"count": torch.tensor(len(f)), "mean": mean, "scatter": scatter[tuple(triangle(len(mean)))]}
    if labels is not None:
        classes, inverse = labels.unique(return_inverse=True)
        sums = f.new_zeros(len(classes), f.shape[1]).index_add_(0, inverse.to(f.device), f)
        content |= {"classes": classes, "class_count": torch.bincount(inverse), "class_sum": sums}
    return {name: value.cpu().numpy() for name, value in content.items()}


def triangle(size: int) -> Tensor:
    return torch.triu_indices(size, size)


def merged(parts: Iterator[dict[str, np.ndarray]], size: int, num_classes: int | None) -> dict[str, np.ndarray]:
    """Moments of all images from those of the parts, in their order (Chan et al.: no large sums are subtracted)."""
    count, mean, scatter = 0, np.zeros(size), np.zeros((size, size))
    class_count, class_sum = np.zeros(num_classes or 0), np.zeros((num_classes or 0, size))
    rows, columns = triangle(size).numpy()
    for part in parts:
        n, delta = part["count"].item(), part["mean"] - mean
        own = np.zeros((size, size))
        own[rows, columns] = own[columns, rows] = part["scatter"]
        scatter += own + np.outer(delta, delta) * (count * n / (count + n))
        mean, count = mean + delta * (n / (count + n)), count + n
        if num_classes:
            class_count[part["classes"]] += part["class_count"]
            class_sum[part["classes"]] += part["class_sum"]
    moments = {"mu": mean, "sigma": scatter / (count - 1)}
    if num_classes:
        class_mu = class_sum / np.maximum(class_count, 1)[:, None]
        between = (class_mu - mean) * np.sqrt(class_count)[:, None]
        moments |= {"class_mu": class_mu, "class_count": class_count, "within": (scatter - between.T @ between) / count}
    return moments


# Parts ------------------------------------------------------------------------------------------------------------


def read_moments(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"{path} is missing: do all processes share the storage of --output? Run the command again")
    return read_npz(path, PART)


def sum_parts(
    parts: dict[Path, range], images: Images, space: FeatureSpace, processes: PartialState, batch: int, workers: int
) -> None:
    """Read, embed and sum up the images of ``parts``; one loader for all keeps its workers busy."""
    batches = {
        path: [range(first, min(first + batch, part.stop)) for first in part[::batch]] for path, part in parts.items()
    }
    pixels = batches_of(images, [indices for each in batches.values() for indices in each], workers)
    total = sum(map(len, parts.values()))
    with tqdm(desc="images", total=total, disable=not processes.is_main_process, mininterval=2) as progress:
        for path, each in batches.items():
            features = []
            for indices in each:
                with torch.no_grad(), without_tf32():
                    features.append(space(next(pixels).to(processes.device).float() / 255))
                progress.update(len(indices))
            features = torch.cat(features)
            bad = (~torch.isfinite(features).all(dim=1)).nonzero()
            if len(bad):
                first = images.name(parts[path][bad[0].item()])
                raise InputError(
                    f"{space.name} gives NaN or infinity for {first}; the weights or the image are unusable"
                )
            labels = None if images.labels is None else images.labels[parts[path].start : parts[path].stop]
            write_part(path, **part_moments(features, labels))


# The command ------------------------------------------------------------------------------------------------------


def statistics_record(space: dict) -> dict:
    """The record of statistics of which a file says ``space``."""
    return {"stage": "statistics", "arguments": {}, "libraries": space.get("versions")} | space


def read_statistics_record(path: Path) -> dict:
    """The `statistics_record` of a whole file; {} for another or a damaged one."""
    try:
        return statistics_record(read_space(read_npz(path, "statistics").get("space"), path))
    except InputError:
        return {}


def notes(images: Images, moments: dict[str, np.ndarray]) -> list[str]:
    lines, size = [], len(moments["mu"])
    if classes := images.source.get("classes"):
        lines.append(order_of(classes))
    if len(images) <= size:
        lines.append(
            f"WARNING: {len(images)} images in {size} dimensions: the covariance is singular; give more images"
        )
    empty = np.flatnonzero(moments["class_count"] == 0) if "class_count" in moments else []
    if len(empty):
        lines.append(
            f"WARNING: classes {empty[:8].tolist()} have no image: the Frechet reward per class refuses the file"
            + ("; do the labels count from 1?" if empty.tolist() == [0] else "")
        )
    return lines


def gather(args: argparse.Namespace) -> None:
    """The command, its flags checked. Raises `InputError`."""
    processes = open_processes(SHARDS_TIMEOUT)
    network = load_space(args.space, processes.device, args.dinov2_backbone, args.inception_weights)
    images = open_images(args.images, args.image_size, network.in_channels, args.data_dir)
    if len(images) < 2:
        raise InputError(f"{args.images} holds {len(images)} image(s); a covariance needs 2 or more")
    network.require_channels(images.shape[0])
    workers = choose_workers(processes.num_processes) if args.workers is None else args.workers
    workers = workers if isinstance(images, FolderImages) else 0  # what is in memory needs no reading
    space = network.describe() | {"images": len(images), "source": images.source}
    space |= {"made_by": "made by DMDR: statistics", "versions": library_versions()}
    with in_parts(args.output, statistics_record(space), args.overwrite, read_statistics_record, processes) as place:
        if place is None:
            return
        starts = range(0, len(images), args.shard_size)
        ranges = [range(start, min(start + args.shard_size, len(images))) for start in starts]
        parts = {place.parts / f"{part.start:09d}-{part.stop:09d}.npz": part for part in ranges}
        if processes.is_main_process:
            need_space(place.parts, 4 * network.size**2 * (len(parts) + 6))
        mine = list(parts)[processes.process_index :: processes.num_processes]
        todo = {path: parts[path] for path in mine if not is_whole_part(path)}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a network's rounding on a CPU depends on them; more cores: more processes
        sum_parts(todo, images, network, processes, args.batch_size, workers)
        torch.set_num_threads(threads)
        processes.wait_for_everyone()
        if not processes.is_main_process:
            return
        moments = merged(map(read_moments, parts), network.size, images.num_classes)
        with writing(args.output), place.new.open("wb") as file:
            np.savez(file, **moments, space=np.array(json.dumps(space)))
    classes = f", {images.num_classes} classes" if images.num_classes else ", no labels"
    print(f"{len(images)} images{classes}, {network.size} features of {network.name} -> {args.output}")
    for line in notes(images, moments):
        print(line)
