"""Write the files that serve an adapter or a merged model with the prompts of training.

A server's own defaults are seldom right: docs/serving.md lists each with the ids that it makes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.checkpoint.weights import read_header, weight_files
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.programs.facts import Fact, fact, works
from pytest_mistral_lora.records.adapter_config import PLAIN_STARTS, require_supported
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import finished_folder, write_text
from pytest_mistral_lora.records.known_answers import known_answers
from pytest_mistral_lora.records.probe import ANSWERS, write_record
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS

PROBE_MODEL = "probe-model"
"""The folder of a probe's weights within the export."""
REQUIREMENTS = "requirements.txt"
"""The file of the versions that the environment of a server needs."""


@dataclass(frozen=True)
class ServedModel:
    """The model for a server.

    Attributes:
        folder: The folder of the adapter, or of the full model.
        base: The folder of the weights: the base, or the full model itself.
        name: The name by which requests ask for it.
    """

    folder: AdapterFolder
    base: Path
    name: str

    @property
    def has_adapter(self) -> bool:
        """Whether the folder has an adapter."""
        return self.folder.path.resolve() != self.base

    @cached_property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer of training: the adapter's, or else the base's."""
        return self.folder.path if oracle_file(self.folder.path) is not None else self.base

    @cached_property
    def oracle(self) -> Oracle:
        """The tokenizer of training.

        Raises:
            NoOracleError: If it is not Mistral's.
        """
        return CheckpointTokenizer(self.tokenizer).oracle

    @property
    def template(self) -> Path | None:
        """The chat template that the rows of training were rendered by; None if mistral-common encoded them."""
        data = self.folder.valid_manifest.data if self.folder.valid_manifest is not None else {}
        if data.get("tokenizer", {}).get("backend", "mistral-common") == "mistral-common":
            return None
        return self.folder.path / str(data["template"]["file"])

    @cached_property
    def dtype(self) -> str:
        """The dtype of the weights, as safetensors names it."""
        header = read_header(weight_files(self.base)[0])
        return next((info.dtype for name, info in header.items() if name.endswith("_proj.weight")), "")

    @property
    def weights(self) -> str:
        """The folder of the weights as the commands name it, which run in the exported folder."""
        return str(self.base)


@dataclass(frozen=True)
class ProbeModel(ServedModel):
    """A planted model in place of another one, with its tokenizer and its flags.

    Attributes:
        folder: The folder of the model that it stands for.
        base: The folder of the planted weights, within the export.
        tokenizer_folder: The folder with the tokenizer of the model that it stands for.
    """

    tokenizer_folder: Path = Path()

    @property
    def has_adapter(self) -> bool:
        """A probe has no adapter."""
        return False

    @cached_property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer of the model that it stands for."""
        return self.tokenizer_folder

    @property
    def weights(self) -> str:
        """The folder of the weights within the export."""
        return PROBE_MODEL


@dataclass(frozen=True)
class ServerFiles:
    """The written folder.

    Attributes:
        folder: The folder.
        commands: The commands that serve the model, in their order.
        check: The command that compares the running server with mistral-common.
        remarks: The remaining differences from training, as sentences.
        needs: The versions that the environment of the server needs, with the reason; empty for any version.
    """

    folder: Path
    commands: tuple[str, ...]
    check: str
    remarks: tuple[str, ...]
    needs: str = ""


@dataclass(frozen=True)
class Written:
    """What the export of a server has written.

    Attributes:
        commands: The commands that serve the model, in their order; they run in the written folder.
        check: The command that compares the running server with mistral-common.
        remarks: The remaining differences from training, as sentences.
        fault: The fault of the versions that pip resolves for the server, if it stops this model.
    """

    commands: tuple[str, ...]
    check: str
    remarks: tuple[str, ...] = ()
    fault: Fact | None = None


