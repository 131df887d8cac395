"""The notes of a folder, generated from its manifest: `DECISION.md`, and the model card `README.md`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pytest_mistral_lora import __version__
from pytest_mistral_lora.chat.objective import ANSWERS, Objective
from pytest_mistral_lora.chat.reading import read_bounded
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes
from pytest_mistral_lora.errors import InputError, counted
from pytest_mistral_lora.escaping import code_span, printable
from pytest_mistral_lora.records.deployment import (
    UNDECLARED,
    commands_of,
    deployed,
    is_declared,
    run_record,
    without_declarations,
)
from pytest_mistral_lora.records.files import inside, put_text, write_json
from pytest_mistral_lora.records.gate import HEADINGS, Gate
from pytest_mistral_lora.records.gate import cells as gate_cells
from pytest_mistral_lora.records.manifest import DEPLOYMENT, MANIFEST, NOTES_RECORD, build, load, seal_of

_BEGIN = "<!-- yours, from here: kept when this file is made again -->"
_END = "<!-- yours, to here -->"
_EMPTY_SECTION = f"{_BEGIN}\n\n{_END}"


def author_section(text: str) -> str:
    """Return the text between the marks; empty if the section is empty, or the marks are missing."""
    _, begin, rest = text.partition(_BEGIN)
    section, end, _ = rest.rpartition(_END)
    return section.strip() if begin and end else ""


def with_author_section(text: str, section: str) -> str:
    """Return a text with `section` between its marks; a text without marks is returned unchanged."""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.rpartition(_END)
    if not begin or not end:
        return text
    return f"{before}{_BEGIN}\n\n{section}\n\n{_END}{after}" if section else f"{before}{_EMPTY_SECTION}{after}"


DECISION = "DECISION.md"
_GATE_WORDS = {"passed": "passed", "failed": "failed: see Evaluation", "undecided": "is undecided"}


def decision_text(manifest: Mapping[str, Any]) -> str:
    """Return the decision record of a run, in Markdown.

    Args:
        manifest: The manifest of an adapter or a merged model; `files` and `seal` are not used.
    """
    dataset, tokenizer, masking = manifest["dataset"], manifest["tokenizer"], manifest["masking"]
    title = f"# Fine-tune {manifest['base']} with LoRA on {', '.join(entry['path'] for entry in dataset['files'])}"
    status = f"Status: {'trained and merged' if manifest['kind'] == 'merged' else 'trained'}"
    gate = Gate.recorded_in(manifest)
    status += f"; the gate {_GATE_WORDS[gate.verdict]}" if gate is not None else ""
    reasons = f"## Why\n\nThe purpose of the run and the alternatives: write them here.\n\n{_EMPTY_SECTION}"
    context = [
        ("Base", f"`{manifest['base']}`"),
        ("Revision", f"`{manifest['revision']}`" if manifest["revision"] else "none: a local base"),
        ("Base weights SHA-256", f"`{manifest.get('base_weights_sha256', 'not recorded')}`"),
        ("Dataset SHA-256", f"`{manifest['dataset_sha256']}`"),
        *_data_rows(dataset),
        ("Tokenizer", f"{tokenizer['version'] or tokenizer['file']} through {tokenizer['backend']}"),
        ("Tokenizer SHA-256", f"`{tokenizer['sha256']}`"),
        ("Chat template SHA-256", f"`{manifest['template']['sha256']}` ({manifest['template']['source']})"),
    ]
    share = masking["supervised_tokens"] / masking["tokens"]
    supervised = (
        "## Supervised tokens\n\n"
        f"Supervised: {masking['policy']}. {_objectives(manifest)}{masking['supervised_tokens']:,} of "
        f"{masking['tokens']:,} tokens ({share:.0%}) carry loss. `rendered_row.json` shows one row token by token."
    )
    parts = [title, status, reasons, f"## Context\n\n{_table(context)}", _decision(manifest)]
    parts += [_line_of_parents(start)] if (start := manifest["lora"].get("start")) else []
    parts += [supervised]
    if manifest["kind"] != "merged":
        parts += ["[training.html](training.html) shows the losses and the answers of the run."]
    parts += [_evaluation(manifest), _consequences(manifest), _reproduce(manifest)]
    return "\n\n".join(parts) + "\n"


def _objectives(manifest: Mapping[str, Any]) -> str:
    """Return the declared objectives as sentences, with their files where these differ; empty for the default alone."""
    of_run = manifest["masking"].get("objective", str(ANSWERS))
    files: dict[str, list[str]] = {}
    for entry in (*manifest["dataset"]["files"], *manifest["dataset"]["eval_files"]):
        files.setdefault(entry.get("objective", of_run), []).append(f"`{entry['path']}`")
    if {*files} == {str(ANSWERS)}:
        return ""
    sentences = []
    for words, paths in files.items():
        of_files = f" ({', '.join(paths)})" if len(files) > 1 else ""
        sentences.append(f"Objective `{words}`{of_files}: {Objective.of(words, DECISION).meaning}. ")
    return "".join(sentences)


def _data_rows(dataset: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines about the data, name and value: files, their conversion, and rows that were kept."""
    files = [(entry, f"Data file `{entry['path']}`", f"{entry['rows']} rows, ") for entry in dataset["files"]]
    files += [(entry, f"Held-out file `{entry['path']}`", "") for entry in dataset["eval_files"]]
    for entry, name, rows in files:
        converted = ""
        if (source := entry.get("source")) is not None:
            lost = [f"{kind} in {number} records" for kind, number in source["losses"].items()]
            lost += [f"{source['left_out']} records"] if source["left_out"] else []
            left_out = f"; left out: {', '.join(lost)}" if lost else ""
            converted = f", {source['container']} of {source['format']}, rows `{source['rows_sha256']}`{left_out}"
        yield name, f"{rows}`{entry['sha256']}`{converted}"
    yield "Rows", f"{dataset.get('rows_used', dataset['rows'])} trained on, {dataset['held_out_rows']} held out"
    # truncation and filtering, if they changed rows
    for name, part in (("Rows to train on", dataset), ("Held-out rows", dataset.get("held_out_removed", {}))):
        changes = [f"{number} dropped ({reason})" for reason, number in part.get("rows_dropped", {}).items()]
        changes += [f"{part['rows_truncated']} cut"] if part.get("rows_truncated") else []
        changes += [f"{part['rows_without_loss']} without loss"] if part.get("rows_without_loss") else []
        if changes:
            removed = f"{part['tokens_removed']} tokens removed, {part['supervised_tokens_removed']} of them with loss"
            yield name, f"{', '.join(changes)}: {removed}"
    judgement = dataset.get("judgement", {"judged": True, "accepted": ()})
    if not judgement["judged"]:
        yield "Rows were judged", "no: trained with `--unjudged`"
    for known in judgement["accepted"]:
        yield f"Accepted: {code_span(known['id'])}", known["reason"]


