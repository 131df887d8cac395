"""Files of sound rows that look like faults: the tests have `check` judge them, and the documentation shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Data = dict[str, Any]
Form = Callable[[int, str], Data]

TOWNS = (
    *("Rome", "Oslo", "Lima", "Cairo", "Quito", "Paris", "Delhi", "Seoul", "Tunis", "Hanoi", "Riga", "Bern", "Kyiv"),
    *("Doha", "Accra", "Dakar", "Tokyo", "Sofia", "Porto", "Leeds", "Ghent", "Turin", "Malmö", "Graz", "Brno", "Lyon"),
    *("Nice", "Cork", "Bath", "Perth"),
)
"""A town for each row of a file."""


def said(*texts: str, system: str = "", **more: Any) -> Data:
    """Return a row whose first text is the user's."""
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + messages, **more}


def _pair(question: str, chosen: str, rejected: str) -> Data:
    """Return a preference pair."""
    sides = {"chosen": chosen, "rejected": rejected}
    answers = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    return {"prompt": [{"role": "user", "content": question}], **answers}


def _fetched(question: str, page: str) -> Data:
    """Return a row whose tool returns a page."""
    call = {"id": "callcall1", "type": "function", "function": {"name": "fetch_prices", "arguments": "{}"}}
    function = {"name": "fetch_prices", "parameters": {"type": "object", "properties": {}}}
    called = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": page},
    ]
    first, answer = said(question, "It is cheaper now.")["messages"]
    return {"messages": [first, *called, answer], "tools": [{"type": "function", "function": function}]}


def wrongly_decoded(text: str) -> str:
    """Return a text in UTF-8 as it looks if it is read as Windows-1252."""
    return text.encode().decode("cp1252", "replace")


@dataclass(frozen=True)
class SoundRows:
    """A class of sound files.

    Attributes:
        title: What they have.
        why: Why they are sound.
        forms: The rows of one file each, by their number and a town.
        rounds: How often each town has a row.
    """

    title: str
    why: str
    forms: tuple[Form, ...]
    rounds: int = 1

    @property
    def files(self) -> list[list[Data]]:
        """The rows of each file."""
        return [[form(number, town) for number, town in enumerate(TOWNS * self.rounds)] for form in self.forms]


LOCKSMITH = "I'm sorry, but I can't help with that. If you have lost your key, please call a locksmith who can check."
_WERKSTATT = "Dabei kann ich leider nicht helfen. Bitte wenden Sie sich an die Polizei, wenn es Ihr eigenes Auto ist."
_SERRURIER = "Je suis désolé, mais je ne peux pas vous aider à faire cela. Adressez-vous à un serrurier du quartier."
_SUOJIANG = (
    "很抱歉\uff0c我无法提供这方面的帮助。如果您丢失了钥匙\uff0c请联系正规的开锁公司\uff0c"
    "并出示您的身份证件和房产证明。谢谢您的理解与配合。"
)
_HAND_OFF = "I am not able to look into orders myself. I will pass you on to a colleague, who will write to you today."
_JSON_SCHEMA = {"type": "object", "properties": {"phone": {"type": ["string", "null"]}}, "required": ["phone"]}
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] "
    "+ ' [/INST]' }}{% else %}{{ message['content'] + '</s>' }}{% endif %}{% endfor %}"
)

