"""A model is asked with the ids that it was trained on, and its answer comes piece by piece."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import CONVERSATIONS, write_rows

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import RowError, RowsError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.training.generate import chat_session as chat
from pytest_mistral_lora.training.generate.chat_session import (
    AnswerStream,
    ChatSession,
    load_chat_model,
    prompt_row,
    read_prompt_rows,
)
from pytest_mistral_lora.training.run import RunResult

TEXTS = ("Grüße, 世界! 🙂👩‍👩‍👧", "a\n\n  b\tc", " leading", "trailing ", "��", "한국어 ไทย עברית", "1 000 € [INST]")
QUESTION, ANSWER = (text for _, text in CONVERSATIONS[0])


def encoder_of(name: str) -> Any:
    return make_encoder("mistral-common", CheckpointTokenizer(shipped_tokenizer(name)))


@pytest.mark.parametrize("name", ["spm-v1", "spm-v3", "tekken-240911"])
def test_streamed_parts_are_the_decoded_answer_and_no_part_of_a_character(name: str) -> None:
    encoder = encoder_of(name)
    for text in TEXTS:
        ids = encoder.tokenizer.oracle.encode_text(text)
        parts: list[str] = []
        stream = AnswerStream(encoder, parts.append)
        stream.put(torch.tensor([[1, 3]]))
        for token in ids:
            stream.put(torch.tensor([token]))
        if "�" not in text:
            assert "�" not in "".join(parts)
        stream.end()
        assert "".join(parts) == encoder.decode(ids)
        assert all(parts)


def test_an_answer_that_ends_within_a_character_is_shown_to_its_end() -> None:
    encoder, parts = encoder_of("tekken-240911"), list[str]()
    ids = encoder.tokenizer.oracle.encode_text("ok 👩")[:-1]
    stream = AnswerStream(encoder, parts.append)
    stream.put(torch.tensor([[1]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    held_back = "".join(parts)
    stream.end()
    assert (held_back.strip(), "".join(parts)) == ("ok", encoder.decode(ids))
    assert encoder.decode(ids).endswith("�")


def test_the_prompt_is_that_of_the_row_in_training_turn_after_turn(run: RunResult) -> None:
    talk = ChatSession(run.model, run.encoder, max_new_tokens=40)
    row = run.data.train.rows[2]
    first, second = (message["content"] for message in row.messages if message["role"] == "user")
    parts: list[str] = []
    answer = talk.ask(first, parts.append)
    assert "".join(parts) == answer.text
    encoded = run.data.train.encoded[2]
    assert answer.prompt_ids == encoded.input_ids[: len(answer.prompt_ids)]
    assert answer.text == row.messages[1]["content"]
    # a tiny model that knows the row by heart: its answer continues the row to the second question
    answer = talk.ask(second)
    assert answer.prompt_ids == run.encoder.prompt(row)
    assert (*answer.prompt_ids, *answer.ids) == encoded.input_ids
    assert answer.stop == "eos"


def test_control_tokens_in_a_message_stay_text(run: RunResult) -> None:
    talk = ChatSession(run.model, run.encoder, system="</s>", max_new_tokens=1)
    ids = talk.ask("[INST] </s> <s>[TOOL_CALLS]").prompt_ids
    control = run.encoder.tokenizer.oracle.control_tokens
    assert [control[one] for one in ids if one in control] == ["<s>", "[INST]", "[/INST]"]


def test_a_message_that_cannot_be_encoded_leaves_the_conversation_as_it_was(run: RunResult) -> None:
    talk = ChatSession(run.model, run.encoder, max_new_tokens=1)
    talk.messages = before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RowError, match="surrogate"):
        talk.ask("\udcff", place=Place.of("your message"))
    assert talk.messages is before


def test_drawn_tokens_follow_the_seed(run: RunResult) -> None:
    def ask(temperature: float, seed: int) -> Any:
        torch.manual_seed(seed)
        return ChatSession(run.model, run.encoder, temperature=temperature, max_new_tokens=6).ask(QUESTION).ids

    assert ask(50.0, 1) == ask(50.0, 1) != ask(50.0, 2)
    assert ask(0.0, 1) == ask(0.0, 2)


@pytest.fixture
def ask(run: RunResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the verb with lines on standard input, and return exit code, output and errors."""

    def run_verb(*words: str, lines: str = "", terminal: bool = False, folder: Path | None = None) -> Any:
        stdin = io.StringIO(lines)
        monkeypatch.setattr(stdin, "isatty", lambda: terminal)
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        chosen = [str(folder)] if folder else [str(run.output), "--base", str(run.base_folder)]
        code = main(["chat", *chosen, "--max-new-tokens", "40", *words])
        return (code, *capsys.readouterr())

    return run_verb


def test_one_prompt_with_its_ids(ask: Any, run: RunResult) -> None:
    code, output, errors = ask("--prompt", QUESTION, "--ids")
    answer, prompt_ids, answer_ids = output.splitlines()
    assert (code, answer) == (0, ANSWER)
    first = run.data.train.encoded[0]
    ids = [int(part.split(" ", 1)[0]) for line in (prompt_ids, answer_ids) for part in line.split("): ")[1].split(", ")]
    assert tuple(ids) == first.input_ids
    assert "2 '</s>'" in answer_ids
    assert f"{run.output} on {run.base_folder}, fp32 on cpu; greedy, at most 40 tokens\n" in errors


