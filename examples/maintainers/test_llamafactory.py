"""LLaMA-Factory makes of Mistral's conversations exactly the ids and labels of mistral-common."""

import json
from typing import Any

import pytest
from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments, ModelArguments, TrainingArguments

from pytest_mistral_lora import CheckpointTokenizer, Oracle
from pytest_mistral_lora.assertions import assert_encoded_rows_sound, assert_labels_exact, assert_template_faithful

RULES = "0.1"  # findings that a later release adds do not fail

# The tokenizer that each template is for. mistral-common ships their files: nothing is downloaded.
TEMPLATES = {"mistral": "spm-v3", "ministral": "tekken-240911"}

SYSTEM = {"role": "system", "content": "Answer in one word."}
FRANCE = [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."}]
PERU = [{"role": "user", "content": "And of Peru?"}, {"role": "assistant", "content": "Lima."}]
ROWS = {
    "one-turn": {"messages": FRANCE},
    "two-turns": {"messages": [*FRANCE, *PERU]},
    "system": {"messages": [SYSTEM, *FRANCE]},
}
TAGS = {"role_tag": "role", "content_tag": "content"}
TAGS |= {f"{role}_tag": role for role in ("system", "user", "assistant")}
INFO = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": TAGS}


@pytest.fixture(scope="module", params=TEMPLATES)
def arguments(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataArguments:
    folder = tmp_path_factory.mktemp("data")
    (folder / "rows.json").write_text(json.dumps(list(ROWS.values())))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": INFO}))
    return DataArguments(template=request.param, dataset="rows", dataset_dir=str(folder))


@pytest.fixture(scope="module")
def tokenizer(arguments: DataArguments) -> Any:
    loaded = CheckpointTokenizer(Oracle.load(TEMPLATES[arguments.template]).path).fast
    loaded.chat_template = None
    return loaded


@pytest.fixture(scope="module")
def template(tokenizer: Any, arguments: DataArguments) -> Any:
    return get_template_and_fix_tokenizer(tokenizer, arguments)


@pytest.fixture(scope="module")
def dataset(template: Any, tokenizer: Any, arguments: DataArguments) -> Any:
    model = ModelArguments(model_name_or_path="none")
    training = TrainingArguments(output_dir=arguments.dataset_dir, do_train=True, use_cpu=True)
    return get_dataset(template, model, arguments, training, "sft", tokenizer)["train_dataset"]


@pytest.mark.parametrize("name", ROWS)
def test_template_for_serving(name: str, template: Any, tokenizer: Any) -> None:
    # the text that LLaMA-Factory saves as the tokenizer's chat template
    assert_template_faithful(ROWS[name], tokenizer, template._get_jinja_template(tokenizer), rules=RULES)


@pytest.mark.parametrize("name", ROWS)
def test_labels(name: str, dataset: Any, tokenizer: Any) -> None:
    encoded = dataset[list(ROWS).index(name)]
    assert_labels_exact(ROWS[name], encoded["input_ids"], encoded["labels"], tokenizer, rules=RULES)


def test_padded_batch(dataset: Any, template: Any, tokenizer: Any) -> None:
    collator = SFTDataCollatorWith4DAttentionMask(tokenizer=tokenizer, template=template, label_pad_token_id=-100)
    assert_encoded_rows_sound(collator(list(dataset)), tokenizer, rules=RULES)
