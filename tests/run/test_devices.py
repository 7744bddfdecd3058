"""train_cc/run/devices.py: a GPU that is there and cannot be used ends the run with its reason."""

import os

import pytest
import torch

from scripts.launch import make_plan
from tests.conftest import flags, refused
from train_cc import cold_start
from train_cc.io import processes
from train_cc.io.errors import InputError
from train_cc.run import devices

SMI = '#!/bin/sh\necho "GPU 0: NVIDIA A100 (UUID: GPU-1)"\necho "GPU 1: NVIDIA A100 (UUID: GPU-2)"\n'


def fails(words: str):
    def call(*args, **options):
        raise RuntimeError(f"{words}\nPlease update")

    return call


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """nvidia-smi shows two, torch has none of them."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text(SMI)
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_gpus_that_torch_cannot_use_are_no_run_on_the_cpu(two_gpus, teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    message = refused(cold_start.main, flags(teacher, tmp_path / "run"), capsys=capsys)
    for words in ("nvidia-smi shows 2 GPU(s)", "is a wheel without CUDA", "CUDA_VISIBLE_DEVICES="):
        assert words in message
    assert not (tmp_path / "run").exists()
    cold_start.main(flags(teacher, tmp_path / "run", "--dry-run"))
    assert "peak of the run" in capsys.readouterr().out  # a plan needs no GPU
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fails("The NVIDIA driver on your system is too old (found version 11040)."))
    with pytest.raises(InputError, match=r"for CUDA 13.0 says: .*too old \(found version 11040\)"):
        devices.require_usable_gpus()
    for visible in ("", "-1", "-1,0", "NoDevFiles"):  # hidden on purpose
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        devices.require_usable_gpus()


def test_an_nvidia_smi_that_hangs_is_no_wait(two_gpus, tmp_path, monkeypatch):
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 9\n")
    monkeypatch.setattr(processes, "NVIDIA_SMI", 0.2)
    with pytest.raises(InputError, match=r"nvidia-smi -L gave no answer in 0\.2 s.*CUDA_VISIBLE_DEVICES"):
        make_plan({})


def test_a_card_without_kernels_and_more_processes_than_cards_are_told(monkeypatch):
    card = {"is_available": True, "device_count": 1, "get_device_name": "Tesla K80"}
    card |= {"get_device_capability": (3, 7), "get_arch_list": ["sm_75", "sm_90"]}
    for name, value in card.items():
        monkeypatch.setattr(torch.cuda, name, lambda *place, value=value: value)
    monkeypatch.setattr(devices.torch, "zeros", fails("CUDA error: no kernel image is available for execution"))
    words = r"Tesla K80 \(sm_37\) cannot compute .* kernels for sm_75 sm_90: .*no kernel image"
    with pytest.raises(InputError, match=words):
        devices.require_usable_gpus()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match=r"NUM_PROCESSES asks for more than the 1 visible GPU\(s\)"):
        devices.require_usable_gpus()
