"""Axolotl makes of Mistral's conversations exactly the ids and labels of mistral-common."""

from typing import Any

import pytest
from axolotl.prompt_strategies.chat_template import load
from axolotl.utils.chat_templates import get_chat_template
from axolotl.utils.collators import DataCollatorForSeq2Seq
from axolotl.utils.dict import DictDefault
from axolotl.utils.mistral import HFMistralTokenizer

from pytest_mistral_lora import CheckpointTokenizer, Oracle
from pytest_mistral_lora.assertions import assert_encoded_rows_sound, assert_labels_exact, assert_template_faithful

RULES = "0.1"  # findings that a later release adds do not fail

# The tokenizer that each template is for. mistral-common ships their files: nothing is downloaded.
TEMPLATES = {"mistral_v1": "spm-v1", "mistral_v2v3": "spm-v3", "mistral_v3_tekken": "tekken-240911"}

SYSTEM = {"role": "system", "content": "Answer in one word."}
FRANCE = [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."}]
PERU = [{"role": "user", "content": "And of Peru?"}, {"role": "assistant", "content": "Lima."}]
ROWS = {"one-turn": {"messages": FRANCE}, "two-turns": {"messages": [*FRANCE, *PERU]}}
COMMON_ROWS = ROWS | {"system": {"messages": [SYSTEM, *FRANCE]}}


def strategy_of(tokenizer: Any, **settings: Any) -> Any:
    cfg = DictDefault(sequence_len=2048, train_on_inputs=False, **settings)
    return load(tokenizer, cfg, {"type": "chat_template", "field_messages": "messages"})


@pytest.fixture(scope="module", params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(template: str) -> Any:
    loaded = CheckpointTokenizer(Oracle.load(TEMPLATES[template]).path).fast
    loaded.chat_template = get_chat_template(template)  # or the text of a template that you work on
    loaded.pad_token = loaded.unk_token
    return loaded


@pytest.fixture(scope="module")
def strategy(template: str, tokenizer: Any) -> Any:
    return strategy_of(tokenizer, chat_template="tokenizer_default")


@pytest.mark.parametrize("name", ROWS)
def test_template(name: str, tokenizer: Any) -> None:
    assert_template_faithful(ROWS[name], tokenizer, rules=RULES)


@pytest.mark.parametrize("name", ROWS)
def test_labels(name: str, strategy: Any, tokenizer: Any) -> None:
    encoded = strategy.tokenize_prompt(ROWS[name])
    assert_labels_exact(ROWS[name], encoded["input_ids"], encoded["labels"], tokenizer, rules=RULES)


def test_padded_batch(strategy: Any, tokenizer: Any) -> None:
    batch = DataCollatorForSeq2Seq(tokenizer)([strategy.tokenize_prompt(row) for row in ROWS.values()])
    assert_encoded_rows_sound(batch, tokenizer, rules=RULES)


@pytest.fixture(scope="module", params=["spm-v3", "spm-v7", "tekken-240911"])
def mistral_tokenizer(request: pytest.FixtureRequest) -> HFMistralTokenizer:
    path = str(Oracle.load(request.param).path)
    return HFMistralTokenizer(path, tokenizer_path=path)


@pytest.mark.parametrize("name", COMMON_ROWS)
def test_labels_by_mistral_common(name: str, mistral_tokenizer: HFMistralTokenizer) -> None:
    strategy = strategy_of(mistral_tokenizer, tokenizer_use_mistral_common=True)
    encoded = strategy.tokenize_prompt(COMMON_ROWS[name])
    assert_labels_exact(COMMON_ROWS[name], encoded["input_ids"], encoded["labels"], mistral_tokenizer, rules=RULES)
