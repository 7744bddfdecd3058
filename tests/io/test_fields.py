"""io/fields.py: the limits of configs that come from outside, and parsed arguments."""

import pytest

from train_cc import cold_start
from train_cc.io.errors import InputError
from train_cc.io.fields import replaced
from train_cc.models.backbone import check_config
from train_cc.models.vae import check_vae_config

SIT = {"input_size": 256, "in_channels": 1, "patch_size": 1, "hidden_size": 2**16, "depth": 1, "num_heads": 1}
SIT |= {"num_classes": 1, "mlp_ratio": 1.0}
LIMITS = {
    (check_config, tuple(SIT.items())): {
        "input_size": (1, 4096),
        "patch_size": (1, 256),
        "hidden_size": (4, 2**16),
        "depth": (1, 1024),
        "num_classes": (1, 10**6),
        "mlp_ratio": (1 / 64, 64.0),
    },
    (check_vae_config, ()): {
        "in_channels": (1, 3),
        "latent_channels": (1, 64),
        "norm_num_groups": (1, 1024),
        "scaling_factor": (1e-6, 1e6),
        "shift_factor": (-1e6, 1e6),
    },
}


def test_a_number_of_a_config_may_be_anything_within_its_limits():
    for (check, base), limits in LIMITS.items():
        for name, (low, high) in limits.items():
            for value in (low, high):
                assert check(dict(base) | {name: value}, "config.json")[name] == value
            step = 1 if isinstance(high, int) else 1e-9
            for value in (low - step, high + 0.1 if step < 1 else high + 1):
                with pytest.raises(InputError, match=rf"config.json: {name} is .*; allowed: "):
                    check(dict(base) | {name: value}, "config.json")


def test_a_sit_config_is_completed_and_its_sizes_divide():
    short = {name: value for name, value in SIT.items() if name not in ("patch_size", "mlp_ratio")}
    assert check_config(short | {"_private": 1}, "c") == SIT | {"patch_size": 2, "mlp_ratio": 4.0}
    for change, words in (
        ({"num_heads": 3}, "num_heads 3 does not divide hidden_size 65536"),
        ({"patch_size": 3}, "patch_size 3 does not divide input_size 256"),
        ({"hidden_size": 6}, "hidden_size is 6; allowed: multiples of 4"),
        ({"_class_name": "X" * 200}, f"is of a {'X' * 80};"),
    ):
        with pytest.raises(InputError, match=words):
            check_config(SIT | change, "c")


def test_parsed_arguments_do_not_change():
    args = cold_start.stage_parser().parse_args(["--teacher", "t", "--output-dir", "o"])
    with pytest.raises(AttributeError, match="seed"):
        args.seed = 5
    assert (replaced(args, seed=5).seed, args.seed) == (5, 30)
