"""The loss of the first step: whether it is the mean over the labels of its batch, each of them shifted once.

The loss that `compute_loss` returned is compared with sums over the logits of the same call. It is an error only if a
named fault gives this number: labels that are shifted twice or not at all, or other tokens than those with a label. The
sum of these losses, or the mean of each row's mean, is a note. No other number is judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.runners.trainer import has_own_loss

TOLERANCE = {torch.float64: 2**-17, torch.float32: 2**-17, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""How far two computations of one loss may be apart, as a share of 1 + loss: sums in float32 in another order differ by
some units of 2**-23; in half precision, each token's loss and their sum are rounded to a unit of 2**-10 or 2**-7."""

_ELEMENTS = 2**22
"""Most logits that are copied to float32 at once: 16 MiB."""
_NOT_MASKS = ("input_ids", "labels", "shift_labels", "position_ids", "token_type_ids", "attention_mask")
_LOSS_TYPES = (None, "nll", "chunked_nll", "dft")
"""The values of `loss_type` in a trainer's arguments whose losses are reproduced here."""

Columns = Mapping[str, torch.Tensor]
"""The columns of a batch that have a value for each token, `(batch, length)`, by name."""


@dataclass(frozen=True, slots=True)
class LossCall:
    """A call of `compute_loss` in training, and the model's call in it.

    Attributes:
        columns: The columns of its batch, as they were before the call: see `columns_of`.
        loss: The loss that it returned.
        items: `num_items_in_batch`: the tokens with a label in the whole step; None if the trainer did not give it.
        output: The output of the model; None if the model was not called, or its output has no loss of tokens.
        labels: The labels that the model got, `(batch, length)`, on the CPU; None if it got none.
    """

    columns: Columns
    loss: torch.Tensor
    items: float | None
    output: Any
    labels: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What a trainer declares about its loss.

    Attributes:
        place: The function that computes it, for findings.
        smoothing: `label_smoothing_factor`; 0 for none.
        loss_type: `loss_type`; None for the loss of transformers.
        steps: The batches of a step (`gradient_accumulation_steps`).
        processes: The processes of the run.
        aux_share: The weight of the experts' auxiliary loss.
        pad_id: The id of the padding; None if it is unknown.
        eos_id: The id of EOS; None if it is unknown.
        foreign: The class of the trainer with a loss of its own, such as `DPOTrainer`; empty for a loss of labels.
    """

    place: str = "compute_loss"
    smoothing: float = 0.0
    loss_type: str | None = None
    steps: int = 1
    processes: int = 1
    aux_share: float = 0.0
    pad_id: int | None = None
    eos_id: int | None = None
    foreign: str = ""

    @classmethod
    def of(cls, trainer: Any) -> LossSettings:
        """Read them from a `transformers.Trainer`."""
        args = trainer.args
        owners = [base for base in type(trainer).__mro__ if "compute_loss" in vars(base)]
        owner = owners[0] if owners else type(trainer)
        function = getattr(trainer, "compute_loss_func", None)
        config: Any = getattr(trainer.model, "config", None)
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        tokenizer = getattr(trainer, "processing_class", None)
        return cls(
            place="compute_loss_func" if function is not None else f"{owner.__name__}.compute_loss",
            smoothing=float(getattr(args, "label_smoothing_factor", 0.0) or 0.0),
            loss_type=getattr(args, "loss_type", None),
            steps=int(getattr(trainer, "current_gradient_accumulation_steps", args.gradient_accumulation_steps)),
            processes=int(getattr(args, "world_size", 1)),
            aux_share=float(getattr(text_config, "router_aux_loss_coef", 0.0) or 0.0),
            pad_id=getattr(getattr(tokenizer, "tokenizer", tokenizer), "pad_token_id", None),
            eos_id=getattr(getattr(tokenizer, "tokenizer", tokenizer), "eos_token_id", None),
            # a trainer that is made from one with a loss of its own calls it
            foreign=next((base.__name__ for base in owners if has_own_loss(base)), ""),
        )


def columns_of(batch: Any) -> dict[str, torch.Tensor]:
    """Return copies of the columns of a batch that have a value for each token: `compute_loss` may change the batch.

    Args:
        batch: The batch, as `compute_loss` gets it.

    Returns:
        The columns by name, on the CPU; empty if the batch has no `input_ids` of the shape `(batch, length)`.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return {}
    return {
        str(name): values.detach().to("cpu", copy=True)
        for name, values in batch.items()
        if isinstance(values, torch.Tensor) and values.shape == ids.shape
    }


