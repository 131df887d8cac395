"""Every function that takes a tokenizer takes one in memory: of transformers, of mistral-common, by path or by name."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from converted import converted_tokenizer
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sampling import sampled
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, MistralCommonBackend, PreTrainedTokenizerFast

from pytest_mistral_lora import GuardError, MistralGuard, Oracle, Verdict, audit, guard, judge
from pytest_mistral_lora.assertions import (
    assert_encoded_rows_sound,
    assert_labels_exact,
    assert_no_control_token_injection,
    assert_rows_sound,
    assert_template_faithful,
)
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.loaded_tokenizer import given_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.conformance.checks import Check
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.errors import InputError, NoOracleError, NoTemplateError

# PEFT and Trainer warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

FILE = shipped_tokenizer("spm-v3")
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
IDS, LABELS = [1, 3, 16127, 4, 23325, 2], [-100] * 4 + [23325, 2]
MASKED = [*LABELS[:-1], -100]
SOUND, FAULTY = ROW | {"input_ids": IDS, "labels": LABELS}, ROW | {"input_ids": IDS, "labels": MASKED}

EOS_OUTSIDE = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %}"
    "{% generation %} {{ m.content }}{% endgeneration %}</s>{% endif %}{% endfor %}"
)
"""A template whose generation blocks leave EOS out."""

Form = Callable[[], Any]


def fast() -> Any:
    """Return a fast tokenizer of transformers, whose files are gone."""
    return copy.deepcopy(converted_tokenizer("spm-v3").fast)


FORMS: dict[str, Form] = {
    "fast": fast,
    "MistralCommonBackend": lambda: MistralCommonBackend(FILE),
    "MistralTokenizer": MistralTokenizer.v3,
    "path": lambda: FILE,
    "name": lambda: "spm-v3",
}
OBJECTS = ("fast", "MistralCommonBackend", "MistralTokenizer")

each_front = pytest.mark.parametrize("form", sampled(FORMS, ("fast", "name")))
"""Every form is given to `assert_labels_exact` and `audit`; each other front takes an object and a name."""


@functools.cache
def sound_template() -> str:
    template: str = converted_tokenizer("spm-v3").fast.chat_template
    return template


@functools.cache
def faulty_template() -> str:
    assert "[/INST]" in sound_template()
    return sound_template().replace("[/INST]", "[/INST]!")


@functools.cache
def template_with_faulty_tools() -> str:
    """Return a template with a fault that few of the packaged rows show, which is quicker to judge."""
    assert "[AVAILABLE_TOOLS]" in sound_template()
    return sound_template().replace("[AVAILABLE_TOOLS]", "[AVAILABLE_TOOLS]!")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("in-memory") / "base", FILE)


def rules_of(verdict: Verdict) -> set[str]:
    return {finding.rule for finding in verdict.findings}


@each_front
def test_a_template_is_faithful_by_any_form_of_its_tokenizer(form: str) -> None:
    tokenizer = FORMS[form]()
    assert_template_faithful(ROW, tokenizer)
    assert_template_faithful(ROW, tokenizer, sound_template())
    with pytest.raises(AssertionError, match=r"^ML004 "):
        assert_template_faithful(ROW, tokenizer, faulty_template())
    with pytest.raises(AssertionError, match=r"^ML006 "):
        assert_template_faithful(ROW, tokenizer, EOS_OUTSIDE)


def test_the_template_of_an_object_is_judged_as_it_is_now() -> None:
    tokenizer = fast()
    tokenizer.chat_template = faulty_template()
    with pytest.raises(AssertionError, match=r"^ML004 "):
        assert_template_faithful(ROW, tokenizer)
    tokenizer.chat_template = {"default": sound_template(), "tool_use": faulty_template()}
    assert_template_faithful(ROW, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(NoTemplateError, match=r"^tokenizer: the tokenizer has no chat template; expected .*template"):
        assert_template_faithful(ROW, tokenizer)


@pytest.mark.parametrize("form", FORMS)
def test_labels_and_ids_are_compared_by_any_form_of_the_tokenizer(form: str) -> None:
    tokenizer = FORMS[form]()
    assert_labels_exact(ROW, IDS, LABELS, tokenizer)
    with pytest.raises(AssertionError, match=r"^ML546 "):
        assert_labels_exact(ROW, IDS, MASKED, tokenizer)
    assert_no_control_token_injection(ROW, IDS, tokenizer)
    with pytest.raises(AssertionError, match=r"^ML106 "):
        assert_no_control_token_injection(ROW, [*IDS, 3], tokenizer)


@each_front
def test_encoded_rows_are_judged_by_any_form_of_the_tokenizer(form: str, tmp_path: Path) -> None:
    tokenizer, file = FORMS[form](), tmp_path / "rows.jsonl"
    file.write_text(json.dumps(SOUND) + "\n")
    assert_encoded_rows_sound(file, tokenizer)
    assert_encoded_rows_sound([SOUND], tokenizer)
    file.write_text(json.dumps(FAULTY) + "\n")
    for rows in (file, [FAULTY], DataLoader([FAULTY], collate_fn=lambda rows: rows[0])):
        with pytest.raises(AssertionError, match=r"^ML546 "):
            assert_encoded_rows_sound(rows, tokenizer)


@pytest.mark.parametrize("form", FORMS)
def test_an_audit_takes_any_form_of_the_tokenizer(form: str, tmp_path: Path) -> None:
    tokenizer = FORMS[form]()
    by_name = audit([SOUND], tokenizer="spm-v3")
    verdict = audit([SOUND], tokenizer=tokenizer)
    assert (verdict.ok, verdict.findings) == (True, ())
    assert verdict.not_checked == by_name.not_checked
    assert all(verdict.not_checked.values())
    faulty = audit([SOUND | {"row": 0}, FAULTY | {"row": 1}], tokenizer=tokenizer)
    assert [(finding.rule, str(finding.place)) for finding in faulty.findings if finding.severity == "error"] == [
        ("ML546", "rows[1]")
    ]
    assert not faulty.ok


def test_an_audit_names_the_template_of_an_object_as_the_cause() -> None:
    tokenizer = fast()
    tokenizer.chat_template = faulty_template()
    ids = tokenizer(tokenizer.apply_chat_template(ROW["messages"], tokenize=False), add_special_tokens=False).input_ids
    row = ROW | {"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:]}
    verdict = audit([row], tokenizer=tokenizer)
    [finding] = [finding for finding in verdict.findings if finding.severity == "error"]
    assert (finding.rule, str(finding.place)) == ("ML004", "tokenizer, chat_template")


@pytest.mark.parametrize("form", sampled(FORMS, ("fast", "MistralCommonBackend", "name")))
def test_judge_takes_any_form_of_a_tokenizer(form: str) -> None:
    verdict = judge(FORMS[form](), examples=1)
    assert (verdict.ok, verdict.findings) == (True, ())
    cases = {name.split("::", 1)[1]: reason for name, reason in verdict.not_checked.items()}
    of_files = {"tokenizer::one-tokenizer", "tokenizer::declarations-agree", "tokenizer::model-config"}
    if form in OBJECTS:
        assert {name for name in of_files if "judge its folder by the path" in cases.get(name, "")} == of_files
    else:
        assert not of_files & cases.keys()


def _other_eos(tokenizer: Any) -> None:
    tokenizer.eos_token = "[INST]"


def _text_as_pad(tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token


def _own_token(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mine>"]})


def _faulty_template(tokenizer: Any) -> None:
    tokenizer.chat_template = template_with_faulty_tools()


Alone = Callable[[str], None]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Alone:
    """Run the checks of one subject alone: all of them take seconds."""
    judged = Check.run

    def choose(subject: str) -> None:
        monkeypatch.setattr(Check, "run", lambda check: judged(check) if check.subject == subject else Result())

    return choose


@pytest.mark.parametrize(
    ("change", "rule", "place"),
    [
        (_other_eos, "ML203", "tokenizer"),
        (_text_as_pad, "ML204", "tokenizer"),
        (_own_token, "ML202", "tokenizer"),
        (_faulty_template, "ML004", "tokenizer, chat_template"),
    ],
)
def test_judge_finds_the_fault_of_an_object(change: Callable[[Any], None], rule: str, place: str, alone: Alone) -> None:
    tokenizer = fast()
    change(tokenizer)
    alone("template" if rule == "ML004" else "tokenizer")
    verdict = judge(tokenizer, examples=1)
    assert not verdict.ok
    assert (rule, place) in {(finding.rule, str(finding.place)) for finding in verdict.findings}


@each_front
def test_judge_takes_a_template_as_a_text(form: str, alone: Alone) -> None:
    verdict = judge(FORMS[form](), template=template_with_faulty_tools(), examples=1)
    assert not verdict.ok
    assert ("ML004", "template") in {(finding.rule, str(finding.place)) for finding in verdict.findings}
    assert any("judge its folder by the path" in reason for reason in verdict.not_checked.values())
    alone("template")
    assert judge(FORMS[form](), template=sound_template(), examples=1).ok


def test_judge_keeps_two_objects_apart(alone: Alone) -> None:
    alone("template")
    faulty = fast()
    _faulty_template(faulty)
    verdict = judge(fast(), faulty, examples=1)
    failed = {outcome.name.split("::")[0] for outcome in verdict._outcomes if outcome.findings}
    assert failed == {"tokenizer-in-memory-2"}


@each_front
def test_judge_takes_rows_with_any_form_of_the_tokenizer(form: str, tmp_path: Path) -> None:
    tokenizer, file = FORMS[form](), tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    assert judge(file, tokenizer=tokenizer).ok
    assert_rows_sound(file, tokenizer)
    other = {"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Hello"}]}
    file.write_text(f"{json.dumps(ROW)}\n{json.dumps(other)}\n")
    assert rules_of(judge(file, tokenizer=tokenizer)) == {"ML601"}
    with pytest.raises(AssertionError, match=r"^ML601 "):
        assert_rows_sound(file, tokenizer)


def test_rows_are_compared_with_a_template_of_an_object(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    assert "ML603" in rules_of(judge(file, tokenizer="spm-v3", template=faulty_template()))
    tokenizer = fast()
    tokenizer.chat_template = faulty_template()
    assert "ML603" in rules_of(judge(file, tokenizer=tokenizer))
    assert judge(file, tokenizer="spm-v3", template=sound_template()).ok


def _trainer(base: Path, folder: Path, labels: list[int]) -> Any:
    from guarded_runs import make_trainer

    return make_trainer(base, [{"input_ids": IDS, "labels": labels}] * 4, folder, tokenizer=fast(), max_steps=1)


@each_front
def test_a_guard_takes_any_form_of_the_tokenizer(form: str, base: Path, tmp_path: Path) -> None:
    sound = guard(trainer := _trainer(base, tmp_path, LABELS), tokenizer=FORMS[form](), batches=1)
    trainer.train()
    assert sound.verdict is not None
    assert {finding.severity for finding in sound.verdict.findings} <= {"note"}
    guard(trainer := _trainer(base, tmp_path, MASKED), tokenizer=FORMS[form](), batches=1)
    with pytest.raises(GuardError, match="ML546"):
        trainer.train()


def test_a_tokenizer_that_was_loaded_from_a_folder_has_its_mistral_tokenizer(tmp_path: Path) -> None:
    converted_tokenizer("spm-v3").fast.save_pretrained(tmp_path / "it")
    shutil.copy(FILE, tmp_path / "it" / "tokenizer.model.v3")
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "it")
    assert str(tmp_path / "it") in given_tokenizer(loaded).recognition.text
    assert_labels_exact(ROW, IDS, LABELS, loaded)


class Processor:
    """A processor of text and images, with a chat template of its own."""

    def __init__(self, tokenizer: Any, chat_template: str | None) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template


def test_a_processor_has_a_tokenizer_inside() -> None:
    assert_template_faithful(ROW, Processor(fast(), None))
    with pytest.raises(AssertionError, match=r"^ML004 "):
        assert_template_faithful(ROW, Processor(fast(), faulty_template()))
    with pytest.raises(AssertionError, match=r"^ML546 "):
        assert_labels_exact(ROW, IDS, MASKED, Processor(MistralCommonBackend(FILE), None))


def test_a_vocabulary_that_is_not_known_needs_a_name() -> None:
    from tokenizers import Tokenizer, models

    small = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    expected = r"^tokenizer: .*the closest one; expected the vocabulary of a known tokenizer\. Pass MistralTokenizer"
    for call in (
        lambda: assert_labels_exact(ROW, IDS, LABELS, small),
        lambda: audit([SOUND], tokenizer=small),
    ):
        with pytest.raises(NoOracleError, match=expected):
            call()
    assert rules_of(judge(small, examples=1)) >= {"ML229"}
    with pytest.raises(NoOracleError, match=r"is not spm-v3: .* id 0 is 'a', and '<unk>' there"):
        audit([SOUND], tokenizer=small, oracle="spm-v3")
    assert audit([SOUND], tokenizer=fast(), oracle="spm-v3").ok


def test_a_mistral_tokenizer_without_its_file_is_refused(tmp_path: Path) -> None:
    shutil.copy(FILE, tmp_path / "gone.model.v3")
    tokenizer = MistralTokenizer.from_file(str(tmp_path / "gone.model.v3"))
    assert_labels_exact(ROW, IDS, LABELS, tokenizer)
    (tmp_path / "gone.model.v3").unlink()
    with pytest.raises(InputError, match=r"^tokenizer: a MistralTokenizer whose file is missing: .*gone\.model\.v3"):
        assert_labels_exact(ROW, IDS, LABELS, tokenizer)


NO_TOKENIZERS = [7, ["spm-v3"], {"a": 1}, b"spm-v3", torch.ones(2), PreTrainedTokenizerFast, Oracle(FILE)]


@pytest.mark.parametrize("given", NO_TOKENIZERS, ids=lambda given: type(given).__name__)
def test_what_is_no_tokenizer_is_refused_with_what_to_pass(given: Any) -> None:
    for call in (
        lambda: assert_template_faithful(ROW, given),
        lambda: assert_labels_exact(ROW, IDS, LABELS, given),
        lambda: assert_encoded_rows_sound([SOUND], given),
        lambda: audit([SOUND], tokenizer=given),
        lambda: judge("rows.jsonl", tokenizer=given),
        lambda: MistralGuard(tokenizer=given),
    ):
        with pytest.raises(InputError, match=rf"no tokenizer.*: {type(given).__name__}; expected a fast tokenizer of"):
            call()


class _Broken:
    """An object that has whatever is asked of it, and raises an error in its place."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


