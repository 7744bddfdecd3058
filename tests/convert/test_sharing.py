"""A generator goes out, as a pipeline that needs nothing of this project, and comes back by its name on the hub."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load_file

from convert_weight import export_generator, pipeline
from convert_weight.exports import save_pipeline
from convert_weight.pipeline import DMDRPipeline
from evaluation import generate
from evaluation.standins import write_vae
from tests.conftest import flags, logged, random_sit, refused, run_cold_start, words
from train_cc import cold_start
from train_cc.io import remote
from train_cc.io.class_names import KNOWN, class_names
from train_cc.io.errors import InputError
from train_cc.io.weights import WEIGHTS_NAME
from train_cc.models import SiT
from train_cc.models.networks import sit
from train_cc.models.vae import images_to_uint8, load_decoder, load_vae
from train_cc.samplers import few_step_sample

SAMPLING = {"num_inference_steps": 2, "timestep_shift": 1.5}
LABELS = [3, "Ankle Boot", "top", 0]
NUMBERS = [3, 9, 0, 0]


# Out: where this project is not installed ------------------------------------------------------------------------

LOAD = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
assert not any("train_cc" in name for name in sys.modules)
try:
    import train_cc
    raise SystemExit("this project is on the path: the test shows nothing")
except ImportError:
    pass
folders, labels = eval(sys.argv[1])
for name, folder in folders.items():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).to(dtype)
        pipeline.set_progress_bar_config(disable=True)
        draws = torch.Generator().manual_seed(7)
        images = pipeline(class_labels=labels, generator=draws, output_type="np").images
        np.save(f"{name}-{str(dtype).removeprefix('torch.')}.npy", images)
    assert pipeline(class_labels=3).images[0].size[0] in (8, 64)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Pipelines of pixels and of latents, and what a Python that knows nothing of this project sampled from them."""
    folder = tmp_path_factory.mktemp("shared")
    vae = write_vae(folder / "a_vae")
    models = {"pixels": random_sit(), "latents": random_sit(in_channels=4)}
    for name, model in models.items():
        decoder = load_vae(str(vae)) if name == "latents" else None
        save_pipeline(model, decoder, SAMPLING, KNOWN["fashion-mnist"], {}, folder / name)
    asked = repr(({name: str(folder / name) for name in models}, LABELS))
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-I", "-c", LOAD, asked]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kept in float32" not in done.stderr  # diffusers, of every cast
    return folder, models


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_a_shared_pipeline_samples_elsewhere_what_our_sampler_does(shared, name):
    """In fp32, at the steps and the shift that it was trained for; in half precision nearly so.

    Pixels bit for bit. Our decoder has its convolutions in channels_last, a pipeline's has not: they round differently.
    """
    folder, models = shared
    draws = torch.Generator().manual_seed(7)
    shape = (len(NUMBERS), *models[name].sample_shape)

    def noise(like=None):
        return torch.randn(shape, generator=draws)

    decode = load_decoder(str(folder / "a_vae") if name == "latents" else None)
    with torch.no_grad():
        x0 = few_step_sample(models[name], noise(), torch.tensor(NUMBERS), 2, 1.5, noise)
        expected = images_to_uint8(decode(x0)).numpy()
    arrays = {dtype: np.load(folder / f"{name}-{dtype}.npy") for dtype in ("float32", "bfloat16", "float16")}
    found = {dtype: (array * 255).round() for dtype, array in arrays.items()}
    exact = np.abs(found["float32"].astype(int) - expected)
    assert expected.std() > 5 and exact.max() <= (name == "latents") and exact.mean() < 1e-3
    for dtype, most in (("bfloat16", 12), ("float16", 4)):
        difference = np.abs(found[dtype].astype(int) - expected)
        assert difference.max() > 0 and difference.mean() < most, dtype


def test_the_code_of_a_pipeline_is_this_projects_and_stands_alone(shared):
    folder, _ = shared
    for name, source in (("pipeline.py", pipeline.__file__), ("generator/network.py", sit.__file__)):
        text = (folder / "pixels" / name).read_text()
        assert text == Path(source).read_text()
        assert not re.search(r"^\s*(import|from) (train_cc|convert_weight|evaluation)", text, re.MULTILINE)
    index = json.loads((folder / "pixels" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "DMDRPipeline"] and index["generator"] == ["network", "SiT"]
    SiT.from_pretrained(folder / "pixels" / "generator")


def test_labels_are_numbers_or_names():
    ids = {str(number): name for number, name in enumerate(KNOWN["fashion-mnist"])} | {"1": "bag"}
    pipeline = DMDRPipeline(random_sit(), id2label=ids)
    assert pipeline.label_ids(LABELS) == NUMBERS and pipeline.label_ids("T-shirt, top") == [0]
    assert pipeline.label_ids(7) == [7] and pipeline.label_ids("SANDAL") == [5]
    for given in (np.int64(3), np.array(3), torch.tensor(3), torch.tensor([3]), np.array([3]), range(3, 4)):
        assert pipeline.label_ids(given) == [3]
    for given in (None, 3.7, [3.7], torch.tensor([3.7])):
        with pytest.raises(ValueError, match=r"class_labels is .*a whole number, a name or a list"):
            pipeline.label_ids(given)
    for given, told in (("bag", r"classes \[1, 8\]"), ("sandals", "Near: sandal"), (["shirt", 10], "0 to 9")):
        with pytest.raises(ValueError, match=told):
            pipeline.label_ids(given)
    with pytest.raises(ValueError, match="has no names"):
        DMDRPipeline(random_sit())("shirt")


def test_names_of_classes(tmp_path):
    assert class_names("auto", 10, "digits")[7] == "7" and class_names("auto", 10) is None
    assert "golden retriever" in class_names("auto", 1000)[207] and class_names("none", 1000) is None
    (tmp_path / "names.txt").write_text("cat\ndog\n\n")
    assert class_names(str(tmp_path / "names.txt"), 2) == ["cat", "dog"]
    for source, told in (("names.txt", "does not exist"), ("digits", "has 10 names; 2")):
        with pytest.raises(InputError, match=told):
            class_names(source, 2)


# The command: the card, and the upload ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    return run_cold_start(teacher, tmp_path_factory.mktemp("run") / "run", "--num-steps", 2, "--ema-decay", 0.5)


def export(run, *more):
    export_generator.main(words("--checkpoint", run / "checkpoints/torch_units/step-3.pt", *more))


def test_a_pipeline_in_half_precision_is_half_as_large_and_samples_alike(run, tmp_path):
    export(run, "--pipeline", tmp_path / "whole")
    export(run, "--pipeline", tmp_path / "half", "--half")
    whole, half = (tmp_path / name / "generator" / WEIGHTS_NAME for name in ("whole", "half"))
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    rounded = load_file(half)
    for name, weight in load_file(whole).items():
        assert rounded[name].dtype == torch.float16 and torch.equal(rounded[name], weight.half())


def test_a_card_has_the_recipe_the_hashes_and_the_figures(run, tmp_path, capsys):
    results = tmp_path / "results.json"
    rows = {"one | step": {"figures": {"FID": 2.468, "Recall": 0.74}, "images": 1800}}
    more = {"rows": {"another": {"figures": {"FID": 9.0}}}, "features": "inception"}
    features = f"classifier:{tmp_path / 'judge'}"
    results.write_text(json.dumps({"rows": rows, "features": features, "more_spaces": [more]}))
    export(run, "--pipeline", tmp_path / "p", "--results", results, "--class-names", "digits")
    card = (tmp_path / "p" / "README.md").read_text()
    weights = (tmp_path / "p" / "generator" / "diffusion_pytorch_model.safetensors").read_bytes()
    for told in (
        "library_name: diffusers",
        "It makes an image in 2 steps",
        'from_pretrained("p", trust_remote_code=True)',
        'class_labels="2"',
        "| `--ratio-update` | 2 |",
        hashlib.sha256(weights).hexdigest(),
        "| one \\| step | 1800 | 2.47 | 0.74 |",
        "Features: classifier:judge\n\n| ",
        "Features: inception\n\n| ",
        "| another |  | 9 |",
    ):
        assert told in card, told
    for file in (path for path in (tmp_path / "p").rglob("*") if path.is_file() and path.name != "args.json"):
        content = file.read_bytes()
        assert str(tmp_path).encode() not in content and str(run).encode() not in content, file
    (tmp_path / "other.json").write_text("{}")
    message = refused(export, run, "--pipeline", tmp_path / "q", "--results", tmp_path / "other.json", capsys=capsys)
    assert "no rows" in message and not (tmp_path / "q").exists()
    message = refused(export, run, "--output-dir", tmp_path / "q", "--push-to-hub", "a/b", capsys=capsys)
    assert "give --pipeline" in message


class Api:
    """What of `HfApi` is used. ``made``: repository -> names of its files."""

    made: dict = {}  # noqa: RUF012
    broken = False

    def create_repo(self, name, exist_ok):
        if self.broken:
            raise OSError("no token")
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, repo_id, folder_path, ignore_patterns):
        names = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()}
        self.made[repo_id] = names - set(ignore_patterns)


def test_a_pipeline_is_pushed_whole_and_without_paths_of_this_machine(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    push = ("--pipeline", tmp_path / "p", "--push-to-hub", "me/digits")
    monkeypatch.setattr(Api, "broken", True)
    message = refused(export, run, *push, capsys=capsys)
    assert "no token" in message and "hf auth login" in message
    monkeypatch.setattr(Api, "broken", False)
    (tmp_path / "p.tmp").mkdir()  # of a kill when all was done
    export(run, *push)  # what was written before stays
    assert not (tmp_path / "p.tmp").exists()
    told = capsys.readouterr().out
    assert "there already" in told and "https://huggingface.co/me/digits" in told
    expected = {"README.md", "model_index.json", "pipeline.py", "generator/network.py", "generator/config.json"}
    expected |= {"generator/diffusion_pytorch_model.safetensors", "generator/generation_config.json"}
    assert Api.made == {"me/digits": expected}
    assert '"me/digits"' in (tmp_path / "p" / "README.md").read_text()


@pytest.fixture
def hub_at(tmp_path, monkeypatch):
    """Point huggingface_hub to an address, with an empty cache."""

    def point(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # huggingface_hub 0.34 has a copy in the second
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        remote._snapshot.cache_clear()

    yield point
    remote._snapshot.cache_clear()


@pytest.fixture
def answering():
    """Servers that give every request one answer: a status, or None to hang up in place of one."""
    servers = []

    def start(status: int | None) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.close_connection = True
                if status is not None:
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            do_HEAD = do_POST = do_GET

            def log_message(self, *args):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()


UNREACHABLE = ("http://127.0.0.1:9", "http://no-such-host.invalid", "no-address")
ANSWERS = [
    *((address, "Check the network, the proxy and HF_ENDPOINT") for address in UNREACHABLE),
    (None, "Check the network, the proxy and HF_ENDPOINT"),
    (401, "`hf auth login`"),
    (403, "The token has no right to this"),
    (
        409,
        "Check the name" if int(huggingface_hub.__version__.split(".")[0]) else "Check the network",
    ),  # 0.34 ignores it
]


@pytest.mark.parametrize("answer,advice", ANSWERS)
def test_a_push_that_fails_is_one_message(answer, advice, run, answering, hub_at, tmp_path, capsys):
    hub_at(answer if isinstance(answer, str) else answering(answer))
    message = refused(export, run, "--pipeline", tmp_path / "p", "--push-to-hub", "me/digits", capsys=capsys)
    assert f"--push-to-hub me/digits failed; {tmp_path / 'p'} is whole" in message and advice in message
    assert (tmp_path / "p" / "model_index.json").is_file()


@pytest.mark.parametrize("answer,advice", ANSWERS)
def test_a_teacher_that_cannot_be_fetched_is_one_message(answer, advice, answering, hub_at, tmp_path, capsys):
    hub_at(answer if isinstance(answer, str) else answering(answer))
    message = refused(cold_start.main, flags("org/sit", tmp_path / "run"), capsys=capsys)
    assert "no folder org/sit is here" in message and advice in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("answer", [401, 403, "no-address"])
def test_a_vae_that_cannot_be_fetched_is_one_message(answer, answering, hub_at, tmp_path, capsys):
    random_sit(in_channels=4).save_pretrained(tmp_path / "latent")
    hub_at(answer if isinstance(answer, str) else answering(answer))
    common = ("--generator", tmp_path / "latent", "--output", tmp_path / "s.npz", "--vae", "org/vae")
    message = refused(generate.main, words(*common), capsys=capsys)
    assert "cannot load the VAE 'org/vae'" in message and "the hub says" in message
    assert not (tmp_path / "s.npz").exists()


@pytest.mark.parametrize("name", ["a b/c", "a/b/c", "you/sit@main", "you/sit.git", "you/-sit", "", "you/" + "s" * 200])
def test_a_name_that_no_repository_can_have_is_refused_before_the_export(name, run, tmp_path, capsys):
    message = refused(export, run, "--pipeline", tmp_path / "p", "--push-to-hub", name, capsys=capsys)
    assert f"--push-to-hub is {name!r}; a name such as you/dmdr-sit is expected" in message
    assert not (tmp_path / "p").exists()


# In: by a name ---------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def server(tmp_path, hub_at):
    """A hub with one repository, org/sit, whose files lie in ``folder``; ``asked``: paths that were asked for."""
    folder, asked = tmp_path / "hub_files", []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, code, content=b"", **headers):
            self.send_response(code)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self):
            path = self.path.split("?")[0]
            asked.append(path)
            files = [str(each.relative_to(folder)) for each in sorted(folder.rglob("*")) if each.is_file()]
            _, _, name = path.partition("/resolve/")
            file = folder / name.partition("/")[2]
            if path in (f"/api/models/org/sit/revision/{end}" for end in ("main", COMMIT)):
                content = {"id": "org/sit", "sha": COMMIT, "siblings": [{"rfilename": each} for each in files]}
                self.answer(200, json.dumps(content).encode(), Content_Type="application/json")
            elif path.startswith(f"/api/models/org/sit/tree/{COMMIT}"):
                sizes = {each: (folder / each).stat().st_size for each in files}
                tree = [{"type": "file", "path": each, "size": size, "oid": each} for each, size in sizes.items()]
                self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            elif path.startswith("/org/sit/resolve/") and file.is_file():
                content = file.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.answer(200, content, ETag=etag, X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")
            else:
                self.answer(404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub_at(f"http://127.0.0.1:{server.server_address[1]}")
    yield folder, asked
    server.shutdown()


def test_a_teacher_is_trained_from_by_its_name_and_its_commit_is_recorded(server, teacher, tmp_path):
    folder, _ = server
    SiT.from_pretrained(teacher).save_pretrained(folder)
    run = tmp_path / "run"
    for more in ([], ["--auto-resume", "--max-train-steps", "4"]):
        cold_start.main(flags("org/sit", run, "--use-lora-gen", *more))
    assert json.loads((run / "args.json").read_text())["arguments"]["teacher"] == f"org/sit@{COMMIT}"
    other = run_cold_start(teacher, tmp_path / "other", "--use-lora-gen", "--max-train-steps", 4)
    assert logged(run) == logged(other)
    ours, theirs = (SiT.from_pretrained(each / "generator").state_dict() for each in (run, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_pipeline_on_the_hub_is_a_generator_that_knows_its_steps(server, tmp_path):
    folder, _ = server
    save_pipeline(random_sit(), None, SAMPLING, None, {}, folder)
    for name, source in (("hub", f"org/sit@{COMMIT}"), ("here", folder / "generator")):
        generate.main(words("--generator", source, "--output", tmp_path / f"{name}.npz", "--num-images", 4))
    ours, theirs = (np.load(tmp_path / f"{name}.npz") for name in ("hub", "here"))
    assert np.array_equal(ours["arr_0"], theirs["arr_0"]) and ours["arr_0"].std() > 5
    told = json.dumps(str(ours["provenance"]))
    assert f"org/sit@{COMMIT}" in told


def test_folders_ask_no_network_and_names_that_are_none_say_what_to_do(server, teacher, tmp_path, capsys):
    _, asked = server
    assert remote.model_folder(teacher) == teacher and remote.pinned(teacher) == teacher
    (tmp_path / "models").mkdir()
    for source in ("runs/digits", "sit_weights/SiT-XL-2", "SiT-XL/2", "models/sit", "./sit", "sit", "a/b/c"):
        message = refused(cold_start.main, flags(source, tmp_path / "run"), capsys=capsys)
        assert "does not exist" in message, source
        assert "pretrain_digits.sh" in message and "sit_convert.py" in message
    assert not asked
    message = refused(cold_start.main, flags("nobody/nothing", tmp_path / "run"), capsys=capsys)
    assert asked and "no folder nobody/nothing is here" in message and "sit_convert.py" in message
    assert not (tmp_path / "run").exists()
