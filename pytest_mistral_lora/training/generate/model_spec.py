"""The model of an adapter folder or a merged folder: how it is loaded, and the transcripts of its answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pytest_mistral_lora.chat.completions import FormatCheck
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.devices import Precision, choose_device
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import InputError, counted
from pytest_mistral_lora.places import file_of
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import Written
from pytest_mistral_lora.records.goldens import golden_paths
from pytest_mistral_lora.records.schema import error_in_words
from pytest_mistral_lora.records.transcripts import Transcript, load_folder
from pytest_mistral_lora.training.display import RunDisplay
from pytest_mistral_lora.training.generate.answers import adapter_effect, generate, load_adapted, probe
from pytest_mistral_lora.training.generate.record import record, tokenizer_identity
from pytest_mistral_lora.training.recipe import Evaluation

MAX_NEW_TOKENS = 256
"""Default of the longest answer, in tokens."""

_NEXT_STEP = "remove the file to record anew"


@dataclass(frozen=True)
class ModelSpec:
    """The weights of a model and the way to load them: as in training, or as a merge compares them.

    Attributes:
        folder: The adapter's or the merged model's folder.
        base: The base; of a merged model, its own folder.
        identity: A transcript's `model`.
        precision: dtype of the weights of the base, or of the merged model.
        quantization: `nf4` if the base is loaded in 4 bits, or None.
        device: `cpu` or `cuda`.
    """

    folder: AdapterFolder
    base: BaseFolder
    identity: Mapping[str, Any]
    precision: Precision
    quantization: str | None
    device: str

    @classmethod
    def of(cls, folder: AdapterFolder, *, device: str = "auto") -> ModelSpec:
        """Return a folder's model as it was trained, its base found and checked; no model is loaded.

        Args:
            folder: The adapter's or the merged model's folder.
            device: `auto`, `cpu` or `cuda`.

        Raises:
            InputError: If there is no adapter, or as for `AdapterFolder.identity`.
        """
        identity = folder.identity  # first: a folder without an adapter needs no base
        return cls(folder, folder.base, identity, folder.precision, folder.quantization, choose_device(device))

    @property
    def encoder(self) -> Encoder:
        """The backend of training."""
        return self.folder.encoder

    def load(self) -> Any:
        """Load base and adapter, or the merged model, in eval mode.

        Raises:
            InputError: As for `load_adapted`.
        """
        if self.folder.kind == "merged":
            return load_base(self.base, self.precision, self.device).eval()
        return load_adapted(self.folder, self.base, self.precision, self.device, self.quantization)

    def answer(
        self,
        model: Any,
        rows: Sequence[Row],
        *,
        max_new_tokens: int,
        checks: Sequence[FormatCheck] = (),
        display: RunDisplay | None = None,
    ) -> list[Transcript]:
        """Return the transcript of each row's last turn, answered greedily by the result of `load`; write nothing."""
        return record(
            model,
            self.encoder,
            rows,
            generate(model, self.encoder, rows, max_new_tokens=max_new_tokens, display=display),
            identity=self.identity,
            precision=self.precision,
            max_new_tokens=max_new_tokens,
            checks=checks,
        )


def model_spec(adapter: Path, base: Path | None = None, *, device: str = "auto") -> ModelSpec:
    """Return the model of a folder that a command names; its base may be fetched from the Hub.

    Args:
        adapter: The adapter's or the merged model's folder.
        base: The base's folder; by default, the one that an adapter's folder records.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: If a base is given for a merged model, or as for `ModelSpec.of`.
    """
    folder = AdapterFolder(adapter, BaseFolder(base) if base else None, may_fetch=True)
    if base is not None and folder.kind == "merged":
        raise InputError(
            "a merged model (kind merged in its manifest.json), which needs no base",
            place=str(adapter),
            next_step="Leave --base out, or name the adapter's folder.",
        )
    return ModelSpec.of(folder, device=device)


def smoke(
    spec: ModelSpec,
    rows: Sequence[Row],
    *,
    unanswered: Collection[int] = (),
    max_new_tokens: int = 256,
    display: RunDisplay | None = None,
) -> dict[str, Any]:
    """Load a model and use it; return `completions`, `probe` and `adapter_effect` as plain data.

    Nothing is compared without an answer in the row: `expected_ids` and `equal` are null, and so are `probe` and
    `adapter_effect` if no row has one. A merged model has no `adapter_effect`, since its adapter cannot be disabled.

    Args:
        spec: The model.
        rows: Conversations that end with the turn to generate.
        unanswered: Indices of those whose last turn is only a placeholder.
        max_new_tokens: Longest completion, in tokens.
        display: Display of the progress; None to show nothing.
    """
    display = display or RunDisplay()
    display.phase("loading the model")
    model = spec.load()
    display.phase(f"answering {counted(len(rows), 'row')}")
    encoded = [spec.encoder.encode(row) for index, row in enumerate(rows) if index not in unanswered]
    answers = generate(model, spec.encoder, rows, max_new_tokens=max_new_tokens, display=display)
    completions = list(map(asdict, answers))
    for index in unanswered:
        completions[index] |= {"expected_ids": None, "equal": None}
    found: dict[str, Any] = {"completions": completions, "probe": asdict(probe(model, encoded)) if encoded else None}
    if spec.folder.kind == "adapter":
        found["adapter_effect"] = adapter_effect(model, encoded) if encoded else None
    # torch and the number of threads are reported, since the sums of a CPU depend on both
    return {**found, "device": spec.device, "torch": torch.__version__, "threads": torch.get_num_threads()}


