"""Assertions for your own tests: each raises `AssertionError` with the report that the suite prints."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.kinds.records import as_row
from pytest_mistral_lora.chat.reading import existing_path
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError, RowsError, in_brackets
from pytest_mistral_lora.extras import missing_extra

# The checks are imported in the bodies, so that a conftest or a test module can import this module cheaply.
if TYPE_CHECKING:
    from pytest_mistral_lora.chat.objective import Declaration
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.conformance.finding import Finding

    AnyRow = Row | Mapping[str, Any]
    AnyTokenizer = CheckpointTokenizer | str | Path | Any
    AnyIds = Sequence[int] | Mapping[str, Any] | Any

__all__ = [
    "NotCheckedWarning",
    "assert_adapter_sound",
    "assert_encoded_rows_sound",
    "assert_labels_exact",
    "assert_manifest_valid",
    "assert_no_control_token_injection",
    "assert_rows_sound",
    "assert_served_as_trained",
    "assert_template_faithful",
    "assert_transcript_matches",
]


def __dir__() -> list[str]:
    """List the assertions alone for the completion of a shell."""
    return __all__


class NotCheckedWarning(UserWarning):
    """An assertion could not judge a part of an artifact, such as the effect of an adapter without its base."""


def assert_template_faithful(
    row: AnyRow, tokenizer: AnyTokenizer, template: str | None = None, *, rules: str | None = None
) -> None:
    """Assert that a chat template renders a row to the ids of mistral-common.

    Named deviations of the official template (`pytest_mistral_lora.chat.templates.deviations`) do not fail.

    Args:
        row: A chat row.
        tokenizer: A tokenizer file, a checkpoint folder, `spm-v3` and the like, or the fixture `mistral_tokenizer`. Or
            a tokenizer in memory: a fast tokenizer of `transformers`, a `MistralCommonBackend`, or a `MistralTokenizer`
            of mistral-common. The last two have no chat template: without `template`, the one that mistral-common
            generates for their file is judged, as for a tokenizer file.
        template: The text of a Jinja template, in place of the tokenizer's.
        rules: The version by whose rules findings fail, such as `0.1`; None for all rules. What is newer is a note, and
            does not fail.

    Raises:
        AssertionError: If the ids differ (ML004), or the template's generation blocks mark other tokens (ML006).
        InputError: If the tokenizer or the template has another type.
        NoTemplateError: If there is no template.
        RowError: If the row cannot be used.
        TokenizerError: If the tokenizer cannot be loaded, or no Mistral tokenizer applies.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.template import template_findings

    loaded = _loaded_tokenizer(tokenizer, template)
    _raise_if_errors(template_findings(loaded.oracle, loaded.template, as_row(row)), rules)


def assert_labels_exact(
    row: AnyRow,
    input_ids: AnyIds,
    labels: AnyIds,
    tokenizer: AnyTokenizer,
    *,
    objective: str | None = None,
    rules: str | None = None,
) -> None:
    """Assert that a trainer's ids and labels of a row are exactly those of mistral-common.

    Args:
        row: A chat row.
        input_ids: The trainer's ids, without padding: a list of integers, an array or tensor of shape `(length,)` or
            `(1, length)`, or a mapping with them, such as the result of `apply_chat_template`.
        labels: As long as `input_ids`: the id of each token that has a loss, and -100 for each other token. A mapping
            holds them under `labels`.
        tokenizer: As for `assert_template_faithful`.
        objective: The objective by which labels are exact, such as `last-answer`; None for `answers`.
        rules: As for `assert_template_faithful`.

    Raises:
        AssertionError: With the class of each difference and the first differing token (ML520 to ML535 for ids,
            ML540 to ML551 for labels).
        InputError: If the objective has an unknown word, or is about a token that the tokenizer lacks.
        RowError: If the row cannot be used, or takes no objective.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.encoded.comparison import row_findings

    found = _token_ids(input_ids), _token_ids(labels, "labels")
    oracle = _loaded_tokenizer(tokenizer).oracle
    declared = _declared(objective, oracle)
    judged = as_row(row)
    if declared is not None and declared.objective is not None:
        judged = judged.with_objective(declared.objective)
    _raise_if_errors(row_findings(judged, *found, oracle), rules)


def assert_no_control_token_injection(
    row: AnyRow, input_ids: AnyIds, tokenizer: AnyTokenizer, *, rules: str | None = None
) -> None:
    """Assert that ids contain the control tokens of the row's structure, and no other.

    Text that spells a control token, such as `[INST]`, must be encoded as text.

    Args:
        row: A chat row; its texts may spell control tokens.
        input_ids: The ids that a trainer or server makes of the row, as for `assert_labels_exact`.
        tokenizer: As for `assert_template_faithful`.
        rules: As for `assert_template_faithful`.

    Raises:
        AssertionError: If a control token occurs too often or too rarely (ML106).
        RowError: If the row cannot be used.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.encoded.comparison import injection_findings

    _raise_if_errors(injection_findings(as_row(row), _token_ids(input_ids), _loaded_tokenizer(tokenizer).oracle), rules)


