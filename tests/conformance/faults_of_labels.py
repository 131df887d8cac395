"""Faults that change the labels of a row, and leave its ids."""

from __future__ import annotations

from faults import Case, Encoding, fault

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX

_MASK = "541 545 546 547 548 550 551 544"


@fault("541")
def labels_shifted_already(case: Case) -> Encoding | None:
    return case.from_labels([*case.labels[1:], IGNORE_INDEX]) if any(x >= 0 for x in case.labels) else None


@fault(_MASK)
def mask_shifted(case: Case) -> Encoding | None:
    by = case.chance.choice([-2, -1, 1, 2])
    trained = {n + by for n, label in enumerate(case.labels) if label != IGNORE_INDEX}
    return case.from_labels([t if n in trained else IGNORE_INDEX for n, t in enumerate(case.ids)])


@fault("542 541")
def a_label_of_another_token(case: Case) -> Encoding | None:
    trained = [n for n, label in enumerate(case.labels) if label != IGNORE_INDEX]
    if not trained:
        return None
    labels = case.labels
    labels[case.chance.choice(trained)] += 1
    return case.from_labels(labels)


@fault("543 547")
def everything_trained(case: Case) -> Encoding | None:
    return case.from_labels(case.ids)


@fault("544")
def nothing_trained(case: Case) -> Encoding | None:
    return case.from_labels([IGNORE_INDEX] * len(case.ids))


def _turns(case: Case) -> list[list[int]]:
    spans = [span for span in case.encoded.spans if span.supervised]
    turns: dict[int | None, list[int]] = {}
    for span in spans:
        turns.setdefault(span.turn, []).extend(range(span.start, span.end))
    return list(turns.values())


def _masked(case: Case, hidden: set[int]) -> Encoding | None:
    return case.from_labels([IGNORE_INDEX if n in hidden else label for n, label in enumerate(case.labels)])


@fault("545 546 548 551 544")
def first_token_masked(case: Case) -> Encoding | None:
    return _masked(case, {turn[0] for turn in _turns(case)})


@fault("546 544 551")
def eos_masked(case: Case) -> Encoding | None:
    return _masked(case, {n for n, token in enumerate(case.ids) if token == case.oracle.eos_id})


@fault("548")
def tool_call_marker_masked(case: Case) -> Encoding | None:
    return _masked(case, {n for n, token in enumerate(case.ids) if token == case.oracle.tool_calls_id})


@fault("550 545 548")
def middle_of_an_answer_masked(case: Case) -> Encoding | None:
    inner = [n for turn in _turns(case) for n in turn[1:-1]]
    return _masked(case, {case.chance.choice(inner)}) if inner else None


@fault("551 544")
def an_answer_masked(case: Case) -> Encoding | None:
    turns = _turns(case)
    return _masked(case, set(case.chance.choice(turns))) if turns else None


@fault("547 543")
def a_prompt_token_trained(case: Case) -> Encoding | None:
    spans = [s for s in case.encoded.spans if s.role != "assistant"]
    place = case.chance.choice([n for span in spans for n in range(span.start, span.end)])
    if not _turns(case):
        return None
    return case.from_labels([*case.labels[:place], case.ids[place], *case.labels[place + 1 :]])


@fault("549 543")
def weights_ignored(case: Case) -> Encoding | None:
    answers = {n for s in case.encoded.spans if s.role == "assistant" for n in range(s.start, s.end)}
    return case.from_labels([t if n in answers else IGNORE_INDEX for n, t in enumerate(case.ids)])


@fault("540")
def a_label_too_few(case: Case) -> Encoding | None:
    return case.ids, case.labels[:-1]
