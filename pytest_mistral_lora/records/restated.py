"""The facts that a record states twice: a record that contradicts itself is not believed, whoever sealed it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_mistral_lora.checkpoint.hashes import joint_sha256
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.records.deployment import is_declared
from pytest_mistral_lora.records.gate import HELD_OUT, RATE, RETENTION, Gate, GateLine

TRAINING_LOG = "training_log.jsonl"
FIRST, LAST = "training loss, first step", "training loss, last log"
BEFORE, AFTER = "held-out loss, before", "held-out loss, after"
LOGGED = frozenset({FIRST, LAST, BEFORE, AFTER})
"""The results that `loss_results` takes from the training log."""

PASSES = "rate that passes "
_ABSENT = object()

_ALIKE: Mapping[str, str] = {
    "seed": "recipe.training.seed",
    "lora.seed": "recipe.training.seed",
    "dataset.held_out": "recipe.data.held_out",
    "dataset.truncation": "recipe.training.truncation",
    "dataset.unsupervised": "recipe.training.unsupervised",
    "masking.objective": "recipe.training.objective",
    **{f"lora.{key}": f"recipe.lora.{key}" for key in ("r", "alpha", "dropout", "rslora", "dora")},
    **{
        f"training.{key}": f"recipe.training.{key}"
        for key in (
            "activation_checkpointing",
            "batch_size",
            "learning_rate",
            "max_grad_norm",
            "max_length",
            "micro_batch_tokens",
            "order_seed",
            "weight_decay",
        )
    },
    "training.schedule.name": "recipe.training.schedule",
    "training.schedule.total_steps": "recipe.training.steps",
    "training.steps": "training.schedule.total_steps",
    "parent.tensors_sha256": "lora.tensors_sha256",
}
"""Values that the record has at two places, where it has both."""

_OR_NULL: Mapping[str, str] = {
    "training.kernels": "recipe.training.kernels",
    "training.quantization": "recipe.base.quantization",
    "training.schedule.min_learning_rate_ratio": "recipe.training.min_learning_rate_ratio",
    "lora.start.path": "recipe.lora.start",
}
"""The same of values that a record leaves out, or writes as null, if the run has none."""

_OF_ADAPTER: Mapping[str, str] = {
    "revision": "recipe.base.revision",
    "base_weights_sha256": "recipe.base.weights_sha256",
}
"""The same of an adapter alone: a merged model has those of the base that it was merged into."""


@dataclass(frozen=True, slots=True)
class Restated:
    """A fact that a record states twice.

    Attributes:
        name: Its JSON path in the manifest, without `$.`.
        recorded: The value there.
        again: The path, or the words, of the other statement.
        found: The value of the other statement.
        agree: Whether both are the same.
        is_sum: Whether the other statement is a sum of facts that are recomputed with this one.
    """

    name: str
    recorded: Any
    again: str
    found: Any
    agree: bool
    is_sum: bool = False

    @classmethod
    def equal(cls, name: str, recorded: Any, again: str, found: Any, *, is_sum: bool = False) -> Restated:
        """Return a fact whose statements have to be equal."""
        return cls(name, recorded, again, found, recorded == found, is_sum)


def loss_results(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the results of a run's training log: losses in nats a supervised token, by their names in `evaluation`.

    Args:
        log: Its lines, with `loss` or `eval_loss`.
    """
    losses = [line["loss"] for line in log if "loss" in line]
    held_out = [line["eval_loss"] for line in log if "eval_loss" in line]
    results = {FIRST: losses[0], LAST: losses[-1]}
    return results | ({BEFORE: held_out[0], AFTER: held_out[-1]} if held_out else {})


def restated(data: Mapping[str, Any]) -> Iterator[Restated]:
    """Yield each fact that a manifest states twice.

    Args:
        data: A valid manifest, under the names of the newest version.
    """
    for name, again in {**_ALIKE, **(_OF_ADAPTER if data["kind"] == "adapter" else {})}.items():
        recorded, found = _at(data, name), _at(data, again)
        if _ABSENT not in (recorded, found):
            yield Restated.equal(name, recorded, again, found)
    for name, again in _OR_NULL.items():
        if isinstance(_at(data, again.rpartition(".")[0]), Mapping) and name.partition(".")[0] in data:
            recorded, found = (None if value is _ABSENT else value for value in (_at(data, name), _at(data, again)))
            yield Restated.equal(name, recorded, again, found)
    yield from _base(data)
    yield from _rows(data)
    yield from _evaluation(data)


