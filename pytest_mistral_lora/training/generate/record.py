"""Record a model's answers as golden transcripts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from pytest_mistral_lora.chat.completions import AnswerToCheck, FormatCheck, verdicts
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.devices import Precision
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.checkpoint.tokenizers import oracle_file
from pytest_mistral_lora.errors import NoOracleError
from pytest_mistral_lora.records.files import sha256_file
from pytest_mistral_lora.records.tensors import sha256_tensors
from pytest_mistral_lora.records.transcripts import Transcript
from pytest_mistral_lora.training.generate import Completion

# Digits of recorded log-probabilities: far finer than any tolerance, and the same text for the same run.
_DECIMALS = 6
_PACKAGES = ("mistral-common", "peft", "tokenizers", "torch", "transformers")


def adapter_identity(tensors: Mapping[str, torch.Tensor], **base: str | None) -> dict[str, Any]:
    """Return a transcript's `model`: the kind, the hash of the tensors, and the base.

    Args:
        tensors: The adapter's tensors, by the names of its file.
        base: The values of `BASE_FACTS`.
    """
    return {"kind": "adapter", "tensors_sha256": sha256_tensors(tensors), **base}


def answer_of(completion: Completion, row: Row, encoder: Encoder) -> AnswerToCheck:
    """Return a completion as format checks take it; the oracle is None if the tokenizer has none."""
    try:
        oracle = encoder.tokenizer.oracle
    except NoOracleError:
        oracle = None
    return AnswerToCheck(completion.ids, completion.text, completion.stop, row.tools or (), oracle)


def record(
    model: Any,
    encoder: Encoder,
    rows: Sequence[Row],
    completions: Iterable[Completion],
    *,
    identity: Mapping[str, Any],
    precision: Precision,
    max_new_tokens: int,
    checks: Sequence[FormatCheck] = (),
) -> list[Transcript]:
    """Return a transcript of each completion; nothing is written.

    Args:
        model: The model that answered, in eval mode.
        encoder: The backend that makes prompts.
        rows: The rows that were answered.
        completions: The result of `generate` for them.
        identity: The `model` of each transcript.
        precision: dtype of the base's weights.
        max_new_tokens: The limit that `generate` had, in tokens.
        checks: Format checks to apply to each completion.

    Raises:
        RowError: If a row cannot be encoded.
    """
    constant: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "model": dict(identity),
        "tokenizer": tokenizer_identity(encoder),
        "recorded_with": {name: version(name) for name in _PACKAGES},
        "device": torch.device(model.device).type,
        "precision": precision,
    }
    found = []
    for row, completion in zip(rows, completions, strict=True):
        prompt = encoder.prompt(row)
        checked = verdicts(answer_of(completion, row, encoder), checks)
        logprobs = next_token_logprobs(model, prompt, completion.ids)
        found.append(
            Transcript(
                case=f"row-{completion.row + 1:04}",
                row=row,
                prompt_ids=prompt,
                completion_ids=completion.ids,
                text=completion.text,
                stop=completion.stop,
                checks=tuple(
                    {**check.to_json(), "passed": one.passed, "reason": one.reason}
                    for check, one in zip(checks, checked, strict=True)
                ),
                **_likelihood(logprobs, completion.ids),
                **constant,
            )
        )
    return found


def tokenizer_identity(encoder: Encoder) -> dict[str, Any]:
    """Return a transcript's `tokenizer`: the backend, and version, name and hash of its file."""
    file = encoder.file
    by_oracle = encoder.backend == "mistral-common" or oracle_file(encoder.tokenizer.path) is not None
    return {
        "backend": encoder.backend,
        "version": encoder.tokenizer.oracle.version if by_oracle else None,
        "file": encoder.file_name,
        "sha256": sha256_file(file),
    }


def _likelihood(logprobs: torch.Tensor, ids: Sequence[int]) -> dict[str, Any]:
    """Return `logprobs`, `margins` and `runner_up_ids` of a completion, one value a token.

    With log-probabilities l and a chosen token c, the runner-up r is the argmax of l over all other tokens, and the
    margin is l[c] - l[r]: negative if the completion is not greedy.
    """
    chosen = torch.tensor(ids)[:, None]
    own = logprobs.gather(1, chosen)
    others, runner_up = logprobs.scatter(1, chosen, -torch.inf).max(dim=1, keepdim=True)
    return {
        # adding zero turns -0.0 into 0.0
        "logprobs": tuple(round(min(value, 0.0), _DECIMALS) + 0.0 for value in own.squeeze(1).tolist()),
        "margins": tuple(round(value, _DECIMALS) + 0.0 for value in (own - others).squeeze(1).tolist()),
        "runner_up_ids": tuple(runner_up.squeeze(1).tolist()),
    }


def next_token_logprobs(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of `next_token_logits`, in nats, with the same shape."""
    return torch.log_softmax(next_token_logits(model, prompt, completion), dim=-1)


def next_token_logits(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """Return the logits that predict each token of a completion, from one forward pass.

    Args:
        model: A causal language model.
        prompt: Ids before the completion.
        completion: Ids to feed, whether or not the model would generate them.

    Returns:
        `(completion tokens, vocabulary)`, float32 on the CPU.
    """
    model.eval()
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *completion]], device=model.device)
        keep = len(completion) + 1  # from the last prompt token on; the last position predicts nothing of these
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=keep, use_cache=False).logits
        found: torch.Tensor = logits[0, :-1].float().cpu()
    return found
