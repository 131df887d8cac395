"""The example of each rule of `dataset`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

import copy
from collections.abc import Callable

import mutants_dataset_answers as answers
import mutants_dataset_backends as backends
import mutants_dataset_calls as calls
import mutants_dataset_files as whole_files
import mutants_dataset_fim as gaps
import mutants_dataset_pairs as pairs
import mutants_dataset_recipe as recipe
import mutants_dataset_repeats as repeats
import mutants_dataset_rows as bad_rows
import mutants_dataset_signs as signs
import mutants_dataset_texts as texts
from bench_dataset import gap, said, set_training, use_tokenizer
from gallery import Artifact, Example


class ML601(Example):
    mutant = bad_rows.ends_with_the_user

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"] += [
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Bye"},
        ]


class ML602(Example):
    mutant = bad_rows.empty_file

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][:] = artifact["rows"][:1]


class ML603(Example):
    mutant = backends.template_without_eos

    def sound(self, artifact: Artifact) -> None:
        artifact["template"]["source"] = "{# ours #}" + artifact["template"]["source"]


class ML604(Example):
    mutant = backends.trained_with_trailing_spaces

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["backend"] = "chat-template"
        artifact["rows"][0]["messages"][1]["content"] = "Paris."


class ML605(Example):
    mutant = bad_rows.nothing_supervised

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][2]["messages"][1]["weight"] = 0


class ML606(Example):
    mutant = backends.template_marks_the_whole_row

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["backend"] = "chat-template"


class ML607(Example):
    mutant = bad_rows.answer_ends_beyond_max_length

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["training"]["max_length"] = 1024


class ML608(Example):
    mutant = repeats.row_twice

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"].append(
            {
                **artifact["rows"][0],
                "messages": [{"role": "user", "content": "More?"}, artifact["rows"][0]["messages"][1]],
            }
        )


class ML609(Example):
    mutant = repeats.two_answers

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"].append(said("Name another prime number.", "Eleven."))


class ML610(Example):
    mutant = repeats.held_out_row_is_trained_on

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"].append(artifact["held_out"].pop(0))


class ML611(Example):
    mutant = repeats.held_out_prompt_is_trained_on

    def sound(self, artifact: Artifact) -> None:
        artifact["held_out"].append(said("How many legs has a crab?", "It has ten legs."))


class ML612(Example):
    mutant = backends.literal_in_a_text

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][0]["content"] = "What does [/INST] mean?"


class ML613(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["recipe"]["backend"] = "chat-template"
        artifact["rows"][0]["messages"][0]["content"] = "a </s>[INST] b"

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["backend"] = "chat-template"
        artifact["rows"][0]["messages"][0]["content"] = "a / s INST b"


class ML614(Example):
    mutant = bad_rows.two_user_messages

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][0]["content"] += " In one word."


class ML615(Example):
    mutant = repeats.split_without_held_out_rows

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["data"] = {"train": ["rows.jsonl"], "held_out": 0.5}


class ML616(Example):
    mutant = bad_rows.answer_of_spaces

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][2]["messages"][3]["content"] = "I do not know."


class ML617(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][1]["content"] = "It costs 5 �."

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][1]["content"] = "It costs 5 €."


class ML618(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"][4]["tools"][0]["function"]["name"] = "forecast"

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][4]["tools"][0]["function"]["description"] = "The forecast for a city."


class ML619(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["rows"][4]["messages"][1]["tool_calls"][0]["function"]["arguments"] = "{'city': 'Rome'}"

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][4]["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Rome"}'


class ML620(Example):
    mutant = bad_rows.answer_is_cut_by_choice

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["training"] |= {"max_length": 1024, "truncation": "right"}


class ML640(Example):
    mutant = recipe.recipe_with_a_misspelt_key

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["training"] = {"steps": 1}


class ML641(Example):
    mutant = recipe.misspelt_target_modules

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["lora"] = {"target_modules": ["q_proj", "v_proj"]}


class ML642(Example):
    mutant = recipe.logger_that_is_not_installed

    def sound(self, artifact: Artifact) -> None:
        artifact["recipe"]["training"]["report_to"] = []


class ML621(Example):
    mutant = calls.result_of_no_call

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][4]["messages"][2]["name"] = "weather"


class ML622(Example):
    mutant = calls.required_argument_is_missing

    def sound(self, artifact: Artifact) -> None:
        self.rename(artifact, "city")
        # a call of weight 0 may be wrong on purpose, and a reference to elsewhere is not followed
        for row, question in ((5, "And in Genoa?"), (6, "And by the sea?")):
            artifact["rows"].append(copy.deepcopy(artifact["rows"][4]))
            artifact["rows"][row]["messages"][0]["content"] = question
        artifact["rows"][5]["messages"][1]["weight"] = 0
        self.rename(artifact, "town", row=5)
        parameters = artifact["rows"][6]["tools"][0]["function"]["parameters"]
        parameters["properties"]["city"] = {"$ref": "https://example.org/city.json"}

    @staticmethod
    def rename(artifact: Artifact, name: str, row: int = 4) -> None:
        data = artifact["rows"][row]
        data["tools"][0]["function"]["parameters"]["required"] = ["city"]
        data["messages"][1]["tool_calls"][0]["function"]["arguments"] = {name: "Rome"}


class ML623(Example):
    mutant = calls.arguments_padded_with_null

    def sound(self, artifact: Artifact) -> None:
        # the tool takes this null, and any key besides its own
        parameters = artifact["rows"][4]["tools"][0]["function"]["parameters"]
        parameters["properties"]["days"] = {"type": ["integer", "null"]}
        parameters["properties"]["time"] = {"type": "string", "nullable": True}
        parameters["additionalProperties"] = True
        arguments = artifact["rows"][4]["messages"][1]["tool_calls"][0]["function"]["arguments"]
        arguments.update({"days": None, "time": None, "mood": None})


class _Answers(Example):
    rows = 3

    def append(self, artifact: Artifact, text: str) -> None:
        for row in artifact["rows"][: self.rows]:
            row["messages"][-1]["content"] += text


class ML624(_Answers):
    mutant = texts.letters_escaped

    def sound(self, artifact: Artifact) -> None:
        self.append(artifact, ' Café, not `Caf\\u00e9` nor "Caf\\u00e9", [\\u4e00-\\u9fff] or C:\\users.')


class ML625(ML624):
    mutant = texts.letters_escaped_in_one_row

    rows = 1


class ML626(_Answers):
    mutant = texts.line_breaks_escaped

    def sound(self, artifact: Artifact) -> None:
        self.append(artifact, " The sign is `\\n`, \\n or (\\n); $a\\neq b$, $a\\nRightarrow b$; C:\\new\\notes.")


class ML627(ML626):
    mutant = texts.line_breaks_escaped_in_one_row

    rows = 1


class ML628(_Answers):
    mutant = texts.rendered_as_chatml

    def sound(self, artifact: Artifact) -> None:
        self.append(artifact, " ChatML begins with <|im_start|> and ends with `<|im_end|>`\n\n### Notes\nNone.")


class ML629(ML628):
    mutant = texts.one_text_rendered_as_chatml

    rows = 1


class ML630(_Answers):
    mutant = texts.thinking_as_letters

    def sound(self, artifact: Artifact) -> None:
        use_tokenizer(artifact, "derived-v13-thinking")
        for row in artifact["rows"][: self.rows]:
            text = {"type": "text", "text": row["messages"][-1]["content"] + " Tags such as <think> open a thought."}
            row["messages"][-1]["content"] = [{"type": "thinking", "thinking": "Let me see."}, text]


class ML631(_Answers):
    mutant = texts.thinking_as_letters_without_tokens

    rows = 1

    def sound(self, artifact: Artifact) -> None:
        self.append(artifact, " The tag <think> opens a thought.")


class ML632(Example):
    mutant = repeats.held_out_but_for_case_and_punctuation

    def sound(self, artifact: Artifact) -> None:
        self.add(artifact, lambda text: text.replace("sky", "sea").replace("Blue", "Green"))
        # other numbers and other code are other rows
        for contents, rows in (
            (("What is -3.5?", "Is C# f(x)?"), artifact["rows"]),
            (("What is 35?", "Is C f[x]?"), artifact["held_out"]),
        ):
            for text in contents:
                rows.append({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]})

    @staticmethod
    def add(artifact: Artifact, change: Callable[[str], str]) -> None:
        row = copy.deepcopy(artifact["held_out"][0])
        for message in row["messages"]:
            message["content"] = change(message["content"])
        artifact["rows"].append(row)


class ML633(Example):
    mutant = repeats.held_out_but_for_a_word_of_the_question

    question = (
        "What should I do with the keys of my flat when I leave for the station before six in the morning on Monday?"
    )
    answer = "Leave the keys in the small grey box beside the door, and lock it with the code that you got from us."

    def sound(self, artifact: Artifact) -> None:
        self.add(artifact, self.question.replace("six", "6").replace("a Monday", "9 May"))
        artifact["rows"][-1]["messages"][0]["content"] = self.question.replace("six", "7").replace("a Monday", "8 May")

    def add(self, artifact: Artifact, question: str) -> None:
        for rows, text in ((artifact["rows"], self.question), (artifact["held_out"], question)):
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": self.answer}]
            rows.append({"messages": messages})


class ML634(Example):
    mutant = bad_rows.labels_that_nobody_reads

    def sound(self, artifact: Artifact) -> None:
        artifact["alone"] = True
        # the classes of a classifier
        artifact["rows"][0] |= {"input_ids": None, "labels": [0, 3]}


class ML635(Example):
    mutant = bad_rows.text_beside_the_messages

    def sound(self, artifact: Artifact) -> None:
        artifact["alone"] = True
        artifact["rows"][0] |= {"text": None, "prompt": "geography", "source": {"text": "of a quiz"}}


class ML636(Example):
    mutant = whole_files.one_text_decoded_as_windows_1252

    def sound(self, artifact: Artifact) -> None:
        whole_files.add_rows(artifact, "Café {} is « un CAFÉ », and naïve too… `cafÃ©` is not, nor 👩\u200d🔬.".format)


class ML637(Example):
    mutant = whole_files.one_text_with_an_entity

    def sound(self, artifact: Artifact) -> None:
        whole_files.add_rows(artifact, "In HTML {}, write &amp; for an ampersand, and don&#39;t forget it.".format)


class ML638(Example):
    mutant = whole_files.one_question_unfilled

    def sound(self, artifact: Artifact) -> None:
        whole_files.add_rows(artifact, 'Write `{{name}}` for the name, print(f"{{name}}"), and {0}: {{1: 2}}.'.format)


class ML639(Example):
    mutant = whole_files.rendered_as_instructions

    def sound(self, artifact: Artifact) -> None:
        whole_files.add_rows(artifact, "It is thing {}.".format)


class ML643(Example):
    mutant = whole_files.one_answer_missing_in_a_table

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][0]["content"] = "What does print(float('nan')) show?"
        artifact["rows"][0]["messages"][1]["content"] = "nan"
        artifact["rows"][3]["messages"][0]["content"] = "Which of 4, 6 and 8 are prime?"
        artifact["rows"][3]["messages"][1]["content"] = "None"


class ML644(Example):
    mutant = whole_files.one_error_for_many_answers

    def sound(self, artifact: Artifact) -> None:
        # a refusal, and the more frequent class of two
        labels = ["no"] * 20 + ["yes"] * 3 + ["Sorry, I cannot help with that. Please ask something else."] * 2
        whole_files.add_rows(artifact, labels.__getitem__)


class ML645(Example):
    mutant = whole_files.answers_cut_by_characters

    def sound(self, artifact: Artifact) -> None:
        whole_files.add_rows(artifact, lambda number: f"{whole_files.story(number)[:129]}.")


class ML646(Example):
    mutant = whole_files.half_without_the_system_prompt

    def sound(self, artifact: Artifact) -> None:
        self.broken(artifact)
        for row in artifact["rows"]:
            if row["messages"][0]["role"] != "system":
                row["messages"].insert(0, {"role": "system", "content": "You are terse."})


class ML647(Example):
    mutant = whole_files.a_call_as_text

    def sound(self, artifact: Artifact) -> None:
        self.broken(artifact)
        arguments = {"city": "Rome 1"}
        call = {"id": "b1B2c3D4e", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        del artifact["rows"][-1]["messages"][1]["content"]
        artifact["rows"][-1]["messages"][1]["tool_calls"] = [call]


class ML648(Example):
    mutant = answers.spaces_at_the_end_of_an_answer

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"][1]["content"] = "  Paris is the capital of France.\n"


class ML649(Example):
    mutant = answers.space_of_sentencepiece_in_an_argument

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][4]["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"city":"\\u0052ome 🦥"}'


class ML650(Example):
    mutant = answers.thought_after_a_text

    def sound(self, artifact: Artifact) -> None:
        paris = answers.said("Paris is the capital of France.")
        answers.think_in(artifact, answers.thought("\nHm.\n\n"), paris)
        # an answer of weight 0 is only read
        artifact["rows"][2]["messages"][1] = {
            "role": "assistant",
            "content": [answers.said("Ten."), answers.thought("Or so.")],
            "weight": 0,
        }


class ML651(Example):
    mutant = answers.strict_arguments_in_another_order

    def sound(self, artifact: Artifact) -> None:
        self.broken(artifact)
        answers.call_strictly(artifact, {"city": "Rome", "days": 3})
        # without `strict`, the grammar takes any object
        artifact["rows"].append(copy.deepcopy(artifact["rows"][4]))
        artifact["rows"][5]["messages"][0]["content"] = "And in Genoa?"
        answers.call_strictly(artifact, {"days": 3, "city": "Genoa"}, row=5)
        artifact["rows"][5]["tools"][0]["function"]["strict"] = False


class ML653(Example):
    mutant = answers.tool_offered_twice

    def sound(self, artifact: Artifact) -> None:
        self.broken(artifact)
        artifact["rows"][4]["tools"][1]["function"]["name"] = "forecast"


class ML654(Example):
    mutant = answers.required_argument_without_a_schema

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][4]["tools"][0]["function"]["parameters"]["required"] = ["city"]
        # a schema may name it elsewhere
        artifact["rows"].append(copy.deepcopy(artifact["rows"][4]))
        artifact["rows"][5]["messages"][0]["content"] = "And in Genoa?"
        parameters = artifact["rows"][5]["tools"][0]["function"]["parameters"]
        parameters |= {"required": ["days"], "allOf": [{"properties": {"days": {"type": "integer"}}}]}
        artifact["rows"][5]["messages"][1]["tool_calls"][0]["function"]["arguments"]["days"] = 3


class ML655(Example):
    mutant = pairs.sides_that_differ_in_white_space

    def sound(self, artifact: Artifact) -> None:
        pair = pairs.use_pairs(artifact)[0]
        pair["rejected"] = [{**pair["chosen"][0], "content": f"{pair['chosen'][0]['content']} Perhaps."}]
        # in code, white space may be the difference
        code = pairs.use_pairs(artifact)[1]
        code["chosen"][0]["content"] = "if a:\n    b()\n    c()"
        code["rejected"][0]["content"] = "if a:\n    b()\nc()"


class ML656(Example):
    mutant = pairs.rejected_answer_is_empty

    def sound(self, artifact: Artifact) -> None:
        rows = pairs.use_pairs(artifact)
        # an unwanted answer may say anything: markers, a broken call, damaged letters
        rows[0]["rejected"][0]["content"] = "<|im_start|>assistant: caf\\u00e9 \ufffd"
        rows[1]["rejected"] = [
            {
                "role": "assistant",
                "tool_calls": [{"id": "a1B2c3D4e", "function": {"name": "nothing", "arguments": "{broken"}}],
            }
        ]


class ML657(Example):
    mutant = pairs.sides_that_part_behind_the_cut

    def sound(self, artifact: Artifact) -> None:
        pairs.long_prompt(artifact, 200)


class ML658(Example):
    mutant = pairs.pair_and_its_opposite

    def sound(self, artifact: Artifact) -> None:
        rows = pairs.use_pairs(artifact)
        # a ranking: the second answer wins this pair, and lost the other one
        worse = [{"role": "assistant", "content": "I do not know, and I cannot find it out either."}]
        rows.append({**rows[0], "chosen": rows[0]["rejected"], "rejected": worse})


class ML659(Example):
    mutant = pairs.chosen_answers_are_longer

    def sound(self, artifact: Artifact) -> None:
        pairs.use_pairs(artifact, 20)


class ML660(Example):
    mutant = whole_files.answers_as_html

    def sound(self, artifact: Artifact) -> None:
        whole_files.add_rows(
            artifact, lambda number: f"<p>It is thing {number}.</p>", lambda number: f"Write thing {number} as HTML."
        )
        whole_files.add_rows(artifact, lambda number: f"Thing {number}:\n```\n<p>{number}</p>\n```")


class ML661(Example):
    mutant = signs.a_line_break_and_a_space

    def sound(self, artifact: Artifact) -> None:
        self.broken(artifact)
        question, answer = artifact["rows"][0]["messages"]
        question["content"], answer["content"] = question["content"].strip(), answer["content"].strip()


class ML662(Example):
    mutant = signs.first_answers_alone

    def sound(self, artifact: Artifact) -> None:
        self.broken(artifact)
        artifact["rows"][0]["messages"][3]["weight"] = 1


class ML663(Example):
    mutant = signs.a_system_prompt_in_each_request

    def sound(self, artifact: Artifact) -> None:
        signs.ask(artifact)
        for row in artifact["rows"]:
            row["messages"].insert(0, {"role": "system", "content": "You are terse."})


class ML664(Example):
    mutant = signs.rows_cut_at_one_length

    def sound(self, artifact: Artifact) -> None:
        self.broken(artifact)
        artifact["rows"][0]["messages"][1]["content"] += " of the owner."


class ML665(Example):
    mutant = signs.one_text_for_all_rejected_sides

    def sound(self, artifact: Artifact) -> None:
        pairs.use_pairs(artifact, signs.COUNT)


class ML666(Example):
    mutant = signs.one_prefix_of_all_chosen_sides

    def sound(self, artifact: Artifact) -> None:
        self.broken(artifact)
        for row in artifact["rows"]:
            row["rejected"][0]["content"] = f"Answer: {row['rejected'][0]['content']}"


class ML667(Example):
    mutant = signs.all_rated_answers_are_wanted

    def sound(self, artifact: Artifact) -> None:
        signs.rate(artifact, *[True] * (signs.COUNT - 1), False)


class ML668(Example):
    mutant = signs.labels_as_letters

    def sound(self, artifact: Artifact) -> None:
        signs.rate(artifact, *[number % 3 > 0 for number in range(signs.COUNT)])


class ML669(Example):
    mutant = signs.answers_cut_by_the_limit_of_a_server

    def sound(self, artifact: Artifact) -> None:
        signs.declare(artifact, "finish_reason", "stop")


class ML670(Example):
    mutant = gaps.completions_with_the_space_of_a_text

    def sound(self, artifact: Artifact) -> None:
        gaps.add_gaps(artifact)


class ML671(Example):
    mutant = gaps.completions_go_on_into_the_suffix

    def sound(self, artifact: Artifact) -> None:
        # a closing bracket is often there twice
        gaps.add_gaps(artifact, lambda number: gap(number, suffix="\n)\n", completion=f"f({number},\n)"))


class ML672(Example):
    mutant = gaps.completions_repeat_the_prompt

    def sound(self, artifact: Artifact) -> None:
        gaps.add_gaps(artifact)


class ML673(Example):
    mutant = gaps.prompts_with_starcoder_s_markers

    def sound(self, artifact: Artifact) -> None:
        # a tag of HTML is no marker
        gaps.add_gaps(artifact, lambda number: gap(number, prompt=f"<pre>{number}</pre><section><p>"))


class ML674(Example):
    mutant = gaps.suffixes_lost

    def sound(self, artifact: Artifact) -> None:
        # the ends of some files
        gaps.add_gaps(artifact, lambda number: gap(number, suffix="" if number % 2 else None))


class ML675(Example):
    mutant = recipe.learning_rate_without_its_exponent

    def sound(self, artifact: Artifact) -> None:
        set_training(artifact, learning_rate=2e-4)


class ML676(Example):
    mutant = recipe.columns_exchanged

    def sound(self, artifact: Artifact) -> None:
        recipe.use_columns(artifact, instruction="instruction", output="output")


class ML677(Example):
    mutant = bad_rows.system_prompt_behind_the_question

    def sound(self, artifact: Artifact) -> None:
        artifact["rows"][0]["messages"].insert(0, {"role": "system", "content": "In one word."})


class ML678(Example):
    mutant = bad_rows.greeting_first

    def sound(self, artifact: Artifact) -> None:
        greeting = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "How can I help you?"}]
        artifact["rows"][0]["messages"][:0] = greeting
