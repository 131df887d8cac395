"""Manifests that state a fact twice, and not alike: each is sealed, with the notes that it makes."""

from __future__ import annotations

from typing import Any

from gallery import Artifact, Mutant, mutant

from pytest_mistral_lora.records.gate import HELD_OUT, GateLine


@mutant("ML716", says="evaluation.gate is 0")
def gate_that_was_cut_out(artifact: Artifact) -> None:
    """The recipe asks for a gate, and the manifest records none."""
    artifact["manifest"]["recipe"]["evaluation"]["gate"] = True


def gated(artifact: Artifact) -> tuple[dict[str, Any], dict[str, Any]]:
    """Record a gate that passed on 40 held-out rows; return its entry of `evaluation`, and its line."""
    manifest = artifact["manifest"]
    manifest["recipe"]["evaluation"]["gate"] = True
    manifest["dataset"] |= {"held_out_rows": 40}
    manifest["dataset"]["eval_files"] = [{"path": "held.jsonl", "sha256": "1" * 64, "rows": 40}]
    manifest["recipe"]["data"]["eval"] = ["held.jsonl"]
    line = GateLine(HELD_OUT, "loss", 3.0, 1.0, -2.0, -2.5, -1.5, 0.0, rows=40, conversations=40, tokens=400)
    entry = {
        "command": "mistral-lora smoke . --gate",
        "results": {HELD_OUT: line.verdict},
        "gate": {
            "precision": "fp32",
            "device": "cpu",
            "level": 0.95,
            "resamples": 10_000,
            "seed": 0,
            "fewest_conversations": 40,
            "lines": [line.to_json()],
        },
    }
    manifest["evaluation"].append(entry)
    return entry, entry["gate"]["lines"][0]


def _of_gate(mutant_name: str, says: str, doc: str, **changes: Any) -> Mutant:
    def change(artifact: Artifact) -> None:
        entry, line = gated(artifact)
        for key, value in changes.items():
            (entry if key == "results" else line)[key] = value

    change.__name__, change.__doc__ = mutant_name, doc
    return mutant("ML716", says=says)(change)


LIMIT = _of_gate("limit_of_a_line", f"{HELD_OUT}.limit is 0.5", "A line has a wider limit than the recipe.", limit=0.5)
DIFFERENCE = _of_gate(
    "difference_of_a_line", f"{HELD_OUT}.difference is -3", "It is not adapter minus base.", difference=-3.0
)
RESULTS = _of_gate("results_of_a_gate", "results is", "They are not those of its lines.", results={HELD_OUT: "failed"})
VERDICT = _of_gate("verdict_of_a_line", "verdict is failed", "The numbers of the line pass.", verdict="failed")
ROWS = _of_gate("rows_of_a_line", f"{HELD_OUT}.rows is 44", "The run held out 40.", rows=44)
NAME = _of_gate("name_of_a_line", "lines is", "The line of the held-out rows is another.", name="retention loss")


@mutant("ML716", says=f"{HELD_OUT}.adapter is 1.0")
def held_out_loss_that_was_edited(artifact: Artifact) -> None:
    """The run ended with another held-out loss than the gate measured on the same rows."""
    gated(artifact)
    artifact["manifest"]["evaluation"][0]["results"] |= {"held-out loss, before": 3.0, "held-out loss, after": 2.0}
    (artifact["folder"] / "training_log.jsonl").unlink()
    del artifact["manifest"]["files"]["training_log.jsonl"]


@mutant("ML716", says="lora.start.path is None")
def start_that_was_cut_out(artifact: Artifact) -> None:
    """The recipe goes on from an adapter, and the manifest records none."""
    artifact["manifest"]["recipe"]["lora"]["start"] = "first"


@mutant("ML716", says="training.learning_rate is 0.02")
def learning_rate_that_was_edited(artifact: Artifact) -> None:
    """The learning rate is not the recipe's."""
    artifact["manifest"]["training"]["learning_rate"] = 0.02


@mutant("ML716", says="dataset_sha256 is")
def hash_of_other_files(artifact: Artifact) -> None:
    """The hash of all data files is not that of the listed ones; the rows are not at hand."""
    artifact["rows"] = []
    artifact["manifest"]["dataset_sha256"] = "1" * 64


@mutant("ML716", says="dataset.rows_used is 4")
def rows_that_are_not_all(artifact: Artifact) -> None:
    """Fewer rows were used than the counts of dropped rows leave; the rows are not at hand."""
    artifact["rows"] = []
    artifact["manifest"]["dataset"]["rows_used"] = 4


@mutant("ML702", says="results.training loss, first step is")
def loss_that_the_log_does_not_have(artifact: Artifact) -> None:
    """The first loss is not that of the training log beside it."""
    artifact["manifest"]["evaluation"][0]["results"]["training loss, first step"] = 1.0