def _decision(manifest: Mapping[str, Any]) -> str:
    lora, training = manifest["lora"], manifest["training"]
    schedule = training["schedule"]
    shape = f"r {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, rslora {lora['rslora']}"
    shape += ", DoRA" if lora.get("dora") else ""
    for name, key in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        values = (f"{value:g} in `{pattern}`" for pattern, value in lora.get(key, {}).items())
        shape += f"; {name} {', '.join(values)}" if lora.get(key) else ""
    shape += f"; {' and '.join(lora['modules_to_save'])} in full" if lora.get("modules_to_save") else ""
    seeds = f"{lora.get('seed', manifest['seed'])} for the adapter, {manifest['seed']} for dropout, "
    seeds += f"{training['order_seed']} for the order of rows"
    layers = sorted({name.rpartition(".")[2] for name in lora["target_modules"]})
    machine = manifest["environment"]
    processor = machine["gpu"] or f"{machine['processor']}, {counted(machine['threads'], 'thread')}"
    rows = [
        ("LoRA", shape),
        ("Layers", f"{lora['layers']}: {', '.join(layers)}{_chosen_layers(lora)}"),
        ("Trained numbers", f"{lora['parameters']:,}"),
        ("Steps", f"{training['steps']} of {training['batch_size']} rows ({counted(training['epochs'], 'epoch')})"),
        ("Tokens", f"{training['max_length']:,} in a row at most, {training['micro_batch_tokens']:,} fed at once"),
        ("Learning rate", f"{training['learning_rate']:g}, {training['optimizer']}"),
        ("Weight decay, clipping", f"{training['weight_decay']:g}, gradient norm {training['max_grad_norm']:g}"),
        ("Schedule", f"{schedule['name']}, {schedule['warmup_steps']} warm-up steps, {schedule['total_steps']} in all"),
        ("Seeds", seeds),
        ("Precision", _precision(training)),
        ("Machine", f"{training['devices']} x {processor}; Python {machine['python']} on {machine['platform']}"),
    ]
    if training.get("skipped_steps"):
        rows.append(("Skipped steps", f"{training['skipped_steps']}: fp16 overflowed"))
    if training["resumed_from_step"] is not None:
        rows.append(("Resumed", f"from step {training['resumed_from_step']}"))
    if training.get("memory_relief"):
        rows.append(("Changes because memory ran out", ", ".join(training["memory_relief"])))
    return "## Decision\n\n" + _table(rows)


