"""The network: files of an address, teachers by a name on the hub, uploads; each failure is one message."""

import hashlib
import http.server
import json
import threading
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants, file_download

from convert_weight import export_generator
from convert_weight.exports import save_pipeline
from evaluation import generate
from evaluation.standins import write_dinov2
from tests.conftest import flags, logged, random_sit, refused, run_cold_start, words
from train_cc import cold_start
from train_cc.io import remote
from train_cc.io.errors import InputError
from train_cc.io.remote import download
from train_cc.models import DINOv2Classifier, SiT

Reply = tuple[int, bytes, dict[str, str | None]]  # status, content, headers


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.close_connection = True
        if (reply := self.server.answer(self.path.split("?")[0])) is not None:
            status, content, headers = reply
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    do_HEAD = do_POST = do_GET

    def log_message(self, *args) -> None:
        """Nothing."""


@pytest.fixture
def serve():
    """Start a server that replies by a function of the path (None: it hangs up), and return its address."""
    servers = []

    def start(answer: Callable[[str], Reply | None]) -> str:
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        servers[-1].answer = answer
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()


# An address ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["a web page", "broken off", "cut without a length"])
def test_what_is_no_whole_file_never_counts(serve, tmp_path, how):
    torch.save({"weight": torch.ones(1000)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "whole.pt").unlink()
    length = str(len(content)) if how == "broken off" else None
    sent = b"<html>sign in</html>" if how == "a web page" else content[:2000]
    url = serve(lambda path: (200, sent, {"Content-Length": length})) + "/last.pt"
    with pytest.raises(InputError, match=r"no whole PyTorch file; .* `curl -L -C - .*, or take another$"):
        download(url, tmp_path / "last.pt", "take another")
    assert not list(tmp_path.iterdir())
    download(serve(lambda path: (200, content, {})) + "/last.pt", tmp_path / "last.pt", "")
    assert (tmp_path / "last.pt").read_bytes() == content and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("url", ["http://", "http://[", "https://127.0.0.1:99999/x", "http://127.0.0.1:9/x"])
def test_a_url_that_leads_nowhere_is_a_message(tmp_path, url):
    with pytest.raises(InputError, match="cannot download"):
        download(url, tmp_path / "x", "")
    assert not list(tmp_path.iterdir())


def test_dinov2_is_downloaded_whole_and_a_damaged_copy_is_named(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    backbone, head = write_dinov2(tmp_path / "official", width=64, depth=4, classes=10)
    url = serve(lambda path: (200, backbone.read_bytes(), {})) + "/last.pt?a=b"
    kept = tmp_path / "home" / "hub" / "checkpoints" / "last.pt"
    assert DINOv2Classifier.from_official(url, head).files == [kept, head]
    assert kept.read_bytes() == backbone.read_bytes()
    kept.write_bytes(b"<html></html>")
    with pytest.raises(InputError, match=f"{kept} .*delete it"):
        DINOv2Classifier.from_official(url, head)


# The hub ------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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
def server(tmp_path, hub_at, serve):
    """A hub with one repository, org/sit, of the files in ``folder``; ``asked``: paths that were asked for."""
    folder, asked = tmp_path / "hub_files", []

    def answer(path: str) -> Reply:
        asked.append(path)
        sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
        file = folder / path.partition("/resolve/")[2].partition("/")[2]
        content: object
        if path in (f"/api/models/org/sit/revision/{end}" for end in ("main", COMMIT)):
            content = {"id": "org/sit", "sha": COMMIT, "siblings": [{"rfilename": name} for name in sizes]}
        elif path.startswith(f"/api/models/org/sit/tree/{COMMIT}"):
            content = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
        elif path.startswith("/org/sit/resolve/") and file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            return 200, file.read_bytes(), {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
        else:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        return 200, json.dumps(content).encode(), {"Content-Type": "application/json"}

    hub_at(serve(answer))
    return folder, asked


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
    save_pipeline(random_sit(), None, {"num_inference_steps": 2, "timestep_shift": 1.5}, None, {}, folder)
    for name, source in (("hub", f"org/sit@{COMMIT}"), ("here", folder / "generator")):
        generate.main(words("--generator", source, "--output", tmp_path / f"{name}.npz", "--num-images", 4))
    ours, theirs = (np.load(tmp_path / f"{name}.npz") for name in ("hub", "here"))
    assert np.array_equal(ours["arr_0"], theirs["arr_0"]) and ours["arr_0"].std() > 5
    assert f"org/sit@{COMMIT}" in str(ours["provenance"])


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


@pytest.fixture(scope="module")
def push(teacher, tmp_path_factory):
    """The command that exports a run's checkpoint as a pipeline and uploads it; the words of the command."""
    root = tmp_path_factory.mktemp("push")
    run = run_cold_start(teacher, root / "run", "--max-train-steps", 1, "--num-previews", 0)
    units = run / "checkpoints/torch_units/step-1.pt"
    return words("--checkpoint", units, "--pipeline", root / "p", "--push-to-hub", "me/digits")


def test_a_pipeline_is_pushed_whole_and_without_paths_of_this_machine(push, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "broken", True)
    message = refused(export_generator.main, push, capsys=capsys)
    assert "no token" in message and "hf auth login" in message
    monkeypatch.setattr(Api, "broken", False)
    folder = Path(push[3])
    folder.with_name("p.tmp").mkdir()  # of a kill when all was done
    export_generator.main(push)  # what was written before stays
    assert not folder.with_name("p.tmp").exists()
    printed = capsys.readouterr().out
    assert "there already" in printed and "https://huggingface.co/me/digits" in printed
    expected = {"README.md", "model_index.json", "pipeline.py", "generator/network.py", "generator/config.json"}
    expected |= {"generator/diffusion_pytorch_model.safetensors", "generator/generation_config.json"}
    assert Api.made == {"me/digits": expected}
    assert '"me/digits"' in (folder / "README.md").read_text()


UNREACHABLE = ("http://127.0.0.1:9", "http://no-such-host.invalid", "no-address")
OLD = huggingface_hub.__version__.startswith("0.")  # 0.34 ignores a status of 409
ANSWERS = [
    *((address, "Check the network, the proxy and HF_ENDPOINT") for address in UNREACHABLE),
    (None, "Check the network, the proxy and HF_ENDPOINT"),
    (401, "`hf auth login`"),
    (403, "The token has no right to this"),
    (409, "Check the network" if OLD else "Check the name"),
]


@pytest.mark.parametrize("answer,advice", ANSWERS)
def test_an_upload_or_a_teacher_that_the_hub_refuses_is_one_message(
    answer, advice, push, serve, hub_at, tmp_path, capsys
):
    reply = None if answer is None else (answer, b"", {})
    hub_at(answer if isinstance(answer, str) else serve(lambda path: reply))
    message = refused(export_generator.main, push, capsys=capsys)
    assert f"--push-to-hub me/digits failed; {push[3]} is whole" in message and advice in message
    message = refused(cold_start.main, flags("org/sit", tmp_path / "run"), capsys=capsys)
    assert "no folder org/sit is here" in message and advice in message
    random_sit(in_channels=4).save_pretrained(tmp_path / "latent")
    sampling = words("--generator", tmp_path / "latent", "--output", tmp_path / "s.npz", "--vae", "org/vae")
    message = refused(generate.main, sampling, capsys=capsys)
    assert "cannot load the VAE 'org/vae'" in message and "the hub says" in message
    assert not (tmp_path / "run").exists() and not (tmp_path / "s.npz").exists()