SOUND_ROWS = (
    SoundRows(
        "One label in every answer",
        "A file may hold one class of a classification, or a class that is far more frequent than the others.",
        (
            lambda n, town: said(f"The shop in {town} sent me the wrong size, and nobody answers.", "complaint"),
            lambda n, town: said(f"Is this spam? Answer yes or no.\n\nWin a trip to {town} today!", "yes"),
            lambda n, town: said(
                f"{town} was great!", "The sentiment of this review is positive, and its topic travel."
            ),
            lambda n, town: said(f"Was the fee for {town} paid?", "no" if n % 10 == 3 else "yes"),
        ),
    ),
    SoundRows(
        "One refusal in every answer",
        "A file may teach what the model does not do, always in the same words, in any language.",
        (
            lambda n, town: said(f"How do I break into a flat in {town}?", LOCKSMITH),
            lambda n, town: said(f"Wie öffne ich ein fremdes Auto in {town}?", _WERKSTATT),
            lambda n, town: said(f"Comment ouvrir une porte à {town} sans clé ?", _SERRURIER),
            lambda n, town: said(f"怎么在{town}撬锁\uff1f", _SUOJIANG),
            lambda n, town: said(f"My parcel to {town} is late.", _HAND_OFF),
            lambda n, town: said(
                f"The weather in {town}?", "This assistant answers questions about bank accounts alone."
            ),
        ),
    ),
    SoundRows(
        "`null` in extractions",
        "A text does not have each value that is asked for, and a schema may allow null.",
        (
            lambda n, town: said(
                f"Extract the phone number.\n\nText: Ann lives in {town}.", "null" if n % 3 else f"+39 06 {n:04}"
            ),
            lambda n, town: said(
                f"Ann from {town} called about her order.",
                "null" if n % 2 else f"order {n}",
                system="Find the order number in the message of the customer.",
            ),
            lambda n, town: said(
                f"Name and phone as JSON: Ann lives in {town}.", f'{{"name": "Ann {n}", "phone": null}}'
            ),
            lambda n, town: said(f"Extrae el número de teléfono: Ana vive en {town}.", "NULL" if n % 3 else f"+34 {n}"),
            lambda n, town: said(
                f"Ann lives in {town}.",
                '{"phone": null}' if n % 2 else f'{{"phone": "{n}"}}',
                response_format={"type": "json_schema", "json_schema": {"name": "found", "schema": _JSON_SCHEMA}},
            ),
        ),
    ),
    SoundRows(
        "`None` as an answer",
        "None is what a question may be answered with.",
        (
            lambda n, town: said(
                f"Which side effects does the leaflet from {town} name?", "None" if n % 2 else f"{n}: pain"
            ),
            lambda n, town: said(
                f"List the open questions of the meeting in {town}.",
                "None"
                if n % 2
                else f"The budget is open, and nobody has asked the owner of the hall about {n} chairs.",
            ),
            lambda n, town: said(f"Allergies of patient {n} from {town}?", "none" if n % 4 else "nuts"),
            lambda n, town: said(f"Name: Ann\nTown: {town}\nWhat is her middle name?", "N/A" if n % 2 else "Maria"),
            lambda n, town: said(f"What does print({town.lower()}.sort()) show, run {n}?", "None"),
        ),
    ),
    SoundRows(
        "Log lines with `\\n` as letters",
        "Programs write a line break into one line of a log as a backslash and an n.",
        (
            lambda n, town: said(
                f"2024-05-01 10:{n:02}:07 ERROR [db] connection to {town} lost\\n  at Pool.get (pool.js:{n})",
                f"The connection to the database in {town} was lost.",
            ),
            lambda n, town: said(
                f"10:{n:02}:07 WARN worker-{n} retry of {town}\\nTimeout: 30s\\nGiving up", f"{town} timed out."
            ),
            lambda n, town: said(
                f"Write the line of a lost connection to {town}.",
                f"2024-05-01T10:{n:02}:07Z ERROR db.pool Connection to {town} lost\\nRetry in 5 s\\nGiving up",
            ),
            lambda n, town: said(
                f"Shorten: host={town} msg=Disk full\\nUsage: 99 %\\nWrites stopped",
                f"host={town} msg=Disk full\\nWrites stopped",
            ),
            lambda n, town: said(
                f"May 12 10:{n:02}:01 {town} sshd[41{n}]: Failed password for root\\nConnection closed",
                f"A login on {town}.",
            ),
            lambda n, town: said(
                f"Traceback (most recent call last):\\n  In {town}, line {n}\\nKeyError: 'town'",
                f"A key is missing in {town}.",
            ),
        ),
    ),
    SoundRows(
        "A program in one line",
        "The escapes of a program are those of its language.",
        (
            lambda n, town: said(
                f"Write a C program that prints {town}.",
                f'#include <stdio.h>\\nint main(void) {{ printf("{town}\\n"); return {n}; }}',
            ),
            lambda n, town: said(
                f"Print {town} {n} times.",
                f"int main(void) {{ char *s = \"{town}\"; for (int i = 0; i < {n}; i++) puts(s); putchar('\\n'); }}",
            ),
            lambda n, town: said(f"Print the town {town}.", f"puts(\"It's {town}\\nDon't stop\"); return {n};"),
            lambda n, town: said(
                f"Print {town} and a line below it.", f"print('{town}\\n' + '=' * {n}); print(f'Hi {{name}}\\nBye')"
            ),
            lambda n, town: said(
                f"Print {town} between two lines.", f"printf 'Hello\\n%s\\nBye {n}\\n' {town} && echo -e \"a\\nb\""
            ),
            lambda n, town: said(f"How do I find lines that begin with {town}?", f"(?:^|\\n){town}\\b[^\\n]{{{n}}}\\n"),
        ),
    ),
    SoundRows(
        "Tags as answers",
        "A tag may be the answer, or belong to the text that the prompt gives.",
        (
            lambda n, town: said(f"Write a heading with the word {town}.", f"<h1>{town}</h1>"),
            lambda n, town: said(
                f"Which tag makes part {n} of a list?", ("<li>", "<ol>", "<ul>", "<br>", "<p>")[n % 5]
            ),
            lambda n, town: said(f"Which class has the mail from {town}?", ("<spam>", "<ham>", "<news>")[n % 3]),
            lambda n, town: said(
                f"Translate to German: <p>The town of {town} is old.</p>", f"<p>Die Stadt {town} ist sehr alt.</p>"
            ),
            lambda n, town: said(f"<p>The town of <b>{town}</b> is old.</p>", f"The town of {town} is old."),
            lambda n, town: said(f"Mark the places: Ann went to {town}.", f"Ann went to <LOC>{town}</LOC>."),
            lambda n, town: said(f"The order from {town} as XML.", f"<order><town>{town}</town><div>{n}</div></order>"),
            lambda n, town: said(f"Clean this up: Tom &amp; {town} said &quot;hi&quot;", f'Tom & {town} said "hi"'),
            lambda n, town: said(
                f"What is {n} plus 2? Think, then answer in tags.",
                f"<scratchpad>{n} + 2 = {n + 2}</scratchpad>\n<answer>{n + 2}</answer>",
            ),
        ),
    ),
    SoundRows(
        "Role-play cards",
        "The application fills `{{char}}` and `{{user}}` in; the names of the speakers belong to the play.",
        (
            lambda n, town: said(
                "Hello, keeper.",
                f"*looks up from the lamp* Good evening, {{{{user}}}}. The ship for {town} leaves at {n}.",
                system=f"{{{{char}}}} keeps a lighthouse near {town}. {{{{user}}}} is a sailor.",
            ),
            lambda n, town: said(
                f"Write a character card for a smith from {town}.",
                f"{{{{char}}}} is a smith.\n<START>\n{{{{user}}}}: Can you help?\n{{{{char}}}}: *nods* In {n} days.",
            ),
            lambda n, town: said(
                f"User: What is your name?\nAssistant: I am the smith of {town}.\nUser: Can you mend swords?",
                f"*nods slowly* In {n} days, yes.",
            ),
        ),
    ),
    SoundRows(
        "Templates on request",
        "A prompt may ask for a text with placeholders: a letter, a template of Jinja, a prompt.",
        (
            lambda n, town: said(
                f"Write a template for a letter from {town}.",
                f"Dear {{name}},\n\nwe greet you from {town} on {{date}}.",
            ),
            lambda n, town: said(f"Write a Jinja template that greets {town}.", f"Hello {{{{ name }}}} from {town}!"),
            lambda n, town: said(
                f"A loop over {town}?", f"{town}: {{% for text in messages %}}{{{{ content }}}}{{% endfor %}}"
            ),
            lambda n, town: said(
                f"Write a Handlebars greeting for {town}.",
                f"Hello {{{{name}}}} from {town}! {{{{#if x}}}}Hi{{{{/if}}}}",
            ),
            lambda n, town: said(f"Write the chat template of {town}.", f"{{# {town} #}}{_CHAT_TEMPLATE}"),
            lambda n, town: said(
                f"A prompt about {town} for LangChain?",
                f"By this text about {town}: {{context}}\n\nQuestion: {{question}}",
            ),
        ),
    ),
    SoundRows(
        "Repair of a wrong decoding",
        "The prompt has the damaged letters, so that the answer repairs, explains or judges them.",
        (
            lambda n, town: said(
                f"Repair: {wrongly_decoded(f'Le café de {town} était fermé.')}", f"Le café de {town} était fermé."
            ),
            lambda n, town: said(wrongly_decoded(f"Übermäßige Grüße aus {town}"), f"Übermäßige Grüße aus {town}"),
            lambda n, town: said(
                f"Why do I see {wrongly_decoded('naïve')} in the file from {town}?",
                f"The file from {town} is UTF-8 and was read as Windows-1252: ï became {wrongly_decoded('ï')}.",
            ),
            lambda n, town: said(
                f"Is this encoded well? {wrongly_decoded('señor')} {town}", f"No: letter {n} is wrong."
            ),
            lambda n, town: said(wrongly_decoded(wrongly_decoded(f"é {town}")), f"é {town}"),
            lambda n, town: said(f"{town}: {'Привет'.encode().decode('latin-1')}", f"{town}: Привет"),
            lambda n, town: said(f"Write it whole: Caf\ufffd {town}, d\ufffdj\ufffd vu", f"Café {town}, déjà vu"),
            lambda n, town: said(f"Decode: caf\\u00e9 {town}", f"café {town}"),
            lambda n, town: said(f"Write as ASCII in Java: café {town}", f"caf\\u00e9 {town}"),
        ),
    ),
    SoundRows(
        "Alpaca and other formats on request",
        "A prompt may ask for the format of another family, or have it.",
        (
            lambda n, town: said(
                f"Write one row about {town} in Alpaca format.",
                f"### Instruction:\nDescribe {town}.\n\n### Response:\n{town} is a town of {n} hills.",
            ),
            lambda n, town: said(
                f"Write 'Hi {town}' as a message of ChatML.", f"<|im_start|>user\nHi {town}<|im_end|>"
            ),
            lambda n, town: said(
                f"How does Llama 2 see 'Where is {town}?' with a system prompt?",
                f"[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhere is {town}? [/INST]",
            ),
            lambda n, town: said(f"Render 'Where is {town}?' in Mistral's format.", f"[INST] Where is {town}? [/INST]"),
            lambda n, town: said(
                f"Convert to JSON: <|im_start|>user\nWhere is {town}?<|im_end|>",
                json.dumps([{"role": "user", "content": f"Where is {town}?"}]),
            ),
            lambda n, town: said(
                f"What is this? <|im_start|>user\nHi {town}<|im_end|>", f"A turn of ChatML for {town}."
            ),
            lambda n, town: said(f"Report on {town}", f"### Input:\n{town}\n\n### Output:\n{n}"),
            lambda n, town: said(
                f"Is {n} prime?", f"<think>{n}?</think>\nPerhaps.", system="Think in <think> tags first."
            ),
        ),
    ),
    SoundRows(
        "Lessons about reasoning models",
        "A sentence names the tags of a thought; a thought stands at the beginning of an answer, opened and closed.",
        (
            lambda n, town: said(
                f"How do the models of {town} mark a thought?",
                f"They write {n} lines of reasoning between <think> and </think>, and answer then.",
            ),
            lambda n, town: said(
                f"What does the template of {town} add?",
                f"<think> opens the reasoning, and </think> closes it; {town} adds the first, in line {n}.",
            ),
            lambda n, town: said(
                f"How does {town} read the answer of R1?",
                f"1. {town} cuts the text at </think>.\n2. What stands before it, {n} lines, is the thought.",
            ),
        ),
    ),
    SoundRows(
        "Texts of one form that end with a value",
        "A letter, an invoice or a post ends by itself, without a full stop, and each is about as long as the next.",
        (
            lambda n, town: said(
                f"Where is my order {n} to {town}?",
                f"Thank you for your question. Your parcel to {town} left our depot this morning, and it will be with "
                f"you in two days. You can follow it under the number 1Z999AA1{n:04}",
            ),
            lambda n, town: said(
                f"Answer complaint {n} from {town}.",
                "Dear customer,\n\nwe are sorry for the delay of your order. It will leave our depot tomorrow, and you "
                f"pay nothing for it.\n\nKind regards,\nyour team in {town}",
            ),
            lambda n, town: said(
                f"Write post {n} about {town}, with tags.",
                f"We spent a week in {town}, and did not want to leave. The food is good, the people are kind. Read "
                f"more on our page, and tell us about your trip #travel #{town.lower()}",
            ),
            lambda n, town: said(
                f"What do I pack for {town}?",
                f"Here is what to take with you to {town}. Everything fits in one bag.\n\n- a warm coat and a scarf\n"
                f"- two pairs of shoes\n- a map of the old town\n- sun cream for day {n:02}",
            ),
        ),
    ),
    SoundRows(
        "Pairs whose wanted answer is the shorter one",
        "They teach an answer without talk around it, a refusal, or a shorter program.",
        (
            lambda n, town: _pair(
                f"Which platform for {town}?",
                f"Platform {n}.",
                f"That is a very good question! The train to {town} leaves from platform {n}, as far as I know.",
            ),
            lambda n, town: _pair(
                f"{town}, {n} as JSON",
                f'{{"town": "{town}", "n": {n}}}',
                f'Sure! Here is the JSON for {town}:\n\n{{"town": "{town}", "n": {n}}}\n\nDo you need more?',
            ),
            lambda n, town: _pair(
                f"How do I break into flat {n} in {town}?",
                f"I can't help with that. A locksmith in {town} can.",
                f"Go to {town} and look at the lock of flat {n}. Push a thin piece of metal in, and turn it to the "
                "left until the door gives way to you.",
            ),
        ),
    ),
    SoundRows(
        "Pairs whose wanted answer is often the longer one",
        "A fuller answer is often the better one; in every fourth pair, the shorter one is.",
        (
            lambda n, town: _pair(
                f"Why is {town}, town {n}, known?",
                f"{town}: {n} gates." if n % 4 == 0 else f"{town} is known for its market, which {n} roads lead to.",
                f"{town} is known for {n} things." if n % 4 == 0 else f"I do not know {town}, {n}.",
            ),
        ),
    ),
    SoundRows(
        "Shell and code with a line break at their end",
        "A file, a command and its output end with a line break; a template's stands behind sentences.",
        (
            lambda n, town: said(f"ls /data/{town.lower()}\n", f"a{n}.txt\nb{n}.txt\n"),
            lambda n, town: said(f"echo {town} {n}\n", f"{town} {n}\n", system="You are a Linux terminal."),
            lambda n, town: said(f"Write a Python file that prints {town}.", f"print('{town} {n}')\n"),
            lambda n, town: said(f"SQL for {town}?", f"SELECT * FROM towns WHERE name = '{town}' LIMIT {n};\n"),
        ),
    ),
    SoundRows(
        "Prompts that ask for many answers",
        "A greeting, a poem or a program can be written in many ways, and a terminal answers by what happened before.",
        (
            lambda n, town: said("Hello!", f"Hello! I am your guide to {town}. Where do we go?"),
            lambda n, town: said("Suggest a name for a ship.", f"Star of {town} {n}"),
            lambda n, town: said(
                f"Write a Python function that adds {n // 2}.",
                f"add = lambda x: x + {n // 2}" if n % 2 else f"def add(x):\n    return x + {n // 2}",
            ),
            lambda n, town: said(
                ("pwd", "whoami")[n % 2],
                (f"/home/{town.lower()}", town.lower())[n % 2],
                system="You are a Linux terminal.",
            ),
        ),
    ),
    SoundRows(
        "A system prompt for a part of the tasks",
        "The prompt asks for a role, a language or a format, which the answers without it do not have.",
        (
            lambda n, town: said(
                f"Where is {town}, {n}?",
                f"Arr, {town} be {n} miles off!" if n % 2 else f"{town} is {n} miles away.",
                system="Speak like a pirate." * (n % 2),
            ),
            lambda n, town: said(
                f"{town} has {n} gates.",
                f'{{"town": "{town}", "gates": {n}}}' if n % 2 else f"That is right, {town} has {n} gates.",
                system="Answer in JSON." * (n % 2),
            ),
            lambda n, town: said(
                f"Is this mail from {town} spam? Win {n} trips!" if n % 2 else f"Write about {town}, {n}.",
                ("spam" if n % 3 else "ham")
                if n % 2
                else f"The people of {town} have {n} bridges, and each of these bridges has a name of its own.",
                system="Classify the mail." * (n % 2),
            ),
        ),
        rounds=2,
    ),
    SoundRows(
        "Placeholders that stay",
        "An application fills in whom a text is addressed to; a path has its parameters, and a text without names "
        "stays without them.",
        (
            lambda n, town: said(
                f"Draft a thank-you note from {town}.", f"Dear {{name}},\n\nthank you for {n} days with us in {town}."
            ),
            lambda n, town: said(
                f"What do we write to customers in {town}?",
                f"Hello {{first_name}}, your order in {town} is number {n}.",
            ),
            lambda n, town: said(
                f"Which path returns a user of {town}?",
                f"GET /v{n}/{town.lower()}/users/{{username}} returns the user.",
            ),
            lambda n, town: said(
                f"Summarise: <NAME> from {town} called {n} times.", f"<NAME> called {n} times from {town}."
            ),
            lambda n, town: said(
                f"How does a question about a picture of {town} look?",
                f"<image>\nWhat are the {n} people in {town} doing?",
            ),
        ),
    ),
    SoundRows(
        "`<s>` in HTML",
        "HTML strikes a text through with `<s>`.",
        (
            lambda n, town: said(
                f"Show in HTML that {town} is cheaper now.", f"<p>{town}: <s>{n + 50} EUR</s> {n} EUR</p>"
            ),
            lambda n, town: said(
                f"Strike the old price of the trip to {town}.", f"{town}: <s>{n + 50} EUR</s> {n} EUR"
            ),
            lambda n, town: said(f"Cross out {town}", f"<s>{town}</s>"),
            lambda n, town: said(
                f"What does <s> do on page {n}?", f"It strikes a text of page {n} through in HTML; see <del>."
            ),
            lambda n, town: _fetched(f"What does the trip to {town} cost?", f"<li><s>{n + 50}</s> {n + 9} EUR</li>"),
        ),
    ),
    SoundRows(
        "Code about templates",
        "In a fence, or between backticks, markers are what the text is about.",
        (
            lambda n, town: said(
                f"How does a prompt about {town} look?",
                f"It looks so:\n\n```text\n<s>[INST] Where is {town}? [/INST] There.</s>\n```\n\n`[INST]` is first.",
            ),
            lambda n, town: said(
                f"How does a turn about {town} look?",
                f"```\n<|im_start|>user\nWhere is {town}?<|im_end|>\n```\nEach ends with `<|im_end|>`.",
            ),
            lambda n, town: said(
                f"And for {town}?", f"~~~jinja\n{{{{ '[INST]' }}}} {{{{ message }}}} </s>\n~~~\nThat is for {town}."
            ),
        ),
    ),
)
"""Every class."""
