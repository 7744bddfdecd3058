"""The report's first lines: did it work, in words and from figures.

A run is judged by its own log and by the rows of figures made of its own generator: samples carry the hash of the
weights that made them. Other rows beside the run are printed and not judged.

A rule maps a log to warnings. The thresholds are far from the values of healthy digits runs of two seeds, and were met
by runs made to fail (docs/results.md). Remedies: docs/troubleshooting.md.
"""

import itertools
import re
from dataclasses import dataclass, field

import numpy as np

from evaluation.report.run_log import FigureTable, RunLog, Series
from train_cc.run.logbook import band_columns

LEAST_UPDATES = 50  # fewer are too few: the estimator has hardly begun to follow
NOISE = 0.03  # of precision and recall: another seed moves them by so much on digits (docs/results.md)
# Arguments that a control shares with its run.
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

# Rules ------------------------------------------------------------------------------------------------------------


def estimator_falls_behind(series: Series) -> list[str]:
    """The score gap grows while the fake loss rises, in the band of small t.

    There a good fake score's loss hardly depends on the samples; at large t it does, and may well rise.
    """
    small = band_columns("loss_fake")[0]
    if not (series.has(small) and series.has("score_gap")):
        return []
    losses, gaps = ([series.part(name, i / 10, (i + 1) / 10) for i in range(10)] for name in (small, "score_gap"))
    first_loss, first_gap = series.part(small, 0, 0.02), series.part("score_gap", 0, 0.02)
    first_loss = first_loss if np.isfinite(first_loss) else losses[0]
    loss, gap = np.nanmax(losses), np.nanmax(gaps)
    text = (
        f"the estimator falls behind the generator: at small t its loss rose to {loss:.3g} from {first_loss:.3g} "
        f"while the score gap rose to {gap:.3g} from {first_gap:.3g}. Raise --learning-rate-estimator or "
        "--ratio-update, or lower --learning-rate-generator"
    )
    return [text] if loss > 1.6 * first_loss and gap > 2 * first_gap else []


def generator_too_fast(series: Series) -> list[str]:
    ratio = series.part("update_ratio_generator", 0, 1)
    text = f"the generator's updates are {ratio:.2%} of its weights each (healthy: about 0.1 %): "
    return [text + "lower --learning-rate-generator"] if ratio > 3e-3 else []


def rewards_in(series: Series, form: str) -> dict[str, str]:
    """Name of a reward -> its column, for columns of ``form``, such as "loss_reward_{}"."""
    pattern = re.compile(re.escape(form).replace(r"\{\}", "(.+)") + "$")
    return {match[1]: match[0] for name in series.columns if (match := pattern.match(name)) and series.has(name)}


def reward_too_strong(series: Series) -> list[str]:
    warnings, of_dmd = [], series.of_column("grad_norm_dmd_x0")
    for name, column in rewards_in(series, "grad_norm_reward_{}_x0").items():
        times = float(np.nanmean(series.of_column(column)) / max(np.nanmean(of_dmd), 1e-30))
        if times > 5:
            warnings.append(
                f"the gradient of the reward {name} at x0 is {times:.0f} times that of distribution matching, on "
                "average over the run: lower its weight"
            )
    return warnings


def gradients_oppose(series: Series) -> list[str]:
    return [
        f"the gradients of the reward {name} and of matching at x0 point against each other (cosine {cosine:.2f}): "
        "lower its weight"
        for name, column in rewards_in(series, "grad_cosine_reward_{}_x0").items()
        if (cosine := series.part(column, 0.1, 1)) < -0.3
    ]


def reward_is_hacked(series: Series) -> list[str]:
    """A rewarding classifier is content, the one that never rewards is not."""
    warnings = []
    last_holdout = series.part("preview_accuracy_holdout", 0.5, 1)
    holdout = [series.part("preview_loss_holdout", *part) for part in ((0, 0.35), (0.75, 1))]
    for name, column in rewards_in(series, "preview_accuracy_reward_{}").items():
        rewarding = series.part(column, 0.5, 1)
        own = [series.part(f"preview_loss_reward_{name}", *part) for part in ((0, 0.35), (0.75, 1))]
        parted = own[1] < own[0] and holdout[1] > 3 * max(holdout[0], 0.03)
        if rewarding - last_holdout > 0.15 or parted:
            warnings.append(
                f"the reward {name} rises and the held-out classifier does not follow (accuracy of the previews "
                f"{rewarding:.2f} and {last_holdout:.2f}): the reward is being hacked; lower its weight or stop earlier"
            )
    return warnings


