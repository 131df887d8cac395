"""Subject `tokenizer`: is the tokenizer that transformers loads the one that mistral-common knows?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.targets import Target

PROBES = (
    "Hello, world!",
    "End.  Next  sentence.",
    "def f(x):\n    return x  # two\n\tdone\n",
    "'The' don't I'LL HTTPServer's we'Ve",
    "1234567890 3.14 -0.5e10",
    "日本語 中文 한국어",
    "é é ñ Å नमस्ते สวัสดี",
    "👩🏽‍🚀 👨‍👩‍👧‍👦 🇫🇷",
    "مرحبا שלום",
    '{"a": [1, 2.5, null], "b": "\\u00e9"}',
    "https://example.org/a?b=c&d=%20",
    "x\u0016y ju\u0016",
)
"""Texts whose ids a wrong tokenizer, merge order or pre-tokenizer is known to change."""


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a target's tokenizer."""
    table: tuple[tuple[str, Callable[[Target], Iterator[Finding]]], ...] = (
        ("file", _file),
        ("control-tokens", _control_tokens),
        ("bos-eos-unk", _specials),
        ("pad-is-not-eos", _pad),
        ("text-ids", _text_ids),
        ("save-and-load", _save_and_load),
    )
    for case, check in table:
        yield Check(target, "tokenizer", case, partial(_run, target, check))


def _run(target: Target, check: Callable[[Target], Iterator[Finding]]) -> Result:
    return Result(tuple(check(target)))


def _file(target: Target) -> Iterator[Finding]:
    from pytest_mistral_lora.records.goldens import shipped_hashes

    oracle = target.oracle
    recorded = shipped_hashes().get(target.name)
    if target.path is None and recorded != oracle.sha256:
        yield Finding("ML207", f"SHA-256 {oracle.sha256}", str(oracle.path), str(recorded))


def _control_tokens(target: Target) -> Iterator[Finding]:
    oracle, fast = target.oracle, target.tokenizer.fast
    place = str(target.tokenizer.path)
    special = {token for token, added in fast.added_tokens_decoder.items() if added.special}
    for token, literal in oracle.control_tokens.items():
        found = fast.convert_ids_to_tokens(token)
        if found != literal:
            yield Finding("ML202", f"id {token} is {found!r}", place, f"the control token {literal!r}")
        elif token not in special:
            yield Finding("ML202", f"{literal!r} (id {token}) is not special", place, "a special token")
    unknown = special - set(oracle.control_tokens) - {_unk_id(target)}
    for token in sorted(unknown):
        literal = fast.convert_ids_to_tokens(token)
        yield Finding(
            "ML202", f"{literal!r} (id {token}) is special", place, "no special token that Mistral does not have"
        )


def _unk_id(target: Target) -> int:
    """SentencePiece has <unk> as a type of its own, neither text nor control; transformers makes it special."""
    return target.oracle.unk_id


def _specials(target: Target) -> Iterator[Finding]:
    oracle, fast = target.oracle, target.tokenizer.fast
    for name, want in (("bos", oracle.bos_id), ("eos", oracle.eos_id), ("unk", oracle.unk_id)):
        have = getattr(fast, f"{name}_token_id")
        if have != want:
            found = "is not set" if have is None else f"is {have} {oracle.piece(have)!r}"
            yield Finding(
                "ML203", f"{name}_token {found}", str(target.tokenizer.path), f"{want} {oracle.piece(want)!r}"
            )


def _pad(target: Target) -> Iterator[Finding]:
    fast = target.tokenizer.fast
    if fast.pad_token_id is not None and fast.pad_token_id == target.oracle.eos_id:
        place = str(target.tokenizer.path)
        yield Finding("ML204", f"pad_token is EOS ({fast.pad_token!r}, id {fast.pad_token_id})", place, "another token")


def _text_ids(target: Target) -> Iterator[Finding]:
    oracle, fast = target.oracle, target.tokenizer.fast
    if len(fast) != oracle.vocab_size:
        yield Finding("ML205", f"{len(fast)} tokens", str(target.tokenizer.path), f"{oracle.vocab_size} tokens")
    for text in PROBES:
        # after a control token, as texts stand in a conversation: at the start of a string SentencePiece differs
        space = " " if oracle.kind == "spm" else ""
        have = tuple(fast(f"</s>{space}{text}", add_special_tokens=False)["input_ids"])
        want = (oracle.eos_id, *oracle.encode_text(text))
        if have != want:
            detail = _difference(want, have, oracle.piece)
            yield Finding("ML205", f"{text!r} gets other ids", str(target.tokenizer.path), detail=detail)


def _save_and_load(target: Target) -> Iterator[Finding]:
    from transformers import AutoTokenizer

    fast = target.tokenizer.fast
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    place = str(target.tokenizer.path)
    if loaded.chat_template != fast.chat_template:
        yield Finding("ML206", "the chat template changes", place, "the same template")
    for text in PROBES:
        before, after = _ids(fast, text), _ids(loaded, text)
        if before != after:
            detail = _difference(before, after, target.oracle.piece)
            yield Finding("ML206", f"{text!r} gets other ids after save and load", place, detail=detail)


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(f"<s>{text}</s>", add_special_tokens=False)["input_ids"])


def _difference(want: tuple[int, ...], have: tuple[int, ...], piece: Callable[[int], str]) -> str:
    from pytest_mistral_lora.conformance.difference import show_difference

    return show_difference((want, None), (have, None), piece)
