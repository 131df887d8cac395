"""Record the verdicts on everything that the tests break: the proof that a rebuilding changed nothing.

    $ python scripts/record_verdicts.py --output /tmp/before.json
    $ python scripts/record_verdicts.py --output /tmp/after.json --against /tmp/before.json
    $ python scripts/record_verdicts.py --output /tmp/after.json --since main

A record has one entry for each mutant of the gallery, each example of a rule and its healthy twin, each tokenizer with
the packaged rows, each sound file, and each check of the embedded default: the rule, severity and place of every
finding, and the exit code. Of the verbs that write, it has the files, tensors and manifests of a day, as hashes where
they are long. Paths below the folder of a case are relative to it. A record is compared with another, and never
committed. In both, a rule that was merged into another one has the id of that one, by `names` of its table.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("mutants", "support", "formats", "guarding")]

Artifact = dict[str, Any]
Change = Callable[[Artifact], None]
Entry = dict[str, Any]

Part = Callable[[], Iterator[tuple[str, Entry]]]

SEED = 3
"""The seed of the recorded runs."""


def main() -> int:
    """Record the parts that are asked for, and compare them with an earlier record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"subjects of the gallery, or {', '.join(_parts())} (default: all)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="write the record to this file")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with this record; exit 1 if it differs")
    parser.add_argument("--since", metavar="COMMIT", help="record this commit, too, and compare with its record")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="record only each N-th case of a subject")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="processes at the same time (default: 2)")
    args = parser.parse_args()
    from gallery import benches

    parts = args.parts or [*benches(), *_parts()]
    jobs = [(part, number, args.processes, args.every) for part in parts for number in range(args.processes)]
    record: dict[str, Entry] = {}
    context = multiprocessing.get_context("spawn")  # a process that has imported torch cannot be forked safely
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        for job, entries in zip(jobs, pool.map(_record_part, jobs), strict=True):
            record.update(entries)
            print(f"{job[0]} {job[1] + 1}/{args.processes}: {len(entries)} cases", file=sys.stderr, flush=True)
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    args.output.write_text(text, encoding="utf-8")
    if args.since is not None:
        args.against = args.output.with_suffix(".before.json")
        _record_commit(args.since, args.against, [*parts, "--every", args.every, "--processes", args.processes])
    if args.against is None:
        return 0
    before = _by_new_ids(json.loads(args.against.read_text(encoding="utf-8")))
    # a record of some parts is compared with the same parts
    kinds = {name.partition(":")[0] for name in record}
    expected = {name: entry for name, entry in before.items() if name.partition(":")[0] in kinds}
    if args.every > 1:
        expected = {name: entry for name, entry in expected.items() if name in record}
    return _compare(expected, _by_new_ids(json.loads(text)))


def _record_commit(commit: str, output: Path, words: list[object]) -> None:
    """Record a commit with its own script, its own cases and the libraries that are installed here."""
    with tempfile.TemporaryDirectory(prefix="verdict-") as folder:
        tree = Path(folder, "tree")
        git = ["git", "-C", ROOT, "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            command = [sys.executable, tree / "scripts" / "record_verdicts.py", *map(str, words), "--output", output]
            subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree)}, check=True)
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)


def _by_new_ids(record: dict[str, Entry]) -> dict[str, Entry]:
    """Return a record in which a merged rule has the id of the rule that it is now a name of."""
    new = {}
    for table in ROOT.glob("pytest_mistral_lora/**/rules/*.toml"):
        for rule, facts in tomllib.loads(table.read_text(encoding="utf-8")).items():
            new |= dict.fromkeys(facts.get("names", {}).values(), rule)
    # a merged rule has no example any more
    merged = {old for old, rule in new.items() if old != rule}
    record = {name: entry for name, entry in record.items() if merged.isdisjoint(re.findall(r"ML\d{3}", name))}
    text = re.sub(r"ML\d{3}", lambda match: new.get(match[0], match[0]), json.dumps(record))
    return {name: _without_copies(entry) for name, entry in json.loads(text).items()}


