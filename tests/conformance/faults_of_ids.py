"""Faults that change the ids of a row."""

from __future__ import annotations

import json
import re
from typing import Any

from faults import Case, Data, Encoding, fault, oracle_of

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.encoder_trace import TracedText
from pytest_mistral_lora.chat.rows import text_of
from pytest_mistral_lora.errors import OracleRejection


def _joined(pieces: list[tuple[int, ...]]) -> list[int]:
    return [token for ids in pieces for token in ids]


@fault("521")
def bos_doubled(case: Case) -> Encoding | None:
    return [case.oracle.bos_id, *case.ids], [IGNORE_INDEX, *case.labels]


@fault("521")
def bos_missing(case: Case) -> Encoding | None:
    return case.ids[1:], case.labels[1:]


@fault("522")
def last_eos_missing(case: Case) -> Encoding | None:
    return case.ids[:-1], case.labels[:-1]


@fault("522")
def every_eos_missing(case: Case) -> Encoding | None:
    kept = [n for n, token in enumerate(case.ids) if token != case.oracle.eos_id]
    return [case.ids[n] for n in kept], [case.labels[n] for n in kept]


@fault("553")
def eos_after_the_user(case: Case) -> Encoding | None:
    if case.oracle.version == "v1":
        return None
    end = next((t for t, literal in case.oracle.control_tokens.items() if literal == "[/INST]"), None)
    if end not in case.ids:
        return None
    at = case.ids.index(end)
    return [*case.ids[:at], case.oracle.eos_id, *case.ids[at:]], [*case.labels[:at], IGNORE_INDEX, *case.labels[at:]]


@fault("523")
def injection(case: Case) -> Encoding | None:
    controls = {literal: token for token, literal in case.oracle.control_tokens.items()}
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(controls, key=len, reverse=True))) + ")")
    pieces = []
    for piece in case.pieces:
        if piece.text is None or not pattern.search(piece.text):
            pieces.append(piece.ids)
            continue
        for part in pattern.split(piece.text):
            pieces.append((controls[part],) if part in controls else case.oracle.encode_text(part))
    return case.from_ids(_joined(pieces))


def _spelled(case: Case, piece: TracedText) -> tuple[int, ...]:
    return case.oracle.encode_text(case.oracle.control_tokens[piece.ids[0]])


@fault("524")
def controls_as_text(case: Case) -> Encoding | None:
    return case.from_ids(_joined([p.ids if p.text is not None else _spelled(case, p) for p in case.pieces]))


@fault("524")
def one_control_as_text(case: Case) -> Encoding | None:
    at = case.chance.choice([n for n, p in enumerate(case.pieces) if p.text is None])
    return case.from_ids(_joined([_spelled(case, p) if n == at else p.ids for n, p in enumerate(case.pieces)]))


def _has_prompt(case: Case) -> bool:
    """Whether there is a system prompt that cannot be confused with another text."""
    prompts = [text.strip() for text in case.texts("system")]
    everything = json.dumps(case.data, ensure_ascii=False)
    return bool(prompts) and all(len(text) > 3 and everything.count(json.dumps(text)[1:-1]) == 1 for text in prompts)


def _without_system(case: Case) -> list[dict[str, Any]]:
    return [dict(message) for message in case.data["messages"] if message["role"] != "system"]


@fault("525")
def system_dropped(case: Case) -> Encoding | None:
    return case.of({**case.data, "messages": _without_system(case)}) if case.texts("system") else None


@fault("526")
def system_in_another_turn(case: Case) -> Encoding | None:
    if not _has_prompt(case):
        return None
    messages = _without_system(case)
    users = [n for n, message in enumerate(messages) if message["role"] == "user"]
    at = case.chance.choice(users)
    text = "\n\n".join([*case.texts("system"), text_of(messages[at]["content"])])
    messages[at] = {"role": "user", "content": text}
    return case.of({**case.data, "messages": messages})


@fault("525 526")
def system_dropped_with_bos_doubled(case: Case) -> Encoding | None:
    dropped = system_dropped(case)
    return dropped and ([case.oracle.bos_id, *dropped[0]], [IGNORE_INDEX, *dropped[1]])


@fault("531 522")
def bos_doubled_and_cut(case: Case) -> Encoding | None:
    cut = cut_at_the_end(case)
    return cut and ([case.oracle.bos_id, *cut[0]], [IGNORE_INDEX, *cut[1]])


@fault("527")
def default_system_prompt(case: Case) -> Encoding | None:
    if case.texts("system"):
        return None
    prompt = {"role": "system", "content": "detailed thinking off"}
    return case.of({**case.data, "messages": [prompt, *case.data["messages"]]})


def _space(case: Case) -> list[int]:
    return list(case.oracle.encode_text("5")[:1]) if case.oracle.kind == "spm" else list(case.oracle.encode_text(" "))


@fault("528 529")
def space_after_a_control_token(case: Case) -> Encoding | None:
    at = case.chance.choice([n for n, p in enumerate(case.pieces) if p.text is None and p.ids != (case.oracle.eos_id,)])
    pieces = [list(piece.ids) for piece in case.pieces]
    pieces[at] += _space(case)
    return case.from_ids([token for ids in pieces for token in ids])


@fault("528 529")
def space_before_eos(case: Case) -> Encoding | None:
    return case.from_ids([*case.ids[:-1], *_space(case), case.ids[-1]])


