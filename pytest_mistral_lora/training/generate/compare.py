"""Load base and adapter afresh, and record golden transcripts with them, or compare them with recorded ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pytest_mistral_lora.chat.completions import FormatCheck
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.base_model import Precision, choose_device, load_base
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, Transcript, load_folder, transcript_files
from pytest_mistral_lora.training.generate.generate import adapter_effect, generate, load_adapted, probe
from pytest_mistral_lora.training.generate.judge import AnswerJudgement, check_base, check_prompt, judge
from pytest_mistral_lora.training.generate.record import record


@dataclass(frozen=True)
class Comparison:
    """An adapter or a merged model, held to golden transcripts.

    Attributes:
        golden: Folder of the transcripts.
        base: Folder of the base.
        device: Where the model ran.
        precision: dtype of the base's weights.
        kind: `adapter` or `merged`.
        recorded_adapter: Whether the transcripts were recorded with this very adapter or merged model.
        judgements: What each transcript came to, in order.
    """

    golden: Path
    base: Path
    device: str
    precision: Precision
    kind: str
    recorded_adapter: bool
    judgements: Sequence[AnswerJudgement]

    @property
    def passed(self) -> bool:
        """Whether the adapter answers all of them as recorded."""
        return all(one.passed for one in self.judgements)

    @property
    def tiers(self) -> dict[str, int]:
        """How many transcripts are in each tier."""
        counts = Counter(one.tier for one in self.judgements)
        return {tier: counts[tier] for tier in ("exact", "equivalent", "different")}

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain JSON data."""
        data = {name: str(getattr(self, name)) for name in ("golden", "base", "device", "precision", "kind")}
        return {
            **data,
            "recorded_adapter": self.recorded_adapter,
            "passed": self.passed,
            "tiers": self.tiers,
            "transcripts": [one.to_json() for one in self.judgements],
        }


@dataclass(frozen=True)
class ModelSpec:
    """The weights that answer, and how they are loaded: as they were trained, or as a merge compares them.

    Attributes:
        folder: The adapter's or the merged model's folder.
        base: The base's folder; of a merged model, its own.
        identity: A transcript's `model`.
        precision: dtype of the weights of the base, or of the merged model.
        quantization: `nf4` if the base is loaded in 4 bits, or None.
        device: `cpu` or `cuda`.
    """

    folder: AdapterFolder
    base: Path
    identity: Mapping[str, Any]
    precision: Precision
    quantization: str | None
    device: str

    @classmethod
    def of(cls, folder: AdapterFolder, *, device: str = "auto") -> ModelSpec:
        """Return a folder's model as it was trained, its base found and checked; no model is loaded.

        Args:
            folder: The adapter's or the merged model's folder.
            device: `auto`, `cpu` or `cuda`.

        Raises:
            InputError: If there is no adapter, or as for `AdapterFolder.identity`.
        """
        identity = folder.identity  # first: a folder without an adapter needs no base
        return cls(folder, folder.base, identity, folder.precision, folder.quantization, choose_device(device))

    @property
    def encoder(self) -> Encoder:
        """The backend of training."""
        return self.folder.encoder

    def load(self) -> Any:
        """Load base and adapter, or the merged model, in eval mode.

        Raises:
            InputError: As for `load_adapted`.
        """
        if self.folder.kind == "merged":
            return load_base(self.base, self.precision, self.device).eval()
        return load_adapted(self.folder.path, self.base, self.precision, self.device, self.quantization)

    def answer(
        self, model: Any, rows: Sequence[Row], *, max_new_tokens: int, checks: Sequence[FormatCheck] = ()
    ) -> list[Transcript]:
        """Return the transcript of each row's last turn, answered greedily by what `load` gave; nothing is written."""
        return record(
            model,
            self.encoder,
            rows,
            generate(model, self.encoder, rows, max_new_tokens=max_new_tokens),
            identity=self.identity,
            precision=self.precision,
            max_new_tokens=max_new_tokens,
            checks=checks,
        )


