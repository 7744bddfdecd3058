"""The quality-diversity table: what guidance and a reward each trade, from one command.

Trains every row by the recipe's launchers, samples and evaluates all in one feature space, and writes `frontier.md`,
`frontier.json` and `frontier.png`. Finished rows are kept when it is run again, an interrupted one continues: only if
they were asked for with the same settings, else the difference is named. The first failure stops all.

`python -m evaluation.frontier --recipe digits --teacher TEACHER --output-dir OUTPUT --base-steps 400 --extra-steps 100`
"""

import argparse
import os
import shlex
import signal
import subprocess
import threading
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from evaluation.asked import ROOT, folder_sha256, require_reference, require_same, settings_of
from evaluation.files import METRICS, read_figures, table, write_figures
from evaluation.rows import SETTINGS, STAGES, TEACHERS, Guidance, folder_name, published_table, row_name
from train_cc.io import flags
from train_cc.io.errors import InputError, exits_on_input_error
from train_cc.io.read import require_file, require_folder, sha256
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.io.write import (
    check_output_dir,
    check_output_file,
    locked,
    mark_of,
    record,
    record_of,
    write_atomically,
    write_record,
)

LAUNCHERS = {
    "cold_start": "scripts/cold_start_{}.sh",
    "dmdr": "scripts/dmdr_{}_refl.sh",
    "evaluate": "scripts/evaluate_{}.sh",
}


class Frontier:
    """Runs the recipe's launchers; every product has its place under ``folder``, and is not made twice."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.output_dir
        self.teacher_sha256 = folder_sha256(args.teacher)
        self._running: set[subprocess.Popen] = set()
        self._lock, self._stopped = threading.Lock(), False

    def launch(self, script: str, log: Path, words: list[str], **variables: object) -> None:
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        log.parent.mkdir(parents=True, exist_ok=True)
        command = ["bash", LAUNCHERS[script].format(self.args.recipe), *words]
        with log.open("a", encoding="utf-8") as file:
            with self._lock:
                if self._stopped:
                    raise InputError("stopped")
                # A session of its own: what the launcher starts is stopped with it.
                options = {"stdout": file, "stderr": file, "start_new_session": True}
                process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        if code:
            told = "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-3:]).strip()
            raise InputError(f"{' '.join(command)} failed with exit code {code}; its log is {log}:\n{told}")

    def stop(self) -> None:
        """Ask what is running to end, as a scheduler does: trainings write their checkpoint first."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)

    def script(self, name: str) -> Path:
        return ROOT / LAUNCHERS[name].format(self.args.recipe)

    def evaluate(self, name: str, generator: Path, words: list[str]) -> None:
        row = self.folder / "rows" / folder_name(name)
        settings = settings_of(self.script("evaluate"), words, generator=folder_sha256(generator))
        require_same(self.folder / "asked" / "rows" / f"{row.name}.json", settings, row)
        if not (row / "figures.json").exists():
            self.launch("evaluate", row / "log.txt", [str(generator), str(row), *words])
        print(f"row: {name}", flush=True)

    def teacher(self, guidance: Guidance) -> None:
        words = ["--sampler", self.args.teacher_sampler, "--num-steps", str(self.args.teacher_steps)]
        words += guidance.flags("--guidance-scale", "--guidance-interval")
        self.evaluate(row_name(guidance, "teacher"), self.args.teacher, words)

    def setting(self, guidance: Guidance) -> None:
        words = guidance.flags("--real-guidance-scale", "--real-guidance-interval")
        cold = self.folder / "runs" / folder_name(row_name(guidance, "cold start"))
        self.train("cold_start", cold, [*words, "--max-train-steps", str(self.args.base_steps)], {})
        self.evaluate(row_name(guidance, "cold start"), cold / "generator", [])
        made_of = {"cold start": folder_sha256(cold / "generator")}
        for stage, flags_of_stage in self.stages(guidance).items():
            run = self.folder / "runs" / folder_name(row_name(guidance, stage))
            steps = str(self.args.base_steps + self.args.extra_steps)
            more = [*words, "--max-train-steps", steps, *flags_of_stage]
            units = cold / "checkpoints" / "torch_units" / f"step-{self.args.base_steps}.pt"
            self.train("dmdr", run, more, made_of | self.files_sha256(flags_of_stage), RESUME_CKPT=units)
            self.evaluate(row_name(guidance, stage), run / "generator", [])

    def stages(self, guidance: Guidance) -> dict[str, list[str]]:
        """Name -> flags of what is trained from a setting's cold start, with the files that were given."""
        given = {"{statistics}": self.args.statistics, "{black_box}": self.args.black_box}
        filled = {
            stage: [str(given.get(word, word)) for word in STAGES[stage]]
            for stage in SETTINGS[guidance]
            if all(given[word] is not None for word in STAGES[stage] if word in given)
        }
        return {stage: words for stage, words in filled.items() if not self.args.stages or stage in self.args.stages}

    def files_sha256(self, words: list[str]) -> dict[str, str]:
        """Of the files among a stage's flags: another content under one name is another row."""
        paths = (Path(word.rpartition(":")[0] or word) for word in words)
        return {path.name: sha256(path) for path in paths if path.is_file()}

    def train(self, script: str, run: Path, words: list[str], made_of: dict[str, str], **variables: object) -> None:
        """``made_of``: hashes of what the run starts from, beside the teacher."""
        words = [*words, "--keep-checkpoints", "1", *self.args.train_flags]
        settings = settings_of(self.script(script), words, teacher=self.teacher_sha256, **made_of)
        require_same(self.folder / "asked" / "runs" / f"{run.name}.json", settings, run)
        done = run / "generator" / "config.json"
        if not done.exists():
            log = self.folder / "logs" / f"{run.name}.txt"
            self.launch(script, log, words, OUTPUT_DIR=run.resolve(), TEACHER=self.args.teacher, **variables)
        if not done.exists():
            raise InputError(f"{run} is not finished: its training was stopped; the same command continues")

    def rows(self) -> dict[str, dict]:
        """All rows in the table's order, each as evaluate.py wrote it."""
        names = [row_name(guidance, "teacher") for guidance in TEACHERS]
        names += [row_name(g, stage) for g in SETTINGS for stage in ("cold start", *self.stages(g))]
        kept, found = ("features", "features_sha256", "reference_sha256"), {}
        for name in names:
            path = self.folder / "rows" / folder_name(name) / "figures.json"
            content = read_figures(path)
            (row, *others) = content["rows"].values()
            if others or set(METRICS[:4]) - row["figures"].keys() or not isinstance(row.get("images"), int):
                raise InputError(f"{path} holds other figures than those of one row; move it away to make it again")
            found[name] = row | {key: str(content.get(key)) for key in kept}
            require_reference(content, path)
        spaces = {
            (row["features"], row["features_sha256"], row["reference_sha256"], row["images"]) for row in found.values()
        }
        if len(spaces) > 1:
            raise InputError(f"the rows of {self.folder} are not of one feature space, reference and count: {spaces}")
        return found


