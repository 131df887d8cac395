"""Known answers through the parsers of an installed server: as for runners, in another process, with a time limit.

The script gets the path of a JSON file with `tokenizer`, `has_thinking` and `answers`, each with `request`,
`prompt_ids` and `answer_ids`; and the path of the file to write: `version`, and in `answers` for each its message
`whole`, and its `streams`, each with the place of its `cut`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.tokenizer_file import TEKKEN
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.known_answers import KnownAnswer

if TYPE_CHECKING:
    from pytest_mistral_lora.serving.answers import ServedAnswer
    from pytest_mistral_lora.serving.forced_answers import ForcedAnswer
    from pytest_mistral_lora.serving.server import Server

SECONDS = 900.0
"""Time limit for all answers: to import a server takes a minute or two on a busy machine."""

_STREAMED = "streamed"
_QUIET = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, slots=True)
class ParsedAnswers:
    """What parsers make of known answers.

    Attributes:
        version: The version of the server.
        answers: The answers, in order.
    """

    version: str
    answers: tuple[ForcedAnswer, ...]


def parse_answers(server: Server, python: Path, oracle: Oracle, answers: Sequence[KnownAnswer]) -> ParsedAnswers:
    """Give the ids of known answers to the parsers of a server, whole, token by token, and cut in two at each place.

    The parsers are those of Mistral's tool calls, and of its thinking if the tokenizer has thinking. A request that
    they cannot prepare fails, as it does in the server.

    Args:
        server: The kind of server, which has parsers.
        python: The Python of the environment that the server is installed in.
        oracle: The tokenizer.
        answers: The answers, which fit it.

    Raises:
        RunnerError: If the server is not installed there, takes too long, or ends with an error.
    """
    assert server.parsers is not None
    from pytest_mistral_lora.runners.process import run_limited
    from pytest_mistral_lora.serving.forced_answers import request_of

    asked = [
        {
            "request": request_of(known),
            "prompt_ids": known.prompt_ids(oracle),
            "answer_ids": known.answer_ids(oracle),
        }
        for known in answers
    ]
    with tempfile.TemporaryDirectory(prefix="mistral-parsers-") as temporary:
        given, made = Path(temporary) / "answers.json", Path(temporary) / "messages.json"
        settings = {"tokenizer": str(_tokenizer_folder(oracle, temporary)), "has_thinking": oracle.features.thinking}
        write_text(given, json.dumps({**settings, "answers": asked}))
        # these variables are for this Python: another one would import this one's packages
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        command = [python.absolute(), server.parsers.script, given, made]
        environment |= {**_QUIET, **server.parsers.environment}
        words = list(map(str, command))
        ended = run_limited(words, seconds=SECONDS, folder=Path(temporary), environment=environment)
        if ended.code:
            expected = f"a Python that has {server.title}"
            raise RunnerError(f"{server.title} {ended.reason}", place=str(python), expected=expected)
        if not made.is_file():
            raise RunnerError("it wrote no file", place=str(python), expected="the messages of the answers")
        return _read(made, oracle, answers)


def _tokenizer_folder(oracle: Oracle, parent: str) -> Path:
    """Return a folder with the tokenizer file alone, under a name by which mistral-common finds it."""
    folder = Path(parent) / "tokenizer"
    folder.mkdir()
    name = TEKKEN if oracle.kind == "tekken" else f"tokenizer{''.join(oracle.path.suffixes[-2:])}"
    shutil.copyfile(oracle.path, folder / name)
    return folder


def _read(file: Path, oracle: Oracle, answers: Sequence[KnownAnswer]) -> ParsedAnswers:
    from pytest_mistral_lora.serving.forced_answers import ForcedAnswer

    made = read_json(file)
    parsed = []
    for known, message in zip(answers, made["answers"], strict=True):
        ids = known.answer_ids(oracle)
        streams = {_way_of(stream["cut"]): _served(stream, ids) for stream in message["streams"]}
        whole, stream = _served(message["whole"], ids), streams.pop(_STREAMED)
        parsed.append(ForcedAnswer(known, ids, "parsed", whole=whole, stream=stream, cuts=streams))
    return ParsedAnswers(made["version"], tuple(parsed))


def _way_of(cut: int | None) -> str:
    return _STREAMED if cut is None else f"streamed with a cut before token {cut}"


def _served(data: Mapping[str, Any], ids: tuple[int, ...]) -> ServedAnswer:
    from pytest_mistral_lora.serving.answers import ServedAnswer, ServedCall

    if "error" in data:
        return ServedAnswer(failed=data["error"])
    calls = tuple(ServedCall(call["name"] or "", call["arguments"] or "") for call in data["calls"])
    return ServedAnswer(data["content"] or "", ids, calls=calls, thinking=data["reasoning"] or "")
