"""Faults that are planted in the code of trainers, or in the templates that a file of examples/maintainers gives them.

The modules of a trainer are imported when its fault is planted: each is installed in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Fault:
    """A fault, and what it turns red.

    Attributes:
        red: The tests that fail, each with the rules that their messages begin with.
        plant: Breaks the code of the trainer; None if it is sound.
        edits: Texts of the file, each with what replaces it.
    """

    red: Mapping[str, set[str]]
    plant: Plant | None = None
    edits: tuple[tuple[str, str], ...] = ()


def _wrapped(module: str, path: str, change: Callable[..., Any]) -> Plant:
    """Return a fault that calls `change` in place of a function, with the function as its first argument."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        *owners, name = path.split(".")
        owner = import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: change(original, *args, **options))

    return plant


_TRL = "trl.trainer.sft_trainer"
_TRL_COLLATOR = "DataCollatorForLanguageModeling.torch_call"
_TRL_TEMPLATE = "training_template(file)"


def _padding_masked_by_its_id(original: Any, collator: Any, examples: Any) -> Any:
    # by default, the padding of TRL is EOS
    batch = original(collator, examples)
    batch["labels"][batch["input_ids"] == collator.pad_token_id] = -100
    return batch


def _labels_shifted(original: Any, collator: Any, examples: Any) -> Any:
    batch = original(collator, examples)
    return {**batch, "labels": batch["labels"].roll(-1, dims=1)}


def _mask_lost(original: Any, *args: Any, **options: Any) -> Any:
    return {key: values for key, values in original(*args, **options).items() if key != "assistant_masks"}


def _second_bos(original: Any, tokenizer: Any, *args: Any, **options: Any) -> Any:
    first = {"input_ids": tokenizer.bos_token_id, "attention_mask": 1, "assistant_masks": 0}
    return {key: [first[key], *values] for key, values in original(tokenizer, *args, **options).items()}


TRL = {
    "no space behind [INST]": Fault(
        {"test_template": {"ML004"}, "test_labels": {"ML528"}, "test_padded_batches": {"ML528"}},
        edits=((_TRL_TEMPLATE, f'{_TRL_TEMPLATE}.replace("[INST] ", "[INST]")'),),
    ),
    "another version's template": Fault(
        {"test_template": {"ML004"}, "test_labels": {"ML526", "ML530"}, "test_padded_batches": {"ML560"}},
        edits=((_TRL_TEMPLATE, 'training_template(Oracle.load("spm-v7").path)'),),
    ),
    "padding masked by its id": Fault(
        {"test_labels": {"ML546"}, "test_padded_batches": {"ML546"}},
        _wrapped(_TRL, _TRL_COLLATOR, _padding_masked_by_its_id),
    ),
    "labels shifted by the collator": Fault(
        {"test_labels": {"ML541"}, "test_padded_batches": {"ML541"}}, _wrapped(_TRL, _TRL_COLLATOR, _labels_shifted)
    ),
    "mask lost": Fault(
        {"test_labels": {"ML543"}, "test_padded_batches": {"ML543"}}, _wrapped(_TRL, "_tokenize", _mask_lost)
    ),
    "second BOS": Fault(
        {"test_labels": {"ML521"}, "test_padded_batches": {"ML521"}}, _wrapped(_TRL, "_tokenize", _second_bos)
    ),
}

_AXOLOTL = "axolotl.prompt_strategies.chat_template"
_SYSTEM_ROW = '"system": {"messages": [SYSTEM, *FRANCE]}'
_TWO_TURNS = '"two-turns": {"messages": [*FRANCE, *PERU]}'
_SYSTEM_AND_TWO_TURNS = '"system-two-turns": {"messages": [SYSTEM, *FRANCE, *PERU]}'


def _eos_left_out(original: Any, *args: Any, **options: Any) -> Any:
    return {**original(*args, **options), "train_on_eos": "none"}


def _first_token_missed(original: Any, *args: Any, **options: Any) -> Any:
    start, end = original(*args, **options)
    return start + 1, end


def _questions_trained(original: Any, *args: Any, **options: Any) -> Any:
    return {**original(*args, **options), "roles_to_train": ["user", "assistant"]}


def _padding_trained(original: Any, *args: Any, **options: Any) -> Any:
    batch = original(*args, **options)
    padding = batch["attention_mask"] == 0
    batch["labels"][padding] = batch["input_ids"][padding]
    return batch


def _each_of_axolotl(rule: str) -> dict[str, set[str]]:
    return {name: {rule} for name in ("test_labels", "test_padded_batch", "test_labels_by_mistral_common")}


