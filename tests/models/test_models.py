"""The networks: layout of the full size, every size's forward, the estimator's two readings, strict loading."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY, random_sit
from train_cc.io.errors import InputError
from train_cc.models import SIT_SIZES, ScoreEstimator, SiT
from train_cc.models.backbone import read_config
from train_cc.models.generator import GenerationConfig, assemble_generator, build_generator, generator_lora_rank
from train_cc.models.lora import ADAPTER, lora_layers
from train_cc.models.networks.sit import modulated_norm, position_embedding, sinusoidal_embedding

WEIGHTS = "diffusion_pytorch_model.safetensors"


def inputs(config=TINY, batch=4):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config["in_channels"], config["input_size"], config["input_size"])
    return torch.randn(shape, generator=generator), torch.rand(batch, generator=generator), torch.arange(batch)


def estimator_with_lora(seed=0):
    """An estimator whose LoRA does something: B is no longer zero."""
    estimator = ScoreEstimator(random_sit(seed), lora_rank=4, lora_init_spread=0.5)
    for layer in lora_layers(estimator):
        torch.nn.init.normal_(layer.lora_B[ADAPTER].weight, std=0.5)
    return estimator


def test_sit_xl_has_the_released_names_and_shapes():
    with torch.device("meta"):
        model = SiT(**SIT_SIZES["SiT-XL/2"])
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.linear.weight": (16, 1152),
        "final_layer.linear.bias": (16,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
    }
    for block in range(28):
        for name, rows, columns in [
            ("attn.qkv", 3456, 1152),
            ("attn.proj", 1152, 1152),
            ("mlp.fc1", 4608, 1152),
            ("mlp.fc2", 1152, 4608),
            ("adaLN_modulation.1", 6912, 1152),
        ]:
            expected[f"blocks.{block}.{name}.weight"] = (rows, columns)
            expected[f"blocks.{block}.{name}.bias"] = (rows,)
    assert shapes == expected
    assert len(shapes) == 292
    assert sum(math.prod(shape) for shape in shapes.values()) == 675_111_184


def test_the_sizes_are_the_papers():
    """arXiv 2401.08740, table 1: layers, width, heads; and the defaults are the XL's, of ImageNet at 256 pixels."""
    paper = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
    expected = {}
    for size, (depth, hidden, heads) in paper.items():
        for patch in (2, 4, 8):
            of_it = {"depth": depth, "hidden_size": hidden, "num_heads": heads, "patch_size": patch}
            expected[f"SiT-{size}/{patch}"] = of_it
    assert expected == SIT_SIZES
    with torch.device("meta"):
        model = SiT()
    of_imagenet = {"input_size": 32, "in_channels": 4, "num_classes": 1000, "mlp_ratio": 4.0}
    assert {k: v for k, v in model.config.items() if k[0] != "_"} == expected["SiT-XL/2"] | of_imagenet
    assert (model.null_class, model.sample_shape, model.gradient_checkpointing) == (1000, (4, 32, 32), False)