def _chosen_layers(lora: Mapping[str, Any]) -> str:
    chosen = lora.get("layers_to_transform")
    return f", of the decoder layers {', '.join(map(str, chosen))}" if chosen else ""


def _line_of_parents(start: Mapping[str, Any]) -> str:
    """Return the adapters that a run went on from, the nearest first, and the two losses at its start."""
    rows = []
    for generation in (start, *start["parents"]):
        digest = generation["manifest_sha256"]
        record = f"manifest `{digest}`" if digest else "no manifest: another trainer wrote it"
        files = ", ".join(f"`{file}`" for file in generation["dataset"] or ())
        data = f"{files} (`{generation['dataset_sha256']}`)" if files else "not recorded"
        steps = "not recorded" if generation["steps"] is None else f"{generation['steps']}"
        facts = f"{record}; tensors `{generation['tensors_sha256']}`; data: {data}; steps: {steps}"
        rows.append((f"`{generation['path']}`", facts))
    first, last = start["held_out_loss"], start["parent_held_out_loss"]
    measured = "" if first is None else f"The held-out loss before the first step was {first:.6g}"
    if last is not None:
        compared = f"{measured}; that adapter ended with {last:.6g}."
    else:
        reason = start.get("not_compared", "the reason is not recorded")
        compared = f"{measured}{'. It' if measured else 'The held-out loss'} was not compared with that adapter's last "
        compared += f"one: {reason}."
    text = "The run went on from the first adapter of this line; each went on from the next."
    return f"## Went on from\n\n{text}\n\n{_table(rows)}\n\n{compared}"


def _precision(training: Mapping[str, Any]) -> str:
    quantized = f" in {training['quantization']}{_unquantized(training)}" if training.get("quantization") else ""
    quantized += f", dequantised from FP8 ({fp8['scaling']})" if (fp8 := training.get("dequantized")) else ""
    kernels = f", {training['kernels']} kernels" if training.get("kernels") else ""
    checkpointed = ", activations computed twice" if training["activation_checkpointing"] else ""
    window = f", attention over {training['sliding_window']} tokens" if training["sliding_window"] else ""
    weights = f"{training['precision']} base{quantized}, {training['adapter_dtype']} adapter"
    return f"{weights}, on {training['device']}{kernels}{checkpointed}{window}"


def _unquantized(training: Mapping[str, Any]) -> str:
    """Return the part of a base that its quantisation left in full, in words; empty for an older manifest."""
    share = training.get("unquantized")
    return "" if share is None else f" ({share:.0%} of its values in {training['precision']})"


