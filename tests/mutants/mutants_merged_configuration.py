"""Merged models with another configuration, tokenizer or template than their base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bench_merged import CHATML, HEAD, edit_tokenizer
from gallery import Artifact, mutant

from pytest_mistral_lora.chat.oracle import shipped_tokenizer


@mutant("ML435", "N59", says="eos_token_id is [3]")
def another_eos_at_generation(artifact: Artifact) -> None:
    """generation_config.json, which decides where an answer ends, has another EOS than the base's."""
    file = artifact["folder"] / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 3}))


@mutant("ML435", "N59", says="is missing: eos_token_id is [2], of config.json")
def ends_of_generation_lost(artifact: Artifact) -> None:
    """generation_config.json, in which the base has a second EOS, was not saved."""
    (artifact["folder"] / "generation_config.json").unlink()
    file = artifact["base"] / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 3]}))


@mutant("ML442", "N46", says="there is a tokenizer, and no chat template")
def template_lost(artifact: Artifact) -> None:
    """The tokenizer was saved without its chat template."""
    (artifact["folder"] / "chat_template.jinja").unlink()


@mutant("ML435", "N59", says="rope_theta is 10000.0, the default: the key is missing")
def rope_theta_lost(artifact: Artifact) -> None:
    """rope_theta was lost when the model was saved."""
    artifact["config"]["rope_parameters"] = {"rope_type": "default"}


@mutant("ML435", "N59", says="rms_norm_eps is 1e-05")
def another_eps(artifact: Artifact) -> None:
    """rms_norm_eps is another."""
    artifact["config"]["rms_norm_eps"] = 1e-5


@mutant("ML435", says="attention_bias is True")
def biases_for_servers(artifact: Artifact) -> None:
    """attention_bias, which transformers does not read for this class, and vLLM does."""
    artifact["config"]["attention_bias"] = True


@mutant("ML435", "I57", says="sliding_window is 4096")
def window_lost(artifact: Artifact) -> None:
    """sliding_window is missing: transformers takes 4,096."""
    del artifact["config"]["sliding_window"]


@mutant("ML435", "N59", says="num_attention_heads is 2")
def other_heads(artifact: Artifact) -> None:
    """The same matrices are cut into fewer, wider heads."""
    artifact["config"] |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@mutant("ML435", says="the architecture is MistralForSequenceClassification")
def another_architecture(artifact: Artifact) -> None:
    """The configuration names another class."""
    artifact["config"]["architectures"] = ["MistralForSequenceClassification"]


@mutant("ML435", says="eos_token_id is [5]")
def another_eos_in_the_configuration(artifact: Artifact) -> None:
    """eos_token_id is another: answers do not end."""
    artifact["config"]["eos_token_id"] = 5


@mutant("ML436", "N71", says="tie_word_embeddings is true, and lm_head.weight is not model.embed_tokens.weight")
def tied_by_the_configuration_alone(artifact: Artifact) -> None:
    """The configuration has a tie, and the file has a head of its own."""
    artifact["config"]["tie_word_embeddings"] = True


@mutant("ML412 ML436", "N71", says="the file has no lm_head.weight")
def head_lost(artifact: Artifact) -> None:
    """The head was not saved, and nothing ties it."""
    del artifact["tensors"][HEAD]


@mutant("ML440", says="gets other ids than the base's")
def lower_case(artifact: Artifact) -> None:
    """The tokenizer writes every letter in lower case."""
    edit_tokenizer(artifact, lambda data: data.update(normalizer={"type": "Lowercase"}))


@mutant("ML440", says="every text is cut")
def truncation_of_training(artifact: Artifact) -> None:
    """The truncation of a training run was saved with the tokenizer."""
    value = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    edit_tokenizer(artifact, lambda data: data.update(truncation=value))


@mutant("ML440", says="have another id or are missing")
def two_ids_swapped(artifact: Artifact) -> None:
    """Two tokens of the vocabulary have each other's id."""

    def swap(data: dict[str, dict[str, dict[str, int]]]) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary["▁the"], vocabulary["▁of"] = vocabulary["▁of"], vocabulary["▁the"]

    edit_tokenizer(artifact, swap)


