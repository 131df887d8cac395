"""Load the rows of a run: encoded, or from the cache of earlier runs.

A folder of the cache (`records.files.cache_folder`) holds the rows of some data files as one tokenizer and one policy
encode them. You can remove any of these folders: it is made again on demand. The `.arrow` files are Arrow
streams, which `datasets.Dataset.from_file` opens.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from filelock import FileLock, Timeout

from pytest_mistral_lora import __version__
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.reading.chunks import DataFile, is_long
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes, sha256_file
from pytest_mistral_lora.errors import InputError, RowsError
from pytest_mistral_lora.records.data_stats import SplitStats, stats_of
from pytest_mistral_lora.records.files import cache_folder, canonical_json, finished_folder, listing, write_json
from pytest_mistral_lora.records.judged_rows import UNJUDGED, Judgement, KeptVerdict
from pytest_mistral_lora.records.trust import shared_by
from pytest_mistral_lora.training.devices import is_main, local_rank
from pytest_mistral_lora.training.recipe import Recipe
from pytest_mistral_lora.training.rows.dataset import ArrowFile, EncodedRows, Ints, ReparsedRows, RowTable, lengths_of
from pytest_mistral_lora.training.rows.encoding import (
    EncodingPlan,
    ReadFile,
    Sinks,
    SplitFigures,
    encode_files,
    warn_of_changes,
    warn_of_losses,
)
from pytest_mistral_lora.training.rows.judgement import RowsJudge, judge_of

FORMAT = 4
"""Number of the cache's format: raise it if the columns change, or anything else that a cache key does not cover."""

_FIGURES = "figures.json"
_LIBRARIES = {"mistral-common": ("mistral-common",), "chat-template": ("transformers", "tokenizers", "jinja2")}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Rows with their encodings, in the same order; both may be lazy sequences.

    Attributes:
        rows: The rows that are used.
        encoded: The encoding of each.
    """

    rows: Sequence[Row]
    encoded: Sequence[EncodedRow]

    @property
    def lengths(self) -> Ints:
        """Tokens of each row, int64."""
        return lengths_of(self.encoded)

    @cached_property
    def figures(self) -> SplitStats:
        """Hashes and numbers of the rows that are used, and numbers of those that were dropped and cut."""
        if isinstance(self.encoded, EncodedRows) and isinstance(self.rows, ReparsedRows):
            return self.encoded.figures
        return stats_of(self.rows, self.encoded)


@dataclass(frozen=True)
class RunData:
    """The rows of a run.

    Attributes:
        train: Trained on.
        held_out: Never trained on; may be empty.
        files: The data files, those to train on first.
    """

    train: Split
    held_out: Split
    files: tuple[ReadFile, ...] = ()


class EncodedSplit(NamedTuple):
    """The encoded rows of both sides of the split, and the `rows` and `source` of each `ReadFile`."""

    train: EncodedRows
    held_out: EncodedRows
    rows: list[int]
    sources: list[Mapping[str, Any] | None]


EncodeInto = Callable[[Sinks], SplitFigures]
"""`encode_files` with every argument but the sinks."""


@dataclass(frozen=True)
class RowFiles:
    """The files of one pass over rows, and the settings of the pass.

    Attributes:
        plan: The settings.
        encoder: The plan's backend.
        files: The files, in order.
    """

    plan: EncodingPlan
    encoder: Encoder
    files: Sequence[DataFile]

    @cached_property
    def sha256(self) -> list[str]:
        """The hash of each file's bytes, in order."""
        return [sha256_file(file.path) for file in self.files]

    @cached_property
    def key(self) -> str:
        """The name of their encoded rows in the cache."""
        return cache_key(self.plan, self.encoder, self.sha256, self.files)

    def read(
        self,
        *,
        judge: RowsJudge | None = None,
        first: int = 0,
        processes: int | None = None,
        progress: TextIO | None = None,
    ) -> RunData:
        """Read, split and encode the rows; many rows are encoded once and come from the cache after that.

        Args:
            judge: Judges the rows in the same pass, which is then made in any case; None if nobody does.
            first: The index of the first file among those that are judged.
            processes: As for `load_data`.
            progress: As for `load_data`.

        Raises:
            RowsError: As for `load_data`.
            InputError: If encoded rows cannot be kept.
        """
        files, sha256 = self.files, self.sha256
        encode = partial(
            encode_files,
            self.plan,
            files,
            encoder=self.encoder,
            judge=judge,
            first=first,
            processes=processes,
            progress=progress or sys.stderr,
        )
        if is_long(files):
            # of the processes on a machine, one looks for damage: hashing gigabytes in each would take minutes
            split = load_or_encode(self.key, encode, trusted=local_rank() > 0, again=judge is not None)
        else:
            split = encode_in_memory(encode)
        read = zip(files, sha256, split.rows, split.sources, strict=True)
        return RunData(
            Split(ReparsedRows(split.train.table, files), split.train),
            Split(ReparsedRows(split.held_out.table, files), split.held_out),
            tuple(
                ReadFile(file.path, file.is_held_out, digest, rows, source, file.objective)
                for file, digest, rows, source in read
            ),
        )