def run_all(frontier: Frontier, jobs: int) -> None:
    """Every row, ``jobs`` at once. The first failure, and a signal, stop all others."""

    def terminated(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, terminated)
    pool = ThreadPoolExecutor(jobs)
    try:
        work: list[Future] = [pool.submit(frontier.setting, guidance) for guidance in SETTINGS]
        work += [pool.submit(frontier.teacher, guidance) for guidance in TEACHERS]
        done, _ = wait(work, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        frontier.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


def train_flags(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is {text!r}; allowed: flags, quoted as in a shell ({error})") from error


def build_parser() -> flags.Parser:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--recipe", choices=["digits", "sitxl"], required=True, help="whose launchers in scripts/")
    parser.add_argument("--output-dir", type=flags.path, required=True, help="folder of all rows and of the table")
    parser.add_argument("--teacher", type=flags.path, required=True, help="model folder")
    parser.add_argument("--base-steps", type=flags.COUNT, required=True, help="generator updates of the cold start")
    parser.add_argument(
        "--extra-steps", type=flags.COUNT, required=True, help="more updates, with the reward or without"
    )
    parser.add_argument(
        "--teacher-sampler", choices=["euler", "heun"], default="euler", help="solver of the rows teacher"
    )
    parser.add_argument("--teacher-steps", type=flags.STEPS, default=32, help="steps of that solver")
    parser.add_argument(
        "--train-flags", type=train_flags, default=[], help="more flags for every training, in one string"
    )
    parser.add_argument(
        "--statistics", type=flags.path, help="for the rows Frechet: a file of evaluation/statistics.py"
    )
    parser.add_argument("--black-box", help="for the row tilt: FILE.py:FUNCTION")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="only these, beside the cold starts")
    parser.add_argument("--jobs", type=flags.integer(1, 64), default=1, help="settings trained at once")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """What can be refused before anything is trained."""
    require_folder(args.teacher, f"a model folder, with config.json and {WEIGHTS_NAME},", "config.json", WEIGHTS_NAME)
    if args.statistics is not None:
        require_file(args.statistics, "a statistics file of evaluation/statistics.py")
    if args.black_box is not None:
        require_file(Path(args.black_box.rpartition(":")[0]), "FILE.py:FUNCTION")
    made = record_of(args.output_dir)
    if made and made["stage"] != "frontier":
        raise InputError(f"--output-dir {args.output_dir} holds a {made['stage']}, not a frontier; choose another")
    check_output_dir(args.output_dir, overwrite=True)
    for name, kind in (("frontier.md", "a table"), ("frontier.json", "figures"), ("frontier.png", "a picture")):
        check_output_file(args.output_dir / name, flag="the output", kind=kind)


def write_results(args: argparse.Namespace, rows: dict[str, dict]) -> str:
    count = next(iter(rows.values()))["images"]
    text = f"{args.recipe}, {count} images a row:\n\n{table(rows, count)}\n"
    text += f"\nPublished, ImageNet 256, 50 000 images (arXiv 2511.13649):\n\n{published_table()}\n"
    write_atomically(args.output_dir / "frontier.md", f"{text}\n<!-- {mark_of('a table')} -->\n")
    write_figures(args.output_dir / "frontier.json", rows)
    from evaluation.scatter import picture  # matplotlib takes a second

    picture(rows, args.output_dir / "frontier.png")
    return text


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    args.output_dir, args.teacher = (Path(os.path.abspath(path)) for path in (args.output_dir, args.teacher))
    if args.statistics is not None:
        args.statistics = Path(os.path.abspath(args.statistics))
    check_arguments(args)
    with locked(args.output_dir):
        if not record_of(args.output_dir):
            write_record(args.output_dir, record("frontier", vars(args)))
        frontier = Frontier(args)
        run_all(frontier, args.jobs)
        print(write_results(args, frontier.rows()))
    print(f"written: {args.output_dir}/frontier.{{md,json,png}}")


if __name__ == "__main__":
    main()
