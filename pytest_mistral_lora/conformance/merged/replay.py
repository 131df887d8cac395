"""PEFT's merge once more, in the order in which it rounds: whether merged weights are PEFT's, bit for bit.

`peft.tuners.lora.layer.Linear.merge`, in PEFT 0.21. The product B A is in float32: for an adapter in 16 bits, PEFT
casts A and B to float32 on a CPU, and the product back. Only the order of roundings is repeated here, without PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.merged.weights import row_blocks
from pytest_mistral_lora.records.lora_delta import LoraDelta

if TYPE_CHECKING:
    import torch

_BLOCK = 1 << 26
"""Numbers that are merged at once: 256 MiB in float32."""


@dataclass(frozen=True)
class RoundingOrder:
    """An order of roundings.

    Attributes:
        base: dtype of the base's weights during the merge.
        adapter: dtype of A and B: PEFT loads them in float32, but with `autocast_adapter_dtype=False` in the base's.
        is_safe: Whether the change is rounded to the base's dtype before it is added, as with `safe_merge=True`.
    """

    base: torch.dtype
    adapter: torch.dtype
    is_safe: bool

    def __str__(self) -> str:
        """Return the order as settings of PEFT."""
        text = f"in {_name(self.base)}"
        if _name(self.adapter) != "float32":
            return f"{text}, with the adapter in {_name(self.adapter)}"
        return f"{text}, with safe_merge" if self.is_safe else text

    def merged(self, weight: torch.Tensor, delta: LoraDelta, rows: slice) -> torch.Tensor:
        """Return rows of the merged weight in the base's dtype, `(rows, inputs)`.

        Args:
            weight: The base's weight as its file has it, `(outputs, inputs)`.
            delta: The adapter's change, of low rank.
            rows: The rows.
        """
        import torch

        a, b = (factor.to(self.adapter).float() for factor in delta.factor_tensors())
        change = ((b[rows] @ a) * delta.scaling).to(self.adapter)
        # a copy: the sum is in place, which rounds once to the dtype of the weight
        merged = weight[rows].to(self.base, copy=True)
        if delta.has_magnitude:
            # DoRA: peft.tuners.lora.variants.DoraLinearVariant.merge_safe
            lengths: torch.Tensor = torch.linalg.norm(merged + change, dim=1)
            factors = delta.magnitude_tensor().to(self.adapter)[rows] / lengths
            return (factors[:, None] * (merged + change)).to(self.base)
        merged += change.to(self.base) if self.is_safe else change
        return merged


def rounding_orders(base: torch.dtype, merged: torch.dtype) -> list[RoundingOrder]:
    """Return the orders in which PEFT may have merged, the most usual first.

    Args:
        base: dtype of the base's file.
        merged: dtype of the merged file.
    """
    import torch

    orders = []
    for dtype in dict.fromkeys((base, merged, torch.float32)):
        orders.append(RoundingOrder(dtype, torch.float32, is_safe=False))
        if dtype != torch.float32:
            orders.append(RoundingOrder(dtype, torch.float32, is_safe=True))
            orders.append(RoundingOrder(dtype, dtype, is_safe=False))
    return orders


class MergeReplay:
    """The orders that explain every layer so far.

    Attributes:
        orders: The orders that are left; the replay ends when none is.
    """

    def __init__(self, orders: Sequence[RoundingOrder]) -> None:
        self.orders: list[RoundingOrder] = list(orders)

    def explains(self, merged: torch.Tensor, weight: torch.Tensor, delta: LoraDelta) -> bool:
        """Return whether an order gives a merged tensor bit for bit; orders that do not are given up.

        Args:
            merged: The merged tensor.
            weight: The base's.
            delta: The adapter's change.
        """
        if delta.is_low_rank:
            self.orders = [order for order in self.orders if _is_equal(order, merged, weight, delta)]
            return bool(self.orders)
        import torch

        # PEFT puts a module that was trained in full in the place of the base's
        (name,) = delta.names
        return bool(self.orders) and torch.equal(merged, delta.tensors[name].to(merged.dtype))


def _is_equal(order: RoundingOrder, merged: torch.Tensor, weight: torch.Tensor, delta: LoraDelta) -> bool:
    import torch

    return all(
        torch.equal(merged[rows], order.merged(weight, delta, rows).to(merged.dtype))
        for rows in row_blocks(len(weight), weight.shape[-1], _BLOCK)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
