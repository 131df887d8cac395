"""Rows that mistral-common may refuse: the fields are right, the conversation need not be."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

# "null" is mistral-common's own value for an id that is missing
_IDS = ("abcdefgh1", "abcdefgh2", "short", "null", "", None)
_TURNS = ("system", "user", "assistant", "calls", "tool")


@st.composite
def messy_rows(draw: st.DrawFn) -> dict[str, Any]:
    """Generate rows of any order of roles, with ids, names, schemas, contents and settings that may be wrong."""
    turns = draw(st.lists(st.sampled_from(_TURNS), max_size=6))
    last = draw(st.sampled_from(("assistant", "calls", "user", "tool")))
    messages = [draw(_message(turn)) for turn in (*turns, last)]
    # without an assistant's message a row has nothing to train on, and is refused before mistral-common sees it
    if not any(message["role"] == "assistant" for message in messages):
        messages.append({"role": "assistant", "content": "x"})
    row: dict[str, Any] = {"messages": messages}
    if draw(st.booleans()):
        schemas = st.sampled_from(({}, {"type": "object"}, {"type": "thing"}))
        function = st.fixed_dictionaries({"name": st.sampled_from(("f", "no name")), "parameters": schemas})
        row["tools"] = [{"type": "function", "function": draw(function)}]
    if draw(st.integers(0, 9)) == 9:
        row["reasoning_effort"] = draw(st.sampled_from(("none", "max", "much")))
    return row


def _message(turn: str) -> SearchStrategy[dict[str, Any]]:
    text = st.sampled_from(("x", "", "  ", "[INST]"))
    if turn == "tool":
        return st.fixed_dictionaries(
            {"role": st.just("tool"), "content": text, "tool_call_id": st.sampled_from(_IDS)},
            optional={"name": st.sampled_from(("f", "no name"))},
        )
    contents: SearchStrategy[Any] = text | st.just([]) | st.just([{"type": "text", "text": "x"}])
    if turn in ("assistant", "system"):
        contents = contents | st.just([{"type": "thinking", "thinking": "x"}])
    if turn != "calls":
        return st.fixed_dictionaries({"role": st.just(turn), "content": contents})
    function = st.fixed_dictionaries({"name": st.sampled_from(("f", "no name")), "arguments": st.just({})})
    call = {"id": st.sampled_from(_IDS), "type": st.just("function"), "function": function}
    calls = st.lists(st.fixed_dictionaries(call), min_size=1, max_size=2)
    return st.fixed_dictionaries(
        {"role": st.just("assistant"), "tool_calls": calls}, optional={"content": contents, "weight": st.just(0)}
    )
