"""The findings about what known programs would do wrong with an artifact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.programs.faults import ProgramFault


def findings_of_programs(faults: Iterable[ProgramFault]) -> Iterator[Finding]:
    """Yield a finding for each value that programs do something wrong about, with what each of them does."""
    effects: dict[tuple[str, str, Place, str], list[str]] = {}
    for fault in faults:
        of_value = effects.setdefault((fault.rule, fault.found, fault.place, fault.expected), [])
        of_value += [fault.effect] if fault.effect else []
    for (rule, found, place, expected), said in effects.items():
        yield Finding(rule, f"{found}: {', '.join(said)}" if said else found, place, expected)
