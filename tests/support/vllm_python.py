"""The Python of an environment with vLLM, which this one lacks: vLLM needs an older mistral-common."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VLLM_PYTHON = Path(os.environ.get("MISTRAL_LORA_VLLM_PYTHON", "no-vllm"))

needs_vllm = pytest.mark.skipif(
    not VLLM_PYTHON.is_file(), reason="MISTRAL_LORA_VLLM_PYTHON names no Python that has vLLM: tox run -e serving-vllm"
)
