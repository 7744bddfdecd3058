"""What the report says first: did it work, in words and from figures.

A run is judged by its own log and by the rows of figures that were made of its own generator: samples carry the hash of
the weights that made them. Other rows beside the run are shown and not judged.
"""

from dataclasses import dataclass, field

from evaluation.report.rules import warnings_of
from evaluation.report.runs import RunLog, Table

LEAST_UPDATES = 50  # fewer say nothing: the estimator has hardly begun to follow
NOISE = 0.03  # of precision and recall: another seed moves them by so much on digits (docs/results.md)
# Arguments that a control shares with the run that it is the control of.
OF_A_CONTROL = ("resume_ckpt", "max_train_steps", "batch_size", "real_guidance_scale", "seed")
KEPT_WELL, KEPT_AT_ALL = 0.75, 0.5  # of the teacher's recall and precision
# From the worst to the best; the page's title is that of its worst run.
TITLES = {
    "bad": "Something went wrong",
    "short": "Too short to judge",
    "unfinished": "Not finished",
    "partly": "It worked in part",
    "unmeasured": "No warning, but no figure to judge by",
    "good": "It worked",
}


@dataclass
class OfRun:
    """What is said of one run; ``state`` is a key of `TITLES`."""

    name: str
    state: str = "good"
    sentences: list[str] = field(default_factory=list)

    def say(self, sentence: str, state: str = "good") -> None:
        self.sentences.append(sentence)
        self.state = worst([self.state, state])


@dataclass
class Verdict:
    state: str
    runs: list[OfRun]

    @property
    def title(self) -> str:
        return TITLES[self.state]


def worst(states: list[str]) -> str:
    return min(states, key=list(TITLES).index)


def verdict(runs: list[RunLog], tables: list[Table]) -> Verdict:
    told = [judge(run, runs, tables) for run in runs]
    states = [each.state for each in told]
    if "unmeasured" in states and set(states) & {"good", "partly"}:  # one run's figures are enough for a title
        states = [state for state in states if state != "unmeasured"]
    return Verdict(worst(states), told)


def judge(run: RunLog, runs: list[RunLog], tables: list[Table]) -> OfRun:
    told = OfRun(run.name)
    if run.stopped:
        told.say(f"It stopped itself: {run.stopped}", "bad")
    if run.updates < LEAST_UPDATES:
        told.say(f"{progress(run)} Below {LEAST_UPDATES} updates neither curves nor samples say anything.", "short")
        return told
    warnings = warnings_of(run.series)
    for text in warnings:
        told.say(f"{text[0].upper()}{text[1:]}.", "bad")
    measured = [(table, name) for table in tables if (name := row_of(run.generator_sha256, table))]
    for table, name in measured[:2]:
        say_figures(told, run, runs, table, name)
    fine = " No rule found anything wrong in its log." if not warnings and not run.stopped else ""
    told.say(progress(run) + fine, "good" if run.finished else "unfinished")
    if run.finished and not measured:
        told.say("Its samples were not measured: see docs/evaluation.md, or look at them below.", "unmeasured")
    return told


def progress(run: RunLog) -> str:
    first, last = (int(run.series.steps[i]) for i in (0, -1)) if run.updates else (0, 0)
    whole = run.arguments.get("max_train_steps", "?")
    part = f"{run.updates} update{'s' * (run.updates != 1)}" + (f", {first} to {last}" if first > 1 else "")
    if run.finished:
        return f"Finished: {part}."
    return f"Not finished (still running, stopped or killed): {part}, of {whole}. The same command continues."


def row_of(digest: str, table: Table, multi_step: bool = False) -> str:
    """The row of ``table`` whose samples were made by the weights of hash ``digest``, without guidance; "" if none."""
    for name, made_by in table.made_by.items():
        arguments = made_by.get("arguments")
        if not digest or made_by.get("generator_sha256") != digest or not isinstance(arguments, dict):
            continue
        guided = arguments.get("guidance_scale") not in (None, "None", "1", "1.0", "0.0")
        if not guided and (arguments.get("sampler") in ("euler", "heun", "sde")) == multi_step:
            return name
    return ""


def say_figures(told: OfRun, run: RunLog, runs: list[RunLog], table: Table, name: str) -> None:
    space = table.space.rpartition("/")[2] or "space not recorded"
    figures, where = table.rows[name], f" ({table.count:,} images, {space})"
    hashes = run.record.get("sha256")
    teacher = row_of(hashes.get("teacher", ""), table, multi_step=True) if isinstance(hashes, dict) else ""
    base, base_words = base_of(run, runs, table)
    if base:
        against_control(told, figures, table.rows[base], base_words, where)
    elif teacher:
        against_teacher(told, run, figures, table.rows[teacher], where)
    elif not rewarded(run):
        told.say(f"{shown(figures)}{where}. The teacher was not measured beside it.", "unmeasured")
    if rewarded(run) and not base:
        beside = "" if teacher else f"{shown(figures)}{where}. "
        told.say(f"{beside}No control was measured beside it, so the reward's effect is not known.", "unmeasured")