def _raise(*_: Any) -> None:
    raise RuntimeError("boom")


@pytest.mark.parametrize("name", sampled(("decode", "chat_template", "get_added_vocab", "__len__"), ("decode",)))
def test_an_object_that_raises_is_one_finding(name: str) -> None:
    tokenizer = copy.copy(fast())
    tokenizer.__class__ = type("Raising", (type(tokenizer),), {name: _raise if name == "__len__" else property(_raise)})
    verdict = judge(tokenizer, examples=1)
    [finding] = [finding for finding in verdict.findings if finding.severity == "error"]
    assert (finding.rule, str(finding.place), "RuntimeError: boom" in finding.found) == ("ML201", "tokenizer", True)


def test_an_object_whose_attributes_raise_is_no_tokenizer() -> None:
    with pytest.raises(InputError, match=r"no tokenizer.*: _Broken; expected a fast tokenizer of"):
        audit([SOUND], tokenizer=_Broken())
    # a likeness is none: what it lacks would be an error of ours
    likeness = SimpleNamespace(is_fast=True, get_vocab=dict, convert_ids_to_tokens=str)
    with pytest.raises(InputError, match="not a fast tokenizer"):
        judge(likeness)


@pytest.mark.parametrize("template", [7, "", " \n", Path("chat_template.jinja"), {"default": "x"}])
def test_what_is_no_template_is_refused(template: Any) -> None:
    for call in (
        lambda: assert_template_faithful(ROW, "spm-v3", template),
        lambda: judge("spm-v3", template=template),
    ):
        with pytest.raises(InputError, match=r"^template=: an? .*; expected the text of a Jinja chat template"):
            call()