def class_collapsed(series: Series) -> list[str]:
    names = ("holdout", *(f"reward_{name}" for name in rewards_in(series, "preview_coverage_reward_{}")))
    return [
        f"{1 - last:.0%} of the previews' classes are no longer recognised once by the {name} classifier: "
        "a class has collapsed"
        for name in names
        if (last := series.part(f"preview_coverage_{name}", 0.75, 1)) < 0.85
    ][:1]


def warnings_of(series: Series) -> list[str]:
    """The warnings of all rules about one run's log."""
    rules = (estimator_falls_behind, generator_too_fast, reward_too_strong)
    rules += (gradients_oppose, reward_is_hacked, class_collapsed)
    return [text for rule in rules for text in rule(series)]


def collapsed_recall(rows: dict[str, dict]) -> list[str]:
    """Precision up while recall collapses: a trained row against the row that it started from or is controlled by."""
    return [
        f"{name}: recall {figures['Recall']:.2f} is less than half of {before['Recall']:.2f} ({base}), "
        "while precision rose: diversity has collapsed; lower --reward-weight or the guidance scale"
        for (name, figures), (base, before) in itertools.product(rows.items(), repeat=2)
        if (base.startswith(("control", "cold start")) and name.startswith("DMDR")) or name == f"{base} + RL"
        if {"Precision", "Recall"} <= figures.keys() & before.keys()
        if figures["Precision"] > before["Precision"] and figures["Recall"] < 0.5 * before["Recall"]
    ]


# The verdict ------------------------------------------------------------------------------------------------------


@dataclass
class OfRun:
    """The sentences about one run; ``state`` is a key of `TITLES`."""

    name: str
    state: str = "good"
    sentences: list[str] = field(default_factory=list)

    def say(self, sentence: str, state: str = "good") -> None:
        self.sentences.append(sentence)
        self.state = worst([self.state, state])


@dataclass
class Verdict:
    state: str
    title: str
    runs: list[OfRun]


def worst(states: list[str]) -> str:
    return min(states, key=list(TITLES).index)


def verdict(runs: list[RunLog], tables: list[FigureTable]) -> Verdict:
    each = [verdict_on(run, runs, tables) for run in runs]
    states = [of_run.state for of_run in each]
    if "unmeasured" in states and set(states) & {"good", "partly"}:  # one run's figures are enough for a title
        states = [state for state in states if state != "unmeasured"]
    return Verdict(worst(states), TITLES[worst(states)], each)


def verdict_on(run: RunLog, runs: list[RunLog], tables: list[FigureTable]) -> OfRun:
    words = OfRun(run.name)
    if run.stopped:
        words.say(f"It stopped itself: {run.stopped}", "bad")
    if run.updates < LEAST_UPDATES:
        words.say(f"{progress(run)} Below {LEAST_UPDATES} updates neither curves nor samples say anything.", "short")
        return words
    warnings = warnings_of(run.series)
    for text in warnings:
        words.say(f"{text[0].upper()}{text[1:]}.", "bad")
    measured = [(table, name) for table in tables if (name := row_made_by(run.generator_sha256, table))]
    for table, name in measured[:2]:
        say_figures(words, run, runs, table, name)
    fine = " No rule found anything wrong in its log." if not warnings and not run.stopped else ""
    words.say(progress(run) + fine, "good" if run.finished else "unfinished")
    if run.finished and not measured:
        words.say("Its samples were not measured: see docs/evaluation.md, or look at them below.", "unmeasured")
    return words


def progress(run: RunLog) -> str:
    first, last = (int(run.series.steps[i]) for i in (0, -1)) if run.updates else (0, 0)
    whole = run.arguments.get("max_train_steps", "?")
    part = f"{run.updates} update{'s' * (run.updates != 1)}" + (f", {first} to {last}" if first > 1 else "")
    if run.finished:
        return f"Finished: {part}."
    return f"Not finished (still running, stopped or killed): {part}, of {whole}. The same command continues."


def row_made_by(digest: str, table: FigureTable, multi_step: bool = False) -> str:
    """The row of ``table`` whose samples were made by the weights of hash ``digest``, without guidance; "" if none."""
    for name, made_by in table.made_by.items():
        arguments = made_by.get("arguments")
        if not digest or made_by.get("generator_sha256") != digest or not isinstance(arguments, dict):
            continue
        guided = arguments.get("guidance_scale") not in (None, "None", "1", "1.0", "0.0")
        if not guided and (arguments.get("sampler") in ("euler", "heun", "sde")) == multi_step:
            return name
    return ""