def _at(data: Any, path: str) -> Any:
    """Return the value at a path; a recipe in a manifest may be anything."""
    for key in path.split("."):
        if not isinstance(data, Mapping) or key not in data:
            return _ABSENT
        data = data[key]
    return data


def _base(data: Mapping[str, Any]) -> Iterator[Restated]:
    written = _at(data, "recipe.base")
    for key in ("repo", "name") if isinstance(written, Mapping) else ():
        if written.get(key) is not None:
            yield Restated.equal("base", data["base"], f"recipe.base.{key}", written[key])
            break
    # `auto` is decided on the machine of the run
    for key in ("precision", "device"):
        recorded, found = _at(data, f"training.{key}"), _at(data, f"recipe.training.{key}")
        if _ABSENT not in (recorded, found) and found != "auto":
            yield Restated.equal(f"training.{key}", recorded, f"recipe.training.{key}", found)


def _rows(data: Mapping[str, Any]) -> Iterator[Restated]:
    if "dataset" not in data:
        return
    dataset, written = data["dataset"], _at(data, "recipe.data")
    digests = [entry["sha256"] for entry in dataset["files"]]
    if digests:
        yield Restated.equal("dataset_sha256", data["dataset_sha256"], "dataset.files", joint_sha256(digests))
    if isinstance(written, Mapping) and "eval" in written:
        yield Restated.equal(
            "dataset.eval_files", bool(dataset["eval_files"]), "recipe.data.eval", bool(written["eval"])
        )
    if isinstance(_at(data, "recipe.evaluation"), Mapping):
        declared = _at(data, "recipe.evaluation.retention") not in (_ABSENT, None)
        yield Restated.equal("dataset.retention", "retention" in dataset, "recipe.evaluation.retention", declared)
    yield from _objectives(data)
    # a manifest that counts no dropped rows is older than the policies
    if "rows_dropped" in dataset and "rows_used" in dataset:
        used = dataset["rows"] - sum(dataset["rows_dropped"].values())
        yield Restated.equal(
            "dataset.rows_used", dataset["rows_used"], "dataset.rows without rows_dropped", used, is_sum=True
        )
    if "held_out_removed" in dataset:
        in_files = sum(entry["rows"] for entry in (*dataset["files"], *dataset["eval_files"]))
        held_out = dataset["held_out_rows"] + sum(dataset["held_out_removed"]["rows_dropped"].values())
        again = "the rows of its files without held-out rows"
        yield Restated.equal("dataset.rows", dataset["rows"], again, in_files - held_out, is_sum=True)
    if "retention" in dataset:
        retention = dataset["retention"]
        rows = sum(entry["rows"] for entry in retention["files"]) - sum(retention["removed"]["rows_dropped"].values())
        again = "the rows of its files without rows_dropped"
        yield Restated.equal("dataset.retention.rows", retention["rows"], again, rows, is_sum=True)


def _objectives(data: Mapping[str, Any]) -> Iterator[Restated]:
    """Compare the objectives of single files: rows of one answer do not tell them apart."""
    of_run = _at(data, "masking.objective")
    for name, key in (("files", "train"), ("eval_files", "eval")):
        entries, written = data["dataset"][name], _at(data, f"recipe.data.{key}")
        declared = _at(data, "recipe.training.objective")
        # a folder is one entry of a recipe, and several files
        if _ABSENT in (of_run, declared) or not isinstance(written, list) or len(entries) != len(written):
            continue
        for index, (entry, source) in enumerate(zip(entries, written, strict=True)):
            wanted = source.get("objective", declared) if isinstance(source, Mapping) else declared
            field = f"dataset.{name}[{index}].objective"
            # the objective of the run is a fact of its own
            if "objective" in entry or wanted != declared:
                yield Restated.equal(field, entry.get("objective", of_run), f"recipe.data.{key}[{index}]", wanted)