def test_a_template_needs_a_tokenizer(tmp_path: Path) -> None:
    for paths in ((), (tmp_path / "rows.jsonl",)):
        (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
        with pytest.raises(InputError, match=r"^template=: a chat template without a tokenizer; expected .*spm-v3"):
            judge(*paths, template=sound_template())


def test_lists_of_paths_are_paths(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "encoded.jsonl").write_text(json.dumps(FAULTY) + "\n")
    files = [tmp_path / "rows.jsonl", tmp_path / "encoded.jsonl"]
    by_list = judge(files, tokenizer="spm-v3")
    assert not by_list.ok
    assert str(by_list) == str(judge(*files, tokenizer="spm-v3"))
    for given in (ROW, 7, None, [[ROW]]):
        with pytest.raises(
            InputError, match=r"^judge\(\): no path \(.*\): \w+; expected paths, .* in memory: judge\(rows="
        ):
            judge(given)


@pytest.mark.parametrize("xfails", [["ML546"], {"ML546": "known"}, 7])
def test_known_deviations_are_a_file(xfails: Any) -> None:
    with pytest.raises(
        InputError, match=rf"^xfails=: no path \(.*\): {type(xfails).__name__}; expected the path of .*ML608  #"
    ):
        judge("spm-v3", xfails=xfails)


def test_the_value_is_shown_beside_its_type() -> None:
    with pytest.raises(InputError, match=r"^xfails=: no path \(\['ML546'\]\): list; expected"):
        judge(xfails=["ML546"])
    huge: list[Any] = [10**5000, "x" * 10**6]
    huge.append(huge)
    for given in (huge, huge[0], huge * 1000):
        with pytest.raises(InputError) as caught:
            audit([SOUND], tokenizer=given)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("dataset", [[ROW], ROW, 7, [["rows.jsonl"]]])
def test_a_dataset_is_files(dataset: Any) -> None:
    found = type(dataset[0] if isinstance(dataset, list) else dataset).__name__
    with pytest.raises(InputError, match=rf"^dataset=: no path \(.*\): {found}; expected the path of .*rows in memory"):
        audit([SOUND], tokenizer="spm-v3", dataset=dataset)


@pytest.mark.parametrize("oracle", [7, ["spm-v3"], MistralTokenizer.v3()], ids=lambda given: type(given).__name__)
def test_an_oracle_is_a_name_or_a_path(oracle: Any) -> None:
    with pytest.raises(InputError, match=rf"^oracle=: a {type(oracle).__name__}.*; expected the name of"):
        audit([SOUND], tokenizer="spm-v3", oracle=oracle)


def test_a_tokenizer_in_memory_is_not_trained_with() -> None:
    with pytest.raises(InputError, match=r"^train=: a tokenizer in memory is not trained with; expected the folder"):
        judge(fast(), train=True)


def test_a_loader_gives_batches_and_not_rows() -> None:
    other = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
    rows = [SOUND, other | {"input_ids": [1, 3, 23325, 4, 16127, 2], "labels": [-100] * 4 + [16127, 2]}]
    columns = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    tokenizer = fast()
    tokenizer.pad_token = "<unk>"
    collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)

    def loader(rows: list[dict[str, Any]]) -> Any:
        return DataLoader(rows, batch_size=2, collate_fn=collator)

    assert audit(loader(columns), tokenizer="spm-v3").ok
    columns.append({"input_ids": IDS, "labels": MASKED})
    verdict = audit(loader(columns), tokenizer="spm-v3")
    assert {str(finding.place) for finding in verdict.findings if finding.rule == "ML546"} == {"rows[1][0]"}
    # a list of batches, and rows that are batches of one
    assert rules_of(audit(list(loader(columns)), tokenizer="spm-v3")) == rules_of(verdict)
    assert audit([{name: [values] for name, values in columns[0].items()}], tokenizer="spm-v3").ok
    with pytest.raises(InputError, match=r"^rows\[0\], input_ids: PyTorch's default_collate .*; expected .*collate_fn"):
        audit(DataLoader(columns, batch_size=2), tokenizer="spm-v3")
    with pytest.raises(InputError, match=r"^rows\[0\]: a row is a list; expected a mapping"):
        audit(DataLoader([(1, 2)], batch_size=1), tokenizer="spm-v3")
