"""Tokens, vocabularies and classes that give other ids than Mistral's."""

from __future__ import annotations

import shutil
from typing import Any

from bench_tokenizer import CHANGES_IDS, TOKENS, UNKNOWN_CLASS, VERSION_5, rewrite, sentencepiece
from gallery import Artifact, mutant
from mutants_tokenizer_files import weights
from transformers import AddedToken, AutoTokenizer

from pytest_mistral_lora.chat.oracle import shipped_tokenizer


@mutant("ML204", "I01", says="pad_token is EOS")
def pad_is_eos(artifact: Artifact) -> None:
    """The tokenizer pads with EOS."""
    artifact["tokenizer_config"]["pad_token"] = "</s>"
    artifact["special_tokens_map"]["pad_token"] = "</s>"


@mutant("ML204", "I01", says="config.json: pad_token_id 2")
def pad_is_eos_in_the_model(artifact: Artifact) -> None:
    """The model's configuration pads with EOS."""
    artifact["config"]["pad_token_id"] = 2


@mutant("ML204", "I01", says="generation_config.json: pad_token_id 2")
def pad_is_eos_at_generation(artifact: Artifact) -> None:
    """The generation configuration pads with one of its EOS ids."""
    artifact["generation_config"].update(pad_token_id=2, eos_token_id=[2])


@mutant("ML202 ML203", says="stands for text")
def pad_is_a_word(artifact: Artifact) -> None:
    """The pad token is a token of ordinary text."""
    artifact["tokenizer_config"]["pad_token"] = "ing"
    artifact["special_tokens_map"]["pad_token"] = "ing"


@mutant("ML203", says="pad_token is '[INST]'")
def pad_is_inst(artifact: Artifact) -> None:
    """The pad token is a marker of each row."""
    artifact["tokenizer_config"]["pad_token"] = "[INST]"
    artifact["special_tokens_map"]["pad_token"] = "[INST]"


@mutant("ML217", says="pad_token_id 3 is [INST]")
def pad_is_inst_at_generation(artifact: Artifact) -> None:
    """Generation pads with a marker of each row, and hides it where no mask is given."""
    artifact["generation_config"]["pad_token_id"] = 3


@mutant("ML203")
def unk_is_inst(artifact: Artifact) -> None:
    """UNK is a control token."""
    artifact["tokenizer_config"]["unk_token"] = "[INST]"
    artifact["special_tokens_map"]["unk_token"] = "[INST]"


@mutant("ML217", says="eos_token_id 4 is not EOS")
def another_eos_at_generation(artifact: Artifact) -> None:
    """Generation stops at `[/INST]`, too."""
    artifact["generation_config"]["eos_token_id"] = [2, 4]


@mutant("ML217", says="is not in the vocabulary")
def pad_beyond_the_vocabulary(artifact: Artifact) -> None:
    """The model's configuration pads with an id that no token has."""
    artifact["config"]["pad_token_id"] = TOKENS


@mutant("ML217", says="bos_token_id 3 is not BOS")
def another_bos_in_the_model(artifact: Artifact) -> None:
    """The model's configuration has another BOS."""
    artifact["config"]["bos_token_id"] = 3


@mutant("ML203 ML213 ML226", says="eos_token is '[/INST]'")
def special_tokens_map_differs(artifact: Artifact) -> None:
    """`special_tokens_map.json` has another EOS."""
    artifact["special_tokens_map"]["eos_token"] = "[/INST]"


@mutant("ML202 ML213", says="has special False")
def flags_differ(artifact: Artifact) -> None:
    """`tokenizer_config.json` has a control token that is not special."""
    tokens = artifact["tokenizer_json"]["added_tokens"]
    table = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in tokens}
    table["5"]["special"] = False
    artifact["tokenizer_config"]["added_tokens_decoder"] = table


@mutant("ML213", says="has the id 7")
def added_tokens_differ(artifact: Artifact) -> None:
    """`added_tokens.json` has a token under another id."""
    (artifact["folder"] / "added_tokens.json").write_text('{"[INST]": 7}')


def _swap(artifact: Artifact, one: str, other: str) -> None:
    vocabulary = artifact["tokenizer_json"]["model"]["vocab"]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


@mutant("ML205 ML214")
def two_tokens_swapped(artifact: Artifact) -> None:
    """Two tokens of the vocabulary have each other's id."""
    _swap(artifact, "ing", "ed")


@mutant("ML205")
def one_merge_missing(artifact: Artifact) -> None:
    """A merge is missing, and the model does not look whole words up."""
    model = artifact["tokenizer_json"]["model"]
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) != "ing"]
    model["ignore_merges"] = False


