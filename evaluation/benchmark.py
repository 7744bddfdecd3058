"""The cost of one cycle (`--ratio-update` estimator turns, one generator turn) at any size, precision, batch, device.

`python -m evaluation.benchmark --size SiT-B/2 --batch-size 8 --mixed-precision bf16 --output b2.json`
`python -m evaluation.benchmark --compare before.json after.json`

Any flag of a stage can be appended; `--encoder-type dinov2` times the ReFL stage. Weights are random, of the official
sizes. Phases are timed from outside, by hooks of networks and optimizers, so that what is timed is what trains;
on a GPU each phase ends with a synchronisation. The first cycle counts the FLOP, uncompiled; the second compiles and
warms up; the best of the others is reported. Utilisation = FLOP / (seconds x the matmul peak that this process
measured).

`--fp16-range` prints, in place of times, the largest activation and gradient of each layer in one cycle of the run
that the flags of a stage describe (`--teacher` and so on, with real weights), and if fp16 bears them.
"""
# ruff: noqa: E402

from train_cc.io.threads import share_cores

share_cores()  # OpenMP reads what it is told when torch is imported
# isort: split

import argparse
import contextlib
import ctypes
import gc
import json
import platform
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.standins import write_dinov2, write_vae
from train_cc.distillation import loop
from train_cc.distillation.run import Run
from train_cc.io import fields
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.products import check_output_file, library_versions, write_atomically
from train_cc.io.read import parsing, printable, read_json
from train_cc.models.backbone import SIZES, new_network
from train_cc.models.estimator import MARGIN, Seen, watched
from train_cc.rewards.terms import rewards_at_x0
from train_cc.run.meters import FlopCounter
from train_cc.run.session import COMPUTE_DTYPES, open_session
from train_cc.setup.arguments import build_parser, validate
from train_cc.setup.build import build

GIB = 2**30
LIMIT = torch.finfo(torch.float16).max / MARGIN  # NaN is beyond it too
NO_TEACHER = Path("-")  # random weights of --size


# Measuring -------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds by phase. A phase lasts until the next one begins."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._phase, self._since = device, "", 0.0

    def begin(self, phase: str) -> None:
        """``phase`` is "" for what is not timed."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now


@contextlib.contextmanager
def phases_watched(run: Run, stopwatch: Stopwatch) -> Iterator[None]:
    """Time the phases of ``run`` inside.

    A backward begins with the gradient of its network's output and ends with the optimizer's step or the next network:
    reductions and clipping count with it.
    """
    hooks = []

    def watch(network: nn.Module, forward: str, without_gradient: str, backward: str) -> None:
        def enter(network: nn.Module, inputs: tuple) -> None:
            stopwatch.begin(forward if torch.is_grad_enabled() else without_gradient)

        def leave(network: nn.Module, inputs: tuple, out: Tensor) -> None:
            stopwatch.begin("other")
            if out.requires_grad:
                out.register_hook(lambda gradient: stopwatch.begin(backward))

        hooks.extend([network.register_forward_pre_hook(enter), network.register_forward_hook(leave)])

    watch(run.generator, "generator forward", "sampling", "generator backward")
    watch(run.estimator, "estimator forward", "scoring", "estimator backward")
    if run.rewards:
        for name, judge in run.judges.items():
            if name.startswith("reward_"):
                watch(judge, "classifier", "classifier", "reward backward")
        if isinstance(run.decode, nn.Module):
            watch(run.decode, "decoder", "decoder", "reward backward")
    for optimizer in (run.generator_optimizer.optimizer, run.estimator_optimizer.optimizer):
        hooks.append(optimizer.register_step_pre_hook(lambda *arguments: stopwatch.begin("optimizer")))
        hooks.append(optimizer.register_step_post_hook(lambda *arguments: stopwatch.begin("other")))
    stopwatch.begin("other")
    yield
    stopwatch.begin("")
    for hook in hooks:
        hook.remove()


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the fastest of some matrix products, best of five.

    On a GPU ten products of 8192 between two synchronisations: small ones would time their launch.
    """
    gpu, best = device.type != "cpu", 0.0
    times = 10 if gpu else 1
    of_sit_xl = ((256, 1152, 4608), (2048, 1152, 4608), (2048, 2048, 2048))
    for rows, inner, columns in ((8192, 8192, 8192),) if gpu else of_sit_xl:
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(columns, inner, device=device).to(dtype)
        for _ in range(5):
            stopwatch = Stopwatch(device)
            stopwatch.begin("matmul")
            for _ in range(times):
                torch.nn.functional.linear(a, b)
            stopwatch.begin("")
            best = max(best, times * 2 * rows * inner * columns / stopwatch.seconds["matmul"])
    return best


