"""Axolotl: how its own code is run, and which values of its configuration name code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.objective import ANSWERS, Declaration, Objective
from pytest_mistral_lora.field.trainers.axolotl.chat_entries import is_chat_type, trained_roles
from pytest_mistral_lora.field.trainers.axolotl.going_on import GOING_ON
from pytest_mistral_lora.runners.configuration import Reading, as_written, is_set, short
from pytest_mistral_lora.runners.tasks import PreferenceTasks
from pytest_mistral_lora.runners.trainer import Trainer

# Axolotl imports a dotted name from anywhere: `load` in
# https://github.com/axolotl-ai-cloud/axolotl/blob/main/src/axolotl/prompt_strategies/__init__.py
_TYPES = re.compile(
    r"(alpaca|alpaca_chat|alpaca_instruct|alpaca_w_system|chat_template|completion|context_qa|creative_acr|input_output"
    r"|llama2_chat|messages|metharme|orcamini|pretrain|pygmalion|sharegpt|stepwise_supervised|user_defined)(\.load_\w+)?"
    r"|messages\.chat|(chat_template|chatml|llama3|zephyr|passthrough|user_defined)\.(?!load)\w+"
)
_ENTRY = re.compile(
    r"type|chat_template(_jinja)?|conversation|input_format|field(_\w+)?|message_\w+|template_thinking_key|split_thinking"
    r"|roles(_to_train)?|train_on_(eos|eot)|drop_system_message|format|no_input_format|system_(prompt|format)"
    r"|(prompt|chosen|rejected|completion)_format|step_separator|train_on_last_step_only|max_completion_length"
)
_DATA = re.compile(r"path|data_files|ds_type|split|name")
# bounded, since each `For` in a name of a megabyte would be tried as its middle
_CLASS = re.compile(r"(Auto|[A-Z]\w{0,80})?(Tokenizer(Fast)?|For\w{1,80}|LMHeadModel)")


class Axolotl(Trainer):
    """Axolotl."""

    def declares(self, settings: Mapping[str, Any]) -> Declaration | None:
        """Return what `train_on_inputs`, or a key of the entries of `datasets`, declares.

        By 0.21.0: `prompt_tokenizers.py`, for types with a prompt of texts, labels every token with `train_on_inputs`.
        `prompt_strategies/chat_template.py`, for types of chats, labels the texts of each message, and neither the
        markers around them nor a system prompt in the first of them: no word expresses that. The same file takes the
        roles of `roles_to_train`, by default the assistant alone, and `message_field_training_detail` within a message.
        """
        given = settings.get("datasets")
        entries = [entry for entry in given if isinstance(entry, Mapping)] if isinstance(given, list) else []
        declared = [_declared_by_entry(entry, settings) for entry in entries or [{}]]
        if all(declaration == declared[0] for declaration in declared):
            return declared[0]
        # rows of the entries are not told apart
        return Declaration(None, "datasets")

    def require_no_code(self, reading: Reading) -> None:
        """Refuse types of datasets and classes that are not known: Axolotl imports them by their names."""
        _require_known_types(reading)
        data = reading.made.data
        for key in ("tokenizer_type", "model_type"):
            if key in data and not (isinstance(data[key], str) and _CLASS.fullmatch(data[key])):
                raise reading.refusal(key, f"`{short(data[key])}` is no class of a tokenizer or a model")


def _declared_by_entry(entry: Mapping[str, Any], settings: Mapping[str, Any]) -> Declaration | None:
    """Return what an entry of `datasets` declares together with the settings of all."""
    if entry.get("message_field_training_detail"):
        return Declaration(None, "message_field_training_detail")
    if settings.get("train_on_inputs"):
        if is_chat_type(entry.get("type")):
            return Declaration(None, "train_on_inputs")
        return Declaration(Objective("everything"), f"train_on_inputs: {as_written(settings['train_on_inputs'])}")
    roles = entry.get("roles_to_train")
    if roles is None or not is_chat_type(entry.get("type")):
        return None
    if trained_roles(entry) != frozenset({"assistant"}):
        return Declaration(None, "roles_to_train")
    return Declaration(ANSWERS, f"roles_to_train: {as_written(roles)}")


def _require_known_types(reading: Reading) -> None:
    made = reading.made
    entries = made.data.get("datasets")
    if entries is None:
        return
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise reading.refusal("datasets", f"`{short(entries)}` is no list of datasets")
    kept = []
    for index, entry in enumerate(entries):
        kind = entry.get("type")
        is_known = kind is None or isinstance(kind, dict) or (isinstance(kind, str) and _TYPES.fullmatch(kind))
        if not is_known:
            found = f"`datasets[{index}].type: {short(kind)}` names code, on which ids and labels can depend"
            raise reading.refusal("datasets", found)
        named = {key: value for key, value in entry.items() if _DATA.fullmatch(str(key))}
        if reading.own_data:
            reading.require_local(list(named.values()), "datasets")
        known = {key: value for key, value in entry.items() if _ENTRY.fullmatch(str(key))}
        if isinstance(kind, dict):
            known["type"] = {key: value for key, value in kind.items() if _ENTRY.fullmatch(str(key))}
            unknown = [key for key in kind if key not in known["type"] and is_set(kind[key])]
            made.left_out += [f"datasets[{index}].type.{key}" for key in unknown]
        made.left_out += [
            f"datasets[{index}].{key}" for key in entry if key not in known and key not in named and is_set(entry[key])
        ]
        # without own data the script needs no path, and one may be of the Hub
        kept.append({**known, **(named if reading.own_data else {})})
    made.data["datasets"] = kept


_CONFIGS = {"dpo": "axolotl-dpo", "ipo": "axolotl-dpo", "simpo": "axolotl-dpo"}
_CONFIGS |= {"orpo": "axolotl-orpo", "kto": "axolotl-kto"}

AXOLOTL = Axolotl.packaged(
    Path(__file__).parent,
    "axolotl",
    "Axolotl",
    "axolotl",
    "axolotl preprocess",
    least_python=(3, 12),
    tasks=PreferenceTasks(("dpo", "ipo", "simpo", "orpo"), ("kto",), key="rl", configs=_CONFIGS),
    importer="pytest_mistral_lora.field.trainers.axolotl.importer:AXOLOTL",
    exporter="pytest_mistral_lora.field.trainers.axolotl.export:AXOLOTL",
    going_on=GOING_ON,
    variables={"AXOLOTL_DO_NOT_TRACK": "1"},
)
