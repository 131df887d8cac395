"""LiteLLM's proxy, from an environment of its own, in front of a server of the tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from local_server import free_port
from server_process import started

LITELLM_PYTHON = Path(os.environ.get("MISTRAL_LORA_LITELLM_PYTHON", "no-litellm"))

needs_litellm = pytest.mark.skipif(
    not LITELLM_PYTHON.is_file(),
    reason="MISTRAL_LORA_LITELLM_PYTHON names no Python that has litellm[proxy]: tox run -e serving-litellm",
)

_SECONDS = 300
"""The longest start: it imports for half a minute."""


@contextmanager
def litellm_before(
    upstream: str, models: Mapping[str, str], folder: Path, *, key: str = "", root: str = ""
) -> Iterator[str]:
    """Start the proxy before a server, and yield its address.

    Args:
        upstream: The address of the server.
        models: The model that LiteLLM asks for, as `PROVIDER/NAME`, by the name that a client uses.
        folder: Where its configuration is written.
        key: The key that it asks its clients for; empty for none.
        root: The path before all of its own.
    """
    listed = [
        {"model_name": name, "litellm_params": {"model": model, "api_base": f"{upstream}/v1", "api_key": "none"}}
        for name, model in models.items()
    ]
    config = folder / "litellm.yaml"
    # JSON is YAML
    config.write_text(json.dumps({"model_list": listed, "general_settings": {"master_key": key} if key else {}}))
    port = free_port()
    # its own Internet look-ups are left out
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "SERVER_ROOT_PATH": root}
    command = [str(LITELLM_PYTHON.with_name("litellm")), "--config", str(config), "--host", "127.0.0.1"]
    address = f"http://127.0.0.1:{port}{root}"
    with started([*command, "--port", str(port)], address, "/health/liveliness", _SECONDS, env=environment):
        yield address
