"""A timm network as classifier: its preprocessing."""

import torch
from torch.nn import functional as F

from train_cc.models.classifier import ImageClassifier


def test_a_timm_classifier_resizes_bicubic_with_antialias_and_normalises(reward_folder):
    classifier = ImageClassifier.from_pretrained(reward_folder)
    images = torch.rand(2, 1, 80, 80, generator=torch.Generator().manual_seed(0))
    resized = F.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    expected = classifier.network((resized - 0.5) / 0.5)
    torch.testing.assert_close(classifier(images), expected, rtol=1e-5, atol=1e-6)
    aliased = classifier.network((F.interpolate(images, (32, 32), mode="bicubic") - 0.5) / 0.5)
    assert (aliased - expected).abs().max() > 1e-3
    features, logits = classifier.features_and_logits(images)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(classifier.network.get_classifier()(features), expected, rtol=1e-5, atol=1e-6)
