"""`--dry-run` against what really happens: parameters, checkpoint size, activations."""

import json
import re

import pytest
import torch

from tests.conftest import TINY, flags, random_sit, refused, run_cold_start
from train_cc import cold_start
from train_cc.dry_run import kept_bytes, network_activations


def planned(capsys, teacher, output, *more):
    cold_start.main(flags(teacher, output, *more, "--dry-run"))
    return capsys.readouterr().out


def test_nothing_is_loaded_or_written(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "SiT", **TINY}))
    text = planned(capsys, tmp_path, tmp_path / "run", "--gradient-accumulation-steps", 3)
    assert "effective batch: 12 = 4 a process x 3 accumulated x 1 process(es)" in text
    assert "from step 0 to 3: 36" in text and "--batch-size 4" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [[], ["--use-lora-gen"], ["--ema-decay", 0.9]], ids=str)
def test_parameters_and_checkpoint_size_are_the_real_ones(teacher, tmp_path, capsys, more):
    text = planned(capsys, teacher, tmp_path / "run", *more)
    run = run_cold_start(teacher, tmp_path / "run", *more)
    told = re.search(r"generator ([\d,]+) trained of ([\d,]+); estimator ([\d,]+) trained, ([\d,]+) frozen", text)
    trained, whole, lora, frozen = (int(number.replace(",", "")) for number in told.groups())
    log = (run / "log.txt").read_text()
    assert f"generator: {trained} parameters trained of {whole}" in log
    assert f"estimator: {lora} parameters trained of {lora + frozen}" in log
    on_disk = sum(p.stat().st_size for p in (run / "checkpoints").glob("accelerator_*/step-3/*"))
    ema = trained if "--ema-decay" in more else 0
    assert on_disk == pytest.approx(4 * (3 * trained + ema + 3 * lora), rel=0.35)  # small files: headers weigh


def test_extrapolated_activations_are_those_of_the_whole_network(teacher, tmp_path):
    args = cold_start.stage_parser().parse_args(flags(teacher, tmp_path))
    config = {**TINY, "patch_size": 2, "mlp_ratio": 4.0, "depth": 5}
    estimate = network_activations(config, args, "generator", torch.float32)
    model = random_sit(depth=5)
    x, t, y = torch.zeros(4, 1, 8, 8), torch.zeros(4), torch.zeros(4, dtype=torch.long)
    whole = kept_bytes(model, lambda: model(x, t, y), torch.enable_grad())
    assert whole > 0 and estimate == pytest.approx(whole, rel=0.02)


def test_a_missing_config_is_refused(tmp_path, capsys):
    assert "config.json" in refused(cold_start.main, flags(tmp_path, tmp_path / "run", "--dry-run"), capsys=capsys)
