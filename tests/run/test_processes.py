"""Several processes over gloo: DDP and FSDP2 train what one process trains, and checkpoints know no layout.

One start of the processes serves many runs: this file is also the program that they run.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from tests import ROOT
from tests.conftest import flags, logged, random_sit, refused, run_cold_start
from train_cc import cold_start, dmdr_refl
from train_cc.distillation import loop
from train_cc.io.errors import InputError
from train_cc.models import SiT
from train_cc.run.session import open_session
from train_cc.samplers import few_step_input
from train_cc.setup import stage
from train_cc.setup.build import configure_compiler

STAGES = {"cold_start": cold_start, "dmdr_refl": dmdr_refl}
# Adam divides by the root of the second moment: an epsilon far below the gradients would make a rounding of almost zero
# a step of full size.
PARITY = ["--batch-size", 2, "--adam-epsilon", 1e-4, "--checkpoint-steps", 100, "--num-previews", 0, "--ema-decay", 0.9]


def worker(jobs: list[dict], report: Path) -> None:
    """Run ``jobs`` one after another; write how much of what each trained was sharded, and bytes held."""
    held = []
    train = stage.train

    def measured(run):
        train(run)
        held.append(layout(run))

    stage.train = measured
    for job in jobs:
        if job.get("fails"):
            loop.generator_turn = failing(loop.generator_turn, job["fails"])
        os.environ["ACCELERATE_USE_FSDP"] = "true" if job["sharded"] else "false"
        if "of_node" in job:  # as if these processes were on several machines
            os.environ["LOCAL_WORLD_SIZE"] = str(job["of_node"])
        STAGES[job["stage"]].main(job["flags"])
    if os.environ["RANK"] == "0":
        report.write_text(json.dumps(held))


def failing(turn, how):
    """``turn``, which fails at the third update in process 1 alone: with an error or with a loss that is nan."""

    def failing_turn(run, step):
        fails = step == 2 and run.session.rank == 1
        if fails and how == "error":
            raise InputError("process 1 has lost its GPU")
        figures = turn(run, step)
        return figures | {"loss_dmd": figures["loss_dmd"] * (float("nan") if fails else 1)}

    return failing_turn


def layout(run) -> dict:
    parameters = [p for model in (run.generator, run.estimator) for p in model.parameters()]
    states = [
        tensor
        for optimizer in (run.generator_optimizer, run.estimator_optimizer)
        for state in optimizer.state.values()
        for tensor in state.values()
    ]
    ema = list(run.ema.values.values()) if run.ema else []
    tensors = [*parameters, *(tensor for tensor in states if tensor.ndim), *ema]
    sharded = [isinstance(tensor, torch.distributed.tensor.DTensor) for tensor in tensors]
    local = [tensor.to_local() if is_sharded else tensor for tensor, is_sharded in zip(tensors, sharded, strict=True)]
    gradients = sum(tensor.nbytes for tensor, p in zip(local, parameters, strict=False) if p.requires_grad)
    patience = dist.distributed_c10d._get_default_group()._get_backend(parameters[0].device).options._timeout
    return {
        "sharded": sum(sharded),
        "of": len(tensors),
        "mesh": [*tensors[0].device_mesh.shape] if sharded[0] else [],
        "bytes": sum(tensor.nbytes for tensor in local) + gradients,
        "hours": patience.total_seconds() / 3600,
    }


def job(teacher, output, *more, stage="cold_start", sharded=False) -> dict:
    return {"stage": stage, "sharded": sharded, "flags": flags(teacher, output, *more)}


def processes(tmp_path, *jobs: dict, count: int = 2) -> list[dict]:
    """Run ``jobs`` in ``count`` processes. -> what each held."""
    report = tmp_path / "report.json"
    done = run_processes(jobs, report, count)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "terminate called" not in done.stderr, done.stderr[-4000:]
    held = json.loads(report.read_text())
    assert {each["hours"] for each in held} == {6}
    return held


def run_processes(jobs: Iterable[dict], report: Path, count: int = 2) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.launch", "tests.run.test_processes", json.dumps(jobs), str(report)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUM_PROCESSES": str(count), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def units(run: Path, step: int) -> Path:
    return run / "checkpoints" / "torch_units" / f"step-{step}.pt"


def weights(run: Path, step: int, ema: bool = True) -> dict[str, torch.Tensor]:
    root = run / "checkpoints"
    files = ["accelerator_1/step-{}/generator", "accelerator_2/step-{}/estimator_lora"]
    files += ["accelerator_1/step-{}/ema"] if ema else []
    return {
        f"{file}/{name}": value
        for file in files
        for name, value in load_file(root / f"{file.format(step)}.safetensors").items()
    }


def largest_difference(a: Path, b: Path, step: int, ema: bool = True) -> float:
    first, second = weights(a, step, ema), weights(b, step, ema)
    assert first.keys() == second.keys() and len(first) > 30
    return max((first[name] - second[name]).abs().max().item() for name in first)


def numbers(row: dict) -> dict[str, float]:
    """A log row without the bands of t in which its batch had no sample."""
    return {name: value for name, value in row.items() if value is not None}


def assert_same_row(one: dict, other: dict) -> None:
    """A cosine is a sum that cancels: its rounding is of the size of 1, not of its own."""
    a, b = numbers(one), numbers(other)
    cosines = {name for name in a if "cosine" in name}
    assert a.keys() == b.keys()
    assert [a[name] for name in sorted(cosines)] == pytest.approx(
        [b[name] for name in sorted(cosines)], rel=0, abs=1e-5
    )
    left = [{name: value for name, value in row.items() if name not in cosines} for row in (a, b)]
    assert left[0] == pytest.approx(left[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_two_processes_train_what_one_does_with_two_accumulated_batches(teacher, tmp_path, reward_folder, real, steps):
    """Both stages, DDP and FSDP2: after 4 or 20 generator updates all weights agree to 1e-6; so do the logs."""
    accumulated = [*PARITY, "--gradient-accumulation-steps", 2]
    cold = run_cold_start(teacher, tmp_path / "one", *accumulated, "--max-train-steps", steps)
    reward = ["--encoder-type", "classifier", "--reward-classifier", reward_folder, "--resume-ckpt", units(cold, steps)]
    reward += ["--max-train-steps", 2 * steps, "--dynamic-steps", 0]
    dmdr_refl.main(flags(teacher, tmp_path / "one_dmdr", *accumulated, *reward))
    jobs = []
    for kind in ("ddp", "fsdp2"):
        sharded = kind == "fsdp2"
        jobs.append(job(teacher, tmp_path / kind, *PARITY, "--max-train-steps", steps, sharded=sharded))
        jobs.append(job(teacher, tmp_path / f"{kind}_dmdr", *PARITY, *reward, stage="dmdr_refl", sharded=sharded))
    # Rewards of a distribution and tilts see the samples of all processes.
    of_all = ["--reward", "frechet", 1, real, "--frechet-window", 64, "--tilt", 1, "classifier", reward_folder]
    of_all = [*of_all, "--max-train-steps", steps]
    whole = run_cold_start(teacher, tmp_path / "one_of_all", *accumulated, *of_all)
    for kind in ("ddp", "fsdp2"):
        jobs.append(job(teacher, tmp_path / f"{kind}_of_all", *PARITY, *of_all, sharded=kind == "fsdp2"))
    # Accumulation within each process: gradients are reduced in the last chunk alone.
    both = [*PARITY, "--batch-size", 1, "--max-train-steps", 2]
    four = run_cold_start(teacher, tmp_path / "four", *both, "--gradient-accumulation-steps", 4)
    for kind in ("ddp", "fsdp2"):
        words = [*both, "--gradient-accumulation-steps", 2]
        jobs.append(job(teacher, tmp_path / f"{kind}_twice", *words, sharded=kind == "fsdp2"))
    held = processes(tmp_path, *jobs)
    assert [each["sharded"] for each in held[:2]] == [0, 0]
    assert all(each["sharded"] == each["of"] > 100 for each in held[2:4])
    for kind in ("ddp", "fsdp2"):
        assert largest_difference(four, tmp_path / f"{kind}_twice", 2) < 1e-6
        assert largest_difference(whole, tmp_path / f"{kind}_of_all", steps) < 1e-6
        for one, other in zip(logged(whole), logged(tmp_path / f"{kind}_of_all"), strict=True):
            assert_same_row(one, other)
    assert logged(whole)[3]["grad_norm_reward_frechet_x0"] > 0
    start = load_file(teacher / "diffusion_pytorch_model.safetensors")
    moved = load_file(cold / "generator" / "diffusion_pytorch_model.safetensors")
    assert max((start[name] - moved[name]).abs().max().item() for name in start) > 1e-4
    for kind in ("ddp", "fsdp2"):
        assert largest_difference(tmp_path / "one", tmp_path / kind, steps) < 1e-6
        assert largest_difference(tmp_path / "one_dmdr", tmp_path / f"{kind}_dmdr", 2 * steps) < 1e-6
        for one, other in zip(logged(tmp_path / "one_dmdr"), logged(tmp_path / f"{kind}_dmdr"), strict=True):
            assert_same_row(one, other)
        SiT.from_pretrained(tmp_path / kind / "generator")


def test_a_checkpoint_changes_layout(teacher, tmp_path):
    """Written by DDP, FSDP2 or one process, continued by another: the same figures as never having changed."""
    two = ["--batch-size", 2, "--adam-epsilon", 1e-4, "--ema-decay", 0.9, "--num-previews", 1]
    one = [*two, "--gradient-accumulation-steps", 2]
    straight = run_cold_start(teacher, tmp_path / "straight", *one, "--max-train-steps", 4)
    start = run_cold_start(teacher, tmp_path / "start", *one, "--max-train-steps", 2)

    def more(source):
        return [*two, "--max-train-steps", 4, "--resume-ckpt", units(source, 2)]

    processes(
        tmp_path,
        job(teacher, tmp_path / "one_to_fsdp2", *more(start), sharded=True),
        job(teacher, tmp_path / "fsdp2", *two, "--max-train-steps", 2, sharded=True),
        job(teacher, tmp_path / "fsdp2_to_ddp", *more(tmp_path / "fsdp2")),
        job(teacher, tmp_path / "ddp", *two, "--max-train-steps", 2),
        job(teacher, tmp_path / "ddp_to_fsdp2", *more(tmp_path / "ddp"), sharded=True),
    )
    for kind in ("ddp", "fsdp2"):
        words = [*one, "--max-train-steps", 4, "--resume-ckpt", units(tmp_path / kind, 2)]
        run_cold_start(teacher, tmp_path / f"{kind}_to_one", *words)
    for changed in ("one_to_fsdp2", "fsdp2_to_ddp", "ddp_to_fsdp2", "ddp_to_one", "fsdp2_to_one"):
        assert largest_difference(straight, tmp_path / changed, 4) < 1e-6, changed
        for row, other in zip(logged(straight)[2:], logged(tmp_path / changed), strict=True):
            assert_same_row(row, other)
        exported = [
            load_file(run / "generator" / "diffusion_pytorch_model.safetensors")
            for run in (straight, tmp_path / changed)
        ]
        for name, value in exported[0].items():
            torch.testing.assert_close(value, exported[1][name], rtol=0, atol=1e-6)


def test_a_failed_process_ends_all_with_its_error_and_the_last_checkpoint_stays(teacher, tmp_path):
    began = time.monotonic()
    done = run_processes(
        [job(teacher, tmp_path / "run", "--max-train-steps", 5) | {"fails": "error"}], tmp_path / "report"
    )
    assert done.returncode == 2 and time.monotonic() - began < 90  # a minute, and the start of two processes
    assert done.stderr.count("error: process 1 has lost its GPU") == 1 and "Traceback" not in done.stderr
    resumed = run_cold_start(teacher, tmp_path / "run", "--max-train-steps", 3, "--auto-resume")
    assert "continues from" in (resumed / "log.txt").read_text()
    assert [row["step"] for row in logged(resumed)] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--use-lora-gen", "--num-steps", 2],
        ["--gradient-checkpointing", "--real-guidance-scale", 1.5, "--real-guidance-interval", 0, 0.5],
        ["--reward-micro-batch", 1, "--reward-checkpointing", "--encoder-type", "classifier"],
    ],
    ids=str,
)
def test_variants_sharded_and_accumulated_train_what_one_process_does(teacher, tmp_path, reward_folder, more):
    """2 processes x 2 accumulated x 2 samples against 1 x 4 x 2."""
    words = [*PARITY, *more, "--max-train-steps", 4]
    if "--encoder-type" in more:
        words += ["--reward-classifier", reward_folder]
    one = run_cold_start(teacher, tmp_path / "one", *words, "--gradient-accumulation-steps", 4)
    twice = [*words, "--gradient-accumulation-steps", 2]
    held = processes(
        tmp_path,
        job(teacher, tmp_path / "ddp", *twice),
        job(teacher, tmp_path / "fsdp2", *twice, sharded=True),
    )
    assert held[1]["sharded"] == held[1]["of"] > 50
    for kind in ("ddp", "fsdp2"):
        assert largest_difference(one, tmp_path / kind, 4) < 1e-6


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all(teacher, tmp_path):
    done = run_processes([job(teacher, tmp_path / "run", "--max-train-steps", 5) | {"fails": "nan"}], tmp_path / "r")
    assert done.returncode == 2 and done.stderr.count("loss_dmd is nan") == 1 and "Traceback" not in done.stderr
    assert units(tmp_path / "run", 2).exists() and not units(tmp_path / "run", 3).exists()


@pytest.mark.slow
def test_ten_kills_of_one_of_two_processes(teacher, tmp_path):
    """The job ends by itself within a minute; the same command continues it, to the bits of the uninterrupted one."""
    more = ["--max-train-steps", 60, "--checkpoint-steps", 1, "--ema-decay", 0.9, "--keep-checkpoints", 2]
    command = [sys.executable, "-m", "scripts.launch", "train_cc.cold_start"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUM_PROCESSES": "2", "CUDA_VISIBLE_DEVICES": ""}

    def start(output):
        words = [*command, *flags(teacher, output, *more, "--auto-resume")]
        return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    straight, run, generator = tmp_path / "straight", tmp_path / "run", random.Random(0)
    assert start(straight).wait() == 0
    kills, told = 0, []
    while kills < 10:
        process = start(run)
        time.sleep(generator.uniform(6, 14))
        ranks = psutil.Process(process.pid).children() if process.poll() is None else []
        if len(ranks) == 2:
            generator.choice(ranks).kill()
            began = time.monotonic()
            code = process.wait(timeout=60)
            kills += code != 0
            steps = sorted(int(path.stem[5:]) for path in (run / "checkpoints" / "torch_units").glob("*.pt"))
            told.append((round(time.monotonic() - began, 1), steps[-1] if steps else None))
        process.wait()
        if (run / "generator").exists():  # it had finished: once more from the beginning
            shutil.rmtree(run)
    print("seconds to the end, last checkpoint:", told)
    assert start(run).wait() == 0
    first, second = weights(straight, 60), weights(run, 60)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert logged(straight) == logged(run)


def test_sharded_state_is_half_in_each_of_two_processes(tmp_path):
    """Parameters, gradients and moments; what is rounded up to whole rows hardly counts."""
    random_sit(hidden_size=64).save_pretrained(tmp_path / "sit")
    more = ["--max-train-steps", 1]
    jobs = [job(tmp_path / "sit", tmp_path / kind, *more, sharded=kind == "fsdp2") for kind in ("ddp", "fsdp2")]
    whole, half = processes(tmp_path, *jobs)
    assert half["bytes"] <= 0.55 * whole["bytes"]


def test_compile_reaches_the_blocks_of_both_networks(teacher, tmp_path, monkeypatch):
    """The graphs without their compiler, which takes minutes: the slow test has it."""
    compiled = []

    def compile_eagerly(block):
        compiled.append(type(block).__name__)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager")

    plain = logged(run_cold_start(teacher, tmp_path / "plain", "--max-train-steps", 1))
    monkeypatch.setattr("train_cc.setup.build.require_compiler", lambda: None)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    torch._dynamo.utils.counters.clear()
    other = logged(run_cold_start(teacher, tmp_path / "compiled", "--max-train-steps", 1, "--compile"))
    assert len(compiled) == 4 and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert numbers(plain[0]) == pytest.approx(numbers(other[0]), rel=1e-3, abs=1e-5)


# Wrong input


def test_a_compiled_block_under_ddp_is_one_graph():
    """Whatever DDP's buckets are; the blocks share it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = random_sit(hidden_size=256, num_heads=4)  # a block is larger than a bucket
    for block in model.blocks:
        block.compile(backend=backend)
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.long)
    with (
        torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True),
        torch._inductor.config.patch(combo_kernels=False, benchmark_combo_kernel=False),
    ):
        torch._dynamo.reset()
        configure_compiler()
        assert torch._dynamo.config.recompile_limit > 8
        assert torch._inductor.config.combo_kernels and torch._inductor.config.benchmark_combo_kernel
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        try:
            DistributedDataParallel(model, bucket_cap_mb=1)(x, t, y).sum().backward()
        finally:
            dist.destroy_process_group()
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "variables,told",
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "accelerate config says mixed_precision fp16, --mixed-precision no"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"NUM_PROCESSES": "2"}, "NUM_PROCESSES is 2, but 1 process"),
        ({"NUM_PROCESSES": "two"}, "NUM_PROCESSES is two"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION is fp8; allowed"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED is true, which is not done here"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM is true, which is not done here"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "compile by --compile"),
    ],
)
def test_a_config_that_cannot_be_is_refused(teacher, tmp_path, capsys, monkeypatch, variables, told):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert told in refused(cold_start.main, flags(teacher, tmp_path / "run"), capsys=capsys)
    assert not (tmp_path / "run").exists()


