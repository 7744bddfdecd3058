"""The report: what it shows, what it says it could not read, its size and time."""

import json
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from evaluation import report
from evaluation.report.charts import CHARTS, panels_of
from evaluation.report.page import PICTURES, argument_rows, column_names, facts_of
from evaluation.report.run_log import RunLog, read_run
from tests.conftest import flags, refused, run_cold_start
from tests.evaluation.test_rules import HEALTHY
from train_cc import dmdr_refl
from train_cc.io.figures import METRICS
from train_cc.io.products import commit, record, write_record
from train_cc.run.pictures import save_grid


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory, reward_folder):
    output = tmp_path_factory.mktemp("runs") / "cold_start"
    return run_cold_start(teacher, output, "--holdout-classifier", reward_folder)


def made(tmp_path, *runs):
    target = tmp_path / "report.html"
    report.main([*map(str, runs), "--output", str(target), "--overwrite"])
    return target.read_text()


def test_a_page_shows_arguments_curves_pictures_and_nothing_from_outside(run, tmp_path, capsys):
    row = {"figures": dict.fromkeys(METRICS, 0.5), "images": 1800}
    (run.parent / "results.json").write_text(json.dumps({"rows": {"cold <start>": row}, "features": "a <space>"}))
    save_grid([np.zeros((4, 8, 8, 1), np.uint8)], run.parent / "results.png", ["row"])
    text = made(tmp_path, run)
    assert "<th>FID-1.8k ↓</th>" in text and "<th>accuracy ↑</th>" in text
    assert "1,800 images for each row, a &lt;space&gt;" in text and "Too short to judge" in text
    assert text.count("<svg") > 8 and text.count("data:image/png;base64,") == 6
    # results.png, teacher, 2 x generator, real, fake
    assert text.count('alt="teacher, 2 steps"') == 1 and "<span>9</span>" not in text and "<span>2</span>" in text
    assert "--learning-rate-generator" in text and "cold &lt;start&gt;" in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert "report: " in capsys.readouterr().out


def test_a_table_has_the_count_of_its_samples_not_of_what_is_held_out(run, tmp_path):
    figures = dict.fromkeys(METRICS, 0.5)
    rows = {"cold start": {"figures": figures, "images": 10_000}, "held-out real": {"figures": figures, "images": 898}}
    rows["cold start"]["generation"] = {"rewards_sha256": ["judge"]}
    content = {"rows": rows, "features": "a", "features_sha256": "judge", "set_size": 898}
    (run.parent / "results.json").write_text(json.dumps(content))
    text = made(tmp_path, run)
    assert "<th>FID-10k ↓</th>" in text and "<th>Recall-0.898k ↑</th>" in text and "10,000 images for each row" in text
    assert "This space rewarded cold start: judge it in a space that no reward used." in text
    (run.parent / "results.json").unlink()


def test_every_chart_finds_its_columns_in_the_log_of_a_run_with_a_reward(run, teacher, tmp_path, reward_folder):
    """A batch of 64, so that no band of t is empty. The rules' columns are there too."""
    words = flags(teacher, tmp_path / "run", "--encoder-type", "classifier", "--reward-classifier", reward_folder)
    words += ["--reward-weight", "0.5", "--holdout-classifier", str(reward_folder), "--batch-size", "64"]
    words += ["--resume-ckpt", str(run / "checkpoints/torch_units/step-3.pt"), "--max-train-steps", "4"]
    dmdr_refl.main([*words, "--dynamic-steps", "0"])
    log = read_run(tmp_path / "run")
    series, absent = log.series, {"Frechet distance", "Tilt (experimental)"}  # of other rewards than this run's
    for chart in CHARTS:
        assert len(panels_of(chart, [log])) == len(chart.panels) * (chart.title not in absent), chart.title
    assert all(series.has(name) for name in HEALTHY)
    text = made(tmp_path, tmp_path / "run")
    panels = sum(len(chart.panels) for chart in CHARTS if chart.title not in absent)
    assert text.count("<svg") == panels and "Fake loss by band of t" in text


