"""Records of a kind that nobody writes under other names: they are taken as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pytest_mistral_lora.chat.rows import RecordKind
from pytest_mistral_lora.formats.drafts import Draft, RecordReading
from pytest_mistral_lora.formats.report import Change
from pytest_mistral_lora.formats.row_format import Evidence, RowFormat


def kept_format(kind: RecordKind) -> RowFormat:
    """Return the format of the records of a kind, as the kind itself reads them."""

    def recognise(record: Mapping[str, Any], present: Collection[str]) -> Evidence | None:
        keys = [key for key in kind.keys if key in present]
        if "messages" in present or not kind.claims(record):
            return None
        return Evidence(", ".join(f"`{key}`" for key in keys), {key: key for key in keys})

    def convert(draft: Draft, reading: RecordReading) -> tuple[Draft, list[Change]]:
        kept = {key: draft.fields[key] for key in kind.keys if key in draft.fields}
        rest = {key: value for key, value in draft.fields.items() if key not in kept}
        return draft._replace(texts=kept, fields=rest), []

    return RowFormat(kind.name, kind.title, {key: key for key in kind.keys}, recognise, convert)
