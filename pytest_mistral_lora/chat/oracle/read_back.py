"""Ids read back into a row: the inverse of `Oracle.encode`.

The markers of the tokenizer's version cut the ids into turns, and each text is decoded as it was encoded: by itself.
The result is a proposal, whatever made the ids. Encode it: equal ids prove that they are Mistral's, and its spans own
the tokens. Other ids show their fault as a difference, so reading is lenient: a control token at a wrong place is read
as the text that spells it, and a missing EOS ends a turn as well as a written one.

Some facts of a row leave no trace in its ids:

- weights: labels give them. A turn without a label is read as an answer of weight 0;
- the system prompt, in versions that write it into a turn of the user: it is read as text of that turn, unless two
  turns of the user follow each other, which only a system message between them makes;
- U+2581, which SentencePiece writes for a space: it is read as one. At the end of an answer, where most versions write
  no space, it looks like the space of a wrong template;
- ids of calls, if the version does not write them;
- where the prompt of a fill-in-the-middle row ends, and its completion begins: the first label gives it;
- in versions that spell their markers: which of the markers in a run of text are text. Labels decide if several
  conversations have the same ids;
- calls and results before the last question, if the version leaves them out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pytest_mistral_lora.chat.chunks.registry import block_types, chunk_types, is_block
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.fields import check_tools
from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import MistralLoraError, RowError, shortened
from pytest_mistral_lora.places import NOWHERE, Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.chunks.chunk_type import ImageSizes
    from pytest_mistral_lora.chat.oracle.oracle import Oracle

_BLOCKS = {
    "[AVAILABLE_TOOLS]": "[/AVAILABLE_TOOLS]",
    "[MODEL_SETTINGS]": "[/MODEL_SETTINGS]",
    "[SYSTEM_PROMPT]": "[/SYSTEM_PROMPT]",
    "[INST]": "[/INST]",
    "[TOOL_RESULTS]": "[/TOOL_RESULTS]",
}
"""The markers that open a part of the prompt, each with the one that closes it; anything else is an answer."""
OPENING = frozenset(_BLOCKS)
"""The markers that open a part of the prompt."""

_ASKING, _ASKED = "[INST] ", " [/INST]"
"""The markers of a version that spells them, with the spaces that belong to them."""
EMPTY_ANSWER = "the answer is empty: nothing but </s>"
_MOST_CUTS = 512
"""Most places to try as the end of a chunk that is not closed."""


class UnreadableIdsError(MistralLoraError):
    """Ids that are not a conversation of the tokenizer's version.

    Args:
        token: Index of the first token that cannot be read; the number of ids if they end too early.
        found: What was read there.
        expected: What the version writes there.

    Attributes:
        token: As above.
    """

    def __init__(self, token: int, found: str, expected: str) -> None:
        self.token: int = token
        super().__init__(found, place=NOWHERE.at_token(token), expected=expected)


class _Part(NamedTuple):
    """A control token, or a run of text.

    Attributes:
        marker: The control token; empty for text.
        ids: The tokens.
        start: Index of the first one.
    """

    marker: str
    ids: tuple[int, ...]
    start: int


class _Answer(NamedTuple):
    """A turn of the assistant.

    Attributes:
        message: Index of its message.
        start: Its first token.
        end: One past its last token.
    """

    message: int
    start: int
    end: int


def read_back(
    ids: Sequence[int], oracle: Oracle, labels: Sequence[int] | None = None, *, place: Place = NOWHERE
) -> Row:
    """Return the row that some ids are an encoding of, or the one that explains them best.

    Args:
        ids: The ids of one conversation, without padding.
        oracle: Mistral's own tokenization.
        labels: Their labels, for the weights of the answers; None to give each answer the weight 1, or to answers that
            follow each other the weights 1 and 0 in turn.
        place: The place of the row, for its errors.

    Raises:
        UnreadableIdsError: If no conversation explains the ids.
    """
    for kind in KINDS.values():
        if kind.claims_ids(ids, oracle):
            return kind.read_ids(ids, oracle, labels, place)
    reader = _IdsReader(tuple(ids), oracle, labels)
    if oracle.facts.control_tokens:
        reader.read_markers()
    else:
        reader.read_spelled_markers()
    return reader.row(place)


class _IdsReader:
    """The reader of the ids of one conversation."""

    def __init__(self, ids: tuple[int, ...], oracle: Oracle, labels: Sequence[int] | None) -> None:
        self._ids = ids
        self._oracle = oracle
        self._facts = oracle.facts
        self._labels = labels
        self._parts = list(_parts_of(ids, oracle))
        self._at = next((n for n, part in enumerate(self._parts) if part.ids[0] != oracle.bos_id), len(self._parts))
        self._starts_with_bos = self._at > 0
        self._marked = {kind.literals[0]: kind for kind in chunk_types().values() if kind.is_written_by(self._facts)}
        sizes = oracle.image_sizes
        self._blocks = {} if sizes is None else block_types()
        self._messages: list[dict[str, Any]] = []
        self._tools: list[Any] | None = None
        self._settings: dict[str, Any] = {}
        self._answers: list[_Answer] = []
        self._call_ids: list[str] = []
        self._calls = 0
        self._empty_answer: int | None = None
        self._messages_before_empty = 0
        # the first empty answer between two questions: without it, the two would be read as one
        self._unanswered: int | None = None
        self._followed_by_user: list[int] = []

    def row(self, place: Place) -> Row:
        """Return the row of the messages that were read."""
        is_answered = bool(self._answers) and self._messages[-1]["role"] == "assistant"
        unanswered = self._unanswered if is_answered else self._empty_answer
        if unanswered is not None:
            raise UnreadableIdsError(unanswered, EMPTY_ANSWER, "the text of an answer")
        if not self._messages or self._messages[-1]["role"] != "assistant":
            ended = f"the ids end after a turn of {self._messages[-1]['role']}" if self._messages else "no turn"
            raise UnreadableIdsError(len(self._ids), ended, "an answer of the assistant")
        self._weigh_answers()
        self._part_users()
        self._join_calls()
        schema = self._settings.get("json_schema")
        response_format = None
        if schema is not None:
            response_format = {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}
        return Row(
            tuple(self._messages),
            tuple(self._tools) if self._tools else None,
            place,
            self._settings.get("reasoning_effort"),
            response_format,
        )

    def read_markers(self) -> None:
        """Read the turns of a version whose markers are control tokens.

        Raises:
            UnreadableIdsError: At the first token that cannot be read.
        """
        self._refuse_other_start()
        while self._at < len(self._parts):
            opening = self._parts[self._at]
            if opening.marker not in _BLOCKS:
                self._read_answer()
                continue
            inside = self._inside_block(opening)
            if opening.marker == "[AVAILABLE_TOOLS]":
                self._read_tools(inside, opening)
            elif opening.marker == "[MODEL_SETTINGS]":
                self._read_settings(inside, opening)
            elif opening.marker == "[SYSTEM_PROMPT]":
                self._messages.append({"role": "system", "content": self._content(inside)})
            elif opening.marker == "[INST]":
                self._add_user(self._content(inside))
            else:
                self._read_result(inside, opening)

    def _refuse_other_start(self) -> None:
        """Refuse ids that do not start like a conversation.

        Raises:
            UnreadableIdsError: If they do not.
        """
        first = self._parts[self._at] if self._at < len(self._parts) else None
        expected = "[INST]" if self._facts.opens_with_user else "[SYSTEM_PROMPT] or [INST]"
        expected = expected if self._starts_with_bos else "<s>"
        if first is None:
            raise UnreadableIdsError(len(self._ids), "the ids end before the first turn", expected)
        # without BOS, a text is the rest of a row that was cut
        if first.marker not in _BLOCKS and (self._facts.opens_with_user or not self._starts_with_bos):
            raise UnreadableIdsError(first.start, self._shown(first), expected)

    def _inside_block(self, opening: _Part) -> list[_Part]:
        """Return the parts between two markers, and go on behind the second.

        Raises:
            UnreadableIdsError: If the block is not closed.
        """
        closing = _BLOCKS[opening.marker]
        self._at += 1
        start = self._at
        while self._at < len(self._parts):
            self._at += 1
            if self._parts[self._at - 1].marker == closing:
                return self._parts[start : self._at - 1]
        found = f"the ids end within the part after the {opening.marker} at token {opening.start}"
        raise UnreadableIdsError(len(self._ids), found, closing)

    def _add_user(self, content: Any) -> None:
        if self._messages and self._messages[-1]["role"] == "user":
            if self._empty_answer is None:
                self._followed_by_user.append(len(self._messages) - 1)
            elif self._unanswered is None and self._messages_before_empty == len(self._messages):
                self._unanswered = self._empty_answer
        if not isinstance(content, str) and self._facts.system_in != "own-turn" and is_block(content[-1]):
            # only a system prompt stands in front of a block that mistral-common has put before the texts
            text = "".join(chunk.get("text", "") for chunk in content[:-1])
            if text.endswith("\n\n") and not any(map(is_block, content[:-1])):
                self._messages.append({"role": "system", "content": text.removesuffix("\n\n")})
                content = content[-1:]
        self._messages.append({"role": "user", "content": content})

    def _read_tools(self, inside: list[_Part], opening: _Part) -> None:
        tools = self._json(inside, opening)
        try:
            check_tools(tools, NOWHERE / "tools")
        except RowError as error:
            found = f"{error.place}: {error.found}"
            raise UnreadableIdsError(opening.start, found, "the JSON of a list of tools") from error
        if self._tools is None:
            self._tools = tools

    def _read_settings(self, inside: list[_Part], opening: _Part) -> None:
        settings = self._json(inside, opening)
        effort = settings.get("reasoning_effort") if isinstance(settings, dict) else None
        schema = settings.get("json_schema") if isinstance(settings, dict) else None
        if not isinstance(settings, dict) or not isinstance(effort, str | None) or not isinstance(schema, dict | None):
            raise UnreadableIdsError(opening.start, shortened(settings), "the JSON of the model's settings")
        self._settings = self._settings or settings

    def _read_result(self, inside: list[_Part], opening: _Part) -> None:
        """Read a result in the form of the version: JSON with a name or an id, an id and a text, or a text."""
        form = self._facts.results_as
        message: dict[str, Any] = {"role": "tool"}
        if form in ("name", "id"):
            data = self._json(inside, opening)
            if form == "name" and isinstance(data, list) and len(data) == 1:
                [data] = data
            key = "name" if form == "name" else "call_id"
            if not isinstance(data, dict) or "content" not in data or not isinstance(data.get(key), str | None):
                expected = f"the JSON of a result: content and {key}"
                raise UnreadableIdsError(opening.start, shortened(data), expected)
            # a text that is JSON is parsed once more when it is encoded
            message["content"] = json.dumps(data["content"], ensure_ascii=False)
            if data.get(key) is not None:
                message["tool_call_id" if form == "id" else "name"] = data[key]
        elif form == "id-and-text":
            at = next((n for n, part in enumerate(inside) if part.marker == "[TOOL_CONTENT]"), None)
            if at is None:
                raise UnreadableIdsError(
                    opening.start, "a result without its call's id", "[TOOL_CONTENT] behind the id"
                )
            message["tool_call_id"] = self._text(inside[:at])
            message["content"] = self._text(inside[at + 1 :])
        else:
            # results follow in the order of the calls
            message["tool_call_id"] = self._call_ids.pop(0) if self._call_ids else self._new_call_id()
            message["content"] = self._text(inside)
        self._messages.append(message)

    def _new_call_id(self) -> str:
        self._calls += 1
        return f"call{self._calls:05}"

    def _read_answer(self) -> None:
        """Read a turn of the assistant up to its EOS, or up to the next turn if it has none."""
        start = self._parts[self._at].start
        inside: list[_Part] = []
        calls: list[dict[str, Any]] = []
        while self._at < len(self._parts):
            part = self._parts[self._at]
            if part.marker in _BLOCKS:
                break
            self._at += 1
            if part.ids[0] == self._oracle.eos_id:
                break
            if part.marker == "[TOOL_CALLS]":
                calls += self._read_calls(part)
            else:
                inside.append(part)
        content = self._content(inside)
        self._add_answer(content, calls, start)

    def _add_answer(self, content: Any, calls: list[dict[str, Any]], start: int) -> None:
        spoken = content
        if self._facts.strips_answers and isinstance(content, str):
            spoken = content.strip(" ")
        if not calls and not spoken:
            # nobody writes an empty answer: the row is read without it
            self._empty_answer, self._messages_before_empty = start, len(self._messages)
            return
        message: dict[str, Any] = {"role": "assistant"}
        if content:
            message["content"] = content
        if calls:
            message["tool_calls"] = calls
            # the results of several turns of calls follow the last of them
            known = self._call_ids if self._messages and self._messages[-1]["role"] == "assistant" else []
            self._call_ids = known + [call["id"] for call in calls if "id" in call]
        end = self._parts[self._at].start if self._at < len(self._parts) else len(self._ids)
        self._answers.append(_Answer(len(self._messages), start, end))
        self._messages.append(message)

    def _read_calls(self, opening: _Part) -> Iterator[dict[str, Any]]:
        """Yield the calls behind a `[TOOL_CALLS]`, in the form of the version."""
        runs = [(opening, self._parts_of_call())]
        if self._facts.calls_as == "markers":
            while self._at < len(self._parts) and self._parts[self._at].marker in ("[CALL_ID]", "[ARGS]"):
                self._at += 1
                runs.append((self._parts[self._at - 1], self._parts_of_call()))
            texts = {marker.marker: self._text(inside) for marker, inside in runs}
            if "[ARGS]" not in texts:
                raise UnreadableIdsError(opening.start, "a call without arguments", "[ARGS] behind the tool's name")
            missing = "null" if self._facts.writes_call_ids else self._new_call_id()
            yield _call(texts["[TOOL_CALLS]"], texts["[ARGS]"], texts.get("[CALL_ID]", missing))
            return
        calls = self._json(runs[0][1], opening)
        for call in calls if isinstance(calls, list) and calls else [calls]:
            name = call.get("name") if isinstance(call, dict) else None
            call_id = call.get("id") if isinstance(call, dict) else None
            if not isinstance(name, str) or "arguments" not in call or not isinstance(call_id, str | None):
                expected = "the JSON of a list of calls: name and arguments"
                raise UnreadableIdsError(opening.start, shortened(call), expected)
            if call_id is None and self._facts.writes_call_ids:
                call_id = "null"
            # arguments that are a text are parsed once more when they are encoded
            yield _call(name, json.dumps(call["arguments"], ensure_ascii=False), call_id)

    def _parts_of_call(self) -> list[_Part]:
        """Return the parts up to the next marker of a call or the end of the turn."""
        start = self._at
        ends = {"[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", *_BLOCKS}
        while self._at < len(self._parts):
            part = self._parts[self._at]
            if part.marker in ends or part.ids[0] == self._oracle.eos_id:
                break
            self._at += 1
        return self._parts[start : self._at]

    def _content(self, inside: list[_Part]) -> Any:
        """Return the content of a message: a text, or chunks if a part of it has markers of its type."""
        if not any(part.marker in self._marked or part.marker in self._blocks for part in inside):
            return self._text(inside)
        chunks: list[dict[str, Any]] = []
        at = 0
        while at < len(inside):
            if inside[at].marker in self._blocks:
                chunk, length = self._read_block(inside[at:])
                chunks.append(chunk)
                at += length
                continue
            kind = self._marked.get(inside[at].marker)
            at += kind is not None
            ends = {*self._marked, *self._blocks, *(kind.literals if kind is not None else ())}
            end = next((n for n in range(at, len(inside)) if inside[n].marker in ends), len(inside))
            run = inside[at:end]
            at = end
            if kind is None:
                chunks.append({"type": "text", "text": self._text(run)})
            elif end < len(inside) and inside[end].marker == kind.literals[-1]:
                chunks.append(kind.from_ids(self._text(run), closed=True))
                at += 1
            else:
                opened, text = self._cut_open(run)
                chunks.append(kind.from_ids(opened, closed=False))
                if text:
                    chunks.append({"type": "text", "text": text})
        return chunks

    def _read_block(self, parts: Sequence[_Part]) -> tuple[dict[str, Any], int]:
        """Return the chunk of the block at the beginning of some parts, and the number of its parts.

        Raises:
            UnreadableIdsError: If it is no whole block.
        """
        kind, sizes = self._blocks[parts[0].marker], self._oracle.image_sizes
        literals = [part.marker for part in takewhile(lambda part: part.marker in kind.block, parts)]
        try:
            return kind.read(literals, cast("ImageSizes", sizes))
        except ValueError as error:
            raise UnreadableIdsError(parts[0].start, str(error), f"the block of an {kind.title}") from error

    def _cut_open(self, run: list[_Part]) -> tuple[str, str]:
        """Return a chunk that is not closed, and the text behind it: two texts, with no token between them."""
        whole = self._text(run)
        if len(run) != 1:
            return whole, ""
        ids = run[0].ids
        encoded = self._oracle.encode_text(whole)
        if encoded == ids:
            return whole, ""
        # up to the word that holds the cut, the whole is encoded like its parts
        same = next((n for n, pair in enumerate(zip(encoded, ids, strict=False)) if pair[0] != pair[1]), len(ids))
        for cut in range(max(1, same - 4), min(len(ids), same + _MOST_CUTS)):
            opened, text = self._oracle.decode(ids[:cut]), self._oracle.decode(ids[cut:])
            if self._oracle.encode_text(opened) + self._oracle.encode_text(text) == ids:
                return opened, text
        return whole, ""

    def _text(self, inside: Sequence[_Part]) -> str:
        """Return the text of some parts: control tokens among them are read as text."""
        if len(inside) == 1 and not inside[0].marker:
            return self._oracle.decode(inside[0].ids)
        text = ""
        for number, part in enumerate(inside):
            if part.marker:
                text += part.marker
            elif number:
                # not at the start of a text, SentencePiece puts no space before it
                text += self._oracle.decode((*self._oracle.encode_text("a"), *part.ids)).removeprefix("a")
            else:
                text = self._oracle.decode(part.ids)
        return text

    def _json(self, inside: Sequence[_Part], opening: _Part) -> Any:
        """Return the value of a JSON text.

        Raises:
            UnreadableIdsError: If the text is not JSON.
        """
        text = self._text(inside)
        try:
            # as mistral-common reads it: NaN, infinity and repeated keys are allowed
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UnreadableIdsError(opening.start, shortened(text), f"JSON behind {opening.marker}") from error

    def _shown(self, part: _Part) -> str:
        """Return the beginning of a part, for an error."""
        return part.marker or f"the text {shortened(self._oracle.decode(part.ids[:20]))}"

    def _weigh_answers(self) -> None:
        """Give each answer without a label the weight 0, if another answer has labels."""
        if self._labels is not None:
            trained = [any(self._has_label(n) for n in range(*answer[1:])) for answer in self._answers]
            for answer, has_labels in zip(self._answers, trained, strict=True):
                if not has_labels and any(trained):
                    self._messages[answer.message]["weight"] = 0
            return
        for before, answer in pairwise(self._answers):
            if before.message + 1 == answer.message and "weight" not in self._messages[before.message]:
                # mistral-common joins answers of equal weight
                self._messages[answer.message]["weight"] = 0

    def _has_label(self, token: int) -> bool:
        labels = self._labels or ()
        return token < len(labels) and labels[token] != IGNORE_INDEX

    def _part_users(self) -> None:
        """Put a system message between turns of the user that follow each other, if their text begins with a prompt."""
        if self._facts.system_in == "own-turn" or not self._followed_by_user:
            return
        users = [n for n, message in enumerate(self._messages) if message["role"] == "user"]
        holder = self._messages[users[0 if self._facts.system_in == "first-user-turn" else -1]]
        if not isinstance(holder["content"], str):
            return
        prompt, joint, text = holder["content"].partition("\n\n")
        if not prompt or not joint:
            return
        holder["content"] = text
        for number, before in reversed([*enumerate(self._followed_by_user)]):
            self._messages.insert(before + 1, {"role": "system", "content": "" if number else prompt})

    def _join_calls(self) -> None:
        """Join calls of equal weight that follow each other, as mistral-common does: they are the calls of one turn."""
        messages: list[dict[str, Any]] = []
        for message in self._messages:
            before = messages[-1] if messages else {}
            with_calls = "tool_calls" in before and "tool_calls" in message
            if with_calls and "content" not in message and before.get("weight") == message.get("weight"):
                before["tool_calls"] += message["tool_calls"]
            else:
                messages.append(message)
        self._messages = messages

    def read_spelled_markers(self) -> None:
        """Read the turns of a version that spells its markers as text.

        Raises:
            UnreadableIdsError: At the first token that cannot be read.
        """
        while self._at < len(self._parts):
            start = self._parts[self._at].start
            end = next(
                (n for n in range(self._at, len(self._parts)) if self._parts[n].ids[0] == self._oracle.eos_id),
                len(self._parts),
            )
            inside = self._parts[self._at : end]
            self._at = min(end + 1, len(self._parts))
            self._read_run(inside, start)

    def _read_run(self, inside: list[_Part], start: int) -> None:
        """Read the text up to an EOS: a question and its answer, or an answer that follows another one."""
        text = self._text(inside)
        ids = tuple(token for part in inside for token in part.ids)
        follows = bool(self._messages) and self._empty_answer is None
        if not text:
            self._add_answer("", [], start)
            return
        found = [cut for cut in _spelled_cuts(text, follows=follows) if self._encodes_to(cut, ids)]
        fitting = [cut for cut in found if self._fits_labels(cut, start, len(ids))]
        if fitting or found:
            question, answer = (fitting or found)[0]
        else:
            question, answer = self._any_cut(text, start, follows=follows)
        if question is not None:
            self._messages.append({"role": "user", "content": question})
        self._add_answer(answer, [], start + self._question_length(question))

    def _encodes_to(self, cut: tuple[str | None, str], ids: tuple[int, ...]) -> bool:
        question, answer = cut
        asked = () if question is None else self._oracle.encode_text(f"{_ASKING}{question}{_ASKED}")
        return asked == ids[: len(asked)] and self._oracle.encode_text(answer) == ids[len(asked) :]

    def _fits_labels(self, cut: tuple[str | None, str], start: int, length: int) -> bool:
        """Return whether the answer has labels and the question has none."""
        asked = self._question_length(cut[0])
        return all(self._has_label(start + n) is (n >= asked) for n in range(length))

    def _question_length(self, question: str | None) -> int:
        return 0 if question is None else len(self._oracle.encode_text(f"{_ASKING}{question}{_ASKED}"))

    def _any_cut(self, text: str, start: int, *, follows: bool) -> tuple[str | None, str]:
        """Return the question and the answer of a text that mistral-common does not write.

        Raises:
            UnreadableIdsError: If it has no question.
        """
        opening, closing = _ASKING.strip(), _ASKED.strip()
        stripped = text.lstrip()
        if not stripped.startswith(opening):
            if follows:
                return None, text
            expected = opening if start or self._starts_with_bos else "<s>"
            raise UnreadableIdsError(start, f"the text {shortened(text)}", expected)
        question, marker, answer = stripped.removeprefix(opening).partition(closing)
        if not marker:
            raise UnreadableIdsError(len(self._ids), f"the ids end within the part after {opening}", closing)
        return question.removeprefix(" ").removesuffix(" "), answer.removeprefix(" ")


def _call(name: str, arguments: str, call_id: str | None) -> dict[str, Any]:
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if call_id is None else {"id": call_id, **call}


def _spelled_cuts(text: str, *, follows: bool) -> Iterator[tuple[str | None, str]]:
    """Yield each pair of a question and an answer that a text of spelled markers can be.

    Args:
        text: The text up to an EOS.
        follows: Whether an answer comes before it: then it may be an answer alone, without a question.
    """
    if text.startswith(_ASKING):
        # one space between question and answer: SentencePiece puts it before each text
        at = text.find(f"{_ASKED} ", len(_ASKING))
        while at >= 0:
            answer = text[at + len(_ASKED) + 1 :]
            if answer:
                yield text[len(_ASKING) : at], answer
            at = text.find(f"{_ASKED} ", at + 1)
    if follows:
        yield None, text


def _parts_of(ids: tuple[int, ...], oracle: Oracle) -> Iterator[_Part]:
    """Yield the control tokens of some ids, and the runs of text between them."""
    markers = oracle.markers
    start = 0
    for is_marker, group in groupby(ids, markers.__contains__):
        run = tuple(group)
        if is_marker:
            yield from (_Part(markers[token], (token,), start + n) for n, token in enumerate(run))
        else:
            yield _Part("", run, start)
        start += len(run)
