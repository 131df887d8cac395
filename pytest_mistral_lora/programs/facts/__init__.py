"""Dated facts about programs, as data: known faults, and versions that work together."""

from pytest_mistral_lora.programs.facts.entries import Fact, Program, Reproduction, Standing, Symptom, Works
from pytest_mistral_lora.programs.facts.reading import (
    fact,
    facts,
    find_fact,
    programs,
    read_facts,
    read_folders,
    remark_of_program,
    works,
)

__all__ = [
    "Fact",
    "Program",
    "Reproduction",
    "Standing",
    "Symptom",
    "Works",
    "fact",
    "facts",
    "find_fact",
    "programs",
    "read_facts",
    "read_folders",
    "remark_of_program",
    "works",
]
