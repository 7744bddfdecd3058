"""The launchers and the files of recipes: their commands parse, and agree with one another and with the settings."""

import re
import shlex
from pathlib import Path

import pytest

from scripts.jobs import read_command, tomllib
from tests.pages import ROOT, parser_of
from train_cc import cold_start, dmdr_refl
from train_cc.setup.arguments import validate

SCRIPTS = ROOT / "scripts"
STAGES = {"train_cc.cold_start": cold_start, "train_cc.dmdr_refl": dmdr_refl}
SMALL = ("digits", "fashion")
LAUNCHERS = sorted(path.name for pattern in ("cold_start", "dmdr") for path in SCRIPTS.glob(f"{pattern}_*.sh"))
OTHERS = ["evaluate_digits.sh", "evaluate_fashion.sh", "evaluate_sitxl.sh", "frontier_sitxl.sh"]


@pytest.fixture(autouse=True)
def variables(monkeypatch, tmp_path):
    for name in ("DIGITS", "FASHION", "REFERENCE", "VAE", "TIMM_ENCODER"):
        monkeypatch.setenv(name, str(tmp_path))
    for name, value in (("SEED", "1"), ("NUM_IMAGES", "1"), ("DATA", "--data-dir=1")):
        monkeypatch.setenv(name, value)


def text_of(script: str) -> str:
    return (SCRIPTS / script).read_text().replace("\\\n", " ")


def commands_of(script: str) -> list[list[str]]:
    """The modules and flags that a script starts, each ${NAME:-default} by its default and other variables by 1."""
    text = re.sub(r'"\$@"|"\$\{@:3\}"|\$\{\w+:\+[^}]*\}', "", text_of(script))
    for _ in range(2):  # a default within a default
        text = re.sub(r"\$\{\w+:-([^{}]*)\}", r"\1", text)
    commands = re.findall(r"^ *(?:OMP_\S+ )?(?:run |exec )*(?:launch|python -m) (.*)$", text, re.MULTILINE)
    return [[re.sub(r"\$\{?\w+\}?", "1", word) for word in shlex.split(each)] for each in commands]


def arguments_of(script: str) -> dict:
    ((module, *words),) = commands_of(script)
    args = STAGES[module].stage_parser().parse_args(words)
    validate(args)
    return vars(args)


def jobs_of(recipe: str) -> dict[str, dict]:
    content = tomllib.loads((SCRIPTS / "recipes" / f"{recipe}.toml").read_text())
    return {name: job for name, job in content.items() if name != "logs"}


def texts_of(job: dict) -> list[str]:
    return [" ".join(f"{job.get('common', '')} {text}".split()) for text in job["commands"]]


@pytest.mark.parametrize("script", [*LAUNCHERS, *OTHERS])
def test_flags_of_the_scripts_parse(script):
    if script in LAUNCHERS:
        assert arguments_of(script)["auto_resume"]
    for module, *words in commands_of(script):
        parser_of(module, words)


@pytest.mark.parametrize("script,stage", [("cold_start_sitxl.sh", cold_start), ("dmdr_sitxl_refl.sh", dmdr_refl)])
def test_the_full_size_launchers_are_the_defaults(script, stage):
    places = {"teacher", "output_dir", "resume_ckpt", "auto_resume"}
    defaults = vars(stage.stage_parser().parse_args(["--teacher", "t", "--output-dir", "o"]))
    assert {n: v for n, v in arguments_of(script).items() if n not in places} == {
        n: v for n, v in defaults.items() if n not in places
    }


@pytest.mark.parametrize("recipe", ["sitxl", *SMALL])
def test_stage_2_starts_where_stage_1_ends_and_the_frontier_trains_as_long(recipe):
    first, second = arguments_of(f"cold_start_{recipe}.sh"), arguments_of(f"dmdr_{recipe}_refl.sh")
    assert Path(second["resume_ckpt"]).name == f"step-{first['max_train_steps']}.pt"
    assert second["dynamic_steps"] == 0 < first["dynamic_steps"]
    for name in ("num_steps", "lora_rank", "lora_scale_fake", "lora_scale_real", "ratio_update", "ema_decay", "seed"):
        assert first[name] == second[name], name
    table = tomllib.loads((SCRIPTS / "frontier" / f"{recipe}.toml").read_text())
    assert table["base_steps"] == first["max_train_steps"]
    assert table["base_steps"] + table["extra_steps"] == second["max_train_steps"]


@pytest.mark.parametrize("recipe", SMALL)
def test_commands_of_the_jobs_parse(recipe):
    jobs = jobs_of(recipe)
    for name, job in jobs.items():
        assert set(job.get("needs", ())) <= jobs.keys(), name
        assert job.keys() <= {"title", "needs", "always", "show", "common", "commands"}, name
        for text in texts_of(job):
            module, *words = read_command(text, name).words
            if module == "bash":
                ((module, *flags),) = commands_of(words[0].removeprefix("scripts/"))
                words = [*flags, *words[1:]]
            parser_of(module, words)
    whole = {"digits": "quickstart"}.get(recipe, recipe)
    for script in (f"{whole}.sh", f"pretrain_{recipe}.sh", f"frontier_{recipe}.sh"):
        names = re.search(rf"recipes/{recipe}\.toml (.*)", text_of(script))[1]
        names = re.search(r"set -- (.*)", text_of(script))[1].split() if "$@" in names else names.split()
        assert names and set(names) <= jobs.keys(), script


@pytest.mark.parametrize("recipe", SMALL)
def test_all_seeds_have_the_same_judges(recipe):
    texts = [text for job in jobs_of(recipe).values() for text in texts_of(job)]
    judges = [text for text in texts if "--purpose evaluation" in text]
    others = [text for text in texts if text.startswith("train_cc.pretrain.") and "--learning-rate" in text]
    assert len(judges) == 2 and not any("$SEED" in text for text in judges)
    assert all(("$SEED" in text) != (text in judges) for text in others)
    defaults = re.findall(r"SEED:-(\w+)", "".join(path.read_text() for path in SCRIPTS.glob("*.sh")))
    assert set(defaults) == {str(arguments_of("cold_start_sitxl.sh")["seed"])}
