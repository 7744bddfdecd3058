"""Kills: SIGKILL at any moment of any command, and the same command continues to the same bits.

    OMP_NUM_THREADS=1 python -m tests.kills [WORD ...] [--count 300] [--seed 0]

A WORD picks the commands whose name contains it; without one, all. Each runs undisturbed twice: what it leaves then is
what a killed one must leave. Then it is killed, with all its processes, at a random moment or before a random change of
a name on the disk, and started again until it ends by itself; sometimes it is killed again before. Commands are forks
of this process, which has imported the libraries; those called "launched" are real starts of `scripts.launch`.
The folders of what went wrong stay.
"""

import argparse
import atexit
import ctypes
import hashlib
import importlib
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from evaluation.standins import repa_state, write_vae
from tests.conftest import flags, random_sit
from tests.mutation.run import preload
from train_cc.models.classifier import ImageClassifier

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}  # audit events; and `open` for writing
LIMIT = 300  # seconds that an undisturbed command may take here


@dataclass
class Command:
    """``words``: its module and flags. ``share``: of all kills. ``before``: a module and flags that run first."""

    words: list[str]
    share: int
    processes: int = 1
    launched: bool = False
    before: tuple[str, ...] = ()


def prepare(folder: Path) -> dict[str, Command]:
    """Inputs into ``folder``/in, read alone; -> the commands, which write below ``folder``/out."""
    given, out = folder / "in", folder / "out"
    torch.manual_seed(0)
    random_sit().save_pretrained(given / "teacher")
    random_sit(hidden_size=256, depth=4).save_pretrained(given / "large")
    random_sit(in_channels=4).save_pretrained(given / "latent")
    write_vae(given / "vae")
    ImageClassifier("test_efficientnet", num_classes=10, in_channels=1, image_size=32).save_pretrained(given / "clf")
    torch.save({"ema": repa_state(hidden=256, depth=4, input_size=8, classes=10)}, given / "repa.pt")

    def cold(output: Path, *more: object, teacher: str = "teacher") -> list[str]:
        return ["train_cc.cold_start", *flags(given / teacher, output, "--auto-resume", *more)]

    def words(module: str, *more: object) -> list[str]:
        return [module, *map(str, more)]

    rotating = ("--ema-decay", 0.9, "--keep-checkpoints", 2, "--max-train-steps", 6)
    small = ("--hidden-size", 32, "--num-heads", 2, "--depth", 2, "--batch-size", 8)
    steps = ("--max-train-steps", 24, "--checkpoint-steps", 3)
    sampled = ("--num-images", 60, "--shard-size", 8, "--num-steps", 4)
    reward = ("--encoder-type", "classifier", "--reward-classifier", given / "clf", "--reward-weight", 0.5)
    units = "checkpoints/torch_units/step-3.pt"
    for start in (cold(given / "run", "--use-lora-gen", "--ema-decay", 0.9),
                  cold(given / "latents", "--vae", given / "vae", teacher="latent"),
                  words("train_cc.pretrain.data", "--output", given / "reference.npz"),
                  words("evaluation.generate", "--generator", given / "teacher", "--output", given / "s.npz",
                        "--num-images", 300)):  # fmt: skip
        run(Command(start, 0), folder)
    data = words("train_cc.pretrain.data", "--output", out / "deep" / "reference.npz")
    teacher = words("train_cc.pretrain.teacher", "--output-dir", out / "teacher", *small, *steps)
    classifier = ("--output-dir", out / "classifier", "--image-size", 32, "--batch-size", 8, *steps)
    dmdr = words("train_cc.dmdr_refl", *cold(out / "run", *reward, "--use-lora-gen", *rotating, "--resume-ckpt",
                                             given / "run" / units)[1:], "--dynamic-steps", 0)  # fmt: skip
    exported = ("--max-train-steps", 1, "--num-previews", 0, "--batch-size", 1)
    generate = words("evaluation.generate", "--generator", given / "teacher", "--output", out / "s.npz", *sampled)
    evaluate = ("--classifier", given / "clf", "--output", out / "r.json", "--picture", out / "r.png", "--bootstrap", 9)
    statistics = words("evaluation.statistics", "--images", given / "reference.npz", "--space",
                       f"classifier:{given / 'clf'}", "--output", out / "real.npz", "--shard-size", 200)  # fmt: skip
    export = words("convert_weight.export_generator", "--checkpoint", given / "run" / units)
    pipeline = words("convert_weight.export_generator", "--checkpoint", given / "latents" / units)
    both = ("--output-dir", out / "generator", "--pipeline", out / "pipeline")
    convert = words("convert_weight.sit_convert", "--input", given / "repa.pt", "--save-dir", out, "--num-heads", 4)
    return {
        "data": Command(data, 15),
        "teacher": Command(teacher, 25),
        "classifier": Command(words("train_cc.pretrain.classifier", *classifier), 20),
        "cold start": Command(cold(out / "run", *rotating), 40),
        "cold start, two processes": Command(cold(out / "run", *rotating), 20, processes=2),
        "DMDR, LoRA": Command(dmdr, 20),
        "DMDR, two processes": Command(dmdr, 10, processes=2),
        "a run's export": Command(cold(out / "run", *exported, teacher="large"), 15),
        "a run's export over an older one": Command(
            cold(out / "run", *exported, "--max-train-steps", 2, teacher="large"),
            15,
            before=tuple(cold(out / "run", *exported, teacher="large")),
        ),
        "generate": Command([*generate, "--png-dir", str(out / "png")], 20),
        "generate, two processes": Command(generate, 8, processes=2),
        "evaluate": Command(words("evaluation.evaluate", given / "s.npz", given / "reference.npz", *evaluate), 15),
        "statistics": Command(statistics, 20),
        "statistics, two processes": Command(statistics, 8, processes=2),
        "export_generator": Command([*export, "--output-dir", str(out / "generator")], 15),
        "export_generator and pipeline": Command([*pipeline, *map(str, both)], 15),
        "export_generator over an older one": Command(
            [*pipeline, *map(str, both), "--overwrite"], 12, before=(*pipeline, *map(str, both), "--weights", "raw")
        ),
        "sit_convert": Command(convert, 15),
        "sit_convert over an older one": Command([*convert, "--overwrite"], 12, before=tuple(convert)),
        "launched teacher": Command(teacher, 4, launched=True),
        "launched generate": Command(generate, 4, launched=True),
        "launched cold start, two processes": Command(cold(out / "run", *rotating), 10, processes=2, launched=True),
        "launched statistics, two processes": Command(statistics, 4, processes=2, launched=True),
    }


