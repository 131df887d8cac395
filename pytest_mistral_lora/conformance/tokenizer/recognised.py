"""The oracle of a folder without a Mistral tokenizer file, and how a conversation of its own layout begins and ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pytest_mistral_lora.checkpoint.recognition import Recognition, spm_pieces
from pytest_mistral_lora.checkpoint.tokenizer_folder import NO_ORACLE, oracle_file
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tokenizer.template_traits import PLAIN, SYSTEM, TemplateTraits
from pytest_mistral_lora.errors import TokenizerError


def oracle(target: Target) -> Result:
    """Judge by which Mistral tokenizer a target can be judged: its own file, or one that is recognised or declared."""
    tokenizer = target.tokenizer
    tokenizer.files.refuse_hazards()
    own = oracle_file(tokenizer.path)
    if own is not None and own == tokenizer.path:
        return Result(facts=(("template of", "mistral-common generates it, since a single file has none"),))
    if own is not None or not tokenizer.is_there:
        return Result()
    found = tokenizer.recognition
    if found.oracle is not None:
        return Result(facts=(("oracle of", found.text),))
    if found.name == NO_ORACLE:
        return Result(not_checked=found.reason)
    rule, expected = ("ML230", "its own ids") if found.declared else ("ML229", "the vocabulary of a known tokenizer")
    return Result((Finding(rule, found.reason, str(tokenizer.path), expected),))


def other_pieces(file: Path, known: Recognition) -> Iterator[Finding]:
    """Yield ML211 if `tokenizer.model`, which llama.cpp and others load, is not the recognised tokenizer."""
    expected, oracle = f"{known.name}, by which the folder is recognised", known.oracle
    if oracle is None or oracle.kind != "spm":
        yield Finding("ML211", f"{file.name} stands beside a byte-level tokenizer", str(file), expected)
        return
    try:
        have, want = spm_pieces(file), spm_pieces(oracle.path)
    except TokenizerError as error:
        yield Finding("ML209", error.found, error.place, "a SentencePiece model")
        return
    differ = [number for number, (one, other) in enumerate(zip(have, want, strict=False)) if one != other]
    if differ or len(have) < len(want):
        first = differ[0] if differ else len(have)
        shown = have[first] if first < len(have) else "missing"
        found = f"{file.name} has other pieces or scores in {len(differ):,} places, the first is {first}: {shown}"
        yield Finding("ML211", found, str(file), f"{want[first]}, as {expected}")


def rendered_ends(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML226 if a rendered conversation does not begin with the only BOS, or an answer does not end with EOS."""
    fast, oracle = traits.fast, traits.oracle
    unset = [name for name in ("bos_token", "eos_token") if getattr(fast, name) is None]
    used = [name for name in unset if name in traits.template.source]
    if used:
        yield traits.finding("ML226", f"the chat template writes {', '.join(used)}, which is not set", "a token")
    elif oracle is not None:
        ids = fast(traits.conversation, add_special_tokens=False)["input_ids"]
        if ids[:1] != [oracle.bos_id] or ids.count(oracle.bos_id) != 1:
            found = f"a conversation has {ids.count(oracle.bos_id)} BOS and begins with {ids[:1]}"
            yield traits.finding("ML226", found, f"one BOS ({oracle.bos_id}), at the start")
        if ids[-1:] != [oracle.eos_id]:
            yield traits.finding("ML226", f"a conversation ends with {ids[-1:]}", f"EOS ({oracle.eos_id})")
    else:
        yield from _open_answer(traits)


def _open_answer(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML226 for the first answer that no EOS follows, by the tokenizer's own EOS or those of the generation."""
    eos = [traits.fast.convert_ids_to_tokens(token) for token in sorted(traits.eos_ids)]
    for name, row in {**PLAIN, **SYSTEM}.items():
        text, at = traits.rendered.texts.get(name, ""), 0
        for message in row.messages:
            at = text.find(message["content"], at) + len(message["content"])
            after = text[at:].lstrip()
            if message["role"] == "assistant" and message["content"] in text and not after.startswith(tuple(eos)):
                found = f"the answer {message['content']!r} of {name} is followed by {after[:40]!r}"
                yield traits.finding("ML226", found, f"EOS: {' or '.join(eos) or 'the tokenizer has none'}")
                return


def prompt_is_the_beginning(traits: TemplateTraits) -> Iterator[Finding]:
    """Yield ML234 if the prompt of a question is not the beginning of the question with its answer."""
    prompt, whole = traits.rendered.texts["a question"], traits.conversation
    if not whole.startswith(prompt):
        pairs = enumerate(zip(prompt, whole, strict=False))
        same = next((at for at, (one, other) in pairs if one != other), len(whole))
        found = f"the prompt of a question ends with {prompt[same:]!r}, and its answer is written after"
        yield traits.finding("ML234", f"{found} {whole[same:][:60]!r}", "the same text up to the answer")
