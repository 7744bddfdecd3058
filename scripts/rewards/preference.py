"""A preference model of the transformers library: --reward python 0.1 scripts/rewards/preference.py:preference

PREFERENCE_MODEL in the environment names a local folder of a CLIP-like model (such as PickScore's); PROMPTS a text file
with one prompt a class, in the order of the labels.
"""

import os
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

SIDE = 224
MEAN, STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)  # of CLIP's images


def setup(device):
    global model, texts
    folder = os.environ["PREFERENCE_MODEL"]
    model = AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval().requires_grad_(False)
    words = AutoProcessor.from_pretrained(folder, local_files_only=True)(
        text=Path(os.environ["PROMPTS"]).read_text().splitlines(), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        texts = F.normalize(model.get_text_features(**words.to(device)), dim=1)


def preference(images, labels):
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    pixels = F.interpolate(images.expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bicubic", antialias=True)
    features = F.normalize(model.get_image_features(pixel_values=(pixels - mean) / std), dim=1)
    return (features * texts[labels]).sum(dim=1)