def judge_loss(call: LossCall, settings: LossSettings) -> Result:
    """Compare the loss of the first step with that of its labels, and then with those of named faults.

    Args:
        call: The call.
        settings: What the trainer declares.
    """
    reason = _not_comparable(call, settings)
    if reason:
        return Result(not_checked=reason)
    with torch.no_grad():
        return _compared(_Losses.of(call, settings), call)


def _not_comparable(call: LossCall, settings: LossSettings) -> str:
    """Return why the loss cannot be compared; empty if it can."""
    labels, output = call.columns.get("labels"), call.output
    if settings.foreign:
        return f"{settings.foreign} computes a loss of its own, which is not that of labels"
    if labels is None:
        return "the batch has no `labels` of the shape of its `input_ids`: its loss is another one"
    if settings.loss_type not in _LOSS_TYPES:
        return f"the trainer declares the loss {settings.loss_type!r}, which is not reproduced here"
    if not isinstance(call.loss, torch.Tensor) or not call.loss.is_floating_point():
        return f"{settings.place} returned a {type(call.loss).__name__}, not a loss"
    if not bool((labels[:, 1:] != IGNORE_INDEX).any()):
        return "no token of the first batch has a label"
    logits, log_probs = _field(output, "logits"), _field(output, "log_probs")
    if logits is None and log_probs is None:
        return f"the model returned no logits to {settings.place}"
    if logits is not None and tuple(logits.shape[:2]) != tuple(labels.shape):
        return f"the logits have the shape {tuple(logits.shape)}, and the labels {tuple(labels.shape)}"
    if log_probs is not None and logits is None:
        shape = (len(labels), labels.shape[1] - 1)
        if call.labels is None or call.labels.shape != labels.shape or tuple(log_probs.shape) != shape:
            return f"the model returned the log-probabilities of other labels, of the shape {tuple(log_probs.shape)}"
    return ""


def has_token_losses(output: Any) -> bool:
    """Return whether an output of the model has logits of each token, or the log-probabilities of its labels."""
    logits = _field(output, "logits")
    return (logits is not None and logits.dim() == 3) or _field(output, "log_probs") is not None


def _field(output: Any, name: str) -> torch.Tensor | None:
    """Return a tensor of the model's output by name; None without it, or with something else in its place."""
    if isinstance(output, Mapping):
        value = output.get(name)
    elif isinstance(output, tuple):  # return_dict=False: the loss may stand in front of the logits
        parts = (part for part in output if isinstance(part, torch.Tensor) and part.dim() == 3)
        value = next(parts, None) if name == "logits" else None
    else:
        value = getattr(output, name, None)
    return value if isinstance(value, torch.Tensor) else None


@dataclass(frozen=True, slots=True)
class _Choice:
    """Tokens that a loss may be over.

    Attributes:
        name: Its name, for the finding: `the loss is that of …`.
        targets: The token that each place is to predict, `(batch, length)` int64.
        weights: The weight of each place, `(batch, length)`; 0 for no loss.
        counts: Other numbers than the sum of the weights by which the sum may be divided.
    """

    name: str
    targets: torch.Tensor
    weights: torch.Tensor
    counts: tuple[float, ...] = ()


def _ahead(values: torch.Tensor, by: int, fill: int = 0) -> torch.Tensor:
    """Return what stands `by` places further on in each row, or before if it is negative; `fill` outside of the row."""
    if by < 0:
        return torch.nn.functional.pad(values[:, :by], (-by, 0), value=fill)
    return torch.nn.functional.pad(values[:, by:], (0, by), value=fill)


