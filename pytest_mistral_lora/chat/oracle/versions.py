"""The facts of each version of Mistral's tokenizers: one row for each version, asked by name.

Code that depends on a version asks for a fact of its row. No other module compares names or numbers of versions, so a
new version is supported by a row here, or is an error. mistral-common's classes are the source of each fact, and a test
derives every fact of every row from them. To add a version, see "A new version of the tokenizer" in
docs/contributing.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from packaging.specifiers import SpecifierSet

from pytest_mistral_lora.errors import TokenizerError
from pytest_mistral_lora.places import NOWHERE, Place

SUPPORTED = SpecifierSet(">=1.11.4")
"""Versions of mistral-common that this package works with: their encoders give the recorded ids, and pass the laws."""

EXACT_TEMPLATES = SpecifierSet(">=1.13")
"""Versions whose generated chat templates write the ids of their encoder: see docs/releases.md."""

TABLE = "pytest_mistral_lora/chat/oracle/versions.py"
"""The file to edit for a new version."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VersionFacts:
    """The facts of one tokenizer version.

    No field has a default: a new version answers every question. `InstructTokenizerV…` are classes of
    mistral-common's `tokens/tokenizers/instruct.py`, `InstructRequestNormalizer…` of
    `protocol/instruct/normalize.py`, `MistralRequestValidator…` of `protocol/instruct/validator.py`.

    Attributes:
        name: The version as tokenizer files give it: `v3`.
        control_tokens: The control tokens that its encoder needs, beside BOS, EOS and the markers of
            infilling; empty if it spells its markers as text (`InstructTokenizerV….__init__`).
        system_in: Where the system prompt stands: in the text of the user's first or last turn, or in a turn of its
            own (`encode_user_content`, `InstructTokenizerV7.encode_system_message`).
        opens_with_user: Whether a conversation that does not start with a user's turn gets an empty one
            (`InstructRequestNormalizer._system_prompt_in_begin`).
        tools_in: The user's turn before which the tools stand; None if the version has no tools
            (`_message_position_to_encode_tools_settings`).
        calls_as: How the tool calls of a turn are written: as one JSON `list` after one marker, or each by `markers`
            of its own; None without tools (`_encode_tool_calls_in_assistant_message`).
        writes_call_ids: Whether a call is written with its id (`_prepare_function_call`).
        call_ids: The ids that calls must have: `optional`, `nine` letters or digits, or `any` text that is not empty;
            None without tools (`MistralRequestValidator…._validate_tool_call_id`).
        parallel_calls: Whether the calls of a turn may have a result each (`_validate_tool_results`).
        keeps_calls: Whether calls and results before the last question are encoded (`is_before_last_user_message`).
        text_beside_calls: Whether a turn may have both text and calls (`_allow_tool_call_and_content`).
        results_as: How a tool result is written: as a JSON list of one object with the tool's `name`, as a JSON object
            with the call's `id`, as the call's id and the bare text (`id-and-text`), or as bare `text`; None without
            tools (`encode_tool_message`).
        result_chunks: Whether a tool result may have chunks other than text; the generated template then joins its
            texts by itself (`MistralRequestValidatorV15._validate_tool_content_chunks`).
        sorts_results: Whether results are put into the order of their calls (`_inplace_sort_tool_messages`).
        joint: The text between two text chunks of one message (`_chunk_join_str`).
        strips_answers: Whether spaces at the end of an answer are left out
            (`_encode_normal_content_assistant_message`).
        thinking: Whether answers may have thinking chunks, if the vocabulary has `[THINK]` and `[/THINK]`
            (`encode_think`).
        system_thinking: Whether system prompts may have them, too (`_validate_system_content_chunks`).
        plain_thinking: Whether the generated template writes thinking as `<think>` text, which the encoder refuses
            (`convert_tokenizer_to_chat_template`).
        settings: Whether the prompt has model settings, such as `reasoning_effort` (`_encode_settings`).
    """

    name: str
    control_tokens: frozenset[str]
    system_in: Literal["first-user-turn", "last-user-turn", "own-turn"]
    opens_with_user: bool
    tools_in: Literal["first-user-turn", "last-user-turn"] | None
    calls_as: Literal["list", "markers"] | None
    writes_call_ids: bool
    call_ids: Literal["optional", "nine", "any"] | None
    parallel_calls: bool
    keeps_calls: bool
    text_beside_calls: bool
    results_as: Literal["name", "id", "id-and-text", "text"] | None
    result_chunks: bool
    sorts_results: bool
    joint: Literal["\n\n", ""]
    strips_answers: bool
    thinking: bool
    system_thinking: bool
    plain_thinking: bool
    settings: bool


Fact = Callable[[VersionFacts], object]
"""Returns whether a version has a fact."""

_TOOLS = frozenset(
    (
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    )
)
_SYSTEM = _TOOLS | {"[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"}
_CALLS = _SYSTEM | {"[ARGS]", "[CALL_ID]"}
_SETTINGS = _CALLS | {"[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"}

