"""A served message compared with the message of the ids that the model said: the first fault of each part."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.answer_message import AnswerMessage, canonical_json
from pytest_mistral_lora.chat.diff import equal_beginning

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.serving.answers import ServedAnswer
    from pytest_mistral_lora.serving.forced_answers import ForcedAnswer

_SHOWN = 200
_BEFORE = 40
STOPPED = "stopped"
"""The part of a fault that a stop string makes."""

_STOP_FIX = "Find the stop string that each chat gets: a field `stop` of a proxy or a gateway, or a preset."
_STOP = 24
"""The most characters of a stop string that is not named."""

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class AnswerFault:
    """A part of a served message that differs from what the model said.

    Attributes:
        rule: Id of the rule.
        found: The part as the client gets it.
        expected: The part as the model said it.
        part: The part: `text`, `thinking`, or another.
        said: The text or the thinking as said, for a named deviation.
        served: The same as served.
        fix: What to look for, if the cause is known; else empty.
    """

    rule: str
    found: str
    expected: str
    part: str = field(default="", compare=False)
    said: str = field(default="", compare=False)
    served: str = field(default="", compare=False)
    fix: str = field(default="", compare=False)


def answer_faults(forced: ForcedAnswer, served: ServedAnswer, oracle: Oracle) -> Iterator[AnswerFault]:
    """Yield what is wrong with a served message: one fault for each cause.

    Args:
        forced: The known answer.
        served: What the client gets: an answer, and no refusal or failure.
        oracle: The tokenizer.
    """
    message = forced.known.message(oracle)
    if was_limited(forced, served, oracle):
        found = f"finish_reason 'length', behind {message_text(served)}: a limit of the server, or of a proxy before it"
        yield AnswerFault("ML930", found, " or ".join(sorted(_reasons(forced, message))), "finish_reason")
        return
    if rest := stopped_at(forced, served, oracle):
        by = stop_words(served.stop, served.thinking + served.text, rest)
        found = f"{message_text(served)}, which ends early, by {by}"
        yield AnswerFault("ML923", found, _said_text(message), STOPPED, fix=_STOP_FIX)
        return
    if was_replaced(forced, served, oracle):
        yield replaced_fault(forced, served, oracle)
        return
    literals = [literal for literal in oracle.control_tokens.values() if not literal.startswith("<SPECIAL")]
    said, arrived = message.text + message.thinking, served.text + served.thinking
    if any(arrived.count(literal) > said.count(literal) for literal in literals):
        # the marker of a thought or a call, which is then missing beside the text
        yield AnswerFault("ML925", message_text(served), _said_text(message), "text")
        return
    if _spelled_is_read(message, served, literals):
        yield AnswerFault("ML924", message_text(served), _said_text(message), "spelled")
        return
    if message.calls and not served.calls:
        # the text that arrives may be the call
        yield AnswerFault("ML927", message_text(served), _said_text(message), "calls")
        return
    yield from _part_faults(message, served)
    yield from _call_faults(message, served)
    # parsers leave the ids of calls and the finish_reason to their server
    if forced.way != "parsed" and len(served.calls) == len(message.calls):
        yield from _id_faults(message, served)
        yield from _finish_faults(forced, message, served)


def was_limited(forced: ForcedAnswer, served: ServedAnswer, oracle: Oracle) -> bool:
    """Return whether a limit ends an answer before the model does: what arrived is a beginning of what it says."""
    # of an answer that the request gives, the model says the end alone, in the one token that it is asked for
    if served.ended or forced.way == "forced":
        return False
    if served.ids is not None:
        return served.ids == forced.row_ids[: len(served.ids)]
    if served.count is not None:
        return served.count < len(forced.row_ids)
    message = forced.known.message(oracle)
    texts = ((message.text, served.text), (message.thinking, served.thinking))
    return not served.calls and all(said.startswith(arrived) for said, arrived in texts)


def stopped_at(forced: ForcedAnswer, served: ServedAnswer, oracle: Oracle) -> str:
    """Return the text behind the place at which a stop string ends an answer; empty if none does.

    The server shows that the model did not say its end: its tokens, or their number, are only the first ones.
    """
    message = forced.known.message(oracle)
    said, arrived = message.thinking + message.text, served.thinking + served.text
    if forced.way == "forced" or not served.ended or served.calls or not said.startswith(arrived):
        return ""
    rest = said[len(arrived) :]
    length = len(forced.row_ids)
    if served.ids is not None:
        is_beginning = served.ids == forced.row_ids[: min(len(served.ids), length - 1)]
    else:
        is_beginning = served.count is not None and served.count < length and oracle.eos_id not in _listed(served)
    literals = oracle.control_tokens.values()
    is_beginning = is_beginning and bool(stop_words(served.stop, arrived, rest))
    return rest if rest.strip() and is_beginning and not any(literal in said for literal in literals) else ""


def stop_words(stop: str, text: str, rest: str) -> str:
    """Return the stop string that ends an answer, as words; empty if none can, as each would end it earlier.

    Args:
        stop: The stop string that the server names, or nothing.
        text: The text that arrives.
        rest: The text that would follow, with which a stop string begins.
    """
    if stop:
        return f"the stop string {stop!r}"
    beginnings = (rest[:length] for length in range(1, len(rest[:_STOP]) + 1))
    is_first = any((text + beginning).find(beginning) == len(text) for beginning in beginnings)
    return f"a stop string, which is in {rest[:_STOP]!r}" if is_first else ""


def _listed(served: ServedAnswer) -> list[int | None]:
    return [step.id for step in served.steps]


def ends_early(forced: ForcedAnswer, served: ServedAnswer, oracle: Oracle) -> bool:
    """Return whether a stream breaks off: it has no `finish_reason`, and no last event or only the first letters."""
    if served.finish_reason:
        return False
    message = forced.known.message(oracle)
    is_beginning = message.text.startswith(served.text) and message.thinking.startswith(served.thinking)
    lacks_parts = (served.text, served.thinking) != (message.text, message.thinking) or bool(message.calls)
    return not served.is_whole or (is_beginning and lacks_parts and len(served.calls) < max(len(message.calls), 1))


def lost_parts(whole: ServedAnswer, stream: ServedAnswer) -> str:
    """Return a letter of a right whole answer from which on its stream lacks parts; empty if none are lost."""

    def letters(served: ServedAnswer) -> str:
        return served.thinking + served.text + "".join(call.name + call.arguments for call in served.calls)

    said, arrived = letters(whole), iter(letters(stream))
    missing, wanted = "", next(arrived, None)
    for letter in said:
        if letter == wanted:
            wanted = next(arrived, None)
        else:
            missing += letter
    # letters that the whole answer lacks are not lost; at the ends of a text white space is stripped, which is another
    # fault
    parts = ((whole.text, stream.text), (whole.thinking, stream.thinking))
    is_stripped = not missing.strip() and all(of_whole.strip() == of_stream.strip() for of_whole, of_stream in parts)
    return "" if wanted is not None or is_stripped else missing


def was_replaced(forced: ForcedAnswer, served: ServedAnswer, oracle: Oracle) -> bool:
    """Return whether the model was made to say other ids than it does by itself.

    They show it, or their number, or that the model goes on where the answer ends.
    """
    from pytest_mistral_lora.serving.forced_answers import same_ids

    if served.ids is not None:
        return not same_ids(served.ids, forced.row_ids, oracle)
    length = len(forced.row_ids)
    # of an answer that the request gives, the model says the end alone
    is_counted = forced.way != "forced" and served.count is not None
    return not served.ended or (is_counted and served.count not in (length - 1, length))


def replaced_fault(forced: ForcedAnswer, served: ServedAnswer, oracle: Oracle) -> AnswerFault:
    """Return the fault of an answer whose tokens the server's grammar replaced."""
    return AnswerFault("ML922", message_text(served), _said_text(forced.known.message(oracle)))