def test_nothing_of_the_environment_acts_behind_the_flags(teacher, tmp_path, monkeypatch):
    """An accumulation of 4 would divide every gradient; it is ignored, with a line for each variable."""
    plain = run_cold_start(teacher, tmp_path / "plain")
    variables = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_DOWNCAST_BF16": "yes"}
    variables |= {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run = run_cold_start(teacher, tmp_path / "run")
    assert largest_difference(plain, run, 3, ema=False) == 0 and logged(plain) == logged(run)
    told = [line for line in (run / "log.txt").read_text().splitlines() if "is ignored" in line]
    assert len(told) == 2 and "GRADIENT_ACCUMULATION_STEPS=4 " in told[0] + told[1]
    assert not [name for name in variables if name in os.environ]


def test_auto_takes_the_precision_of_the_config(monkeypatch):
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        assert open_session("auto").generator_accelerator.mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(True)


def test_a_config_that_does_not_exist_is_refused():
    command = ["bash", "scripts/cold_start_sitxl.sh"]
    environment = os.environ | {"ACCELERATE_CONFIG": "nowhere.yaml", "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere.yaml, which does not exist" in done.stderr


def test_another_effective_batch_is_told(teacher, tmp_path):
    run_cold_start(teacher, tmp_path / "run")
    run_cold_start(teacher, tmp_path / "run", "--max-train-steps", 4, "--auto-resume", "--batch-size", 2)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "WARNING: the effective batch was 4 in " in log and "and is 2 here" in log


def test_every_process_makes_the_same_calls(teacher):
    """Sharded weights are gathered by all processes together, whatever step each of them drew."""
    model, calls = SiT.from_pretrained(teacher), []

    def counted(x, t, y):
        calls.append(len(x))
        return model(x, t, y)

    noise, y = torch.randn(3, 1, 8, 8), torch.arange(3)
    x_t, t = few_step_input(counted, noise, y, torch.zeros(3, dtype=torch.long), 3)
    assert calls == [1, 1] and torch.equal(x_t, noise) and torch.equal(t, torch.ones(3))
    calls.clear()
    few_step_input(counted, noise, y, torch.tensor([0, 1, 2]), 3)
    assert calls == [2, 1]


@pytest.mark.slow
def test_two_nodes_shard_within_and_replicate_between(teacher, tmp_path):
    """Four processes as two nodes of two: they train what one does, are resumed, and each holds half."""
    common = [*PARITY, "--batch-size", 1, "--max-train-steps"]
    one = run_cold_start(teacher, tmp_path / "one", *common, 4, "--gradient-accumulation-steps", 4)
    nodes = tmp_path / "nodes"
    jobs = [job(teacher, nodes, *common, steps, "--auto-resume", sharded=True) for steps in (2, 4)]
    held = processes(tmp_path, *(each | {"of_node": 2} for each in jobs), count=4)
    assert [each["mesh"] for each in held] == [[2, 2], [2, 2]]
    assert all(each["sharded"] == each["of"] > 100 for each in held)
    assert largest_difference(one, nodes, 4) < 1e-6


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]), Path(sys.argv[2]))
