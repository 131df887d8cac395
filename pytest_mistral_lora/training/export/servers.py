"""Write the files that serve an adapter or a merged model with the prompts of training: for vLLM, llama.cpp, Ollama.

A server's own defaults are seldom right: docs/serving.md lists each with the ids that it makes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.answer_grammar import has_grammar
from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.checkpoint.weights import read_header, weight_files
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.field.facts import Fact, fact, works
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_config import PLAIN_STARTS, require_supported
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import finished_folder, write_text
from pytest_mistral_lora.records.known_answers import known_answers
from pytest_mistral_lora.records.probe import ANSWERS, write_record
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS
from pytest_mistral_lora.training.export.llamacpp import ADAPTER, MODEL, go_template, write_adapter, write_model

PROBE_MODEL = "probe-model"
"""The folder of a probe's weights within the export."""
PROBED = ("vllm", "llamacpp")
"""The servers that a probe can be exported for."""
_REQUIREMENTS = "requirements.txt"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's --max-lora-rank (vllm/config/lora.py, 0.32)."""
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_OUTTYPES = {"F32": "f32", "BF16": "bf16", "F16": "f16"}


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


def export_for_server(
    source: Path,
    to: str,
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
        to: A key of `SERVER_EXPORTS`.
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
        commands, check, remarks = SERVER_EXPORTS[to](served, folder)
        started = tuple(f"cd {shlex.quote(str(output))} && {command}" for command in commands)
        check = f"{check} --answers" if is_probe else check
        done = ServerFiles(output, started, check, (*remarks_of_probe, *remarks), _needs(_known_fault(served, to)))
        write_text(folder / "README.md", "\n".join(_readme(served, to, commands, done)) + "\n")
    return done


def _require_probe(served: ServedModel, to: str) -> None:
    if to not in PROBED:
        raise InputError(f"no probe is known for {to}", expected=f"--to {' or '.join(PROBED)}")
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


def _require_servable(served: ServedModel, to: str) -> None:
    found = next(_faults(served, to), "")
    if found:
        merge = f"mistral-lora merge {shlex.quote(str(served.folder.path))} merged"
        step = f"Merge it, and export the merged folder: {merge}."
        raise InputError(found, place=str(served.folder.config_file), next_step=step)


def _faults(served: ServedModel, to: str) -> Iterator[str]:
    """Yield each property of an adapter that a server refuses or silently ignores."""
    config, title = served.folder.config, "vLLM" if to == "vllm" else "llama.cpp"
    off = {"bias": ("none", None), "init_lora_weights": PLAIN_STARTS}
    keys = ["use_dora", "lora_bias", "bias", "modules_to_save", "layer_replication", "trainable_token_indices"]
    for key in (*keys, "init_lora_weights"):
        if config.get(key) and config[key] not in off.get(key, ()):
            yield f"{key} is {config[key]!r}, which {title} does not load"
    if to == "vllm":
        if _largest_rank(served) > _RANKS[-1]:
            yield f"the rank is {_largest_rank(served)}, and vLLM takes at most {_RANKS[-1]}"
        return
    if config.get("alpha_pattern"):
        yield "alpha_pattern gives layers a scale of their own: a GGUF adapter has one alpha"
    if config.get("rank_pattern") and config.get("use_rslora"):
        yield "rank_pattern with use_rslora gives layers a scale of their own: a GGUF adapter has one alpha"
    others = [name for name in served.folder.tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        yield f"{others[0]} is not a pair of matrices, the only form that llama.cpp's converter takes"


def _largest_rank(served: ServedModel) -> int:
    config = served.folder.config
    ranks: list[int] = [config["r"], *(config.get("rank_pattern") or {}).values()]
    return max(ranks)


_Export = tuple[tuple[str, ...], str, tuple[str, ...]]
"""The commands, the check, and the remarks."""


def _write_vllm(served: ServedModel, folder: Path) -> _Export:
    options = ["--host", "127.0.0.1", "--port", "8000"]
    if served.has_adapter:
        rank = next(rank for rank in _RANKS if rank >= _largest_rank(served))
        options += ["--served-model-name", served.base.name, "--enable-lora", "--max-lora-rank", str(rank)]
        options += ["--lora-modules", f"{served.name}={served.folder.path.resolve()}"]
    else:
        options += ["--served-model-name", served.name]
    options += [*_vllm_tokenizer(served), "--enable-auto-tool-choice", "--tool-call-parser", "mistral"]
    if served.dtype in _DTYPES:
        # vLLM's `auto` takes 16 bits for weights of 32
        options += ["--dtype", _DTYPES[served.dtype]]
    # a repetition penalty in generation_config.json also changes greedy answers
    options += ["--generation-config", "vllm"]
    fault, commands, note = _known_fault(served, "vllm"), ["sh serve.sh"], ""
    if fault is not None:
        # servers with the versions that pip resolves do not answer
        pinned = works(fault.works).pinned
        write_text(folder / _REQUIREMENTS, "".join(f"{line}\n" for line in (f"# {fault.symptom}", *pinned)))
        note = f"# Install {_REQUIREMENTS} in an environment of the server's own: {fault.symptom}\n"
        commands = [f"pip install -r {_REQUIREMENTS}", *commands]
    write_text(folder / "serve.sh", _script(_wrapped(["vllm", "serve", served.weights, *options]), note))
    remarks = (
        () if served.template is None else ("Text that spells a control token becomes that control token (ML906).",)
    )
    return tuple(commands), _check(served, "vllm", 8000), remarks


def _known_fault(served: ServedModel, to: str) -> Fact | None:
    """Return the fault of the versions that pip resolves for a server, if it stops this model."""
    if to != "vllm" or served.template is not None:
        return None
    return fact("served-grammar") if has_grammar(served.oracle) else None


def _vllm_tokenizer(served: ServedModel) -> list[str]:
    if served.template is not None:
        # vLLM reads only the weights of an adapter's folder
        given = ["--tokenizer-mode", "hf", "--tokenizer", str(served.folder.path.resolve())]
        return [*given, "--chat-template", str(served.template.resolve())]
    if oracle_file(served.base) is not None:
        return ["--tokenizer-mode", "mistral"]
    if oracle_file(served.folder.path) is None:
        raise InputError(
            "no Mistral tokenizer file, without which vLLM renders by the chat template",
            place=str(served.base),
            expected="tekken.json or tokenizer.model.vN",
            next_step="Copy it from the repository of the base.",
        )
    return ["--tokenizer-mode", "mistral", "--tokenizer", str(served.folder.path.resolve())]


def _script(lines: str, note: str = "") -> str:
    return f'#!/bin/sh\n{note}set -e\ncd "$(dirname "$0")"\n{lines}\n'


def _wrapped(words: list[str]) -> str:
    """Return a command, an option a line."""
    return "exec" + "".join((" \\\n  " if word.startswith("-") else " ") + shlex.quote(word) for word in words)


_CONVERT = "# usage: sh convert.sh LLAMA_CPP, the folder with llama.cpp's converters\n"


def _write_llamacpp(served: ServedModel, folder: Path) -> _Export:
    write_model(folder / MODEL, served.base, served.tokenizer, served.template)
    lines = ['LLAMA_CPP="${1:?give the folder with convert_hf_to_gguf.py}"']
    outtype = _OUTTYPES.get(served.dtype, "auto")
    tekken = served.oracle.kind == "tekken"
    written = "unnamed.gguf" if tekken else "model.gguf"
    lines += [f'python "$LLAMA_CPP/convert_hf_to_gguf.py" {MODEL} --outtype {outtype} --outfile {written}']
    if tekken:
        # the converter recognises a splitter by the ids of one text, and mistakes a Tekken of 2024-09 for Llama 3
        lines += ["gguf-new-metadata --force --pre-tokenizer tekken unnamed.gguf model.gguf", "rm unnamed.gguf"]
    serve = ["llama-server", "--model", "model.gguf", "--alias", served.name]
    if served.has_adapter:
        write_adapter(folder / ADAPTER, served.folder)
        convert = f'python "$LLAMA_CPP/convert_lora_to_gguf.py" {ADAPTER} --base {MODEL} --outtype f32'
        lines += [f"{convert} --outfile adapter.gguf"]
        serve += ["--lora", "adapter.gguf"]
    write_text(folder / "convert.sh", _script("\n".join(lines), _CONVERT))
    serve += ["--jinja", "--host", "127.0.0.1", "--port", "8080"]
    write_text(folder / "serve.sh", _script(_wrapped(serve)))
    remarks = [
        "Text that spells a control token becomes that control token (ML906); docs/deviations.md has the others."
    ]
    if tekken:
        remarks.append("Hindi, Tamil, Thai and other text with combining marks gets other ids (ML915).")
    # a build outside of Git, as in Python wheels, reports no number, and the deviations are known of numbers alone
    build = works("llamacpp-serves-exports").versions["llama.cpp"]
    check = _check(served, f"llamacpp@{build}", 8080)
    return ("sh convert.sh LLAMA_CPP", "sh serve.sh"), check, tuple(remarks)


def _write_ollama(served: ServedModel, folder: Path) -> _Export:
    if served.template is not None:
        raise InputError(
            "the rows were rendered by a chat template, and no Go template is known to do as it does",
            place=str(served.template),
            next_step="Serve it by llama.cpp or vLLM: --to llamacpp, --to vllm.",
        )
    template = go_template(served.oracle)
    commands, _, remarks = _write_llamacpp(served, folder)
    lines = ["FROM ./model.gguf", *(["ADAPTER ./adapter.gguf"] if served.has_adapter else [])]
    # Ollama's own penalty of repetition is 1.1, which changes greedy answers
    lines += [f'TEMPLATE """{template}"""', "PARAMETER repeat_penalty 1"]
    write_text(folder / "Modelfile", "\n".join(lines) + "\n")
    (folder / "serve.sh").unlink()
    ours = (
        "No Go template has exact tools: an older Ollama refuses a request with tools, and one of 2026 renders every "
        "prompt by the Jinja template in the GGUF file, as llama.cpp does.",
        "Spaces at the end of an answer are kept, and system messages one after another are joined.",
    )
    create = f"ollama create {shlex.quote(served.name)} --file Modelfile"
    return (commands[0], create), _check(served, "ollama", 11434), (*remarks, *ours)


SERVER_EXPORTS: Mapping[str, Callable[[ServedModel, Path], _Export]] = MappingProxyType(
    {"vllm": _write_vllm, "llamacpp": _write_llamacpp, "ollama": _write_ollama}
)
"""How the files of each server are written, by its name."""


def _check(served: ServedModel, kind: str, port: int) -> str:
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
    return f"{versions}, in an environment of the server's own ({_REQUIREMENTS}): {fault.symptom}"


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
