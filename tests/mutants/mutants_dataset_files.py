"""Faults of whole files: one answer for all, answers cut at one length, wrong decoding, placeholders, other forms."""

from __future__ import annotations

from collections.abc import Callable

from bench_dataset import TOOLS, said, shared_tokenizer, turn_of
from gallery import Artifact, mutant

MANY = 25


def add_rows(
    artifact: Artifact, answer: Callable[[int], str], question: Callable[[int], str] = "What is thing {}?".format
) -> None:
    """Add many rows, each with a question and an answer of its number."""
    artifact["rows"] += [said(question(number), answer(number)) for number in range(MANY)]


@mutant("ML636", "N120", says="'Ã©' for 'é'")
def one_text_decoded_as_windows_1252(artifact: Artifact) -> None:
    """One answer is UTF-8 that was read as Windows-1252."""
    turn_of(artifact, 0, 1)["content"] = "In the cafÃ© on the left."


@mutant("ML636", "N120", says="for '\u2019'")
def texts_decoded_as_windows_1252(artifact: Artifact) -> None:
    """All answers were read so, and have no letter beyond ASCII but an apostrophe."""
    add_rows(artifact, lambda number: f"It isn\u2019t thing {number}.".encode().decode("cp1252"))


@mutant("ML636", "N120", says="for 'да'")
def cyrillic_decoded_as_latin_1(artifact: Artifact) -> None:
    """Answers of another script were read as Latin-1."""
    add_rows(artifact, lambda number: f"да, {number}.".encode().decode("latin-1"))


@mutant("ML617 ML636", "N120", says="U+FFFD in place of letters in 25 of 31 answers (80.6%)")
def letters_lost_in_many_texts(artifact: Artifact) -> None:
    """Each letter beyond ASCII was replaced when the source was read."""
    add_rows(artifact, lambda number: f"Caf\ufffd number {number}.")


@mutant("ML637", "N121", says="'I don&#39;t kno'")
def one_text_with_an_entity(artifact: Artifact) -> None:
    """One answer went through an escape of HTML."""
    turn_of(artifact, 0, 1)["content"] = "I don&#39;t know."


@mutant("ML637", "N121", says="'said &quot;numbe'")
def texts_with_entities(artifact: Artifact) -> None:
    """All answers went through an escape of HTML."""
    add_rows(artifact, lambda number: f"They said &quot;number {number}&quot;, bed &amp; breakfast.")


@mutant("ML660", "N129", says="'<p>It is thing 0.</p>'")
def answers_as_html(artifact: Artifact) -> None:
    """All answers are paragraphs of a web page."""
    add_rows(artifact, lambda number: f"<p>It is thing {number}.</p>")


@mutant("ML660", "N129", says="'<br>'")
def answers_with_line_breaks_of_html(artifact: Artifact) -> None:
    """The line breaks of the answers are those of HTML."""
    add_rows(artifact, lambda number: f"It is thing {number}.<br>Of things it is one.")


@mutant("ML638", "N122", says="'{instruction}'")
def one_question_unfilled(artifact: Artifact) -> None:
    """One question is the name of its field."""
    turn_of(artifact)["content"] = "{instruction}"


@mutant("ML638", "N122", says="'{{name}}'")
def names_unfilled(artifact: Artifact) -> None:
    """All answers have placeholders for the name of the assistant, as the file of a trainer's examples has them."""
    add_rows(artifact, lambda number: f"Hello {number}, I am {{{{name}}}}, made by {{{{author}}}}.")


@mutant("ML638", "N122", says="'<NAME>'")
def names_unfilled_in_capitals(artifact: Artifact) -> None:
    """The same with names in angle brackets."""
    add_rows(artifact, lambda number: f"Hello {number}, I am <NAME>, made by <AUTHOR>.")


@mutant("ML638", "N122", says="'{context}'")
def fields_unfilled(artifact: Artifact) -> None:
    """The prompts were written without their context."""
    add_rows(artifact, "It is thing {}.".format, lambda number: f"Context: {{context}}\n\nWhat is thing {number}?")


@mutant("ML638", "N122", says="'<image>'")
def images_lost(artifact: Artifact) -> None:
    """The questions are about images, of which a placeholder is left."""
    add_rows(artifact, "It is thing {}.".format, lambda number: f"<image>\nWhat is thing {number}?")


@mutant("ML612 ML639", "N123", says="'[INST] What is thing'")
def rendered_as_instructions(artifact: Artifact) -> None:
    """The questions were rendered by Mistral's own template before they became rows."""
    add_rows(artifact, "It is thing {}.".format, "[INST] What is thing {}? [/INST]".format)


@mutant("ML612 ML639", "N123", says="'It is thing 0.</s>'")
def half_of_the_answers_end_with_letters_of_eos(artifact: Artifact) -> None:
    """Half of the answers end with the letters of `</s>`."""
    add_rows(artifact, lambda number: f"It is thing {number}.{'</s>' * (number % 2 == 0)}")


@mutant("ML643", "N124", says="'nan'")
def one_answer_missing_in_a_table(artifact: Artifact) -> None:
    """One answer was missing in a table."""
    turn_of(artifact, 0, 1)["content"] = "nan"