def test_the_embeddings_are_those_written_out():
    """Time: cosines, then sines, of t / 10000^(i / 128). Position: MAE's, half the width a direction."""
    t = torch.tensor([0.0, 0.3, 1.0])
    found = sinusoidal_embedding(t)
    assert found.shape == (3, 256) and found.dtype == torch.float32
    for row, time in zip(found.tolist(), t.tolist(), strict=True):
        angles = [time / 10000 ** (i / 128) for i in range(128)]
        assert row == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=1e-6)
    table = position_embedding(32, 3)
    assert table.shape == (1, 9, 32) and table.dtype == torch.float32
    for row in range(3):
        for column in range(3):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / 8) for i in range(8)]
                expected += [*map(math.sin, angles), *map(math.cos, angles)]
            assert table[0, 3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_new_model_starts_as_dit_does():
    """adaLN-Zero; xavier for linear layers, the patches' flattened; normal of 0.02 for the tables and the time."""
    torch.manual_seed(0)
    with torch.no_grad():
        model = SiT(**TINY | {"hidden_size": 128, "patch_size": 4, "in_channels": 3, "num_classes": 99})
    state = model.state_dict()
    zero = {name for name, value in state.items() if not value.any()}
    adaln = {f"blocks.{i}.adaLN_modulation.1.weight" for i in range(2)} | {"final_layer.adaLN_modulation.1.weight"}
    assert zero == {name for name in state if name.endswith("bias")} | adaln | {"final_layer.linear.weight"}
    for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        assert state[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.05), name
    for name, fans in [
        ("blocks.1.attn.qkv", 128 + 384),
        ("blocks.0.mlp.fc1", 128 + 512),
        ("x_embedder.proj", 128 + 48),
    ]:
        bound = math.sqrt(6 / fans)
        assert 0.98 * bound < state[f"{name}.weight"].abs().max() <= bound, name


def test_a_norm_has_the_papers_epsilon():
    """At inputs of the size of sqrt(1e-6) the epsilon is half of the variance."""
    x, zero = torch.tensor([[[1e-3, -1e-3]]]).repeat(1, 1, 16), torch.zeros(1, 32)
    torch.testing.assert_close(modulated_norm(x, zero, zero), x / math.sqrt(2e-6))


def test_tokens_are_patches_with_channels_fastest():
    model = random_sit(in_channels=2)
    tokens = torch.arange(16 * 8.0).view(1, 16, 8)
    image = model.unpatchify(tokens)
    assert image.shape == (1, 2, 8, 8)
    for token, (p, q, channel) in [(0, (0, 0, 1)), (5, (1, 0, 0)), (14, (0, 1, 1))]:
        row, column = divmod(token, 4)
        assert image[0, channel, 2 * row + p, 2 * column + q] == tokens[0, token, 4 * p + 2 * q + channel]


def test_labels_are_never_dropped():
    model = random_sit().train()
    x, t, y = inputs()
    assert torch.equal(model(x, t, y), model(x, t, y))
    assert not torch.equal(model(x, t, y), model(x, t, torch.full_like(y, model.null_class)))


def test_folder_round_trip_is_exact(tmp_path):
    model = random_sit()
    model.pos_embed += 0.1  # comes from the file, is not computed anew
    model.save_pretrained(tmp_path)
    other = SiT.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert torch.equal(model(*inputs()), other(*inputs()))


def test_what_is_loaded_is_ready_to_sample_in_the_dtype_asked_for(tmp_path):
    random_sit().save_pretrained(tmp_path, max_shard_size="1KB", safe_serialization=False)  # one safetensors file still
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = SiT.from_pretrained(tmp_path, dtype, variant=None, revision=None)
        assert model.dtype == expected and not model.training and model.files == [tmp_path / WEIGHTS]
    with pytest.raises(InputError, match="not loaded with revision, variant:"):
        SiT.from_pretrained(tmp_path, variant="fp16", revision="main", subfolder=None)


def test_a_folder_whose_weights_are_still_to_come_has_a_config(tmp_path):
    random_sit().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert read_config(tmp_path) == TINY | {"patch_size": 2, "mlp_ratio": 4.0}


def without(word: str):
    return lambda state: {name: value for name, value in state.items() if word not in name}


DAMAGES = {  # what is wrong: the state that replaces the file's, words
    "nested": (lambda state: {f"model.{name}": each for name, each in state.items()}, "missing: .*unexpected: model"),
    "one key missing": (without("pos_embed"), "missing: pos_embed"),
    "no blocks": (without("blocks"), r"by its config.json\): missing: blocks\.0\."),
    "a block missing": (without("blocks.1"), "it has 1 blocks, not 2"),
    "a block more": (lambda state: state | {"blocks.2.attn.proj.bias": torch.zeros(32)}, "it has 3 blocks, not 2"),
    "one key more": (lambda state: state | {"projectors.0.0.weight": torch.zeros(2)}, "unexpected: projectors"),
    "another size": (lambda state: random_sit(hidden_size=64).state_dict(), "other shapes"),
    "another class count": (
        lambda state: state | {"y_embedder.embedding_table.weight": torch.zeros(6, 32)},
        r"other shapes: y_embedder.embedding_table.weight \(6, 32\), expected \(11, 32\)",
    ),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_model_folder_that_does_not_fit_is_refused(tmp_path, how):
    random_sit().save_pretrained(tmp_path)
    change, words = DAMAGES[how]
    save_file(change(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=words):
        SiT.from_pretrained(tmp_path)


def test_files_that_are_no_model_folder_are_refused_and_no_pickle_is_read(tmp_path):
    random_sit().save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="damaged"):
        SiT.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="does not exist"):
        SiT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        SiT.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="sit_convert"):
        SiT.from_pretrained(tmp_path / "config.json")


