"""Statistics of images, in shards that survive a kill: what evaluation/statistics.py runs."""

import argparse
import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from evaluation.images import FolderImages, Images, batches_of, choose_workers, open_images
from evaluation.moments import merged, shard_moments
from train_cc.io.class_names import order_of
from train_cc.io.errors import InputError
from train_cc.io.products import (
    LEFTOVER,
    check_output_file,
    flush,
    library_versions,
    locked,
    need_space,
    record,
    record_of,
    write_atomically,
    write_record,
    writing,
)
from train_cc.io.read import read_npz
from train_cc.models.features import FeatureSpace, load_space, without_tf32
from train_cc.rewards.statistics import read_space
from train_cc.run.devices import SHARDS_TIMEOUT, open_processes

# Shards -----------------------------------------------------------------------------------------------------------


def open_shards(folder: Path, identity: dict, arguments: dict) -> None:
    """``folder`` is there for shards of ``identity`` alone. Those of another command of ours are removed."""
    identity = json.loads(json.dumps(identity))
    if not all(LEFTOVER.fullmatch(path.name) for path in folder.iterdir()):
        if not record_of(folder):
            raise InputError(f"{folder} is not empty, and no command of this project wrote it: choose another --output")
        if record_of(folder).get("identity") != identity:
            remove_shards(folder)
    write_record(folder, record("statistics", arguments, identity=identity))


def remove_shards(folder: Path) -> None:
    for path in (*folder.glob("shard-*.npz"), *folder.glob("shard-*.tmp"), *folder.glob("args.json")):
        path.unlink()


def write_shard(path: Path, content: dict[str, np.ndarray], rank: int) -> None:
    temporary = path.with_name(f"{path.stem}-{rank}.tmp")
    with writing(path), temporary.open("wb") as file:
        np.savez(file, **content)
    flush(temporary)
    os.replace(temporary, path)


def read_shard(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"{path} is missing: do all processes share the storage of --output? Run the command again")
    return read_npz(path, "a shard of this command")


def shards_of(count: int, size: int) -> dict[str, range]:
    """File name -> the images it is of. The number of processes does not enter."""
    return {f"shard-{first:09d}.npz": range(first, min(first + size, count)) for first in range(0, count, size)}


def fill_shards(
    folder: Path, todo: dict[str, range], images: Images, space: FeatureSpace, accelerator: PartialState, args
) -> None:
    """Read, embed and sum up the images of ``todo``, a shard at a time; one loader for all keeps its workers busy."""
    batches = {
        name: [range(first, min(first + args.batch_size, part.stop)) for first in part[:: args.batch_size]]
        for name, part in todo.items()
    }
    read = batches_of(images, [batch for parts in batches.values() for batch in parts], args.workers)
    progress = tqdm(
        desc="images", total=sum(map(len, todo.values())), disable=not accelerator.is_main_process, mininterval=2
    )
    with progress:
        for name, parts in batches.items():
            features = []
            for indices in parts:
                pixels = next(read).to(accelerator.device)
                with torch.no_grad(), without_tf32():
                    features.append(space(pixels.float() / 255))
                progress.update(len(indices))
            features = torch.cat(features)
            bad = (~torch.isfinite(features).all(dim=1)).nonzero()
            if len(bad):
                first = images.name(todo[name][bad[0].item()])
                raise InputError(
                    f"{space.name} gives NaN or infinity for {first}; the weights or the image are unusable"
                )
            labels = None if images.labels is None else images.labels[todo[name].start : todo[name].stop]
            write_shard(folder / name, shard_moments(features, labels), accelerator.process_index)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A network's rounding on a CPU depends on the number of threads, which launchers set.

    More cores are used by more processes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# All of them ----------------------------------------------------------------------------------------------------


def about(space: FeatureSpace, images: Images) -> dict:
    told = space.describe() | {"images": len(images), "source": images.source}
    return told | {"made_by": "made by DMDR: statistics", "versions": library_versions()}


def finished(path: Path, told: dict) -> bool:
    """Whether ``path`` is there, whole, and says ``told`` of itself."""
    try:
        return path.exists() and read_space(read_npz(path, "statistics").get("space"), path) == told
    except InputError:
        return False


def save(path: Path, moments: dict[str, np.ndarray], told: dict) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **moments, space=np.array(json.dumps(told)))
    write_atomically(path, buffer.getvalue())


def notes(images: Images, moments: dict[str, np.ndarray]) -> list[str]:
    lines, size = [], len(moments["mu"])
    classes = images.source.get("classes")
    if classes:
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
    accelerator = open_processes(SHARDS_TIMEOUT)
    if args.workers is None:
        args.workers = choose_workers(accelerator.num_processes)
    space = load_space(args.space, accelerator.device, args.dinov2_backbone, args.inception_weights)
    images = open_images(args.images, args.image_size, space.in_channels, args.data_dir)
    if len(images) < 2:
        raise InputError(f"{args.images} holds {len(images)} image(s); a covariance needs 2 or more")
    space.require_channels(images.shape[0])
    if not isinstance(images, FolderImages):
        args.workers = 0  # what is in memory needs no reading
    folder = args.output.with_name(args.output.name + ".shards")
    shards = shards_of(len(images), args.shard_size)
    told = json.loads(json.dumps(about(space, images)))
    there = not args.overwrite and finished(args.output, told)
    if not there:
        check_output_file(args.output, args.overwrite)
    accelerator.wait_for_everyone()  # what is there is looked at before anything is written
    with locked(folder) if accelerator.is_main_process else contextlib.nullcontext():
        if not there:
            if accelerator.is_main_process:
                need_space(folder, 4 * space.size**2 * (len(shards) + 6))
                open_shards(folder, told | {"shard_size": args.shard_size}, vars(args))
            accelerator.wait_for_everyone()
            todo = [name for name in shards if not (folder / name).exists()]
            accelerator.wait_for_everyone()  # all have looked before any writes
            mine = todo[accelerator.process_index :: accelerator.num_processes]
            with one_thread():
                fill_shards(folder, {name: shards[name] for name in mine}, images, space, accelerator, args)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                moments = merged((read_shard(folder / name) for name in shards), space.size, images.num_classes)
                save(args.output, moments, told)
        if accelerator.is_main_process and record_of(folder):
            remove_shards(folder)
    if accelerator.is_main_process:
        (folder / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        classes = f", {images.num_classes} classes" if images.num_classes else ", no labels"
        done = "were there already:" if there else "->"
        print(f"{len(images)} images{classes}, {space.size} features of {space.name} {done} {args.output}")
        for note in notes(images, moments) if not there else ():
            print(note)