class LoadedRows(NamedTuple):
    """All rows of a run.

    Attributes:
        data: The rows of `data`.
        retention: The rows of `evaluation.retention`, as held-out rows; None without them.
        judgement: How they were judged.
    """

    data: RunData
    retention: RunData | None
    judgement: Judgement


def load_rows(recipe: Recipe, encoder: Encoder, *, xfails: Path | None = None, unjudged: bool = False) -> LoadedRows:
    """Read, split, encode and judge the rows of a recipe; a later run with the same rows takes the results.

    Of the processes of a run, one judges on each machine, and the others take its results, too.

    Args:
        recipe: The recipe.
        encoder: Its backend.
        xfails: A file of known deviations beside that of the recipe, or None.
        unjudged: Whether nobody judges the rows.

    Raises:
        FindingsError: If the rows have an error that is not accepted.
        RowsError: As for `load_data`.
        InputError: As for `load_data`; if the rows of `evaluation.retention` measure nothing; or if the known
            deviations cannot be read.
    """
    passes = [_data_files(recipe, encoder), *_retention_files(recipe, encoder)]
    if unjudged:
        judgement, found = UNJUDGED, [rows.read() for rows in passes]
    else:
        judgement, found = _judged(
            passes, judge_of(recipe, encoder, [*chain(*(rows.files for rows in passes))], xfails)
        )
    retention = _accepted_retention(found[1]) if len(found) > 1 else None
    return LoadedRows(_accepted_data(found[0], recipe), retention, judgement)


def _judged(passes: Sequence[RowFiles], judge: RowsJudge) -> tuple[Judgement, list[RunData]]:
    """Return the judgement of the rows of some passes, and the rows, which are read once.

    Raises:
        FindingsError: If the rows have an error that is not accepted.
        RowsError: If a row cannot be encoded, although its finding is accepted.
        InputError: If encoded rows cannot be kept.
    """
    kept = KeptVerdict([rows.key for rows in passes], judge.identity)
    found: list[RunData] = []
    refused: list[RowsError] = []
    with kept.locked():
        results = kept.read()
        if results is None:
            first = 0
            for rows in passes:
                try:
                    found.append(rows.read(judge=judge, first=first))
                except RowsError as error:
                    # the verdict on all rows says more than this error
                    refused.append(error)
                first += len(rows.files)
            results = judge.results()
            kept.write(results)
    judgement = judge.decide(results)
    if refused:
        raise refused[0]
    return judgement, found or [rows.read() for rows in passes]


def load_data(
    recipe: Recipe, encoder: Encoder, *, processes: int | None = None, progress: TextIO | None = None
) -> RunData:
    """Read, split and encode the rows of a recipe; many rows are encoded once and come from the cache after that.

    Rows that `training.truncation` and `training.unsupervised` drop or cut are logged as a warning.

    Args:
        recipe: The recipe.
        encoder: Its backend.
        processes: Number of processes that encode; by default one for little work, else one for each CPU.
        progress: A terminal for a progress bar, drawn if encoding takes long; None for standard error.

    Raises:
        RowsError: If any row is unreadable, or the backend or the recipe's policies refuse it; all such rows are named.
        InputError: If a requested split is empty, or encoded rows cannot be kept.
    """
    return _accepted_data(_data_files(recipe, encoder).read(processes=processes, progress=progress), recipe)