# Memory: bytes of this process (CPU: resident memory, libraries included) or of its GPU (allocated).
def reset_memory(device: torch.device) -> int:
    """Forget the peak so far. Return what is in use now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed, but kept for reuse, would hide what is needed next
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")


def resident(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def machine(device: torch.device) -> dict:
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        match = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
        name = f"{match[1] if match else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
        name += ", AMX" if cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text() else ", no AMX"
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "versions": library_versions()}


def write_random_inputs(folder: Path, size: str, reward: bool) -> list[str]:
    """Weights of the official sizes, random: a teacher and, for the reward, VAE and DINOv2-L. -> the flags for them."""
    model = new_network(SIZES[size])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "teacher")
    words = ["--teacher", str(folder / "teacher"), "--output-dir", str(folder / "run"), "--num-previews", "0"]
    if reward:
        words += ["--vae", str(write_vae(folder / "vae", (128, 256, 512, 512), 32))]
        backbone, head = write_dinov2(folder / "dinov2", width=1024, depth=24)
        words += ["--dinov2-backbone", str(backbone), "--dinov2-head", str(head), "--dynamic-steps", "0"]
    return words


def measure(run: Run, args: argparse.Namespace, cycles: int) -> dict:
    """A cycle with the FLOP counted, which is not compiled; one that compiles; then ``cycles`` timed ones."""
    device = run.session.device
    figures: dict = {"peak_memory_loading_gib": peak_memory(device) / GIB}
    if run.rewards:
        figures |= measure_reward(run, args)
    with torch.compiler.set_stance("force_eager"), FlopCounter() as counter:
        loop.cycle(run, 0)
    figures["tflop_per_cycle"] = counter.total / 1e12
    loop.cycle(run, 1)
    reset_memory(device)
    measured = []
    for step in range(2, cycles + 2):
        stopwatch = Stopwatch(device)
        with phases_watched(run, stopwatch):
            loop.cycle(run, step)
        measured.append(dict(stopwatch.seconds))
    figures["peak_memory_gib"] = peak_memory(device) / GIB
    best = min(measured, key=lambda phases: sum(phases.values()))
    seconds = sum(best.values())
    peak = matmul_peak(device, COMPUTE_DTYPES[run.session.generator_accelerator.mixed_precision])
    batch = args.batch_size * args.gradient_accumulation_steps * run.session.world_size
    figures |= {
        "seconds_per_cycle": seconds,
        "seconds_of_all_cycles": [round(sum(phases.values()), 4) for phases in measured],
        "seconds_by_phase": dict(sorted(best.items(), key=lambda item: -item[1])),
        "samples_per_second": batch / seconds,
        "matmul_peak_tflops": peak / 1e12,
        "utilisation": figures["tflop_per_cycle"] * 1e12 / (seconds * peak),
    }
    return figures


def measure_reward(run: Run, args: argparse.Namespace) -> dict:
    """The reward branch only, decoder and classifier forward and backward, and its memory above the weights."""
    device = run.session.device
    x0 = torch.randn(args.batch_size, *run.sample_shape, device=device)
    y = torch.zeros(args.batch_size, dtype=torch.long, device=device)
    seconds, above = [], []
    for _ in range(3):
        before, stopwatch = reset_memory(device), Stopwatch(device)
        stopwatch.begin("reward")
        rewards_at_x0(run.rewards, run.decode, x0, y, run.reward_micro_batch)
        stopwatch.begin("")
        seconds.append(stopwatch.seconds["reward"])
        above.append(peak_memory(device) - before)
    return {"reward_seconds": min(seconds), "reward_memory_gib": max(above) / GIB}


def read_benchmark(path: Path) -> dict[str, float]:
    """The figures of a benchmark's JSON, those of its phases among them. Raises `InputError`."""
    expected = "a benchmark's JSON"
    content = read_json(path, expected)
    with parsing(path, expected, "cannot be read"):
        figures = content["figures"]
        flat = {name: value for name, value in figures.items() if isinstance(value, float)}
        return flat | {f"  {name}": float(value) for name, value in figures["seconds_by_phase"].items()}


def compare(before: Path, after: Path) -> str:
    """A table of both, and after / before."""
    old, new = read_benchmark(before), read_benchmark(after)
    lines = [f"{'':28}{before.name:>20}{after.name:>20}{'ratio':>9}"]
    for name in (name for name in old if name in new):
        ratio = f"{new[name] / old[name]:9.3f}" if old[name] else ""
        lines.append(f"{name:28}{old[name]:20.3f}{new[name]:20.3f}{ratio}")
    return "\n".join(map(printable, lines))


# The range of fp16 ------------------------------------------------------------------------------------------------


