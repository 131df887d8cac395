"""Compare this package with what Mistral recorded: `python scripts/mistral_recordings.py`.

mistral-common's repository has conversations with the ids of their prompts, and requests that its own tests encode.
The files are fetched at one commit, each with its SHA-256, into the cache folder ($MISTRAL_LORA_CACHE); a file that is
there is not fetched again. Names and counts go into
tests/chat/recordings.toml, and no text of the files.

The requests are Python code. It is not executed: `read_requests` accepts only calls of mistral-common's own classes
with literals.
"""

from __future__ import annotations

import ast
import http.client
import json
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct import chunk, messages, request, tool_calls
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image

from pytest_mistral_lora.chat.oracle import VERSION
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.records.files import cache_folder, write_text

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support")]

from each_oracle import oracle_named  # noqa: E402

REPOSITORY = "mistralai/mistral-common"
COMMIT = "bc022b91aa1c3b1fb771ac70931ae0009dbf9bad"
_RAW = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}"
_SECONDS = 30.0
RESULTS = ROOT / "tests" / "chat" / "recordings.toml"
"""The counts of the comparison."""

REQUESTS = "tests/integrations/chat_templates/fixtures_data.py"
_SAMPLES = "tests/data/samples"
_SAMPLE_HASHES = {
    "get_weather_full/sample.json": "fd05370847bc196bcffbadb75a14f38bb7b6e783fdd25eaba9997b53449ecee1",
    "get_weather_full/tokens_v2.json": "4a13fcb2a13dfdd9fe5e23cdef998d88a66175fc88ca90d35bd5328f2a34b95d",
    "get_weather_full/tokens_v3.json": "2fa8d80e76480c14e4fdefc095fbe0ddc9e049559ca1105263cce78bbc71b3e9",
    "get_weather_no_history/sample.json": "f106d8360487282380c44d63c4c0d348b5e8f5e25474610f2d0d898fdf8dbe8b",
    "get_weather_no_history/tokens_v2.json": "4a13fcb2a13dfdd9fe5e23cdef998d88a66175fc88ca90d35bd5328f2a34b95d",
    "get_weather_no_history/tokens_v3.json": "a3e945ec665f9fa66d360131b8fcada2ad33f3aef489bf659dd9904cf5736569",
    "get_weather_no_system_prompt/sample.json": "4b2ae5ba2cd83051899b62f1ca343537c103cd0ef6595cdab3b2b1e246087be5",
    "get_weather_no_system_prompt/tokens_v2.json": "b445730a589306134d55620fa168be0fa6df9b0f3280c5376029928460fc8b1c",
    "get_weather_no_system_prompt/tokens_v3.json": "67c646cae66b621444755d54aebaf6db5e777a05753855af89d84e9ba47acced",
    "no_tools/sample.json": "3637dd31ddfa19a91729c4d46dc56cd1c3c3026bd374bd189a7290868451deb8",
    "no_tools/tokens_v1.json": "0ea416770fb58c142b795ec0e6af276bf49350ab2f67fc6b613715213d9f8990",
    "no_tools/tokens_v2.json": "8a094ca7492b1fe454643d9a9e697fc0881d2bc645b412ef2e9de425dacec870",
    "no_tools/tokens_v3.json": "8a094ca7492b1fe454643d9a9e697fc0881d2bc645b412ef2e9de425dacec870",
    "parallel_calls/sample.json": "4586131fa7554f74fec81fdbcd3c690fe1beb01bac77c5d850b9d054ad46307d",
    "parallel_calls/tokens_v2.json": "cb3b1ad7acf30fd75ff3614eb8bba0cff2a77287454adcce091d38a68cdc96a5",
    "parallel_calls/tokens_v3.json": "0fe3f5ff73d35d056690a82e4eeeadf92c9f9b555c476c573bbb51bb637ab771",
    "several_calls/sample.json": "98a6d93f6fb66a98dc9e2e6c66244bcf62973043344f398f0110d4b71c4c68fa",
    "several_calls/tokens_v2.json": "f0e1d9c55b0522110be935545b0eefba451d7daf585775bbee4320aefd3222a0",
    "several_calls/tokens_v3.json": "0b4411fcfeaa736629bacb2ee4df4b29ba9fa6622a167f4243b1f762023238ec",
}
FILES: Mapping[str, str] = {
    REQUESTS: "e0bd69284130fff9cf754a0cfa2fb9eb408845b0f826bf6e959c85c1406b659b",
    **{f"{_SAMPLES}/{name}": digest for name, digest in _SAMPLE_HASHES.items()},
}
"""SHA-256 of each file, in hex, by its path in the repository."""

