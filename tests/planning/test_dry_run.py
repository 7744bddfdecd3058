"""`--dry-run` against what really happens: parameters, checkpoint size, activations."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from evaluation.standins import write_vae
from tests import ROOT
from tests.conftest import build_run, flags, random_sit, refused, run_cold_start
from train_cc import cold_start, dmdr_refl
from train_cc.distillation.loop import cycle
from train_cc.models import SIT_SIZES, SiT
from train_cc.models.classifier import ImageClassifier
from train_cc.models.vae import VAEDecoder, load_vae
from train_cc.planning import plan as dry_run
from train_cc.planning.memory import GIB, MOST_CHUNKS, Costs, local_bytes, simulate
from train_cc.planning.networks import NetworksToCome
from train_cc.run.meters import FlopCounter
from train_cc.run.session import open_session


def planned(capsys, teacher, output, *more):
    cold_start.main(flags(teacher, output, *more, "--dry-run"))
    return capsys.readouterr().out


def test_one_process_of_many_tells_the_plan(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (0, 1, 2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        text = planned(capsys, teacher, tmp_path / "run")
        assert ("effective batch: 12" in text) if rank == 0 else (text == "")


@pytest.mark.parametrize("more", [[], ["--use-lora-gen"], ["--ema-decay", 0.9]], ids=str)
def test_parameters_and_checkpoint_size_are_the_real_ones(teacher, tmp_path, capsys, monkeypatch, more):
    monkeypatch.setattr(dry_run, "GIB", 1)  # the size in bytes: of a small model
    text = planned(capsys, teacher, tmp_path / "run", *more)
    run = run_cold_start(teacher, tmp_path / "run", *more)
    told = re.search(r"generator ([\d,]+) trained of ([\d,]+); estimator ([\d,]+) trained, ([\d,]+) frozen", text)
    trained, whole, lora, frozen = (int(number.replace(",", "")) for number in told.groups())
    log = (run / "log.txt").read_text()
    assert f"generator: {trained} parameters trained of {whole}" in log
    assert f"estimator: {lora} parameters trained of {lora + frozen}" in log
    each, every = (int(number) for number in re.search(r"(\d+)\.00 GiB each, (\d+)\.00 GiB in all", text).groups())
    held = sum(tensor_bytes(path) for path in (run / "checkpoints").glob("accelerator_*/step-3/*"))
    assert held > 1e5 and 0 <= held - each < 4096  # the position table, and an optimizer's step counters
    assert every == 3 * each


def tensor_bytes(path: Path) -> int:
    """Of all tensors in a file of a checkpoint: at this size the headers weigh as much."""

    def added(content) -> int:
        if isinstance(content, dict):
            return sum(map(added, content.values()))
        return content.nbytes if isinstance(content, torch.Tensor) else 0

    return added(load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True))


def test_a_missing_config_is_refused(tmp_path, capsys):
    assert "config.json" in refused(cold_start.main, flags(tmp_path, tmp_path / "run", "--dry-run"), capsys=capsys)


def gib(text, name):
    return float(re.search(rf"^  {name}: ([\d.]+) GiB", text, re.MULTILINE)[1])


def simulated(teacher, output, *more, processes=1):
    args = cold_start.stage_parser().parse_args(flags(teacher, output, *more))
    return simulate(args, args.mixed_precision, processes)


def test_a_reward_in_pixel_space_and_a_held_out_classifier_are_counted(teacher, reward_folder, tmp_path, capsys):
    more = ["--batch-size", 512, "--num-previews", 0]
    plain = planned(capsys, teacher, tmp_path / "run", *more)
    words = ["--encoder-type", "classifier", "--reward-classifier", reward_folder]
    text = planned(capsys, teacher, tmp_path / "run", *more, *words, "--holdout-classifier", reward_folder)
    assert "reward classifier weights" in text and "holdout weights" in text
    assert gib(text, "peak, training, generator turn") > gib(plain, "peak, training, generator turn") + 0.05
    assert gib(text, "peak, training, estimator turns") < gib(plain, "peak, training, estimator turns") + 0.01
    assert "classifier" not in plain.split("memory of a GPU")[1]


@pytest.mark.parametrize("widths", [(8, 8, 8, 8), (32, 32, 32, 32)])
def test_the_decoder_is_the_one_that_is_named(tmp_path, widths):
    vae = write_vae(tmp_path / "vae", widths)
    networks = NetworksToCome(open_session("no"))
    decoder = networks.decoder(str(vae), torch.device("cpu"), torch.bfloat16, None)
    held = local_bytes(networks, decoder)
    own = sum(p.numel() for p in VAEDecoder(load_vae(str(vae))).parameters())
    assert not networks.notes and sum(p.numel() for p in decoder.parameters()) == own
    assert 2 * own <= held < 2 * own + 512 * len(list(decoder.parameters()))


def test_a_vae_that_overflows_fp16_is_planned_in_fp32(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "GIB", 1)  # sizes in bytes: of a small decoder
    random_sit(in_channels=4).save_pretrained(tmp_path / "sit")
    vae = write_vae(tmp_path / "vae", (32, 32, 32, 32))
    more = ["--vae", vae, "--mixed-precision", "fp16"]
    half = planned(capsys, tmp_path / "sit", tmp_path / "run", *more)
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"force_upcast": True}))
    whole = planned(capsys, tmp_path / "sit", tmp_path / "run", *more)
    assert gib(whole, "decoder weights") == pytest.approx(2 * gib(half, "decoder weights"), rel=0.1)
    assert "force_upcast" in whole and "force_upcast" not in half


def test_live_bytes_of_a_known_sequence():
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    one = mode.from_tensor(torch.zeros(1))
    with Costs(mode) as costs:
        a = one.new_empty(1000)  # 4000 bytes: 4096
        b = a[:10]  # a view
        c = a + 1
        assert costs.now == costs.peak == 8192
        del c
        d = one + 1
        assert costs.now == 4096 + 512 and costs.lap() == 8192 and costs.peak == costs.now
        del a
        assert costs.now == 4096 + 512, "a view keeps its storage"
        del b, d
        torch.ones(5000)  # of the host
        assert costs.now == 0 and (one.sum().item(), bool(one > 0)) == (0.0, False)


# What is simulated, against what a run does -------------------------------------------------------------------------


@pytest.mark.parametrize("turns,chunks", [(1, 1), (3, 2), (2, MOST_CHUNKS + 3)])
def test_flop_are_those_of_a_real_cycle(teacher, tmp_path, turns, chunks):
    more = ["--ratio-update", turns, "--gradient-accumulation-steps", chunks, "--num-previews", 0]
    run = build_run(teacher, tmp_path / "run", *more)
    with FlopCounter() as counter:
        cycle(run, 0)
    assert counter.total > 0 and simulated(teacher, tmp_path / "other", *more).flop == counter.total


def test_under_ddp_gradients_stay_in_their_buckets(teacher, tmp_path):
    held = [simulated(teacher, tmp_path, processes=processes).held for processes in (1, 2)]
    alone, ddp = (sum(each.values()) for each in held)
    trained = 4 * simulated(teacher, tmp_path).parameters["generator"][0]
    assert trained <= ddp - alone < 1.3 * trained


def test_accumulation_under_fsdp2_holds_whole_gradients(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    more = ["--batch-size", 1, "--num-previews", 0, "--gradient-accumulation-steps"]
    once, twice = (simulated(teacher, tmp_path, *more, chunks, processes=2) for chunks in (1, 2))
    trained = once.parameters["generator"][0]
    grown = twice.peaks["training, generator turn"] - once.peaks["training, generator turn"]
    assert 0.8 * 4 * trained < grown < 1.2 * 4 * trained
    assert once.sharded_over == 2 and twice.sent > once.sent > 0


def test_nodes_hold_a_copy_each_unless_told_otherwise(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    more = ["--num-previews", 0, "--shard-over"]
    node, everyone = (simulated(teacher, tmp_path, *more, over, processes=8) for over in ("node", "all"))
    assert (node.sharded_over, everyone.sharded_over) == (4, 8)
    moments = [cost.held["generator moments"] for cost in (node, everyone)]
    assert moments[0] > 1.3 * moments[1]  # tiny parameters are rounded up to 512 bytes


def test_a_name_of_the_size_table_needs_no_folder(tmp_path, capsys):
    more = ["--teacher", "SiT-S/8", "--vae", "stabilityai/sd-vae-ft-ema", "--mixed-precision", "auto"]
    text = planned(capsys, "-", tmp_path / "run", *more)
    trained = sum(p.numel() for p in SiT(**SIT_SIZES["SiT-S/8"]).parameters())
    assert f"generator {trained:,} trained of {trained:,}" in text and "SiT-S/8 is the name of a size" in text
    assert "SiT-S/8" in refused(cold_start.main, flags("SiT-S/8", tmp_path / "run"), capsys=capsys)


def test_hours_are_those_of_the_peak_that_is_named(teacher, tmp_path, capsys):
    hours = []
    for peak in ("1e-6", "2e-6"):
        text = planned(capsys, teacher, tmp_path / "run", "--peak-tflops", peak, "--max-train-steps", 1000)
        assert f"40% of {peak} TFLOP/s" in text.replace("e-06", "e-6")
        hours.append(float(re.search(r"an update, ([\d.]+) hours", text)[1]))
    assert hours[0] > 10 and hours[0] == pytest.approx(2 * hours[1], rel=0.01)


@pytest.mark.parametrize(
    "row,processes",
    [("| (nothing) | 64 |", 1), ("fsdp2.yaml` | 512 |", 8)],
)
def test_a_row_of_the_page_is_what_the_command_tells(monkeypatch, row, processes):
    """docs/memory.md; the README has the same peaks."""
    page = (ROOT / "docs" / "memory.md").read_text()
    (line,) = [line for line in page.splitlines() if row in line]
    _, training, resuming, *_ = [cell.strip() for cell in line.split("|")][2:]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(processes > 1).lower())
    args = cold_start.stage_parser().parse_args(["--teacher", "SiT-XL/2", "--output-dir", "-", "--num-previews", "0"])
    cost = simulate(args, "bf16", processes)
    peak = max(value for name, value in cost.peaks.items() if name.startswith("training"))
    assert abs(peak / GIB - float(training)) < 0.16  # the page's has the decoder of the previews: 0.09
    assert abs(cost.peaks["resuming"] / GIB - float(resuming)) < 0.16


REWARDS = """
def plain(images, labels):
    return images.mean(dim=(1, 2, 3))


