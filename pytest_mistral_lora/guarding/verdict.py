"""The verdict on a run that has not begun: its rows by the checks of encoded rows, and its model and tokenizer."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.places import by_number
from pytest_mistral_lora.checkpoint.loaded_tokenizer import recognise_copy, recognition_of, source_of, text_tokenizer
from pytest_mistral_lora.checkpoint.recognition import Recognition
from pytest_mistral_lora.checkpoint.tokenizer_folder import MODEL_CONFIG
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.finding import with_paths
from pytest_mistral_lora.conformance.model_targets import MODEL_PLACE, TrainerTarget
from pytest_mistral_lora.conformance.session import Session, opened_session
from pytest_mistral_lora.conformance.targets import EncodedTarget
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.guarding.forms import fixes_of, form_of
from pytest_mistral_lora.guarding.preferences import COLUMNS, sides_of
from pytest_mistral_lora.judging import AnyPath, Verdict, encoder_of, verdict_of
from pytest_mistral_lora.runners import runner_fixes

_TRAINERS = {"trl": "trl", "axolotl": "axolotl", "llamafactory": "llamafactory", "swift": "ms-swift"}
"""The runner of each trainer, by the package of its arguments."""

_ROWS = "rows.jsonl"
_TABLE = "rows.arrow"


@dataclass(frozen=True, slots=True)
class GuardedRow:
    """A row of a batch.

    Attributes:
        place: Its place, for findings.
        record: Its ids and labels, as `audit` takes them.
        has_images: Whether its batch has images.
    """

    place: str
    record: Mapping[str, Any]
    has_images: bool = False

    def sequences(self) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        """Yield ids and labels of each sequence of the row: two for a preference pair."""
        if "input_ids" in self.record:
            yield self.record["input_ids"], self.record.get("labels", ())
        else:
            yield from sides_of(self.record)


@dataclass(frozen=True)
class GuardedRun:
    """A run of a trainer, before its first step.

    Attributes:
        args: The `TrainingArguments`.
        model: The model.
        processing_class: The tokenizer or processor.
        optimizer: The optimizer; None if it is not made yet.
        named: The Mistral tokenizer that the user names, or None.
        dataset: The dataset of the trainer; None if it is unknown.
    """

    args: Any
    model: Any
    processing_class: Any
    optimizer: Any
    named: AnyPath | None
    dataset: Any = None

    @cached_property
    def source(self) -> CheckpointTokenizer | None:
        """The folder that the tokenizer was loaded from; None if it is not on this machine."""
        return source_of(text_tokenizer(self.processing_class))

    @cached_property
    def known(self) -> Recognition:
        """The Mistral tokenizer of the run.

        Raises:
            InputError: If the named tokenizer is missing.
            TokenizerError: If it cannot be loaded.
        """
        if self.named is not None:
            return recognition_of(encoder_of(self.named).tokenizer)
        if self.processing_class is None:
            return Recognition(None, "", reason="the trainer has no processing_class")
        if self.source is not None:
            return recognition_of(self.source)
        with tempfile.TemporaryDirectory(prefix="mistral-guard-") as folder:
            return recognise_copy(text_tokenizer(self.processing_class), Path(folder))

    def fixes(self, *, of_preferences: bool) -> Mapping[str, str]:
        """Return the fix of each rule in the words of the trainer, for the form of the rows that it was given."""
        packages = {cls.__module__.partition(".")[0] for cls in type(self.args).__mro__}
        trainer = next((runner for package, runner in _TRAINERS.items() if package in packages), "")
        field = getattr(self.args, "dataset_text_field", None) or "text"
        is_packed = bool(getattr(self.args, "packing", False))
        form = form_of(self.dataset, field, of_preferences=of_preferences, is_packed=is_packed)
        return {**runner_fixes("guard"), **fixes_of(trainer, form)}


def judge_run(run: GuardedRun, rows: Sequence[GuardedRow], started: float) -> Verdict:
    """Judge the rows, the model and the tokenizer of a run.

    Args:
        run: The run.
        rows: The rows of its first batches.
        started: The time of `time.perf_counter` at which the guard began.

    Raises:
        InputError: As for `GuardedRun.known`.
        TokenizerError: As for `GuardedRun.known`.
    """
    # batches come in the order of a sampler, and findings in that of the dataset
    rows = sorted(rows, key=lambda row: by_number(row.place))
    labels = [label for row in rows for _, labels in row.sequences() for label in labels]
    fixes = run.fixes(of_preferences=any("input_ids" not in row.record for row in rows))
    with _work_folder() as (data, configurations):
        eos = None if run.known.oracle is None else run.known.oracle.eos_id
        trainer = TrainerTarget(
            "trainer",
            configurations,
            model=run.model,
            processing_class=run.processing_class,
            known=run.known,
            base=run.source,
            optimizer=run.optimizer,
            has_images=any(row.has_images for row in rows),
            trains_eos=eos in labels,
        )
        batches = EncodedTarget("batches", data, judge=trainer)
        file = _write(rows, data)
        with opened_session([batches, trainer]) as session:
            return verdict_of(
                session,
                "guard(trainer)",
                _Amendments(
                    file, [row.place for row in rows], configurations / MODEL_CONFIG, fixes, trainer.fix_paths
                ).apply,
                lambda session: _cost(session, rows, labels, started),
            )


@contextmanager
def _work_folder() -> Iterator[tuple[Path, Path]]:
    """Yield a folder for the rows and one for the model's configurations, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="mistral-guard-") as folder:
        data, configurations = Path(folder) / "rows", Path(folder) / "configurations"
        data.mkdir()
        configurations.mkdir()
        yield data, configurations


