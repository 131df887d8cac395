"""What the first two steps of a run move: each tensor that is trained, by its gradient, and no frozen one.

A weight that moved proves nothing, since weight decay moves each. A gradient that is not zero does. Two steps are
needed: the second factor of a LoRA adapter is zero at first, and as long as it is, the first one has no gradient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch

from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.model_targets import MODEL_PLACE, without_wrappers
from pytest_mistral_lora.errors import and_more, counted, one_line
from pytest_mistral_lora.places import NamedSource, Place

OPTIMIZER, GRADIENTS, FROZEN = "optimizer", "gradients", "frozen-tensors"
"""The checks of the first steps."""

_STEPS = 2
_MOST_STEPS = 100
"""Steps to wait for two that move weights: those of a warm-up from 0, and those that a GradScaler skips, do not."""
_SAMPLED = 65_536
"""Least numbers of a large tensor that its checksum has: an optimizer moves all of them, or a row of an embedding."""
_MOST_RATES = 100_000

_OF_ADAPTER = re.compile(r"\.(?P<part>lora_\w+)\.(?P<adapter>[^.]+)")
_PARTNERS = {"lora_A": "lora_B", "lora_B": "lora_A"} | {
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SCHEDULE = Place(NamedSource("lr_scheduler", is_value=True))
_HOLDS_ALL = (
    "Make the optimizer of the model that is trained, after its adapter: `optimizers=(OPTIMIZER, None)`, or none."
)
_HAS_RATE = (
    "Set `learning_rate` above 0, and a warm-up that is shorter than the run: look at `warmup_steps` and `max_steps`."
)
_STAYS = (
    "Look for an optimizer that moves more than its own parameters, and for a trained tensor that shares its memory."
)


class LearningWatch:
    """Watches a run until two of its steps have moved weights.

    Attributes:
        is_done: Whether no more steps are watched.
    """

    def __init__(self, args: Any, model: Any, trainer: Any, state: Any) -> None:
        """Begin to watch, before the first step.

        Args:
            args: The `TrainingArguments`.
            model: The model, without wrappers.
            trainer: The trainer; None if it is unknown.
            state: The `TrainerState`.
        """
        self._model = model
        named = dict(model.named_parameters())
        self._trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        self._frozen = {name: one for name, one in named.items() if not one.requires_grad and not one.is_meta}
        self._untouched, self._moved = dict(self._trained), set[str]()
        self._called: set[str] = set()
        self._hooks: list[Any] = []
        self._steps = self._seen = 0
        self._touched: set[str] = set()
        self._before: dict[str, tuple[int, ...]] = {}
        self._moves = False
        self._is_compiled = bool(getattr(args, "torch_compile", False))
        # a gradient below the smallest number of float16 is zero
        self._is_half = bool(getattr(args, "fp16", False)) or any(
            parameter.dtype == torch.float16 for parameter in self._trained.values()
        )
        self._unseen = _why_unseen(trainer)
        self.is_done = bool(self._unseen)
        self._optimizer = Result(not_checked=self._unseen) if self._unseen else self._judged_optimizer(trainer, state)

    def before_step(self, optimizer: Any) -> None:
        """Look at the gradients of a step, before the optimizer moves a weight.

        Args:
            optimizer: The optimizer of the trainer; None if it is unknown.
        """
        if not self.is_done:
            self._attempt(self._look, optimizer)

    def after_step(self, optimizer: Any) -> None:
        """Look at the frozen tensors after the step of the optimizer.

        Args:
            optimizer: As for `before_step`.
        """
        if not self.is_done:
            self._attempt(self._look_again, optimizer)

    def _attempt(self, look: Callable[[Any], None], optimizer: Any) -> None:
        """Look at a step, and at no more if that fails: a tensor may be of a kind that is not known."""
        try:
            look(optimizer)
        except Exception as error:
            self._unseen = f"{type(error).__name__}: {one_line(error)}"
            self.leave()

    def _look(self, optimizer: Any) -> None:
        largest = _largest_gradients(self._trained)
        self._touched = {name for name, value in largest.items() if value}
        rates = [float(group.get("lr") or 0) for group in getattr(optimizer, "param_groups", ())]
        # a fused optimizer skips a step itself: accelerate does not know of it
        is_finite = all(map(math.isfinite, largest.values()))
        self._moves = bool(self._touched) and is_finite and (not rates or any(rates))
        self._before = _checksums(self._still_frozen) if self._moves else {}

    def _look_again(self, optimizer: Any) -> None:
        self._seen += 1
        if self._moves and not getattr(optimizer, "step_was_skipped", False):
            self._steps += 1
            self._untouched = {name: one for name, one in self._untouched.items() if name not in self._touched}
            now = _checksums(self._still_frozen)
            self._moved |= {name for name, known in self._before.items() if now.get(name, known) != known}
            if self._steps == 1:
                self._watch_calls()
        if self._steps == _STEPS or self._seen == _MOST_STEPS:
            self.leave()

    def leave(self) -> None:
        """Watch no more."""
        self.is_done = True
        self._before = {}
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def results(self) -> Mapping[str, Result]:
        """Return the result of each check so far."""
        return {OPTIMIZER: self._optimizer, **self.moved()}

    def moved(self) -> Mapping[str, Result]:
        """Return the results of the checks that need steps."""
        return {GRADIENTS: self._judged_gradients(), FROZEN: self._judged_frozen()}

    @property
    def _still_frozen(self) -> dict[str, Any]:
        """The frozen tensors, but for those that a callback has begun to train."""
        return {name: parameter for name, parameter in self._frozen.items() if not parameter.requires_grad}

    def _watch_calls(self) -> None:
        """Watch whether the layers get a token whose tensors have had no gradient: experts may get none."""
        if self._is_compiled:  # calls no hook that comes later
            return
        modules = dict(self._model.named_modules())
        for owner in {_owner(name) for name in self._untouched}:
            module = modules.get(owner)
            # a module with others in it may leave a tensor of its own out, such as that of images
            if module is not None and (hasattr(module, "lora_A") or not _holds_others(module)):
                hook = module.register_forward_pre_hook(partial(self._take_call, owner), with_kwargs=True)
                self._hooks.append(hook)

    def _take_call(self, name: str, module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not module.training:
            return
        values = (value for value in chain(given, named.values()) if isinstance(value, torch.Tensor))
        tokens = next(values, None)
        if tokens is None or not tokens.numel():
            return
        # PEFT trains single rows of the embeddings
        rows = [row for rows in getattr(module, "token_indices", {}).values() for row in rows]
        if not rows or bool(torch.isin(tokens, torch.tensor(rows, device=tokens.device)).any()):
            self._called.add(name)

    def _judged_gradients(self) -> Result:
        facts = (
            ("trained tensors", len(self._trained)),
            ("with a gradient", len(self._trained) - len(self._untouched)),
        )
        if not self._untouched:
            return Result(facts=facts)
        if self._unseen or self._steps < _STEPS:
            return Result(not_checked=self._unseen or self._too_few)
        lost = [name for name in self._untouched if _owner(name) in self._called and not self._is_explained(name)]
        reason = "a gradient may be too small for float16" if self._is_half else ""
        if self._is_compiled and not all(map(self._is_explained, self._untouched)):
            reason = "the calls of a compiled model are not watched"
        if reason:
            names = f"{without_wrappers(next(iter(self._untouched)))}{and_more(1, len(self._untouched))}"
            return Result(not_checked=f"{names} had no gradient, and {reason}", facts=facts)
        if not lost:
            return Result(facts=facts)
        found = f"{len(lost)} of {counted(len(self._trained), 'trained tensor')} had no gradient in two steps, though "
        found += f"each was called: {without_wrappers(lost[0])}{and_more(1, len(lost))}"
        return Result((Finding("ML303", found, MODEL_PLACE, "a gradient that is not zero"),), facts=facts)

    def _is_explained(self, name: str) -> bool:
        """Return whether something else than the tensor is the reason that it has no gradient."""
        parameter, match = self._trained[name], _OF_ADAPTER.search(name)
        if not parameter.requires_grad:
            return True  # a callback has frozen it
        if match is None:
            return False
        layer = self._model.get_submodule(name[: match.start()])
        acts = match["adapter"] in getattr(layer, "active_adapters", (match["adapter"],))
        if not acts or getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
            return True  # reported before the first step
        partner = _PARTNERS.get(match["part"])
        other = None if partner is None else self._parameter(name.replace(f".{match['part']}.", f".{partner}."))
        return other is not None and not bool(_local(other).any())

    def _parameter(self, name: str) -> Any:
        return self._trained.get(name, self._frozen.get(name))

    def _judged_frozen(self) -> Result:
        facts = (("frozen tensors", len(self._frozen)),)
        if self._moved:
            first = without_wrappers(min(self._moved))
            found = f"the optimizer moved {first}{and_more(1, len(self._moved))}, which cannot be trained"
            return Result(
                (Finding("ML302", found, MODEL_PLACE, "the weights before the step", fix=_STAYS),), facts=facts
            )
        if self._frozen and (self._unseen or not self._steps):
            return Result(not_checked=self._unseen or self._too_few)
        return Result(facts=facts)

    @property
    def _too_few(self) -> str:
        """Why two steps that move weights have not been seen."""
        if not self.is_done:
            return "the run has not come to its first step"
        if not self._seen:
            return "no step was taken"
        return f"{counted(self._steps, 'step')} of {self._seen} moved weights, and two are needed"

    def _judged_optimizer(self, trainer: Any, state: Any) -> Result:
        optimizer = getattr(trainer, "optimizer", None)
        if trainer is None:
            return Result(not_checked="the guard knows no trainer: call guard(trainer)")
        if optimizer is None:
            return Result(not_checked="the trainer makes its optimizer when it trains")
        if "LayerWise" in type(getattr(optimizer, "optimizer", optimizer)).__name__:
            return Result(not_checked="each layer has an optimizer of its own")
        try:
            return Result((*self._absent(optimizer), *self._unmoved(trainer.lr_scheduler, state)))
        except _UnknownScheduleError as error:
            return Result(tuple(self._absent(optimizer)), not_checked=str(error))
        except Exception as error:
            return Result(not_checked=f"{type(error).__name__}: {one_line(error)}")

    def _absent(self, optimizer: Any) -> Iterator[Finding]:
        """Yield a finding if tensors are to be trained that the optimizer does not have."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        absent = [name for name, parameter in self._trained.items() if id(parameter) not in held]
        # who trains a part of a model may leave the others out of the optimizer alone
        if absent and (hasattr(self._model, "peft_config") or len(absent) == len(self._trained)):
            found = f"the optimizer does not have {without_wrappers(absent[0])}{and_more(1, len(absent))}"
            expected = f"each of the {counted(len(self._trained), 'tensor')} that can be trained"
            yield Finding("ML303", found, MODEL_PLACE, expected, fix=_HOLDS_ALL)

    @staticmethod
    def _unmoved(scheduler: Any, state: Any) -> Iterator[Finding]:
        """Yield a finding if the learning rate is 0 in each step."""
        count = state.max_steps - state.global_step
        if count > 0 and not any(any(rates) for rates in _rates(scheduler, count)):
            found = f"the learning rate is 0 in each of the {count:,} steps of the run"
            yield Finding("ML320", found, _SCHEDULE, "a rate above 0", fix=_HAS_RATE)


