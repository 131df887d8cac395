"""Rows and files of rows that cannot be trained on as they are."""

from __future__ import annotations

import json
import os

from bench_dataset import ROWS, said, set_training, shared_tokenizer, turn_of
from gallery import Artifact, mutant


@mutant("ML601", "I47", says="messages[2].role: the conversation ends with role 'user'")
def ends_with_the_user(artifact: Artifact) -> None:
    """The last message is the user's: a chat for serving, not for training."""
    artifact["rows"][0]["messages"].append({"role": "user", "content": "Thanks"})


@mutant("ML601", "I14", says="tool_calls[0].id: tool-call id 'call_1'")
def openai_call_id(artifact: Artifact) -> None:
    """A tool call has an id in OpenAI's form, which tokenizers from v3 on refuse."""
    turn_of(artifact, 4, 1)["tool_calls"][0]["id"] = turn_of(artifact, 4, 2)["tool_call_id"] = "call_1"


@mutant("ML601", "I48", says="role 'tool' straight after role 'user'")
def tool_result_after_the_user(artifact: Artifact) -> None:
    """A tool result that no call asked for."""
    artifact["rows"][4]["messages"].pop(1)


@mutant("ML601", says="weights")
def misspelt_weight(artifact: Artifact) -> None:
    """A key of a message is misspelt, so that the message would be trained on."""
    turn_of(artifact, 0, 1)["weights"] = 0


@mutant("ML601", says="'bot'")
def unknown_role(artifact: Artifact) -> None:
    """A role that a chat row does not have."""
    turn_of(artifact, 0, 1)["role"] = "bot"


@mutant("ML601", says="not valid UTF-8")
def line_in_another_encoding(artifact: Artifact) -> None:
    """A line in Latin-1."""
    artifact["rows"].insert(1, '{"messages": [{"role": "user", "content": "Où?"}]}'.encode("latin-1"))


@mutant("ML601", says="rows.jsonl:6: not valid JSON")
def half_a_line(artifact: Artifact) -> None:
    """The last line is cut off."""
    artifact["rows"].append(json.dumps(ROWS[0])[:40])


@mutant("ML602", says="the file has no rows")
def empty_file(artifact: Artifact) -> None:
    """The training file is empty."""
    artifact["rows"].clear()


@mutant("ML602", says="the file has no rows")
def blank_lines(artifact: Artifact) -> None:
    """The eval file has blank lines only."""
    artifact["held_out"][:] = ["", "  "]


@mutant("ML602", says="is a folder")
def folder_in_place_of_a_file(artifact: Artifact) -> None:
    """The training file is a folder."""
    (artifact["folder"] / "rows.jsonl").mkdir()


@mutant("ML602", says="No such file")
def missing_file(artifact: Artifact) -> None:
    """The eval file is a link to nothing."""
    (artifact["folder"] / "held-out.jsonl").symlink_to("nowhere")


@mutant("ML602", says="Too many levels of symbolic links")
def link_to_itself(artifact: Artifact) -> None:
    """The eval file is a link to itself."""
    (artifact["folder"] / "held-out.jsonl").symlink_to("held-out.jsonl")


@mutant("ML602", says="not a regular file")
def pipe(artifact: Artifact) -> None:
    """The training file is a pipe: it cannot be checked and then trained on."""
    os.mkfifo(artifact["folder"] / "rows.jsonl")


@mutant("ML602", says="not a regular file")
def endless_device(artifact: Artifact) -> None:
    """The training file is a link to a device without an end."""
    (artifact["folder"] / "rows.jsonl").symlink_to("/dev/zero")


@mutant("ML605", "I06", says="every assistant message has weight 0")
def nothing_supervised(artifact: Artifact) -> None:
    """Every assistant message of a row has weight 0."""
    turn_of(artifact, 2, 1)["weight"] = turn_of(artifact, 2, 3)["weight"] = 0


@mutant("ML607", "I06", "I34", "I53", says="nothing that is trained on would be left")
def prompt_longer_than_max_length(artifact: Artifact) -> None:
    """A prompt is longer than max_length, so that a cut would leave no label."""
    turn_of(artifact)["content"] = "word " * 400


@mutant("ML607", "I34", says="3 supervised tokens, 1 closing </s>")
def answer_ends_beyond_max_length(artifact: Artifact) -> None:
    """A cut would take the end of an answer and its EOS."""
    artifact["rows"][:] = [said("Count to nine.", "1 2 3 4 5 6 7 8 9")]
    oracle = shared_tokenizer().oracle
    artifact["recipe"]["training"]["max_length"] = len(oracle.encode(artifact["rows"][0]).input_ids) - 3


@mutant("ML607", "I34", says="1 system prompt")
def system_prompt_beyond_max_length(artifact: Artifact) -> None:
    """Version 3 puts the system prompt beside the last user turn, and a cut removes it."""
    artifact["rows"][:] = [said("word " * 300, "Yes.", "And?", "No.", system="You are terse.")]


