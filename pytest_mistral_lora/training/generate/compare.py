"""Load base and adapter afresh, and record golden transcripts with them, or compare them with recorded ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.completions import FormatCheck
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.base_model import Precision, choose_device, weight_files
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder, is_merged
from pytest_mistral_lora.records.hashing import ADAPTER_TENSORS, read_tensors, sha256_tensors
from pytest_mistral_lora.records.manifest import load
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, Transcript, load_folder, transcript_files
from pytest_mistral_lora.training.generate.generate import encoder_of, generate, load_recorded, recorded_training
from pytest_mistral_lora.training.generate.judge import AnswerJudgement, check_base, check_prompt, judge
from pytest_mistral_lora.training.generate.record import BASE_FACTS, adapter_identity, record, tokenizer_identity


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
class Adapted:
    """An adapter's folder and its base, or a merged model's folder, before a weight is loaded.

    Attributes:
        adapter: The adapter's or the merged model's folder.
        base: The base's folder, its weights checked; the same folder for a merged model.
        identity: A transcript's `model`.
        precision: dtype of the base's weights in training, fp32 where it is not recorded; of a merged model's own.
        quantization: `nf4` where the base was in 4 bits in training, or None.
        encoder: The backend that it was trained with.
        device: `cpu` or `cuda`.
    """

    adapter: Path
    base: Path
    identity: dict[str, Any]
    precision: Precision
    quantization: str | None
    encoder: Encoder
    device: str

    @classmethod
    def find(cls, adapter: Path, base: Path | None = None, *, device: str = "auto") -> Adapted:
        """Find what an adapter's folder needs; a merged model's needs nothing else.

        Args:
            adapter: The adapter's or the merged model's folder.
            base: The base's folder; by default, the one that an adapter's folder names.
            device: `auto`, `cpu` or `cuda`.

        Raises:
            InputError: If there is no adapter, the base is not at hand, it is another one than was trained on, or a
                base is given for a merged model.
        """
        if is_merged(adapter):
            return cls._merged(adapter, base, device)
        tensors = read_tensors(adapter / ADAPTER_TENSORS)
        files = AdapterFolder(adapter)
        recorded = files.recorded_base
        folder = files.locate_base(base, fetch=True).require(adapter)
        weights = recorded.check(folder)
        training = recorded_training(adapter)
        identity = adapter_identity(
            tensors, base=recorded.name, revision=recorded.revision, base_weights_sha256=weights
        )  # fmt: skip
        precision: Precision = training.get("precision", "fp32")
        return cls(
            adapter,
            folder,
            identity,
            precision,
            training.get("quantization"),
            encoder_of(adapter, folder),
            choose_device(device),
        )

    @property
    def tokenizer(self) -> dict[str, Any]:
        """A transcript's `tokenizer`."""
        return tokenizer_identity(self.encoder)

    @classmethod
    def _merged(cls, folder: Path, base: Path | None, device: str) -> Adapted:
        if base is not None:
            raise InputError(
                "a merged model (kind merged in its manifest.json), which is put on no base",
                place=str(folder),
                next_step="Leave --base out, or name the adapter's folder.",
            )
        data = load(folder).data
        identity = {
            "kind": "merged",
            "tensors_sha256": sha256_tensors(Weights(weight_files(folder))),
            **{name: data.get(name) for name in BASE_FACTS},
        }
        precision: Precision = recorded_training(folder)["precision"]
        return cls(folder, folder, identity, precision, None, encoder_of(folder, folder), choose_device(device))

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

    def load(self) -> Any:
        """Load base and adapter as they were trained, or the merged model, in eval mode."""
        return load_recorded(self.adapter, self.base, self.precision, self.device, self.quantization)


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
    adapted = Adapted.find(adapter, base, device=device)
    check_base(transcripts, adapted.identity["base_weights_sha256"], adapted.base)
    for transcript in transcripts:
        check_prompt(adapted.encoder, transcript)
    model = adapted.load()
    return Comparison(
        golden=golden,
        base=adapted.base,
        device=adapted.device,
        precision=adapted.precision,
        kind=adapted.identity["kind"],
        recorded_adapter=all(one.model["tensors_sha256"] == adapted.identity["tensors_sha256"] for one in transcripts),
        judgements=[judge(model, adapted.encoder, one, precision=adapted.precision) for one in transcripts],
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
    adapted = Adapted.find(adapter, base, device=device)
    for row in rows:
        adapted.encoder.prompt(row)
    transcripts = adapted.answer(adapted.load(), rows, max_new_tokens=max_new_tokens, checks=checks)
    folder.mkdir(parents=True, exist_ok=True)
    return [one.write(folder) for one in transcripts]