def by_values(images, labels):
    import math
    return math.log(images.max().item()) * images.mean(dim=(1, 2, 3))
"""


@pytest.mark.parametrize("stage", [cold_start, dmdr_refl])
def test_a_checkpoint_that_a_run_has_yet_to_write_is_planned_from(teacher, reward_folder, tmp_path, capsys, stage):
    """Where a run writes it, under the name that it writes; any other file that is missing is refused."""
    more = ["--encoder-type", "classifier", "--reward-classifier", reward_folder, "--dry-run", "--max-train-steps", 9]
    place = tmp_path / "cold" / "checkpoints" / "torch_units"
    stage.main(flags(teacher, tmp_path / "run", *more, "--resume-ckpt", place / "step-7.pt"))
    text = capsys.readouterr().out
    assert f"{place / 'step-7.pt'} does not exist yet: planned as from step 7" in text
    assert "from step 7 to 9: 8\n" in text
    place.mkdir(parents=True)
    (place / "step-8.pt").write_bytes(b"")
    for path in (place / "step-07.pt", place / "step-8.pt", tmp_path / "step-7.pt"):
        words = flags(teacher, tmp_path / "run", *more, "--resume-ckpt", path)
        assert str(path) in refused(stage.main, words, capsys=capsys)


def test_a_function_that_needs_values_is_told(teacher, tmp_path, capsys):
    (tmp_path / "r.py").write_text(REWARDS)
    for name, known in (("plain", True), ("by_values", False)):
        text = planned(capsys, teacher, tmp_path / "run", "--reward", "python", 1, f"{tmp_path / 'r.py'}:{name}")
        assert ("is not known" in text) != known


def test_auto_precision_is_planned_as_on_a_gpu(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = planned(capsys, teacher, tmp_path / "run", "--mixed-precision", "auto")
    assert "precision fp16" in text and "no GPU here" in text
    assert "precision no" in planned(capsys, teacher, tmp_path / "run", "--mixed-precision", "no")


def wrong_inputs(teacher, reward_folder, tmp_path):
    other = tmp_path / "other"
    random_sit(num_classes=7).save_pretrained(other / "sit")
    shutil.copy(teacher / "config.json", other / "sit" / "config.json")
    ImageClassifier("test_resnet", 7, 1, 32).save_pretrained(other / "classifier")
    return {
        "resume": (["--resume-ckpt", other / "step-1.pt"], "step-1.pt does not exist"),
        "reward": (["--encoder-type", "classifier", "--reward-classifier", other], "config.json does not exist"),
        "reward name": (["--encoder-type", "classifier", "--reward-classifier", "no_such"], "no_such"),
        "holdout": (["--holdout-classifier", other / "classifier"], "7 classes, the generator 10"),
        "dinov2": (
            ["--encoder-type", "dinov2", "--dinov2-backbone", other / "b.pth", "--dinov2-head", other / "h.pth"],
            "b.pth does not exist",
        ),
        "vae": (["--vae", other], "has 1 channel, that is pixels"),
        "teacher": (["--teacher", other / "sit"], "embedding_table"),
        "classes": (["--num-classes", 11], "--num-classes is 11"),
    }


def test_inputs_that_a_run_would_refuse_are_refused_in_the_same_words(teacher, reward_folder, tmp_path, capsys):
    for more, words in wrong_inputs(teacher, reward_folder, tmp_path).values():
        told = [
            refused(cold_start.main, flags(teacher, tmp_path / "run", *more, *dry), capsys=capsys)
            for dry in (["--dry-run"], [])
        ]
        assert words in told[0] and told[0] == told[1]
        assert not (tmp_path / "run").exists()