def _write(rows: Sequence[GuardedRow], folder: Path) -> Path:
    """Write rows as encoded rows: as a table if they have messages of a table, which pads absent keys with nulls."""
    records = [dict(row.record) for row in rows]
    if any(key in record for record in records for key in ("messages", "conversations", *COLUMNS)):
        from pyarrow import Table, ipc

        table = Table.from_pylist(records)
        # not Parquet, which has no type for an object without keys, such as the parameters of a tool
        with ipc.new_stream(folder / _TABLE, table.schema) as writer:
            writer.write_table(table)
        return folder / _TABLE
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / _ROWS).write_text(text, encoding="utf-8")
    return folder / _ROWS


def _cost(session: Session, rows: Sequence[GuardedRow], labels: Sequence[int], started: float) -> list[str]:
    trained = sum(label != IGNORE_INDEX for label in labels)
    share = f"{100 * trained / len(labels):.0f} %" if labels else "0 %"
    seconds = time.perf_counter() - started
    return [
        f"guard: {counted(len(rows), 'row')} of {counted(len(labels), 'token')} with padding, "
        f"{share} of them with a loss; judged in {seconds:.2f} s"
    ]


@dataclass(frozen=True, slots=True)
class _Amendments:
    """The texts of findings, in the words of the trainer.

    Attributes:
        file: The file of the rows.
        places: The place of each row.
        configuration: The copy of the model's configuration.
        fixes: The fix of each rule, perhaps with placeholders for paths.
        paths: The path for each placeholder.
    """

    file: Path
    places: Sequence[str]
    configuration: Path
    fixes: Mapping[str, str]
    paths: Mapping[str, str]

    def apply(self, record: dict[str, Any]) -> None:
        """Name the rows and the model of the trainer in place of files, and its own fixes."""
        for finding in record["findings"]:
            finding.update({key: self._shown(finding[key]) for key in ("place", "found", "detail")})
            if finding["tokens"] is not None:
                finding["tokens"]["title"] = self._shown(finding["tokens"]["title"])
            finding["fix"] = with_paths(self.fixes.get(finding["rule"], finding["fix"]), self.paths)
            # the file is gone with the guard: no command of this package can be run on it
            lines = finding["detail"].splitlines()
            finding["detail"] = "\n".join(line for line in lines if "mistral-lora audit" not in line)
        facts = record["facts"]
        facts.update({name: self._shown(fact) for name, fact in facts.items() if isinstance(fact, str)})

    def _shown(self, text: str) -> str:
        text = re.sub(rf"{re.escape(str(self.file))}:(\d+)", lambda line: self.places[int(line[1]) - 1], text)
        text = text.replace(str(self.file), "batches").replace(str(self.file.parent), "batches")
        return text.replace(str(self.configuration), f"{MODEL_PLACE}.config")