def shown(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())


def rewarded(run: RunLog) -> bool:
    """By a gradient or by a tilt."""
    kinds = (run.arguments.get(name) for name in ("reward", "tilt"))
    return run.arguments.get("encoder_type", "none") not in ("none", None) or any(kinds)


def against_teacher(told: OfRun, run: RunLog, figures: dict, teacher: dict, where: str) -> None:
    if not {"Recall", "Precision", "FID"} <= figures.keys() & teacher.keys():
        return
    kept = {name: figures[name] / max(teacher[name], 1e-6) for name in ("Recall", "Precision")}
    steps = run.arguments.get("num_steps", 1)
    subject = {1: "One step keeps", 2: "Two steps keep"}.get(steps, f"{steps} steps keep")
    state, verb = "good", ""
    guided = (run.arguments.get("real_guidance_scale") or 1) > 1
    if min(kept.values()) < KEPT_WELL:
        lost = "diversity" if kept["Recall"] < kept["Precision"] else "quality"
        state = "partly" if guided or min(kept.values()) >= KEPT_AT_ALL else "bad"
        verb = f" Much {lost} is lost" + (", which guidance asks for." if guided and lost == "diversity" else ".")
    told.say(
        f"{subject} {kept['Recall']:.0%} of the teacher's recall ({figures['Recall']:.3f} of {teacher['Recall']:.3f}) "
        f"and {kept['Precision']:.0%} of its precision; FID is {figures['FID']:.2f} against {teacher['FID']:.2f}"
        f"{where}.{verb}",
        state,
    )


def base_of(run: RunLog, runs: list[RunLog], table: Table) -> tuple[str, str]:
    """The row that a rewarded run is read against, and what it is: the control, else the run that it started from."""
    if not rewarded(run):
        return "", ""
    start = run.arguments.get("resume_ckpt")
    for other in runs:
        same = [other.arguments.get(name) == run.arguments.get(name) for name in OF_A_CONTROL]
        if not rewarded(other) and all(same) and (row := row_of(other.generator_sha256, table)):
            return row, "the control, as many updates without it"
    for other in runs:
        inside = isinstance(start, str) and f"/{other.folder.resolve().name}/checkpoints/" in start
        if not rewarded(other) and inside and (row := row_of(other.generator_sha256, table)):
            return row, "the run that it started from; there is no control"
    return "", ""


def against_control(told: OfRun, figures: dict, base: dict, base_words: str, where: str) -> None:
    if not {"Recall", "Precision", "FID"} <= figures.keys() & base.keys():
        return
    precision, recall = (figures[name] - base[name] for name in ("Precision", "Recall"))
    values = f"precision {figures['Precision']:.3f} against {base['Precision']:.3f}, recall {figures['Recall']:.3f} "
    values += f"against {base['Recall']:.3f}, FID {figures['FID']:.2f} against {base['FID']:.2f}"
    state = "good"
    if abs(precision) < NOISE and abs(recall) < NOISE:
        said = "The reward moved neither precision nor recall by more than another seed would"
    elif precision >= NOISE and recall <= -NOISE:
        said = f"The reward buys {precision:.2f} of precision for {-recall:.2f} of recall"
    elif precision >= NOISE:
        said = f"The reward raises precision by {precision:.2f}; recall moved by {recall:+.2f}"
    elif recall <= -NOISE:
        said, state = (
            f"The reward cost {-recall:.2f} of recall, and precision moved by {precision:+.2f} alone",
            "partly",
        )
    elif precision <= -NOISE:
        said, state = f"The reward cost {-precision:.2f} of precision, and recall moved by {recall:+.2f}", "partly"
    else:
        said = f"The reward moved precision by {precision:+.2f} and recall by {recall:+.2f}"
    told.say(f"{said}, against {base_words}: {values}{where}.", state)
    if figures["Recall"] < 0.5 * base["Recall"]:
        told.say("Recall is less than half of that: diversity has collapsed. Lower the reward's weight.", "bad")
    if figures["Precision"] < 0.5 * base["Precision"]:
        told.say("Precision is less than half of that: quality has collapsed. Lower the reward's weight.", "bad")
