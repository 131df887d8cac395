"""The shortcuts of rendering give what transformers' own renderer and tokenizer give; foreign templates take none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from converted import converted_tokenizer
from each_oracle import of_each, oracle_named
from encoding_laws import TOOL
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.templates import ChatTemplate, renderer
from pytest_mistral_lora.chat.templates.generation_blocks import ids_of
from pytest_mistral_lora.chat.templates.own_rows import _PROBES, OwnRows, _Shape, own_renderer
from pytest_mistral_lora.errors import LibraryError, RowError
from pytest_mistral_lora.strategies import hostile_text, rows, tool_rows

_TEXTS = st.one_of(hostile_text(), st.sampled_from((*_PROBES, "", "none", "0", "1e5", "True", "[AVAILABLE_TOOLS]x")))


@st.composite
def _any_turns(draw: st.DrawFn) -> dict[str, Any]:
    roles = [
        *draw(st.sampled_from(([], ["system"], ["system", "system"]))),
        *["user", "assistant"] * draw(st.integers(1, 3)),
    ]
    if draw(st.integers(0, 3)) == 0:
        roles = draw(st.lists(st.sampled_from(("system", "user", "assistant")), min_size=1, max_size=5))
    messages = [{"role": role, "content": draw(_TEXTS)} for role in [*roles, "assistant"]]
    # offered, and not called
    return {"messages": messages} | draw(st.sampled_from(({}, {}, {"tools": [TOOL]})))


@functools.cache
def template_of(name: str) -> ChatTemplate:
    """The template of a tokenizer, whose conversion takes seconds and changes no rendering."""
    return ChatTemplate(converted_tokenizer("spm-v3").fast, oracle_named(name).chat_template())


@functools.cache
def converted_template(name: str) -> ChatTemplate:
    return ChatTemplate(converted_tokenizer(name).fast)


def _outcome(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except RowError as error:
        return str(error)


@pytest.mark.parametrize(
    ("block", "filled"),
    [((1, 5), (1, 3)), ((1, 9), (1, 6)), ((3, 9), None), ((1, 3), None), ((6, 8), None)],
    ids=str,
)
def test_a_block_may_not_begin_or_end_inside_a_text(block: tuple[int, int], filled: tuple[int, int] | None) -> None:
    shape = _Shape.of("[ONE][TWO]", [block], ["ONE", "TWO"])
    assert (shape and shape.fill(["a", "bc"])) == (filled and ("[a][bc]", [filled]))


@settings(max_examples=5)
@given(data=st.one_of(_any_turns(), _any_turns(), rows(), tool_rows()))
@example(data={"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " 5 "}]})
@example(data={"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [TOOL]})
@of_each("spm-v1", "spm-v3", "spm-v7", "derived-v11", "derived-v15", made=template_of)
def test_a_row_is_rendered_and_marked_as_by_transformers(template: ChatTemplate, data: dict[str, Any]) -> None:
    row = parse_row(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renderer, "own_renderer", _plain_renderer)
        patch.setattr(renderer, "_own_rows", lambda source: _InFull(renderer._in_full))
        expected = [_outcome(lambda mark=mark: template._render(row, mark=mark)) for mark in (False, True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytest_mistral_lora.chat.templates.own_rows._OFTEN", 1)
        found = [_outcome(lambda mark=mark: template._render(row, mark=mark)) for mark in (False, True)]
    assert found == expected


def _plain_renderer() -> Any:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template


class _InFull(OwnRows):
    def rendered(self, question: Any) -> Any:
        return self._render(question)


@settings(max_examples=5)
@given(data=st.lists(_any_turns(), max_size=3))
@of_each("spm-v1", "spm-v3", "spm-v7", "derived-v7", "derived-v15", made=converted_template)
def test_texts_have_the_ids_of_the_tokenizers_call(template: ChatTemplate, data: list[dict[str, Any]]) -> None:
    taken = [parse_row(one) for one in data]
    fast = template.tokenizer
    expected: list[Any] = []
    for row in taken:
        text = _outcome(lambda row=row: template.render(row))
        is_refused = "the chat template refuses" in text
        expected.append(None if is_refused else tuple(fast(text, add_special_tokens=False)["input_ids"]))
    assert template.ids_of_rows(taken) == expected


@pytest.mark.parametrize("setting", ["padding", "truncation", "split"])
def test_settings_of_the_tokenizer_are_kept(setting: str) -> None:
    fast = converted_tokenizer("spm-v3").fast
    text = "<s>[INST] a[/INST]"
    expected = tuple(fast(text, add_special_tokens=False)["input_ids"])
    try:
        if setting == "padding":
            fast.backend_tokenizer.enable_padding(length=64)
        elif setting == "truncation":
            fast.backend_tokenizer.enable_truncation(2)
        else:
            fast.split_special_tokens = True
            expected = tuple(fast(text, add_special_tokens=False)["input_ids"])
            fast.backend_tokenizer.encode_special_tokens = False
        assert ids_of(fast, [text]) == [expected]
    finally:
        fast.split_special_tokens = False
        fast(text, add_special_tokens=False)


def _questions(content: str, count: int = 12) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]
    return [{"asked": "render", "messages": messages, "tools": None, "variables": {}}] * count


def test_a_template_that_looks_at_texts_is_found_out() -> None:
    def strips(question: Any) -> Any:
        return "".join(message["content"].strip() for message in question["messages"]), None

    found = OwnRows(strips)
    assert {found.rendered(one) for one in _questions(" a ")} == {("ab", None)}
    assert list(found._shapes.values()) == [None]

    def counts(question: Any) -> Any:
        contents = [message["content"] for message in question["messages"]]
        return "".join("!" if content == "secret" else content for content in contents), None

    # no probe shows it, and the next row that is rendered in full does
    found = OwnRows(counts)
    with pytest.raises(LibraryError, match="looks at the texts"):
        _ = [found.rendered(one) for one in _questions("secret", 200)]


def test_sequences_are_bounded() -> None:
    found = OwnRows(lambda question: ("", None))
    for count in range(10_100):
        found.rendered({"asked": "render", "messages": [], "tools": None, "variables": {"n": count}})
    assert len(found._seen) <= 10_001


def test_the_faster_sandbox_forbids_what_jinjas_does() -> None:
    render = own_renderer()
    for source in ("{{ messages.append(1) }}", "{{ ''.__class__.mro() }}", "{{ messages[0].clear() }}"):
        for _ in range(2):
            with pytest.raises(SecurityError):
                render(conversations=[[{"role": "user", "content": "a"}]], chat_template=source)
    assert render(conversations=[[{"role": "user", "items": "a"}]], chat_template="{{ messages[0].items() | list }}")
