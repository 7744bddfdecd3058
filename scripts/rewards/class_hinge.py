"""A hinge on a class's probability: --reward python 0.5 scripts/rewards/class_hinge.py:class_hinge

What is recognised well enough has no gradient any more, so that hard classes weigh most. CLASSIFIER in the environment
names a folder of train_cc/pretrain/classifier.py.
"""

import os

import torch

from train_cc.models.classifier import ImageClassifier

ENOUGH = 0.7


def setup(device):
    global classifier
    classifier = ImageClassifier.from_pretrained(os.environ["CLASSIFIER"]).to(device)


def class_hinge(images, labels):
    probability = classifier(images).softmax(dim=1).gather(1, labels[:, None])[:, 0]
    return -torch.relu(ENOUGH - probability)
