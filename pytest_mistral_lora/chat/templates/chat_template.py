"""A chat template that is rendered in a limited process, with its text cut by control tokens and by turns."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

from pytest_mistral_lora.chat.chunks.registry import blocks_in
from pytest_mistral_lora.chat.encoded import EncodedRow, Span
from pytest_mistral_lora.chat.kinds.records import as_row
from pytest_mistral_lora.chat.rows import Row, native_content
from pytest_mistral_lora.chat.templates.generation_blocks import block_spans, ids_of, offsets_of
from pytest_mistral_lora.chat.templates.isolated import ask
from pytest_mistral_lora.chat.templates.own_prompt import OwnSystemPrompt, find_own_prompt
from pytest_mistral_lora.errors import NoTemplateError, RenderError, RowError, UncheckedRowError

REFUSES = "the chat template refuses the row: "
"""The start of an error that the template raised itself."""


@dataclass(frozen=True, slots=True)
class TemplateSegment:
    """A part of a rendered row: a control token that the template placed, or the text between two such tokens.

    Attributes:
        control: Whether the template placed it as a control token.
        text: Its characters.
        ids: The ids that transformers gives it within the whole row.
    """

    control: bool
    text: str
    ids: tuple[int, ...]


class ChatTemplate:
    """A Jinja chat template with the tokenizer that encodes its rendering.

    Attributes:
        tokenizer: A `transformers` fast tokenizer.
        source: The template's text.
        tool_source: The text for rows with tools: the template named `tool_use`, or else `source`.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: str | None = None,
        blocks: Callable[[Mapping[str, Any]], Sequence[int]] | None = None,
    ) -> None:
        """Use `source`, or the tokenizer's own templates.

        Args:
            tokenizer: A `transformers` fast tokenizer.
            source: The template's text; None for the tokenizer's own.
            blocks: Returns the ids of a chunk whose tokens are a block, such as an image: a template writes the first
                of them, and a processor the rest. None if there is no Mistral tokenizer.

        Raises:
            NoTemplateError: If the tokenizer has no template, or no template for every row.
        """
        self.tokenizer = tokenizer
        self._block_of = blocks
        # one text, or texts by name
        stored = tokenizer.chat_template if source is None else source
        named: Mapping[str, str] = {"default": stored} if isinstance(stored, str) and stored else stored or {}
        if not named.get("default"):
            raise NoTemplateError(
                f"there is no default among the chat templates {', '.join(sorted(named))}"
                if named
                else "the tokenizer has no chat template",
                place=str(tokenizer.name_or_path),
                expected="chat_template.jinja, or the key chat_template of tokenizer_config.json",
            )
        self.source: str = named["default"]
        # as `PreTrainedTokenizerBase.get_chat_template` chooses
        self.tool_source: str = named.get("tool_use", self.source)
        self._overrun: RenderError | None = None
        self._own_prompts: dict[bool, OwnSystemPrompt | None] = {}

    @cached_property
    def training_source(self) -> str | None:
        """The template with `{% generation %}` blocks; None if it has no branch for the assistant."""
        source: str | None = ask({"asked": "training-source", "source": self.source})["source"]
        return source

    @cached_property
    def writes_controls(self) -> bool:
        """Whether it writes a control token of its tokenizer into a question with its answer, or refuses them."""
        messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        try:
            return self.spells_control(self.render(Row(messages)))
        except RowError:
            return True

    def render(self, row: Row | Mapping[str, Any], *, generation_prompt: bool = False) -> str:
        """Return the text of a row, or of the messages before an answer with `generation_prompt`.

        Raises:
            RowError: If the template refuses the row.
        """
        return self._render(as_row(row), generation_prompt)[0]

    def own_prompt(self, *, tools: bool = False) -> OwnSystemPrompt | None:
        """Return the system prompt that the template writes by itself into a row without one, or None.

        Args:
            tools: Whether the row has tools: a template may write another prompt beside them.
        """
        if tools not in self._own_prompts:
            self._own_prompts[tools] = find_own_prompt(self.render, tools=tools)
        return self._own_prompts[tools]

    def behind_own_prompt(self, row: Row, *, generation_prompt: bool = False) -> Row:
        """Return a row behind the system prompt that the template writes into it; the row itself if it writes none."""
        prompt = None if row.messages[0]["role"] == "system" else self.own_prompt(tools=bool(row.tools))
        if prompt is None:
            return row
        try:
            is_written = prompt.text in self.render(row, generation_prompt=generation_prompt)
        except RowError:
            # the template refuses this row, but may render other forms of it, with the prompt
            is_written = True
        return prompt.before(row) if is_written else row

    def encode(self, row: Row | Mapping[str, Any]) -> EncodedRow:
        """Encode a row as `apply_chat_template` does.

        Spans outside the assistant's turns have no turn and no role: a template does not mark them. Labels are None
        if the generation blocks cannot be put in without changing the text, or do not match the row's turns.

        Raises:
            RowError: If the template refuses the row.
        """
        found = self.encode_rows([as_row(row)])[0]
        if isinstance(found, RowError):
            raise found
        return found

    def encode_rows(self, rows: Iterable[Row]) -> list[EncodedRow | RowError]:
        """Encode some rows like `encode`, all texts at once; a refused row is replaced by its error."""
        rendered: list[tuple[Row, str, list[tuple[int, int]] | None] | RowError] = []
        for row in rows:
            try:
                for _, kind in blocks_in(message.get("content") for message in row.messages):
                    found = f"{kind.title} in a row that a chat template encodes"
                    raise UncheckedRowError(found, reason=found, place=row.place)
                rendered.append((row, *self._render(row, mark=True)))
            except RowError as error:
                rendered.append(error)
        tokens = iter(offsets_of(self.tokenizer, [result[1] for result in rendered if isinstance(result, tuple)]))
        encoded: list[EncodedRow | RowError] = []
        for result in rendered:
            if isinstance(result, RowError):
                encoded.append(result)
                continue
            row, _, blocks = result
            ids, offsets = next(tokens)
            weights = None if blocks is None else _weights(row, len(blocks))
            if blocks is None or weights is None:
                encoded.append(EncodedRow(ids, None, (Span(None, None, "text", 0, len(ids), False),)))
            else:
                spans = block_spans(self._added, self.tokenizer.eos_token_id, ids, offsets, blocks, weights)
                encoded.append(EncodedRow.from_spans(ids, spans).under(row.objective, self.added_ids))
        return encoded

    def ids(self, row: Row, *, generation_prompt: bool = False) -> tuple[int, ...]:
        """Return only the ids of a row, in a third of the time that `encode` takes.

        Raises:
            RowError: If the template refuses the row.
        """
        return self._with_blocks(row, ids_of(self.tokenizer, [self._render(row, generation_prompt)[0]])[0])

    def _with_blocks(self, row: Row, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids of a row with its blocks in place of their first ids, as a processor writes them."""
        chunks = blocks_in(message.get("content") for message in row.messages)
        if self._block_of is None or not chunks:
            return ids
        blocks = [self._block_of(chunk) for chunk, _ in chunks]
        places = [at for at, token in enumerate(ids) if token in {block[0] for block in blocks}]
        if len(places) != len(blocks):
            return ids
        parts = [ids[before + 1 : at] for before, at in pairwise([-1, *places, len(ids)])]
        return (*chain.from_iterable((*part, *block) for part, block in zip(parts, [*blocks, ()], strict=True)),)

    def ids_of_rows(self, rows: Iterable[Row]) -> list[tuple[int, ...] | None]:
        """Return the ids of some rows, encoded at once; None for a row that the template refuses."""
        texts: list[str | None] = []
        rows = [*rows]
        for row in rows:
            try:
                texts.append(self._render(row)[0])
            except RowError:
                texts.append(None)
        encoded = iter(ids_of(self.tokenizer, [text for text in texts if text is not None]))
        return [
            None if text is None else self._with_blocks(row, next(encoded))
            for row, text in zip(rows, texts, strict=True)
        ]

    def applied(self, row: Row | Mapping[str, Any]) -> tuple[int, ...]:
        """Return the ids of the tokenizer's own `apply_chat_template`, whether it returns a list or a mapping.

        Raises:
            RowError: If the template refuses the row.
        """
        row = as_row(row)
        # the template has been rendered by transformers' own function, and a foreign one is not run in this process
        result = self.tokenizer.apply_chat_template(
            [_plain(message) for message in row.messages],
            tools=list(row.tools) if row.tools else None,
            chat_template="{{ rendered }}",
            rendered=self.render(row),
        )
        return tuple(result["input_ids"] if isinstance(result, Mapping) else result)

    def segments(self, row: Row | Mapping[str, Any], *, generation_prompt: bool = False) -> list[TemplateSegment]:
        """Split the rendered row at the control tokens that the template placed, and not where texts spell one.

        Raises:
            RowError: If the template refuses the row, or changes a text so that the two cannot be told apart.
        """
        row = as_row(row)
        text, _ = self._render(row, generation_prompt)
        # the same row, with each control token that it spells broken by a private-use character that it does not have
        data = row.to_json()
        used = set(json.dumps(data, ensure_ascii=False))
        marker = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        data = _map_strings(data, lambda text: self._literals.sub(lambda m: m[0][0] + marker + m[0][1:], text))
        tools = tuple(data["tools"]) if row.tools else None
        schema = data.get("response_format")
        marked = replace(row, messages=tuple(data["messages"]), tools=tools, response_format=schema)
        broken = self._render(marked, generation_prompt)[0]
        parts: list[tuple[bool, str]] = []
        end = 0
        for match in self._literals.finditer(broken):
            parts += [(False, broken[end : match.start()].replace(marker, "")), (True, match[0])]
            end = match.end()
        parts.append((False, broken[end:].replace(marker, "")))
        if "".join(part for _, part in parts) != text:
            raise RowError("the template changes texts that spell control tokens", place=row.place)
        ids, offsets = offsets_of(self.tokenizer, [text])[0]
        segments: list[TemplateSegment] = []
        position = token = 0
        for control, part in parts:
            position += len(part)
            first = token
            while token < len(ids) and offsets[token][0] < position:
                token += 1
            segments.append(TemplateSegment(control, part, ids[first:token]))
        return segments

    def control_literals(self, row: Row | Mapping[str, Any]) -> list[str]:
        """Return the control tokens that the row's own texts spell: this backend would encode them as control ids."""
        row = as_row(row)
        return [literal for text in _strings(row.to_json()) for literal in self._literals.findall(text)]

    def spells_control(self, text: str) -> bool:
        """Return whether a text spells a token that the tokenizer would take for a control or added token."""
        return bool(self._literals.search(text))

    @cached_property
    def _added(self) -> Mapping[int, str]:
        """The added tokens by id, in a dict: transformers makes a thousand objects of them at each access."""
        return {token_id: token.content for token_id, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def added_ids(self) -> Mapping[str, int]:
        """The ids of the added tokens, by literal."""
        return {literal: token for token, literal in self._added.items()}

    @cached_property
    def _literals(self) -> re.Pattern[str]:
        tokens = sorted(set(self._added.values()), key=len, reverse=True)
        # without tokens, a pattern that matches nothing
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def printed_unknowns(self, rows: Iterable[Row]) -> list[str]:
        """Return the names of undefined variables that the template prints for some rows that it renders.

        Raises:
            RenderError: If a rendering fails.
        """
        conversations = [[_plain(message) for message in row.messages] for row in rows]
        variables = self.tokenizer.special_tokens_map
        question = {"source": self.source, "conversations": conversations, "variables": variables}
        return list(ask({"asked": "unknowns", **question})["names"])

    def _render(
        self, row: Row, generation_prompt: bool = False, *, mark: bool = False
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """Return the text of a row, and the spans of its generation blocks; None if they change the text."""
        if not row.kind.is_chat:
            # a template may write any role that it is given
            raise RowError(
                f"{row.kind.title}, which no chat template renders",
                place=row.place,
                next_step="Train with backend: mistral-common.",
            )
        source = self.tool_source if row.tools else self.source
        variables = {"add_generation_prompt": generation_prompt, **self.tokenizer.special_tokens_map}
        if row.reasoning_effort is not None:
            if "reasoning_effort" not in source:
                raise RowError("the chat template has no reasoning_effort, and the row sets it", place=row.place)
            variables["reasoning_effort"] = row.reasoning_effort
        if row.response_format is not None:
            # a template that does not read it renders the row as mistral-common does without a json_schema builder
            variables["response_format"] = row.response_format
        question = {
            "asked": "mark" if mark else "render",
            "source": source,
            "messages": [_plain(message) for message in row.messages],
            "tools": list(row.tools) if row.tools else None,
            "variables": variables,
        }
        try:
            if self._overrun is not None:
                raise self._overrun
            found = ask(question)
        except RenderError as error:
            # a template that exceeded its bounds is not run again: each row would take as long
            self._overrun = error if error.kind == "overrun" else None
            # an error that the template raised itself does not name the template
            refused = "" if error.found.startswith("the chat template ") else REFUSES
            raise RowError(f"{refused}{error.found}", place=row.place) from error
        return found["text"], found["spans"]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out nulls, which templates print as `None`, and weights, which mistral-common does not render either."""
    given = {key: value for key, value in message.items() if value is not None and key != "weight"}
    return {**given, "content": native_content(given["content"])} if "content" in given else given


def _weights(row: Row, blocks: int) -> list[int] | None:
    """Return the weight of each generation block, or None if the blocks cannot be matched with the row's turns."""
    weighted = list(zip(row.messages, row.trained_weights(), strict=True))
    assistants = [weight for message, weight in weighted if message["role"] == "assistant"]
    if blocks == len(assistants):
        return assistants
    runs = [
        {weight for _, weight in run}
        for role, run in itertools.groupby(weighted, key=lambda one: one[0]["role"])
        if role == "assistant"
    ]
    if blocks != len(runs) or any(len(weights) > 1 for weights in runs):
        return None
    return [weights.pop() for weights in runs]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (*_strings(key), *_strings(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
