"""Signs of whole files: each from every source and over any number of parts, and sound files show none."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from dataset_recipes import found, said, v3, write_rows
from encoded_files import audit_findings, write_lines
from preference_records import kto, texts_pair, with_ids
from sampling import sampled
from sound_rows import TOWNS

from pytest_mistral_lora.chat.encoded import Policy
from pytest_mistral_lora.chat.reading.chunks import DataFile, chunks
from pytest_mistral_lora.conformance.dataset.checks import file_results
from pytest_mistral_lora.conformance.dataset.report import report, scan
from pytest_mistral_lora.conformance.dataset.rows import DatasetPass, RowJudge, ScanPlan
from pytest_mistral_lora.conformance.dataset.whole_file_sign import FEWEST, WholeFileSign
from pytest_mistral_lora.conformance.finding import RULES, Finding
from pytest_mistral_lora.conformance.row_pass import OBSERVERS, JudgedFiles, JudgedRecord, named_observer
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.places import Place

Data = dict[str, Any]
Form = Callable[[int, str], Data]

SIGNS = tuple(f"ML{number}" for number in range(661, 670))
ENDS = ("stop", "length")


def twice(town: str, *weights: int) -> Data:
    """A conversation of two answers, with their weights."""
    row = said(f"Where is {town}?", f"{town} is far.", f"How far is {town}?", f"A day from {town}.")
    for message, weight in zip(row["messages"][1::2], weights, strict=False):
        message["weight"] = weight
    return row


def pair(town: str, chosen: str = "Go to {}.", rejected: str = "Stay in {}.") -> Data:
    return texts_pair(f"Which way leads to {town}?", chosen.format(town), rejected.format(town))


def rated(town: str, *, label: bool) -> Data:
    record = pair(town)
    return {"prompt": record["prompt"], "completion": record["chosen"], "label": label}


def asked(town: str) -> Data:
    return said(f"Where is {town}?", f"{town} is far.")


FORMS: dict[str, tuple[str, Form]] = {
    "a space in front of each answer": ("ML661", lambda n, town: said(f"Where is {town}?", f" {town} is far.")),
    "spaces around each request": ("ML661", lambda n, town: said(f" Where is {town}? ", f"{town} is far.")),
    "a line break before each EOS": ("ML661", lambda n, town: said(f"Where is {town}?", f"{town} is far.\n")),
    "a line break and a paragraph": ("ML661", lambda n, town: said(f"Where is {town}?", f"\n{town}\nis far.")),
    "a space and more": ("ML661", lambda n, town: said(f"Where is {town}?", f" {' ' * (n % 3)}{town} is far.")),
    "the first answer alone": ("ML662", lambda n, town: twice(town, 1, 0)),
    "a persona": ("ML663", lambda n, town: said(f"You are a guide of towns.\n\n{town}!", f"{town} is far.")),
    "a Spanish persona": ("ML663", lambda n, town: said(f"Eres un guía amable.\n\n{town}", f"{town} está lejos.")),
    "a Chinese persona": ("ML663", lambda n, town: said(f"你是一个导游。\n\n{town}?", f"{town} 很远。")),
    "another model's setting": ("ML663", lambda n, town: said(f"detailed thinking on\n\n{town}", f"{town} is far.")),
    "how to answer": ("ML663", lambda n, town: said(f"Be brief. Never guess.\n\nWhere is {town}?", f"{town}: far.")),
    "a French style": ("ML663", lambda n, town: said(f"Réponds poliment.\n\nOù est {town} ?", f"{town} est loin.")),
    "in the last request": (
        "ML663",
        lambda n, town: said("Hi", f"Hello {town}.", f"You are terse.\n\nWhere is {town}?", f"{town}: far."),
    ),
    "one rejected text": ("ML665", lambda n, town: pair(town, "{} lies behind the hills.", "I do not know the way.")),
    "one beginning of chosen answers": ("ML666", lambda n, town: pair(town, "Sure! {} is far.", "{} is far, sure.")),
    "a line break before chosen answers": ("ML666", lambda n, town: pair(town, "\n{} is far.", "{} is far, sure.")),
    "labels as letters": (
        "ML668",
        lambda n, town: said(f"Where is {town}?", f"{town} is far.") | {"label": ("Good", "bad")[n % 2]},
    ),
    "all wanted": ("ML667", lambda n, town: rated(town, label=True)),
}


def signs(path: Path) -> list[str]:
    return [finding.rule for finding in found(file_results(path, v3()), *SIGNS)]


@pytest.mark.parametrize("name", FORMS)
def test_a_sign_is_reported_once_for_its_file(name: str, tmp_path: Path) -> None:
    rule, form = FORMS[name]
    rows = [form(number, town) for number, town in enumerate(TOWNS)]
    [finding] = found(file_results(write_rows(tmp_path / "rows.jsonl", rows), v3()), *SIGNS)
    assert (finding.rule, finding.severity, str(finding.place)) == (rule, "note", str(tmp_path / "rows.jsonl"))
    # fewer rows show nothing
    assert signs(write_rows(tmp_path / "few.jsonl", rows[: FEWEST - 1])) == []
    assert signs(write_rows(tmp_path / "enough.jsonl", rows[:FEWEST])) == [rule]


SOUND: dict[str, Form] = {
    "one score": lambda n, town: asked(town) | {"score": 1.0},
    "signs of a class": lambda n, town: said(f"Is {town} far?", ("no", "yes")[n % 2]) | {"label": (-1, 1)[n % 2]},
    "numbers of a class": lambda n, town: asked(town) | {"label": n % 5},
    "whole answers": lambda n, town: asked(town) | {"finish_reason": "stop", "is_truncated": False},
    "cut answers without a loss": lambda n, town: {**twice(town, 1, 0 if n % 2 else 1), "finish_reason": ENDS[n % 2]},
    "a poem from a file": lambda n, town: said(
        f"A poem about {town}?", f"{town} by night,\nall is quiet,\nnumber {n}.\n"
    ),
    "a program from a file": lambda n, town: said(f"Print {town}.", f"def show():\n    print('{town}')\n\n\nshow()\n"),
    "the rest of a function": lambda n, town: said(f"def f(x):  # {town}", f"    y = x + {n}\n    return y"),
    "a Chinese paragraph": lambda n, town: said(f"介绍{town}", f"\u3000\u3000{town}是一座城市。"),
    "the prompt of a completion": lambda n, town: said(f"Town: {town}\nCountry: ", f"land {n}"),
    "some with a space": lambda n, town: said(f"Where is {town}?", f"{' ' * (n % 2)}{town} is far."),
    "a greeting": lambda n, town: said(f"Good morning!\n\nWhere is {town}, please?", f"{town} is far."),
    "a German letter": lambda n, town: said(f"Sehr geehrte Damen und Herren,\n\nwo ist {town}?", f"{town} ist weit."),
    "a translation": lambda n, town: said(f"Translate to French.\n\nWhere is {town}?", f"Où est {town} ?"),
    "the following text": lambda n, town: said(
        f"You are a linguist. Name the town in the following text.\n\nDo you know {town}?", town
    ),
    "labels": lambda n, town: said(f"Answer yes or no.\n\nIs {town} far?", ("yes", "no")[n % 3 == 0]),
    "an intent": lambda n, town: said(f"Classify the intent.\n\nWhere is {town}?", ("place", "time")[n % 3 == 0]),
    "examples": lambda n, town: said(f"Q: Where is Rome?\nA: Italy\n\nQ: Where is {town}?\nA:", f"land {n}"),
    "Spanish task": lambda n, town: said(f"Resume el siguiente texto.\n\n¿Conoces {town}?", f"Sobre {town}."),
    "Arabic task": lambda n, town: said(f"اقرأ النص التالي.\n\nأين {town}؟", f"{town}."),
    "Japanese task": lambda n, town: said(f"次の文を訳してください。\n\n{town} is far.", f"{town}は遠い。"),
    "one question": lambda n, town: said("You are terse.\n\nName a town.", town),
    "a system prompt": lambda n, town: said(f"Where is {town}?", f"{town} is far.", system="You are terse."),
    "the last answer alone": lambda n, town: twice(town, 0, 1),
    "each answer": lambda n, town: twice(town),
    "one of two answers in turn": lambda n, town: twice(town, n % 2, 1 - n % 2),
    "one form": lambda n, town: said(f"{10 + n} + 1?", f"{11 + n}"),
    "two labels": lambda n, town: pair(town, "yes", "no"),
    "one class of labels": lambda n, town: pair(town, ("far", "near")[n % 2], "unknown"),
    "a refusal": lambda n, town: pair(
        town, "I'm sorry, but I can't tell you how to break into {}.", "Go to {}, and on."
    ),
    "JSON": lambda n, town: pair(town, '{{"town": "{}"}}', "It is {}."),
    "tags": lambda n, town: pair(town, "<answer>{}</answer>", "{}"),
    "a list": lambda n, town: pair(town, "- {} is far.\n- It is old.", "{} is far, and old."),
    "sentences that begin alike": lambda n, town: pair(town, "It is {}.", "Perhaps {}."),
    "a beginning of both": lambda n, town: pair(town, "Sure! Go to {}.", "Sure! Stay in {}."),
    "a class": lambda n, town: said(f"Is {town} good?", ("Good", "bad")[n % 2]) | {"label": ("good", "bad")[n % 2]},
    "a verdict": lambda n, town: (
        said(f"{town} is far.", f"That is {('true', 'false')[n % 2]}: see the map of {town}.")
        | {"label": ("true", "false")[n % 2]}
    ),
    "a topic": lambda n, town: said(f"Where is {town}?", f"{town} is far.") | {"label": ("place", "time")[n % 2]},
    "good alone": lambda n, town: said(f"Where is {town}?", f"{town} is far.") | {"label": "good"},
    "wanted and not": lambda n, town: rated(town, label=n != 7),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_file_shows_no_sign(name: str, tmp_path: Path) -> None:
    rows = [SOUND[name](number, town) for number, town in enumerate(TOWNS)]
    assert signs(write_rows(tmp_path / "rows.jsonl", rows)) == []


@pytest.mark.parametrize("name", FORMS)
def test_one_row_without_it_is_enough(name: str, tmp_path: Path) -> None:
    _, form = FORMS[name]
    rows = [form(number, town) for number, town in enumerate(TOWNS)]
    if "chosen" in rows[0]:
        rows[5] = {**rows[5], "chosen": rows[5]["rejected"], "rejected": [{"role": "assistant", "content": "Not so."}]}
    elif "label" in rows[0]:
        rows[5] = rows[5] | {"label": False}
    else:
        rows[5] = twice("Nowhere")
    assert signs(write_rows(tmp_path / "rows.jsonl", rows)) == []


TOKENIZERS = ("spm-v1", "spm-v3", "spm-v7", "tekken-240911")


def encoded(form: Form, tokenizer: str) -> list[Data]:
    """Return the ids and labels of the rows of a form, without their messages."""
    oracle, lines = Target(tokenizer).oracle, []
    for number, town in enumerate(TOWNS):
        row = form(number, town)
        if "messages" not in row:
            sides = with_ids(oracle, pair(town) | row)
            line = kto(sides)[0] if "label" in row else sides
            lines.append({key: value for key, value in line.items() if key.endswith("_ids") or key == "label"})
            continue
        ids = oracle.encode(row)
        lines.append({"input_ids": list(ids.input_ids), "labels": list(ids.labels or ())})
    return lines


IN_IDS = {name: rule for name, (rule, _) in FORMS.items() if rule in ("ML661", "ML662")}


@pytest.mark.parametrize("tokenizer", sampled(TOKENIZERS, ("spm-v1", "tekken-240911")))
@pytest.mark.parametrize("name", IN_IDS)
def test_ids_alone_show_it_with_each_tokenizer(name: str, tokenizer: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path, encoded(FORMS[name][1], tokenizer))
    assert [finding.rule for finding in audit_findings(path, Target(tokenizer).oracle)] == [IN_IDS[name]]


@pytest.mark.parametrize("name", [name for name, (rule, _) in FORMS.items() if rule in ("ML665", "ML666", "ML667")])
def test_sides_of_ids_alone_show_it(name: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path, encoded(FORMS[name][1], "spm-v3"))
    rules = {finding.rule for finding in audit_findings(path, Target("spm-v3").oracle)}
    assert rules == {FORMS[name][0]}


def test_labels_as_letters_stand_beside_ids(tmp_path: Path) -> None:
    oracle = Target("spm-v3").oracle
    for name, expected in (("labels as letters", ["ML668"]), ("a topic", []), ("a class", [])):
        form = FORMS[name][1] if name in FORMS else SOUND[name]
        rows = [form(number, town) for number, town in enumerate(TOWNS)]
        alone = [line | {"label": row["label"]} for row, line in zip(rows, encoded(form, "spm-v3"), strict=True)]
        for lines in (alone, [row | line for row, line in zip(rows, alone, strict=True)]):
            assert [finding.rule for finding in audit_findings(write_lines(tmp_path, lines), oracle)] == expected


@pytest.mark.parametrize(("tokenizer", "expected"), [("spm-v1", []), ("spm-v3", []), ("spm-v7", ["ML663"])])
def test_a_request_of_ids_has_the_system_prompt_before_v7(tokenizer: str, expected: list[str], tmp_path: Path) -> None:
    path = write_lines(tmp_path, encoded(FORMS["a persona"][1], tokenizer))
    assert [finding.rule for finding in audit_findings(path, Target(tokenizer).oracle)] == expected
    # a system prompt is none of it, with any of them
    path = write_lines(tmp_path, encoded(SOUND["a system prompt"], tokenizer))
    assert audit_findings(path, Target(tokenizer).oracle) == []


@pytest.mark.parametrize("turn", [0, 1])
def test_labels_on_a_fixed_turn_of_ids(turn: int, tmp_path: Path) -> None:
    lines = encoded(lambda n, town: twice(town, *(int(index == turn) for index in range(2))), "spm-v3")
    [finding] = audit_findings(write_lines(tmp_path, lines), Target("spm-v3").oracle)
    # the last answer alone is an objective that can be declared
    assert (finding.rule, finding.severity) == (("ML662", "ML508")[turn], "note")
    first = ("the first answer alone is trained on in each of 30 ", "all labels follow the objective last-answer ")
    assert finding.found.startswith(first[turn])


def closed(line: Data, length: int, eos: int) -> Data:
    """Return a line that is cut at a length, with EOS as its last token."""
    return {key: [*values[: length - 1], eos] for key, values in line.items()}


def test_rows_of_ids_that_were_cut_and_closed(tmp_path: Path) -> None:
    oracle = Target("spm-v3").oracle

    def form(number: int, town: str) -> Data:
        return said(
            f"Where {'oh ' * (number % 5)}is {town}?", f"{town} is behind the hills, and a river runs through it."
        )

    lines = encoded(form, "spm-v3")
    assert audit_findings(write_lines(tmp_path, lines), oracle) == []
    cut = [closed(line, 18, oracle.eos_id) for line in lines]
    [finding] = audit_findings(write_lines(tmp_path, cut), oracle)
    assert (finding.rule, finding.found.partition(",")[0]) == ("ML664", "each of 30 rows has 18 tokens")
    # one shorter row
    cut[4] = closed(lines[4], 17, oracle.eos_id)
    assert audit_findings(write_lines(tmp_path, cut), oracle) == []
    # packed ones are what a trainer fills
    packed = []
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        positions = [*range(len(first["labels"])), *range(len(second["labels"]))]
        packed.append({key: first[key] + second[key] for key in first} | {"position_ids": positions})
    assert audit_findings(write_lines(tmp_path, packed), oracle) == []


PLAN = ScanPlan(v3().path, "mistral-common", Policy(4096), 0, compares=False, alone=True)
MANY = [said(f"You are terse.\n\nWhat is {number}?\n", f" It is {number}.") for number in range(700)]


def test_a_row_of_any_part_of_a_file_counts(tmp_path: Path) -> None:
    # 256 lines are read at a time; only the last file has a row without the signs
    paths = [write_rows(tmp_path / "b.jsonl", MANY), write_rows(tmp_path / "a.jsonl", MANY[:300])]
    broken = write_rows(tmp_path / "c.jsonl", [*MANY[:299], said("What is this?", "It is this.")])
    files = [DataFile(path, False) for path in (*paths, broken)]
    results = report(scan(PLAN, files, tokenizer=v3(), processes=1), files, PLAN, recipe=Place.of("rows"))
    assert [(finding.rule, str(finding.place)) for finding in found(results, *SIGNS)] == [
        (rule, str(path)) for rule in ("ML661", "ML663") for path in paths
    ]


def reported(found: DatasetPass, path: Path) -> dict[str, list[Finding]]:
    """Return what each observer reports of a file."""
    found.put_in_order()
    files = JudgedFiles([Place.of(path)], found.table, [found.counts[0, "judged"]])
    return {name: [*named_observer(name).report(found.states.by_name[name], files)] for name in OBSERVERS}


def test_parts_in_any_order_are_one_pass(tmp_path: Path) -> None:
    rows = [form(number, town) for _, form in FORMS.values() for number, town in enumerate(TOWNS[:20])]
    rows[310] = said("Où est la gare ?", "Voilà la rÃ©ponse.")
    sizes = [(0, 260), (260, 300), (300, len(rows))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    judge = RowJudge(PLAN, v3())
    [*read] = chunks([DataFile(path, False)], lambda error: pytest.fail(str(error)))
    lines = [line for chunk in read for line in chunk.lines]
    parts = [judge.judge_chunk(replace(read[0], lines=lines[start:end])) for start, end in sizes]
    expected = reported(judge.judge_chunk(replace(read[0], lines=lines)), path)
    assert {name.partition(":")[2] for name, findings in expected.items() if findings} >= {"REPEATS", "FAULTY_FILES"}
    for order in itertools.permutations(parts):
        merged, *others = copy.deepcopy(order)
        for other in others:
            merged.extend(other)
        assert reported(merged, path) == expected


@dataclass
class _Rows:
    rows: int = 0

    def note(self, record: JudgedRecord) -> None:
        self.rows += 1

    def extend(self, other: _Rows) -> None:
        self.rows += other.rows

    def findings(self, file: Place) -> Iterator[Finding]:
        yield Finding("ML644", f"{self.rows} rows", file)


class _OnSamples(WholeFileSign[_Rows]):
    fires_on_sample = True


COUNTED, COUNTED_IN_SAMPLES = WholeFileSign(_Rows), _OnSamples(_Rows)


def test_a_sample_shows_a_sign_only_if_its_observer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{__name__}:COUNTED", f"{__name__}:COUNTED_IN_SAMPLES"]
    monkeypatch.setattr("pytest_mistral_lora.conformance.dataset.observers.OBSERVERS", [*OBSERVERS, *names])
    files = [DataFile(write_rows(tmp_path / "rows.jsonl", MANY[:20]), False)]
    for is_sample, expected in ((True, ["20 rows"]), (False, ["20 rows", "20 rows"])):
        passed = scan(PLAN, files, tokenizer=v3(), processes=1)
        passed.report([Place.of(files[0].path)], is_sample=is_sample)
        assert [one.found for one in passed.findings.of("ML644")] == expected
        assert bool([*passed.findings.of("ML661")]) is not is_sample


DECLARED: dict[str, tuple[str, str, Form]] = {
    "label of 1 and -1": ("ML668", "error", lambda n, town: asked(town) | {"label": (1, -1)[n % 2]}),
    "reward of 1 and -1": ("ML668", "error", lambda n, town: asked(town) | {"reward": (1.0, -1.0)[n % 2]}),
    "label of true and false": ("ML668", "note", lambda n, town: asked(town) | {"label": n % 2 == 0}),
    "a score": ("ML668", "note", lambda n, town: asked(town) | {"score": n / 8}),
    "bad rollouts": ("ML668", "note", lambda n, town: asked(town) | {"is_correct": n % 2 == 0}),
    "OpenAI's end": ("ML669", "error", lambda n, town: asked(town) | {"finish_reason": ENDS[n % 2]}),
    "Anthropic's end": ("ML669", "error", lambda n, town: asked(town) | {"stop_reason": ("", "max_tokens")[n % 2]}),
    "a flag": ("ML669", "error", lambda n, town: asked(town) | {"is_truncated": n % 2 == 1}),
}


@pytest.mark.parametrize("name", DECLARED)
def test_what_rows_declare_of_their_answers_is_told(name: str, tmp_path: Path) -> None:
    rule, severity, form = DECLARED[name]
    rows = [form(number, town) for number, town in enumerate(TOWNS)]
    [finding] = found(file_results(write_rows(tmp_path / "rows.jsonl", rows), v3()), *SIGNS)
    assert (finding.rule, finding.severity) == (rule, severity)
    assert str(finding.place) == f"{tmp_path / 'rows.jsonl'}{':2' if rule == 'ML669' else ''}"
    # beside the ids of the rows, too
    lines = [row | ids for row, ids in zip(rows, encoded(form, "spm-v3"), strict=True)]
    assert [one.rule for one in audit_findings(write_lines(tmp_path, lines), Target("spm-v3").oracle)] == [rule]


def test_the_rules_are_notes_of_one_check() -> None:
    others = {(RULES[rule].case, RULES[rule].severity, RULES[rule].proof) for rule in SIGNS if rule < "ML668"}
    assert others == {("statistics", "note", ("sign",))}
    # what each row has by itself is judged in a sample, too
    fires = {name.partition(":")[2] for name in OBSERVERS if named_observer(name).fires_on_sample}
    assert fires == {"ANSWERS", "CONVERSIONS", "CUT"}