@dataclass(frozen=True)
class _Losses:
    """The losses that the output of a call gives, by the tokens that have a loss."""

    call: LossCall
    settings: LossSettings
    logits: torch.Tensor | None

    @classmethod
    def of(cls, call: LossCall, settings: LossSettings) -> _Losses:
        logits = _field(call.output, "logits")
        return cls(call, settings, None if logits is None else logits.detach())

    @cached_property
    def labels(self) -> torch.Tensor:
        """The labels of the batch, `(batch, length)`."""
        return self.call.columns["labels"]

    @cached_property
    def of_labels(self) -> _Choice:
        """The tokens with a label, each predicted from the tokens before it."""
        return self._labelled("the labels", self.labels, 1)

    def _labelled(self, name: str, labels: torch.Tensor, by: int) -> _Choice:
        ahead = _ahead(labels, by, IGNORE_INDEX)
        return _Choice(name, ahead.clamp(min=0), (ahead != IGNORE_INDEX).double())

    def values(self, choice: _Choice) -> Iterator[float]:
        """Yield the losses over these tokens by each way to divide and to add, first as transformers does."""
        weights = choice.weights
        chosen = weights != 0
        total = float(weights.sum())
        if not total > 0:
            return
        factors = weights[chosen]
        divisors = []
        if self.call.items:
            divisors += [self.call.items / k for k in dict.fromkeys((1.0, float(self.settings.processes)))]
        means = [total, *(count for count in choice.counts if count)]
        scales = [1.0, float(self.settings.steps)]
        if choice is not self.of_labels:
            # transformers multiplies by the processes what it takes for a share of the whole step: of the labels' mean,
            # that is another loss, which is a note
            scales.append(1 / self.settings.processes)
        divisors += [n * k for n in means for k in dict.fromkeys(scales)]
        for losses in self._of_tokens(choice, chosen):
            summed = float((losses.double() * factors).sum())
            for divisor, added in product(divisors, self._added):
                yield summed / divisor + added

    def of_other_kinds(self, choice: _Choice) -> Iterator[tuple[str, float]]:
        """Yield the losses over these tokens that are not their mean, each with its name."""
        weights = choice.weights
        chosen = weights != 0
        of_rows = weights.sum(dim=1, keepdim=True)
        if not bool(chosen.any()) or bool((of_rows < 0).any()):
            return
        shares = weights / of_rows.clamp(min=torch.finfo(weights.dtype).tiny) / int((of_rows > 0).sum())
        for losses in self._of_tokens(choice, chosen):
            yield "the sum", float((losses.double() * weights[chosen]).sum())
            yield "the mean of each row's mean", float((losses.double() * shares[chosen]).sum())

    @cached_property
    def _added(self) -> tuple[float, ...]:
        """What the experts' auxiliary loss may add."""
        aux = _field(self.call.output, "aux_loss")
        if aux is None or aux.numel() != 1:
            return (0.0,)
        share = float(aux) * self.settings.aux_share
        return (0.0, share, share / self.settings.steps, share * self.settings.processes)

    def _of_tokens(self, choice: _Choice, chosen: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the losses of the chosen tokens: plain, and by what the trainer declares.

        Args:
            choice: The tokens.
            chosen: Where they are predicted, `(batch, length)` bool.
        """
        plain = self._plain(choice.targets, chosen)
        yield plain
        if self.logits is not None and self.settings.smoothing:
            norms, means = self._norms_and_means
            yield (1 - self.settings.smoothing) * plain + self.settings.smoothing * (norms - means)[chosen]
        # weighted by the probability of its token: `loss_type="dft"`, or a switch of the trainer
        if self.settings.loss_type == "dft" or choice is self.of_labels:
            yield plain * torch.exp(-plain)

    def _plain(self, targets: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the cross entropy at the chosen places, float32."""
        if self.logits is None:
            # a fused head: of the labels that the model got, and 0 elsewhere
            log_probs = _field(self.call.output, "log_probs")
            assert log_probs is not None, "an output without logits has log-probabilities"
            return -torch.nn.functional.pad(log_probs.detach().float().cpu(), (0, 1))[chosen]
        rows, places = (index.to(self.logits.device) for index in chosen.nonzero(as_tuple=True))
        wanted = targets[chosen].clamp(max=self.logits.shape[-1] - 1).to(self.logits.device)
        return self._norms_and_means[0][chosen] - self.logits[rows, places, wanted].float().cpu()

    @cached_property
    def _norms_and_means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The logarithm of the sum of the exponentials of each token's logits, and their mean: `(batch, length)`."""
        assert self.logits is not None, "a fused head has no logits"
        size = max(_ELEMENTS // self.logits.shape[-1], 1)
        norms, means = [], []
        for row in self.logits:
            norms.append(torch.cat([torch.logsumexp(part.float(), -1) for part in row.split(size)]))
            means.append(torch.cat([part.float().mean(-1) for part in row.split(size)]))
        return torch.stack(norms).cpu(), torch.stack(means).cpu()

    def weighted(self) -> Iterator[_Choice]:
        """Yield the tokens with the weights of each column that has one for every label.

        A column of zeros and ones that has one for other tokens, too, is a mask, and no weight of a prompt.
        """
        is_labelled, choice = self.labels != IGNORE_INDEX, self.of_labels
        ahead = _ahead(self.call.columns["input_ids"].clamp(min=0), 1)
        for name, weights in self._masks():
            has_weight = weights != 0
            if torch.equal(has_weight, is_labelled):
                yield _Choice(name, choice.targets, _ahead(weights, 1) * choice.weights, self._counts(choice))
            elif bool(has_weight[is_labelled].all()) and bool((has_weight & (weights != 1)).any()):
                yield _Choice(name, ahead, _ahead(weights, 1), self._counts(choice))

    def faults(self) -> Iterator[_Choice]:
        """Yield the tokens that a fault would have a loss over."""
        given = self.call.labels
        has_own = given is not None and given.shape == self.labels.shape
        own = given if has_own and given is not None else self.labels
        if self.logits is None:
            # the output is that of the labels that the model got
            if not torch.equal(own[:, 1:], self.labels[:, 1:]):
                yield self._labelled(self._name_of(own), own, 1)
            return
        yield self._labelled("labels that are shifted twice", self.labels, 2)
        yield self._labelled("labels that are not shifted", self.labels, 0)
        yield self._labelled("labels that are shifted the wrong way", self.labels, -1)
        ahead = self.call.columns.get("shift_labels")
        if ahead is not None and not torch.equal(ahead[:, :-1], self.labels[:, 1:]):
            # the model takes these as they are
            yield _Choice("the tokens of `shift_labels`", ahead.clamp(min=0), (ahead != IGNORE_INDEX).double())
        yield from self._other_masks()
        if not torch.equal(own, self.labels):
            yield self._labelled(self._name_of(own), own, 1)

    def _other_masks(self) -> Iterator[_Choice]:
        ids = self.call.columns["input_ids"].clamp(min=0)
        is_labelled = self.labels != IGNORE_INDEX
        number = self._counts(self.of_labels)
        for name, weights in self._masks():
            if not torch.equal(weights != 0, is_labelled):
                marked = f"the tokens that `{name}` marks"
                yield _Choice(marked, _ahead(ids, 1), _ahead(weights, 1), number)
                yield _Choice(marked, _ahead(ids, 1), _ahead(weights * is_labelled, 1), number)
            yield _Choice(f"the tokens that `{name}` marks, not shifted", _ahead(ids, 1), _cut(weights), number)
        for name, mask in self._tokens():
            for by, how in ((1, ""), (2, ", shifted twice"), (0, ", not shifted")):
                yield _Choice(f"{name}{how}", _ahead(ids, by), _ahead(mask.double(), by), number[:1])
        yield _Choice("the mask of the labels, not shifted", _ahead(ids, 1), _cut(is_labelled.double()), number[:1])

    def _tokens(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield sets of tokens that are not those of the labels, `(batch, length)` bool, each with its name."""
        ids, mask = self.call.columns["input_ids"], self.call.columns.get("attention_mask")
        is_labelled = self.labels != IGNORE_INDEX
        yield "the prompt alone", ~is_labelled if mask is None else ~is_labelled & (mask != 0)
        if self.settings.eos_id is not None:
            yield "the labels without EOS", is_labelled & (ids != self.settings.eos_id)
        if mask is not None and not bool(mask.all()):
            yield "every token but padding, the prompt included", mask != 0
            yield "the labels and the padding", is_labelled | (mask == 0)
        if self.settings.pad_id is not None and bool((ids == self.settings.pad_id).any()):
            yield "every token but the pad token, the prompt included", ids != self.settings.pad_id
        yield "every token, the prompt included", torch.ones_like(ids, dtype=torch.bool)

    def _masks(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the columns of the batch that may weigh the tokens."""
        for name, values in self.call.columns.items():
            weights = values.double()
            if name not in _NOT_MASKS and bool(weights.isfinite().all() & (weights >= 0).all()):
                yield name, weights

    def _counts(self, choice: _Choice) -> tuple[float, ...]:
        """Return the number of labels, and of all places with and without the last of each row."""
        rows, length = self.labels.shape
        return float(choice.weights.sum()), float(rows * (length - 1)), float(rows * length)

    def _name_of(self, own: torch.Tensor) -> str:
        """Return the name of the labels that the model got in place of the batch's."""
        if torch.equal(own, _ahead(self.labels, 1, IGNORE_INDEX)):
            return "labels that are shifted twice"
        ids = self.call.columns["input_ids"]
        for name, mask in self._tokens():
            if torch.equal(own, ids.masked_fill(~mask, IGNORE_INDEX)):
                return name
        for name, weights in self._masks():
            if torch.equal(own, ids.masked_fill(weights == 0, IGNORE_INDEX)):
                return f"the tokens that `{name}` marks"
        return "other labels than the batch has"


def _cut(weights: torch.Tensor) -> torch.Tensor:
    """Return weights without the last place of each row, which predicts nothing."""
    return torch.cat([weights[:, :-1], torch.zeros_like(weights[:, -1:])], dim=1)


def _compared(losses: _Losses, call: LossCall) -> Result:
    found = float(call.loss.detach().float().mean())
    own = TOLERANCE.get(call.loss.dtype, TOLERANCE[torch.float32])
    loose = max(own, TOLERANCE.get(getattr(losses.logits, "dtype", call.loss.dtype), own))
    sound = list(losses.values(losses.of_labels)) if _got_its_labels(losses) else []
    expected = _nearest(sound, found) if sound else None
    facts = (("loss", found), *((("loss of the labels", expected),) if expected is not None else ()))
    is_half = own > TOLERANCE[torch.float32]
    if _is_among(sound, found, own) and not is_half:
        return Result(facts=facts)
    if any(_is_among(losses.values(choice), found, own) for choice in losses.weighted()):
        return Result(facts=facts)
    fault = next((choice for choice in losses.faults() if _gives(losses, choice, found, own)), None)
    half = str(call.loss.dtype).removeprefix("torch.")
    if _is_among(sound, found, own):
        if fault is None:
            return Result(facts=facts)
        return Result(not_checked=f"in {half}, the loss of the labels and that of {fault.name} are both {found:.4g}")
    count = counted(int(losses.of_labels.weights.sum()), "token")
    mean = f"{expected:.4f}, the loss" if expected is not None else "the loss"
    wanted = f"{mean} of the {count} with a label, each predicted from the tokens before it"
    if fault is not None and is_half:
        # so few digits are near some fault by chance, whatever the loss
        reason = f"the loss of the first step is {found:.4g} in {half}, which is near that of {fault.name}"
        return Result(not_checked=f"{reason}; expected {wanted}", facts=facts)
    if fault is not None:
        number = counted(int((fault.weights != 0).sum()), "token")
        text = f"the loss of the first step is {found:.4f}, which is that of {fault.name} ({number})"
        return Result((Finding("ML326", text, Place.of(losses.settings.place), wanted),), facts=facts)
    if _is_among(sound, found, loose):
        return Result(facts=facts)
    kinds = losses.of_other_kinds(losses.of_labels) if _got_its_labels(losses) else ()
    kind = next((name for name, value in kinds if _is_near(value, found, loose)), "")
    text = f"the loss of the first step is {found:.4f}"
    if not kind:
        # a z-loss, or a weight of the prompt: a loss of the user's own is no fault
        reason = f"{text}, and no known way to compute it from the batch gives this number; expected {wanted}"
        return Result(not_checked=reason, facts=facts)
    text += f", which is {kind} of these losses"
    return Result((Finding("ML327", text, Place.of(losses.settings.place), wanted),), facts=facts)


def _gives(losses: _Losses, choice: _Choice, found: float, tolerance: float) -> bool:
    """Return whether the loss over these tokens is the one that was found, however it is added up."""
    if _is_among(losses.values(choice), found, tolerance):
        return True
    return _is_among((value for _, value in losses.of_other_kinds(choice)), found, tolerance)


def _got_its_labels(losses: _Losses) -> bool:
    """Return whether the loss of the batch's labels can be computed: a fused head only has that of its own."""
    given = losses.call.labels
    if losses.logits is not None or given is None:
        return losses.logits is not None
    return torch.equal(given[:, 1:], losses.labels[:, 1:])


def _nearest(values: Sequence[float], found: float) -> float:
    """Return the first of the values, the mean, or one that is the loss that was found."""
    return next((value for value in values if _is_near(value, found, TOLERANCE[torch.float32])), values[0])


def _is_among(values: Any, found: float, tolerance: float) -> bool:
    return any(_is_near(value, found, tolerance) for value in values)


def _is_near(value: float, found: float, tolerance: float) -> bool:
    return abs(value - found) <= tolerance * (1 + abs(value))
