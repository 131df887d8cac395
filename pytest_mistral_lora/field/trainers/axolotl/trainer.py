"""Axolotl: how its own code is run, and which values of its configuration name code."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_mistral_lora.runners.configuration import Reading, is_set, short
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

    def require_no_code(self, reading: Reading) -> None:
        """Refuse types of datasets and classes that are not known: Axolotl imports them by their names."""
        _require_known_types(reading)
        data = reading.made.data
        for key in ("tokenizer_type", "model_type"):
            if key in data and not (isinstance(data[key], str) and _CLASS.fullmatch(data[key])):
                raise reading.refusal(key, f"`{short(data[key])}` is no class of a tokenizer or a model")


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
    variables={"AXOLOTL_DO_NOT_TRACK": "1"},
)