def assert_rows_sound(path: str | Path, tokenizer: AnyTokenizer, *, rules: str | None = None) -> None:
    """Assert that every row of a file can be trained on with a tokenizer, and that its texts are whole.

    These are the checks of `pytest --mistral-golden --mistral-dataset PATH`: no weights are loaded.

    Args:
        path: A JSONL file of chat rows, or data in another format that `mistral-lora import` converts.
        tokenizer: As for `assert_template_faithful`.
        rules: As for `assert_template_faithful`.

    Raises:
        AssertionError: With every fault of a row, by file and line, and every fault of the file as a whole (ML601 to
            ML674, and the laws ML101 to ML110).
        InputError: If a path does not exist.
        TokenizerError: If the tokenizer cannot be used.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.dataset.checks import file_results

    file = existing_path(path, "a file of rows, or a folder with one")
    results = file_results(file, _loaded_tokenizer(tokenizer))
    _raise_if_errors((finding for result in results.values() for finding in result.findings), rules)


def assert_encoded_rows_sound(
    path: str | Path | Any, tokenizer: AnyTokenizer, *, objective: str | None = None, rules: str | None = None
) -> None:
    """Assert that every encoded row has the ids and labels that mistral-common gives its messages.

    Args:
        path: A JSONL file, or such rows in another form: Parquet, Arrow, a JSON array, a folder of `save_to_disk`. Or
            rows in memory, as for `audit`: mappings, a `datasets.Dataset`, a batch, or a `DataLoader`. Each row has
            `messages`, `input_ids` and `labels`, and `tools` if it has tools; a mask may replace the labels. A packed
            sequence has `conversations` in place of `messages`, and `position_ids`. Ids without messages are read back
            into a conversation.
        tokenizer: As for `assert_template_faithful`.
        objective: As for `assert_labels_exact`. If it is given, answers of ids alone have the weight 1.
        rules: As for `assert_template_faithful`.

    Raises:
        AssertionError: With every fault of a row, and every fault of the file as a whole (ML502 to ML583).
        InputError: If the file is missing, the objective is wrong for the tokenizer, or the rows or the tokenizer have
            another type; RowsError if lines cannot be read as encoded rows.
        TokenizerError: If the tokenizer cannot be loaded, or no Mistral tokenizer applies.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.encoded.audit import file_findings
    from pytest_mistral_lora.formats.row_sources import rows_source

    rows = path
    if isinstance(path, str | os.PathLike | bytes) or not (isinstance(path, Iterable) or hasattr(path, "with_format")):
        rows = existing_path(path, "encoded rows: a JSONL file, a table, or a folder of save_to_disk")
    oracle = _loaded_tokenizer(tokenizer).oracle
    _raise_if_errors(file_findings(rows_source(rows), oracle, _declared(objective, oracle)), rules)


