"""Generate answers, record them as golden transcripts, and judge a model by recorded ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import GenerationConfig

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.reading import in_utf8
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base, load_nf4
from pytest_mistral_lora.checkpoint.devices import Precision
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import InputError, one_line
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.tensors import sha256_tensors
from pytest_mistral_lora.training.adapter import adapter_tensors, peft_quiet
from pytest_mistral_lora.training.display import RunDisplay


@dataclass(frozen=True)
class Completion:
    """A row's last assistant turn, generated.

    Attributes:
        row: Index of the row.
        prompt_tokens: Length of the prompt, in tokens.
        ids: Generated ids, with the closing EOS.
        text: The decoded ids, without control tokens.
        stop: `eos`, or `length` if `max_new_tokens` was reached.
        expected_ids: Ids of the turn in the row, with EOS.
        equal: Whether `ids` are `expected_ids`.
    """

    row: int
    prompt_tokens: int
    ids: tuple[int, ...]
    text: str
    stop: Literal["eos", "length"]
    expected_ids: tuple[int, ...]
    equal: bool


@dataclass(frozen=True)
class Probe:
    """Teacher-forced logits of some rows, small enough to keep.

    Attributes:
        sha256: Hash of the float32 logits at every supervised position.
        label_logits: For each row, the logit of each supervised token at the position before it, which predicts it.
    """

    sha256: str
    label_logits: tuple[tuple[float, ...], ...]


def probe(model: Any, encoded: Sequence[EncodedRow]) -> Probe:
    """Return a model's teacher-forced logits, one row at a time, with dropout off."""
    logits = [supervised_logits(model, row) for row in encoded]
    # the hash shows equality to the bit, on the same processor; the label's logits allow a tolerance elsewhere
    values = []
    for row, row_logits in zip(encoded, logits, strict=True):
        targets = torch.tensor([label for label in row.labels or () if label != IGNORE_INDEX], dtype=torch.int64)
        values.append(tuple(row_logits.gather(1, targets[:, None]).squeeze(1).tolist()))
    return Probe(sha256_tensors({f"{index:06}": row_logits for index, row_logits in enumerate(logits)}), tuple(values))


def supervised_logits(model: Any, row: EncodedRow) -> torch.Tensor:
    """Return the logits that predict a row's supervised tokens, `(supervised tokens, vocabulary)`, CPU float32."""
    model.eval()
    # logits at position i predict the token at i + 1; the head is computed at these positions only
    columns = [index - 1 for index, label in enumerate(row.labels or ()) if label != IGNORE_INDEX]
    with torch.inference_mode():
        ids = torch.tensor([row.input_ids], device=model.device)
        keep = torch.tensor(columns, device=model.device, dtype=torch.int64)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=keep, use_cache=False).logits
    found: torch.Tensor = logits[0].float().cpu()
    return found


def adapter_effect(model: Any, encoded: Sequence[EncodedRow]) -> float:
    """Return the largest difference that the adapter makes to a supervised logit; 0.0 for no effect."""
    largest = 0.0
    for row in encoded:
        with_adapter = supervised_logits(model, row)
        # the same weights and kernels on both sides: any difference is the adapter's
        with model.disable_adapter():
            difference = with_adapter - supervised_logits(model, row)
        largest = max(largest, difference.abs().max().item() if difference.numel() else 0.0)
    return largest


def generate(
    model: Any,
    encoder: Encoder,
    rows: Sequence[Row],
    *,
    max_new_tokens: int = 256,
    display: RunDisplay | None = None,
) -> list[Completion]:
    """Generate the last assistant turn of each row greedily, one row at a time.

    Args:
        model: Base with adapter, or a merged model.
        encoder: The backend that makes prompts.
        rows: Conversations that end with the turn to generate.
        max_new_tokens: Longest completion, in tokens.
        display: Display of the progress; None to show nothing.

    Raises:
        RowError: If a row cannot be encoded.
    """
    shown = display or RunDisplay()
    completions = []
    for index, row in enumerate(rows):
        # one prompt at a time: without padding, an answer cannot depend on its neighbours in a batch
        prompt = encoder.prompt(row)
        ids = complete(model, encoder, prompt, max_new_tokens=max_new_tokens)
        expected = last_turn_ids(encoder.encode(row))
        stop: Literal["eos", "length"] = "eos" if ids and ids[-1] == encoder.eos_id else "length"
        found = Completion(index, len(prompt), ids, encoder.answer_text(row, ids), stop, expected, ids == expected)
        completions.append(found)
        shown.count(len(completions), len(rows), "answer")
    return completions


