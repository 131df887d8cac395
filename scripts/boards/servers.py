"""What the boards of prompts and of answers share: a server to record, and the names of servers and settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytest_mistral_lora.serving.servers import SERVERS


@dataclass(frozen=True)
class RunningServer:
    """A running server, to be recorded.

    Attributes:
        name: The name of the file of the record.
        address: A key of `SERVERS` and the URL, as in "vllm=http://127.0.0.1:8000".
        tokenizer: The tokenizer that it has: a name of the boards for prompts, a folder or a file for answers.
        setting: The files and options that decide what it makes.
        version: The version of a server that reports none; else empty.
        probe: The folder of the probe that it serves, if it cannot be asked by ids.
    """

    name: str
    address: str
    tokenizer: str
    setting: str
    version: str = ""
    probe: Path | None = None

    @property
    def kind(self) -> str:
        """A key of `SERVERS`."""
        return self.address.partition("=")[0]

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.address.partition("=")[2]


def program_of(kind: str, version: str) -> tuple[str, str]:
    """Return the program of a recording, and its version.

    Args:
        kind: A key of `SERVERS`.
        version: The version that the server reported, or the package with its version.
    """
    package, _, number = version.partition(" ")
    return (package, number) if number else (SERVERS[kind].title, version)


def to_set(setting: str) -> str:
    """Return what a reader has to set for a recorded setting, in Markdown.

    A file for llama.cpp may be written by the tests, with the fields of the exported one: the setting is then the same.
    """
    setting = setting.removeprefix("fields of ").removesuffix(", written by the tests")
    return f"`mistral-lora {setting}`" if setting.startswith("export ") else in_code(setting)


def in_code(setting: str) -> str:
    """Return a setting in Markdown: options and commands are code."""
    return f"`{setting}`" if setting.startswith(("-", "transformers serve")) else setting
