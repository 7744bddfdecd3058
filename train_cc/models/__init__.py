"""The networks. None of them knows of distillation."""

import logging
from importlib import import_module

PLACES = {"SIT_SIZES": "sit", "DINOv2Classifier": "dinov2", "ScoreEstimator": "estimator", "SiT": "sit"}
# diffusers says at every cast to another dtype that no module should be kept in fp32.
logging.getLogger("diffusers.models.modeling_utils").addFilter(lambda told: "kept in float32: []" not in told.msg)
__all__ = ["SIT_SIZES", "DINOv2Classifier", "ScoreEstimator", "SiT"]


def __getattr__(name: str) -> object:
    """The public names, imported when they are asked for: who evaluates needs no peft, which takes a second."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PLACES[name]}"), name)
