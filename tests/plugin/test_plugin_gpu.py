"""The end-to-end train on a GPU, where there is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.mistral_gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_the_tiny_train_passes_on_cuda(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--mistral-golden", "--mistral-device", "cuda", "-k", "spm-v3::train"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout
