"""The cause of a chat that differs from the answer to its prompt's ids: proven by the answers, or not named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.conformance.answer.comparison import stop_words
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.conformance.server.changed_messages import ASK_ITSELF, FedPrompt, changed_messages
from pytest_mistral_lora.conformance.server.failures import answered, is_about_context, is_about_setting
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.errors import InputError, counted
from pytest_mistral_lora.records.judgement import AnswerJudgement, FirstDifference
from pytest_mistral_lora.records.transcripts import Transcript

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.server.answer import ChangedMessage
    from pytest_mistral_lora.serving.answers import ListedStep, ServedAnswer
    from pytest_mistral_lora.serving.replay import Replayed

RIGHT_MODEL = "By ids exact, by chat different: the model and adapter are right, the prompt is not."

_OTHER_PROMPT = "By ids they did not move: the model and adapter are right, the prompt is not."

RIGHT_PROMPT = "By ids exact, by chat different, and the prompt is right"

CONSTRAINED = (
    f"{RIGHT_PROMPT}: without its grammar the server answers as recorded, so the grammar constrains the answer."
)

HIDDEN_PROMPT = "It cannot be told whether the prompt or the weights differ, because the server is not asked by ids."

_CHANGED = f"{RIGHT_PROMPT}: the model says the recorded ids"

_CONSTRAINED_FIX = (
    "Compare the answer with the schema of its tool: the grammar of a server may fix the order of keys, and refuse "
    "those that the schema does not name. docs/serving.md lists what grammars change. The prompt needs no change."
)
_REFUSED_FIX = (
    "No schema of a tool and no prompt mends it: the grammar has no place for this control token. `mistral-lora "
    "doctor` lists the known faults of servers; without a way out there, serve by another server."
)
STOP_FIX = f"Find the stop string that each chat gets: a field `stop` of a gateway, or a preset. {ASK_ITSELF}"
_CHANGED_FIX = (
    "Find what changes answers on their way to the client: a filter or a mask of contents, a prefix, or what drops "
    f"tool calls. {ASK_ITSELF}"
)
STREAM_ALONE = "The whole answer is right, and its stream is not."
STREAM_FIX = (
    "Find what changes or drops parts of a stream: a proxy, a gateway, or the parser of the server. Or ask for whole "
    f"answers. {ASK_ITSELF}"
)
_LIMIT_FIX = (
    "Find the limit that each chat gets: a field `max_tokens` of a gateway, or a preset. The same prompt by ids is "
    f"answered to its end, so the context of the server is not the cause. {ASK_ITSELF}"
)
RANDOM_FIX = f"Find the temperature that each chat gets in place of 0, such as that of a preset. {ASK_ITSELF}"
_SAMPLED_FIX = (
    "Find the setting that each chat gets: a penalty, a bias, a temperature, or a grammar, such as that of a field "
    f"`response_format`. {ASK_ITSELF}"
)
_UNTOLD_FIX = f"Compare the request that reaches the server with the one of a client, setting by setting. {ASK_ITSELF}"

_TWO = 2
"""The most different answers to one request of a pool of two servers."""

_RANDOM = "two answers to one request differ, so they are not greedy (ML911), as if a temperature is forced"

POOL = (
    "Each request is answered in one of two ways, and one of them is the recorded one, as by two servers behind one "
    "address: a canary, or a pool that is swapped in part. A low temperature may do the same."
)
POOL_FIX = f"Ask each server behind the address by itself. If there is one alone: {RANDOM_FIX}"

_FIXES = {
    "misread": "Start the server with its parser of Mistral's tool calls.",
    "context": "The context of the server is too small: raise it. No template has a part in it.",
    "setting": "The server refuses a setting of the request, and not the messages: find what sets it, such as a "
    f"gateway. {ASK_ITSELF}",
    "typed": "Convert the model again: these tokens must be control tokens in its vocabulary.",
    "default-limit": "Have each client name a limit of tokens, or start the server without one of its own.",
    "scale": "Give the adapter the scale 1.",
    "system-prompt": f"Find the system prompt of each chat, such as that of a gateway or a template. {ASK_ITSELF}",
    "texts": "The tokens around the texts are right, and the texts are not those that were sent: find what changes "
    f"them, such as a filter of a gateway, or a chat template. {ASK_ITSELF}",
    "cut-prompt": f"Find what cuts each prompt, such as a setting of a gateway. {ASK_ITSELF}",
    "no-adapter": "Start the server with the adapter, or serve the merged model.",
    "file": "",
}
"""The fix of a cause, by its name; a kind of server may have one in its own options: `Server.fixes("causes")`."""


def fix_of_refusal(target: ServerTarget, words: str) -> str:
    """Return the fix of a refusal that is not about the messages; empty for one that is.

    Args:
        target: The server.
        words: Its words.
    """
    if is_about_context(words):
        return fix_of(target, "context")
    return fix_of(target, "setting") if is_about_setting(words) else ""


def fix_of(target: ServerTarget, cause: str) -> str:
    """Return the fix of a cause, in the options of this kind of server if it has words for it."""
    return target.server.fixes("causes").get(cause, _FIXES[cause])


def with_file(target: ServerTarget, fix: str) -> str:
    """Return the fix of a likely cause, followed by the check of the file that this kind of server has its model in."""
    return f"{fix} {fix_of(target, 'file')}".strip()


class ChatCauses:
    """Finds why the chats of one server differ, though their prompts' ids are answered as recorded."""

    def __init__(self, target: ServerTarget, passes: Callable[[Transcript, ServedAnswer], bool], margin: float) -> None:
        """Keep the target.

        Args:
            target: The server.
            passes: Returns whether an answer to messages is as recorded.
            margin: The largest lead of one token over another at a near tie, in nats.
        """
        self._target = target
        self._passes = passes
        self._margin = margin

    def of(self, replayed: Replayed, difference: FirstDifference | None) -> tuple[list[str], str]:
        """Return the cause of a different answer to messages, as lines, and its fix; the rule's own if it is empty.

        Args:
            replayed: A transcript whose ids are answered as recorded.
            difference: The first token that differs; None if the ids are the recorded ones.
        """
        of_prompt, answer = self._of_prompt(replayed), answered(replayed.by_messages)
        if of_prompt is not None:
            return [RIGHT_MODEL, *of_prompt[0]], of_prompt[1]
        if _shown_ids(replayed) is None or answer is None or difference is None:
            return [RIGHT_MODEL], ""
        cause, fix = self._of_answer(replayed, answer, difference)
        return [cause], fix

    def of_message(self, changed: ChangedMessage, replayed: Replayed) -> tuple[list[str], str]:
        """Return the cause of a message that no parser makes of the right ids, as lines, and its fix."""
        if changed.leaves_calls:
            return [f"{_CHANGED}, and the server leaves their calls in the text."], fix_of(self._target, "misread")
        if changed.spells:
            words = f"{_CHANGED}, whose letters spell {changed.spells}, and the parser of the server reads the marker."
            return [words], self._target.server.fixes().get("ML924", RULES["ML924"].fix_text)
        answer = answered(replayed.by_messages)
        if answer is not None and (by := changed.cut and stop_words(answer.stop, answer.text, changed.cut)):
            return [f"{_CHANGED}, and the client gets only the beginning of their text: it is cut by {by}."], STOP_FIX
        arrives = (
            "other calls"
            if answer is not None and answer.calls
            else "no call"
            if changed.has_other_calls
            else "another text"
        )
        words = f"{_CHANGED}, and the client gets {arrives}: the parser of the server or a gateway changes the message."
        return [words], _CHANGED_FIX

    def of_moved(self, replayed: Replayed) -> tuple[list[str], str]:
        """Return the cause of a right answer with other log-probabilities than by ids, as lines, and its fix."""
        of_prompt = self._of_prompt(replayed)
        if of_prompt is not None:
            return [_OTHER_PROMPT, *of_prompt[0]], of_prompt[1]
        words = "By ids they did not move. What changes them in a chat cannot be told: the prompt has as many tokens."
        return [words], _UNTOLD_FIX

    def has_other_prompt(self, replayed: Replayed) -> bool:
        """Return whether the prompt of the messages differs from the recorded one, as far as the server shows it."""
        return self._of_prompt(replayed) is not None

    def is_same(self, first: ServedAnswer, second: ServedAnswer) -> bool:
        """Return whether two answers are the same to a client, or part at a near tie of their own tokens."""
        if same_answer(first, second):
            return True
        if self._target.drafts:
            return False
        pairs = zip(first.steps, second.steps, strict=False)
        parted = next((pair for pair in pairs if (pair[0].id, pair[0].text) != (pair[1].id, pair[1].text)), None)
        return parted is not None and abs(parted[0].logprob - parted[1].logprob) < self._margin

    def _of_prompt(self, replayed: Replayed) -> tuple[list[str], str] | None:
        """Return how the prompt differs from the recorded one, as lines, and its fix; None if nothing shows it."""
        ids, recorded = _shown_ids(replayed), replayed.transcript.prompt_ids
        if ids is not None and shows_other_prompt(replayed):
            counts = f"{len(recorded)} tokens recorded, {len(ids)} served"
            return [f"prompt: {counts}; the first other: token {equal_beginning(ids, recorded)}"], ""
        return self._fed_otherwise(replayed)

    def of_hidden(self, replayed: Replayed) -> tuple[list[str], str]:
        """Return the cause for a server that is not asked by ids, as lines, and its fix: see `of`."""
        answer, golden = answered(replayed.by_messages), replayed.transcript
        fed = self._fed_otherwise(replayed)
        if fed is not None:
            return fed
        if answer is None:
            return [], ""
        found = limit_of(golden, answer)
        if found:
            return [f"{found[0].upper()}{found[1:]}."], _LIMIT_FIX
        if self.is_random:
            return ([POOL], POOL_FIX) if self.is_pool else ([f"{_RANDOM[0].upper()}{_RANDOM[1:]}."], RANDOM_FIX)
        if (by := self._stop_words(golden, answer)) and answer.ended and self._is_beginning(golden, answer):
            return [f"The answer ends early, by {by}, or by another model."], STOP_FIX
        return [HIDDEN_PROMPT], ""

    def _fed_otherwise(self, replayed: Replayed) -> tuple[list[str], str] | None:
        """Return what changes the messages, and its fix, if the chat is fed another number of tokens; else None."""
        answer, recorded = answered(replayed.by_messages), replayed.transcript.prompt_ids
        fed = None if answer is None else answer.prompt_count
        if fed is None or fed == len(recorded):
            return None
        changed = changed_messages(self._fed, self._target.oracle)
        words, fix = ([changed.words], changed.fix) if changed is not None else ([], "")
        return [f"prompt: {len(recorded)} tokens recorded, {fed} fed to the chat", *words], fix

    @cached_property
    def _fed(self) -> list[FedPrompt]:
        """The prompts of the chats, with the number of tokens that each was fed."""
        found = [
            FedPrompt(asked_row.prompt, len(asked_row.expected), asked_row.served.count)
            for asked_row in self._target.answers.rows
            if asked_row.expected is not None
            and not isinstance(asked_row.served, InputError)
            and asked_row.served.count is not None
        ]
        for replayed in self._target.replayed:
            answer, golden = answered(replayed.by_messages), replayed.transcript
            if answer is not None and answer.prompt_count is not None:
                asked = replace(golden.row, messages=golden.row.messages[: golden.row.assistant_groups()[-1][0]])
                found.append(FedPrompt(asked, len(golden.prompt_ids), answer.prompt_count))
        return found

    def _of_answer(self, replayed: Replayed, answer: ServedAnswer, difference: FirstDifference) -> tuple[str, str]:
        """Return the cause of an answer that differs only if it is asked by a chat with the right prompt, and the fix.

        A grammar is the cause only if the same request without the grammar is answered as recorded.
        """
        golden = replayed.transcript
        limit = limit_of(golden, answer)
        if limit:
            return f"{RIGHT_PROMPT}: {limit}.", _LIMIT_FIX
        if self.is_random:
            return (
                (f"{RIGHT_PROMPT}. {POOL}", POOL_FIX) if self.is_pool else (f"{RIGHT_PROMPT}: {_RANDOM}.", RANDOM_FIX)
            )
        free = answered(self._target.answer_without_grammar(golden))
        if free is not None and self._passes(golden, free):
            return CONSTRAINED, _REFUSED_FIX if self.refused_marker(difference) else _CONSTRAINED_FIX
        by = self._stop_words(golden, answer)
        if by and answer.ended and self._is_beginning(golden, answer) and not self._says_end(answer):
            if answer.stop or answer.ids is not None or any(step.id is not None for step in answer.steps):
                return f"{RIGHT_PROMPT}: the answer ends early, by {by}; the model did not say its end.", STOP_FIX
            untold = "or by an end that is forced; which cannot be told, because the ids are hidden"
            return f"{RIGHT_PROMPT}: the answer ends early, by {by}, {untold}.", STOP_FIX
        if answer.ended and self._is_beginning(golden, answer):
            words = "the model ends the answer early; whether by a bias or by another prompt cannot be told"
            return f"{RIGHT_PROMPT}: {words}.", _UNTOLD_FIX
        return self._sampled(golden, answer, difference)

    def refused_marker(self, difference: FirstDifference | None) -> str:
        """Return the control token that a grammar refuses where an answer differs; empty for another token or the end.

        Args:
            difference: The first token of an answer that the grammar of the server constrains.
        """
        token = None if difference is None else difference.golden.id
        oracle = self._target.oracle
        return "" if token is None or token == oracle.eos_id else oracle.control_tokens.get(token, "")

    def _sampled(self, golden: Transcript, answer: ServedAnswer, difference: FirstDifference) -> tuple[str, str]:
        """Return the cause of an answer with another token, by the likeliest token at its place."""
        step = answer.steps[difference.token] if difference.token < len(answer.steps) else None
        token = difference.golden.id
        listed = [one.id for one in answer.steps[: difference.token]]
        is_aligned = answer.count is None or len(answer.steps) == answer.count
        is_aligned = is_aligned and not self._target.drafts
        if step is None or token is None or not is_aligned or listed != list(golden.completion_ids[: len(listed)]):
            reason = "because the server does not list the likeliest token where it differs"
            return f"{RIGHT_PROMPT}: the chat changes the answer; how cannot be told, {reason}.", _UNTOLD_FIX
        if step.is_best or not self._is_token(step, token):
            words = "the chat changes the answer; how cannot be told, because the server lists the other token as the "
            return f"{RIGHT_PROMPT}: {words}likeliest, as after a bias or another prompt.", _UNTOLD_FIX
        before = (*golden.prompt_ids, *golden.completion_ids[: difference.token])
        repeated = ", which occurs before, as a penalty for repetition does" if token in before else ""
        words = f"the recorded token is the likeliest, and a setting of sampling or a grammar takes another{repeated}"
        return f"{RIGHT_PROMPT}: {words}.", _SAMPLED_FIX

    def _is_token(self, step: ListedStep, token: int) -> bool:
        if step.best_id is not None:
            return step.best_id == token
        return step.best_text.strip() == self._target.oracle.decode([token]).strip()

    @cached_property
    def is_random(self) -> bool:
        """Whether an answer to messages differs from that to the same request again."""
        pairs = [(answered(replayed.by_messages), answered(replayed.again)) for replayed in self._target.replayed]
        return any(first and second and not self.is_same(first, second) for first, second in pairs)

    @cached_property
    def is_pool(self) -> bool:
        """Whether each transcript has two different answers at most, and a right one, unlike most random answers."""
        if not self.is_random:
            return False
        for replayed in self._target.replayed:
            outcomes = (replayed.by_messages, replayed.again, replayed.plain)
            answers = [answer for outcome in outcomes if (answer := answered(outcome)) is not None]
            kinds = len({(answer.text, answer.calls) for answer in answers})
            if kinds > 1 and (kinds > _TWO or not any(self._passes(replayed.transcript, answer) for answer in answers)):
                return False
        return True

    def _is_beginning(self, golden: Transcript, answer: ServedAnswer) -> bool:
        """Whether an answer has the first tokens of the recorded one, or the first letters if its ids are hidden."""
        eos = self._target.oracle.eos_id
        ids = [token for token in answer.ids or () if token != eos]
        recorded = [token for token in golden.completion_ids if token != eos]
        if answer.ids is None:
            return golden.text.startswith(answer.text.removeprefix(" " * (self._target.oracle.kind == "spm")))
        return recorded[: len(ids)] == ids

    def _says_end(self, answer: ServedAnswer) -> bool:
        """Whether the model itself ends an answer: the server lists its EOS."""
        eos = self._target.oracle.eos_id
        return eos in (answer.ids or ()) or any(step.id == eos for step in answer.steps)

    def _stop_words(self, golden: Transcript, answer: ServedAnswer) -> str:
        """Return a stop string as words; empty if the text that would follow shows that there is none."""
        text = answer.text.removeprefix(" " * (self._target.oracle.kind == "spm"))
        if not golden.text.startswith(text):
            return "a stop string"
        return stop_words(answer.stop, text, golden.text[len(text) :])


def _shown_ids(replayed: Replayed) -> tuple[int, ...] | None:
    """Return the ids of the served prompt; None if the server does not show them."""
    prompt = replayed.prompt
    return None if prompt is None or isinstance(prompt, InputError) else prompt.ids


def shows_other_prompt(replayed: Replayed) -> bool:
    """Return whether the server shows a prompt of the messages that is not the recorded one."""
    ids = _shown_ids(replayed)
    return ids is not None and ids != replayed.transcript.prompt_ids


def limit_of(golden: Transcript, answer: ServedAnswer) -> str:
    """Return which limit ends an answer before the one that was asked for, as words; empty for none."""
    length = answer.count if answer.ids is None else len(answer.ids)
    if answer.ended or length is None or length >= golden.max_new_tokens:
        return ""
    tokens = counted(length, "token")
    return f"a limit ends the answer after {tokens}, and {golden.max_new_tokens} were asked for"


def same_answer(first: ServedAnswer, second: ServedAnswer) -> bool:
    """Return whether two answers are the same to a client."""
    return (first.text, first.calls, first.ids) == (second.text, second.calls, second.ids)


def judged_passes(judgement: AnswerJudgement | str) -> bool:
    """Return whether an answer could be judged, and is as recorded."""
    return isinstance(judgement, AnswerJudgement) and judgement.passed
