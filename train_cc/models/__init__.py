"""The networks. None of them knows of distillation."""

from train_cc.models.dinov2 import DINOv2Classifier
from train_cc.models.estimator import ScoreEstimator
from train_cc.models.sit import SIT_SIZES, SiT

__all__ = ["SIT_SIZES", "DINOv2Classifier", "ScoreEstimator", "SiT"]