@mutant("ML620", "I06", says="1 closing </s>")
def answer_is_cut_by_choice(artifact: Artifact) -> None:
    """The recipe cuts rows, and the end of an answer is lost."""
    answer_ends_beyond_max_length.change(artifact)
    artifact["recipe"]["training"]["truncation"] = "right"


@mutant("ML620", "I06", says="dropped: ")
def rows_are_dropped_by_choice(artifact: Artifact) -> None:
    """The recipe drops rows that are too long."""
    artifact["recipe"]["training"] |= {"max_length": 20, "truncation": "drop"}


@mutant("ML620", says="kept, though no token is trained on")
def row_without_a_label_is_kept_by_choice(artifact: Artifact) -> None:
    """The recipe keeps a row in which no token is trained on."""
    artifact["recipe"]["training"]["unsupervised"] = "warn"
    turn_of(artifact, message=1)["weight"] = 0


@mutant("ML614", "I48", says="messages[0] to [1] are joined into one user turn")
def two_user_messages(artifact: Artifact) -> None:
    """Two user messages follow one another."""
    artifact["rows"][0]["messages"].insert(1, {"role": "user", "content": "In one word."})


@mutant("ML677", "I48", says="messages[1].role: a system prompt straight after a user message")
def system_prompt_behind_the_question(artifact: Artifact) -> None:
    """The system prompt stands behind the first question."""
    artifact["rows"][0]["messages"].insert(1, {"role": "system", "content": "In one word."})


@mutant("ML678", "I48", says="messages[0]: the conversation begins with an answer")
def greeting_first(artifact: Artifact) -> None:
    """The assistant greets before the first question."""
    artifact["rows"][0]["messages"].insert(0, {"role": "assistant", "content": "How can I help you?"})


@mutant("ML614", says="messages[1] to [2] are joined into one assistant turn")
def two_answers_in_a_row(artifact: Artifact) -> None:
    """Two assistant messages follow one another."""
    artifact["rows"][0]["messages"].append({"role": "assistant", "content": "It lies on the Seine."})


@mutant("ML616", says="is empty: nothing but </s>")
def answer_of_spaces(artifact: Artifact) -> None:
    """An answer is nothing but spaces."""
    turn_of(artifact, 2, 3)["content"] = "  "


@mutant("ML617", says="the row has U+0000, U+0092, U+FFFD")
def text_of_a_broken_conversion(artifact: Artifact) -> None:
    """Texts that were read in the wrong encoding, and written with what was lost."""
    turn_of(artifact)["content"] = "What\x92s the capital?\x00"
    turn_of(artifact, 0, 1)["content"] = "It\ufffds Paris."


@mutant("ML615 ML620", says="no row is left to train on: 5 are dropped")
def every_row_is_dropped(artifact: Artifact) -> None:
    """The recipe drops every row to train on."""
    artifact["held_out"][:] = [said("A", "B")]
    set_training(artifact, max_length=6, truncation="drop")


@mutant("ML615 ML620", says="no held-out row is left: 1 are dropped")
def every_held_out_row_is_dropped(artifact: Artifact) -> None:
    """The recipe drops every held-out row."""
    artifact["held_out"][:] = [said("word " * 300, "Yes.")]
    set_training(artifact, truncation="drop")


@mutant("ML634", says="`input_ids` beside its messages")
def labels_that_nobody_reads(artifact: Artifact) -> None:
    """The rows of a prepared dataset are judged as rows: its labels train on every token."""
    artifact["alone"] = True
    for row in artifact["rows"]:
        ids = list(shared_tokenizer().oracle.encode(row).input_ids)
        row.update(input_ids=ids, labels=ids)


@mutant("ML634", says="`labels` beside its messages")
def labels_in_one_late_row(artifact: Artifact) -> None:
    """Only the last row of a file has labels, and no ids."""
    artifact["alone"] = True
    artifact["rows"] = [said(f"Name {number}.", f"It is {number}.") for number in range(32)]
    artifact["rows"].append({**said("Name all.", "No."), "labels": [-100, 5, 2]})


@mutant("ML635", says="`text` beside its messages")
def text_beside_the_messages(artifact: Artifact) -> None:
    """A formatting function wrote a column of texts, which the trainer is told to read."""
    artifact["alone"] = True
    artifact["rows"][0]["text"] = "<s>[INST] What is the capital of France? [/INST] Paris</s>"


@mutant("ML635", says="`prompt` and `completion` beside its messages")
def pair_beside_the_messages(artifact: Artifact) -> None:
    """A converter left the pair of prompt and completion beside the messages that it made of it."""
    artifact["alone"] = True
    artifact["rows"][0] |= {"prompt": "What is the capital of France?", "completion": "Paris."}
