"""Ask a program in any language for the ids of the packaged rows, and print what it gets right.

Usage: python run.py GOLDENS TOKENIZER COMMAND [ARGUMENT ...]

GOLDENS is the folder `goldens/`. TOKENIZER is a name in its `provenance.json` or in its `published.json`. COMMAND
starts the program. It reads one JSON object a line, and answers each by one line:

    {"case": "single", "row": {"messages": [...]}}      ->  {"input_ids": [1, 3, ...], "labels": [-100, -100, ...]}
    {"case": "prompt", "prompt": {"messages": [...]}}   ->  {"input_ids": [1, 3, ...]}
    a row that it refuses                               ->  {"refused": "the reason"}

`labels` can be left out. Let the program flush its output after each line. The exit code is 0 if every
answer is as recorded, 1 if not, and 2 if the usage is wrong. This file needs Python's standard library alone.
"""

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

SECONDS = 60.0
"""The longest time for an answer."""


def main(arguments):
    """Run the program on each case, print the table, and return the exit code."""
    if len(arguments) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    folder, tokenizer, *command = arguments
    cases = read_cases(Path(folder), tokenizer)
    if not cases:
        print(f"no cases for the tokenizer {tokenizer!r} in {folder}", file=sys.stderr)
        return 2
    try:
        results = [(case["case"], *judge(case, answer)) for case, answer in ask(command, cases)]
    except OSError as error:
        print(f"{command[0]} cannot be started: {error}", file=sys.stderr)
        return 2
    width = max(len(name) for name, _, _ in results)
    for name, verdict, detail in results:
        print(f"{name:{width}}  {verdict:13}  {detail}".rstrip())
    good = sum(verdict in {"same", "refused", "either"} for _, verdict, _ in results)
    print(f"{good} of {len(results)} as recorded")
    return int(good < len(results))


def read_cases(folder, tokenizer):
    """Return the cases of a tokenizer: what to ask, and what is recorded."""
    published = read(folder / "published.json")
    if tokenizer in published["tokenizers"]:
        return published_cases(published, tokenizer)
    cases = [read(path) for path in sorted((folder / "templates" / tokenizer).glob("*.json"))]
    refusals = read(folder / "refusals.json").get(tokenizer, {})
    rows = {case["case"]: case["row"] for case in read(folder / "cases.json")}
    return cases + [{"case": name, "row": rows[name], "refusal": found} for name, found in refusals.items()]


def published_cases(published, tokenizer):
    """Return the cases that were recorded from a published tokenizer, with control tokens as ids."""
    control_ids = published["tokenizers"][tokenizer]["control_ids"]
    cases = []
    for case in published["cases"]:
        if tokenizer in case["recorded"]:
            recorded = {
                key: [control_ids.get(token, token) for token in tokens]
                for key, tokens in case["recorded"][tokenizer].items()
            }
            cases.append({**case, **recorded})
    return cases


def read(path):
    """Return the data of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def ask(command, cases):
    """Yield each case with the program's answer: an object, or a text that says why there is none."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    with subprocess.Popen(command, **pipes) as program:
        for case in cases:
            question = {key: case[key] for key in ("case", "row", "prompt") if key in case}
            late = threading.Timer(SECONDS, program.kill)
            late.start()
            try:
                program.stdin.write(json.dumps(question) + "\n")
                program.stdin.flush()
                line = program.stdout.readline()
            except BrokenPipeError:
                line = ""
            late.cancel()
            yield case, parsed(line)
        with contextlib.suppress(BrokenPipeError):
            program.stdin.close()
        try:
            program.wait(SECONDS)
        except subprocess.TimeoutExpired:
            program.kill()


def parsed(line):
    """Return the object of a line, or a text that says why it has none."""
    if not line:
        return f"the program has ended, or took more than {SECONDS:g} seconds: does it flush each line?"
    try:
        answer = json.loads(line)
    except ValueError:
        return f"not JSON: {line.strip()[:60]}"
    return answer if isinstance(answer, dict) else f"not an object: {line.strip()[:60]}"


def judge(case, answer):
    """Return the verdict on an answer, and its detail."""
    if isinstance(answer, str):
        return "no answer", answer
    refused = answer.get("refused")
    if "refusal" in case:
        if case["refusal"]["by"] != "mistral-common":
            return "either", ""
        return ("refused", "") if refused is not None else ("not refused", f"expected, for {case['refusal']['at']}")
    if refused is not None:
        return "wrongly refused", str(refused)
    for key in ("input_ids", "labels"):
        found, expected = answer.get(key), case.get(key)
        if key == "labels" and (found is None or expected is None):
            continue
        if found != expected:
            return f"other {key.removeprefix('input_')}", first_difference(found, expected, case)
    return "same", ""


def first_difference(found, expected, case):
    """Return the place of the first difference, and the known difference of chat templates if there is one."""
    if not isinstance(found, list):
        return f"{found!r} is not a list"
    pairs = enumerate(zip(found, expected, strict=False))
    at = next((n for n, (one, other) in pairs if one != other), min(len(found), len(expected)))
    known = ", ".join(case.get("deviations", ()))
    found, expected = (tokens[at] if at < len(tokens) else "nothing" for tokens in (found, expected))
    return f"token {at}: {found}, expected {expected}" + (f" (chat templates differ: {known})" if known else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