def message_text(served: ServedAnswer) -> str:
    """Return a served message in one line: thinking, text, calls."""
    return _joined(served.thinking, served.text, _served_calls_text(served))


def told_apart(first: ServedAnswer, second: ServedAnswer) -> tuple[str, str]:
    """Return two messages that are not the same, each in one line that shows where they differ."""
    if _parts(first)[:-1] == _parts(second)[:-1]:
        return finish_text(first), finish_text(second)
    calls = _beside(_served_calls_text(first), _served_calls_text(second), served_calls(first), served_calls(second))
    one, other = ((of.thinking, of.text, text) for of, text in zip((first, second), calls, strict=True))
    starts = [_start(*pair) for pair in zip(one, other, strict=True)]
    return _joined(*one, starts), _joined(*other, starts)


def is_same_message(first: ServedAnswer, second: ServedAnswer) -> bool:
    """Return whether two answers are the same to a client; ids of calls are made for each request."""
    return _parts(first) == _parts(second)


def _parts(served: ServedAnswer) -> tuple[Any, ...]:
    return served.text, served.thinking, served_calls(served), served.finish_reason


def finish_text(served: ServedAnswer) -> str:
    """Return the reason why an answer ended, as words."""
    return f"finish_reason {served.finish_reason or None!r}"


