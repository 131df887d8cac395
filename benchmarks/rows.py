"""Rows for the benchmarks: generated ones, and real chats from a package of PyPI; the same ones in every call."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SENTENCES = (
    "Could you look over the draft that I sent you this morning?",
    "The invoice from March has not been paid, although the customer says that it was.",
    "A binary search halves the interval in every step, so it needs about log2(n) comparisons.",
    "Mix the flour with the butter, add two eggs, and let the dough rest for an hour.",
    "In 1889 the tower was the tallest building in the world; it is 330 metres high today.",
    "I am not sure whether the error comes from the driver or from the cable.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Ja, das geht: Öffne die Einstellungen und wähle »Sprache«.",
    "¿Qué tiempo hace mañana en Sevilla?",
    "First, write down what you know. Second, ask what is missing.",
    "Thanks!",
    "The train leaves at 7:45 from platform 3, and the trip takes 2 h 10 min.",
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CHATS = "chitchat-dataset==0.9.0"


def lengths(longest: int) -> Iterator[int]:
    """Yield a length for each row, in tokens: any up to the longest, all as likely, the same ones in every call."""
    generator = random.Random(0)
    while True:
        yield generator.randint(min(32, longest), longest)


def generated(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield conversations of about 250 tokens: some with a system prompt, several turns or a tool call."""
    generator = random.Random(seed)
    for _ in range(count):
        yield _conversation(generator)


def _conversation(generator: random.Random) -> dict[str, Any]:
    def text(longest: int) -> str:
        return " ".join(generator.choices(SENTENCES, k=generator.randint(1, longest)))

    messages: list[dict[str, Any]] = []
    if generator.random() < 0.4:
        messages.append({"role": "system", "content": text(3)})
    for _ in range(generator.choices((1, 2, 4), weights=(6, 3, 1))[0]):
        messages += [{"role": "user", "content": text(5)}, {"role": "assistant", "content": text(12)}]
    if generator.random() >= 0.1:
        return {"messages": messages}
    name = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=9))
    call = {"id": name, "type": "function", "function": {"name": "weather", "arguments": {"city": "Sevilla"}}}
    messages += [
        {"role": "user", "content": text(1)},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": name, "content": "21 degrees"},
        {"role": "assistant", "content": text(2)},
    ]
    return {"messages": messages, "tools": [WEATHER]}


def chats() -> Iterator[dict[str, Any]]:
    """Yield 7,168 chats between people, whoever wrote second as the assistant, in a fixed random order.

    Raises:
        SystemExit: If the package that holds them is not installed.
    """
    spec = find_spec("chitchat_dataset")  # found, not imported: its own dependencies are not needed
    if spec is None or not spec.origin:
        raise SystemExit(f"the chats are not installed. Run: pip install --no-deps {CHATS}")
    data = json.loads((Path(spec.origin).parent / "dataset.json").read_text(encoding="utf-8"))
    found = list(data.values())
    random.Random(0).shuffle(found)
    for chat in found:
        texts = ["\n".join(message["text"].strip() for message in turn).strip() for turn in chat["messages"]]
        said = texts[: texts.index("")] if "" in texts else texts
        roles = ("user", "assistant") * len(said)
        yield {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]}