def _data_files(recipe: Recipe, encoder: Encoder) -> RowFiles:
    return RowFiles(EncodingPlan.of(encoder, recipe.training.policy, recipe.data.held_out), encoder, recipe.files())


def _retention_files(recipe: Recipe, encoder: Encoder) -> Iterator[RowFiles]:
    """Yield the files of `evaluation.retention`, whose rows are read like held-out rows, if there are any."""
    if files := recipe.retention_files():
        yield RowFiles(EncodingPlan.of(encoder, recipe.training.policy), encoder, files)


def _accepted_data(data: RunData, recipe: Recipe) -> RunData:
    """Return the rows of `data`, unless a side of their split is empty; log what was dropped and cut.

    Raises:
        InputError: If a requested split is empty.
    """
    if is_main():
        _warn("held-out rows", data)
    _refuse_empty(data, recipe)
    return data


def _accepted_retention(data: RunData) -> RunData:
    """Return the rows of `evaluation.retention`, unless they measure nothing; log what was dropped and cut.

    Raises:
        InputError: If no row is left, or none has a token with a loss.
    """
    if is_main():
        _warn("rows of evaluation.retention", data)
    tally, place = data.held_out.figures.tally, "evaluation.retention.rows"
    if not tally.used:
        raise InputError(f"none of its {tally.rows} rows is left", place=place, expected="rows to measure")
    if not tally.supervised_tokens:
        raise InputError(f"none of its {tally.used} rows has a token with a loss", place=place)
    return data


def _warn(held_out: str, data: RunData) -> None:
    paths = [file.path for file in data.files]
    for file in data.files:
        warn_of_losses(file)
    warn_of_changes("rows to train on", data.train.figures.tally, paths)
    warn_of_changes(held_out, data.held_out.figures.tally, paths)


def _refuse_empty(data: RunData, recipe: Recipe) -> None:
    if not data.train.rows:
        raise InputError("no row is left to train on", place="data.train")
    held_out = data.held_out.figures.tally
    for tally, place in ((data.train.figures.tally, "data.train"), (held_out, "data.eval")):
        if tally.used and not tally.supervised_tokens:
            # `unsupervised: warn` allows such rows; with only such rows, no step learns, and the mean loss is 0 / 0
            found = f"none of its {tally.used} rows has a token to train on"
            declared = any(not objective.is_default for objective in recipe.objectives)
            wanted = "a token with a loss under the objective" if declared else "an assistant message of weight 1"
            raise InputError(found, place=place, expected=f"{wanted} in one of them")
    if recipe.data.held_out and not held_out.rows:
        rows = data.train.figures.tally.rows
        raise InputError(
            f"{recipe.data.held_out} of {rows} rows holds out none",
            place="data.held_out",
            expected="a larger fraction, more rows, or eval files",
        )
    if held_out.rows and not held_out.used:
        raise InputError(f"each of {held_out.rows} held-out rows is dropped", place="training")


def encode_in_memory(encode: EncodeInto) -> EncodedSplit:
    """Return few encoded rows; nothing is kept on disk."""
    import pyarrow as pa

    train: list[Any] = []
    held_out: list[Any] = []
    figures = encode(Sinks(train.append, held_out.append))
    tables = [RowTable(pa.Table.from_batches(batches)) for batches in (train, held_out)]
    return EncodedSplit(
        EncodedRows(tables[0], figures.train), EncodedRows(tables[1], figures.held_out), figures.rows, figures.sources
    )


