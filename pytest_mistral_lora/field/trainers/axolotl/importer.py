"""The configurations of Axolotl as sources of rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.field.trainers.axolotl.chat_entries import CHAT_TYPES, family_of, roles_of, trained_roles
from pytest_mistral_lora.field.trainers.axolotl.entry import AxolotlEntry
from pytest_mistral_lora.field.trainers.axolotl.going_on import GOING_ON
from pytest_mistral_lora.formats.convert import Source
from pytest_mistral_lora.formats.importers import (
    START_REMARK,
    Importer,
    declared_files,
    remarks_on,
    require_form,
    require_no_keys,
)
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.places import Place

# settings of a data set that choose rows or change their text
_REFUSED = (
    "split_thinking",
    "shards",
    "shards_idx",
    "preprocess_shards",
    "input_transform",
    "columns",
    "data_dir",
    "input_format",
    "field_human",
    "field_model",
    "conversation",
)
_NO_ROWS = ("completion", "pretrain", "input_output", "stepwise_supervised", "_synthetic")


class AxolotlImporter(Importer):
    """A YAML file that lists `datasets`."""

    title, model_key, rows_key = "Axolotl", "base_model", "datasets"
    own_keys = frozenset({"datasets", "adapter", "sequence_len", "micro_batch_size", "rl", "val_set_size"})

    def declares_rows(self, path: Path, config: Mapping[Any, Any]) -> bool:
        """Return whether a configuration lists data sets."""
        return isinstance(config.get("datasets"), list)

    def sources(self, path: Path, config: Mapping[Any, Any], names: Collection[str]) -> tuple[list[Source], list[str]]:
        """Return the files of all data sets, and remarks on what Axolotl would train on beside answers."""
        sources: list[Source] = []
        remarks: list[str] = []
        if config.get("train_on_inputs"):
            remarks.append(f"train_on_inputs of {path}: rows train on answers only")
        for index, entry in enumerate(config["datasets"]):
            place = Place.of(path).within("datasets", index)
            require_form(AxolotlEntry, entry, place)
            require_no_keys(entry, _REFUSED, place)
            if detail := entry.get("message_field_training_detail"):
                raise InputError(
                    f"message_field_training_detail: {detail!r} trains parts of a message",
                    place=place,
                    expected="message_field_training: a row has a weight for each message as a whole",
                )
            if (on_eos := entry.get("train_on_eos")) in ("last", "none", "all"):
                remarks.append(f"train_on_eos: {on_eos} of {place}: rows train on the EOS of each answer")
            layout = _layout(entry, place, is_preference=bool(config.get("rl")))
            if layout.format == "alpaca" and layout.templates is None:
                remarks.append(f"the prompt text that Axolotl puts around {entry.get('type')} ({place}) is left out")
            sources += [Source(file, layout) for file in declared_files(path, entry, place)]
        if not sources:
            raise InputError("datasets: is empty", place=str(path), expected="an entry with a `path`")
        remarks += remarks_on(path, config, ("test_datasets",), "is not imported")
        return sources, [*remarks, *remarks_on(path, config, (GOING_ON.start,), START_REMARK)]


AXOLOTL = AxolotlImporter()


def _layout(entry: Mapping[str, Any], place: Place, *, is_preference: bool) -> Layout:
    """Return the layout of an entry of Axolotl's `datasets`.

    Args:
        entry: The entry.
        place: Its place.
        is_preference: Whether the configuration trains on preference pairs (`rl`).

    Raises:
        InputError: If its type has no turns, or is not known.
    """
    kind = entry.get("type") or "chat_template"
    if isinstance(kind, Mapping):
        return Layout(
            "alpaca",
            {
                "instruction": kind.get("field_instruction") or "instruction",
                "input": kind.get("field_input") or "input",
                "output": kind.get("field_output") or "output",
                "system": kind.get("field_system") or "system",
                "history": "",
            },
            # Axolotl's defaults, with their spaces
            templates=(kind.get("format") or "{instruction} {input} ", kind.get("no_input_format") or "{instruction} "),
            system=kind.get("system_prompt") or "",
        )
    family = family_of(kind)
    if family in _NO_ROWS:
        raise InputError(f"type {kind}: a text without turns", place=place, expected="chat_template or alpaca")
    if family == "alpaca_chat" and str(kind).endswith("load_qa"):
        return Layout("prompt-completion", {"prompt": "question", "completion": "answer"})
    if family in ("alpaca", "alpaca_chat", "alpaca_instruct", "alpaca_w_system", "gpteacher"):
        output = "response" if family == "gpteacher" else "output"
        return Layout("alpaca", {"instruction": "instruction", "input": "input", "output": output, "history": ""})
    if is_preference or family in CHAT_TYPES:
        return _messages_layout(entry, family, is_preference=is_preference)
    known = "chat_template, alpaca, alpaca_chat.load_qa, gpteacher or fields of your own"
    raise InputError(f"type {kind!r}", place=place, expected=known)


def _messages_layout(entry: Mapping[str, Any], family: str, *, is_preference: bool) -> Layout:
    """Return the layout of an entry with lists of messages, and its names of their fields."""
    mapped = dict(entry.get("message_property_mappings") or {})
    role = mapped.pop("role", None) or entry.get("message_field_role")
    content = mapped.pop("content", None) or entry.get("message_field_content")
    thinking = entry.get("field_thinking") or mapped.pop("reasoning_content", None)
    weight = entry.get("message_field_training")
    given = {"role": role, "content": content, "thinking": thinking, "weight": weight}
    messages = entry.get("field_messages") or ("conversations" if family == "sharegpt" else "messages")
    keys = {"messages": messages}
    keys |= {name: entry[f"field_{name}"] for name in ("system", "tools") if entry.get(f"field_{name}")}
    if is_preference:
        keys |= {"prompt": messages, "chosen": entry.get("field_chosen") or "chosen"}
        keys |= {"rejected": entry.get("field_rejected") or "rejected"}
    return Layout(
        "preference" if is_preference else "messages",
        keys,
        {ours: theirs for ours, theirs in {**mapped, **given}.items() if theirs},
        roles_of(entry),
        trained=trained_roles(entry),
        drop_system=bool(entry.get("drop_system_message")),
        joined=True,
        roles_in="`roles` of Axolotl's datasets",
    )
