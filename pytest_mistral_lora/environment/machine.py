"""The machine: torch's build, the devices and their fast precisions, the cache, and the Hub."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.errors import InputError, one_line
from pytest_mistral_lora.extras import is_installed
from pytest_mistral_lora.records.files import cache_folder

HUB_SECONDS = 5.0
"""Longest wait for the Hub."""

_CPU_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
"""Features of x86 and ARM CPUs that multiply in bfloat16, as /proc/cpuinfo names them."""


@dataclass(frozen=True, slots=True)
class ModelDevice:
    """A device that models run on.

    Attributes:
        name: Its name.
        precisions: The precisions that it computes in without emulation.
        advice: The setting for a recipe.
        memory: Bytes of memory; 0 if unknown.
    """

    name: str
    precisions: tuple[str, ...]
    advice: str
    memory: int = 0


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """The installed torch.

    Attributes:
        version: Its version; empty if it is not installed.
        build: `CPU`, or the version of CUDA or ROCm that it was built for.
        error: The reason why it cannot be imported; empty if it can.
        devices: The devices that torch finds; empty if it cannot be imported.
    """

    version: str = ""
    build: str = ""
    error: str = ""
    devices: tuple[ModelDevice, ...] = ()


@dataclass(frozen=True, slots=True)
class HubState:
    """The cache of the Hub, and the connection to the Hub.

    Attributes:
        endpoint: The address of the Hub.
        offline: Whether `HF_HUB_OFFLINE` is set.
        cache: The folder of downloaded checkpoints.
        own_cache: The folder of this package's encoded rows, results and runners.
        free: Free bytes on the cache's disk.
        writable: Whether files can be written there.
        token: The place of a token, `HF_TOKEN` or a file; empty without a token. The token itself is never read.
        reachable: `yes`, or why not; empty if the Hub was not asked.
    """

    endpoint: str
    offline: bool
    cache: str
    own_cache: str
    free: int
    writable: bool
    token: str
    reachable: str = ""


def machine_facts(libraries: Any, torch: TorchBuild) -> dict[str, Any]:
    """Return the machine as plain JSON data.

    Args:
        libraries: The installed libraries, as JSON data.
        torch: The installed torch.
    """
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": libraries,
        "torch": asdict(torch),
    }


def torch_build() -> TorchBuild:
    """Return the installed torch and its devices; this imports torch."""
    if not is_installed("torch"):
        return TorchBuild()
    try:
        import torch
    except Exception as error:  # such as a missing library of CUDA or another numpy: report whatever it raises
        return TorchBuild("?", error=one_line(error) or type(error).__name__)
    build = torch.version.cuda and f"CUDA {torch.version.cuda}"
    build = build or (torch.version.hip and f"ROCm {torch.version.hip}") or "CPU"
    return TorchBuild(str(torch.__version__), build, devices=(*_gpus(torch), cpu_device(_cpu_flags())))


def _gpus(torch: Any) -> list[ModelDevice]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        capability = (facts.major, facts.minor)
        # as the trainer decides for `precision: auto`: before compute capability 8.0, bf16 is emulated
        has_bf16 = bool(torch.version.hip) or capability >= (8, 0)
        precisions = ("bf16", "fp16", "fp32") if has_bf16 else ("fp16", "fp32")
        advice = "precision: bf16, or auto" if has_bf16 else "precision: fp32, or fp16 with max_skipped_steps"
        name = f"cuda:{index} {facts.name}, compute capability {capability[0]}.{capability[1]}"
        found.append(ModelDevice(name, precisions, advice, int(facts.total_memory)))
    return found


def _cpu_flags() -> frozenset[str]:
    file = Path("/proc/cpuinfo")
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", file.read_text(), re.MULTILINE) if file.is_file() else None
    return frozenset(match[1].split()) if match else frozenset()


def cpu_device(flags: frozenset[str]) -> ModelDevice:
    """Return the CPU, with the precisions that its features allow."""
    has_bf16 = bool(flags & _CPU_FLAGS)
    advice = "precision: fp32, or auto" + ("" if has_bf16 else "; bf16 is computed in fp32, and is slower")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    name = f"cpu {platform.machine()}, {os.cpu_count()} cores"
    return ModelDevice(name, ("fp32", "bf16") if has_bf16 else ("fp32",), advice, pages)


def hub_state(*, ask: bool) -> HubState:
    """Return the state of the cache and the Hub.

    Args:
        ask: Whether the Hub may be asked; without a token, and not if `HF_HUB_OFFLINE` is set.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    # unlike a path's own methods, these do not raise for a name that is too long
    existing = next(folder for folder in (cache, *cache.absolute().parents) if os.path.exists(folder))  # noqa: PTH110
    offline = bool(constants.HF_HUB_OFFLINE)
    variables = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name, "").strip()]
    file = Path(constants.HF_TOKEN_PATH)
    files = [str(file)] if os.path.isfile(file) and file.stat().st_size else []  # noqa: PTH113
    reachable = ""
    if ask:
        reachable = "not asked: HF_HUB_OFFLINE is set" if offline else hub_answer(constants.ENDPOINT)
    return HubState(
        endpoint=constants.ENDPOINT,
        offline=offline,
        cache=str(cache),
        own_cache=_own_cache(),
        free=shutil.disk_usage(existing).free,
        writable=os.access(existing, os.W_OK),
        token=next(iter([*variables, *files]), ""),
        reachable=reachable,
    )


def _own_cache() -> str:
    try:
        return str(cache_folder())
    except InputError as error:
        return f"none: {error}"


def hub_answer(endpoint: str) -> str:
    """Return `yes` with the time that an answer took, or why there was no answer."""
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        # a mirror that refuses HEAD is reachable
        return f"yes, with status {error.code}"
    except (OSError, ValueError, HTTPException) as error:  # HF_ENDPOINT may not be an address, or not a web server's
        return f"no: {one_line(getattr(error, 'reason', error)) or type(error).__name__}"
    return f"yes, in {time.perf_counter() - start:.1f} s"