def test_several_runs_lie_over_one_another(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other" / "cold_start")
    text = made(tmp_path, run, other, "--curves", tmp_path / "curves")
    assert "other/cold_start" in text
    svg = (tmp_path / "curves" / "score_gap.svg").read_text()
    assert "other/cold_start" in svg and svg.count("#ff7f0e") >= 1
    assert text.count('alt="teacher, 2 steps"') == text.count('alt="generator, update 3"') == 2
    assert "What differs" not in text


def test_what_differs_between_runs_stands_apart(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    content = json.loads((other / "args.json").read_text())
    content["arguments"] |= {"lora_rank": 77, "output_dir": "elsewhere", "weight_decay_generator": 0.5}
    (other / "args.json").write_text(json.dumps(content))
    runs = [read_run(folder) for folder in (run, other)]
    differs = argument_rows(runs)
    assert [row[0] for row in differs["other"]] == ["--lora-rank", "--weight-decay-generator"]
    assert differs["other"][0][1:] == ["4", "77"] and ["--seed", "30", "30"] in differs["same"]
    text = made(tmp_path, run, other)
    assert "<td>--lora-rank</td><td>4</td><td>77</td>" in text and "elsewhere" not in text


def test_a_run_says_when_where_and_with_what_it_was(run):
    facts = facts_of(read_run(run))
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", facts["began"]) and facts["device"] == "1 x cpu, precision no"
    assert (
        re.fullmatch(r"\d:\d\d:\d\d \([\d.e-]+ s an update\)", facts["training took"]) and "torch" in facts["versions"]
    )
    assert facts["commit"] == (commit() or "not recorded")


def test_columns_are_named_by_the_classes_of_the_data_set(run, tmp_path, teacher):
    arguments = {"teacher": str(tmp_path / "teacher"), "num_previews": 5}
    log = RunLog("a", tmp_path / "a", {"arguments": arguments})
    assert column_names(log) == [""] * 5
    shutil.copytree(teacher, tmp_path / "teacher")
    assert column_names(log) == ["0", "2", "4", "6", "8"]
    write_record(tmp_path / "teacher", record("pretrain teacher", {"dataset": "fashion-mnist"}))
    assert column_names(log) == ["T-shirt", "pullover", "coat", "shirt", "bag"]


def test_what_cannot_be_read_is_told_and_the_rest_shown(run, tmp_path):
    torn = shutil.copytree(run, tmp_path / "torn")
    log = torn / "loss_logs" / "loss_gen_log.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "score_g')
    shutil.rmtree(torn / "generator")
    text = made(tmp_path, torn)
    assert "1 line(s) cannot be read" in text and "Not finished" in text and text.count("<svg") > 8
    (tmp_path / "empty").mkdir()
    text = made(tmp_path, tmp_path / "empty")
    assert "args.json is missing" in text and "loss_gen_log.jsonl is missing" in text
    text = made(tmp_path, tmp_path / "empty", run)
    assert text.count("<svg") > 8


def test_a_folder_that_does_not_exist_is_refused(tmp_path, capsys):
    assert "does not exist" in refused(report.main, [str(tmp_path / "nowhere")], capsys=capsys)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """20 000 updates with all columns, and 10 noisy previews of the full size."""
    folder, generator = tmp_path_factory.mktemp("long") / "run", np.random.default_rng(0)
    (folder / "loss_logs").mkdir(parents=True)
    names = {name for chart in CHARTS for panel in chart.panels for name in panel}
    with (folder / "loss_logs" / "loss_gen_log.jsonl").open("w") as gen:
        for step in range(1, 20_001):
            gen.write(json.dumps({"step": step} | dict.fromkeys(names, 1 + generator.random())) + "\n")
    with (folder / "loss_logs" / "loss_gui_log.jsonl").open("w") as gui:
        for i in range(100_000):
            gui.write(json.dumps({"step": i // 5 + 1, "iteration": i + 1, "loss_fake": generator.random()}) + "\n")
    for step in range(1000, 20_001, 2000):
        (folder / "samples" / f"step-{step}").mkdir(parents=True)
        pixels = generator.integers(0, 256, (4 * 256, 16 * 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((4096, 1024)).save(
            folder / "samples" / f"step-{step}" / "grid.png", compress_level=1
        )
    return folder


def test_a_run_of_20_000_updates_is_a_small_page(long_run, tmp_path):
    began = time.monotonic()
    text = made(tmp_path, long_run)
    print(f"built in {time.monotonic() - began:.1f} s, {len(text) / 1e6:.2f} MB")
    assert len(text) <= 5e6 and text.count("<figure>") == PICTURES


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_draws_it(run, tmp_path):
    made(tmp_path, run)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-component-update", "--no-first-run", f"--user-data-dir={tmp_path / 'browser'}"]
    shot = tmp_path / "shot.png"
    page = (tmp_path / "report.html").as_uri()
    subprocess.run(
        ["chromium", *flags, "--window-size=1400,5000", f"--screenshot={shot}", page],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = np.array(Image.open(shot).convert("RGB"))
    blue = (abs(pixels.astype(int) - [31, 119, 180]).sum(axis=2) < 20).sum()  # the curves' colour
    assert pixels.shape[0] == 5000 and blue > 200
