"""evaluation/report: what the page shows, what it says it could not read, its size, its files."""

import json
import random
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from evaluation import evaluate, report
from evaluation.report import page
from evaluation.report.charts import CHARTS, draw_panels, panels_of, thin
from evaluation.report.page import PICTURES, argument_rows, column_names, facts_of, previews_of, whole_picture
from evaluation.report.run_log import RunLog, Series, read_run
from tests.conftest import flags, refused, run_cold_start, tree, words
from tests.evaluation.test_verdict import HEALTHY
from train_cc import dmdr_refl
from train_cc.io.figures import METRICS
from train_cc.io.products import commit, record, write_record
from train_cc.run.pictures import save_grid

FIGURES = dict.fromkeys(METRICS, 0.5)


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory, reward_folder):
    output = tmp_path_factory.mktemp("runs") / "cold_start"
    return run_cold_start(teacher, output, "--holdout-classifier", reward_folder)


def copied(run, target):
    return shutil.copytree(run, target, ignore=shutil.ignore_patterns("checkpoints"))


def page_of(tmp_path, *runs) -> str:
    target = tmp_path / "report.html"
    report.main([*map(str, runs), "--output", str(target), "--overwrite"])
    return target.read_text(encoding="utf-8")


@pytest.fixture
def one_chart(monkeypatch):
    """Only the first chart is drawn: the others take seconds."""
    monkeypatch.setattr(page, "CHARTS", CHARTS[:1])


# What it shows ----------------------------------------------------------------------------------------------------


def test_a_page_shows_arguments_curves_pictures_and_nothing_from_outside(run, tmp_path, capsys):
    run = copied(run, tmp_path / "run")
    rows = {"cold <start>": {"figures": FIGURES, "images": 10_000, "generation": {"rewards_sha256": ["judge"]}}}
    rows["held-out real"] = {"figures": FIGURES, "images": 898}  # whose count is not that of the table
    content = {"rows": rows, "features": "a <space>", "features_sha256": "judge", "set_size": 898}
    (tmp_path / "results.json").write_text(json.dumps(content))
    save_grid([np.zeros((4, 8, 8, 1), np.uint8)], tmp_path / "results.png", ["row"])
    judged = run.with_name(f"{run.name}_checkpoints")
    judged.mkdir()
    save_grid([np.zeros((4, 8, 8, 1), np.uint8)], judged / "checkpoints.png", ["row"])
    (judged / "best.json").write_text('{"step": 2, "verdict": "best at step 2"}')
    text = page_of(tmp_path, run)
    assert "<th>FID-10k ↓</th>" in text and "<th>Recall-0.898k ↑</th>" in text and "<th>accuracy ↑</th>" in text
    assert "10,000 images for each row, a &lt;space&gt;" in text and "cold &lt;start&gt;" in text
    assert "This space rewarded cold &lt;start&gt;: judge it in a space that no reward used." in text
    assert "Too short to judge" in text and "--learning-rate-generator" in text
    # results.png, checkpoints.png, teacher, 2 x generator, real, fake
    assert text.count("<svg") > 8 and text.count("data:image/png;base64,") == 7 and "best at step 2" in text
    assert text.count('alt="teacher, 2 steps"') == 1 and "<span>9</span>" not in text and "<span>2</span>" in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text) and "report: " in capsys.readouterr().out


def test_every_chart_finds_its_columns_in_the_log_of_a_run_with_a_reward(run, teacher, tmp_path, reward_folder):
    """A batch of 64, so that no band of t is empty. The rules' columns are there too."""
    more = ("--encoder-type", "classifier", "--reward-classifier", reward_folder, "--reward-weight", "0.5")
    more += ("--holdout-classifier", reward_folder, "--batch-size", "64", "--dynamic-steps", "0")
    more += ("--gan-weight", "0.01", "--gan-data", "digits")
    more += ("--resume-ckpt", run / "checkpoints/torch_units/step-3.pt", "--max-train-steps", "4")
    dmdr_refl.main(flags(teacher, tmp_path / "run", *more))
    log = read_run(tmp_path / "run")
    absent = {"Distance of the distribution", "Tilt (experimental)"}  # of other rewards
    for chart in CHARTS:
        assert len(panels_of(chart, [log])) == len(chart.panels) * (chart.title not in absent), chart.title
    assert all(log.series.has(name) for name in HEALTHY)


