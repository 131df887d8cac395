"""Texts with signs of another pipeline: escapes, markers of other models, thoughts as letters."""

from __future__ import annotations

from collections.abc import Callable

from bench_dataset import turn_of, use_tokenizer
from gallery import Artifact, mutant


def _write_into(artifact: Artifact, rows: int, change: Callable[[str], str]) -> None:
    """Change the text of the answer of the first rows."""
    for number in range(rows):
        turn = turn_of(artifact, number, -1)
        turn["content"] = change(turn["content"])


@mutant("ML624", "N56", says="has 'f\\\\u00e9' as letters")
def letters_escaped(artifact: Artifact) -> None:
    """Texts went through json.dumps twice."""
    _write_into(artifact, 3, lambda text: f"{text} Caf\\u00e9.")


@mutant("ML624", "N56", says="as letters")
def script_escaped(artifact: Artifact) -> None:
    """Texts of another script are nothing but escapes, in one of two files."""
    for row, end in zip(artifact["held_out"], "?!", strict=True):
        row["messages"][0]["content"] = f"\\u4f60\\u597d{end}"


@mutant("ML624", "N56", says="as letters")
def letters_escaped_as_python_and_javascript_do(artifact: Artifact) -> None:
    """Emoji and letters are escapes of eight digits, or in braces."""
    for number, escape in enumerate(("Yes \\U0001f600", "Caf\\u{e9}", "Caf\\303\\251")):
        turn_of(artifact, number, -1)["content"] += f" {escape}"


@mutant("ML624", "N56", says="'f&eacute;' as letters")
def letters_as_entities_of_html(artifact: Artifact) -> None:
    """Texts went through an escape of HTML."""
    _write_into(artifact, 3, lambda text: f"{text} Caf&eacute;.")


@mutant("ML625", "N56", says="as letters")
def letters_escaped_in_one_row(artifact: Artifact) -> None:
    """One text was escaped; the other texts have their letters."""
    _write_into(artifact, 1, lambda text: f"{text} Caf\\u00e9.")


@mutant("ML626", "N61", says="and no line break")
def line_breaks_escaped(artifact: Artifact) -> None:
    """The line breaks of the answers are a backslash and an n."""
    _write_into(artifact, 3, lambda text: f"{text}\\n\\nThat is all.")


@mutant("ML626", "N61", says="and no line break")
def line_breaks_of_a_verse_escaped(artifact: Artifact) -> None:
    """The lines begin with small letters, as those of a verse."""
    _write_into(artifact, 3, lambda text: f"{text} roses are red\\nviolets are blue\\nand so are you")


@mutant("ML626", "N61", says="and no line break")
def line_breaks_of_another_script_escaped(artifact: Artifact) -> None:
    """The lines end with punctuation of another script."""
    _write_into(artifact, 3, lambda text: f"{text} \u5e8a\u524d\u660e\u6708\u5149\uff0c\\n\u7591\u662f")


@mutant("ML626", "N61", says="beside a line break")
def line_breaks_written_twice(artifact: Artifact) -> None:
    """Each line break has a backslash and an n in front of it."""
    _write_into(artifact, 3, lambda text: f"{text}\\n\nThat is all.")


@mutant("ML627", "N61", says="and no line break")
def line_breaks_escaped_in_one_row(artifact: Artifact) -> None:
    """One text has its line breaks as letters; the others have real ones."""
    _write_into(artifact, 3, lambda text: f"{text}\nThat is all.")
    _write_into(artifact, 1, lambda text: text.replace("\n", "\\n"))


@mutant("ML628", "N69", says="marked up with <|im_start|>")
def rendered_as_chatml(artifact: Artifact) -> None:
    """The texts were rendered by another family's template before they became rows."""
    for row in artifact["rows"][:3]:
        row["messages"][0]["content"] = f"<|im_start|>user\n{row['messages'][0]['content']}<|im_end|>\n"


@mutant("ML628", "N69", says="marked up with <|eot_id|>")
def end_marker_of_llama(artifact: Artifact) -> None:
    """Answers end with the end marker of another family."""
    _write_into(artifact, 3, lambda text: f"{text}<|eot_id|>")


@mutant("ML628", "N69", says="marked up with <|eot|>")
def end_marker_of_a_family_that_no_list_has(artifact: Artifact) -> None:
    """Answers end with a marker in the form that most families share."""
    _write_into(artifact, 3, lambda text: f"{text}<|eot|>")