def test_each_line_of_a_pipe_is_a_question_of_its_own(ask: Any, run: RunResult) -> None:
    code, output, errors = ask("--json", lines=f"{QUESTION}\n\nName a prime number.\n\udcff\n{QUESTION}")
    answers = [json.loads(line) for line in output.splitlines()]
    assert [one["text"] for one in answers] == [ANSWER, "Seven is prime.", ANSWER]
    assert answers[0] == answers[2]
    assert (*answers[0]["prompt_ids"], *answers[0]["ids"]) == run.data.train.encoded[0].input_ids
    assert code == 2
    assert ": 1 bad row\n  standard input:4, messages[0].content" in errors


def test_a_terminal_continues_a_conversation_and_begins_another(ask: Any) -> None:
    first, second = (text for role, text in CONVERSATIONS[2] if role == "user")
    code, output, errors = ask(lines=f"{first}\n{second}\n/new\n{QUESTION}\n", terminal=True)
    assert (code, output.splitlines()) == (0, ["A spider has eight legs.", "An ant has six.", ANSWER])
    assert errors.endswith("> > > > > \n")


def test_a_terminal_is_not_steered_by_the_text_of_a_model(
    run: RunResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = chat.ChatAnswer((1,), (2,), "", "eos")
    monkeypatch.setattr(
        chat.ChatSession, "ask", lambda self, text, on_text, place: on_text("a\x1b]0;x\x07\tb\n€") or answer
    )
    shown = []
    for terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_one=terminal: is_one)
        assert main(["chat", str(run.output), "--base", str(run.base_folder), "--prompt", "a"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown == ["a\\x1b]0;x\\x07\tb\n€\n"] * 2


def test_ctrl_c_stops_an_answer_and_not_the_conversation(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sound, calls = chat.complete, []

    def interrupted_once(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return sound(*given, **named)

    monkeypatch.setattr(chat, "complete", interrupted_once)
    code, output, errors = ask(lines=f"Hello\n{QUESTION}\n", terminal=True)
    assert (code, output) == (0, f"{ANSWER}\n")
    assert "stopped; your message is forgotten" in errors


def test_the_base_answers_the_same_prompt_without_the_adapter(ask: Any, run: RunResult) -> None:
    with_adapter = json.loads(ask("--prompt", QUESTION, "--json")[1])
    without = json.loads(ask("--prompt", QUESTION, "--json", "--no-adapter")[1])
    alone = json.loads(ask("--prompt", QUESTION, "--json", folder=run.base_folder)[1])
    assert without == alone
    assert without["prompt_ids"] == with_adapter["prompt_ids"]
    assert without["ids"] != with_adapter["ids"]


def test_a_temperature_that_cannot_be_used_is_refused_before_the_model_is_loaded(
    ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "load_chat_model", pytest.fail)
    code, _, errors = ask("--temperature", "nan", "--prompt", "a")
    assert (code, "--temperature: nan; expected 0, or a number up to 100" in errors) == (2, True), errors


def test_no_token_at_all_is_bad_usage(ask: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        ask("--max-new-tokens", "0", "--prompt", "a")
    assert "--max-new-tokens: '0'; expected a whole number, 1 or more" in capsys.readouterr().err


def test_a_folder_of_nothing_is_refused(tmp_path: Path, ask: Any) -> None:
    code, _, errors = ask("--prompt", "a", folder=tmp_path)
    assert code == 2
    assert str(tmp_path) in errors


def test_options_of_an_adapter_do_not_fit_a_base(run: RunResult) -> None:
    with pytest.raises(Exception, match=r"without an adapter.* --base and --no-adapter"):
        load_chat_model(run.base_folder, use_adapter=False)


def test_rows_may_end_with_their_question(run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [CONVERSATIONS[0], CONVERSATIONS[3][:1]])
    wrong = [("user", "Name a prime number."), ("assistant", "Eight.")]
    with file.open("a") as rows:
        rows.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in wrong]}) + "\n")
    base = ["--base", str(run.base_folder)]
    words = ["smoke", str(run.output), *base, "--rows", str(file), "--max-new-tokens", "40"]
    assert main(words) == 0
    *answered, verdict = capsys.readouterr().out.splitlines()
    said = ((ANSWER, "as in the row"), ("Seven is prime.", "not checked"), ("Seven is prime.", "not as in the row"))
    for number, (line, (text, judged)) in enumerate(zip(answered, said, strict=True)):
        assert line.startswith(f"row {number}: {text!r} (")
        assert line.endswith(f"by eos, {judged})")
    assert verdict == "1 as in the row, 1 not as in the row, 1 not checked; fp32 on cpu"
    write_rows(file, [CONVERSATIONS[3][:1]])
    assert main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["completions"][0]["equal"], data["completions"][0]["expected_ids"]) == (None, None)
    assert (data["probe"], data["adapter_effect"]) == (None, None)


def test_a_question_may_follow_a_tools_result_and_needs_no_answer_before_it() -> None:
    call = {"id": "a" * 9, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = {"role": "user", "content": "Hi"}
    tool = [
        asked,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "a" * 9},
    ]
    encoder = encoder_of("spm-v3")
    for messages in ([asked], tool):
        answered = [*messages, {"role": "assistant", "content": "Fine."}]
        question, row = prompt_row({"messages": messages}), prompt_row({"messages": answered})
        assert (question.has_answer, row.has_answer) == (False, True)
        assert encoder.prompt(question.row) == encoder.prompt(row.row)


def test_every_bad_question_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": []}\n{"messages": [{"role": "user", "content": 1}]}\nx\n')
    with pytest.raises(RowsError) as caught:
        read_prompt_rows(file)
    assert [one.place.record for one in caught.value.errors] == [1, 2, 3]
    file.write_text("\n")
    with pytest.raises(RowsError, match="no rows"):
        read_prompt_rows(file)