def test_several_runs_lie_over_one_another_and_what_differs_stands_apart(run, tmp_path):
    other = copied(run, tmp_path / "other" / "cold_start")
    content = json.loads((other / "args.json").read_text())
    content["arguments"] |= {"lora_rank": 77, "output_dir": "elsewhere", "weight_decay_generator": 0.5}
    (other / "args.json").write_text(json.dumps(content))
    differs = argument_rows([read_run(folder) for folder in (run, other)])
    assert [row[0] for row in differs["other"]] == ["--lora-rank", "--weight-decay-generator"]
    assert differs["other"][0][1:] == ["4", "77"] and ["--seed", "30", "30"] in differs["same"]
    text = page_of(tmp_path, run, other, "--curves", tmp_path / "curves")
    assert "<td>--lora-rank</td><td>4</td><td>77</td>" in text and "elsewhere" not in text
    svg = (tmp_path / "curves" / "score_gap.svg").read_text()
    assert "other/cold_start" in text and "other/cold_start" in svg and "#ff7f0e" in svg
    assert text.count('alt="teacher, 2 steps"') == text.count('alt="generator, update 3"') == 2


def test_a_run_says_when_where_and_with_what_it_was(run):
    facts = facts_of(read_run(run))
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", facts["began"]) and facts["device"] == "1 x cpu, precision no"
    assert re.fullmatch(r"\d:\d\d:\d\d \([\d.e-]+ s an update\)", facts["training took"])
    assert "torch" in facts["versions"] and facts["commit"] == (commit() or "not recorded")


def test_columns_are_named_by_the_classes_of_the_data_set(run, tmp_path, teacher):
    log = RunLog("a", tmp_path / "a", {"arguments": {"teacher": str(tmp_path / "teacher"), "num_previews": 5}})
    assert column_names(log) == [""] * 5
    shutil.copytree(teacher, tmp_path / "teacher")
    assert column_names(log) == ["0", "2", "4", "6", "8"]
    write_record(tmp_path / "teacher", record("pretrain teacher", {"dataset": "fashion-mnist"}))
    assert column_names(log) == ["T-shirt", "pullover", "coat", "shirt", "bag"]


def test_a_long_run_at_full_size_is_a_small_page(tmp_path):
    """20 000 updates, and noisy previews of 10 steps."""
    steps, noise = np.arange(1, 20_001.0), np.random.default_rng(0)
    values = np.where(steps == 7, 100.0, noise.random(20_000))
    run = RunLog("long", tmp_path, series=Series(steps, {"score_gap": values}))
    at, mean, low, high = thin(steps, values)
    assert len(at) == 400 and mean.mean() == pytest.approx(values.mean()) and high.max() == 100 and low[0] < 0.1
    (svg,) = draw_panels(CHARTS[0], [run])
    for path, size in ((tmp_path / "full.png", (1024, 4096, 3)), (tmp_path / "small.png", (8, 32, 3))):
        Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8)).save(path, compress_level=1)
    run.pictures = dict.fromkeys(range(2000, 20_001, 2000), tmp_path / "small.png")
    strips = previews_of(run)["strips"]
    assert len(strips) == PICTURES and strips[-1]["caption"] == "long, step 20000"
    assert len(svg) < 1e5 and len(whole_picture(tmp_path / "full.png", "")["source"]) < 5e5


# What cannot be read ----------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_told_and_the_rest_shown(run, tmp_path, one_chart):
    torn = copied(run, tmp_path / "$x_{$ <b>")
    odd = ['{"step": null}', '{"step": 1e400}', '{"step": "3"}', '{"step": true}', "[1]", "[" * 100_000, "1" * 10_000]
    odd += ["\0", '{"step": 1' + "0" * 400 + "}", '{"step": 4, "score_g']
    values = ("1" + "0" * 400, "NaN", "[]", "-Infinity", '"a"', "true")
    log = torn / "loss_logs" / "loss_gen_log.jsonl"
    log.write_text("\n".join([log.read_text().strip(), *(f'{{"step": 9, "score_gap": {v}}}' for v in values), *odd]))
    for step, content in (("²", (run / "samples" / "step-3" / "grid.png").read_bytes()), ("7", b"\x89PNG no")):
        (torn / "samples" / f"step-{step}").mkdir()
        (torn / "samples" / f"step-{step}" / "grid.png").write_bytes(content)
    shutil.rmtree(torn / "generator")
    (tmp_path / "empty").mkdir()
    text = page_of(tmp_path, torn, tmp_path / "empty", run)
    assert f"{len(odd)} line(s) cannot be read" in text and "Not finished" in text and "<b>" not in text
    assert "step-7/grid.png is damaged" in text and "step-²" not in text and text.count("<svg") == 1
    assert "args.json is missing" in text and "loss_gen_log.jsonl is missing" in text