def cache_key(plan: EncodingPlan, encoder: Encoder, sha256: Sequence[str], files: Sequence[DataFile]) -> str:
    """Return the name of encoded rows in the cache: a hash of everything that they depend on.

    Args:
        plan: The settings.
        encoder: The plan's backend.
        sha256: Hash of each data file's bytes, in order.
        files: The data files.
    """
    own_template = plan.backend == "chat-template"
    parts = {
        "format": FORMAT,
        "version": __version__,
        # another version of a tokenizing library may encode differently
        "libraries": {name: version(name) for name in _LIBRARIES[plan.backend]},
        "files": list(zip(sha256, (file.is_held_out for file in files), strict=True)),
        "sources": [file.source.identity if file.source else None for file in files],
        "objectives": [str(file.objective) for file in files],
        "backend": plan.backend,
        "tokenizer": encoder.tokenizer.files.digests if own_template else encoder.tokenizer.oracle.sha256,
        "template": sha256_bytes(encoder.tokenizer.template.source.encode()) if own_template else None,
        "policy": asdict(plan.policy),
        "held_out": plan.held_out,
    }
    # 128 bits: no two keys are ever equal by chance, and the folder's name stays short
    return sha256_bytes(canonical_json(parts))[:32]


def load_or_encode(key: str, encode: EncodeInto, *, trusted: bool = False, again: bool = False) -> EncodedSplit:
    """Return encoded rows from the cache; encode them first if they are missing or damaged.

    If several processes need the same key, one encodes and the others wait.

    Args:
        key: The result of `cache_key`.
        encode: Encodes the rows into two sinks.
        trusted: Whether another process of this run has looked for damage already; then only sizes are compared.
        again: Whether to encode them in any case, since somebody looks at each.

    Raises:
        InputError: If the cache cannot be written.
    """
    folder = cache_folder() / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{key}.lock"))
        try:
            held_lock = lock.acquire(blocking=False)
        except Timeout:
            _log.info("another process encodes these rows: waiting for it (%s)", lock.lock_file)
            held_lock = lock.acquire()
        with held_lock:
            if again or not _is_intact(folder, trusted=trusted):
                # damaged folders, and those of killed processes: we hold the lock, so nobody writes there
                for remains in (folder, *folder.parent.glob(f".{folder.name}.*")):
                    shutil.rmtree(remains, ignore_errors=True)
                with finished_folder(folder) as unfinished:
                    _write_cache(unfinished, encode)
            content = read_json(folder / _FIGURES)["content"]
    except OSError as error:
        raise InputError(
            f"encoded rows cannot be kept here: {error.strerror or error}",
            place=str(folder.parent),
            next_step="Make room, or set MISTRAL_LORA_CACHE to another folder.",
        ) from error
    train, held_out = (
        EncodedRows(RowTable(folder / f"{side}.arrow"), SplitStats.from_json(content["sides"][side]))
        for side in ("train", "held_out")
    )
    return EncodedSplit(train, held_out, content["rows"], content["sources"])


def _is_intact(folder: Path, *, trusted: bool) -> bool:
    if not trusted and folder.exists() and (reason := shared_by(folder)):
        _log.warning("encoded rows are made again, since %s", reason)
        return False
    try:
        data = read_json(folder / _FIGURES)
        if data["sha256"] != sha256_bytes(canonical_json(data["content"])):
            raise InputError("its content is not as it was written", place=str(folder / _FIGURES))
        for name, recorded in data["content"]["files"].items():
            file = folder / name
            if file.stat().st_size != recorded["size"] or not (trusted or sha256_file(file) == recorded["sha256"]):
                raise InputError("its content is not as it was written", place=str(file))
    # a damaged JSON file can hold any value: a list has no keys, and a string no items
    except (OSError, InputError, KeyError, TypeError) as error:
        if folder.exists():
            _log.warning("encoded rows are damaged, and are made again: %s", error)
        return False
    return True


def _write_cache(folder: Path, encode: EncodeInto) -> None:
    with ArrowFile(folder / "train.arrow") as train, ArrowFile(folder / "held_out.arrow") as held_out:
        figures = encode(Sinks(train.write, held_out.write))
    sides = {"train": figures.train.to_json(), "held_out": figures.held_out.to_json()}
    content = {"files": listing(folder), "rows": figures.rows, "sources": figures.sources, "sides": sides}
    write_json(folder / _FIGURES, {"content": content, "sha256": sha256_bytes(canonical_json(content))})
