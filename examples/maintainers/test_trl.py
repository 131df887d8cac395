"""`SFTTrainer` makes of Mistral's conversations exactly the ids and labels of mistral-common."""

from typing import Any

import pytest
from datasets import Dataset
from transformers import MistralConfig, MistralForCausalLM
from trl import SFTConfig, SFTTrainer

from pytest_mistral_lora import CheckpointTokenizer, Oracle, training_template
from pytest_mistral_lora.assertions import assert_encoded_rows_sound, assert_labels_exact, assert_template_faithful

RULES = "0.1"  # findings that a later release adds do not fail

# Mistral 7B v0.3, Large 2411, Ministral 8B. mistral-common ships their files: nothing is downloaded.
TOKENIZERS = ["spm-v3", "spm-v7", "tekken-240911"]

SYSTEM = {"role": "system", "content": "Answer in one word."}
FRANCE = [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."}]
PERU = [{"role": "user", "content": "And of Peru?"}, {"role": "assistant", "content": "Lima."}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
WEATHER = [
    {"role": "user", "content": "Is it warm in Lima?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "20 degrees"},
    {"role": "assistant", "content": "Yes."},
]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}}
ROWS = {
    "one-turn": {"messages": FRANCE},
    "two-turns": {"messages": [*FRANCE, *PERU]},
    "system": {"messages": [SYSTEM, *FRANCE]},
    "system-and-two-turns": {"messages": [SYSTEM, *FRANCE, *PERU]},
    "tools": {"messages": WEATHER, "tools": [TOOL]},
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    file = Oracle.load(request.param).path
    loaded = CheckpointTokenizer(file).fast
    loaded.chat_template = training_template(file)  # put the text of your own template here
    return loaded


@pytest.fixture(scope="module")
def trainer(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> SFTTrainer:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return SFTTrainer(
        model=MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **size)),
        args=SFTConfig(
            output_dir=str(tmp_path_factory.mktemp("sft")),
            assistant_only_loss=True,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        # `from_list` takes the names of the columns from the first row
        train_dataset=Dataset.from_list([{"tools": None, **row} for row in ROWS.values()]),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("name", ROWS)
def test_template(name: str, tokenizer: Any) -> None:
    assert_template_faithful(ROWS[name], tokenizer, rules=RULES)


@pytest.mark.parametrize("name", ROWS)
def test_labels(name: str, trainer: SFTTrainer, tokenizer: Any) -> None:
    prepared = trainer.train_dataset[list(ROWS).index(name)]
    batch = trainer.data_collator([prepared])
    assert_labels_exact(ROWS[name], batch["input_ids"], batch["labels"], tokenizer, rules=RULES)


def test_padded_batches(trainer: SFTTrainer, tokenizer: Any) -> None:
    assert_encoded_rows_sound(trainer.get_train_dataloader(), tokenizer, rules=RULES)
