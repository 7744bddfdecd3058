"""Feature spaces: one class, its preprocessing inside, differentiable, and known by its hash."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from evaluation.standins import write_dinov2
from train_cc.io.errors import InputError
from train_cc.io.read import sha256
from train_cc.models import DINOv2Classifier, features
from train_cc.models.classifier import ImageClassifier
from train_cc.models.features import load_space

SOURCES = {"classifier": 1, "dinov2": 3, "timm": 3}  # kind -> channels


def images(channels: int, size: int = 32, count: int = 2) -> torch.Tensor:
    """On the grid of uint8, in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, size, size), generator=generator).float() / 255


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A model that stands for one with timm's published weights, which no test can download."""
    torch.manual_seed(1)
    model = ImageClassifier(
        "test_vit", num_classes=7, in_channels=3, image_size=48, mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.3]
    ).requires_grad_(False)
    model.files = [tmp_path / "from_the_hub.safetensors"]
    save_file(model.network.state_dict(), model.files[0])
    monkeypatch.setattr(ImageClassifier, "from_timm", classmethod(lambda cls, name: model.eval()))
    return model


@pytest.fixture
def spaces(reward_folder, tmp_path, published):
    backbone, _ = write_dinov2(tmp_path / "dino", width=64, depth=2)
    return {
        "classifier": load_space(f"classifier:{reward_folder}"),
        "dinov2": load_space("dinov2", dinov2_backbone=backbone),
        "timm": load_space("timm:stand_in"),
    }


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the layout of torch-fidelity's file, and the network that holds them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, path)
        official = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    for parameter in official.parameters():
        parameter.mul_(6**0.5)  # at torch's own initial spread nothing would reach the last layer
    torch.save(official.state_dict(), path)
    return path, official


@pytest.mark.parametrize("kind", SOURCES)
def test_spaces_are_frozen_differentiable_and_float32(spaces, kind):
    space, channels = spaces[kind], SOURCES[kind]
    x = images(channels).requires_grad_()
    f = space(x)
    assert f.shape == (2, space.size) and f.dtype == torch.float32
    (gradient,) = torch.autograd.grad(f.square().sum(), x)
    # Against the difference quotient along the gradient, in the network's own precision.
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        quotient = (space(x + step).square().sum() - space(x - step).square().sum()) / 2e-2
    assert quotient.item() == pytest.approx(gradient.norm().item(), rel=0.1) and gradient.norm() > 1e-4
    assert not any(parameter.requires_grad for parameter in space.parameters())
    assert not space.train().training and not any(part.training for part in space.modules())
    half = space.to(torch.bfloat16)(x.detach())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, f.detach(), rtol=0.1, atol=0.05 * f.abs().max().item())


def test_features_are_those_of_the_networks(spaces, reward_folder, published, tmp_path):
    classifier = ImageClassifier.from_pretrained(reward_folder)
    f, logits = spaces["classifier"].features_and_logits(images(1))
    torch.testing.assert_close(classifier.network.get_classifier()(f), classifier(images(1)))
    torch.testing.assert_close(logits, classifier(images(1)))
    assert spaces["classifier"].knows_labels and spaces["classifier"].num_logits == 10
    f, logits = spaces["timm"].features_and_logits(images(3))
    torch.testing.assert_close(published.network.get_classifier()(f), published(images(3)))
    assert not spaces["timm"].knows_labels and logits.shape == (2, 7)
    # The class token is what the one-layer head of the official classifier takes first.
    backbone, head = write_dinov2(tmp_path / "dino", width=64, depth=2, layers=1, classes=64)
    weight = torch.cat([torch.eye(64), torch.zeros(64, 64)], dim=1)
    torch.save({"weight": weight, "bias": torch.zeros(64)}, head)
    official = DINOv2Classifier.from_official(backbone, head)
    assert isinstance(official.backbone, VisionTransformer)
    torch.testing.assert_close(spaces["dinov2"](images(3)), official(images(3)))
    assert spaces["dinov2"].features_and_logits(images(3))[1] is None


def test_greyscale_is_repeated_and_other_channels_are_refused(spaces):
    grey = images(1)
    for kind in ("dinov2", "timm"):
        torch.testing.assert_close(spaces[kind](grey), spaces[kind](grey.repeat(1, 3, 1, 1)))
    with pytest.raises(InputError, match=r"takes images of 1 channel\(s\), these have 3"):
        spaces["classifier"](images(3))
    with pytest.raises(InputError, match="these have 4"):
        spaces["dinov2"](images(4))


def test_arrays_of_uint8_give_the_same(spaces):
    x = images(1, count=5)
    pixels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    f, logits = spaces["classifier"].of(pixels, batch=2)
    torch.testing.assert_close(f, spaces["classifier"](x))
    assert logits.shape == (5, 10) and isinstance(pixels, np.ndarray)
    assert spaces["dinov2"].of(pixels, batch=3)[1] is None