class _UnknownScheduleError(Exception):
    """A schedule whose rates cannot be told without a step of it."""


def _rates(scheduler: Any, count: int) -> Iterator[list[float]]:
    """Yield the rates of the next steps, of each group of parameters, without a step of the scheduler.

    Args:
        scheduler: The scheduler of the trainer.
        count: The number of steps; of a very long run, a part of them is looked at.

    Raises:
        _UnknownScheduleError: If it is not a function of the step.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # within that of accelerate
    functions = getattr(scheduler, "lr_lambdas", None)
    homes = {getattr(getattr(one, "func", one), "__module__", "").partition(".")[0] for one in functions or ("",)}
    # a function of another library may have a state
    if functions is None or not homes <= {"torch", "transformers"}:
        raise _UnknownScheduleError(f"the rates of a {type(scheduler).__name__} are not known ahead")
    begin = scheduler.last_epoch
    for step in range(begin, begin + count, -(-count // _MOST_RATES)):
        yield [
            float(base) * float(function(step)) for base, function in zip(scheduler.base_lrs, functions, strict=True)
        ]


def _why_unseen(trainer: Any) -> str:
    """Return why gradients and weights are not where the model has them; empty if they are."""
    for name, title in (("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")):
        if getattr(trainer, name, False):
            return f"{title} keeps gradients and weights apart from the model"
    return ""


def _owner(name: str) -> str:
    """Return the name of the module that is called with the tokens of a tensor: of an adapter, its layer."""
    match = _OF_ADAPTER.search(name)
    owner = name[: match.start()] if match else name.rpartition(".")[0]
    return owner.removesuffix(".trainable_tokens_delta")


def _holds_others(module: torch.nn.Module) -> bool:
    """Return whether modules within a module have parameters."""
    return any(any(True for _ in child.parameters()) for child in module.children())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process has."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _largest_gradients(parameters: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the largest absolute number of each gradient, by the name of its tensor."""
    found: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, parameter in parameters.items():
        gradient = None if parameter.grad is None else _local(parameter.grad)
        if gradient is not None and gradient.is_sparse:
            gradient = gradient._values()
        if gradient is not None and gradient.numel():
            norm = torch.linalg.vector_norm(gradient, torch.inf)
            found.setdefault(gradient.device, {})[name] = norm.float()
    return dict(_fetched(found))


def _fetched(values: Mapping[torch.device, Mapping[str, torch.Tensor]]) -> Iterator[tuple[str, Any]]:
    """Yield values with their names; those of a device are fetched at once."""
    for by_name in values.values():
        yield from zip(by_name, torch.stack([*by_name.values()]).tolist(), strict=True)


def _checksums(parameters: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return two sums of the bits of each tensor, of a large one in a sample that has a number of each row."""
    sums: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, parameter in parameters.items():
        flat = _local(parameter).reshape(-1)
        # odd, so that it does not stay in one column
        sample = flat[:: flat.numel() // max(_SAMPLED, 2 * max(parameter.shape[:1], default=0)) | 1].contiguous()
        bits = sample.view(_BITS[sample.element_size()]).long()
        sums.setdefault(flat.device, {})[name] = torch.stack([bits.sum(), (bits * bits).sum()])
    return {name: tuple(values) for name, values in _fetched(sums)}