def assert_manifest_valid(manifest: str | Path | Mapping[str, Any], *, rules: str | None = None) -> None:
    """Assert that a manifest follows its JSON Schema and the rules that the schema cannot express.

    Args:
        manifest: A `manifest.json`, the folder that holds one, or its content.
        rules: As for `assert_template_faithful`.

    Raises:
        AssertionError: With the JSON path, the found and the expected value of every violation (ML701).
        InputError: If the path does not exist, or the file cannot be read or is not JSON.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.manifest import manifest_findings

    _raise_if_errors(manifest_findings(manifest), rules)


def assert_adapter_sound(adapter_dir: str | Path, base: str | Path | None = None, *, rules: str | None = None) -> None:
    """Assert that a folder holds a trained LoRA adapter that fits its configuration and its base.

    Args:
        adapter_dir: The folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: The base checkpoint's folder. If it is None, the base that the adapter names is used.
        rules: As for `assert_template_faithful`.

    Raises:
        AssertionError: With every broken rule of the subject `adapter` (ML401 to ML456), or if the tensors cannot be
            compared with the base that you name, for example because its class is unknown.
        InputError: If the folder is missing; PinError if the base cannot be read.
        MissingExtraError: If torch and PEFT are not installed, and everything that can be judged without them is sound.

    Warns:
        NotCheckedWarning: With the checks that could not judge, such as those that need a missing base.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.adapter.checks import adapter_findings

    folder = existing_path(adapter_dir, "the folder of an adapter or of a merged model", folder=True)
    given = None if base is None else existing_path(base, "the folder of a checkpoint", folder=True)
    left: dict[str, str] = {}
    _raise_if_errors(adapter_findings(folder, given, left), rules)
    cases = {why: ", ".join(case for case, reason in left.items() if reason == why) for why in left.values()}
    text = "\n".join([f"{folder}: not checked", *(f"  {names}: {why}" for why, names in cases.items())])
    if given is not None and left.keys() & {"fits-base", "names-and-shapes"}:
        raise AssertionError(text)
    if left:
        warnings.warn(text, NotCheckedWarning, stacklevel=2)


def assert_transcript_matches(
    adapter_dir: str | Path, golden: str | Path, base: str | Path | None = None, *, rules: str | None = None
) -> None:
    """Assert that an adapter gives the answers of golden transcripts, exactly or equivalently.

    Base and adapter are loaded again, prompts are encoded as in training, and answers are generated greedily.

    Args:
        adapter_dir: The folder with `adapter_config.json` and `adapter_model.safetensors`; the transcripts may be
            recorded with another adapter.
        golden: A transcript, or a folder of transcripts.
        base: The base checkpoint's folder; if it is None, the base that the adapter names.
        rules: As for `assert_template_faithful`.

    Raises:
        AssertionError: With each transcript that is not valid (ML801), whose prompt has other ids (ML802), that was
            recorded on another base (ML803), whose answer differs (ML804) or has lost its format (ML805).
        InputError: If transcripts, adapter or base are missing, if the adapter was trained on another base, or if no
            answer can be judged, for example for lack of memory.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.transcript import transcript_findings

    folder = existing_path(adapter_dir, "the folder of an adapter or of a merged model", folder=True)
    given = None if base is None else existing_path(base, "the folder of a checkpoint", folder=True)
    _raise_if_errors(
        transcript_findings(folder, existing_path(golden, "a transcript, or a folder of them"), given), rules
    )


def assert_served_as_trained(
    url: str,
    rows: AnyRow | Iterable[AnyRow],
    tokenizer: AnyTokenizer,
    *,
    model: str = "",
    rules: str | None = None,
) -> None:
    """Assert that a running server turns each row's messages into the prompt that mistral-common makes in training.

    Each row takes a few short requests: its messages before the last answer, one token, greedy.

    Args:
        url: The kind of the server and its address, as for `--mistral-server`: `http://127.0.0.1:8080`.
        rows: A chat row, or several, each with an answer at its end.
        tokenizer: As for `assert_template_faithful`.
        model: The name of the model to ask; by default, the first that the server lists.
        rules: As for `assert_template_faithful`.

    Raises:
        AssertionError: If the server does not answer (ML901), a prompt has other ids (ML902) or another number of them
            than its preview (ML903), text becomes a control token (ML906), a prompt is refused (ML907), or the server
            hides its ids, so that nothing is proven.
        InputError: If the kind of the server is unknown, its address is not valid, or a row has no answer.
        RowError: If a row cannot be used.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.server.checks import served_findings

    if not isinstance(url, str):
        raise InputError(f"no server: {type(url).__name__}", expected="a text such as http://127.0.0.1:8080")
    given = rows if isinstance(rows, Iterable) and not isinstance(rows, Row | Mapping) else [rows]
    used = tuple(as_row(row) for row in given)
    _raise_if_errors(served_findings(url, used, _loaded_tokenizer(tokenizer), model), rules)