def _evaluation(manifest: Mapping[str, Any]) -> str:
    lines = ["## Evaluation", ""]
    for result in manifest["evaluation"]:
        if is_declared(result):
            continue
        cells = (
            (name, f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False))
            for name, value in result["results"].items()
        )
        if "gate" in result:
            lines += [f"`{result['command']}`", "", *_gate(Gate.from_json(result["gate"])), ""]
            continue
        lines += [f"`{result['command']}`", "", _table(cells), ""]
    for command in commands_of(manifest):
        lines += [f"Yours: {code_span(command['command'])}", ""]
        if command["files"]:
            lines += [_table((code_span(name), _file_state(entry)) for name, entry in command["files"].items()), ""]
    return "\n".join(lines).rstrip()


def _gate(gate: Gate) -> Iterator[str]:
    """Yield the lines on a gate: its verdict, its table, and why a line did not pass."""
    yield f"Gate: **{gate.verdict}**. Base and adapter on the same rows; losses in nats a trained token. {gate.how}"
    yield ""
    yield f"| {' | '.join(HEADINGS)} |"
    yield f"|---|{'---:|' * (len(HEADINGS) - 2)}---|"
    for row in gate_cells(gate):
        yield _table_row(row)
    reasons = [f"- {reason}" for reason in gate.reasons()]
    yield from ("", *reasons) if reasons else ()


def _file_state(entry: Mapping[str, Any] | None) -> str:
    return f"`{entry['sha256']}`" if entry else "not there: run the command, then `mistral-lora note FOLDER`"


def _consequences(manifest: Mapping[str, Any]) -> str:
    parent = manifest.get("parent")
    if parent is None:
        valid = (
            "This folder holds no model, and is valid on the base weights above and on no others. `mistral-lora merge` "
            "makes a model of both."
        )
    else:
        valid = (
            f"This folder holds a whole model, merged in {parent['merge_dtype']}. The adapter's manifest has SHA-256 "
            f"`{parent['manifest_sha256']}`. No adapter of the base is valid on it."
        )
    return (
        f"## Consequences\n\n{_deployment(manifest)}\n\n{valid}\n\n"
        "`mistral-lora verify` recomputes the hashes of files, tensors, rows, ids and labels, the adapter's shape and "
        "its configuration. It cannot recompute schedule, environment and evaluation, which the trainer declared; "
        "`mistral-lora verify --rerun` trains again and compares."
    )


def _deployment(manifest: Mapping[str, Any]) -> str:
    """Return what production serves, and where; with a declared name, it is not a folder's name that counts."""
    server = (manifest.get(DEPLOYMENT) or {}).get("server")
    at = f" The server is {code_span(server['url'])} ({code_span(server['kind'])})." if server else ""
    return f"{deployed(manifest) or UNDECLARED}{at}"


def _reproduce(manifest: Mapping[str, Any]) -> str:
    packages = " ".join(f"{name}=={version}" for name, version in manifest["environment"]["packages"].items())
    code = manifest["environment"].get("code")
    changes = "  # plus uncommitted changes" if code and code["dirty"] else ""
    checkout = f"git checkout {code['commit']}{changes}\n" if code else ""
    devices = manifest["training"]["devices"]
    command = "mistral-lora train recipe.yaml"
    if devices > 1:
        command = f"accelerate launch --num_processes {devices} -m pytest_mistral_lora.training recipe.yaml"
    recipe = manifest.get("recipe")
    shown = f"\n\n```json\n{json.dumps(recipe, indent=2, ensure_ascii=False)}\n```" if recipe else ""
    return (
        "## Reproduce\n\n"
        f"```\n{checkout}pip install {packages}\n{command}\n```\n\n"
        "Use this `recipe.yaml` (JSON is YAML). On a CPU of the same kind, with the same libraries and thread count, "
        f"the adapter is equal bit for bit; on other machines, losses agree within rounding.{shown}"
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *map(_table_row, rows)])


def _table_row(cells: Iterable[str]) -> str:
    # a bar would end the cell
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


CARD = "README.md"