def _without_copies(value: Any) -> Any:
    """Return an entry whose lists have each finding once, in order: two merged rules say one thing of one place."""
    if isinstance(value, dict):
        return {key: _without_copies(inner) for key, inner in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [list(finding) for finding in sorted({tuple(finding) for finding in value})]
    return value


def _compare(before: dict[str, Entry], after: dict[str, Entry]) -> int:
    """Print each case that differs, and return 1 if one does."""
    different = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    for name in different:
        print(name)
        for sign, entry in (("-", before.get(name, {})), ("+", after.get(name, {}))):
            other = (after if sign == "-" else before).get(name, {})
            for key, value in entry.items():
                if value != other.get(key):
                    print(f"  {sign} {key}: {json.dumps(value, ensure_ascii=False)}")
    print(f"{len(after)} cases, {len(different)} differ")
    return int(bool(different))


def _record_part(job: tuple[str, int, int, int]) -> dict[str, Entry]:
    """Return the entries of one process for one part."""
    part, number, processes, every = job
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1", OMP_NUM_THREADS="1")
    warnings.simplefilter("ignore")
    if part in _parts():
        return {f"{part}:{name}": entry for name, entry in _parts()[part]()} if number == 0 else {}
    cases = list(_cases(part))[::every]
    return {f"{part}:{name}": _judged(part, change) for name, change in cases[number::processes]}


def _cases(subject: str) -> Iterator[tuple[str, Change]]:
    """Yield the name and the change of each case of a subject: the sound artifact, mutants, examples, twins."""
    from gallery import benches, examples, mutants

    yield "sound", lambda artifact: None
    for mutant in mutants(benches()[subject]):
        yield f"mutant {mutant.name}", mutant.change
    for rule, example in examples(subject).items():
        yield f"{rule} broken", example.broken
        yield f"{rule} sound", example.sound


def _judged(subject: str, change: Change) -> Entry:
    """Make an artifact, change it, and return what the suite and `check` say of it."""
    from gallery import benches

    with tempfile.TemporaryDirectory(prefix="verdict-") as folder:
        home = Path(folder).resolve()
        bench = benches()[subject].BENCH
        artifact = bench.make(home)
        change(artifact)
        try:
            findings = [(each.rule, each.severity, _relative(str(each.place), home)) for each in bench.judge(artifact)]
        except Exception as error:
            return {"suite": f"{type(error).__name__}: {_relative(str(error), home)}"}
        entry: Entry = {"suite": sorted(findings)}
        for words in _words(subject, home, artifact):
            entry[" ".join(words)] = _checked(words, home)
        return entry


def _words(subject: str, home: Path, artifact: Artifact) -> list[list[str]]:
    """Return the command lines that judge the files of an artifact; none for one that is not in files."""
    if subject in ("adapter", "transcript"):
        return [["check", "lora", "--base", "base"]]
    if subject == "manifest":
        return [["check", "lora", "--base", "base"], ["check", "merged", "--base", "base"]]
    if subject == "merged":
        adapter = ["lora"] if artifact["adapter_at_hand"] else []
        return [["check", "merged", *adapter, "--base", "base"]]
    if subject == "gguf":
        return [["check", "merged.gguf", "--base", "base"], ["check", "lora.gguf", "--base", "base"]]
    if subject == "tokenizer":
        oracle = ["--oracle", str(artifact["oracle"])] if artifact["oracle"] else []
        return [["check", "checkpoint", "--examples", "1", *oracle]]
    if subject == "dataset":
        if artifact["alone"]:
            return [["check", "rows.jsonl", "--tokenizer", "spm-v3"]]
        return [["check", "recipe.yaml", "--examples", "1"]]
    if subject == "encoded":
        if artifact["saved"]:
            return [["check", "packed.jsonl", "--tokenizer", "spm-v3"]]
        lines = ["audit", "lines.jsonl", "--tokenizer", "spm-v3", "--dataset", "dataset.jsonl"]
        return [lines, ["check", "lines.jsonl", "packed.jsonl", "--tokenizer", "spm-v3"]]
    return []


def _checked(words: list[str], home: Path) -> Entry:
    """Run a verb in this process, and return its findings and its exit code."""
    from pytest_mistral_lora.cli import main as run_verb

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(home), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = run_verb([*words, "--output-format", "jsonl" if words[0] == "audit" else "json"])
        except SystemExit as error:
            code = int(error.code or 0)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {_relative(str(error), home)}"}
    if code not in (0, 1):
        return {"code": code, "error": _relative(errors.getvalue(), home).splitlines()[:1]}
    if words[0] == "audit":  # a finding a line, and a summary
        lines = map(json.loads, output.getvalue().splitlines())
        found = [(line["rule"], line["severity"], _relative(line["place"], home)) for line in lines if "rule" in line]
        return {"code": code, "findings": sorted(found)}
    report = json.loads(output.getvalue())
    findings = [
        (_relative(check["nodeid"], home), finding["rule"], finding["severity"], _relative(finding["place"], home))
        for check in report["checks"]
        for finding in check["findings"]
    ]
    unchecked = sorted(_relative(check["nodeid"], home) for check in report["checks"] if check["not_checked"])
    return {"code": code, "findings": sorted(findings), "not_checked": unchecked}


def _parts() -> dict[str, Part]:
    """Return the parts of a record beside the subjects of the gallery."""
    return {
        "packaged": _packaged,
        "default": _default,
        "sound-rows": _sound_rows,
        "import": _imported,
        "day": _day,
        "guard": _guarded,
        "serve-check": _served,
    }


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder for a case, with its own cache."""
    with tempfile.TemporaryDirectory(prefix="verdict-") as folder:
        os.environ["MISTRAL_LORA_CACHE"] = str(Path(folder, ".cache"))
        yield Path(folder).resolve()


def _packaged() -> Iterator[tuple[str, Entry]]:
    """Yield the verdict of `check` on the packaged rows, and on each tokenizer that mistral-common ships."""
    from pytest_mistral_lora.chat.oracle import SHIPPED
    from pytest_mistral_lora.records.goldens import packaged_cases

    with _folder() as home:
        rows = home / "rows.jsonl"
        rows.write_text("".join(case.row.to_jsonl() + "\n" for case in packaged_cases()), encoding="utf-8")
        for name in SHIPPED:
            yield f"rows {name}", _checked(["check", "rows.jsonl", "--tokenizer", name], home)
    with _folder() as home:
        yield "tokenizers", _checked(["check", "--no-train"], home)


def _default() -> Iterator[tuple[str, Entry]]:
    """Yield the outcome of each check of `pytest --mistral-golden`, with the tiny train."""
    with _folder() as folder:
        words = ["--mistral-golden", "--mistral-report", "report.json", "-q", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *words]
        run = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for check in report["checks"]:
        yield check["nodeid"], {"outcome": check["outcome"]}
    yield "exit code", {"code": run.returncode}


def _sound_rows() -> Iterator[tuple[str, Entry]]:
    """Yield the verdict on each file of sound rows, by the tokenizer of each version."""
    from sound_rows import SOUND_ROWS

    from pytest_mistral_lora.chat.oracle import SHIPPED

    with _folder() as home:
        for sound in SOUND_ROWS:
            for number, rows in enumerate(sound.files):
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                (home / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
                for name in SHIPPED:
                    entry = _checked(["check", "rows.jsonl", "--tokenizer", name], home)
                    yield f"{sound.title} {number} {name}", entry


def _imported() -> Iterator[tuple[str, Entry]]:
    """Yield the rows that `import` makes of each sample of a format."""
    from test_row_formats import SAMPLES

    for name, (record, _) in SAMPLES.items():
        with _folder() as home:
            (home / "data.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
            done = _run(["import", "data.jsonl", "--to", "rows.jsonl"], home)
            yield name, {**done, "files": _hashes(home)}


RUNS = {"plain": 64, "packed": 4096, "resumed": 4096}
"""The recorded runs of the recipe of the demo, with the tokens of a micro-batch: 64 hold one row or two."""

EXPORTS = {
    "plain.yaml": ("trl", "axolotl", "llamafactory", "ms-swift", "lm-eval"),
    "plain": ("llamacpp", "vllm", "ollama"),
}
"""The programs that `export` writes for, by what it exports."""


def _day() -> Iterator[tuple[str, Entry]]:
    """Yield what the verbs of a day write, from `init` to `export`: files, tensors, manifests, verdicts."""
    with _folder() as home:
        yield "init", {**_run(["init", "--demo", "--ci", "both"], home), "files": _hashes(home)}
        recipe = (home / "recipe.yaml").read_text(encoding="utf-8")
        recipe = re.sub(r"epochs: \d+", "epochs: 2", recipe).replace("seed: 0", f"seed: {SEED}")
        for name, tokens in RUNS.items():
            text = recipe.replace("output: lora-out", f"output: {name}")
            text = text.replace("micro_batch_tokens: 4096", f"micro_batch_tokens: {tokens}")
            (home / f"{name}.yaml").write_text(text, encoding="utf-8")
            done = _resumed(home) if name == "resumed" else _run(["train", f"{name}.yaml"], home)
            yield f"train {name}", {**done, **_model(home / name)}
        for words in (["verify", "plain"], ["smoke", "plain"], ["check", "plain.yaml", "plain"]):
            yield " ".join(words), _checked(words, home) if words[0] == "check" else _run(words, home)
        yield "merge", {**_run(["merge", "plain", "merged"], home), **_model(home / "merged")}
        yield "verify merged", _run(["verify", "merged"], home)
        for source, names in EXPORTS.items():
            for name in names:
                done = _run(["export", source, "--to", name, "--output", f"to-{name}"], home)
                yield f"export {name}", {**done, "files": _hashes(home / f"to-{name}", home)}


def _resumed(home: Path) -> Entry:
    """Train a recipe until a signal stops it after its first step, and resume it."""
    from pytest_mistral_lora.errors import StoppedError
    from pytest_mistral_lora.training.callbacks import StopRequest
    from pytest_mistral_lora.training.run import train

    stop = StopRequest()
    stop.signal = signal.SIGTERM
    with contextlib.chdir(home), contextlib.suppress(StoppedError):
        train("resumed.yaml", stop=stop)
    return _run(["train", "resumed.yaml", "--resume"], home)


def _model(folder: Path) -> Entry:
    """Return the hash of each tensor of a model's folder, and its manifest without times and versions."""
    from safetensors.numpy import load_file

    tensors = {
        f"{file.name} {name}": _sha256(tensor.tobytes())
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"] = sorted(manifest["files"])
    for key in ("environment", "created", "probe"):
        manifest.pop(key, None)
    text = re.sub(r'"[^"]*(seconds|_at|duration|memory)[^"]*": [^,}\n]+,?', "", json.dumps(manifest, indent=1))
    return {"tensors": tensors, "manifest": _relative(text, folder.parent).splitlines()}


GUARDED = {
    "sound": lambda ids, labels: (ids, labels),
    "end masked": lambda ids, labels: (ids, [*labels[:-1], -100]),
    "all trained": lambda ids, labels: (ids, list(ids)),
    "nothing trained": lambda ids, labels: (ids, [-100] * len(ids)),
    "begin twice": lambda ids, labels: ([ids[0], *ids], [-100, *labels]),
    "cut": lambda ids, labels: (ids[:-2], labels[:-2]),
    "shifted": lambda ids, labels: (ids, [*labels[1:], -100]),
    "space after [INST]": lambda ids, labels: ([*ids[:2], 29473, *ids[2:]], [*labels[:2], -100, *labels[2:]]),
}
"""What a run does to ids and labels of its rows before a guard sees them."""


def _guarded() -> Iterator[tuple[str, Entry]]:
    """Yield the verdict of a guard on the first step of a run, for rows with their messages and without."""
    from guarded_runs import chat_rows, encoded, lora_model, make_trainer

    from pytest_mistral_lora import GuardError, guard
    from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
    from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

    oracle = Oracle(shipped_tokenizer("spm-v3"))
    with _folder() as home:
        base = write_tiny_base(home / "tiny", shipped_tokenizer("spm-v3"))
        for name, change in GUARDED.items():
            for has_messages in (False, True):
                rows = encoded(oracle, chat_rows(16), messages=has_messages)
                for row in rows:
                    row["input_ids"], row["labels"] = change(row["input_ids"], row["labels"])
                trainer = make_trainer(base, rows, home / "out", model=lora_model(base), max_steps=1)
                callback = guard(trainer)
                with contextlib.suppress(GuardError), contextlib.redirect_stdout(io.StringIO()):
                    trainer.train()
                findings = [(each.rule, each.severity, str(each.place)) for each in callback.verdict.findings]
                yield f"{name}{' with messages' * has_messages}", {"findings": sorted(findings)}


def _served() -> Iterator[tuple[str, Entry]]:
    """Yield the verdict of `serve-check` on a sound and a faulty server of the tests, as each kind."""
    from local_server import Behaviour, serving

    from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer

    oracle = Oracle(shipped_tokenizer("spm-v3"))
    faults = {"sound": {}, "space": {"prompt": lambda ids, _: (*ids[:2], 29473, *ids[2:])}}
    for kind in ("llamacpp", "vllm", "openai"):
        for name, changes in faults.items():
            with _folder() as home, serving(Behaviour(oracle, **changes)) as url:
                words = ["serve-check", f"{kind}={url}", "--tokenizer", "spm-v3", "--model", "tiny"]
                yield f"{kind} {name}", _checked(words, home)


def _run(words: list[str], home: Path) -> Entry:
    """Run a verb in this process, and return its exit code, and the rules and numbers of lines that it names."""
    from pytest_mistral_lora.cli import main as run_verb

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(home), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = run_verb(words)
        except SystemExit as error:
            code = int(error.code or 0)
    return {"code": code, "rules": sorted(set(re.findall(r"ML\d{3}", output.getvalue() + errors.getvalue())))}


def _hashes(folder: Path, home: Path | None = None) -> Entry:
    """Return the hash of each file of a folder by its name, of texts without the folder of the case."""
    hashes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts):
        data = file.read_bytes()
        with contextlib.suppress(UnicodeDecodeError):
            data = _relative(data.decode(), home or folder).encode()
        hashes[str(file.relative_to(folder))] = _sha256(data)
    return hashes


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _relative(text: str, home: Path) -> str:
    """Return a text without the folders that every run names anew."""
    text = re.sub(rf"{re.escape(str(home))}/?", "", text)
    text = re.sub(r"/tmp/[\w.-]+/", "TMP/", text)
    return re.sub(r"train-\w+-[\w]{8}\b|127\.0\.0\.1[:-]\d+|tmp\w{8}\b", "#", text)


if __name__ == "__main__":
    sys.exit(main())