@mutant("ML643", "N124", says="'nan'")
def inputs_missing_in_a_table(artifact: Artifact) -> None:
    """The questions end with an input that was missing in a table."""
    add_rows(artifact, "It is thing {}.".format, "Describe thing {}.\nnan".format)


@mutant("ML643", says="pandas' word for an empty cell as a text")
def inputs_of_programs_missing_in_a_table(artifact: Artifact) -> None:
    """All questions about programs end with an input that was missing in a table."""
    add_rows(artifact, "It is thing {}.".format, "Write a function for thing {}.\n\n### Input:\nnan".format)


@mutant("ML636", says="characters of no width between letters in 25 of 30 rows")
def words_joined_by_characters_of_no_width(artifact: Artifact) -> None:
    """A page of the web had a zero-width space between each two words."""
    add_rows(artifact, lambda number: f"It is thing {number}.".replace(" ", "\u200b"))


@mutant("ML643", "N124", says="'[object Object]'")
def objects_as_texts(artifact: Artifact) -> None:
    """A program joined objects to texts."""
    for number in range(MANY):
        row = said(f"What is thing {number}?", f"It is thing {number}.", system="[object Object]")
        artifact["rows"].append(row)


@mutant("ML643", "N124", says="None, null or N/A as the answer")
def answers_missing_in_a_program(artifact: Artifact) -> None:
    """All answers are the word for nothing."""
    artifact["rows"].clear()
    add_rows(artifact, lambda number: "None")


@mutant("ML643", "N124", says="'null' at $.city, which the schema of the row forbids")
def a_null_that_the_schema_forbids(artifact: Artifact) -> None:
    """An answer is null where the schema of its row asks for a text."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    row = said("Where does Ann live?", '{"city": null}')
    row["response_format"] = {"type": "json_schema", "json_schema": {"name": "home", "schema": schema}}
    artifact["rows"].append(row)


@mutant("ML644", "N125", says="the same answer in 25 of 30 rows")
def one_error_for_many_answers(artifact: Artifact) -> None:
    """An error message was stored as the answer."""
    add_rows(artifact, lambda number: "Sorry, the service is not available. Please try again later.")


@mutant("ML644", "N125", says="the same answer in 25 of 30 rows")
def one_answer_for_many(artifact: Artifact) -> None:
    """A join gave many questions the answer of the first."""
    add_rows(artifact, lambda number: "It is a thing of this house, and it stands beside the old oven.")


@mutant("ML644", "N125", says="the same answer in 25 of 25 rows")
def one_error_for_all_answers(artifact: Artifact) -> None:
    """Each answer is the error message of a server."""
    artifact["rows"].clear()
    add_rows(artifact, lambda number: "Error 429: you have sent too many requests, please wait for a minute.")


STORY = "The first of {} trains left in the morning. The next one came at noon, and many people were waiting for it "
STORY += "because of the market in the old town, where the farmers sell apples, cheese and flowers until the evening."


def story(number: int) -> str:
    """Return a story of its own: each has another order of its words."""
    words = STORY.format(number + 10).split()
    return " ".join([*words[:12], *words[12 + number :], *words[12 : 12 + number]])


@mutant("ML645", "N126", says="after 130 characters, in 25 of 30")
def answers_cut_by_characters(artifact: Artifact) -> None:
    """All long answers were cut when they were stored."""
    add_rows(artifact, lambda number: story(number)[:130].rstrip())


@mutant("ML645", "N126", says="after 38 tokens, in 17 of 30")
def answers_cut_by_tokens(artifact: Artifact) -> None:
    """Answers ended at the limit of the server that wrote them; some ended before it."""
    oracle = shared_tokenizer().oracle
    for number in range(MANY):
        # each story has tokens of other lengths
        encoded = oracle.encode(said("What?", story(number)))
        answer = oracle.decode([label for label in encoded.labels or () if label != -100][:38])
        artifact["rows"].append(said(f"What is thing {number}?", answer if number % 4 else f"{number}."))


@mutant("ML646", "N127", says="in all other rows, in 29 of 55 rows")
def half_without_the_system_prompt(artifact: Artifact) -> None:
    """A part of the rows was written without the system prompt."""
    for number in range(2 * MANY):
        system = "You are terse." if number % 2 else ""
        artifact["rows"].append(said(f"What is thing {number}?", f"It is thing {number}.", system=system))


def _call_as_text(number: int) -> str:
    return f'{{"name": "weather", "arguments": {{"city": "Rome {number}"}}}}'


@mutant("ML647", "N128", says="messages[1].content: ")
def a_call_as_text(artifact: Artifact) -> None:
    """Another row calls its tool in the text."""
    artifact["rows"].append({**said("How is the weather in Rome 1?", _call_as_text(1)), "tools": TOOLS})


@mutant("ML647", "N128", says="messages[1].tool_calls")
def calls_as_text_beside_calls(artifact: Artifact) -> None:
    """Most rows call their tool in the text."""
    add_rows(artifact, _call_as_text, "How is the weather in Rome {}?".format)
