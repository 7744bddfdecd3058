"""A model folder: its network by name, its config checked, its weights read and written strictly.

A network of one's own is the class that ``config.json`` names in ``network.py``, a file of the folder, which is run
only after `trust_code`. docs/teachers.md says what the class needs.
"""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import MISSING, make_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from timm.layers import Attention
from torch import Tensor, nn

from train_cc.io.errors import InputError
from train_cc.io.fields import check, setting
from train_cc.io.products import plain_mode, write_atomically
from train_cc.io.read import first_line, kind_of, read_json, read_safetensors, require_file, safetensors_shapes, sha256
from train_cc.io.remote import model_folder
from train_cc.io.weights import WEIGHTS_NAME, block_count, fit, load_weights

# The class that a config.json names -> its file in train_cc/models/networks. A new network is a line here.
NETWORKS = {"SiT": "sit", "LightningDiT": "sit", "DiT": "sit"}
USUAL = "SiT"  # of a config that names none
SHAPE = ("in_channels", "input_size", "num_classes")  # arguments of every network
# name -> the arguments of `SiT` that it stands for; inputs are 4 x 32 x 32 latents, 1000 classes, by default.
SIT_SIZES = {
    f"SiT-{size}/{patch}": {"depth": depth, "hidden_size": hidden, "num_heads": heads, "patch_size": patch}
    for size, depth, hidden, heads in [("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16)]
    for patch in (2, 4, 8)
}
# The same of the other networks; a LightningDiT by default at VA-VAE's latents.
SIZES = SIT_SIZES | {name.replace("SiT", "DiT"): size | {"_class_name": "DiT"} for name, size in SIT_SIZES.items()}
IN_VAVAE = {"patch_size": 1, "in_channels": 32, "input_size": 16, "_class_name": "LightningDiT"}
SIZES |= {name.replace("SiT", "LightningDiT")[:-1] + "1": size | IN_VAVAE for name, size in SIT_SIZES.items()}
MODEL_FOLDER = f"a model folder of {', '.join(NETWORKS)}"
CODE = "network.py"  # of a folder whose network is none of `NETWORKS`
TRUSTED: dict[str, ModuleType] = {}  # SHA-256 of such a file -> the module that it is
DIFFUSERS_OPTIONS = {"device_map", "variant", "quantization_config", "subfolder", "revision"}


def trust_code(folder: str | Path) -> None:
    """Run the ``network.py`` of ``folder``, so that its network can be read. Raises `InputError`."""
    path = require_file(Path(folder) / CODE, "the code of a network of one's own")
    digest = sha256(path)
    if digest not in TRUSTED:
        module = ModuleType(f"network_{digest[:16]}")
        module.__file__, module.SOURCE = str(path), path.read_text(encoding="utf-8")
        sys.modules[module.__name__] = module  # dataclasses look for themselves there
        try:
            exec(compile(module.SOURCE, path, "exec"), module.__dict__)
        except Exception as error:  # the user's code, whatever it does
            raise InputError(f"{path} cannot be run ({first_line(error)})") from error
        TRUSTED[digest] = module


@cache
def network_class(name: str, code: str | None) -> type["Network"]:
    """The network ``name``, read and written strictly: of `NETWORKS`, or of the trusted file with SHA-256 ``code``."""
    module = TRUSTED[code] if code else import_module(f"train_cc.models.networks.{NETWORKS[name]}")
    plain = getattr(module, name, None)
    if not (isinstance(plain, type) and issubclass(plain, ModelMixin) and issubclass(plain, ConfigMixin)):
        expected = "one of diffusers' ModelMixin and ConfigMixin is expected"
        raise InputError(f"{module.__file__} has no class {name}; {expected}")
    lacks = [each for each in ("estimator_targets", "generator_targets") if not hasattr(plain, each)]
    lacks += [each for each in SHAPE if each not in inspect.signature(plain.__init__).parameters]
    if lacks:
        raise InputError(f"{name} of {module.__file__} lacks {', '.join(lacks)}; docs/teachers.md says what they are")
    text = module.SOURCE if code else Path(module.__file__).read_text(encoding="utf-8")
    own = {"__doc__": plain.__doc__, "__module__": __name__, "code": text, "code_sha256": code}
    return type(name, (Network, plain, Defaults), own)


def class_of(config: Mapping) -> type["Network"]:
    """The network of a checked ``config``."""
    return network_class(config.get("_class_name", USUAL), config.get("_code_sha256"))


@cache
def fields_of(network: type) -> type:
    """The arguments of ``network`` as fields, with the ranges of its ``limits``."""
    arguments = [each for each in inspect.signature(network.__init__).parameters.values() if each.name != "self"]
    fields = []
    for each in arguments:
        low, high = network.limits.get(each.name, (1, None) if each.name in SHAPE else (None, None))
        default = each.default if each.name in network.optional else MISSING
        fields.append((each.name, each.annotation, setting(default, low=low, high=high)))
    return make_dataclass(f"{network.__name__}Config", fields, frozen=True)


def check_config(config: Mapping, source: Path | str, code: Path | None = None) -> dict:
    """The arguments of a network in ``config``, each of them; its class if it is no SiT, and the SHA-256 of its code.

    Only a network of one's own has the latter: of the file ``code`` or, in a checkpoint, of the config itself.
    Raises `InputError`.
    """
    kind, digest = kind_of(config, USUAL), None
    if kind not in NETWORKS:
        digest = sha256(code) if code is not None and code.is_file() else config.get("_code_sha256")
        if digest is None:
            raise InputError(f"{source} is of a {kind}; {MODEL_FOLDER} is expected, or {CODE} with that class there")
        if digest not in TRUSTED:
            words = "has not been run: read it, and give --trust-teacher-code if it may be"
            raise InputError(f"{source} is of a {kind}, whose code, {code or CODE} with SHA-256 {digest[:12]}, {words}")
    network = network_class(kind, digest)
    values = check(fields_of(network), config, source)
    try:
        network.check_sizes(values)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    values |= {} if kind == USUAL else {"_class_name": kind}
    return values if digest is None else values | {"_code_sha256": digest}


def config_of(network: "Network") -> dict:
    """The checked config of ``network``, as `check_config` returns it."""
    names = {"_class_name": type(network).__name__, "_code_sha256": network.code_sha256}
    return check_config(dict(network.config) | names, "its config")


def new_network(config: Mapping) -> "Network":
    """The network of a checked ``config``. Raises `InputError` where one's own cannot be built."""
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    network = class_of(config)
    if network.code_sha256 is None:
        return network(**arguments)
    own = f"{network.__name__} of {CODE}"
    try:
        model = network(**arguments)
        x, t = torch.zeros(2, *model.sample_shape), torch.zeros(2)
        out = model(x, t, t.long())
    except Exception as error:
        raise InputError(f"{own} cannot be built of {arguments} and called ({first_line(error)})") from error
    if out.shape != x.shape:
        raise InputError(f"{own} returns {tuple(out.shape)} of inputs {tuple(x.shape)}; the same shape is expected")
    if not isinstance(getattr(model, "blocks", None), nn.ModuleList):
        raise InputError(f"{own} has no blocks; an nn.ModuleList is expected")
    linear = [f".{name}" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in (*network.estimator_targets, *network.generator_targets):
        if not any(name.endswith(f".{target}") for name in linear):
            raise InputError(f"{own} has no nn.Linear {target}, which its targets of a LoRA name")
    return model


def shapes_of(config: Mapping) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the network of ``config``; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in new_network(config).state_dict().items()}


def read_config(folder: Path) -> dict:
    """The config of a model folder, a path or a name on the hub. Raises `InputError`.

    Its weights, if there are any yet, have the shapes that it names. Shapes are read off the header, before anything
    is allocated.
    """
    if folder.is_file() and folder.parent.name == "torch_units":
        raise InputError(
            f"{folder} is a run's checkpoint; a model folder is expected. --resume-ckpt {folder} continues from it; to "
            f"make a folder of its generator: python convert_weight/export_generator.py --checkpoint {folder}"
        )
    if folder.is_file():
        raise InputError(
            f"{folder} is a file; a model folder with config.json and {WEIGHTS_NAME} is expected. "
            f"To make one of a checkpoint: python convert_weight/sit_convert.py --input {folder}"
        )
    folder = model_folder(folder)
    path, weights = folder / "config.json", folder / WEIGHTS_NAME
    config = check_config(read_json(path, f"{MODEL_FOLDER}, with config.json and {WEIGHTS_NAME},"), path, folder / CODE)
    if weights.exists():
        shapes = safetensors_shapes(weights, "weights of a network")
        blocks = block_count(shapes, weights)
        if blocks not in (0, config.get("depth", blocks)):  # before a module is made for each
            raise InputError(f"{weights} does not fit its config.json: it has {blocks} blocks, not {config['depth']}")
        fit(shapes_of(config), shapes, weights, "by its config.json")
    return config


class Defaults:
    """Defaults of a network class; every config has `in_channels`, `input_size`, `num_classes`."""

    limits: Mapping[str, tuple[float, float]] = {}  # ranges of its arguments, ends included
    optional: tuple[str, ...] = ()  # arguments that a config.json may leave out
    needs = ""  # why it computes in fp32 or fp16 only, if it does

    @staticmethod
    def check_sizes(config: Mapping) -> None:
        """Raises `ValueError` for numbers that are in range, each, and do not fit together."""

    @property
    def null_class(self) -> int:
        return self.config.num_classes

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one input."""
        return (self.config.in_channels, self.config.input_size, self.config.input_size)

    def loss_weight(self, t: Tensor) -> Tensor | None:
        """The weight of a sample's velocity matching loss at time t (B,); None: 1."""
        return None


class Network(ModelMixin):
    """The base of each network: it is read and written strictly. `network_class` makes one of both."""

    code: str  # the file of its class; it needs nothing of this project: a pipeline that is shared holds it
    code_sha256: str | None  # of one's own

    def save_pretrained(self, folder: str | Path, **options) -> None:
        """`config.json` and one safetensors file, with the same mode."""
        super().save_pretrained(folder, **options | {"max_shard_size": "1000TB", "safe_serialization": True})
        if (Path(folder) / WEIGHTS_NAME).exists():
            plain_mode(Path(folder) / WEIGHTS_NAME)
            if self.code_sha256 is not None:
                write_atomically(Path(folder) / CODE, self.code)

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype | None = None, **options) -> "Network":
        """Read a folder of `config.json` and one safetensors file, strictly, in fp32 unless ``torch_dtype`` is given.

        ``folder``: a path, or org/name[@revision] on the hub.
        ``files`` of the result are the weights files that were read. ``options`` of diffusers that are set are refused.
        Raises `InputError` where the folder or a file is missing, truncated, or holds other keys, shapes or kinds.
        """
        folder = Path(folder)
        if names := sorted(name for name in DIFFUSERS_OPTIONS & options.keys() if options[name] is not None):
            raise InputError(f"a network is not loaded with {', '.join(names)}: move it or cast it afterwards")
        config = read_config(folder)
        if class_of(config) is not cls:
            kind = config.get("_class_name", USUAL)
            raise InputError(f"{folder} is of a {kind}; a model folder of {cls.__name__} is expected")
        weights = model_folder(folder) / WEIGHTS_NAME
        state = read_safetensors(weights, MODEL_FOLDER)
        with torch.device("meta"):
            model = new_network(config)
        load_weights(model, state, weights)
        model.files = [weights]
        return (model if torch_dtype is None else model.to(torch_dtype)).eval()


SiT = class_of({})


def load_network(folder: str | Path, trust_teacher_code: bool = False) -> Network:
    """Read the network v(x, t, y) of any model folder, or of org/name[@revision] on the hub. Raises `InputError`.

    ``trust_teacher_code``: a ``network.py`` in the folder may be run.
    """
    if trust_teacher_code:
        trust_code(folder)
    return class_of(read_config(Path(folder))).from_pretrained(folder)


def choose_attention(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """In half precision on a CPU plain attention is about 2.5 times faster than the fused kernel, its backward 3."""
    fused = not (device.type == "cpu" and dtype != torch.float32)
    for module in network.modules():
        if isinstance(module, Attention):
            module.fused_attn = fused
