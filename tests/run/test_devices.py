"""A GPU that is there and cannot be used ends the run with its reason."""

import os

import pytest
import torch

from scripts.launch import make_plan
from tests.conftest import flags, refused
from train_cc import cold_start
from train_cc.io import processes
from train_cc.io.errors import InputError
from train_cc.run import devices

SMI = """#!/bin/sh
echo "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-1)"
echo "GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-2)"
"""


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
    told = refused(cold_start.main, flags(teacher, tmp_path / "run"), capsys=capsys)
    assert "nvidia-smi shows 2 GPU(s)" in told and "is a wheel without CUDA" in told and "CUDA_VISIBLE_DEVICES=" in told
    assert not (tmp_path / "run").exists()


def test_an_old_driver_is_told_in_its_own_words(two_gpus, monkeypatch):
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(InputError, match=r"for CUDA 13.0 says: .*too old \(found version 11040\)"):
        devices.require_usable_gpus()


@pytest.mark.parametrize("visible", ["", "-1", "-1,0", "NoDevFiles"])
def test_hidden_gpus_are_meant_to_be_hidden(two_gpus, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices.require_usable_gpus()


def test_an_nvidia_smi_that_hangs_is_no_wait(two_gpus, tmp_path, monkeypatch):
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 9\n")
    monkeypatch.setattr(processes, "NVIDIA_SMI", 0.2)
    with pytest.raises(InputError, match=r"nvidia-smi -L gave no answer in 0\.2 s.*CUDA_VISIBLE_DEVICES"):
        make_plan({})


def test_a_dry_run_needs_no_gpu(two_gpus, teacher, tmp_path, capsys):
    cold_start.main(flags(teacher, tmp_path / "run", "--dry-run"))
    assert "peak of the run" in capsys.readouterr().out


@pytest.fixture
def one_gpu(monkeypatch):
    """A card that torch sees, but has no kernels for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (3, 7))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "Tesla K80")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])

    def zeros(*shape, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with")

    monkeypatch.setattr(devices.torch, "zeros", zeros)


def test_a_card_without_kernels_is_told(one_gpu):
    told = r"Tesla K80 \(sm_37\) cannot compute .* kernels for sm_75 sm_90: .*no kernel image"
    with pytest.raises(InputError, match=told):
        devices.require_usable_gpus()


def test_more_processes_than_cards_are_told(one_gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match=r"NUM_PROCESSES asks for more than the 1 visible GPU\(s\)"):
        devices.require_usable_gpus()
