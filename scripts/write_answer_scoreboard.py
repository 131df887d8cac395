"""The answers of real servers: record what clients get, and write it down as docs/serving/answers.md.

python scripts/write_answer_scoreboard.py           the page, from what is recorded
python scripts/write_answer_scoreboard.py --record NAME KIND=URL TOKENIZER SETTING [VERSION]
                                                    ask a running server, and record what it makes of known answers

TOKENIZER is a folder or a file. Serve a probe of it: `mistral-lora export DIR --to llamacpp --probe --output probe`.
For a server that cannot be asked by ids, add `--probe FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.conformance.answer.checks import AnswerChecks
from pytest_mistral_lora.conformance.server.failures import no_answer
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.field.facts import facts
from pytest_mistral_lora.records.files import write_json, write_text
from pytest_mistral_lora.records.probe import said_answers
from pytest_mistral_lora.serving.servers import SERVERS

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "docs" / "serving" / "answers"
PAGE = ROOT / "docs" / "serving" / "answers.md"
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
"""The one row that is asked for its prompt."""

WAYS = ("whole", "streamed")

_INTRODUCTION = """\
# Scoreboard: the answers of real servers

What do the clients of a server get of answers whose ids are known? To repeat a line, export a probe of a checkpoint,
serve it with the setting of the line, and run the command of its section:

```console
$ mistral-lora export DIR --to llamacpp --probe --output probe
```

Made by `python scripts/write_answer_scoreboard.py` from what the servers themselves made of the known answers
(`goldens/answers.json`), recorded by `--record NAME KIND=URL TOKENIZER SETTING [VERSION]`. The model of each is a
probe: asked by ids, it says the answer. An answer that it does not say is not counted.

