"""Kills: SIGKILL at any moment of any command, and the same command continues to the same bits.

    OMP_NUM_THREADS=1 python -m tests.kills [WORD ...] [--count 300] [--seed 0]

A WORD picks the commands whose name contains it; without one, all. Each runs undisturbed twice: what it leaves then is
what a killed one must leave. Then it is killed, with all its processes, at a random moment or before a random change of
a name on the disk, and started again until it ends by itself; sometimes it is killed again before. Commands are forks
of this process, which has imported the libraries; "launched" ones are real starts of `scripts.launch`, of which
sometimes the launcher alone is killed and its processes end by themselves. The folders of what went wrong stay.
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

from evaluation.standins import write_vae
from tests import ROOT
from tests.conftest import flags, random_sit
from tests.mutation.run import preload
from tests.releases import repa_state
from train_cc.models.classifier import ImageClassifier

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}  # audit events; and `open` for writing
LONGEST = 300  # seconds of an undisturbed command

# In a command IN is the folder of what is read, OUT that of what is written; " ; " separates what runs before it.
COLD = "train_cc.cold_start " + " ".join(flags(Path("IN/teacher"), Path("OUT/run"), "--auto-resume"))
ROTATES = "--ema-decay 0.9 --keep-checkpoints 2 --max-train-steps 6"
EXPORTS = f"{COLD} --teacher IN/large --num-previews 0 --batch-size 1 --max-train-steps"
DMDR = f"{COLD.replace('cold_start', 'dmdr_refl')} {ROTATES} --dynamic-steps 0 --use-lora-gen --encoder-type classifier"
DMDR += " --reward-classifier IN/classifier --reward-weight 0.5 --resume-ckpt IN/run/checkpoints/torch_units/step-3.pt"
SMALL = "--batch-size 8 --max-train-steps 24 --checkpoint-steps 3"
TEACHER = f"train_cc.pretrain.teacher --output-dir OUT/teacher --hidden-size 32 --num-heads 2 --depth 2 {SMALL}"
GENERATE = "evaluation.generate --generator IN/teacher --output OUT/s.npz --num-images 60 --shard-size 8 --num-steps 4"
STATISTICS = "evaluation.statistics --images IN/reference.npz --space classifier:IN/classifier --output OUT/real.npz"
STATISTICS += " --shard-size 200"
EXPORT = "convert_weight.export_generator --output-dir OUT/generator --checkpoint IN/"
PIPELINE = f"{EXPORT}latents/checkpoints/torch_units/step-3.pt --pipeline OUT/pipeline"
CONVERT = "convert_weight.sit_convert --input IN/repa.pt --save-dir OUT --num-heads 4"
GIVEN = [
    f"{COLD} --output-dir IN/run --use-lora-gen --ema-decay 0.9",
    f"{COLD} --output-dir IN/latents --vae IN/vae --teacher IN/latent",
    "train_cc.pretrain.data --output IN/reference.npz",
    f"{GENERATE} --output IN/s.npz --num-images 300",
]
COMMANDS = {  # name -> its share of all kills, and its command
    "data": (15, "train_cc.pretrain.data --output OUT/deep/reference.npz"),
    "teacher": (25, TEACHER),
    "classifier": (20, f"train_cc.pretrain.classifier --output-dir OUT/classifier --image-size 32 {SMALL}"),
    "cold start": (40, f"{COLD} {ROTATES}"),
    "cold start, two processes": (20, f"{COLD} {ROTATES}"),
    "DMDR, LoRA": (20, DMDR),
    "DMDR, LoRA, two processes": (10, DMDR),
    "a run's export": (15, f"{EXPORTS} 1"),
    "a run's export over an older one": (15, f"{EXPORTS} 1 ; {EXPORTS} 2"),
    "generate": (20, f"{GENERATE} --png-dir OUT/png"),
    "generate, two processes": (8, GENERATE),
    "evaluate": (15, "evaluation.evaluate IN/s.npz IN/reference.npz --classifier IN/classifier --bootstrap 9 "
                     "--output OUT/r.json --picture OUT/r.png --overwrite"),
    "statistics": (20, STATISTICS),
    "statistics, two processes": (8, STATISTICS),
    "export_generator": (15, f"{EXPORT}run/checkpoints/torch_units/step-3.pt"),
    "export_generator and pipeline": (15, PIPELINE),
    "export_generator over an older one": (12, f"{PIPELINE} --weights raw ; {PIPELINE} --overwrite"),
    "sit_convert": (15, CONVERT),
    "sit_convert over an older one": (12, f"{CONVERT} ; {CONVERT} --overwrite"),
    "launched teacher": (4, TEACHER),
    "launched generate": (4, GENERATE),
    "launched cold start, two processes": (12, f"{COLD} {ROTATES}"),
    "launched statistics, two processes": (4, STATISTICS),
}  # fmt: skip


def prepare(folder: Path) -> None:
    """What the commands read."""
    torch.manual_seed(0)
    random_sit().save_pretrained(folder / "IN/teacher")
    random_sit(hidden_size=256, depth=4).save_pretrained(folder / "IN/large")
    random_sit(in_channels=4).save_pretrained(folder / "IN/latent")
    write_vae(folder / "IN/vae")
    network = ImageClassifier("test_efficientnet", num_classes=10, in_channels=1, image_size=32)
    network.save_pretrained(folder / "IN/classifier")
    torch.save({"ema": repa_state(hidden=256, depth=4, input_size=8, classes=10)}, folder / "IN/repa.pt")
    for command in GIVEN:
        if Start(folder, command).run().code:
            raise SystemExit(f"{command}\n{(folder / 'told').read_text()}")


# One start --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    code: int  # negative: killed
    seconds: float
    changes: list[int]  # of names on the disk, by process


@dataclass
class Start:
    """A command, to be killed after ``seconds``, or before change number ``change`` of process ``rank``."""

    folder: Path
    command: str
    processes: int = 1
    launched: bool = False
    seconds: float = LONGEST
    rank: int = 0
    change: int = 0
    launcher_alone: bool = False

    def run(self) -> Outcome:
        began, counts = time.monotonic(), [self.folder / f"changes-{i}" for i in range(self.processes)]
        for count in counts:
            count.write_text("0")
        words = [str(self.folder / word) if word.startswith(("IN/", "OUT")) else word for word in self.command.split()]
        words = [word.replace(":IN/", f":{self.folder}/IN/") for word in words]
        leader = self._launch(words) if self.launched else self._fork(words, counts)
        while (ended := os.waitpid(leader, os.WNOHANG)) == (0, 0) and time.monotonic() < began + self.seconds:
            time.sleep(0.001)
        took, left = time.monotonic() - began, psutil.Process().children(recursive=True)
        if self.launcher_alone and not ended[0]:
            os.kill(leader, signal.SIGKILL)
            _, left = psutil.wait_procs(left, timeout=60)
            if left:
                raise AssertionError(f"60 s after the launcher was killed, at {took:.1f} s, still run: {left}")
            return Outcome(-signal.SIGKILL, took, [])
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in left:
                process.send_signal(number)
        while psutil.Process().children():  # orphans are children of this process, see `main`
            pid, status = os.waitpid(-1, 0)
            ended = (pid, status) if pid == leader else ended
        code = os.waitstatus_to_exitcode(ended[1])
        if left and took < self.seconds and code >= 0:
            raise AssertionError(f"ended by {code} and left running: {left}")
        return Outcome(code, took, [int(count.read_text() or 0) for count in counts])

    def _launch(self, words: list[str]) -> int:
        environment = os.environ | {"NUM_PROCESSES": str(self.processes), "CUDA_VISIBLE_DEVICES": ""}
        with (self.folder / "told").open("w") as told:
            command = [sys.executable, "-m", "scripts.launch", *words]
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=told, stderr=told).pid

    def _fork(self, words: list[str], counts: list[Path]) -> int:
        """A fork that forks the processes and waits for them, in a group of their own. -> its id."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        if leader := os.fork():
            return leader
        os.setsid()
        with (self.folder / "told").open("w") as told:
            os.dup2(told.fileno(), 1), os.dup2(told.fileno(), 2)
        for i in range(self.processes):
            if not os.fork():
                if self.processes > 1:
                    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(self.processes))
                    os.environ |= meet | sizes | {"RANK": str(i), "LOCAL_RANK": str(i)}
                os._exit(work(words, self.folder / "OUT", counts[i], self.change if i == self.rank else 0))
        os._exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(self.processes)))