TOKENIZERS = {
    "spm-v1": "v1",
    "spm-v2": "v2",
    "spm-v3": "v3",
    "spm-v7": "v7",
    "tekken-240911": "v3",
    "derived-v7": "v7",
    "derived-v11": "v11",
    "derived-v13": "v13",
    "derived-v13-thinking": "v13",
    "derived-v15": "v15",
}
"""The tokenizers that encode the requests, with their versions."""

_CLASSES: Mapping[str, Any] = {
    name: getattr(module, name)
    for module, names in (
        (chunk, ("AudioChunk", "AudioURLChunk", "ImageChunk", "ImageURLChunk", "TextChunk", "ThinkChunk")),
        (messages, ("AssistantMessage", "SystemMessage", "ToolMessage", "UserMessage")),
        (request, ("ChatCompletionRequest",)),
        (tool_calls, ("Function", "FunctionCall", "Tool", "ToolCall")),
    )
    for name in names
}
_MEDIA = {
    "_IMAGE_URL": "https://example.org/red.png",
    "_IMAGE": Image.new("RGB", (2, 2), "red"),
    "_AUDIO_URL": "https://example.org/tone.wav",
    "_AUDIO": "https://example.org/tone.wav",
}
"""Stand-ins for the pictures and sounds, which no row can have."""


class FetchError(Exception):
    """A recording cannot be fetched, or is not the pinned one."""