def test_features_of_figures_are_made_without_tf32(spaces, monkeypatch):
    """cuDNN is on, and rounds to no 10 bits: what a GPU alone would show."""
    seen, space = [], spaces["classifier"]
    features_and_logits = space.network.features_and_logits

    def noted(images):
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
        return features_and_logits(images)

    monkeypatch.setattr(space.network, "features_and_logits", noted)
    space.of(np.zeros((2, 8, 8, 1), np.uint8), batch=2)
    assert seen == [(True, False)]


def test_a_space_is_described_by_hash_and_preprocessing(spaces, reward_folder, published, tmp_path):
    about = spaces["classifier"].describe()
    assert about["name"] == f"classifier:{reward_folder}"
    assert about["sha256"] == sha256(reward_folder / "model.safetensors")
    assert about["preprocessing"] == {
        "image_size": 32,
        "resize": "bicubic, antialias, no crop",
        "mean": [0.5],
        "std": [0.5],
    }
    assert spaces["dinov2"].describe()["sha256"] == sha256(tmp_path / "dino" / "pretrain.pth")
    of_timm = spaces["timm"].describe()
    assert of_timm["preprocessing"]["mean"] == [0.4, 0.5, 0.6] and of_timm["sha256"] == sha256(published.files[0])


def test_inception_is_torch_fidelitys_with_a_gradient(inception_file, monkeypatch):
    path, official = inception_file
    with pytest.raises(InputError, match=r"has SHA-256 .*, torch-fidelity's Inception 6726825d0af5"):
        load_space("inception", inception_weights=path)
    monkeypatch.setattr(features, "INCEPTION_SHA256", sha256(path))
    space = load_space("inception", inception_weights=path, dtype=torch.bfloat16)  # but it stays in fp32
    x = images(3, 24, count=1).requires_grad_()
    f, logits = space.features_and_logits(x)
    expected = official((x * 255).round().to(torch.uint8))
    assert torch.equal(f, expected[0]) and torch.equal(logits, expected[1]) and f.std() > 1e-4
    (gradient,) = torch.autograd.grad(f.square().sum(), x)
    assert gradient.abs().max() > 0
    between = x.detach() + 0.4 / 255  # what is saved is rounded, and so is what is seen
    assert torch.equal(space(between.clamp(max=1)), f.detach())
    assert space.describe()["sha256"] == sha256(path) and space.size == 2048 and space.num_logits == 1008


def test_the_spatial_features_are_seven_channels_of_one_branch(inception_file, monkeypatch):
    """TensorFlow's mixed_6/conv (17, 17, 192), which ADM cuts to [..., :7]: Mixed_6d's first branch, channels last."""
    path, official = inception_file
    monkeypatch.setattr(features, "INCEPTION_SHA256", sha256(path))
    seen = []
    hook = official.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = images(3, 24, count=2)
    official((x * 255).round().to(torch.uint8))
    hook.remove()
    f, logits = load_space("inception-spatial", image_shape=(24, 24, 3), inception_weights=path).features_and_logits(x)
    assert f.shape == (2, 2023) and logits is None and f.std() > 1e-4
    assert torch.equal(f.view(2, 17, 17, 7), seen[0].permute(0, 2, 3, 1)[..., :7])


class Bomb:
    def __reduce__(self):
        return os.system, ("touch {}",)


def test_a_weights_file_never_runs_code(tmp_path, monkeypatch):
    path, trace = tmp_path / "weights.pth", tmp_path / "exploded"
    monkeypatch.setattr(Bomb, "__reduce__", lambda self: (os.system, (f"touch {trace}",)))
    torch.save({"fc.weight": Bomb()}, path)
    monkeypatch.setattr(features, "INCEPTION_SHA256", sha256(path))  # even then
    with pytest.raises(InputError, match="was not run"):
        load_space("inception", inception_weights=path)
    with pytest.raises(InputError, match=r"was not run|damaged or something else"):
        load_space("dinov2", dinov2_backbone=path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip", "'clip' is no feature space here; allowed: classifier:FOLDER, dinov2, inception, timm:NAME"),
        ("", "is no feature space"),
        ("classifier:", "is no feature space"),
        ("dinov2:x", "is no feature space"),
        ("dinov2", "--dinov2-backbone"),
        ("classifier:/nowhere", "/nowhere/config.json does not exist|/nowhere does not exist"),
        ("timm:no_such_model", "no_such_model"),
    ],
)
def test_unknown_spaces_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        load_space(text)


def test_unusable_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no\.pth does not exist"):
        load_space("inception", inception_weights=tmp_path / "no.pth")
    with pytest.raises(InputError, match=r"no\.pth does not exist"):
        load_space("dinov2", dinov2_backbone=tmp_path / "no.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features, "INCEPTION_URL", "http://127.0.0.1:1/weights.pth")
    with pytest.raises(InputError, match=r"127\.0\.0\.1:1/weights\.pth .* give its file by --inception"):
        load_space("inception")
