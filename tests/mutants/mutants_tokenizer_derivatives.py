"""Folders without Mistral's own file, and derivatives with a layout of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench_tokenizer import VERSION_5, rewrite
from derived_tekken import derived_oracle
from gallery import Artifact, mutant
from transformers import AutoTokenizer

from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, training_template


@mutant("ML229", "N70", says="which is the closest one")
def unknown_vocabulary(artifact: Artifact) -> None:
    """No tokenizer that is known has the vocabulary."""
    (artifact["folder"] / "tekken.json").unlink()


@mutant("ML230", says="of 32,768 ids are the same")
def another_family_is_named(artifact: Artifact) -> None:
    """The oracle that is named is a SentencePiece one."""
    (artifact["folder"] / "tekken.json").unlink()
    artifact["oracle"] = "spm-v3"


@mutant("ML230", says="but id 1500 is")
def a_named_oracle_has_another_token(artifact: Artifact) -> None:
    """The oracle that is named fits but for two tokens."""
    (artifact["folder"] / "tekken.json").unlink()
    artifact["oracle"] = str(artifact["own_tekken"])
    vocabulary = artifact["tokenizer_json"]["model"]["vocab"]
    by_id = {number: token for token, number in vocabulary.items()}
    vocabulary[by_id[1500]], vocabulary[by_id[1501]] = 1501, 1500


@mutant("ML230", "N70", says="gets the ids")
def a_named_oracle_gives_other_ids(artifact: Artifact) -> None:
    """The oracle that is named has the vocabulary, and a normalizer changes the ids."""
    (artifact["folder"] / "tekken.json").unlink()
    artifact["oracle"] = str(artifact["own_tekken"])
    artifact["tokenizer_json"]["normalizer"] = {"type": "Lowercase"}


@mutant("ML226", "N70", says="ends with")
def template_without_eos_and_a_named_oracle(artifact: Artifact) -> None:
    """A folder without Mistral's own file is judged by the oracle that is named."""
    (artifact["folder"] / "tekken.json").unlink()
    artifact["oracle"] = str(artifact["own_tekken"])
    artifact["template"] = artifact["template"].replace("{{- eos_token }}", "")


@mutant("ML226", says="ends with")
def template_without_eos_beside_tekken_alone(artifact: Artifact) -> None:
    """The folder has a template and Mistral's own file, and nothing that transformers loads as it is."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (artifact["folder"] / name).unlink()
    template = artifact["template"].replace("{{- eos_token }}", "")
    (artifact["folder"] / "chat_template.jinja").write_text(template)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _chatml(artifact: Artifact, template: str = CHATML) -> None:
    """Give the folder a layout of its own, and declare that no Mistral tokenizer applies."""
    (artifact["folder"] / "tekken.json").unlink()
    artifact["oracle"] = "none"
    artifact["template"] = template


@mutant("ML226", "N32", says="is followed by '<|im_end|>")
def chatml_without_its_tokens(artifact: Artifact) -> None:
    """ChatML is written with a tokenizer that has no such tokens, and EOS is another one."""
    _chatml(artifact)


@mutant("ML226", "N32", says="is followed by ''")
def own_layout_without_an_end(artifact: Artifact) -> None:
    """A layout of its own closes no answer."""
    _chatml(artifact, CHATML.replace("<|im_end|>\n", ""))


@mutant("ML226 ML234", says="the prompt of a question ends with")
def prompt_of_another_layout(artifact: Artifact) -> None:
    """The prompt opens the answer in another way than the conversation does."""
    _chatml(artifact, CHATML.replace("<|im_start|>assistant", "<|assistant|>"))


@mutant("ML234")
def heading_in_the_prompt_alone(artifact: Artifact) -> None:
    """The generation prompt has a heading that no answer has."""
    artifact["template"] += "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"


CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def chatml_derivative(folder: Path) -> None:
    """Make the folder a ChatML derivative: tokens of its own, EOS among them, and its own template."""
    fast = AutoTokenizer.from_pretrained(folder, **({"mistral_format": False} if VERSION_5 else {}))
    fast.add_special_tokens({"additional_special_tokens": [*CHATML_TOKENS]})
    fast.eos_token = CHATML_TOKENS[1]
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    for name in ("config.json", "generation_config.json"):
        rewrite(folder / name, lambda config: config.update(eos_token_id=fast.eos_token_id))
    rewrite(folder / "config.json", lambda config: config.update(vocab_size=len(fast)))


def thinking_folder(folder: Path) -> str:
    """Make the folder one of version 11, as transformers saves it, and return the template that is generated for it."""

    def newer(tekken: dict[str, Any]) -> None:
        tekken["config"]["version"] = "v11"
        named = [*derived_oracle("derived-v11", words=0).control_tokens.values()][:34]
        tekken["special_tokens"] = [
            {"rank": rank, "token_str": literal, "is_control": True} for rank, literal in enumerate(named)
        ]

    rewrite(folder / "tekken.json", newer)
    converted = CheckpointTokenizer(folder / "tekken.json")
    converted.fast.save_pretrained(folder)
    rewrite(folder / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder", None))
    return converted.oracle.chat_template()


@mutant("ML202 ML203 ML214 ML217 ML226 ML235", "N32", says="renders '<|im_start|>user")
def chatml_with_tekken_left_in(artifact: Artifact) -> None:
    """A ChatML derivative keeps Mistral's own file, which AutoTokenizer takes."""
    chatml_derivative(artifact["folder"])


@mutant("ML234 ML235", says="in its place")
def own_layout_beside_tekken(artifact: Artifact) -> None:
    """A layout of its own, of Mistral's tokens alone, stands beside Mistral's file."""
    artifact["template"] = "{{- bos_token }}" + CHATML + "{{- eos_token }}"


@mutant("ML236", says="has generation blocks")
def training_template_beside_tekken(artifact: Artifact) -> None:
    """The training template is put into a folder with tekken.json."""
    artifact["template"] = training_template(artifact["folder"])


@mutant("ML237", says="as <think> text")
def guessed_thinking(artifact: Artifact) -> None:
    """A model of version 11 has the template that is generated for it, which thinks."""
    thinking_folder(artifact["folder"])