@mutant("ML205", "I09", says="gets other ids")
def wrong_split_pattern(artifact: Artifact) -> None:
    """The pre-tokenizer splits by the pattern of another model family."""
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    artifact["tokenizer_json"]["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}


@mutant("ML205", "I23")
def space_after_control_tokens(artifact: Artifact) -> None:
    """`legacy=True`, the default of the class: every control token is followed by a space."""
    sentencepiece(artifact, legacy=True)


@mutant("ML205")
def merges_by_id(artifact: Artifact) -> None:
    """The merges are in the order of ids, as `LlamaTokenizer` of transformers 5 makes them of a `.model`."""

    def reorder(data: Any) -> None:
        vocab = data["model"]["vocab"]
        data["model"]["merges"].sort(key=lambda pair: vocab["".join(pair)])

    sentencepiece(artifact, legacy=False)
    rewrite(artifact["folder"] / "tokenizer.json", reorder)


@mutant("ML202 ML205", "I08", says="has rstrip")
def spaces_around_inst_are_swallowed(artifact: Artifact) -> None:
    """`[INST]` takes the space after it with it, so that a template's space is lost."""
    artifact["tokenizer_json"]["added_tokens"][3].update(rstrip=True)


@mutant("ML202 ML205")
def swapped_control_tokens(artifact: Artifact) -> None:
    """`[INST]` and `[/INST]` have each other's id."""
    names = {"[INST]": "[/INST]", "[/INST]": "[INST]"}
    for token in artifact["tokenizer_json"]["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    _swap(artifact, "[INST]", "[/INST]")


@mutant("ML202 ML205", says="is not special")
def control_token_as_text(artifact: Artifact) -> None:
    """`[INST]` is an ordinary token of the vocabulary."""
    tokens = artifact["tokenizer_json"]["added_tokens"]
    tokens[:] = [token for token in tokens if token["content"] != "[INST]"]


@mutant("ML202 ML205 ML214", says="… and")
def another_version(artifact: Artifact) -> None:
    """Mistral's file is of another version than `tokenizer.json`."""
    sentencepiece(artifact, legacy=False)
    (artifact["folder"] / "tokenizer.model.v1").unlink()
    shutil.copy(shipped_tokenizer("spm-v2"), artifact["folder"] / "tokenizer.model.v2")


@mutant("ML202 ML214")
def one_token_more(artifact: Artifact) -> None:
    """A special token was added."""
    fast = AutoTokenizer.from_pretrained(artifact["folder"], **({"mistral_format": False} if VERSION_5 else {}))
    fast.add_tokens([AddedToken("<|im_start|>", special=True)])
    fast.save_pretrained(artifact["folder"])
    artifact["config"]["vocab_size"] = TOKENS + 1


@mutant("ML215", "I38", says="and the tokenizer has")
def vocabulary_without_rows(artifact: Artifact) -> None:
    """The model has fewer rows than the tokenizer has tokens."""
    artifact["config"]["vocab_size"] = TOKENS - 2
    weights(artifact, TOKENS - 2)


@mutant("ML215 ML216", "I38", says="vocab_size")
def resized_embeddings(artifact: Artifact) -> None:
    """The embeddings were resized for two tokens that the configuration does not have."""
    weights(artifact, TOKENS + 2)


@mutant("ML216", "I38", says="more than the")
def rows_without_tokens(artifact: Artifact) -> None:
    """Embeddings and configuration have two rows that no token uses."""
    artifact["config"]["vocab_size"] = TOKENS + 2
    weights(artifact, TOKENS + 2)


@mutant(CHANGES_IDS, "I24")
def class_that_changes_ids(artifact: Artifact) -> None:
    """The class in `tokenizer_config.json` splits text in its own way."""
    (artifact["folder"] / "config.json").unlink()  # by its model type, transformers would know better
    artifact["tokenizer_config"]["tokenizer_class"] = "GPT2Tokenizer"


@mutant(UNKNOWN_CLASS, "I25", says="is not a class of transformers")
def class_that_is_unknown(artifact: Artifact) -> None:
    """`tokenizer_config.json` names a class that this transformers does not have."""
    artifact["tokenizer_config"]["tokenizer_class"] = "TokenizersBackendOfTomorrow"


@mutant("ML218", says="auto_map")
def class_from_the_repository(artifact: Artifact) -> None:
    """`tokenizer_config.json` asks for Python code of the repository."""
    artifact["tokenizer_config"]["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}


@mutant("ML201 ML228", "I11", says="encodes as letters")
def class_that_only_encodes(artifact: Artifact) -> None:
    """`tokenizer_config.json` names mistral-common's backend, which reads a rendered `[INST]` as letters."""
    artifact["tokenizer_config"]["tokenizer_class"] = "MistralCommonBackend" if VERSION_5 else "MistralCommonTokenizer"


@mutant("ML205 ML226 ML228", "I11", says="is encoded as letters")
def control_tokens_are_split(artifact: Artifact) -> None:
    """`split_special_tokens` makes letters of every control token."""
    artifact["tokenizer_config"]["split_special_tokens"] = True


@mutant("ML205", says="model.dropout is 1.0")
def merges_are_left_to_chance(artifact: Artifact) -> None:
    """The dropout of a training of the tokenizer is saved: each text gets other ids each time."""
    artifact["tokenizer_json"]["model"]["dropout"] = 1.0