@fault("528 529 533")
def texts_stripped(case: Case) -> Encoding | None:
    def strip(message: dict[str, Any]) -> dict[str, Any]:
        text = text_of(message.get("content"))
        stripped = isinstance(message.get("content"), str) and text.strip() and message["role"] in ("user", "assistant")
        return {**message, "content": text.strip()} if stripped else message

    return case.with_messages(strip)


@fault("530")
def tools_dropped(case: Case) -> Encoding | None:
    return case.of({"messages": case.data["messages"]}) if case.data.get("tools") else None


@fault("530")
def other_call_ids(case: Case) -> Encoding | None:
    def rename(message: dict[str, Any]) -> dict[str, Any]:
        calls = [{**call, "id": (call.get("id") or "")[::-1]} for call in message.get("tool_calls") or ()]
        named = {**message, "tool_calls": calls} if calls else message
        return {**named, "tool_call_id": named["tool_call_id"][::-1]} if named.get("tool_call_id") else named

    return case.with_messages(rename)


@fault("530")
def arguments_encoded_twice(case: Case) -> Encoding | None:
    def twice(message: dict[str, Any]) -> dict[str, Any]:
        if not message.get("tool_calls"):
            return message
        return {**message, "tool_calls": [{**c, "function": _double(c["function"])} for c in message["tool_calls"]]}

    return case.with_messages(twice)


def _double(function: Data) -> dict[str, Any]:
    arguments = function.get("arguments")
    return {**function, "arguments": {"arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}}


@fault("531")
def cut_at_the_end(case: Case) -> Encoding | None:
    if len(case.ids) < 4:
        return None
    at = case.chance.randrange(1, len(case.ids) - 1)
    return case.ids[:at], case.labels[:at]


@fault("531")
def cut_at_the_start(case: Case) -> Encoding | None:
    if len(case.ids) < 4:
        return None
    at = case.chance.randrange(2, len(case.ids))
    return case.ids[at:], case.labels[at:]


# a row may have no text but that of its tools
@fault("520 530 532")
def another_tokenizer(case: Case) -> Encoding | None:
    vocabularies = {"spm-v1": "spm-v3", "spm-v2": "spm-v1", "spm-v3": "spm-v1", "spm-v7": "spm-v1"}
    name = next((vocabularies[n] for n in vocabularies if _is(case.oracle, n)), "spm-v3")
    try:
        encoded = oracle_of(name).encode(case.row)
    except OracleRejection:
        return None
    if encoded.input_ids == case.encoded.input_ids:
        return None
    return list(encoded.input_ids), list(encoded.labels or ())


def _is(oracle: Oracle, name: str) -> bool:
    return oracle.sha256 == oracle_of(name).sha256


@fault("532")
def other_segmentation(case: Case) -> Encoding | None:
    if case.oracle.kind == "spm":
        return None
    long = [n for n, p in enumerate(case.pieces) if p.text and len(p.ids) < len(p.text.encode())]
    if not long:
        return None
    at = case.chance.choice(long)
    letters = [token for letter in case.pieces[at].text or "" for token in case.oracle.encode_text(letter)]
    return case.from_ids(_joined([tuple(letters) if n == at else p.ids for n, p in enumerate(case.pieces)]))


# in v1, a row that has lost its first exchange looks as if it were cut behind BOS
@fault("533 530 531")
def an_exchange_lost(case: Case) -> Encoding | None:
    messages = case.data["messages"]
    if case.data.get("tools") or not _has_distinct_texts(case):
        return None
    pairs = [n for n in range(len(messages) - 3) if [m["role"] for m in messages[n : n + 2]] == ["user", "assistant"]]
    if not pairs:
        return None
    at = case.chance.choice(pairs)
    return case.of({**case.data, "messages": [*messages[:at], *messages[at + 2 :]]})


def _has_distinct_texts(case: Case) -> bool:
    texts = [text_of(m.get("content")).strip() for m in case.data["messages"]]
    return all(texts) and all(sum(one in other for other in texts) == 1 for one in texts)


@fault("534 535")
def another_answer(case: Case) -> Encoding | None:
    at = max(n for n, message in enumerate(case.data["messages"]) if message["role"] == "assistant")
    answer = {"role": "assistant", "content": "Something else altogether."}
    # a row whose answer is another text of it, too, looks as if it had lost that one
    if case.data["messages"][at].get("tool_calls") or not _has_distinct_texts(case):
        return None
    messages = [answer if n == at else message for n, message in enumerate(case.data["messages"])]
    return case.of({**case.data, "messages": messages})


@fault("535")
def another_conversation(case: Case) -> Encoding | None:
    messages = [{"role": "user", "content": "7?"}, {"role": "assistant", "content": "9"}]
    said = json.dumps(case.data, ensure_ascii=False)
    texts = [text_of(m.get("content")) for m in case.data["messages"] if m["role"] != "tool"]
    if case.data.get("tools") or any("".join(t.split()) in "<s>[INST]7?[/INST]9</s>" for t in texts if t.split()):
        return None
    return case.of({"messages": messages}) if any(c.isalpha() for c in said) and any(t.split() for t in texts) else None


@fault("520 532")
def an_id_out_of_the_vocabulary(case: Case) -> Encoding | None:
    ids = case.ids
    ids[case.chance.randrange(len(ids))] = case.chance.choice([-1, case.oracle.vocab_size, 10**30])
    return case.from_ids(ids)