def _said_text(message: AnswerMessage) -> str:
    return _joined(message.thinking, message.text, _said_calls_text(message))


def _served_calls_text(served: ServedAnswer) -> str:
    return ", ".join(f"{call.name}({call.arguments})" for call in served.calls)


def _said_calls_text(message: AnswerMessage) -> str:
    return ", ".join(f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})" for call in message.calls)


def _beside(found: str, expected: str, *calls: list[tuple[str, str]]) -> tuple[str, str]:
    """Return the texts of two messages' calls; of long ones in one form, so that they differ where the calls do."""
    if max(len(found), len(expected)) <= _SHOWN:
        return found, expected
    first, second = (", ".join(f"{name}({arguments})" for name, arguments in of) for of in calls)
    return first, second


def _joined(thinking: str, text: str, calls: str, starts: Sequence[int] = (0, 0, 0)) -> str:
    parts = [
        f"thinking {_shown(thinking, starts[0])}" if thinking else "",
        f"text {_shown(text, starts[1])}" if text else "",
        f"calls {_cut(calls, starts[2])}" if calls else "",
    ]
    return ", ".join(filter(None, parts)) or "an empty message"


def shown_pair(found: str, expected: str) -> tuple[str, str]:
    """Return two texts, each quoted from near their first difference on, and cut off if it is long."""
    start = _start(expected, found)
    return _shown(found, start), _shown(expected, start)


def _shown(text: str, start: int = 0) -> str:
    return repr(_cut(text, start))


def _cut(text: str, start: int = 0) -> str:
    """Return the part of a text that is shown, from a place on."""
    end = start + _SHOWN
    return f"{'…' if start else ''}{text[start:end]}{'…' if len(text) > end else ''}"


def _start(said: str, arrived: str) -> int:
    """Return the place from which on two texts are shown, so that their first difference is among the letters."""
    same = equal_beginning(said, arrived)
    return 0 if same < _SHOWN - _BEFORE else same - _BEFORE


def _arguments(text: str) -> str:
    """Return arguments in a form that is the same for the same value; the text itself if it is not JSON."""
    try:
        return canonical_json(json.loads(text))
    except (ValueError, RecursionError):
        return f"not JSON: {text}"