def say_figures(words: OfRun, run: RunLog, runs: list[RunLog], table: FigureTable, name: str) -> None:
    space = table.space.rpartition("/")[2] or "space not recorded"
    figures, where = table.rows[name], f" ({table.count:,} images, {space})"
    text = ", ".join(f"{metric} {value:.3g}" for metric, value in figures.items()) + where
    teacher = row_made_by(run.recorded("sha256").get("teacher", ""), table, multi_step=True)
    base, base_words = base_of(run, runs, table)
    if base:
        against_control(words, figures, table.rows[base], base_words, where)
        return
    if teacher:
        against_teacher(words, run, figures, table.rows[teacher], where)
    beside = "" if teacher else f"{text}. "
    if rewarded(run):
        words.say(f"{beside}No control was measured beside it, so the reward's effect is not known.", "unmeasured")
    elif not teacher:
        words.say(f"{beside}The teacher was not measured beside it.", "unmeasured")


def rewarded(run: RunLog) -> bool:
    """By a gradient or by a tilt."""
    kinds = (run.arguments.get(name) for name in ("reward", "tilt"))
    return run.arguments.get("encoder_type", "none") not in ("none", None) or any(kinds)


def compared(figures: dict, others: dict) -> bool:
    return {"Recall", "Precision", "FID"} <= figures.keys() & others.keys()


def against_teacher(words: OfRun, run: RunLog, figures: dict, teacher: dict, where: str) -> None:
    if not compared(figures, teacher):
        return
    shares = {name: figures[name] / max(teacher[name], 1e-6) for name in ("Recall", "Precision")}
    steps = run.arguments.get("num_steps", 1)
    subject = {1: "One step keeps", 2: "Two steps keep"}.get(steps, f"{steps} steps keep")
    state, verb = "good", ""
    guided = (run.arguments.get("real_guidance_scale") or 1) > 1
    if min(shares.values()) < KEPT_WELL:
        lost = "diversity" if shares["Recall"] < shares["Precision"] else "quality"
        state = "partly" if guided or min(shares.values()) >= KEPT_AT_ALL else "bad"
        verb = f" Much {lost} is lost" + (", which guidance asks for." if guided and lost == "diversity" else ".")
    words.say(
        f"{subject} {shares['Recall']:.0%} of the teacher's recall "
        f"({figures['Recall']:.3f} of {teacher['Recall']:.3f}) "
        f"and {shares['Precision']:.0%} of its precision; FID is {figures['FID']:.2f} against {teacher['FID']:.2f}"
        f"{where}.{verb}",
        state,
    )


def base_of(run: RunLog, runs: list[RunLog], table: FigureTable) -> tuple[str, str]:
    """The row that a rewarded run is read against, and its kind: the control, else the run that it started from."""
    if not rewarded(run):
        return "", ""
    start = run.arguments.get("resume_ckpt")
    rows = [(other, row_made_by(other.generator_sha256, table)) for other in runs if not rewarded(other)]
    for other, row in rows:
        if row and all(other.arguments.get(name) == run.arguments.get(name) for name in OF_A_CONTROL):
            return row, "the control, as many updates without it"
    for other, row in rows:
        if row and isinstance(start, str) and f"/{other.folder.resolve().name}/checkpoints/" in start:
            return row, "the run that it started from; there is no control"
    return "", ""


def against_control(words: OfRun, figures: dict, base: dict, base_words: str, where: str) -> None:
    if not compared(figures, base):
        return
    precision, recall = (figures[name] - base[name] for name in ("Precision", "Recall"))
    values = f"precision {figures['Precision']:.3f} against {base['Precision']:.3f}, recall {figures['Recall']:.3f} "
    values += f"against {base['Recall']:.3f}, FID {figures['FID']:.2f} against {base['FID']:.2f}"
    state = "partly" if precision < NOISE and min(precision, recall) <= -NOISE else "good"
    if abs(precision) < NOISE and abs(recall) < NOISE:
        effect = "The reward moved neither precision nor recall by more than another seed would"
    elif precision >= NOISE and recall <= -NOISE:
        effect = f"The reward buys {precision:.2f} of precision for {-recall:.2f} of recall"
    elif precision >= NOISE:
        effect = f"The reward raises precision by {precision:.2f}; recall moved by {recall:+.2f}"
    elif recall <= -NOISE:
        effect = f"The reward cost {-recall:.2f} of recall, and precision moved by {precision:+.2f} only"
    elif precision <= -NOISE:
        effect = f"The reward cost {-precision:.2f} of precision, and recall moved by {recall:+.2f}"
    else:
        effect = f"The reward moved precision by {precision:+.2f} and recall by {recall:+.2f}"
    words.say(f"{effect}, against {base_words}: {values}{where}.", state)
    for name, loss in (("Recall", "diversity"), ("Precision", "quality")):
        if figures[name] < 0.5 * base[name]:
            words.say(f"{name} is less than half of that: {loss} has collapsed. Lower the reward's weight.", "bad")