@mutant("ML440", says="'ML-new' (id 32768)")
def token_without_a_row(artifact: Artifact) -> None:
    """A token was added, and the embeddings have no row for it."""
    token = {"id": 32768, "content": "ML-new", "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    edit_tokenizer(artifact, lambda data: data["added_tokens"].append(token | flags))


@mutant("ML441", says="eos_token is '[INST]'")
def another_eos_token(artifact: Artifact) -> None:
    """The tokenizer's EOS is another token."""
    artifact["tokenizer_config"]["eos_token"] = "[INST]"


@mutant("ML442", says="the chat template is empty")
def template_emptied(artifact: Artifact) -> None:
    """The file of the chat template was cut off at its beginning."""
    (artifact["folder"] / "chat_template.jinja").write_text("")


@mutant("ML442", "N46", says="the chat template writes")
def template_of_another_family(artifact: Artifact) -> None:
    """The chat template is ChatML."""
    (artifact["folder"] / "chat_template.jinja").write_text(CHATML)


@mutant("ML442", "N46", says="the chat template writes")
def template_without_a_space(artifact: Artifact) -> None:
    """The chat template lacks a space."""
    file = artifact["folder"] / "chat_template.jinja"
    text = file.read_text()
    assert "[/INST]" in text
    file.write_text(text.replace("[/INST]", "[/INST] "))


@mutant("ML440", says="is another tokenizer than the base's")
def tokenizer_file_of_another_version(artifact: Artifact) -> None:
    """A Mistral tokenizer file that the base does not have, of another version: vLLM takes it first."""
    shutil.copy(shipped_tokenizer("spm-v7"), artifact["folder"] / "tokenizer.model.v7")


@mutant("ML440", says="has SHA-256")
def tokenizer_file_of_other_bytes(artifact: Artifact) -> None:
    """The Mistral tokenizer file has the base's name, and other bytes."""
    for name in ("base", "folder"):
        shutil.copy(shipped_tokenizer("spm-v3"), artifact[name] / "tokenizer.model.v3")
    file = artifact["folder"] / "tokenizer.model.v3"
    file.write_bytes(shipped_tokenizer("spm-v2").read_bytes())


@mutant("ML441", says="is not special")
def control_token_as_text(artifact: Artifact) -> None:
    """A control token is no longer a special one: answers are decoded with it."""

    def unmark(data: dict[str, list[dict[str, object]]]) -> None:
        for token in data["added_tokens"]:
            if token["content"] == "[INST]":
                token["special"] = False

    edit_tokenizer(artifact, unmark)


@mutant("ML442", says="differs from mistral-common")
def template_beside_a_base_without_one(artifact: Artifact) -> None:
    """The base is used through the template that mistral-common generates, and the merged model has ChatML."""
    (artifact["base"] / "chat_template.jinja").unlink()
    (artifact["folder"] / "chat_template.jinja").write_text(CHATML)


@mutant("ML435", "N59", says="as in rope_parameters")
def rope_theta_twice(artifact: Artifact) -> None:
    """Two keys of the configuration have a rope_theta each."""
    artifact["config"]["rope_theta"] = 5e5


@mutant("ML405", says="has no weight_map")
def index_without_a_map(artifact: Artifact) -> None:
    """The index of the shards names no tensor."""
    (artifact["folder"] / "model.safetensors.index.json").write_text('{"metadata": {}}')


@mutant("ML442", says="neither of them renders a row")
def templates_that_refuse_every_row(artifact: Artifact) -> None:
    """Both chat templates refuse every row, each for a reason of its own: nothing can be compared."""
    for name in ("base", "folder"):
        (artifact[name] / "chat_template.jinja").write_text(f"{{{{ raise_exception('{name}') }}}}")


@mutant("ML208", says="not a safetensors file, or cut off")
def named_base_cut_off(artifact: Artifact) -> None:
    """The user names a base whose weights end early: nothing can be compared."""
    file = artifact["base"] / "model.safetensors"
    data = file.read_bytes()[:1000]
    file.unlink()
    file.write_bytes(data)


def generation(artifact: Artifact, **settings: Any) -> None:
    """Write settings into the merged model's generation configuration."""
    file = artifact["folder"] / "generation_config.json"
    data = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps(data | settings))


@mutant("ML240", "N95", says="suppress_tokens forbids EOS")
def eos_is_suppressed_in_the_merged_model(artifact: Artifact) -> None:
    """The merged model never samples EOS."""
    generation(artifact, suppress_tokens=[5, 2])


@mutant("ML240", "N95", says="bad_words_ids forbids EOS")
def eos_is_a_bad_word_of_the_merged_model(artifact: Artifact) -> None:
    """EOS is one of the words that an answer must not have."""
    generation(artifact, bad_words_ids=[[2]])


@mutant("ML241", says="min_new_tokens is 50")
def answers_of_the_merged_model_have_a_least_length(artifact: Artifact) -> None:
    """EOS is not sampled within the first tokens."""
    generation(artifact, min_new_tokens=50)


@mutant("ML238", "N93", says="add_bos_token is false")
def bos_denied_in_both(artifact: Artifact) -> None:
    """The post-processor of base and merged model writes a BOS, and the merged model's configuration denies it."""
    for one in ("base", "folder"):
        write_bos(artifact[one])
    artifact["tokenizer_config"]["add_bos_token"] = False


@mutant("ML238", "N93", says="add_bos_token is true")
def bos_promised(artifact: Artifact) -> None:
    """The configuration promises a BOS that the post-processor does not write."""
    artifact["tokenizer_config"]["add_bos_token"] = True


@mutant("ML440", says="the text 'a' becomes <s>")
def bos_that_the_base_does_not_write(artifact: Artifact) -> None:
    """The post-processor of the merged model writes a BOS, and the base's writes none."""
    write_bos(artifact["folder"])


def write_bos(folder: Path) -> None:
    """Let the post-processor of a folder write a BOS in front of each text."""
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    token = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    data["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<s>", "type_id": 0}})
    data["post_processor"]["special_tokens"] = {"<s>": token}
    file.unlink()
    file.write_text(json.dumps(data))


@mutant("ML243", "N206", says="rope_theta is 10000")
def params_of_another_model(artifact: Artifact) -> None:
    """Mistral's own configuration has another base of the rotary embedding."""
    (artifact["folder"] / "params.json").write_text(json.dumps({"rope_theta": 10_000.0}))


@mutant("ML243")
def params_cut_off(artifact: Artifact) -> None:
    """Mistral's own configuration was not copied whole."""
    (artifact["folder"] / "params.json").write_text('{"rope_theta": ')