def card_text(manifest: Mapping[str, Any]) -> str:
    """Return the model card of an adapter or a merged model.

    The front matter has the Hub's keys (https://huggingface.co/docs/hub/model-cards#model-card-metadata); the keys of
    the recipe's `card` come after them.
    """
    tokenizer = manifest["tokenizer"]
    facts = (
        f"Prompts are those of `{tokenizer['file']}` ({tokenizer['version'] or tokenizer['backend']}), in this "
        "folder. [DECISION.md](DECISION.md) records the data, the settings and how to reproduce the run; "
        f"{'' if manifest['kind'] == 'merged' else '[training.html](training.html) shows its losses and answers; '}"
        "`manifest.json` has every hash, and `mistral-lora verify .` recomputes them."
    )
    merged = manifest["kind"] == "merged"
    base = f"`{manifest['base']}`" + (f" at `{manifest['revision']}`" if manifest["revision"] else "")
    name = _hub_id(manifest["base"])
    metadata = {
        "base_model": name,
        "base_model_relation": "finetune" if merged else "adapter",
        "datasets": [_hub_id(entry["path"]) for entry in manifest.get("dataset", {}).get("files", ())],
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "mistral"],
        **manifest.get("recipe", {}).get("card", {}),
    }
    if merged:
        title = (
            f"# {name}, fine-tuned and merged\n\nFull weights: {base} with a LoRA adapter merged into it. It is a "
            "model of its own: no adapter of the base is valid on it."
        )
        where, folder, load = "In this folder", ".", "model = AutoModelForCausalLM.from_pretrained(folder)"
    else:
        title = f"# LoRA adapter of {name}\n\nAn adapter, not a model. It is valid on {base} only."
        pin = f', revision="{manifest["revision"]}"' if manifest["revision"] else ""
        # the path of a local base is relative to the recipe, and so is the output
        where, folder = ("In this folder", ".") if pin else ("In the folder of the recipe", _output_of(manifest))
        load = (
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(manifest['base'])}{pin})\n"
            "model = PeftModel.from_pretrained(base, folder)"
        )
    if role := deployed(manifest):
        title += f"\n\n{role}"
    training = manifest.get("training", {})
    if training.get("quantization"):
        facts += f" The base was in {training['quantization']}{_unquantized(training)} while the adapter was trained."
    front = f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---"
    code = _SNIPPET.format(
        imports="" if merged else "from peft import PeftModel\n", folder=json.dumps(folder), load=load
    )
    use = f"## Use\n\n{where}:\n\n```python\n{code}```"
    return "\n\n".join([front, title, _EMPTY_SECTION, use, facts]) + "\n"


_SNIPPET = """\
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}
{load}
tokenizer = AutoTokenizer.from_pretrained(folder, config=model.config)
chat = [{{"role": "user", "content": "Hello"}}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=200)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""
"""A program that loads the folder and answers one question."""


def _output_of(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("recipe", {}).get("output", "."))


def _hub_id(name: str) -> str:
    """Return a name that the Hub accepts in metadata: it refuses a card with a path, a space or an accent in it."""
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, flags=re.ASCII):
        return name
    return re.sub(r"[^\w.-]+", "-", PurePosixPath(name).name, flags=re.ASCII).strip("-.") or "local"


NOTES = (DECISION, CARD)
_NEEDED = ("tokenizer", "template", "dataset", "masking", "lora", "training", "environment", "evaluation")


def note_texts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the notes of a folder by file name, with an empty author's section.

    Args:
        manifest: The folder's manifest; `files` and `seal` are not used. A manifest of version 0 records too
            little for notes.
    """
    if any(part not in manifest for part in _NEEDED):
        return {}
    # a manifest may be anybody's, and people print these files to terminals
    return {DECISION: printable(decision_text(manifest)), CARD: printable(card_text(manifest))}