def _spelled_is_read(message: AnswerMessage, served: ServedAnswer, literals: list[str]) -> bool:
    """Return whether a part of a message whose letters spell a control token is cut or read as calls."""
    is_other_call = bool(served.calls) and _said_calls(message) != served_calls(served)
    arguments = json.dumps([call.arguments for call in message.calls], ensure_ascii=False)
    if is_other_call and any(literal in arguments for literal in literals):
        return True
    # a part that is lost as a whole has another cause
    parts = ((message.text, served.text), (message.thinking, served.thinking))
    return any(
        said != arrived and (arrived or is_other_call) and any(literal in said for literal in literals)
        for said, arrived in parts
    )


def _said_calls(message: AnswerMessage) -> list[tuple[str, str]]:
    return [(call.name, canonical_json(call.arguments)) for call in message.calls]


def served_calls(served: ServedAnswer) -> list[tuple[str, str]]:
    """Return the calls of a served message, each with its name and its arguments in a form to compare."""
    return [(call.name, _arguments(call.arguments)) for call in served.calls]


def _part_faults(message: AnswerMessage, served: ServedAnswer) -> Iterator[AnswerFault]:
    if message.thinking and not served.thinking and _is_thought_in_text(message, served.text):
        # as without a parser of thinking, if markers are left out of texts: the text itself is right
        found, expected = f"the thought as text: {_shown(served.text)}", f"{_shown(message.thinking)} as thinking"
        yield AnswerFault("ML929", found, expected, "thinking", message.thinking, served.thinking)
        return
    parts = {"text": ("ML923", message.text, served.text), "thinking": ("ML929", message.thinking, served.thinking)}
    for part, (rule, said, arrived) in parts.items():
        if said != arrived:
            rule = "ML926" if _UNREADABLE in arrived else rule
            found, expected = shown_pair(arrived, said)
            yield AnswerFault(rule, f"the {part} {found}", expected, part, said, arrived)


def _is_thought_in_text(message: AnswerMessage, text: str) -> bool:
    """Return whether a text is that of a message, with the thought of the message before it."""
    thought = message.thinking.strip()
    return text.lstrip().startswith(thought) and text.lstrip().removeprefix(thought).strip() == message.text.strip()


def _call_faults(message: AnswerMessage, served: ServedAnswer) -> Iterator[AnswerFault]:
    calls, said = served_calls(served), _said_calls(message)
    if said == calls:
        return
    is_split = any(_UNREADABLE in call.arguments for call in served.calls)
    found, expected = _beside(_served_calls_text(served), _said_calls_text(message), calls, said)
    rule, start = "ML926" if is_split else "ML927", _start(found, expected)
    found, expected = _cut(found, start), _cut(expected, start)
    yield AnswerFault(rule, f"the calls {found or '(none)'}", expected or "no call", "calls")


def _id_faults(message: AnswerMessage, served: ServedAnswer) -> Iterator[AnswerFault]:
    said = [call.id for call in message.calls]
    ids = [call.id for call in served.calls]
    if all(isinstance(call_id, str) for call_id in said):
        if ids != said:
            yield AnswerFault("ML928", f"the ids of the calls {ids}", str(said), "ids")
    elif "" in ids or len(set(ids)) < len(ids):
        # the version says no ids, and the server makes them
        yield AnswerFault("ML928", f"the ids of the calls {ids}", "an id for each call, each another", "ids")


def _finish_faults(forced: ForcedAnswer, message: AnswerMessage, served: ServedAnswer) -> Iterator[AnswerFault]:
    expected = _reasons(forced, message)
    if served.finish_reason not in expected:
        named = " or ".join(sorted(expected))
        yield AnswerFault("ML930", f"finish_reason {served.finish_reason or None!r}", named, "finish_reason")


def _reasons(forced: ForcedAnswer, message: AnswerMessage) -> set[str]:
    """Return each `finish_reason` that an answer may have."""
    expected = {"tool_calls"} if message.calls else {"stop"}
    if isinstance(forced.known.settings.get("tool_choice"), dict):
        # OpenAI's own API ends a call that the request names with `stop`
        expected.add("stop")
    return expected
