"""The rows of the frontier: guidance, what is trained from each cold start, and the published figures."""

from dataclasses import dataclass

from evaluation.files import METRICS


@dataclass(frozen=True)
class Guidance:
    """Of the real score while training; of the sampler for the teacher."""

    name: str
    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def flags(self, scale: str, interval: str) -> list[str]:
        return [scale, str(self.scale), interval, str(self.low), str(self.high)]


OFF, ON, STRONG = Guidance("off"), Guidance("1.5", 1.5), Guidance("4", 4.0)
ON_07, ON_04, STRONG_04 = (
    Guidance("1.5 on t <= 0.7", 1.5, 0.0, 0.7),
    Guidance("1.5 on t <= 0.4", 1.5, 0.0, 0.4),
    Guidance("3 on t <= 0.4", 3.0, 0.0, 0.4),
)
# What is trained from a setting's cold start, with as many updates each: name -> flags of the stage's launcher.
# {statistics} and {black_box} are files: a stage that names one is left out where the file was not given.
NO_REWARD = ("--encoder-type", "none")
FRECHET = ("--reward", "frechet", "1", "{statistics}")
STAGES = {
    "RL": (),
    "control": NO_REWARD,
    "RL 0.05": ("--reward-weight", "0.05"),
    "Frechet": (*NO_REWARD, *FRECHET),
    "Frechet, global": (*NO_REWARD, *FRECHET, "--frechet-unconditional"),
    "Frechet + RL 0.05": ("--reward-weight", "0.05", *FRECHET),
    "tilt": (*NO_REWARD, "--tilt", "1", "python", "{black_box}"),
}
SETTINGS = {
    OFF: tuple(STAGES),
    ON: ("RL", "control"),
    STRONG: (),
    ON_07: (),
    ON_04: ("RL", "control", "Frechet", "Frechet + RL 0.05"),
    STRONG_04: (),
}
TEACHERS = (OFF, ON)
# Published 1-step results, ImageNet 256, 50 000 samples (DMDR, arXiv 2511.13649).
PUBLISHED = {
    "guidance off": (2.13, 0.64, 232.15, 0.77),
    "guidance 1.5": (5.20, 0.48, 387.24, 0.88),
    "guidance 4": (15.70, 0.11, 453.65, 0.86),
    "guidance off + RL": (6.95, 0.40, 416.01, 0.90),
    "guidance 1.5 + RL": (13.43, 0.24, 494.43, 0.93),
}


def row_name(guidance: Guidance, stage: str) -> str:
    if stage == "teacher":
        return "teacher" if guidance == OFF else f"teacher, guidance {guidance.name}"
    return f"guidance {guidance.name}" + ("" if stage == "cold start" else f" + {stage}")


def folder_name(name: str) -> str:
    return "".join(c if c.isalnum() or c == "." else "_" for c in name.replace("<=", "upto").replace("+", "and"))


def published_table() -> str:
    lines = ["| | " + " | ".join(METRICS[:4]) + " |", "|---" * 5 + "|"]
    lines += [f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in PUBLISHED.items()]
    return "\n".join(lines)