def complete(
    model: Any,
    encoder: Encoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: Any = None,
) -> tuple[int, ...]:
    """Return the ids that a model generates after a prompt, with the closing EOS if it comes.

    Args:
        model: The model; it is put into eval mode.
        encoder: The backend that made the prompt.
        prompt: The ids before the answer.
        max_new_tokens: Longest completion, in tokens.
        temperature: 0 for the most probable token each time; above, tokens are drawn.
        streamer: transformers' streamer, which gets each token; None for no streaming.
    """
    model.eval()
    pad = model.config.get_text_config().pad_token_id
    # by default, transformers draws from 50 tokens only, or as the base's generation_config.json has it
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    sampling: dict[str, Any] = drawn if temperature else {"do_sample": False}
    config = GenerationConfig(
        **sampling,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=encoder.eos_id,
        pad_token_id=encoder.eos_id if pad is None else pad,
    )
    with torch.inference_mode():
        inputs = torch.tensor([prompt], device=model.device)
        mask = torch.ones_like(inputs)
        output = model.generate(input_ids=inputs, attention_mask=mask, generation_config=config, streamer=streamer)
    return tuple(output[0, len(prompt) :].tolist())


def last_turn_ids(encoded: EncodedRow) -> tuple[int, ...]:
    """Return the ids of a row's last assistant turn, with EOS; a turn of several messages is one turn."""
    spans = [span for span in encoded.spans if span.is_answer]
    return tuple(
        token for span in spans if span.turn == spans[-1].turn for token in encoded.input_ids[span.start : span.end]
    )


def load_adapted(
    adapter: AdapterFolder, base: BaseFolder, precision: Precision, device: str, quantization: str | None = None
) -> Any:
    """Load a base model and put a saved adapter on it; modules that it saves in full get the base's dtype.

    Raises:
        InputError: If the configuration is not supported, if PEFT refuses it on this base, or if file and loaded model
            do not have the same tensors. PEFT itself only warns, and the model then answers as its base.
    """
    # PEFT's from_pretrained reports missing and unexpected keys as a warning only: compare every tensor with the file
    saved, place = adapter.load_tensors(), Place.of(adapter.tensors_file)
    for name, tensor in saved.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise InputError(f"{name} is not finite", place=place, expected="finite numbers")
    model = (load_nf4 if quantization else load_base)(base, precision, device)
    # pass the checked keys to PEFT: for an unread file, it would import the module that a key names
    config = adapter.lora_config([name for name, _ in model.named_modules()])
    # PEFT makes all layers before it reads a tensor: a rank in the file must not cost gigabytes
    ranks = [config.r, *config.rank_pattern.values()]
    longest = max((side for tensor in saved.values() for side in tensor.shape), default=0)
    copies = sum(max(0, end - start) for start, end in config.layer_replication or ())
    if max(ranks) > longest or copies > len(saved):
        found = f"rank {max(ranks)}, {copies} replicated layers" if copies else f"rank {max(ranks)}"
        expected = f"those of the {len(saved)} tensors, of which no side is longer than {longest}"
        raise InputError(found, place=str(adapter.config_file), expected=expected)
    try:
        with peft_quiet(), in_utf8(adapter.path) as named:
            model = PeftModel.from_pretrained(model, named, config=config)
    except Exception as error:  # PEFT raises many types
        raise InputError(
            f"PEFT cannot put it on this base: {one_line(error)}", place=str(adapter.config_file)
        ) from error
    loaded = adapter_tensors(model)
    different = sorted(
        name
        for name in saved.keys() | loaded.keys()
        if name not in saved or name not in loaded or not torch.equal(saved[name].to(loaded[name].dtype), loaded[name])
    )
    if different:
        raise InputError(
            f"{len(different)} tensors do not fit the base, first {different[0]}",
            place=place,
            expected="an adapter of this base",
        )
    return model.eval()