class ServerExport:
    """Writes the files that serve a model by one kind of server.

    Attributes:
        kind: The name of the kind of server.
        title: Its name in texts.
        takes_probe: Whether a probe can be exported for it.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    takes_probe: ClassVar[bool] = False

    def faults(self, served: ServedModel) -> Iterator[str]:
        """Yield each property of an adapter that the server refuses or silently ignores.

        Args:
            served: The model, which has an adapter.
        """
        config = served.folder.config
        off = {"bias": ("none", None), "init_lora_weights": PLAIN_STARTS}
        keys = ["use_dora", "lora_bias", "bias", "modules_to_save", "layer_replication", "trainable_token_indices"]
        for key in (*keys, "init_lora_weights"):
            if config.get(key) and config[key] not in off.get(key, ()):
                yield f"{key} is {config[key]!r}, which {self.title} does not load"

    def write(self, served: ServedModel, folder: Path) -> Written:
        """Write the files that serve a model into a folder.

        Raises:
            InputError: If the server cannot serve the model as it was trained.
        """
        raise NotImplementedError


def export_for_server(
    source: Path,
    to: ServerExport,
    output: Path,
    *,
    base: Path | None = None,
    name: str = "",
    is_probe: bool = False,
    progress: Callable[[int, float], object] = lambda step, margin: None,
) -> ServerFiles:
    """Write the folder that serves an adapter or a full model as it was trained.

    Args:
        source: The folder of the adapter or the full model.
        to: What writes the files of the server.
        output: The folder to make.
        base: The base's folder; by default the one that the adapter's folder records.
        name: The name of the model in requests; by default the name of `source`.
        is_probe: Whether to write a planted model that says the known answers, in place of the model.
        progress: Called before each step of a probe's training, with its number and the smallest margin in logits.

    Raises:
        InputError: If `output` exists, the base is missing, the server cannot serve the adapter as it was trained, or
            no probe can stand for the model.
    """
    served = _served(source, base, name or source.resolve().name)
    if is_probe:
        _require_probe(served, to)
    elif served.has_adapter:
        _require_servable(served, to)
    with finished_folder(output) as folder:
        remarks_of_probe: tuple[str, ...] = ()
        if is_probe:
            served, remarks_of_probe = _planted(served, folder, progress)
        made = to.write(served, folder)
        started = tuple(f"cd {shlex.quote(str(output))} && {command}" for command in made.commands)
        check = f"{made.check} --answers" if is_probe else made.check
        done = ServerFiles(output, started, check, (*remarks_of_probe, *made.remarks), _needs(made.fault))
        write_text(folder / "README.md", "\n".join(_readme(served, to.kind, made.commands, done)) + "\n")
    return done


def _require_probe(served: ServedModel, to: ServerExport) -> None:
    if not to.takes_probe:
        raise InputError(f"no probe is known for {to.title}", next_step="Leave --probe out.")
    if served.template is not None:
        raise InputError(
            "the rows were rendered by a chat template, and the known answers are those of mistral-common",
            place=str(served.template),
            next_step="Leave --probe out.",
        )


def _planted(
    served: ServedModel, folder: Path, progress: Callable[[int, float], object]
) -> tuple[ProbeModel, tuple[str, ...]]:
    """Write a planted model and its record into the export, and return it with the remarks about it."""
    from pytest_mistral_lora.training.export.probe import plant

    planted = plant(folder / PROBE_MODEL, served.oracle, known_answers(), progress=progress)
    write_record(folder, served.oracle, planted)
    said = [answer for answer in planted if answer.is_said]
    remarks = [
        f"The weights are those of a tiny model that says {len(said)} known answers ({ANSWERS}), and nothing else: it "
        "shows what the server makes of answers, and nothing about yours."
    ]
    if len(said) < len(planted):
        names = ", ".join(answer.name for answer in planted if not answer.is_said)
        remarks.append(f"It does not say {len(planted) - len(said)} of them: {names}.")
    return ProbeModel(served.folder, folder / PROBE_MODEL, served.name, served.tokenizer), tuple(remarks)


def _served(source: Path, base: Path | None, name: str) -> ServedModel:
    folder = AdapterFolder(source, BaseFolder(base) if base else None, may_fetch=True)
    if not folder.config_file.is_file():
        if base is not None:
            raise InputError("has no adapter: it needs no base", place=str(source), next_step="Leave --base out.")
        weight_files(source)
        return ServedModel(folder, source.resolve(), name)
    folder.require_adapter()
    require_supported(folder.config, Place.of(folder.config_file))
    if folder.recorded_base.weights_sha256:
        _ = folder.base_weights_sha256  # raises if the weights are another base's
    return ServedModel(folder, folder.base.path.resolve(), name)


def _require_servable(served: ServedModel, to: ServerExport) -> None:
    found = next(to.faults(served), "")
    if found:
        merge = f"mistral-lora merge {shlex.quote(str(served.folder.path))} merged"
        step = f"Merge it, and export the merged folder: {merge}."
        raise InputError(found, place=str(served.folder.config_file), next_step=step)


def script(lines: str, note: str = "") -> str:
    """Return a shell script that runs in its own folder."""
    return f'#!/bin/sh\n{note}set -e\ncd "$(dirname "$0")"\n{lines}\n'


def wrapped(words: list[str]) -> str:
    """Return a command, an option a line."""
    return "exec" + "".join((" \\\n  " if word.startswith("-") else " ") + shlex.quote(word) for word in words)


def remark_on_calls(fault: str, served: ServedModel) -> str:
    """Return the remark on a server at which no trained tool call arrives.

    Args:
        fault: The id of the known fault.
        served: The model, whose tokenizer writes each call with its id.
    """
    found = fact(fault)
    version = served.oracle.version
    return f"No tool call of {version} arrives: {found.symptom}. Way out: {found.way_out}."


def check_command(served: ServedModel, kind: str, port: int) -> str:
    """Return the command that compares the running server with mistral-common."""
    words = ["mistral-lora", "serve-check", f"{kind}=http://127.0.0.1:{port}"]
    words += ["--tokenizer", str(served.tokenizer.resolve()), "--model", served.name]
    folder = served.folder.path.resolve()
    if served.has_adapter or (not isinstance(served, ProbeModel) and (folder / TRANSCRIPTS).is_dir()):
        # its transcripts show whether the server applies it
        words += ["--adapter", str(folder)]
    return shlex.join(words)


def _needs(fault: Fact | None) -> str:
    if fault is None:
        return ""
    versions = " and ".join(f"{name} {version}" for name, version in works(fault.works).versions.items())
    return f"{versions}, in an environment of the server's own ({REQUIREMENTS}): {fault.symptom}"


def _readme(served: ServedModel, to: str, commands: tuple[str, ...], done: ServerFiles) -> Iterator[str]:
    if isinstance(served, ProbeModel):
        what = f"a probe of `{served.folder.path}`: a planted model with its tokenizer, template and flags"
    elif served.has_adapter:
        what = f"the adapter `{served.folder.path}` on `{served.base}`"
    else:
        what = f"`{served.base}`"
    yield from (f"# {served.name}, served by {to}", "", f"Made by `mistral-lora export` for {what}.", "", "```console")
    yield from (f"$ {command}" for command in commands)
    yield from (
        "```",
        "",
        "While it runs, hold its prompts to mistral-common:",
        "",
        "```console",
        f"$ {done.check}",
        "```",
    )
    if done.needs:
        yield from ("", f"The server needs {done.needs}.")
    if done.remarks:
        yield from ("", "Different from training:", "", *(f"- {remark}" for remark in done.remarks))