def test_a_teacher_folder_is_read_from_the_one_file_that_is_hashed(tmp_path):
    """diffusers would follow an index to other files."""
    random_sit().save_pretrained(tmp_path)
    other = random_sit(seed=5).state_dict()
    save_file(other, tmp_path / "shard-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "shard-1.safetensors")}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    torch.save(other, tmp_path / "diffusion_pytorch_model.bin")
    model = SiT.from_pretrained(tmp_path)
    assert model.files == [tmp_path / WEIGHTS]
    expected = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


# The estimator


def test_estimator_takes_a_scale_a_sample():
    estimator, (x, t, y) = estimator_with_lora(), inputs()
    together = estimator(x, t, y, torch.tensor([0.0, 2.0, 0.0, 2.0]))
    torch.testing.assert_close(together[0::2], estimator(x, t, y, 0.0)[0::2])
    torch.testing.assert_close(together[1::2], estimator(x, t, y, 2.0)[1::2])


def test_only_lora_has_gradients():
    estimator = estimator_with_lora()
    estimator(*inputs(), 2.0).square().mean().backward()
    for name, parameter in estimator.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


def test_gradients_with_activation_checkpointing_are_equal():
    plain, checkpointed = estimator_with_lora(), estimator_with_lora()
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.network.enable_gradient_checkpointing()
    for estimator in (plain, checkpointed):
        with torch.no_grad():
            estimator(*inputs(), 0.75)  # another scale before: the recomputed forward must not see it
        estimator(*inputs(), 2.0).square().mean().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


# The generator's LoRA


def test_merged_lora_is_the_lora(tmp_path):
    random_sit().save_pretrained(tmp_path)
    generator = build_generator(SiT.from_pretrained(tmp_path), lora_rank=8)
    for layer in lora_layers(generator):
        torch.nn.init.normal_(layer.lora_B[ADAPTER].weight, std=0.1)
    trained = {name: p.detach() for name, p in generator.named_parameters() if p.requires_grad}
    merged = assemble_generator(TINY, copy.deepcopy(trained), tmp_path, lora_rank=8)
    assert merged.state_dict().keys() == random_sit().state_dict().keys()
    torch.testing.assert_close(merged(*inputs()), generator(*inputs()), rtol=1e-5, atol=1e-5)


def test_lora_generator_starts_as_the_teacher(tmp_path):
    random_sit().save_pretrained(tmp_path)
    assert torch.equal(build_generator(SiT.from_pretrained(tmp_path), lora_rank=8)(*inputs()), random_sit()(*inputs()))


def test_a_generator_of_a_checkpoint_is_frozen_and_its_rank_twice_the_estimators(tmp_path):
    assert (generator_lora_rank(True, 8), generator_lora_rank(False, 8)) == (16, None)
    random_sit().save_pretrained(tmp_path)
    lora = {n: p.detach() for n, p in build_generator(random_sit(), 8).named_parameters() if p.requires_grad}
    for state, rank in ((random_sit().state_dict(), None), (lora, 8)):
        generator = assemble_generator(TINY, state, tmp_path, rank)
        assert not generator.training and not any(p.requires_grad for p in generator.parameters())


def test_a_generators_sampling_has_limits_and_is_whole(tmp_path):
    good = {"num_inference_steps": 1, "timestep_shift": 1}
    file = tmp_path / "generation_config.json"
    assert GenerationConfig.read(tmp_path).sampling is None
    for name, allowed, refused in [
        ("num_inference_steps", (1, 1000), (0, 1001)),
        ("timestep_shift", (1e-3, 1e3), (9e-4, 1000.5)),
    ]:
        for value in allowed:
            file.write_text(json.dumps(good | {name: value}))
            assert value in GenerationConfig.read(tmp_path).sampling
        for value in refused:
            file.write_text(json.dumps(good | {name: value}))
            with pytest.raises(InputError, match=f"{name} is {value}"):
                GenerationConfig.read(tmp_path)
        file.write_text(json.dumps({key: value for key, value in good.items() if key != name}))
        with pytest.raises(InputError, match=rf"lacks \['{name}'\]"):
            GenerationConfig.read(tmp_path)
