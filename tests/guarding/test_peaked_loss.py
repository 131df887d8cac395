"""The verdict on the first step of a model that has learned its rows: it is sure of most tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sampling import sampled
from torch.nn.functional import cross_entropy, kl_div, logsigmoid
from transformers import MistralConfig, MistralForCausalLM

from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.guarding.loss import LossCall, LossSettings, columns_of, judge_loss
from pytest_mistral_lora.guarding.preferences import BatchSides
from pytest_mistral_lora.runners.trainer import AnswerLoss

Columns = dict[str, torch.Tensor]
Loss = Callable[[torch.Tensor, Columns, torch.Tensor], torch.Tensor]
"""A loss of logits and the columns of a batch; the last is what a base model, as a fresh one, makes of them."""

EOS, MASKED = 2, -100
PROMPT, LENGTH = 9, 24


def _model(seed: int) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(MistralConfig(vocab_size=1024, num_key_value_heads=2, head_dim=16, **shape))


def _rows() -> tuple[Columns, Columns]:
    """Return four rows, the last one padded, and the same with other answers."""
    torch.manual_seed(2)
    ids = torch.randint(10, 1000, (4, LENGTH))
    others = ids.clone()
    others[:, PROMPT:-4] = ids[:, PROMPT:-4].roll(1, 1)
    mask = torch.ones_like(ids)
    mask[3, -2:] = 0
    found = []
    for each in (ids, others):
        each[:, -1] = each[3, -3] = EOS
        each[mask == 0] = 0
        labels = each.masked_fill((mask == 0) | (torch.arange(LENGTH) < PROMPT), MASKED)
        found.append({"input_ids": each, "labels": labels, "attention_mask": mask})
    return found[0], found[1]


@pytest.fixture(scope="module")
def learned() -> dict[int, Any]:
    """A model after 40 and 100 steps on the rows, and a fifth as much on other answers: not all tokens are sure."""
    model, models = _model(0), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, 101):
        optimizer.zero_grad()
        (model(**_rows()[0]).loss + model(**_rows()[1]).loss / 5).backward()
        optimizer.step()
        if step in (40, 100):
            models[step] = copy.deepcopy(model)
    return models


@pytest.fixture(
    scope="module",
    params=sampled(
        [(40, torch.float32), (40, torch.bfloat16), (100, torch.float32), (100, torch.bfloat16)],
        ["(40, torch.bfloat16)", "(100, torch.float32)"],
    ),
)
def peaked(request: pytest.FixtureRequest, learned: dict[int, Any]) -> Any:
    steps, dtype = request.param
    return copy.deepcopy(learned[steps]).to(dtype).train()


def _judged(
    model: Any, batch: Columns, loss: Loss, *, smoothing: float = 0.0, sides: BatchSides | None = None
) -> Result:
    """Take one step of a loss, and judge it."""
    seen: dict[str, torch.Tensor] = {}

    def take(decoder: Any, given: Any, output: Any) -> None:
        seen["hidden"] = output.last_hidden_state.detach()
        output.last_hidden_state.register_hook(lambda gradient: seen.update(gradient=gradient))

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        others = _model(1)(**inputs).logits
    hook = model.get_decoder().register_forward_hook(take)
    loss(model(**inputs).logits.float(), batch, others).backward()
    hook.remove()
    model.zero_grad()
    answers = None if sides is None else AnswerLoss("DPOTrainer", "sigmoid", has_signs=True)
    settings = LossSettings(smoothing=smoothing, head=model.get_output_embeddings(), answers=answers)
    return judge_loss(
        LossCall(columns_of(batch), [seen["hidden"]], [seen.get("gradient")], model.dtype, sides), settings
    )


def _ce(logits: torch.Tensor, labels: torch.Tensor, *, by: int = 1, **named: Any) -> torch.Tensor:
    size = logits.shape[1] - by
    return cross_entropy(logits[:, :size].flatten(0, 1), labels[:, by:].flatten(), **named)


def _near_base(share: float, *, is_reversed: bool = False) -> Loss:
    """Return a loss with the distance to the base at each token."""

    def loss(logits: torch.Tensor, batch: Columns, others: torch.Tensor) -> torch.Tensor:
        both = [logits.log_softmax(-1), others.log_softmax(-1)]
        apart = kl_div(*(both[::-1] if is_reversed else both), log_target=True, reduction="none").sum(-1)
        return _ce(logits, batch["labels"]) + share * apart[batch["attention_mask"] != 0].mean()

    return loss


def _with_norms(logits: torch.Tensor, batch: Columns, others: torch.Tensor) -> torch.Tensor:
    return _ce(logits, batch["labels"]) + 1e-4 * (logits.logsumexp(-1) ** 2).mean()


def _with_entropy(logits: torch.Tensor, batch: Columns, others: torch.Tensor) -> torch.Tensor:
    logs = logits.log_softmax(-1)
    return _ce(logits, batch["labels"]) + (logs.exp() * logs).sum(-1).mean()


def _dynamic(logits: torch.Tensor, batch: Columns, others: torch.Tensor) -> torch.Tensor:
    losses = _ce(logits, batch["labels"], reduction="none")
    return (losses * torch.exp(-losses.detach())).sum()


@pytest.mark.parametrize(
    ("loss", "rules"),
    [
        (lambda logits, batch, others: _ce(logits, batch["labels"]), []),
        (_dynamic, []),
        (_with_norms, ["ML327"]),
        (_with_entropy, ["ML327"]),
        *((_near_base(share), ["ML327"]) for share in (1e-3, 0.1, 1.0)),
        *((_near_base(share, is_reversed=True), ["ML327"]) for share in (0.03, 0.1, 1.0)),
    ],
)
def test_a_healthy_loss_is_no_error(loss: Loss, rules: list[str], peaked: Any) -> None:
    result = _judged(peaked, _rows()[0], loss)
    assert [finding.rule for finding in result.findings] == rules
    assert result.not_checked == ""


def test_smoothed_labels_are_no_error_if_they_are_declared(peaked: Any) -> None:
    def smoothed(logits: torch.Tensor, batch: Columns, others: torch.Tensor) -> torch.Tensor:
        return _ce(logits, batch["labels"], label_smoothing=0.1)

    result = _judged(peaked, _rows()[0], smoothed, smoothing=0.1)
    assert (result.findings, result.not_checked) == ((), "")
    result = _judged(peaked, _rows()[0], smoothed)
    assert result.findings == ()
    assert "is not that of one token" in result.not_checked


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda logits, batch, others: _ce(logits, batch["input_ids"], ignore_index=0), "the prompt included"),
        (lambda logits, batch, others: _ce(logits, batch["labels"], by=2), "labels that are shifted twice"),
        (lambda logits, batch, others: _ce(logits, batch["labels"], by=0), "labels that are not shifted"),
        (
            lambda logits, batch, others: _ce(logits, batch["labels"].masked_fill(batch["labels"] == EOS, MASKED)),
            "does not train on 4 of ",
        ),
        (lambda logits, batch, others: -_ce(logits, batch["labels"]), "to avoid"),
        (lambda logits, batch, others: _ce(logits, batch["labels"].clamp(min=0)), "without a label"),
        (lambda logits, batch, others: _ce(logits[:2], batch["labels"][:2]), "does not train on"),
    ],
)
def test_a_fault_is_named(loss: Loss, words: str, peaked: Any) -> None:
    result = _judged(peaked, _rows()[0], loss)
    assert {finding.rule for finding in result.findings} == {"ML326"}
    assert words in result.findings[0].found


def _of_answers(sign: int = 1, *, by: int = 1, mask: str = "completion_mask", eos: int = 1) -> Loss:
    """Return the loss of DPO or KTO at its first step."""

    def loss(logits: torch.Tensor, batch: Columns, others: torch.Tensor) -> torch.Tensor:
        size, tokens = logits.shape[1] - by, batch["input_ids"][:, by:]
        logs = logits[:, :size].log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        weights = batch[mask][:, by:] * torch.where(tokens == EOS, eos, 1)
        gained = 0.1 * sign * (logs * weights).sum(1) * batch["signs"]
        if batch["is_paired"]:
            gained = gained.reshape(2, -1).sum(0)
        return -logsigmoid(gained - gained.detach()).mean()

    return loss


@pytest.mark.parametrize("is_paired", [True, False], ids=["DPO", "KTO"])
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (_of_answers(), ""),
        (_of_answers(-1), "lowers "),
        # of a rejected answer that the model is sure of, bfloat16 shows only that its last token has no loss
        (_of_answers(by=2), "labels that are shifted twice|does not train on 8 of "),
        (_of_answers(mask="attention_mask"), "the prompt included"),
        (_of_answers(eos=0), "does not train on 8 of "),
    ],
)
def test_a_loss_of_answers_is_judged(loss: Loss, words: str, is_paired: bool, peaked: Any) -> None:
    wanted, unwanted = _rows()
    batch = {name: torch.cat([values, unwanted[name]]) for name, values in wanted.items()}
    batch["completion_mask"] = (batch.pop("labels") != MASKED).long()
    are_wanted = torch.arange(8) < 4
    batch["signs"], batch["is_paired"] = are_wanted * 2.0 - 1, torch.tensor(is_paired)
    result = _judged(peaked, batch, loss, sides=BatchSides(are_wanted, is_paired))
    assert {finding.rule for finding in result.findings} == ({"ML326"} if words else set())
    assert result.not_checked == ""
    if words:
        assert re.search(words, result.findings[0].found)
