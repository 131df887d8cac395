"""The named deviations: a closed table of the differences between the generated chat template and mistral-common.

mistral-common generates the template of every tokenizer version itself, and yet the two are not the same function. A
difference between them is accepted only if this table names it *and* predicts it: each deviation gives the exact text
that the template writes, or the change of the row that removes the difference. Any other difference is a failure.

A server that renders the template has them, too. Which versions of a server are known to is written beside the server:
`Server.known_deviations`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

from pytest_mistral_lora.chat.oracle.versions import (
    SUPPORTED,
    VERSIONS,
    VersionFacts,
    version_facts,
    versions_with,
)
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates.predictions import (
    empty_messages_dropped,
    empty_results_written,
    question_first,
    results_in_call_order,
    system_first,
    thinking_left_open_joined,
    tool_calls_as_written,
    tool_calls_with_ids,
    tool_results_as_strings,
    tool_results_with_names,
    weights_equal,
)

Predict = Callable[[Row, VersionFacts], list[str]]
Change = Callable[[Row, VersionFacts], Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """One way in which the template differs from mistral-common.

    Attributes:
        id: Its name.
        title: The template's behaviour, in one sentence.
        why: Why the two differ, and the effect on training.
        versions: Tokenizer versions that have it.
        kinds: Tokenizer kinds that have it: `spm`, `tekken`.
        mistral_common: Versions of mistral-common whose generated template has it.
        tokenizer: The tokenizer that the example is for: a shipped one, or a test file derived from one.
        example: The smallest row that shows it.
        after: Control tokens that the differing text follows: the last of them that the version has. Empty for
            deviations of other forms.
        predict: Gives the texts that the template writes after those control tokens, in order.
        change: Changes a row so that this difference goes away. A deviation with a `refusal` has one: a refusal is
            excused only if the template is right about the changed row.
        refusal: A regular expression for the template's message when it refuses the row.
    """

    id: str
    title: str
    why: str
    versions: frozenset[VersionFacts]
    kinds: frozenset[str] = frozenset({"spm", "tekken"})
    mistral_common: SpecifierSet = SUPPORTED
    tokenizer: str = "spm-v3"
    example: Mapping[str, Any]
    after: tuple[str, ...] = ()
    predict: Predict | None = None
    change: Change | None = None
    refusal: str = ""

    def applies(self, *, facts: VersionFacts, kind: str, mistral_common: str) -> bool:
        """Return whether a tokenizer under a library version can show this deviation."""
        return facts in self.versions and kind in self.kinds and mistral_common in self.mistral_common

    def changed(self, row: Row, facts: VersionFacts) -> Row | None:
        """Return the changed row, or None if the row does not have this deviation's form."""
        changed = self.change(row, facts) if self.change else row
        # most changes return the row itself: the identity saves a comparison as JSON
        return None if changed is row or changed == row else changed


_ALL = frozenset(VERSIONS)
_TOOLS = versions_with(lambda facts: facts.tools_in)
_SPM = frozenset({"spm"})
_TEKKEN = frozenset({"tekken"})
_WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def _tool_call(arguments: Any, call_id: str = "abcdefghi") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def _call(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [_tool_call(arguments)]}


def _chat(*messages: Any, tools: Any = None) -> dict[str, Any]:
    """Write an example: a string is text, of the user and the assistant in turn."""
    roles = ("user", "assistant")
    data = [{"role": roles[n % 2], "content": m} if isinstance(m, str) else m for n, m in enumerate(messages)]
    return {"messages": data} | ({"tools": tools} if tools else {})


DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        id="control-literal",
        title="Text that spells a control token becomes that control token.",
        why="transformers looks for special tokens in the whole rendered text, so a user can forge a turn or an EOS "
        "(huggingface/transformers#29279). mistral-common never does this, and training through the template refuses "
        "such rows.",
        versions=_ALL,
        example=_chat("x[/INST]y</s>", "b"),
    ),
    Deviation(
        id="assistant-trailing-spaces",
        title="The template keeps spaces at the end of an answer.",
        why="mistral-common strips them (spaces only, from v2 on), so that EOS follows the last word.",
        versions=versions_with(lambda facts: facts.strips_answers),
        example=_chat("a", "b "),
    ),
    Deviation(
        id="empty-text-space",
        title="An empty text still gets the space that separates SentencePiece text from the control token before it.",
        why="mistral-common encodes an empty text to no token at all.",
        versions=versions_with(lambda facts: facts.control_tokens),
        kinds=_SPM,
        example=_chat("", "b"),
    ),
    Deviation(
        id="no-space-after-system",
        title="An answer straight after the system prompt lacks the space that SentencePiece puts before a text.",
        why="The template writes that space after a user message or a tool result only.",
        # the only version with such prompts and SentencePiece files
        versions=frozenset({version_facts("v7")}),
        kinds=_SPM,
        tokenizer="spm-v7",
        example=_chat({"role": "system", "content": "s"}, "b"),
    ),
    Deviation(
        id="tools-as-written",
        title="The template writes tools as your row gives them.",
        why="mistral-common writes type, name, description and parameters in this order, with an empty description "
        "if there is none, and leaves out `strict`.",
        versions=_TOOLS,
        example=_chat("a", "b", tools=[{**_WEATHER, "function": {**_WEATHER["function"], "strict": True}}]),
        after=("[AVAILABLE_TOOLS]",),
        predict=lambda row, facts: [json.dumps(list(row.tools or ()), ensure_ascii=False)],
    ),
    Deviation(
        id="tool-arguments-as-written",
        title="The template copies the arguments of a tool call as they are if your row has a string or null there.",
        why="mistral-common parses them and writes them again, so escapes and spacing change; it writes text that is "
        "not JSON as a JSON string, and null as an empty object.",
        versions=_TOOLS,
        example=_chat("a", _call('{"city":"\\u00e9"}'), tools=[_WEATHER]),
        after=("[TOOL_CALLS]", "[ARGS]"),
        predict=tool_calls_as_written,
    ),
    Deviation(
        id="tool-result-as-string",
        title="A tool result that is JSON stays a string, and text chunks are written in Python's notation.",
        why="mistral-common writes the parsed value up to v3, and the joined text of the chunks in every version.",
        versions=_TOOLS,
        example=_chat(
            "a",
            _call({}),
            {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"c": 1}'},
            {"role": "assistant", "content": "b"},
            tools=[_WEATHER],
        ),
        after=("[TOOL_RESULTS]", "[TOOL_CONTENT]"),
        predict=tool_results_as_strings,
    ),
    Deviation(
        id="unequal-weights-merged",
        title="Consecutive assistant messages of unequal weight become one turn.",
        why="A template does not know weights; mistral-common keeps such messages apart, each with its own EOS. "
        "Their labels are not available through the template.",
        versions=_ALL,
        example=_chat("a", {"role": "assistant", "content": "b", "weight": 0}, {"role": "assistant", "content": "c"}),
        change=weights_equal,
    ),
    Deviation(
        id="system-between-users",
        title="User messages with a system message between them become one turn.",
        why="Up to v3 the template takes the system messages out before it joins neighbours; mistral-common joins "
        "neighbours first.",
        versions=versions_with(lambda facts: facts.system_in != "own-turn"),
        example=_chat(
            "a",
            {"role": "system", "content": "s"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "b"},
        ),
        change=system_first,
    ),
    Deviation(
        id="empty-message-joined",
        title="An empty message that is joined with its neighbour leaves a blank line.",
        why="mistral-common skips empty texts when it joins messages or chunks.",
        versions=_ALL,
        example=_chat("", {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
        change=empty_messages_dropped,
    ),
    Deviation(
        id="tool-results-out-of-order",
        title="Results of parallel tool calls stay in the order of your row.",
        why="mistral-common puts them in the order of the calls from v11 on, because a result no longer shows its id "
        "to the model in every version.",
        versions=versions_with(lambda facts: facts.sorts_results),
        kinds=_TEKKEN,
        tokenizer="derived-v13",
        example=_chat(
            "a",
            {"role": "assistant", "tool_calls": [_tool_call("{}", "aaaaaaaaa"), _tool_call("{}", "bbbbbbbbb")]},
            {"role": "tool", "tool_call_id": "bbbbbbbbb", "content": "2"},
            {"role": "tool", "tool_call_id": "aaaaaaaaa", "content": "1"},
            {"role": "assistant", "content": "b"},
            tools=[_WEATHER],
        ),
        change=results_in_call_order,
    ),
    Deviation(
        id="open-thinking-joined",
        title="Thinking that is not closed and the text straight after it are encoded as one text.",
        why="mistral-common encodes the two apart. No marker stands between them, so only the ids show the boundary.",
        versions=versions_with(lambda facts: facts.thinking),
        kinds=_TEKKEN,
        tokenizer="derived-v13-thinking",
        example=_chat(
            "a",
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "b", "closed": False},
                    {"type": "text", "text": "b"},
                ],
            },
        ),
        change=thinking_left_open_joined,
    ),
    Deviation(
        id="empty-tool-content-refused",
        title="The template refuses a tool result that is an empty list of chunks.",
        why="mistral-common encodes it as an empty text.",
        versions=versions_with(lambda facts: facts.result_chunks),
        kinds=_TEKKEN,
        tokenizer="derived-v15",
        example=_chat(
            "a",
            _call({}),
            {"role": "tool", "tool_call_id": "abcdefghi", "content": []},
            {"role": "assistant", "content": "b"},
            tools=[_WEATHER],
        ),
        refusal=r"tool message contents must have non-empty content",
        change=empty_results_written,
    ),
    Deviation(
        id="no-user-refused",
        title="The template refuses a conversation without a user message before the first answer or result of a tool.",
        why="mistral-common adds an empty user message up to v3.",
        versions=versions_with(lambda facts: facts.opens_with_user),
        example=_chat({"role": "system", "content": "s"}, "b"),
        refusal=r"Conversation must start with a user message",
        change=question_first,
    ),
    Deviation(
        id="answer-first-refused",
        title="The template refuses a conversation that starts with an answer or the result of a tool.",
        why="mistral-common accepts it from v7 on.",
        versions=versions_with(lambda facts: not facts.opens_with_user),
        tokenizer="spm-v7",
        example=_chat(
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ),
        refusal=r"Conversation must start with a user or system message",
        change=question_first,
    ),
    Deviation(
        id="tool-name-required",
        title="The template refuses a tool result without a name.",
        why="Version 2 writes the tool's name into the result; mistral-common writes null if it has none.",
        versions=versions_with(lambda facts: facts.results_as == "name"),
        tokenizer="spm-v2",
        example=_chat(
            "a",
            _call({}),
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "b"},
            tools=[_WEATHER],
        ),
        refusal=r"Tool message must have a name",
        change=tool_results_with_names,
    ),
    Deviation(
        id="last-call-id-required",
        title="The template refuses a tool call without an id.",
        why="mistral-common's finetuning mode accepts it in the last turn, because no result follows.",
        versions=versions_with(lambda facts: facts.call_ids == "nine"),
        example=_chat(
            "a",
            {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]},
            tools=[_WEATHER],
        ),
        refusal=r"Tool call must have an id|has no attribute 'id'|'NoneType' has no len",
        change=tool_calls_with_ids,
    ),
)
"""Every named deviation. The changes are tried in this order: a system message in between hides neighbours to join."""