VERSIONS = (
    VersionFacts(
        name="v1",
        control_tokens=frozenset(),
        system_in="first-user-turn",
        opens_with_user=True,
        tools_in=None,
        calls_as=None,
        writes_call_ids=False,
        call_ids=None,
        parallel_calls=False,
        keeps_calls=False,
        text_beside_calls=False,
        results_as=None,
        result_chunks=False,
        sorts_results=False,
        joint="\n\n",
        strips_answers=False,
        thinking=False,
        system_thinking=False,
        plain_thinking=False,
        settings=False,
    ),
    VersionFacts(
        name="v2",
        control_tokens=_TOOLS,
        system_in="last-user-turn",
        opens_with_user=True,
        tools_in="last-user-turn",
        calls_as="list",
        writes_call_ids=False,
        call_ids="optional",
        parallel_calls=False,
        keeps_calls=False,
        text_beside_calls=False,
        results_as="name",
        result_chunks=False,
        sorts_results=False,
        joint="\n\n",
        strips_answers=True,
        thinking=False,
        system_thinking=False,
        plain_thinking=False,
        settings=False,
    ),
    VersionFacts(
        name="v3",
        control_tokens=_TOOLS,
        system_in="last-user-turn",
        opens_with_user=True,
        tools_in="last-user-turn",
        calls_as="list",
        writes_call_ids=True,
        call_ids="nine",
        parallel_calls=True,
        keeps_calls=True,
        text_beside_calls=False,
        results_as="id",
        result_chunks=False,
        sorts_results=False,
        joint="\n\n",
        strips_answers=True,
        thinking=False,
        system_thinking=False,
        plain_thinking=False,
        settings=False,
    ),
    VersionFacts(
        name="v7",
        control_tokens=_SYSTEM,
        system_in="own-turn",
        opens_with_user=False,
        tools_in="last-user-turn",
        calls_as="list",
        writes_call_ids=True,
        call_ids="nine",
        parallel_calls=True,
        keeps_calls=True,
        text_beside_calls=True,
        results_as="id-and-text",
        result_chunks=False,
        sorts_results=False,
        joint="\n\n",
        strips_answers=True,
        thinking=False,
        system_thinking=False,
        plain_thinking=False,
        settings=False,
    ),
    VersionFacts(
        name="v11",
        control_tokens=_CALLS,
        system_in="own-turn",
        opens_with_user=False,
        tools_in="last-user-turn",
        calls_as="markers",
        writes_call_ids=True,
        call_ids="nine",
        parallel_calls=True,
        keeps_calls=True,
        text_beside_calls=True,
        results_as="id-and-text",
        result_chunks=False,
        sorts_results=True,
        joint="\n\n",
        strips_answers=True,
        thinking=False,
        system_thinking=False,
        plain_thinking=True,
        settings=False,
    ),
    VersionFacts(
        name="v13",
        control_tokens=_CALLS,
        system_in="own-turn",
        opens_with_user=False,
        tools_in="first-user-turn",
        calls_as="markers",
        writes_call_ids=False,
        call_ids="any",
        parallel_calls=True,
        keeps_calls=True,
        text_beside_calls=True,
        results_as="text",
        result_chunks=False,
        sorts_results=True,
        joint="\n\n",
        strips_answers=True,
        thinking=True,
        system_thinking=True,
        plain_thinking=False,
        settings=False,
    ),
    VersionFacts(
        name="v15",
        control_tokens=_SETTINGS,
        system_in="own-turn",
        opens_with_user=False,
        tools_in="first-user-turn",
        calls_as="markers",
        writes_call_ids=False,
        call_ids="any",
        parallel_calls=True,
        keeps_calls=True,
        text_beside_calls=True,
        results_as="text",
        result_chunks=True,
        sorts_results=True,
        joint="",
        strips_answers=True,
        thinking=True,
        system_thinking=False,
        plain_thinking=False,
        settings=True,
    ),
)
"""The supported versions, the oldest first."""


def version_facts(name: str, *, place: Place = NOWHERE) -> VersionFacts:
    """Return the facts of a version.

    Args:
        name: Its name, such as `v3`.
        place: Where the name stands, for the error.

    Raises:
        TokenizerError: If the version is not in the table.
    """
    found = next((facts for facts in VERSIONS if facts.name == name), None)
    if found is None:
        raise TokenizerError(
            f"tokenizer version {name} is not supported by this version of pytest-mistral-lora",
            place=place,
            expected=f"one of {', '.join(facts.name for facts in VERSIONS)}",
            next_step="Upgrade: pip install --upgrade pytest-mistral-lora. If no release supports the version, add its "
            f"facts to {TABLE}.",
        )
    return found


def versions_with(fact: Fact) -> frozenset[VersionFacts]:
    """Return the versions that have a fact."""
    return frozenset(facts for facts in VERSIONS if fact(facts))


def versions_between(first: str | None, last: str | None, *, place: Place = NOWHERE) -> frozenset[VersionFacts]:
    """Return the versions from the first to the last; None for the oldest and the newest one.

    Raises:
        TokenizerError: If one of them is not in the table.
    """
    start = 0 if first is None else VERSIONS.index(version_facts(first, place=place))
    end = len(VERSIONS) if last is None else VERSIONS.index(version_facts(last, place=place)) + 1
    return frozenset(VERSIONS[start:end])


def names_with(fact: Fact, *, from_then_on: str, only: str = "{}") -> str:
    """Return the names of the versions that have a fact, for a message.

    Args:
        fact: The fact.
        from_then_on: The words if all versions from one on have it, with `{}` for the first: `from {} on`.
        only: The words if a later version does not have it, with `{}` for all names.
    """
    having = versions_with(fact)
    names = [facts.name for facts in VERSIONS if facts in having]
    if names and having == frozenset(VERSIONS[-len(names) :]):
        return from_then_on.format(names[0])
    return only.format(", ".join(names) or "no known version")
