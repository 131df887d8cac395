"""Ask a model questions with names of their own, and keep its answers as golden transcripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.completions import FormatCheck
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import Written
from pytest_mistral_lora.records.manifest import MANIFEST
from pytest_mistral_lora.records.transcripts import Transcript, load_folder
from pytest_mistral_lora.training.generate.compare import ModelSpec, model_spec
from pytest_mistral_lora.training.generate.record import tokenizer_identity

MAX_NEW_TOKENS = 256
"""Longest answer where nothing says otherwise, in tokens."""

_KEYS = ("checks", "max_new_tokens")
_ANEW = "remove the file to record anew"


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked, to be kept as a transcript.

    Attributes:
        case: Name of the transcript.
        row: The conversation; its last assistant turn is what the model is to say.
        checks: Format checks to hold the answer to.
        max_new_tokens: Longest answer, in tokens.
    """

    case: str
    row: Row
    checks: tuple[FormatCheck, ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS

    @classmethod
    def again(cls, transcript: Transcript) -> Question:
        """Return the question that a transcript answers."""
        return cls(transcript.case, transcript.row, transcript.format_checks, transcript.max_new_tokens)

    @classmethod
    def of_line(cls, case: str, row: Row, line: Mapping[str, Any], before: Transcript | None) -> Question:
        """Return the question of a line of a JSONL file.

        Args:
            case: Name of the transcript.
            row: The line's conversation.
            line: The line; `checks` and `max_new_tokens` are read as in a recipe's `evaluation`, files beside the
                JSONL file.
            before: The transcript that is there, which counts where the line does not say; or None.

        Raises:
            InputError: If one of the two keys cannot be used.
        """
        asked: dict[str, Any] = {"checks": (), "max_new_tokens": MAX_NEW_TOKENS}
        if before is not None:
            asked = {"checks": before.format_checks, "max_new_tokens": before.max_new_tokens}
        return cls(case, row, **asked | _evaluation({key: line[key] for key in _KEYS if key in line}, row.place))


def _evaluation(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    from pydantic import ValidationError

    from pytest_mistral_lora.training.recipe import Evaluation

    folder = Path(place.rpartition(":")[0]).parent
    try:
        read = Evaluation.model_validate({"generations": 1, **given}, context={"folder": folder})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][:2]))
        raise InputError(f"{name}: {first['msg']}", place=place) from error
    found = {"checks": read.format_checks(), "max_new_tokens": read.max_new_tokens}
    return {key: found[key] for key in given}


def ask(model: Any, spec: ModelSpec, question: Question) -> Transcript:
    """Return the transcript of one question; nothing is written.

    Args:
        model: The result of `spec.load()`.
        spec: The model as it was loaded.
        question: What is asked.

    Raises:
        RowError: If the row cannot be encoded.
    """
    [transcript] = spec.answer(model, [question.row], max_new_tokens=question.max_new_tokens, checks=question.checks)
    return replace(transcript, case=question.case)


def check_same_kind(before: Transcript, spec: ModelSpec, file: Path) -> None:
    """Refuse to write over a transcript of another base or tokenizer: it guards something else.

    Raises:
        InputError: Naming both.
    """
    now, then = tokenizer_identity(spec.encoder), before.tokenizer
    if then["sha256"] != now["sha256"]:
        raise InputError(
            f"recorded with another tokenizer, {then['file']} {then['sha256'][:12]}",
            place=str(file),
            expected=f"{now['file']} {now['sha256'][:12]}; {_ANEW}",
        )
    base = before.model["base_weights_sha256"]
    if base != spec.identity["base_weights_sha256"]:
        raise InputError(
            f"recorded on another base, {before.model['base']} {base[:12]}",
            place=str(file),
            expected=f"{spec.base} {spec.identity['base_weights_sha256'][:12]}; {_ANEW}",
        )


def record_again(adapter: Path, folder: Path, base: Path | None = None, *, device: str = "auto") -> dict[Path, Written]:
    """Ask the questions of recorded transcripts again, and write each answer over its transcript.

    Args:
        adapter: The adapter's folder.
        folder: Folder of transcripts, or one transcript; not those of a finished run.
        base: The base's folder; by default, the one that the adapter's folder names.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        What became of each file.

    Raises:
        InputError: If there are no transcripts, one is of another base or tokenizer, or they belong to a finished run;
            then nothing is written.
    """
    home = folder if folder.is_dir() else folder.parent
    if (home.parent / MANIFEST).is_file():
        raise InputError(
            "the transcripts of a finished run, which its manifest has the hashes of",
            place=str(home),
            next_step="Copy them to a folder of your own, and record there.",
        )
    recorded = {home / f"{one.case}.json": one for one in load_folder(folder)}
    spec = model_spec(adapter, base, device=device)
    for file, before in recorded.items():
        check_same_kind(before, spec, file)
        spec.encoder.prompt(before.row)
    model = spec.load()
    return {file: ask(model, spec, Question.again(before)).put(file, before) for file, before in recorded.items()}