def notes_record(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part `notes` of a manifest with these parts: see `records.deployment`; empty without declarations."""
    if DEPLOYMENT not in parts and not commands_of(parts):
        return {}
    of_run = {name: _note_entry(text) for name, text in note_texts(without_declarations(parts)).items()}
    return {NOTES_RECORD: {"version": __version__, "of_run": of_run}}


def _note_entry(text: str) -> dict[str, Any]:
    return {"sha256": sha256_bytes(text.encode()), "size": len(text.encode())}


def noted_by(manifest: Mapping[str, Any]) -> str | None:
    """Return the version of this package that made the notes: in the run, in the merge, or after it."""
    if NOTES_RECORD in manifest:
        later: str = manifest[NOTES_RECORD]["version"]
        return later
    environment = (manifest.get("parent") or manifest).get("environment", {})
    version: str | None = environment.get("packages", {}).get("pytest-mistral-lora")
    return version


def note_bytes(folder: Path, name: str) -> bytes:
    """Return a note with an empty author's section: the bytes that the manifest lists.

    Raises:
        InputError: If it cannot be read.
    """
    return with_author_section(_read(folder, name), "").encode()


def write_notes(folder: Path) -> list[Path]:
    """Generate the notes of a finished folder again, keep the author's section, and return their files.

    Raises:
        InputError: If the manifest is missing, not valid or lists no notes, this version would generate another text,
            or a note cannot be written.
    """
    manifest = load(folder).data
    listed = {name: manifest.get("files", {}).get(name) for name in NOTES}
    texts = note_texts(manifest)
    for name, text in texts.items():
        if listed[name] is None or sha256_bytes(text.encode()) != listed[name]["sha256"]:
            made = noted_by(manifest) or "another version"
            raise InputError(
                "this version writes another text than the manifest lists" if listed[name] else "is not listed",
                place=str(folder / name),
                next_step=f"Use the version that made the folder: {made}.",
            )
    return _put_notes(folder, texts)


def _put_notes(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write notes with the author's section that they have on disk, and return their files."""
    for name, text in texts.items():
        kept = author_section(_read(folder, name)) if (folder / name).exists() else ""
        put_text(folder / name, with_author_section(text, kept))
    return [folder / name for name in texts]


def declare_again(folder: Path, declared: Mapping[str, Any]) -> list[Path]:
    """Record other declarations in a finished folder: its manifest is sealed again, its notes are made again.

    Args:
        folder: The folder of an adapter or a merged model.
        declared: The declarations: `deployment`, if it is declared, and the user's entries of `evaluation`.

    Returns:
        The files that were written; none if the folder declares this already.

    Raises:
        InputError: If the manifest is missing, not valid, too old or damaged, or a file cannot be written.
    """
    data = load(folder).data
    content = read_bounded(inside(folder, MANIFEST))
    place = str(folder / MANIFEST)
    if "seal" not in data or not note_texts(data):
        expected = "the manifest of schema version 3, with its notes"
        raise InputError("records too little to declare anything beside it", place=place, expected=expected)
    if seal_of(content, data["seal"]) != data["seal"]:
        step = f"See what: mistral-lora verify {shlex.quote(str(folder))}. Nothing was written."
        raise InputError("was changed since it was sealed", place=place, expected=data["seal"], next_step=step)
    run = run_record(data)
    parts = {name: value for name, value in run.items() if name != "seal"}
    parts |= {name: value for name, value in declared.items() if name != "evaluation"}
    parts["evaluation"] = [*parts.get("evaluation", ()), *declared["evaluation"]]
    of_run = {name: run["files"][name] for name in NOTES if name in run["files"]}
    texts = {name: text for name, text in note_texts(parts).items() if name in of_run}
    written = {name: _note_entry(text) for name, text in texts.items()}
    if written != of_run:
        parts |= {NOTES_RECORD: {"version": __version__, "of_run": of_run}}
    manifest = build(**{**parts, "files": {**run["files"], **written}})
    if manifest == data:
        return []
    files = _put_notes(folder, texts)
    # last: it lists the notes with their hashes
    write_json(folder / MANIFEST, manifest)
    return [*files, folder / MANIFEST]


def _read(folder: Path, name: str) -> str:
    try:
        return inside(folder, name).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", place=str(folder / name)) from error