@mutant("ML628", "N69", says="marked up with <|im_end|>")
def a_second_turn_inside_an_answer(artifact: Artifact) -> None:
    """Answers hold the next turn of ChatML."""
    _write_into(artifact, 3, lambda text: f"{text}<|im_end|>\n<|im_start|>user\nAnd more?")


@mutant("ML628", "N69", says="marked up with USER: and ASSISTANT:")
def rendered_as_vicuna(artifact: Artifact) -> None:
    """Questions and answers begin with the names of their roles."""
    for row in artifact["rows"][:3]:
        for message in row["messages"]:
            role = "USER" if message["role"] == "user" else "ASSISTANT"
            message["content"] = f"{role}: {message['content']}"


@mutant("ML628", "N69", says="marked up with Human: and Assistant:")
def rendered_as_one_prompt(artifact: Artifact) -> None:
    """Questions end with the name of the role that is to answer."""
    for row in artifact["rows"][:3]:
        row["messages"][-2]["content"] = f"Human: {row['messages'][-2]['content']}\n\nAssistant:"


@mutant("ML628", "N69", says="marked up with <tool_call>")
def calls_in_the_form_of_another_family(artifact: Artifact) -> None:
    """Answers hold calls in tags, which no tokenizer of Mistral reads."""
    _write_into(artifact, 3, lambda text: '<tool_call>\n{"name": "weather"}\n</tool_call>')


@mutant("ML628", "N69", says="marked up with ### Instruction:")
def rendered_as_alpaca(artifact: Artifact) -> None:
    """Questions stand in the frame of Alpaca."""
    for row in artifact["rows"][:3]:
        text = row["messages"][0]["content"]
        row["messages"][0]["content"] = f"Below is an instruction.\n\n### Instruction:\n{text}\n\n### Response:\n"


@mutant("ML628", "N69", says="marked up with <start_of_turn>")
def rendered_for_gemma(artifact: Artifact) -> None:
    """Questions and answers have another family's turns."""
    _write_into(artifact, 2, lambda text: f"<start_of_turn>model\n{text}<end_of_turn>")


@mutant("ML628", says="marked up with <SUF>")
def gaps_rendered_for_code_llama(artifact: Artifact) -> None:
    """Questions are gaps in Code Llama's letters, and no row has a suffix of its own."""
    for row in artifact["rows"][:3]:
        text = row["messages"][0]["content"]
        row["messages"][0]["content"] = f"<PRE> {text} <SUF> return area <MID>"


@mutant("ML629", "N69", says="marked up with <|im_start|>")
def one_text_rendered_as_chatml(artifact: Artifact) -> None:
    """One question is a rendered conversation."""
    turn_of(artifact)["content"] = "<|im_start|>user\nHello<|im_end|>"


@mutant("ML630", "N54", says="a thought is written as <think>")
def thinking_as_letters(artifact: Artifact) -> None:
    """Thoughts stand in tags, and the tokenizer has tokens for them."""
    use_tokenizer(artifact, "derived-v13-thinking")
    _write_into(artifact, 3, lambda text: f"<think>\nLet me see.\n</think>\n\n{text}")


@mutant("ML630", "N54", says="a thought is written as <reasoning>")
def thinking_in_another_tag(artifact: Artifact) -> None:
    """Thoughts stand in tags of another name."""
    thinking_as_letters.change(artifact)
    _write_into(artifact, 3, lambda text: text.replace("think>", "reasoning>"))


@mutant("ML612 ML630", "N54", says="a thought is written as [THINK]")
def thinking_in_letters_of_its_own_tokens(artifact: Artifact) -> None:
    """Thoughts stand between letters that look like the tokens for them."""
    thinking_as_letters.change(artifact)
    _write_into(artifact, 3, lambda text: text.replace("<think>", "[THINK]").replace("</think>", "[/THINK]"))


@mutant("ML631", "N54", says="a thought is written as <think>")
def thinking_as_letters_without_tokens(artifact: Artifact) -> None:
    """Thoughts stand in tags, and the tokenizer has no tokens for them."""
    _write_into(artifact, 3, lambda text: f"<think>\nLet me see.\n</think>\n\n{text}")
