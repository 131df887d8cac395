"""Adapters and golden transcripts that do not belong together, broken on purpose."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bench_adapter import TENSORS, settings
from gallery import Artifact, mutant
from safetensors.torch import load_file, save_file
from trained import WEIGHTS, copied, replace_weights, trained

from pytest_mistral_lora.chat.completions import FormatCheck
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.collection import collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.model_targets import AdapterTarget
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.manifest import MANIFEST
from pytest_mistral_lora.training.generate.model_spec import record_rows

GOLDEN = "transcripts"
Data = dict[str, Any]


@cache
def recorded() -> dict[str, str]:
    """Record two answers of the gallery's adapter, and return the text of each transcript by case."""
    source, folder = trained(), Path(tempfile.mkdtemp(prefix="transcripts-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rows, checks = list(read_rows(source.rows))[:2], (FormatCheck("max_tokens", 8),)
    files = record_rows(source.adapter, rows, folder, source.base, max_new_tokens=8, checks=checks, device="cpu")
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


class TranscriptBench:
    """Makes a trained adapter with its base and two transcripts, and judges it by them."""

    subject = "transcript"

    def make(self, folder: Path) -> Artifact:
        """Make a trained adapter with transcripts and its base below a folder."""
        source = trained()
        adapter, base = copied(source.adapter, folder / "lora"), copied(source.base, folder / "base")
        (adapter / GOLDEN).mkdir()
        for case, text in recorded().items():
            (adapter / GOLDEN / f"{case}.json").write_text(text, encoding="utf-8")
        transcripts = {case: json.loads(text) for case, text in recorded().items()}
        return {"folder": adapter, "transcripts": transcripts, "base": base}

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Run every check of the subject."""
        torch.set_num_threads(1)
        folder = artifact["folder"]
        for case, data in artifact["transcripts"].items():
            if data != json.loads(recorded()[case]):
                (folder / GOLDEN / f"{case}.json").write_text(json.dumps(data), encoding="utf-8")
        target = AdapterTarget("lora", folder, given=AdapterFolder(folder, BaseFolder(artifact["base"])))
        checks = [check for check in collect([target], settings(folder)) if check.subject == self.subject]
        return [finding for check in checks for finding in check.run().findings]


BENCH = TranscriptBench()


@mutant("ML801", says="not valid JSON")
def transcript_cut_off(artifact: Artifact) -> None:
    """A transcript ends early."""
    file = artifact["folder"] / GOLDEN / "row-0001.json"
    file.write_bytes(file.read_bytes()[:300])


@mutant("ML801", says="$.margins: 9 values for 8 tokens")
def margins_of_another_answer(artifact: Artifact) -> None:
    """A transcript has a margin too many."""
    artifact["transcripts"]["row-0001"]["margins"].append(1.0)


@mutant("ML801", says="but the file is row-0002.json")
def transcript_under_another_name(artifact: Artifact) -> None:
    """A transcript was copied over another."""
    golden = artifact["folder"] / GOLDEN
    shutil.copy(golden / "row-0001.json", golden / "row-0002.json")


@mutant("ML802", says="prompt token 1 is")
def prompt_without_its_opening(artifact: Artifact) -> None:
    """The prompt was recorded without [INST]."""
    artifact["transcripts"]["row-0001"]["prompt_ids"].pop(1)


@mutant("ML802", says="the end")
def prompt_with_a_space_more(artifact: Artifact) -> None:
    """The prompt was recorded with one more token at its end, the space before an answer."""
    artifact["transcripts"]["row-0002"]["prompt_ids"].append(29473)


@mutant("ML806", says="completion_ids[7]: the id 32768")
def answer_of_a_larger_model(artifact: Artifact) -> None:
    """The last id of an answer is the first that the model does not have."""
    artifact["transcripts"]["row-0002"]["completion_ids"][7] = 32768


@mutant("ML806", says="runner_up_ids[0]: the id 2147483647")
def runner_up_of_no_model(artifact: Artifact) -> None:
    """A runner-up is an id that no model has."""
    artifact["transcripts"]["row-0001"]["runner_up_ids"][0] = 2**31 - 1


@mutant("ML801", says="$.completion_ids[1]: -1; expected at least 0")
def negative_id(artifact: Artifact) -> None:
    """An id of an answer is negative, as labels without loss are."""
    artifact["transcripts"]["row-0001"]["completion_ids"][1] = -1


@mutant("ML801", says='$.completion_ids[1]: "12"; expected integer')
def id_in_quotes(artifact: Artifact) -> None:
    """An id of an answer is text."""
    artifact["transcripts"]["row-0001"]["completion_ids"][1] = "12"


@mutant("ML801", says="$.max_new_tokens: 1000000000; expected at most 65536")
def answer_without_an_end(artifact: Artifact) -> None:
    """A transcript asks for as long an answer as no model gives."""
    artifact["transcripts"]["row-0001"]["max_new_tokens"] = 10**9


@mutant("ML803")
def base_of_other_weights(artifact: Artifact) -> None:
    """The base is not the one that was trained on."""
    file = artifact["base"] / WEIGHTS
    name, tensor = next(iter(load_file(file).items()))
    replace_weights(file, **{name: tensor + 1.0})


@mutant("ML803", says="as recorded")
def recorded_on_another_base(artifact: Artifact) -> None:
    """A transcript was recorded on another base."""
    artifact["transcripts"]["row-0002"]["model"]["base_weights_sha256"] = "1" * 64


@mutant("ML803", says="the adapter's tensors")
def recorded_with_an_earlier_adapter(artifact: Artifact) -> None:
    """A transcript was recorded with an earlier adapter, which answers alike."""
    artifact["transcripts"]["row-0001"]["model"]["tensors_sha256"] = "1" * 64


@mutant("ML803 ML804", says="margin when recorded")
def adapter_scaled(artifact: Artifact) -> None:
    """The adapter's weights were changed after the transcripts were recorded."""
    file = artifact["folder"] / TENSORS
    tensors = {name: tensor.clone() * (-4.0 if ".lora_B." in name else 1.0) for name, tensor in load_file(file).items()}
    save_file(tensors, file)


@mutant("ML804", says="token 2")
def another_answer(artifact: Artifact) -> None:
    """A transcript has another token where the choice was clear."""
    data: Data = artifact["transcripts"]["row-0001"]
    data["completion_ids"][2], data["margins"][2] = data["runner_up_ids"][2], 2.0


@mutant("ML804", says="log-probability moved by")
def a_near_tie_in_an_answer_that_is_no_longer_likely(artifact: Artifact) -> None:
    """A transcript has another token at a near tie, but its log-probabilities are not those of this model."""
    data: Data = artifact["transcripts"]["row-0002"]
    data["completion_ids"][2], data["margins"][2] = data["runner_up_ids"][2], 0.0001


@mutant("ML805", says="more than 4")
def answer_too_long(artifact: Artifact) -> None:
    """An answer is longer than the transcript allows."""
    artifact["transcripts"]["row-0001"]["checks"][0] |= {"name": "max_tokens:4", "value": 4}


def record_gate(folder: Path, **changes: Any) -> None:
    """Write a gate into a manifest: rows of other subjects whose loss rose, unless the changes say otherwise."""
    line = {"name": "retention loss", "measures": "loss", "base": 1.2, "adapter": 1.6, "difference": 0.4, "low": 0.15}
    line |= {"high": 0.64, "limit": 0.05, "rows": 48, "conversations": 48, "tokens": 2400, "verdict": "failed"}
    line |= changes
    how = {"precision": "fp32", "device": "cpu", "level": 0.95, "resamples": 10000, "seed": 0}
    how["fewest_conversations"] = 40
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    command, results = "mistral-lora smoke . --gate", {line["name"]: line["verdict"]}
    data["evaluation"].append({"command": command, "results": results, "gate": {**how, "lines": [line]}})
    (folder / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


@mutant("ML807", says="retention loss: 1.6000 nats a token, +0.4000 against the base, interval +0.1500 to +0.6400")
def lost_what_it_knew(artifact: Artifact) -> None:
    """The gate of the run measured a higher loss of rows of other subjects than the recipe allows."""
    record_gate(artifact["folder"])


@mutant("ML807", says="rate of json: 40.0%, -50.0% against the base")
def lost_its_format(artifact: Artifact) -> None:
    """Fewer answers are JSON than those of the base, and the recorded verdict was edited by hand."""
    rate = {"name": "rate of json", "measures": "rate", "base": 0.9, "adapter": 0.4, "difference": -0.5}
    ends = {"low": -0.6, "high": -0.35, "limit": 0.0, "tokens": 0, "verdict": "passed"}
    record_gate(artifact["folder"], **rate, **ends)