*Exact*: the message has the text, the thinking, the calls with their arguments by value, and the `finish_reason` of the
ids, whole and as a stream. `as NAME` is a [named deviation](../serving.md#ask-for-answers-that-are-known). All else is
a rule of [../rules.md](../rules.md): the table names the rule for each way, and the first message that the client got.

`transformers serve` cannot be asked by ids: its probe is the one that llama.cpp was asked for. Each of its streams
failed in the tokenizer (`'MistralTokenizer' object has no attribute '_tokenizer'`). The probe for v3 was trained on ten
answers.

mistral-common's own decoder, which is no server, reads each of the known answers exactly, by every tokenizer that it
fits; a test holds it to that (`tests/chat/test_answer_decoding.py`).

vLLM was run on a CPU, in an environment of its own beside mistral-common 1.12.0, without which it answers no request of
these tokenizers; its probe is that of `--to vllm`. It masks a thought that is empty, comes after a text or has no text
behind it, one before JSON by a schema up to v13, and the id of each call of v11: the model then says something else,
with HTTP 200. The grammar of answers is that of mistral-common, which `mistral-lora check` reads, too. Its file of v15
has the efforts `none` and `high` alone, since mistral-common 1.12.0 knows no others.

The column of vLLM's streams depends on the load. If the server is busy, a part of its stream may have several tokens,
and vLLM then takes the letters of markers in this part for markers
([upstream](../upstream/README.md#vllm-a-stream-is-read-by-letters-where-a-part-has-several-tokens)). `serve-check` asks
four requests at once, as it did for this table: on one server and in one minute, `spelled-end` was ML924 for it, and
exact in a stream that was asked alone. A stream that is exact here may be wrong under more load.

Not run here: SGLang and Ollama, of which no build was at hand when this page was recorded, and servers on a GPU."""


def page() -> str:
    """Return docs/serving/answers.md."""
    recorded = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RECORDED.glob("*.json"))]
    lines = [*_INTRODUCTION.splitlines(), "", *_summary(recorded)]
    for data in recorded:
        lines += ["", f"## {_title(data)}, {data['tokenizer']}", "", f"`{_command(data)}`", ""]
        lines += [*_known(data), *_differences(data)]
    return "\n".join(lines) + "\n"


def _known(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line on the known faults of a server that change answers, if it has any."""
    found = [
        fault.id for fault in facts() if fault.checks and fault.standing_of_server(_title(data)).state == "present"
    ]
    if found:
        yield f"Known faults: {', '.join(f'[{name}](../known-faults.md#{name})' for name in found)}."
        yield ""


def _command(data: Mapping[str, Any]) -> str:
    """Return the command that repeats the answers of a server."""
    if data["kind"] == "openai":
        return "mistral-lora serve-check openai=http://127.0.0.1:8000 --tokenizer DIR --probe probe"
    if data["kind"] == "vllm":
        return "mistral-lora serve-check vllm=http://127.0.0.1:8000 --tokenizer DIR --answers"
    return f"mistral-lora serve-check {data['kind']}@{data['version']}=http://127.0.0.1:8080 --tokenizer DIR --answers"


def _title(data: Mapping[str, Any]) -> str:
    if data["version"][:1].isalpha():
        return str(data["version"])
    return f"{SERVERS[data['kind']].title} {data['version']}"


def _summary(recorded: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| server | setting | tokenizer | exact whole | exact as a stream | named deviations | other rules |"
    yield "|---|---|---|---|---|---|---|"
    for data in recorded:
        answers = data["answers"].values()
        exact = [f"{sum(not answer[way] for answer in answers)} of {len(answers)}" for way in WAYS]
        labels = [set(answer["whole"]) | set(answer["streamed"]) for answer in answers]
        counts = Counter(label for of_answer in labels for label in of_answer)
        named = {label.removeprefix("as "): count for label, count in counts.items() if label.startswith("as ")}
        others = {label: count for label, count in counts.items() if label.startswith("ML")}
        cells = [_title(data), data["setting"], data["tokenizer"], *exact, _counted(named), _counted(others)]
        yield f"| {' | '.join(cells)} |"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _differences(data: Mapping[str, Any]) -> Iterator[str]:
    yield "| answer | whole | as a stream | the client gets | the model said |"
    yield "|---|---|---|---|---|"
    for name, answer in data["answers"].items():
        if answer["whole"] or answer["streamed"]:
            ways = [", ".join(answer[way]) or "exact" for way in WAYS]
            yield f"| {name} | {' | '.join(ways)} | {_code(answer['found'])} | {_code(answer['expected'])} |"
    if data["not_said"]:
        yield ""
        yield f"Not said by the probe: {', '.join(data['not_said'])}."


def _code(text: str) -> str:
    # a masked model says anything: line breaks would end the row of the table
    text = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    return f"`` {text.replace('|', chr(0x2502))} ``" if text else ""


def record(name: str, server: str, tokenizer: Path, setting: str, version: str, probe: Path | None = None) -> Path:
    """Ask a server for the known answers, and return the file that records what clients get."""
    kind, _, url = server.partition("=")
    given: dict[str, Any] = {"version": version, "given": (parse_row(ROW),)}
    if probe is not None:
        given["probe_answers"] = said_answers(probe)
    target = ServerTarget("served", judge=Target("own", tokenizer), kind=kind, url=url, asks_answers=True, **given)
    checks = AnswerChecks(target)
    found = {forced.known.name: (fault.found, fault.expected) for forced, _, fault in reversed(checks.faults)}
    for forced in target.forced_answers:
        reason = no_answer(forced.whole) or no_answer(forced.stream)
        if reason:
            # the port is another one each time
            found.setdefault(forced.known.name, (reason.replace(url, "http://127.0.0.1"), "an answer"))
    answers = {}
    for answer, verdict in checks.verdicts().items():
        words, expected = found.get(answer, ("", ""))
        ways = {way: verdict.get(way, []) for way in WAYS}
        answers[answer] = {**ways, "found": words, "expected": expected}
    oracle = target.oracle
    data = {
        "kind": kind,
        "version": target.served_version,
        "setting": setting,
        "tokenizer": f"{oracle.version} ({oracle.kind}, {oracle.vocab_size:,} tokens)",
        "answers": answers,
        "not_said": [forced.known.name for forced in target.forced_answers if forced.way is None],
    }
    file = RECORDED / f"{name}.json"
    write_json(file, data)
    return file


def main() -> None:
    """Record answers, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", nargs="+", metavar="WORD", help="NAME KIND=URL TOKENIZER SETTING [VERSION]")
    parser.add_argument("--probe", type=Path, metavar="FOLDER", help="the exported probe that is served")
    args = parser.parse_args()
    if args.record:
        name, server, tokenizer, setting, *version = args.record
        file = record(name, server, Path(tokenizer), setting, "".join(version), args.probe)
        sys.stdout.write(f"{file.relative_to(ROOT)}\n")
        return
    write_text(PAGE, page())


if __name__ == "__main__":
    main()