def record_rows(
    adapter: Path,
    rows: Sequence[Row],
    folder: Path,
    base: Path | None = None,
    *,
    max_new_tokens: int = 256,
    checks: Sequence[FormatCheck] = (),
    device: str = "auto",
    display: RunDisplay | None = None,
) -> list[Path]:
    """Record the answers of an adapter as golden transcripts, and return their files.

    Args:
        adapter: The adapter's folder.
        rows: Conversations that end with the turn to generate.
        folder: Folder of the transcripts; it is made, and must not hold other transcripts.
        base: The base's folder; by default, the one that the adapter's folder records.
        max_new_tokens: Longest completion, in tokens.
        checks: Format checks for each completion.
        device: `auto`, `cpu` or `cuda`.
        display: Display of the progress; None to show nothing.

    Raises:
        InputError: If adapter, base and rows do not go together, or the folder has transcripts.
    """
    if golden_paths(folder):
        raise InputError("has transcripts already", place=str(folder), next_step="Remove them or name another folder.")
    spec = model_spec(adapter, base, device=device)
    for row in rows:
        # a row that cannot be encoded fails here, before the weights are loaded
        spec.encoder.prompt(row)
    display = display or RunDisplay()
    display.phase("loading the model")
    model = spec.load()
    display.phase(f"answering {counted(len(rows), 'row')}")
    transcripts = spec.answer(model, rows, max_new_tokens=max_new_tokens, checks=checks, display=display)
    folder.mkdir(parents=True, exist_ok=True)
    return [transcript.write(folder) for transcript in transcripts]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt for a model, with the settings of its transcript.

    Attributes:
        case: Name of the transcript.
        row: The conversation; the model answers in place of its last assistant turn.
        checks: Format checks for the answer.
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
            before: The existing transcript, whose settings apply unless the line has its own; or None.

        Raises:
            InputError: If one of the two keys cannot be used.
        """
        settings: dict[str, Any] = {"checks": (), "max_new_tokens": MAX_NEW_TOKENS}
        if before is not None:
            settings = {"checks": before.format_checks, "max_new_tokens": before.max_new_tokens}
        given = {key: line[key] for key in settings if key in line}
        # the recipe's own model reads the keys, so that they mean the same in a line and in a recipe
        folder = Path(file_of(row.place)).parent
        try:
            read = Evaluation.model_validate({"generations": 1, **given}, context={"folder": folder})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"][:2]))
            raise InputError(f"{name}: {error_in_words(first, Evaluation)}", place=row.place) from error
        found = {"checks": read.format_checks(), "max_new_tokens": read.max_new_tokens}
        return cls(case, row, **settings | {key: found[key] for key in given})


def ask(model: Any, spec: ModelSpec, question: Question) -> Transcript:
    """Return the transcript of one question; nothing is written.

    Args:
        model: The result of `spec.load()`.
        spec: The model as it was loaded.
        question: The prompt.

    Raises:
        RowError: If the row cannot be encoded.
    """
    [transcript] = spec.answer(model, [question.row], max_new_tokens=question.max_new_tokens, checks=question.checks)
    return replace(transcript, case=question.case)


def check_same_kind(before: Transcript, spec: ModelSpec, file: Path) -> None:
    """Refuse to overwrite a transcript of another base or tokenizer, which guards another model.

    Raises:
        InputError: With both of them.
    """
    now, then = tokenizer_identity(spec.encoder), before.tokenizer
    if then["sha256"] != now["sha256"]:
        raise InputError(
            f"recorded with another tokenizer, {then['file']} {then['sha256'][:12]}",
            place=str(file),
            expected=f"{now['file']} {now['sha256'][:12]}; {_NEXT_STEP}",
        )
    base = before.model["base_weights_sha256"]
    if base != spec.identity["base_weights_sha256"]:
        raise InputError(
            f"recorded on another base, {before.model['base']} {base[:12]}",
            place=str(file),
            expected=f"{spec.base} {spec.identity['base_weights_sha256'][:12]}; {_NEXT_STEP}",
        )


def record_again(
    adapter: Path,
    folder: Path,
    base: Path | None = None,
    *,
    device: str = "auto",
    display: RunDisplay | None = None,
) -> dict[Path, Written]:
    """Ask the questions of recorded transcripts again, and write each answer over its transcript.

    Args:
        adapter: The adapter's folder.
        folder: Folder of transcripts, or one transcript; not those of a finished run.
        base: The base's folder; by default, the one that the adapter's folder records.
        device: `auto`, `cpu` or `cuda`.
        display: Display of the progress; None to show nothing.

    Returns:
        The change of each file.

    Raises:
        InputError: If there are no transcripts, if one belongs to another base or tokenizer, or if they belong to a
            finished run; then nothing is written.
    """
    home = folder if folder.is_dir() else folder.parent
    if AdapterFolder(home.parent).has_manifest:
        raise InputError(
            "the transcripts of a finished run, whose hashes are in its manifest",
            place=str(home),
            next_step="Copy them to a folder of your own, and record there.",
        )
    recorded = {home / f"{transcript.case}.json": transcript for transcript in load_folder(folder)}
    spec = model_spec(adapter, base, device=device)
    # all checks come before the weights are loaded, and before the first file is written
    for file, before in recorded.items():
        check_same_kind(before, spec, file)
        spec.encoder.prompt(before.row)
    display, written = display or RunDisplay(), dict[Path, Written]()
    display.phase("loading the model")
    model = spec.load()
    display.phase(f"answering {counted(len(recorded), 'prompt')} again")
    for file, before in recorded.items():
        written[file] = ask(model, spec, Question.again(before)).put(file, before)
        display.count(len(written), len(recorded), "answer")
    return written
