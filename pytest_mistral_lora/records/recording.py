"""Record a rendering golden from mistral-common, with what the chat template does differently."""

from __future__ import annotations

from pathlib import Path

from pytest_mistral_lora.chat.compare import compare
from pytest_mistral_lora.chat.template import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.records.goldens import Case, Golden, library_versions


def record(case: Case, tokenizer: CheckpointTokenizer, folder: Path) -> Golden:
    """Record a case under a tokenizer; nothing is written.

    Args:
        case: The row, with its name and description.
        tokenizer: The tokenizer file or checkpoint folder.
        folder: Where the golden will be: `folder/<case>.json`.

    Raises:
        OracleRejection: If mistral-common refuses the row.
        MistralLoraError: If the chat template does something that no named deviation explains: a golden must not
            make such a fault the expected state.
    """
    oracle = tokenizer.oracle
    comparison = compare(case.row, oracle, ChatTemplate(tokenizer.fast))
    if comparison.unexplained:
        raise MistralLoraError(
            f"the chat template differs from mistral-common: {comparison.unexplained}",
            place=f"{tokenizer.path}, case {case.name}",
            next_step="Mend the template or the row before it is recorded.",
        )
    return Golden(
        case=case.name,
        description=case.description,
        tokenizer={"file": oracle.path.name, "version": oracle.version, "sha256": oracle.sha256},
        recorded_with=library_versions(),
        row=case.row,
        encoded=comparison.oracle,
        deviations=comparison.deviations,
        path=folder / f"{case.name}.json",
    )