def model_spec(adapter: Path, base: Path | None = None, *, device: str = "auto") -> ModelSpec:
    """Return the model of a folder as a command names it; its base is fetched if it has to be.

    Args:
        adapter: The adapter's or the merged model's folder.
        base: The base's folder; by default, the one that an adapter's folder names.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: If a base is given for a merged model, or as for `ModelSpec.of`.
    """
    folder = AdapterFolder(adapter, base, may_fetch=True)
    if base is not None and folder.kind == "merged":
        raise InputError(
            "a merged model (kind merged in its manifest.json), which is put on no base",
            place=str(adapter),
            next_step="Leave --base out, or name the adapter's folder.",
        )
    return ModelSpec.of(folder, device=device)


def smoke(spec: ModelSpec, rows: Sequence[Row], *, max_new_tokens: int = 256) -> dict[str, Any]:
    """Load a model and use it: plain data with `completions`, `probe`, `adapter_effect`.

    A merged model has no `adapter_effect`, since its adapter cannot be disabled.

    Args:
        spec: The model.
        rows: Conversations that end with the turn to generate.
        max_new_tokens: Longest completion, in tokens.

    Raises:
        InputError: If adapter, base and rows do not go together.
    """
    model = spec.load()
    encoded = [spec.encoder.encode(row) for row in rows]
    effect = {} if spec.folder.kind == "merged" else {"adapter_effect": adapter_effect(model, encoded)}
    return {
        "completions": [asdict(one) for one in generate(model, spec.encoder, rows, max_new_tokens=max_new_tokens)],
        "probe": asdict(probe(model, encoded)),
        **effect,
        "device": spec.device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def compare(adapter: Path, golden: Path | None = None, base: Path | None = None, *, device: str = "auto") -> Comparison:
    """Hold an adapter or a merged model to golden transcripts.

    Args:
        adapter: The adapter's or the merged model's folder.
        golden: Folder of transcripts, or one transcript; by default `transcripts` in the adapter's folder.
        base: The base's folder; by default, the one that the adapter's folder names.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: If there are no transcripts, the base is not the one that they were recorded on, or a prompt is
            encoded into other ids than it was.
    """
    golden = adapter / TRANSCRIPTS if golden is None else golden
    transcripts = load_folder(golden)
    spec = model_spec(adapter, base, device=device)
    check_base(transcripts, spec.identity["base_weights_sha256"], spec.base)
    for transcript in transcripts:
        check_prompt(spec.encoder, transcript)
    model = spec.load()
    return Comparison(
        golden=golden,
        base=spec.base,
        device=spec.device,
        precision=spec.precision,
        kind=spec.identity["kind"],
        recorded_adapter=all(one.model["tensors_sha256"] == spec.identity["tensors_sha256"] for one in transcripts),
        judgements=[judge(model, spec.encoder, one, precision=spec.precision) for one in transcripts],
    )


def record_rows(
    adapter: Path,
    rows: Sequence[Row],
    folder: Path,
    base: Path | None = None,
    *,
    max_new_tokens: int = 256,
    checks: Sequence[FormatCheck] = (),
    device: str = "auto",
) -> list[Path]:
    """Record the answers of an adapter as golden transcripts, and return their files.

    Args:
        adapter: The adapter's folder.
        rows: Conversations that end with the turn to generate.
        folder: Where the transcripts go; it is made, and must not hold others.
        base: The base's folder; by default, the one that the adapter's folder names.
        max_new_tokens: Longest completion, in tokens.
        checks: Format checks to hold each completion to.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: If adapter, base and rows do not go together, or the folder has transcripts.
    """
    if transcript_files(folder):
        raise InputError("has transcripts already", place=str(folder), next_step="Remove them or name another folder.")
    spec = model_spec(adapter, base, device=device)
    for row in rows:
        spec.encoder.prompt(row)
    transcripts = spec.answer(spec.load(), rows, max_new_tokens=max_new_tokens, checks=checks)
    folder.mkdir(parents=True, exist_ok=True)
    return [one.write(folder) for one in transcripts]
