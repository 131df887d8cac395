"""Strategies for rows, conversations and messages."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pytest_mistral_lora.chat.fields import ROLES
from pytest_mistral_lora.chat.objective import Objective
from pytest_mistral_lora.chat.rows import text_of
from pytest_mistral_lora.strategies.texts import (
    CALL_IDS,
    NAMES,
    TextStrategy,
    any_result,
    hostile_text,
    plain_text,
    tool_message,
)
from pytest_mistral_lora.strategies.writing import Message, RowPlan, is_spoken, message_of, written_rows

_ANY_TEXT = st.one_of(plain_text(), hostile_text())


def rows(
    *,
    tools: bool | None = False,
    system: bool | None = None,
    weights: bool = False,
    max_turns: int = 4,
    text: TextStrategy | None = None,
    alternating: bool = True,
    parallel: bool = False,
    thinking: bool = False,
    efforts: Sequence[str] = (),
    formats: bool = False,
    result_chunks: bool = False,
    any_ids: bool = False,
) -> SearchStrategy[dict[str, Any]]:
    """Generate chat rows that every tokenizer version accepts, or every version with tools if they have tools.

    Examples:
        >>> from hypothesis import given
        >>> @given(rows(system=True, text=plain_text()))
        ... def law(row):
        ...     assert row["messages"][0]["role"] == "system"
        >>> law()

    Args:
        tools: False for rows without tools; True for rows with tools, tool calls and tool results; None for both.
        system: False for no system message; True for at least one; None for both.
        weights: Whether assistant messages may carry `weight` 0 or 1; a row may then have no supervised token.
        max_turns: The most user turns of a row, 1 or more.
        text: Texts of the messages; plain and hostile text by default. Any message but the first may also repeat an
            earlier one. Assistant messages keep to texts that are more than spaces.
        alternating: False for consecutive user and assistant messages, system messages wherever they are allowed,
            conversations without a leading user message, and contents given as text chunks.
        parallel: Whether an assistant turn may make several tool calls (from v3 on), answered in any order.
        thinking: Whether answers, and turns that call tools, may think (from v13 on, if the tokenizer has the
            tokens for it), in any shape that mistral-common encodes: also in several thoughts, in an empty one or in
            one that is not closed, which servers read otherwise (ML650).
        efforts: Values of a row's `reasoning_effort` (from v15 on); empty for none.
        formats: Whether rows may have a `response_format`, of each type (shown to the model from v15 on).
        result_chunks: Whether tool results may be lists of text chunks.
        any_ids: Whether ids of tool calls may have any form, as from v13 on; else they are 9 letters or digits.
    """
    if max_turns < 1:
        raise ValueError(f"max_turns is {max_turns}, and a row has at least 1 turn")
    said = _ANY_TEXT if text is None else text
    given = (thinking, tuple(efforts), formats, result_chunks, any_ids)
    plans = [
        RowPlan(choice, system, weights, max_turns, said, alternating, parallel, *given)
        for choice in ((False, True) if tools is None else (tools,))
    ]
    return st.one_of(*map(written_rows, plans))


def tool_rows(
    *,
    parallel: bool = False,
    system: bool | None = None,
    weights: bool = False,
    max_turns: int = 4,
    text: TextStrategy | None = None,
    alternating: bool = True,
    thinking: bool = False,
    efforts: Sequence[str] = (),
    formats: bool = False,
    result_chunks: bool = False,
    any_ids: bool = False,
) -> SearchStrategy[dict[str, Any]]:
    """Generate chat rows with tools, tool calls and tool results; the arguments are as for `rows`.

    At least one assistant message calls a tool; a call at the end of a row may have no result. Arguments are an object,
    its JSON, JSON in JSON, or not JSON; results are JSON, numbers or text. Ids are 9 letters or digits. An object keeps
    the schema of its tool, and has a null only where the tool takes one; it may have further keys, also if the tool is
    `strict`, which a grammar refuses (ML651).

    Example:
        >>> from hypothesis import given
        >>> @given(tool_rows(text=plain_text()))
        ... def law(row):
        ...     assert row["tools"] and any(message.get("tool_calls") for message in row["messages"])
        >>> law()
    """
    return rows(
        tools=True,
        system=system,
        weights=weights,
        max_turns=max_turns,
        text=text,
        alternating=alternating,
        parallel=parallel,
        thinking=thinking,
        efforts=efforts,
        formats=formats,
        result_chunks=result_chunks,
        any_ids=any_ids,
    )


def fim_rows(*, text: TextStrategy | None = None) -> SearchStrategy[dict[str, Any]]:
    """Generate fill-in-the-middle rows, for tokenizers with `[SUFFIX]` and `[PREFIX]`.

    Example:
        >>> from hypothesis import given
        >>> @given(fim_rows())
        ... def law(row):
        ...     assert row.keys() == {"prompt", "suffix", "completion"}
        >>> law()

    Args:
        text: Its texts; plain and hostile text, which may be empty, by default. Prompt and suffix may be empty.
    """
    said = _ANY_TEXT if text is None else text
    around = st.just("") | said
    return st.fixed_dictionaries({"prompt": around, "suffix": around, "completion": said})


def pairs(
    *,
    tools: bool | None = False,
    system: bool | None = None,
    max_turns: int = 4,
    text: TextStrategy | None = None,
    parallel: bool = False,
) -> SearchStrategy[dict[str, Any]]:
    """Generate preference pairs with prompt, chosen and rejected; the arguments are as for `rows`.

    The answers differ in more than white space. With tools, they may call some, and one may go on where the other does.

    Example:
        >>> from hypothesis import given
        >>> @given(pairs(text=plain_text()))
        ... def law(pair):
        ...     assert pair["prompt"][-1]["role"] == "user" and pair["chosen"] != pair["rejected"]
        >>> law()
    """
    said = _ANY_TEXT if text is None else text
    whole = rows(tools=tools, system=system, max_turns=max_turns, text=text, parallel=parallel)
    return _pairs_of(whole, said.filter(lambda words: bool(words.strip())))


@st.composite
def _pairs_of(draw: st.DrawFn, whole: SearchStrategy[dict[str, Any]], said: TextStrategy) -> dict[str, Any]:
    row = draw(whole)
    end = 1 + max(index for index, message in enumerate(row["messages"]) if message["role"] == "user")
    prompt, answer = row["messages"][:end], row["messages"][end:]
    other = [message_of("assistant", draw(said))]
    # the same calls, and another answer with their results
    calls = [message for message in answer if message["role"] == "tool" or message.get("tool_calls")]
    if calls and calls[-1]["role"] == "tool" and draw(st.booleans()):
        other = calls + other
    last = answer[-1]
    if not last.get("tool_calls") and not text_of(last["content"]).strip():
        # white space is an answer of a row, and an empty side of a pair
        last = message_of("assistant", draw(said))
        answer = [*answer[:-1], last]
    if len(other) == len(answer) and not last.get("tool_calls") and _letters(other[-1]) == _letters(last):
        other[-1] = message_of("assistant", f"{other[-1]['content']} (no)")
    sides = draw(st.permutations((answer, other)))
    settings = {key: value for key, value in row.items() if key != "messages"}
    return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]} | settings


def _letters(message: Message) -> str:
    """Return a text without white space, and without the letter that SentencePiece reads as a space."""
    return "".join(text_of(message["content"]).replace("\u2581", " ").split())


def conversations(
    *,
    system: bool | None = None,
    max_turns: int = 4,
    text: TextStrategy | None = None,
    alternating: bool = True,
) -> SearchStrategy[list[Message]]:
    """Generate the messages of rows without tools; the arguments are as for `rows`.

    Example:
        >>> from hypothesis import given
        >>> @given(conversations(system=False))
        ... def law(conversation):
        ...     assert [message["role"] for message in conversation[:2]] == ["user", "assistant"]
        >>> law()
    """
    whole = rows(system=system, max_turns=max_turns, text=text, alternating=alternating)
    return whole.map(lambda row: list(row["messages"]))


def objectives(controls: Collection[str] = ()) -> SearchStrategy[str]:
    """Generate the words of an objective, as `assert_labels_exact(objective=)` takes them.

    Example:
        >>> from hypothesis import given
        >>> @given(objectives())
        ... def law(words):
        ...     assert words in ("answers", "last-answer", "last-round", "everything")
        >>> law()

    Args:
        controls: The control tokens of the tokenizer, such as `oracle.control_ids`; `no-thinking` is generated if
            `[THINK]` is among them, and `no-calls` if `[TOOL_CALLS]` is.
    """
    return st.sampled_from([str(objective) for objective in Objective.expressible(controls)])


def messages(*, role: str | None = None, text: TextStrategy | None = None) -> SearchStrategy[Message]:
    """Generate single messages.

    Example:
        >>> from hypothesis import given
        >>> @given(messages(role="assistant"))
        ... def law(message):
        ...     assert message["content"].strip(" ")
        >>> law()

    Args:
        role: `system`, `user`, `assistant` or `tool`; None for any of the first three.
        text: Texts of the messages; plain and hostile text by default.

    Raises:
        ValueError: If `role` is not a role.
    """
    if role is None:
        return st.one_of(*(messages(role=choice, text=text) for choice in ("user", "assistant", "system")))
    if role not in ROLES:
        raise ValueError(f"role is {role!r}, expected one of {', '.join(ROLES)}")
    content = _ANY_TEXT if text is None else text
    if role == "tool":
        return st.builds(tool_message, any_result(content), CALL_IDS, st.none() | NAMES)
    return st.builds(message_of, st.just(role), content.filter(is_spoken) if role == "assistant" else content)