ODD_JSON = ["", "null", "[]", '"text"', "{}", '{"rows": []}', '{"rows": {}}', '{"rows": {"a": 1}}', "[" * 100_000,
            '{"rows": {"a": {"figures": {"FID": NaN}}}}', '{"rows": {"a": {"figures": {"FID": "x"}}}}',
            '{"rows": {"a": {"figures": [1]}}}', '{"arguments": [], "stage": 1}', "1" * 10_000, "\x00\xff",
            '{"rows": {"a": {"figures": {"FID": 1' + "0" * 500 + "}}}}"]  # fmt: skip


@pytest.mark.parametrize("content", ODD_JSON, ids=lambda text: text[:20])
def test_odd_json_beside_a_run_is_named_on_the_page_and_the_rest_shown(content, run, tmp_path, one_chart):
    copied(run, tmp_path / "run")
    paths = [tmp_path / name for name in ("run/args.json", "results.json", "frontier/frontier.json")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    text = page_of(tmp_path, tmp_path / "run")
    assert text.count("<svg") == 1 and "data:image/png" in text and all(path.name in text for path in paths)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bits, holes, ends, and text that is still JSON but another one."""
    at, length = draw.randrange(len(data) + 1), draw.choice((1, 8, 100, 5000))
    digits = [i for i, byte in enumerate(data[:100_000]) if chr(byte).isdigit()] or [0]
    digit, odd = draw.choice(digits), draw.choice((b"null", b"-1", b"[]", b"1e999", b'"a"', b"9" * 5000, b"[" * 50_000))
    return draw.choice((
        data[:at],
        data[:at] + data[at + length :],
        data[:at] + bytes(length) + data[at + length :],
        data[:at] + draw.randbytes(length) + data[at + length :],
        data[:digit] + odd + data[digit + 1 :],
    ))  # fmt: skip


@pytest.mark.parametrize("count", [20, pytest.param(5000, marks=pytest.mark.slow)])
def test_random_damage_of_runs_and_figures_never_escapes(count, run, tmp_path, one_chart, capsys):
    """The command ends well or with exit code 2."""
    draw, folder = random.Random(0), tmp_path / "run"
    copied(run, folder)
    (tmp_path / "results.json").write_text(json.dumps({"rows": {"control: a": {"figures": FIGURES}}}))
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    for name in "sr":
        np.savez(tmp_path / f"{name}.npz", arr_0=images, mu=np.zeros(64), sigma=np.eye(64))
    figures = words(tmp_path / "s.npz", tmp_path / "r.npz", "--space", "pixels")
    patterns = ("*.npz", "results.json", "run/args.json", "run/loss_logs/*", "run/samples/step-3/grid.png")
    for number in range(count):
        path = draw.choice(sorted(tmp_path.glob(draw.choice(patterns))))
        before = path.read_bytes()
        path.write_bytes(damaged(before, draw))
        try:
            evaluate.main(figures) if path.suffix == ".npz" else report.main([str(folder)])
        except SystemExit as stopped:
            assert stopped.code == 2, (number, path)
        path.write_bytes(before)


# Its files --------------------------------------------------------------------------------------------------------


def test_files_of_others_are_left_alone_without_overwrite(run, tmp_path, capsys, one_chart):
    (tmp_path / "curves").mkdir()
    (tmp_path / "r.html").write_text("mine")
    (tmp_path / "curves" / "score_gap.svg").write_text("mine")
    before = tree(tmp_path)
    for more in (("--output", tmp_path / "r.html"), ("--output", tmp_path / "new", "--curves", tmp_path / "curves")):
        assert "exists" in refused(report.main, words(run, *more), capsys=capsys)
        assert tree(tmp_path) == before
    assert "does not exist" in refused(report.main, [str(tmp_path / "nowhere")], capsys=capsys)
    report.main(words(run, "--output", tmp_path / "r.html", "--curves", tmp_path / "curves", "--overwrite"))
    after = tree(tmp_path)
    assert after.keys() == before.keys() and all(
        after[name] != before[name] for name in ("r.html", "curves/score_gap.svg")
    )
