"""A record's kind is shown by its keys, and a record without one is refused as a conversation is."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

import pytest_mistral_lora
from pytest_mistral_lora.chat.kinds.conversation import CONVERSATION
from pytest_mistral_lora.chat.kinds.fim import FIM
from pytest_mistral_lora.chat.kinds.pair import PAIR
from pytest_mistral_lora.chat.kinds.rated import RATED
from pytest_mistral_lora.chat.kinds.records import as_side, parse_rows, prompt_kind, record_kind
from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.rows import Row, imported
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.places import Place

TURNS = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "Red."}]
ROW = {"messages": TURNS}
PAIR_RECORD = {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "No."}]}
FIM_RECORD = {"prompt": "a", "suffix": "b", "completion": "c"}


def test_a_conversation_stands_for_one_row():
    data = {"messages": TURNS, "source": "my own key"}
    assert record_kind(data) is CONVERSATION
    [row] = parse_rows(data, place=Place.of("rows.jsonl", 3))
    assert row == Row.from_dict(data)
    assert str(row.place) == "rows.jsonl:3"


@pytest.mark.parametrize("data", [None, [], "text", {}, {"messages": None}, {"message": TURNS}])
def test_a_record_of_no_kind_is_refused_as_a_conversation(data):
    assert record_kind(data) is CONVERSATION
    with pytest.raises(RowError) as error:
        parse_rows(data, place=Place.of("rows.jsonl", 3))
    assert str(error.value.place).startswith("rows.jsonl:3")


def test_messages_decide_the_kind_whatever_stands_beside_them():
    keys = ("prompt", "chosen", "rejected", "completion", "label", "suffix")
    assert record_kind({"messages": TURNS, **{key: [] for key in keys}}) is CONVERSATION


def test_kinds_have_their_names():
    assert {name: kind.name for name, kind in KINDS.items()} == {name: name for name in KINDS}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_a_kind_names_is_there(kind):
    assert imported(kind.importable) is kind
    named = (kind.text_law, kind.signs, kind.file_faults, kind.id_fault, kind.row_format)
    assert all(imported(name) for name in named if name)
    assert not kind.text_rule or kind.text_rule in RULES


def test_a_row_is_its_kind_s_in_another_process():
    for data in (ROW, PAIR_RECORD, FIM_RECORD):
        for row in parse_rows(data):
            copied = pickle.loads(pickle.dumps(row))
            assert copied.kind is row.kind
            assert (copied, copied.side, copied.place) == (row, row.side, row.place)


def test_a_side_is_known_by_its_kind():
    chosen, rejected = parse_rows(PAIR_RECORD)
    assert [row.kind.starts_record(row) for row in (chosen, rejected)] == [True, False]
    assert [row.kind.other_side(row) for row in (chosen, rejected)] == ["rejected", "chosen"]
    assert [row.kind.side_part(row) for row in (chosen, rejected)] == [("chosen",), ("rejected",)]
    assert chosen.kind.wanted_part(chosen) is chosen
    prompt = rejected.kind.wanted_part(rejected)
    assert [message["role"] for message in prompt.messages] == ["user"]
    assert [message["role"] for message in chosen.kind.answer_part(chosen).messages] == ["assistant"]
    unwanted = as_side(rejected, "unwanted")
    assert (unwanted.kind, unwanted.kind.counts_as_wanted(unwanted)) == (RATED, False)
    assert unwanted.kind.other_side(unwanted) == "wanted"
    assert as_side(unwanted, "chosen").kind is PAIR


def test_the_words_of_a_kind():
    for data, words in ((ROW, "the answer of turn 1"), (FIM_RECORD, "the completion")):
        [row] = parse_rows(data)
        assert row.kind.answer_words(1) == words


def test_a_kind_of_prompts_is_known_without_an_answer():
    asked = {"messages": TURNS[:1]}
    assert prompt_kind(asked) is CONVERSATION
    assert prompt_kind(ROW) is None
    gap = {"prompt": "a", "suffix": "b"}
    assert prompt_kind(gap) is FIM
    assert prompt_kind(FIM_RECORD) is None
    assert FIM.answered(gap, [{"content": "c"}]).to_json() == FIM_RECORD
    assert CONVERSATION.answered(asked, TURNS[1:]) == parse_rows(ROW)[0]
    with pytest.raises(RowError, match="2 answers"):
        FIM.answered(gap, TURNS)


FOLDER = Path(pytest_mistral_lora.__file__).parent
ROW_CLASSES = {"FimRow"}
SIDE_NAMES = {"side", "row_side"}


def _questions(node: ast.AST) -> Iterator[str]:
    """Yield what a piece of code asks that a kind should answer: the class of a row, its side, or which kind it has."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
        named = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
        yield from named & ROW_CLASSES
    if isinstance(node, ast.Name | ast.arg | ast.Attribute):
        name = {ast.Name: "id", ast.arg: "arg", ast.Attribute: "attr"}[type(node)]
        yield from {"is_wanted"} & {getattr(node, name)}
    if not isinstance(node, ast.Compare):
        return
    operands = (node.left, *node.comparators)
    if any(isinstance(part, ast.Constant) and part.value is None for part in operands):
        return
    is_identity = any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
    for part in (part for part in operands if isinstance(part, ast.Attribute | ast.Call)):
        text = ast.unparse(part)
        of_row = text.startswith(("record_kind(", "shown_kind(")) or text.endswith("row.kind")
        if (isinstance(part, ast.Attribute) and part.attr in SIDE_NAMES) or (is_identity and of_row):
            yield ast.unparse(node)
        if text.endswith("kind.name"):
            yield ast.unparse(node)


def test_no_room_asks_which_kind_a_row_has():
    found = {}
    for path in FOLDER.rglob("*.py"):
        name = path.relative_to(FOLDER).as_posix()
        if name.startswith("chat/kinds/"):
            continue
        asked = [text for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for text in _questions(node)]
        if asked:
            found[name] = asked
    assert found == {}


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(row, FimRow)",
        "row.side == CHOSEN",
        "side.row_side in (CHOSEN, REJECTED)",
        "row.kind is FIM",
        "record_kind(data) is not CONVERSATION",
        "row.kind.name == 'fim'",
        "self.is_wanted = True",
    ],
)
def test_such_a_question_is_found(code):
    assert [text for node in ast.walk(ast.parse(code)) for text in _questions(node)]
