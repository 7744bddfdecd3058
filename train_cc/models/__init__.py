"""The networks. None of them knows of distillation."""

from importlib import import_module

PLACES = {"SIT_SIZES": "backbone", "DINOv2Classifier": "dinov2", "ScoreEstimator": "estimator", "SiT": "backbone"}
PLACES |= {"load_network": "backbone"}
__all__ = ["SIT_SIZES", "DINOv2Classifier", "ScoreEstimator", "SiT", "load_network"]


def __getattr__(name: str) -> object:
    """The public names, imported when they are asked for: who evaluates needs no peft, which takes a second."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PLACES[name]}"), name)
