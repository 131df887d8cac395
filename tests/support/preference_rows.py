"""Pairs of each shape that trainers treat in a way of their own: turns, texts, markers, tools and results."""

from __future__ import annotations

from preference_records import Data, pair, said, texts_pair

SIDES = ("chosen", "rejected")

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
RESULT = {"role": "tool", "content": "The sky is clear.", "tool_call_id": "abcdefghi"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
GRASS = [said("user", "Which colour is grass?"), said("assistant", "Green."), said("user", "And the sky?")]

ROWS: dict[str, Data] = {
    "one turn": texts_pair("Which colour is the sky?", "Blue.", "I do not know."),
    "two turns": pair(GRASS, [said("assistant", "Blue.")], [said("assistant", "Red.")]),
    "system": pair([said("system", "Be brief."), *GRASS], [said("assistant", "Blue.")], [said("assistant", "Red.")]),
    "one begins like the other": texts_pair("What is it?", "It is a bird.", "It is a bee."),
    "one is the beginning of the other": texts_pair("What is it?", "It is a bird of prey", "It is a bird"),
    "lines": texts_pair("Write a list.", "- one\n- two\n", "one, two"),
    "scripts": texts_pair("你好 🦥", "Grüße, 世界.", "Привет."),
    "call": pair([said("user", "Is it warm in Rome?")], [CALLED], [said("assistant", "I cannot know.")], [TOOL]),
    "result in the prompt": pair(
        [said("user", "Is it warm?"), CALLED, RESULT], [said("assistant", "It is.")], [said("assistant", "No.")], [TOOL]
    ),
    "control text in the prompt": texts_pair("What is </s> and [/INST]?", "Markers.", "Nothing."),
    "control text in the answer": texts_pair("What ends an answer?", "</s>", "A full stop."),
    "spaces behind an answer": texts_pair("Which colour?", "Red.  ", "Blue."),
    "result in the answer": pair(
        [said("user", "Is it warm?")], [CALLED, RESULT, said("assistant", "It is.")], [said("assistant", "No.")], [TOOL]
    ),
}
EMPTY = texts_pair("Which colour?", "Red.", "")
"""The fourteenth pair: a bad answer without a text."""


def rated(row: Data) -> list[Data]:
    """Return the two rated answers of a pair."""
    shared = {key: row[key] for key in ("prompt", "tools") if key in row}
    return [shared | {"completion": row[side], "label": side == "chosen"} for side in SIDES]
