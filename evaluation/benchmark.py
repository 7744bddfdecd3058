"""The cost of one cycle (`--ratio-update` estimator turns, one generator turn) at any size, precision, batch, device.

`python -m evaluation.benchmark --size SiT-B/2 --batch-size 8 --mixed-precision bf16 --output b2.json`
`python -m evaluation.benchmark --compare before.json after.json`

Any flag of a stage can be appended; `--encoder-type dinov2` times the ReFL stage. Weights are random, of the official
sizes. Phases are timed from outside, around the calls that the two turns make, so that what is timed is what trains;
on a GPU each phase ends with a synchronisation. The first cycle warms up and counts the FLOP; the best of the others
is reported. Utilisation = FLOP / (seconds x the matmul peak that this process measured).
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import platform
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from evaluation.standins import write_dinov2, write_vae
from train_cc import distill
from train_cc.arguments import build_parser, validate
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.write import library_versions, write_atomically
from train_cc.models import SIT_SIZES, SiT
from train_cc.parts import Run, build
from train_cc.run.session import COMPUTE_DTYPES, open_session

GIB = 2**30


class Stopwatch:
    """Seconds by phase, each phase's own: what runs inside another one is not counted twice."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._names, self._since = device, [], 0.0

    def _lap(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._names:
            self.seconds[self._names[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._lap()
        self._names.append(name)
        try:
            yield
        finally:
            self._lap()
            self._names.pop()

    def around(self, call: Callable, name: str, without_gradient: str | None = None) -> Callable:
        """``call`` as phase ``name``, or as ``without_gradient`` where autograd is off."""

        @functools.wraps(call)
        def timed(*args, **kwargs):
            with self.phase(name if torch.is_grad_enabled() else without_gradient or name):
                return call(*args, **kwargs)

        return timed


@contextlib.contextmanager
def phases_timed(run: Run, stopwatch: Stopwatch) -> Iterator[None]:
    """Put ``stopwatch`` around what the two turns call; all of it comes off again."""
    around = stopwatch.around
    replaced = [
        (run.generator, "forward", around(run.generator.forward, "generator forward", "sampling")),
        (run.estimator, "forward", around(run.estimator.forward, "estimator forward", "scoring")),
        (run.session.generator, "backward", around(run.session.generator.backward, "generator backward")),
        (run.session.estimator, "backward", around(run.session.estimator.backward, "estimator backward")),
        (distill, "update", around(distill.update, "optimizer")),
    ]
    if run.reward is not None:
        replaced.append((run, "reward", around(run.reward, "reward backward")))
        replaced += [
            (model, "forward", around(model.forward, name))
            for model, name in ((run.decode, "decoder"), (run.judges["reward"], "classifier"))
            if isinstance(model, nn.Module)
        ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class FlopCounter(TorchDispatchMode):
    """The FLOP of every operator that runs inside, by torch's formulas. (torch's own mode fails on autograd.grad.)"""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet in CPU_ATTENTION:  # not in torch's registry
            shapes = [each.shape for each in args if isinstance(each, torch.Tensor)]
            self.total += CPU_ATTENTION[packet](*shapes)
        return out


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop_count,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the fastest of some matrix products of SiT-XL's shapes, best of five."""
    best = 0.0
    for rows, inner, columns in ((256, 1152, 4608), (2048, 1152, 4608), (2048, 2048, 2048)):
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(columns, inner, device=device).to(dtype)
        for _ in range(5):
            stopwatch = Stopwatch(device)
            with stopwatch.phase("matmul"):
                torch.nn.functional.linear(a, b)
            best = max(best, 2 * rows * inner * columns / stopwatch.seconds["matmul"])
    return best


class PeakMemory:
    """Of this process (CPU: resident memory, libraries included) or of its GPU (allocated), in bytes."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"

    def reset(self) -> int:
        """Forget the peak so far. -> what is in use now."""
        gc.collect()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed, but kept for reuse, would hide what is needed next
        Path("/proc/self/clear_refs").write_text("5")
        return self._read("VmRSS")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._cuda else self._read("VmHWM")

    @staticmethod
    def _read(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def machine(device: torch.device) -> dict:
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
        name = f"{found[1] if found else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
        name += ", AMX" if cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text() else ", no AMX"
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "versions": library_versions()}


def write_random_inputs(folder: Path, size: str, reward: bool) -> list[str]:
    """Weights of the official sizes, random: a teacher and, for the reward, VAE and DINOv2-L. -> the flags for them."""
    config = SIT_SIZES[size]
    model = SiT(**config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "teacher")
    flags = ["--teacher", str(folder / "teacher"), "--output-dir", str(folder / "run"), "--num-previews", "0"]
    if reward:
        flags += ["--vae", str(write_vae(folder / "vae", (128, 256, 512, 512), 32))]
        backbone, head = write_dinov2(folder / "dinov2", width=1024, depth=24)
        flags += ["--dinov2-backbone", str(backbone), "--dinov2-head", str(head), "--dynamic-steps", "0"]
    return flags


def measure(run: Run, args: argparse.Namespace, cycles: int) -> dict:
    """One warm-up cycle with the FLOP counted, then ``cycles`` timed ones."""
    device, memory = run.session.device, PeakMemory(run.session.device)
    figures: dict = {"peak_memory_loading_gib": memory.peak() / GIB}
    if run.reward is not None:
        figures |= measure_reward(run, args, memory)
    memory.reset()
    with FlopCounter() as counter:
        distill.cycle(run, args, 0)
    figures["tflop_per_cycle"] = counter.total / 1e12
    measured = []
    for step in range(1, cycles + 1):
        stopwatch = Stopwatch(device)
        with phases_timed(run, stopwatch), stopwatch.phase("other"):
            distill.cycle(run, args, step)
        measured.append(dict(stopwatch.seconds))
    best = min(measured, key=lambda phases: sum(phases.values()))
    seconds = sum(best.values())
    peak = matmul_peak(device, COMPUTE_DTYPES[run.session.generator.mixed_precision])
    batch = args.batch_size * args.gradient_accumulation_steps * run.session.world_size
    figures |= {
        "peak_memory_gib": memory.peak() / GIB,
        "seconds_per_cycle": seconds,
        "seconds_of_all_cycles": [round(sum(phases.values()), 4) for phases in measured],
        "seconds_by_phase": dict(sorted(best.items(), key=lambda item: -item[1])),
        "samples_per_second": batch / seconds,
        "matmul_peak_tflops": peak / 1e12,
        "utilisation": figures["tflop_per_cycle"] * 1e12 / (seconds * peak),
    }
    return figures


def measure_reward(run: Run, args: argparse.Namespace, memory: PeakMemory) -> dict:
    """The reward branch alone, decoder and classifier forward and backward, and its memory above the weights."""
    x0 = torch.randn(args.batch_size, *run.sample_shape, device=run.session.device)
    y = torch.zeros(args.batch_size, dtype=torch.long, device=run.session.device)
    seconds, above = [], []
    for _ in range(3):
        before, stopwatch = memory.reset(), Stopwatch(run.session.device)
        with stopwatch.phase("reward"):
            run.reward(x0, y)
        seconds.append(stopwatch.seconds["reward"])
        above.append(memory.peak() - before)
    return {"reward_seconds": min(seconds), "reward_memory_gib": max(above) / GIB}


def compare(before: Path, after: Path) -> str:
    """A table of both, and after / before."""
    figures = []
    for path in (before, after):
        try:
            record = json.loads(path.read_text())
            figures.append(record["figures"] | {f"  {k}": v for k, v in record["figures"]["seconds_by_phase"].items()})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read as a benchmark's JSON: {error!r}") from error
    lines = [f"{'':28}{before.name:>20}{after.name:>20}{'ratio':>9}"]
    for name, value in figures[0].items():
        other = figures[1].get(name)
        if isinstance(value, float) and isinstance(other, float):
            ratio = f"{other / value:9.3f}" if value else ""
            lines.append(f"{name:28}{value:20.3f}{other:20.3f}{ratio}")
    return "\n".join(lines)


def benchmark_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", default="SiT-XL/2", choices=SIT_SIZES, help="random weights of this size")
    parser.add_argument("--cycles", type=int, default=3, help="timed cycles, after one that warms up")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two JSON files; runs nothing"
    )
    return parser


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    own, stage = benchmark_parser().parse_known_args(argv)
    if own.compare:
        print(compare(*own.compare))
        return
    if own.cycles < 1:
        raise InputError(f"--cycles is {own.cycles}; at least 1 is expected")
    if own.threads:
        torch.set_num_threads(own.threads)
    parser = build_parser("flags of a stage")
    asked = parser.parse_args(["--teacher", "-", "--output-dir", "-", *stage])
    validate(asked)  # before gigabytes are written
    session = open_session(asked.mixed_precision)
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_random_inputs(Path(folder), own.size, asked.encoder_type == "dinov2")
        args = parser.parse_args([*inputs, *stage])
        run = build(args, session)
    figures = measure(run, args, own.cycles)
    if session.is_main:
        record = {
            "command": ["python", "-m", "evaluation.benchmark", *(argv or sys.argv[1:])],
            "machine": machine(session.device),
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "precision": session.generator.mixed_precision,
            "size": own.size,
            "figures": figures,
        }
        text = json.dumps(record, indent=2) + "\n"
        if own.output:
            own.output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(own.output, text)
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
