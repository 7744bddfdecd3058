"""Mutation testing: cosmic-ray's mutants of the files below, each met by the fast tests that are to notice.

    pip install cosmic-ray
    OMP_NUM_THREADS=1 python -m tests.mutation.run [WORD ...] [--sessions FOLDER]

A WORD picks the files whose path contains it; without one, all. The tests of a module are those of its name, and the
others of the table. Mutants live in a copy of the tracked files. The
libraries are imported once and every mutant is a fork: it costs its tests alone, not the start of Python. Sessions are
cosmic-ray's own (`cr-report --show-diff FILE.sqlite`) and continue where they were stopped; what survived is met again,
since the tests may have grown. A file that has changed starts anew.
"""

import argparse
import difflib
import gc
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"convert_weight": "convert", "distillation": "paper", "setup": "run"}  # of tests, if named otherwise
MATH, GOLDEN, TURNS, RESUME = "paper/test_math", "paper/test_golden", "paper/test_turns", "run/test_resume"
FLAGS = "docs/test_docs::test_the_page_of_flags_is_that_of_the_parsers"
# What is mutated, and the tests that are to notice beside those of the module's own name, the likeliest first.
MODULES = {
    "train_cc/flow.py": [MATH],
    "train_cc/schedules.py": [MATH],
    "train_cc/draws.py": [MATH, GOLDEN],
    "train_cc/objectives.py": [MATH],
    "train_cc/samplers.py": [MATH, "run/test_processes::test_every_process_makes_the_same_calls"],
    "train_cc/settings.py": [FLAGS, "run/test_recipes"],
    "train_cc/distillation/turns.py": [GOLDEN, "rewards/test_terms", "planning/test_plan"],
    "train_cc/distillation/loop.py": [GOLDEN],
    "train_cc/distillation/run.py": [GOLDEN],
    "train_cc/distillation/panel.py": [],
    "train_cc/distillation/state.py": [RESUME],
    "train_cc/models/backbone.py": ["models/test_networks", "convert/test_state_dicts", "convert/test_sit_convert"],
    "train_cc/models/networks/sit.py": ["models/test_networks", "models/test_models", "convert/test_state_dicts"],
    "train_cc/models/lora.py": ["models/test_models", GOLDEN],
    "train_cc/models/estimator.py": ["models/test_models", "run/test_build", GOLDEN],
    "train_cc/models/generator.py": ["models/test_models"],
    "train_cc/models/vae.py": [],
    "train_cc/models/dinov2.py": [],
    "train_cc/rewards/terms.py": ["rewards/test_build", GOLDEN],
    "train_cc/rewards/frechet.py": [],
    "train_cc/run/checkpoint.py": [],
    "train_cc/run/diagnostics.py": ["run/test_logbook", GOLDEN],
    "train_cc/run/logbook.py": [RESUME],
    "train_cc/run/session.py": ["paper/test_loop", "run/test_processes"],
    "train_cc/run/states.py": [GOLDEN, "run/test_stage"],
    "train_cc/setup/build.py": [GOLDEN, TURNS, "planning/test_plan"],
    "train_cc/setup/stage.py": ["planning/test_plan", RESUME, "run/test_folder"],
    "train_cc/io/fields.py": [FLAGS],
    "train_cc/io/products.py": [],
    "train_cc/pretrain/networks.py": ["pretrain/test_vae", "pretrain/test_teacher"],
    "train_cc/pretrain/resumable.py": [],
    "convert_weight/pipeline.py": ["evaluation/test_sampling", "convert/test_exports"],
    "evaluation/metrics.py": [],
    "evaluation/report/verdict.py": [],
}
# Subprocesses, waits and large models: seconds that would be paid by every mutant.
SLOW = "signal or kill or launcher or launch or two_processes or compile or benchmark or eight_bit or every_size"
REPORT = "report.txt"
ARITHMETIC = {"Add", "Sub", "Mul", "Div"}
COMPARISONS = {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"}


def tests_of(module: str) -> list[str]:
    """The tests of the module's own name, such as run/test_ema for train_cc/run/ema.py, and those of the table."""
    folder, name = Path(module).parent, Path(module).stem
    room = "paper" if folder.name == "train_cc" else "evaluation" if folder.parts[0] == "evaluation" else folder.name
    own = f"{ROOMS.get(room, room)}/test_{name}"
    tests = list(dict.fromkeys([own, *MODULES[module]]))
    return [test for test in tests if test != own or (ROOT / "tests" / f"{own}.py").exists()] or [own]


def sensible(operator: str) -> bool:
    """True if an operator's mutants tell something: one that is a type error is noticed by any test at all."""
    name = operator.split("/")[1]
    if match := re.fullmatch(r"ReplaceBinaryOperator_(\w+)_(\w+)", name):
        return match[2] in ARITHMETIC and not match[1].startswith(("Bit", "LShift", "RShift"))
    if match := re.fullmatch(r"ReplaceComparisonOperator_(\w+)_(\w+)", name):
        return {match[1], match[2]} <= COMPARISONS or {match[1], match[2]} in ({"Is", "IsNot"}, {"In", "NotIn"})
    return "Invert" not in name and "UAdd" not in name and name != "NoOp"


def copy_of_the_tree(folder: Path) -> None:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def preload() -> None:
    """Import what every test imports and no mutant is in."""
    for name in ("accelerate", "jinja2", "matplotlib.pyplot", "peft", "pytest", "scipy.stats", "sklearn.datasets"):
        importlib.import_module(name)
    for name in ("timm", "torch_fidelity", "diffusers.pipelines", "diffusers.models.autoencoders.autoencoder_kl"):
        importlib.import_module(name)
    gc.freeze()  # pytest collects garbage thoroughly at its end, in every fork


def passes(folder: Path, tests: list[str], seconds: float) -> tuple[bool, str]:
    """True if ``tests`` pass in a fork, and which failed first; too long counts as failed."""
    report = folder / REPORT
    child = os.fork()
    if child == 0:
        os.setsid()
        with report.open("w") as out:
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
            os.chdir(folder)
            sys.path[0] = str(folder)
            for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:  # this program's own
                del sys.modules[name]
            import pytest

            words = ["-x", "-q", "-p", "no:cacheprovider", "--durations=0", "-k", f"not ({SLOW})", "--tb=line"]
            names = [name.partition("::") for name in tests]
            files = [f"tests/{file}.py{colons}{test}" for file, colons, test in names]
            code = pytest.main([*words, "-m", "not slow", *files])
            sys.stdout.flush()
        os._exit(int(code))
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", report.read_text(errors="replace"), re.MULTILINE)
            return status == 0, failed[0] if failed else f"exit {status}"
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False, "timeout"
        time.sleep(0.01)


def session_of(module: str, sessions: Path):
    """The mutants of ``module``, as cosmic-ray writes them down; the file's name says which content they are of."""
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import WorkDB, use_db

    digest = hashlib.sha256((ROOT / module).read_bytes()).hexdigest()[:8]
    path = sessions / f"{module.replace('/', '.').removesuffix('.py')}-{digest}.sqlite"
    if not path.exists():
        with use_db(path, WorkDB.Mode.create) as db:
            init([Path(module)], db, {})
    return use_db(path, WorkDB.Mode.open)


def attack(module: str, folder: Path, sessions: Path) -> tuple[int, int]:
    """Meet every mutant of ``module`` that was not killed before; print survivors. Returns killed, of how many."""
    from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

    file, began = folder / module, time.monotonic()
    original = file.read_text()
    sys.dont_write_bytecode = False
    fine, failed = passes(folder, tests_of(module), 1800)
    if not fine:
        text = (folder / REPORT).read_text()[-3000:]
        raise SystemExit(f"{module}: its tests fail without a mutant: {failed}\n{text}")
    limit = 15 + 4 * (time.monotonic() - began)
    # What the first run compiled stays for all others, but not of the file that changes faster than its time of change.
    sys.dont_write_bytecode = True
    Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)
    with session_of(module, sessions) as session:
        # The survivors of earlier runs again: the tests may have grown.
        met = {job for job, result in session.results if result.test_outcome != TestOutcome.SURVIVED}
        for item in [item for item in session.work_items if item.job_id not in met]:
            (mutation,) = item.mutations
            if not sensible(mutation.operator_name):
                session.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))
                continue
            mutant = mutated(original, mutation)
            file.write_text(mutant)
            survived, by = passes(folder, tests_of(module), limit)
            file.write_text(original)
            outcome = TestOutcome.SURVIVED if survived else TestOutcome.KILLED
            diff = list(difflib.unified_diff(original.splitlines(), mutant.splitlines(), n=0, lineterm=""))[3:]
            session.set_result(item.job_id, WorkResult(WorkerOutcome.NORMAL, by, outcome, "\n".join(diff)))
            if survived:
                where = f"{module}:{mutation.start_pos[0]} in {mutation.definition_name}"
                print(f"survived: {where}", *diff, sep="\n  ", flush=True)
        results = [result for _, result in session.results if result.worker_outcome == WorkerOutcome.NORMAL]
    return sum(result.is_killed for result in results), len(results)


def mutated(code: str, mutation) -> str:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    return mutate_code(code, get_operator(mutation.operator_name)(**mutation.operator_args), mutation.occurrence)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--sessions", type=Path, default=ROOT / "runs" / "mutation", help="folder of the results")
    args = parser.parse_args()
    args.sessions.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    preload()
    chosen = [module for module in MODULES if not args.words or any(word in module for word in args.words)]
    killed = total = 0
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_tree(Path(folder))
        for module in chosen:
            began = time.monotonic()
            of_module = attack(module, Path(folder), args.sessions)
            killed, total = killed + of_module[0], total + of_module[1]
            print(f"{module}: {of_module[0]} of {of_module[1]} killed, {time.monotonic() - began:.0f} s", flush=True)
    print(f"in all: {killed} of {total} killed, {killed / max(1, total):.1%}")


if __name__ == "__main__":
    main()