AXOLOTL = {
    "another template": Fault(
        {"test_template": {"ML004"}, "test_labels": {"ML521"}, "test_padded_batch": {"ML560"}},
        edits=(('"mistral_v2v3": "spm-v3"', '"chatml": "spm-v3"'),),
    ),
    "the system prompt that mistral_v2v3 drops": Fault(
        {"test_template": {"ML004"}, "test_labels": {"ML525"}},
        edits=((f"{_TWO_TURNS}}}", f"{_TWO_TURNS}, {_SYSTEM_ROW}}}"),),
    ),
    "answers beside a moved system prompt": Fault(
        {"test_labels_by_mistral_common": {"ML550"}}, edits=((_SYSTEM_ROW, _SYSTEM_AND_TWO_TURNS),)
    ),
    "EOS left out": Fault(
        _each_of_axolotl("ML546"), _wrapped(_AXOLOTL, "StrategyLoader._get_strategy_params", _eos_left_out)
    ),
    "first token missed": Fault(
        _each_of_axolotl("ML545"), _wrapped(_AXOLOTL, "ChatTemplateStrategy.find_turn", _first_token_missed)
    ),
    "questions trained": Fault(
        {**_each_of_axolotl("ML547"), "test_labels_by_mistral_common": {"InvalidMessageStructureException"}},
        _wrapped(_AXOLOTL, "StrategyLoader._get_strategy_params", _questions_trained),
    ),
    "padding trained": Fault(
        {"test_padded_batch": {"ML510"}},
        _wrapped("axolotl.utils.collators", "DataCollatorForSeq2Seq.__call__", _padding_trained),
    ),
}

_FACTORY = "llamafactory.data.processor.supervised"
_ENCODE = "SupervisedDatasetProcessor._encode_data_example"


def _template_of_factory(**slots: list[Any]) -> Plant:
    """Return a fault of LLaMA-Factory's template `mistral`."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        formatters = import_module("llamafactory.data.formatter")
        template = import_module("llamafactory.data.template").TEMPLATES["mistral"]
        for name, given in slots.items():
            kind = formatters.EmptyFormatter if name == "format_prefix" else formatters.StringFormatter
            monkeypatch.setattr(template, name, kind(slots=given))

    return plant


def _eos_masked(original: Any, processor: Any, **options: Any) -> Any:
    ids, labels = original(processor, **options)
    return ids, [-100 if label == processor.tokenizer.eos_token_id else label for label in labels]


def _argument(**arguments: Any) -> Callable[..., Any]:
    """Return a change by which a processor works as if it had other arguments."""

    def change(original: Any, processor: Any, **options: Any) -> Any:
        for name, value in arguments.items():
            setattr(processor.data_args, name, value)
        return original(processor, **options)

    return change


LLAMAFACTORY = {
    "no space behind [INST]": Fault(
        {"test_template_for_serving": {"ML004"}, "test_labels": {"ML528"}, "test_padded_batch": {"ML528"}},
        _template_of_factory(format_user=["[INST]{{content}}[/INST]"]),
    ),
    "no BOS": Fault(
        {"test_template_for_serving": {"ML004"}, "test_labels": {"ML521"}, "test_padded_batch": {"ML521"}},
        _template_of_factory(format_prefix=[]),
    ),
    "system prompt without its blank line": Fault(
        {"test_template_for_serving": {"ML004"}, "test_labels": {"ML528"}},
        _template_of_factory(format_system=["{{content}}\n"]),
    ),
    "the system prompt before the first of two questions": Fault(
        {"test_template_for_serving": {"ML004"}, "test_labels": {"ML526"}},
        edits=((_SYSTEM_ROW, _SYSTEM_AND_TWO_TURNS),),
    ),
    "EOS masked": Fault(
        {"test_labels": {"ML546"}, "test_padded_batch": {"ML546"}}, _wrapped(_FACTORY, _ENCODE, _eos_masked)
    ),
    "questions trained": Fault(
        {"test_labels": {"ML543"}, "test_padded_batch": {"ML543"}},
        _wrapped(_FACTORY, _ENCODE, _argument(train_on_prompt=True)),
    ),
    "only the last answer trained": Fault(
        {"test_labels": {"ML551"}}, _wrapped(_FACTORY, _ENCODE, _argument(mask_history=True))
    ),
}

FAULTS = {"trl": TRL, "axolotl": AXOLOTL, "llamafactory": LLAMAFACTORY}