def _token_ids(value: AnyIds, name: str = "input_ids") -> list[int]:
    """Return the ids or labels of one row, in any form that `assert_labels_exact` accepts, as a list.

    Raises:
        InputError: If the value has more than one row, or is not made of integers.
    """
    # from transformers 5 on, `apply_chat_template` returns a mapping
    ids = value[name] if isinstance(value, Mapping) and name in value else value
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    ids = ids[0] if isinstance(ids, list | tuple) and len(ids) == 1 and isinstance(ids[0], list | tuple) else ids
    # a list of an array's or a tensor's elements
    ids = [item.item() if hasattr(item, "item") else item for item in ids] if isinstance(ids, list | tuple) else None
    # `type(...) is int`: a bool is an int for isinstance, and a list of booleans is a mask, not ids
    if ids is None or not all(type(item) is int for item in ids):
        found = f"not the {'labels' if name == 'labels' else 'ids'} of one row: {type(value).__name__}"
        raise InputError(found, expected="a list or tensor of integers")
    return ids


def _declared(objective: str | None, oracle: Oracle) -> Declaration | None:
    """Return a declared objective; None without one.

    Raises:
        InputError: If a word is unknown, or is about a token that the tokenizer lacks.
    """
    from pytest_mistral_lora.chat.objective import Declaration

    declared = Declaration.given(objective)
    if declared is not None and declared.objective is not None:
        declared.objective.require(oracle.control_ids, oracle.version, declared.by)
    return declared


def _loaded_tokenizer(tokenizer: AnyTokenizer, template: str | None = None) -> CheckpointTokenizer:
    """Return a tokenizer, in any form that `assert_template_faithful` accepts.

    Raises:
        InputError: If it has another form, or the template is not a text.
        TokenizerError: If it cannot be loaded.
    """
    from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer
    from pytest_mistral_lora.checkpoint.loaded_tokenizer import (
        ACCEPTED,
        given_tokenizer,
        is_tokenizer,
        require_template,
    )
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

    text = require_template(template)
    if isinstance(tokenizer, str | Path):
        is_name = str(tokenizer) in SHIPPED and not Path(tokenizer).exists()
        tokenizer = CheckpointTokenizer(shipped_tokenizer(str(tokenizer)) if is_name else Path(tokenizer))
    elif not is_tokenizer(tokenizer):
        found = f"no tokenizer that can be judged{in_brackets(tokenizer)}: {type(tokenizer).__name__}"
        is_row = isinstance(tokenizer, Mapping) and "messages" in tokenizer
        raise InputError(found, expected=ACCEPTED, next_step="Give the row first, then the tokenizer." * is_row)
    return given_tokenizer(tokenizer, text)


def _raise_if_errors(findings: Iterable[Finding], rules: str | None) -> None:
    """Raise the texts of all findings that are errors by the rules of a version; notes do not fail a test.

    Raises:
        InputError: If the version is not recorded.
    """
    __tracebackhide__ = True
    from pytest_mistral_lora.conformance.rule_set import RuleSet

    frozen = RuleSet.given(rules)
    texts: list[str] = []
    try:
        for finding in findings if frozen is None else frozen.applied(findings):
            if finding.severity == "error":
                texts.append(finding.text())
    except RowsError as error:
        # lines that cannot be read are reported after the findings in the others, which must not be lost
        if not texts:
            raise
        texts.append(str(error))
    except ImportError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        if not texts:
            raise missing from error
    if texts:
        raise AssertionError("\n\n".join(texts))
