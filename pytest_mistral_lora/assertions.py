"""Assertions for a user's own tests; each raises `AssertionError` with the report that the suite would print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.rows import Row, as_row
from pytest_mistral_lora.errors import InputError, RowsError

if TYPE_CHECKING:
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.conformance.finding import Finding

    AnyRow = Row | Mapping[str, Any]
    AnyTokenizer = CheckpointTokenizer | str | Path
    AnyIds = Sequence[int] | Mapping[str, Any] | Any


def assert_template_faithful(row: AnyRow, tokenizer: AnyTokenizer) -> None:
    """Assert that the checkpoint's chat template gives a row the ids of mistral-common.

    Named deviations of the official template do not fail; see `pytest_mistral_lora.chat.templates.deviations`.

    Args:
        row: A chat row.
        tokenizer: A tokenizer file, a checkpoint folder, or what the fixture `mistral_tokenizer` returns.

    Raises:
        AssertionError: If the ids differ (ML004), or the template's generation blocks mark other tokens (ML006).
        RowError: If the row cannot be used.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.chat.templates.render import ChatTemplate
    from pytest_mistral_lora.conformance.template import template_findings

    loaded = _tokenizer(tokenizer)
    _fail_on(template_findings(loaded.oracle, ChatTemplate(loaded.fast), as_row(row)))


def assert_labels_exact(row: AnyRow, input_ids: AnyIds, labels: AnyIds, tokenizer: AnyTokenizer) -> None:
    """Assert that a trainer's ids and labels of a row are exactly mistral-common's; each difference has a class.

    Args:
        row: A chat row.
        input_ids: What the trainer feeds, one id a token, without padding: a list, a 1-d array or tensor, one with a
            batch dimension of 1, or what `apply_chat_template` returns.
        labels: As long as `input_ids`; -100 where there is no loss.
        tokenizer: As for `assert_template_faithful`.

    Raises:
        AssertionError: With the class of each difference and the first differing token (ML520 to ML535 for ids,
            ML540 to ML551 for labels).
        RowError: If the row cannot be used.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.encoded.verdicts import row_findings

    findings = row_findings(as_row(row), _integers(input_ids), _integers(labels), _tokenizer(tokenizer).oracle)
    _fail_on(findings)


def assert_no_control_token_injection(row: AnyRow, input_ids: AnyIds, tokenizer: AnyTokenizer) -> None:
    """Assert that ids hold no control token but those that the row's structure needs.

    Args:
        row: A chat row; its texts may spell control tokens.
        input_ids: What a trainer or server feeds for the row, without padding, as for `assert_labels_exact`.
        tokenizer: As for `assert_template_faithful`.

    Raises:
        AssertionError: If a control token is there too often or too rarely (ML106).
        RowError: If the row cannot be used.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.encoded.checks import injection_findings

    _fail_on(injection_findings(as_row(row), _integers(input_ids), _tokenizer(tokenizer).oracle))


def assert_encoded_rows_sound(path: str | Path, tokenizer: AnyTokenizer) -> None:
    """Assert that every row of an encoded-rows file is exactly what mistral-common makes of its messages.

    Args:
        path: A JSONL file; each line has `row`, `messages`, `input_ids` and `labels`, and `tools` where the row has
            some. A packed sequence has `conversations` in place of `messages`, and `position_ids`.
        tokenizer: As for `assert_template_faithful`.

    Raises:
        AssertionError: With every wrong row, and what is wrong with the file as a whole (ML502 to ML551).
        RowsError: If lines cannot be read as encoded rows.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.encoded.checks import file_findings

    _fail_on(file_findings(Path(path), _tokenizer(tokenizer).oracle))


def assert_manifest_valid(manifest: str | Path | Mapping[str, Any]) -> None:
    """Assert that a manifest keeps its JSON Schema and its own rules.

    Args:
        manifest: A `manifest.json`, the folder that holds one, or its content.

    Raises:
        AssertionError: With every violation: JSON path, what was found, what is expected (ML701).
        InputError: If the file cannot be read or is not JSON.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.manifest import manifest_findings

    _fail_on(manifest_findings(manifest))


def assert_adapter_sound(adapter_dir: str | Path, base: str | Path | None = None) -> None:
    """Assert that an adapter folder holds a trained LoRA adapter that fits its configuration and its base.

    Args:
        adapter_dir: The folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: The base checkpoint's folder; without it, it is looked for beside the adapter's folder and in the Hub's
            cache, and what needs it is left out where it is not there.

    Raises:
        AssertionError: With every broken rule of the subject `adapter` (ML401 to ML421).
        PinError: If the base cannot be read.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.adapter.checks import adapter_findings

    _fail_on(adapter_findings(Path(adapter_dir), None if base is None else Path(base)))


def assert_transcript_matches(adapter_dir: str | Path, golden: str | Path, base: str | Path | None = None) -> None:
    """Assert that an adapter answers as golden transcripts say, exactly or equivalently.

    Base and adapter are loaded afresh; prompts go through the code path of training, and answers are greedy.

    Args:
        adapter_dir: The folder with `adapter_config.json` and `adapter_model.safetensors`; it need not be the adapter
            that the transcripts were recorded with.
        golden: A transcript, or a folder of transcripts.
        base: The base checkpoint's folder; without it, it is looked for beside the adapter's folder and in the Hub's
            cache.

    Raises:
        AssertionError: With each transcript that is not valid (ML801), whose prompt is encoded otherwise (ML802), that
            was recorded on another base (ML803), whose answer differs (ML804) or lost its form (ML805).
        InputError: If there are no transcripts or no adapter, the base is not at hand, or it is another one than the
            adapter was trained on.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.transcript import transcript_findings

    _fail_on(transcript_findings(Path(adapter_dir), Path(golden), None if base is None else Path(base)))


def _integers(value: AnyIds) -> list[int]:
    """Return one sequence as a list; from transformers 5 on, `apply_chat_template` returns a mapping."""
    ids = value["input_ids"] if isinstance(value, Mapping) and "input_ids" in value else value
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    ids = ids[0] if isinstance(ids, list | tuple) and len(ids) == 1 and isinstance(ids[0], list | tuple) else ids
    if not isinstance(ids, list | tuple) or not all(type(one) is int for one in ids):
        raise InputError(f"not the ids of one row: {type(value).__name__}", expected="a list or tensor of integers")
    return list(ids)


def _tokenizer(tokenizer: AnyTokenizer) -> CheckpointTokenizer:
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

    return CheckpointTokenizer(Path(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer


def _fail_on(findings: Iterable[Finding]) -> None:
    __tracebackhide__ = True
    texts: list[str] = []
    try:
        for finding in findings:
            if finding.severity == "error":
                texts.append(finding.text())
    except RowsError as error:
        if not texts:
            raise
        texts.append(str(error))
    if texts:
        raise AssertionError("\n\n".join(texts))