def recording(path: str, *, fetch: bool) -> bytes:
    """Return a file of the repository, from the cache folder or the network.

    Args:
        path: A key of `FILES`.
        fetch: Whether the network may be asked.

    Raises:
        FetchError: If the file is not in the cache and cannot be fetched, or has another SHA-256.
    """
    kept = cache_folder() / "recordings" / COMMIT / path
    if kept.is_file() and sha256_bytes(data := kept.read_bytes()) == FILES[path]:
        return data
    if not fetch:
        raise FetchError(f"{kept} is missing: python scripts/mistral_recordings.py fetches it")
    address = f"{_RAW}/{path}"
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:
            data = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(f"{address} cannot be fetched: {error}") from error
    if sha256_bytes(data) != FILES[path]:
        raise FetchError(f"{address} has the SHA-256 {sha256_bytes(data)}, expected {FILES[path]}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(data)
    return data


def fetch_all() -> None:
    """Fetch each file that the cache folder lacks.

    Raises:
        FetchError: If a file cannot be fetched.
    """
    for path in FILES:
        recording(path, fetch=True)


@dataclass(frozen=True, slots=True)
class RecordedPrompt:
    """A conversation with the ids that Mistral recorded for it.

    Attributes:
        name: The name of the conversation and the version, such as `no_tools, v3`.
        tokenizer: The tokenizer of the version, by our name.
        row: The messages before an answer, and the tools.
        ids: The recorded ids.
    """

    name: str
    tokenizer: str
    row: Mapping[str, Any]
    ids: tuple[int, ...]


def recorded_prompts() -> Iterator[RecordedPrompt]:
    """Yield each recorded prompt of the cache folder.

    Raises:
        FetchError: If a file is missing.
    """
    for path in FILES:
        folder, _, file = path.rpartition("/")
        if not file.startswith("tokens_"):
            continue
        row = json.loads(recording(f"{folder}/sample.json", fetch=False))
        ids = json.loads(recording(path, fetch=False))["tokens"]
        version = file.removeprefix("tokens_").removesuffix(".json")
        yield RecordedPrompt(f"{folder.rpartition('/')[2]}, {version}", f"spm-{version}", row, tuple(ids))


def read_requests(source: str) -> dict[str, Any]:
    """Return the requests of mistral-common's tests, by name.

    Raises:
        ValueError: If an assignment has anything but calls of mistral-common's classes, literals and known names.
    """
    values: dict[str, Any] = dict(_MEDIA)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = _value(node.value, values)
    return {name: value for name, value in values.items() if name.startswith("REQUEST_")}


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in values:
        return values[node.id]
    if isinstance(node, ast.List):
        return [_value(item, values) for item in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = (_value(key, values) for key in node.keys if key is not None)
        return dict(zip(keys, (_value(item, values) for item in node.values), strict=True))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CLASSES and not node.args:
        given = {item.arg: _value(item.value, values) for item in node.keywords if item.arg is not None}
        if len(given) == len(node.keywords):
            return _CLASSES[node.func.id](**given)
    raise ValueError(f"line {node.lineno} has neither a literal nor a class of mistral-common: {ast.unparse(node)}")


_Ids = tuple[int, ...]
_ANSWER = {"role": "assistant", "content": "An answer."}
"""The answer that makes a row of a prompt."""
_MEDIA_CHUNKS = tuple(_CLASSES[name] for name in ("AudioChunk", "AudioURLChunk", "ImageChunk", "ImageURLChunk"))


@dataclass(frozen=True, slots=True)
class RecordingResults:
    """The classes of all comparisons.

    Attributes:
        mistral_common: The installed version of mistral-common.
        samples: The class of each recorded prompt, by its name.
        requests: The class of each request, by the tokenizer and the request's name.
    """

    mistral_common: str
    samples: Mapping[str, str]
    requests: Mapping[str, Mapping[str, str]]

    def text(self) -> str:
        """Return the text of the file of results: names and counts."""
        lines = ["# Written by scripts/mistral_recordings.py: the classes of Mistral's recordings."]
        lines += [f'repository = "{REPOSITORY}"', f'commit = "{COMMIT}"', f'mistral_common = "{self.mistral_common}"']
        lines += ["", "[samples]", *(f'"{name}" = "{found}"' for name, found in self.samples.items())]
        for tokenizer, classes in self.requests.items():
            lines += ["", f"[requests.{tokenizer}]"]
            lines += [f'"{found}" = {number}' for found, number in sorted(Counter(classes.values()).items())]
        return "\n".join(lines) + "\n"


def judged_recordings() -> RecordingResults:
    """Return the results of all recordings, with the files of the cache folder.

    Raises:
        FetchError: If a file is missing.
    """
    requests = read_requests(recording(REQUESTS, fetch=False).decode("utf-8"))
    samples = {prompt.name: _judged_prompt(prompt) for prompt in recorded_prompts()}
    return RecordingResults(
        VERSION,
        samples,
        {
            tokenizer: {name: _judged_request(name, found, tokenizer) for name, found in requests.items()}
            for tokenizer in TOKENIZERS
        },
    )


def _judged_prompt(prompt: RecordedPrompt) -> str:
    """Return the class of a recorded prompt; if it is refused here, mistral-common as it is installed is asked."""
    parts = {key: prompt.row[key] for key in ("messages", "tools") if prompt.row[key]}
    ours = _encoded(lambda: oracle_named(prompt.tokenizer).encode_prompt(_with_answer(parts)))
    if ours is not None:
        return "same" if ours == prompt.ids else "differs"
    asked = _CLASSES["ChatCompletionRequest"].model_validate(parts)
    return _class_of(ours, _encoded_by_mistral(prompt.tokenizer, ValidationMode.test, asked))


def _judged_request(name: str, asked: Any, tokenizer: str) -> str:
    """Return the class of a request: the whole row of one for training, the prompt of any other."""
    try:
        data = asked.to_openai(reasoning_field_format="thinking_chunks")
    except ImportError:
        # the sound needs a library
        return "media, refused here"
    row = {key: data[key] for key in ("messages", "tools") if data.get(key)}
    oracle = oracle_named(tokenizer)
    if "TRAIN" in name:
        mode = ValidationMode.finetuning
        ours = _encoded(lambda: oracle.encode(row).input_ids)
    else:
        mode = ValidationMode.test
        ours = _encoded(lambda: oracle.encode_prompt(_with_answer(row)))
    if _has_media(asked):
        return "media, refused here" if ours is None else "media, encoded here"
    return _class_of(ours, _encoded_by_mistral(tokenizer, mode, asked))


def _with_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "messages": [*row["messages"], _ANSWER]}


def _has_media(asked: Any) -> bool:
    contents = [message.content for message in asked.messages if isinstance(message.content, list)]
    return any(isinstance(part, _MEDIA_CHUNKS) for content in contents for part in content)


def _encoded(encode: Callable[[], _Ids]) -> _Ids | None:
    """Return the ids that this package gives, or None if it refuses."""
    try:
        return encode()
    except MistralLoraError:
        return None


def _encoded_by_mistral(tokenizer: str, mode: ValidationMode, asked: Any) -> _Ids | None:
    """Return the ids that mistral-common gives, or None if it refuses."""
    try:
        # it joins messages in place
        return tuple(_mistral_tokenizer(tokenizer, mode).encode_chat_completion(deepcopy(asked)).tokens)
    except (MistralCommonException, AssertionError):
        # it asserts that a tokenizer has the tokens of thinking
        return None


@cache
def _mistral_tokenizer(tokenizer: str, mode: ValidationMode) -> Any:
    return MistralTokenizer.from_file(str(oracle_named(tokenizer).path), mode=mode)


def _class_of(ours: _Ids | None, theirs: _Ids | None) -> str:
    if ours is None:
        return "refused by both" if theirs is None else "refused here"
    if theirs is None:
        return "refused by mistral-common"
    return "same" if ours == theirs else "differs"


def main() -> int:
    """Fetch the files, compare, and write the results."""
    try:
        fetch_all()
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    results = judged_recordings()
    write_text(RESULTS, results.text())
    print(results.text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