def _evaluation(data: Mapping[str, Any]) -> Iterator[Restated]:
    measured = [result for result in data.get("evaluation", ()) if not is_declared(result)]
    results = {name: value for result in measured if "gate" not in result for name, value in result["results"].items()}
    first = _at(data, "lora.start.held_out_loss")
    if first is not _ABSENT:
        yield Restated.equal("lora.start.held_out_loss", first, f"evaluation: {BEFORE}", results.get(BEFORE))
    gates = [result for result in measured if "gate" in result]
    if isinstance(_at(data, "recipe.evaluation"), Mapping):
        asked = _at(data, "recipe.evaluation.gate") is True
        yield Restated.equal("evaluation.gate", len(gates), "recipe.evaluation.gate", int(asked))
    for result in gates:
        yield from _gate(data, result, results)


def _gate(data: Mapping[str, Any], result: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[Restated]:
    """Compare the lines of a gate with each other statement about them.

    Args:
        data: The manifest.
        result: The entry of `evaluation` with the gate.
        results: The results of the other entries, by name.
    """
    gate = Gate.from_json(result["gate"])
    verdicts = {line.name: line.verdict for line in gate.lines}
    yield Restated.equal("evaluation.gate.results", result["results"], "the numbers of its lines", verdicts)
    dataset = data.get("dataset", {})
    expected = {HELD_OUT: bool(dataset.get("held_out_rows")), RETENTION: "retention" in dataset}
    # a gate without held-out rows judges no rate
    names = (printable(name.removeprefix(PASSES), lines=False) for name in results if name.startswith(PASSES))
    expected |= {f"{RATE}{name}": expected[HELD_OUT] for name in names}
    lines = sorted(name for name, there in expected.items() if there)
    yield Restated.equal("evaluation.gate.lines", sorted(verdicts), "the rows and checks of the run", lines)
    for line, entry in zip(gate.lines, result["gate"]["lines"], strict=True):
        field = f"evaluation.gate.{line.name}"
        yield Restated.equal(f"{field}.verdict", entry["verdict"], "its numbers", line.verdict)
        difference = round(line.adapter - line.base, 6)
        # each of the three is rounded to six digits
        exact = abs(line.difference - difference) <= 2e-6 + 1e-12 * abs(line.base)
        yield Restated(f"{field}.difference", line.difference, "adapter minus base", difference, exact)
        limit = _at(data, "recipe.evaluation.retention.max_loss_increase") if line.name == RETENTION else 0.0
        if limit is not _ABSENT:
            yield Restated.equal(f"{field}.limit", line.limit, "the limit of the recipe", limit)
        yield from _rows_of_line(field, line, dataset, results)
    yield from _losses(data, {line.name: line for line in gate.lines}, results)


def _rows_of_line(
    field: str, line: GateLine, dataset: Mapping[str, Any], results: Mapping[str, Any]
) -> Iterator[Restated]:
    """Compare the number of rows of a line with those of the dataset, or with those that were answered."""
    part = dataset.get("retention") if line.name == RETENTION else dataset
    used, removed = ("rows", "removed") if line.name == RETENTION else ("held_out_rows", "held_out_removed")
    if line.measures == "rate":
        if "rows" in results:
            yield Restated.equal(f"{field}.rows", line.rows, "evaluation: rows", results["rows"])
    elif part is not None and removed in part:
        # a row without a loss cannot be measured
        rows = part[used] - part[removed]["rows_without_loss"]
        yield Restated.equal(f"{field}.rows", line.rows, f"{used} with a loss", rows)


def _losses(data: Mapping[str, Any], lines: Mapping[str, GateLine], results: Mapping[str, Any]) -> Iterator[Restated]:
    """Compare the held-out losses of a gate with those of the run's own evaluation, which packs the same rows."""
    line = lines.get(HELD_OUT)
    # a new adapter changes nothing before the first step; one that was gone on from is no base
    names = {AFTER: "adapter"} if "start" in data.get("lora", {}) else {AFTER: "adapter", BEFORE: "base"}
    precision = _at(data, "training.precision")
    for name, key in names.items() if line is not None else ():
        if isinstance(found := results.get(name), int | float):
            recorded = getattr(line, key)
            # far above what was measured: 1e-6 in fp32, and 4e-5 in bf16 (see `start_loss.TOLERANCES`)
            allowed = 0.01 if precision == "fp32" else 0.05 + 0.01 * abs(found)
            near = abs(recorded - found) <= allowed
            yield Restated(f"evaluation.gate.{HELD_OUT}.{key}", recorded, f"evaluation: {name}", found, near)