# One start --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    code: int  # negative: killed
    seconds: float
    changes: list[int]  # of names on the disk, by process


def run(command: Command, folder: Path, seconds: float = LIMIT, rank: int = 0, change: int = 0) -> Outcome:
    """Start ``command``; kill all of it after ``seconds`` or before change number ``change`` of process ``rank``."""
    began, counts = time.monotonic(), [folder / f"changes-{i}" for i in range(command.processes)]
    for count in counts:
        count.write_text("0")
    leader = launched(command, folder) if command.launched else forked(command, folder, counts, rank, change)
    while (ended := os.waitpid(leader, os.WNOHANG)) == (0, 0) and time.monotonic() < began + seconds:
        time.sleep(0.001)
    took, left = time.monotonic() - began, psutil.Process().children(recursive=True)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in left:
            process.send_signal(number)
    while True:  # orphans are children of this process, see `main`
        try:
            pid, status = os.waitpid(-1, 0)
            ended = (pid, status) if pid == leader else ended
        except ChildProcessError:
            break
    code = os.waitstatus_to_exitcode(ended[1])
    if left and took < seconds and code >= 0:
        raise AssertionError(f"ended by {code} and left running: {left}")
    return Outcome(code, took, [int(count.read_text() or 0) for count in counts])


def launched(command: Command, folder: Path) -> int:
    words = [sys.executable, "-m", "scripts.launch", *command.words]
    environment = os.environ | {"NUM_PROCESSES": str(command.processes), "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "told").open("w") as told:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=told, stderr=told).pid


def forked(command: Command, folder: Path, counts: list[Path], rank: int, change: int) -> int:
    """A fork that forks the processes of ``command`` and waits for them, in a group of their own. -> its id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    if leader := os.fork():
        return leader
    os.setsid()
    with (folder / "told").open("w") as told:
        os.dup2(told.fileno(), 1), os.dup2(told.fileno(), 2)
    sizes = {"WORLD_SIZE": str(command.processes), "LOCAL_WORLD_SIZE": str(command.processes)}
    for i in range(command.processes):
        if not os.fork():
            if command.processes > 1:
                os.environ |= meet | sizes | {"RANK": str(i), "LOCAL_RANK": str(i)}
            os._exit(work(command.words, folder / "out", counts[i], change if i == rank else 0))
    code = max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(command.processes))
    os._exit(code)


def work(words: list[str], out: Path, counter: Path, change: int) -> int:
    """Run a command in this process. -> its exit code."""
    counted = 0

    def count(event: str, found: tuple) -> None:
        nonlocal counted
        writes = event == "open" and found[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in NAMES) and str(found[0]).startswith(str(out)):
            counted += 1
            if counted == change:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(count)
    sys.argv, code = words, 0
    try:
        importlib.import_module(words[0]).main(words[1:])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    counter.write_text(str(counted))
    return code


# Many starts ------------------------------------------------------------------------------------------------------


def left_by(out: Path) -> dict[str, str]:
    """Everything below ``out`` and its SHA-256. Not compared: the text of log.txt, which has dates and one more start
    for each kill, and the column `seconds` of the losses."""
    found = {}
    for path in sorted(out.rglob("*")):
        content = b"a folder"
        if path.is_file():
            content = b"" if path.name == "log.txt" else path.read_bytes()
        if path.parent.name == "loss_logs":
            content = b"\n".join(re.sub(rb'"seconds": [^,}]*', b"", line) for line in content.splitlines())
        found[str(path.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found


def begin(command: Command, folder: Path) -> None:
    shutil.rmtree(folder / "out", ignore_errors=True)
    if command.before:
        run(Command(list(command.before), 0), folder)


def differences(truth: dict[str, str], found: dict[str, str]) -> str:
    names = sorted(name for name in truth.keys() | found.keys() if truth.get(name) != found.get(name))
    how = {True: "differs", False: "missing"}
    return ", ".join(f"{name} ({how[name in found] if name in truth else 'too much'})" for name in names)


def kill_and_continue(command: Command, folder: Path, whole: Outcome, draw: random.Random) -> tuple[list[str], str]:
    """-> the kills, in words, and what is wrong after them: "" where the command ended well."""
    begin(command, folder)
    kills: list[str] = []
    while True:
        moment: dict = {}
        if not kills or draw.random() < 0.25:
            busy = [(rank, most) for rank, most in enumerate(whole.changes) if most]
            if command.launched or not busy or draw.random() < 0.5:
                # Most in the second half, which for a real start is the working part.
                low = 0.5 * whole.seconds if command.launched and draw.random() < 0.75 else 0
                moment = {"seconds": draw.uniform(low, whole.seconds)}
            else:
                rank, most = draw.choice(busy)
                moment = {"rank": rank, "change": draw.randint(1, most)}
        outcome = run(command, folder, **moment)
        if outcome.code < 0:
            kills.append(", ".join(f"{name} {value:.4g}" for name, value in moment.items()))
        elif outcome.code:
            return kills, f"exit code {outcome.code}: {(folder / 'told').read_text()[-600:]}"
        elif kills:
            return kills, ""
        else:  # it was done before the moment came
            begin(command, folder)


def attack(name: str, command: Command, folder: Path, count: int, seed: int) -> tuple[int, int]:
    """-> how many kills, and how many of the commands did not continue to the same bits."""
    truths = []
    for _ in range(2):
        begin(command, folder)
        whole = run(command, folder)
        if whole.code:
            raise SystemExit(f"{name}: fails undisturbed\n{(folder / 'told').read_text()[-3000:]}")
        truths.append(left_by(folder / "out"))
    if wrong := differences(*truths):
        raise SystemExit(f"{name}: undisturbed twice, and not the same: {wrong}")
    began, done, rounds, bad = time.monotonic(), 0, 0, 0
    while done < count:
        kills, wrong = kill_and_continue(command, folder, whole, random.Random(f"{seed} {name} {rounds}"))
        wrong = wrong or differences(truths[0], left_by(folder / "out"))
        if wrong:
            bad += 1
            kept = folder / f"bad-{name}-{rounds}".replace(" ", "-")
            shutil.copytree(folder / "out", kept, symlinks=True)
            print(
                f"BAD {name}, seed {seed}, round {rounds}, killed at {'; '.join(kills)}: {wrong}\n  {kept}", flush=True
            )
        done, rounds = done + len(kills), rounds + 1
    told = f"{rounds} commands, {bad} of them did not continue to the same bits"
    seconds = f"undisturbed {whole.seconds:.1f} s, {sum(whole.changes)} changes; {time.monotonic() - began:.0f} s"
    print(f"{name}: {done} kills of {told} ({len(truths[0])} names; {seconds})", flush=True)
    return done, bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--count", type=int, default=300, help="of kills in all, shared out among the commands")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.chdir(ROOT)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a killed launcher leaves running is found
    preload()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    os.environ["TMPDIR"] = str(folder)
    commands = prepare(folder)
    shares, kills, bad = sum(command.share for command in commands.values()), 0, 0
    for name, command in commands.items():
        if not args.words or any(word in name for word in args.words):
            found = attack(name, command, folder, math.ceil(args.count * command.share / shares), args.seed)
            kills, bad = kills + found[0], bad + found[1]
    print(f"in all: {kills} kills, {bad} commands did not continue to the same bits")
    if bad:
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