def fp16_range(args: argparse.Namespace) -> str:
    """A table of the largest activation and gradient of each layer in one cycle, uncompiled and in a wider range."""
    if args.teacher == NO_TEACHER:
        raise InputError("--fp16-range is of real weights: give --teacher, and the other flags of the run")
    wider = {"auto": "bf16" if torch.cuda.is_available() else "no", "fp16": "bf16"}
    session = open_session(wider.get(args.mixed_precision, args.mixed_precision))
    run = build(argparse.Namespace(**vars(args) | {"compile": False}), session)
    networks = {"generator": run.plain_generator, "estimator": run.plain_estimator.network, **run.judges}
    networks |= {"decoder": run.decode} if isinstance(run.decode, nn.Module) else {}
    networks |= {f"features of {name}": memory.features_of for name, memory in run.memories.items()}
    with contextlib.ExitStack() as stack:
        ranges = {name: stack.enter_context(watched(network)) for name, network in networks.items()}
        loop.cycle(run, 0)
    where = run.plain_estimator.overflowing_block(torch.float16, session.device)
    of_classes = f"overflows in {where}: --mixed-precision bf16" if where else "is within a quarter of fp16's range"
    lines = [f"{'network':24}{'layer':28}{'activation':>12}{'gradient':>12}"]
    summary = []
    for name, both in ranges.items():
        activations, gradients = map(by_place, both)
        lines += [
            f"{name:24}{where:28}{value:12.4g}{gradients.get(where, 0.0):12.4g}{'' if value < LIMIT else '  beyond'}"
            for where, value in activations.items()
        ]
        summary.append(verdict(name, activations, gradients))
    return "\n".join([*lines, "", *summary, f"the teacher, on samples of several classes, {of_classes}"])


def by_place(ranges: Seen) -> dict[str, float]:
    largest: dict[str, float] = {}
    for where, value in ranges:
        largest[where] = max(value.item(), largest.get(where, 0.0), key=lambda x: (x != x, x))  # NaN stays
    return largest


def verdict(name: str, activations: dict[str, float], gradients: dict[str, float]) -> str:
    beyond = [where for where, value in activations.items() if not value < LIMIT]
    words = f"fp16 does not bear {', '.join(beyond)}: --mixed-precision bf16" if beyond else "fp16 bears it"
    largest = max(gradients.values(), default=0.0)
    scale = f"; its gradients bear a further scale of {LIMIT / largest:.3g}" if largest else ""
    return f"{name}: {words} (a factor of {MARGIN:g} is kept){scale}"


OF_SD_VAE = [name for name, config in SIZES.items() if "in_channels" not in config]


def benchmark_parser() -> fields.Parser:
    parser = fields.Parser(description=__doc__)
    parser.add_argument("--size", default="SiT-XL/2", choices=OF_SD_VAE, help="random weights of this size")
    parser.add_argument("--cycles", type=fields.integer(1, 10_000), default=3, help="timed, after two that warm up")
    parser.add_argument("--threads", type=fields.integer(1, 4096), help="CPU threads")
    parser.add_argument("--output", type=fields.output_file, help="JSON file")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument(
        "--fp16-range", action="store_true", help="largest activations and gradients of a run, against fp16's range"
    )
    parser.add_argument(
        "--compare", type=fields.path, nargs=2, metavar=("BEFORE", "AFTER"), help="two JSON files; runs nothing"
    )
    return parser


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    own, stage = benchmark_parser().parse_known_args(argv)
    if own.compare:
        print(compare(*own.compare))
        return
    if own.output:
        check_output_file(own.output, own.overwrite)
    if own.threads:
        torch.set_num_threads(own.threads)
    parser = build_parser("flags of a stage")
    stage_args = parser.parse_args(["--teacher", str(NO_TEACHER), "--output-dir", "-", "--num-previews", "0", *stage])
    validate(stage_args)  # before gigabytes are written
    if own.fp16_range:
        print(fp16_range(stage_args))
        return
    session = open_session(stage_args.mixed_precision)
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_random_inputs(Path(folder), own.size, stage_args.encoder_type == "dinov2")
        args = parser.parse_args([*inputs, *stage])
        run = build(args, session)
    figures = measure(run, args, own.cycles)
    if not session.is_main:
        return
    print(json.dumps(figures, indent=2))
    if own.output:
        record = {
            "command": ["python", "-m", "evaluation.benchmark", *(sys.argv[1:] if argv is None else argv)],
            "size": own.size,
            "arguments": {name: str(value) for name, value in vars(stage_args).items()},
            "machine": machine(session.device),
            "precision": session.generator_accelerator.mixed_precision,
            "figures": figures,
        }
        own.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(own.output, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