def work(words: list[str], out: Path, counter: Path, change: int) -> int:
    """Run a command in this process; killed before its change number ``change`` below ``out``. -> its exit code."""
    counted = 0

    def count(event: str, found: tuple) -> None:
        nonlocal counted
        writes = event == "open" and found[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in CHANGES) and str(found[0]).startswith(str(out)):
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
        content = path.read_bytes() if path.is_file() and path.name != "log.txt" else b""
        if path.parent.name == "loss_logs":
            content = re.sub(rb'"seconds": [^,}]*', b"", content)
        found[str(path.relative_to(out))] = "a folder" if path.is_dir() else hashlib.sha256(content).hexdigest()
    return found


def differences(truth: dict[str, str], found: dict[str, str]) -> str:
    names = sorted(name for name in truth.keys() | found.keys() if truth.get(name) != found.get(name))
    return ", ".join(f"{name} ({'left' if name not in truth else 'differs or is missing'})" for name in names)


class Attack:
    """The kills of one command. ``truth``: what it leaves undisturbed."""

    def __init__(self, name: str, folder: Path):
        *self.before, self.command = COMMANDS[name][1].split(" ; ")
        self.name, self.folder, self.truth = name, folder, None
        self.how = {"processes": 2 if "two processes" in name else 1, "launched": name.startswith("launched")}
        for _ in range(2):
            self.begin()
            self.whole = self.start()
            if self.whole.code:
                raise SystemExit(f"{name} fails undisturbed\n{(folder / 'told').read_text()[-3000:]}")
            found = left_by(folder / "OUT")
            if wrong := differences(self.truth or found, found):
                raise SystemExit(f"{name}: undisturbed twice, and not the same: {wrong}")
            self.truth = found

    def begin(self) -> None:
        shutil.rmtree(self.folder / "OUT", ignore_errors=True)
        for command in self.before:
            Start(self.folder, command).run()

    def start(self, **moment: float) -> Outcome:
        return Start(self.folder, self.command, **self.how, **moment).run()

    def moment(self, draw: random.Random) -> dict[str, float]:
        ranks = [(rank, most) for rank, most in enumerate(self.whole.changes) if most]
        if ranks and draw.random() < 0.5:
            rank, most = draw.choice(ranks)
            return {"rank": rank, "change": draw.randint(1, most)}
        # Most of the moments of a real start lie in its second half, where it works.
        low = 0.5 * self.whole.seconds if self.how["launched"] and draw.random() < 0.75 else 0
        alone = self.how["launched"] and self.how["processes"] > 1 and draw.random() < 0.3
        return {"seconds": draw.uniform(low, self.whole.seconds)} | ({"launcher_alone": True} if alone else {})

    def round(self, draw: random.Random) -> tuple[list[str], str]:
        """Kill and continue until the command ends by itself. -> the kills, and what is wrong then, or ""."""
        self.begin()
        kills: list[str] = []
        while True:
            moment = self.moment(draw) if not kills or draw.random() < 0.25 else {}
            outcome = self.start(**moment)
            if outcome.code < 0:
                kills.append(", ".join(f"{name} {value:.4g}" for name, value in moment.items()))
            elif outcome.code:
                return kills, f"exit code {outcome.code}: {(self.folder / 'told').read_text()[-600:]}"
            elif kills:
                return kills, differences(self.truth, left_by(self.folder / "OUT"))
            else:  # it was done before the moment came
                self.begin()

    def run(self, count: int, seed: int) -> tuple[int, int]:
        """-> how many kills, and after how many rounds of them something was wrong."""
        began, done, rounds, bad = time.monotonic(), 0, 0, 0
        while done < count:
            kills, wrong = self.round(random.Random(f"{seed} {self.name} {rounds}"))
            if wrong:
                bad += 1
                kept = self.folder / re.sub(r"\W+", "-", f"bad {self.name} {rounds}")
                shutil.copytree(self.folder / "OUT", kept, symlinks=True)
                print(f"WRONG: {self.name}, round {rounds} of seed {seed}, killed at {'; '.join(kills)}: {wrong}")
                print(f"  {kept}", flush=True)
            done, rounds = done + len(kills), rounds + 1
        told = f"undisturbed {self.whole.seconds:.1f} s and {sum(self.whole.changes)} changes, {len(self.truth)} names"
        took = f"{time.monotonic() - began:.0f} s"
        print(f"{self.name}: {done} kills in {rounds} rounds, {bad} wrong; {told}; {took}", flush=True)
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
    os.environ["TMPDIR"] = str(folder)  # a killed launcher leaves its folder of messages there
    prepare(folder)
    shares, kills, bad = sum(share for share, _ in COMMANDS.values()), 0, 0
    for name in COMMANDS:
        if not args.words or any(word in name for word in args.words):
            found = Attack(name, folder).run(math.ceil(args.count * COMMANDS[name][0] / shares), args.seed)
            kills, bad = kills + found[0], bad + found[1]
    print(f"in all: {kills} kills, {bad} rounds wrong")
    if bad:
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
