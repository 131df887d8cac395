"""A server of mistral-common's prompts, and servers that feed their model others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from gallery import Artifact, mutant
from golden_answers import golden_answers, write_golden_answers
from local_server import CRASH, FORCED, Behaviour, Ids, has_calls, serving, space_for_an_empty_text, two_users
from trained import copied, trained

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import OracleRejection
from pytest_mistral_lora.records.notes import declare_again

SPACE, INST = 29473, 3


@cache
def oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


class ServerBench:
    """Starts a server on the loopback, and judges it."""

    subject = "server"

    def make(self, folder: Path) -> Artifact:
        """Return a server that feeds its model the prompts of mistral-common."""
        behaviour = Behaviour(oracle())
        given = {"kind": "llamacpp", "precision": "", "model": "", "port": None, "golden": (), "given": ()}
        given |= {"named_adapters": (), "adapter": None}
        return {"folder": folder, "behaviour": behaviour, **given}

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Run every check of the subject on the server."""
        judge = Target("spm-v3", shipped_tokenizer("spm-v3"))
        with serving(artifact["behaviour"]) as url:
            names = ("kind", "precision", "model", "golden", "given", "named_adapters", "adapter")
            given = {name: artifact[name] for name in names}
            target = ServerTarget("local", judge=judge, url=artifact["port"] or url, **given)
            settings = Settings(20, None, "cpu", True, (), False, artifact["folder"])
            found = [finding for check in collect([target], settings) for finding in check.run().findings]
        return [_at_the_usual_port(finding, url) for finding in found]


def _at_the_usual_port(finding: Finding, url: str) -> Finding:
    return replace(finding, place=str(finding.place).replace(url, "http://127.0.0.1:8080"))


BENCH = ServerBench()


def spaced(ids: tuple[int, ...], data: dict[str, Any]) -> tuple[int, ...]:
    """Put a space behind the first [INST]."""
    at = ids.index(INST) + 1
    return (*ids[:at], SPACE, *ids[at:])


def literal(ids: tuple[int, ...], data: dict[str, Any]) -> tuple[int, ...]:
    """Make a control token of a text that spells [/INST]."""
    spelled = oracle().encode_text("[/INST]")
    for at in range(len(ids) - len(spelled)):
        if ids[at + 1 : at + len(spelled)] == spelled[1:] and oracle().piece(ids[at]).endswith("["):
            return (*ids[:at], SPACE, 4, *ids[at + len(spelled) :])
    return ids


def replayed(artifact: Artifact, **behaviour: Any) -> None:
    """Have the server answer golden transcripts as recorded, but for a change of its behaviour."""
    # the packaged rows have mutants of their own
    artifact["given"] = (golden_answers(oracle())[0].row,)
    artifact["golden"] = (write_golden_answers(oracle(), artifact["folder"] / "answers"),)
    given = {"golden": golden_answers(oracle()), **behaviour}
    artifact["behaviour"] = replace(artifact["behaviour"], **given)


def changed_texts(artifact: Artifact, change: Callable[[str, dict[str, Any]], str]) -> None:
    """Have a vLLM answer golden transcripts with the recorded ids, and change the text of each chat."""

    class Changing(Behaviour):
        """Changes each text."""

        def chat_answer(self, fed: tuple[int, ...], data: dict[str, Any]) -> dict[str, Any]:
            answer = super().chat_answer(fed, data)
            message = answer["choices"][0]["message"]
            message["content"] = change(message["content"], data)
            return answer

    artifact |= {"kind": "vllm", "precision": "fp32"}
    replayed(artifact, scale=None)
    artifact["behaviour"] = Changing(**vars(artifact["behaviour"]))


def reworded(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Put another token in the first place of an answer."""
    return (oracle().encode_text("Rome")[0], *ids[1:])


def by_ids(data: dict[str, Any]) -> bool:
    """Whether a request has ids as its prompt."""
    return "prompt" in data


def two_adapters(artifact: Artifact, completion: Callable[[tuple[int, ...], dict[str, Any]], tuple[int, ...]]) -> None:
    """Serve two adapters by vLLM, `tuned` and `other`, whose recorded answers differ."""
    folder = artifact["folder"]
    recorded = golden_answers(oracle())[:2]
    (folder / "other").mkdir()
    for transcript in recorded:
        ids = reworded(transcript.completion_ids)
        replace(transcript, completion_ids=ids, text=oracle().decode(ids)).write(folder / "other")
    (folder / "tuned").mkdir()
    for transcript in recorded:
        transcript.write(folder / "tuned")
    artifact |= {"kind": "vllm", "given": (recorded[0].row,)}
    artifact["named_adapters"] = tuple((name, folder / name) for name in ("tuned", "other"))
    models = ({"id": "base"}, {"id": "tuned", "parent": "base"}, {"id": "other", "parent": "base"})
    given = {"golden": recorded, "models": models, "completion": completion}
    artifact["behaviour"] = replace(artifact["behaviour"], **given)


def deployed(artifact: Artifact, served_as: str, models: Sequence[dict[str, str]] = ({"id": "support"},)) -> None:
    """Let an adapter declare that production serves it as `support`, on a server of these models."""
    folder = copied(trained().adapter, artifact["folder"] / "lora")
    declare_again(folder, {"deployment": {"as": served_as, "name": "support"}, "evaluation": []})
    artifact["adapter"] = folder
    artifact["behaviour"] = replace(artifact["behaviour"], models=models)


@mutant("ML933", "N145", says="support is served as a whole model")
def an_adapter_left_out(artifact: Artifact) -> None:
    """The server has the declared name, and no adapter loaded."""
    deployed(artifact, "adapter")
    artifact["behaviour"] = replace(artifact["behaviour"], scale=None)


@mutant("ML933", "N145", says="serves tiny")
def another_name(artifact: Artifact) -> None:
    """The server has no model of the declared name."""
    deployed(artifact, "adapter", models=({"id": "tiny"},))


@mutant("ML933", says="support is served as an adapter")
def an_adapter_in_place_of_its_merge(artifact: Artifact) -> None:
    """vLLM lists the declared name with a parent, and the folder declares a merged model."""
    deployed(artifact, "merged", models=({"id": "base"}, {"id": "support", "parent": "base"}))
    artifact["kind"] = "vllm"


@mutant("ML933", says="support is served as a whole model")
def a_name_without_a_parent(artifact: Artifact) -> None:
    """vLLM lists the declared name without a parent, and the folder declares an adapter."""
    deployed(artifact, "adapter")
    artifact["kind"] = "vllm"


@mutant("ML932", "N145", says="tuned answers as other")
def swapped_adapters(artifact: Artifact) -> None:
    """The paths of two adapters are swapped."""
    two_adapters(artifact, lambda ids, data: reworded(ids) if data.get("model") == "tuned" else ids)


@mutant("ML932", "N145", says="tuned answers as the base")
def a_name_of_the_base(artifact: Artifact) -> None:
    """One of two adapters is not applied."""
    of_base = (*oracle().encode_text("Something else"), 2)

    def completion(ids: tuple[int, ...], data: dict[str, Any]) -> tuple[int, ...]:
        if data.get("model") == "tuned":
            return of_base
        return reworded(ids) if data.get("model") == "other" else ids

    two_adapters(artifact, completion)


@mutant("ML932", "N145", says="tuned answers as no adapter that you named")
def a_name_with_ids_of_another_vocabulary(artifact: Artifact) -> None:
    """One of two names answers with an id that the tokenizer has not."""
    beyond = (10**6, 2)

    def completion(ids: tuple[int, ...], data: dict[str, Any]) -> tuple[int, ...]:
        return beyond if data.get("model") == "tuned" else reworded(ids) if data.get("model") == "other" else ids

    two_adapters(artifact, completion)


@mutant("ML901", says="no server answers there")
def nobody_is_there(artifact: Artifact) -> None:
    """No process listens at the address."""
    artifact["port"] = "http://127.0.0.1:9"


@mutant("ML901", says="HTTP 404")
def another_server(artifact: Artifact) -> None:
    """Another server is at the address."""
    artifact["behaviour"].answer = lambda path: (404, b"<html>not found</html>")


@mutant("ML919", says="the request fails: HTTP 500: oops")
def each_chat_fails(artifact: Artifact) -> None:
    """The server lists its model, and each request fails."""
    artifact["behaviour"].answer = lambda path: (500, b"oops") if path == "/apply-template" else None


@mutant("ML901", says="a whole number")
def ids_that_are_none(artifact: Artifact) -> None:
    """The ids of a prompt are texts."""
    artifact["behaviour"].answer = lambda path: (200, b'{"tokens": ["<s>"]}') if path == "/tokenize" else None


@mutant("ML902", "N90", says="ML528")
def a_second_space(artifact: Artifact) -> None:
    """The server puts a space behind [INST]."""
    artifact["behaviour"].prompt = spaced


@mutant("ML902", says="BOS is there 2 times")
def a_second_bos(artifact: Artifact) -> None:
    """vLLM writes a second BOS."""
    artifact["kind"] = "vllm"
    artifact["behaviour"].prompt = lambda ids, _: (1, *ids)


@mutant("ML902", says="ML535")
def the_name_of_a_template(artifact: Artifact) -> None:
    """Each prompt is the name of a template."""
    artifact["behaviour"].prompt = lambda ids, _: (1, *oracle().encode_text("mistral-v3-tekken"))


@mutant("ML902", says="(empty-text-space) that is not known of llama.cpp b8671-0a1b2c3")
def a_deviation_of_an_older_build(artifact: Artifact) -> None:
    """An empty text has a space, as newer builds are known to write it."""
    artifact["behaviour"].prompt = space_for_an_empty_text
    artifact["behaviour"].version = "b8671-0a1b2c3"


@mutant("ML902", says="expected '' (ML528)")
def twice_a_deviation_that_is_known(artifact: Artifact) -> None:
    """An empty text has two spaces, and the deviation that is known is one."""
    artifact["behaviour"].prompt = lambda ids, data: space_for_an_empty_text(space_for_an_empty_text(ids, data), data)
    artifact["behaviour"].version = "b11549-8b3f1c2"


@mutant("ML902", says="100% of the prompts have the ids of tekken-240718 or tekken-240911, and")
def prompts_of_another_tokenizer(artifact: Artifact) -> None:
    """The server has another tokenizer than the one that was named."""
    artifact["behaviour"].oracle = Oracle(shipped_tokenizer("tekken-240911"))


@mutant("ML904", says="100% of the prompts have as many tokens as by tekken-240718 or tekken-240911, and")
def as_many_tokens_as_by_another_tokenizer(artifact: Artifact) -> None:
    """A server that hides its ids has another tokenizer than the one that was named."""
    artifact["kind"] = "openai"
    artifact["behaviour"].oracle = Oracle(shipped_tokenizer("tekken-240911"))


@mutant("ML903", says="the preview has")
def a_preview_that_lies(artifact: Artifact) -> None:
    """The preview is right, and the chat has a second BOS."""
    artifact["behaviour"].preview = lambda ids, _: ids
    artifact["behaviour"].prompt = lambda ids, _: (1, *ids)


@mutant("ML904", says="prompt tokens")
def one_token_more(artifact: Artifact) -> None:
    """A server that hides its ids has a BOS more."""
    artifact["kind"] = "openai"
    artifact["behaviour"].prompt = lambda ids, _: (1, *ids)


@mutant("ML906", says="[/INST]")
def a_marker_in_the_text(artifact: Artifact) -> None:
    """A text that spells [/INST] becomes the marker."""
    artifact["behaviour"].prompt = literal


@mutant("ML906", says="[/INST]")
def a_marker_in_one_text_of_a_known_build(artifact: Artifact) -> None:
    """A build that is known to encode the rendered text makes one text a marker, and leaves the others as letters."""
    artifact["behaviour"].prompt = literal
    artifact["behaviour"].version = "b11549-8b3f1c2"


def is_refused(data: dict[str, Any]) -> bool:
    """Whether mistral-common refuses the messages of a request."""
    try:
        Behaviour(oracle()).ids(data)
    except OracleRejection:
        return True
    return False


@mutant("ML919", says="HTTP 500: Unable to generate parser for this template")
def a_template_that_crashes(artifact: Artifact) -> None:
    """The template of the server ends in an error for each row with a tool call, which is answered with status 500."""
    artifact["behaviour"] = Behaviour(oracle(), refuses=has_calls, refusal=(500, CRASH))


@mutant("ML919", says="HTTP 400: Unable to generate parser for this template")
def a_template_that_crashes_with_status_400(artifact: Artifact) -> None:
    """The same with the status of a refusal."""
    artifact["behaviour"] = Behaviour(oracle(), refuses=has_calls, refusal=(400, CRASH))


@mutant("ML919", says=f"HTTP 400: {FORCED}")
def libraries_that_do_not_fit_together(artifact: Artifact) -> None:
    """vLLM calls mistral-common with an argument too few, and answers each request with the status of a refusal."""
    artifact["kind"] = "vllm"
    artifact["behaviour"] = Behaviour(oracle(), refuses=lambda _: True, refusal=(400, FORCED))


@mutant("ML907", says="HTTP 500: Error: Jinja Exception: Conversation roles must alternate")
def a_template_that_refuses_with_status_500(artifact: Artifact) -> None:
    """The template of the server refuses rows by its own word, and the status is that of a failure."""
    words = "Error: Jinja Exception: Conversation roles must alternate"
    artifact["behaviour"] = Behaviour(oracle(), refuses=two_users, refusal=(500, words))


@mutant("ML901", says="choices is missing in an object of 0")
def chats_of_nothing(artifact: Artifact) -> None:
    """Each chat is answered with an empty object."""
    artifact |= {"kind": "openai"}
    artifact["behaviour"].answer = lambda path: (200, b"{}") if path == "/v1/chat/completions" else None


@mutant("ML932", says="tuned answers as recorded, and its log-probabilities moved by 0.4 nats at most")
def an_older_adapter_under_a_name(artifact: Artifact) -> None:
    """One of two adapters is an older one, whose greedy answers are the same."""

    class Older(Behaviour):
        """Moves the log-probabilities of one adapter."""

        def _answer(self, prompt: Ids, data: dict[str, Any]) -> tuple[list[int], list[float], bool]:
            ids, values, ended = super()._answer(prompt, data)
            return ids, [value - 0.4 * (data.get("model") == "tuned") for value in values], ended

    two_adapters(artifact, lambda ids, data: reworded(ids) if data.get("model") == "other" else ids)
    artifact["precision"] = "fp32"
    artifact["behaviour"] = Older(**vars(artifact["behaviour"]))


@mutant("ML901", says="no answer has the ids of its prompt, or their number")
def answers_without_a_number(artifact: Artifact) -> None:
    """The answers have a text, and neither ids nor the number of prompt tokens."""
    artifact |= {"kind": "openai"}
    body = b'{"choices": [{"message": {"content": "x"}}]}'
    artifact["behaviour"].answer = lambda path: (200, body) if path == "/v1/chat/completions" else None


@mutant("ML908", says="No adapter is loaded: the server lists none")
def no_adapter(artifact: Artifact) -> None:
    """The base is served without the adapter of the transcripts."""
    replayed(artifact, scale=None, completion=lambda ids, _: reworded(ids))


@mutant("ML908", says="No adapter is asked: base is the parent of the adapters that the server lists: tuned")
def the_base_of_an_adapter(artifact: Artifact) -> None:
    """The adapter is served under another name, and the base is asked."""
    artifact |= {"kind": "vllm", "model": "base"}
    replayed(
        artifact, models=({"id": "base"}, {"id": "tuned", "parent": "base"}), completion=lambda ids, _: reworded(ids)
    )


@mutant("ML908", says="served in q4, as stated, and were recorded in fp32: the quantisation may be the whole cause")
def fewer_bits(artifact: Artifact) -> None:
    """The weights are served in fewer bits than those that were recorded."""
    artifact |= {"precision": "q4"}
    replayed(artifact, completion=lambda ids, _: reworded(ids))


@mutant("ML907", says="roles must alternate")
def two_users_refused(artifact: Artifact) -> None:
    """The server refuses rows with two messages of the user in a row."""
    artifact["behaviour"].refuses = two_users


@mutant("ML905", says="has the log-probability -0.2000, and not -0.1000")
def first_token_less_likely(artifact: Artifact) -> None:
    """A server that hides its ids gives the first token another probability, and the same answer."""
    artifact |= {"kind": "openai", "precision": "fp32"}
    replayed(artifact, shows_ids=False, logprob=lambda value, at: value - 0.1 * (at == 0))


@mutant("ML908", says="found 11595 '▁Rome'")
def numbers_of_another_model(artifact: Artifact) -> None:
    """The ids of a prompt are answered otherwise, and its messages as recorded."""
    replayed(artifact, completion=lambda ids, data: reworded(ids) if by_ids(data) else ids)


@mutant("ML908", says="answered with the id 1000000000, of a vocabulary of 32768")
def an_answer_of_ids_that_are_none(artifact: Artifact) -> None:
    """The answer has an id that no tokenizer has."""
    replayed(artifact, completion=lambda ids, data: (10**9, *ids[1:]) if by_ids(data) else ids)


@mutant("ML908", says="margin when recorded: 5 nats")
def another_adapter(artifact: Artifact) -> None:
    """The server has another adapter."""
    replayed(artifact, completion=lambda ids, _: reworded(ids))


@mutant("ML919", says="the request fails: HTTP 500: oops")
def completions_fail(artifact: Artifact) -> None:
    """Each request with ids fails."""
    replayed(artifact, answer=lambda path: (500, b"oops") if path == "/completion" else None)


@mutant("ML902 ML909", says="By ids exact, by chat different: the model and adapter are right, the prompt is not.")
def the_prompt_is_not_right(artifact: Artifact) -> None:
    """The server puts a space behind [INST], and serves the right adapter."""
    replayed(artifact, prompt=spaced)


@mutant("ML909", says="without its grammar the server answers as recorded, so the grammar constrains the answer")
def a_grammar_of_calls(artifact: Artifact) -> None:
    """The grammar of a server ends each call early, unless the tool choice is `none`."""

    def constrained(ids: tuple[int, ...], data: dict[str, Any]) -> tuple[int, ...]:
        return (*ids[:4], 2) if data.get("tools") and data.get("tool_choice") != "none" else ids

    replayed(artifact, completion=constrained)


@mutant("ML908", says="the answers are as recorded, and their log-probabilities moved by 0.11 nats at most")
def weights_that_answer_the_same(artifact: Artifact) -> None:
    """The server has another revision of the base, whose greedy answers are the same."""
    replayed(artifact, logprob=lambda value, at: value - 0.11)


@mutant("ML909", says="By ids they did not move")
def a_prompt_that_is_answered_the_same(artifact: Artifact) -> None:
    """The chat has another prompt, whose greedy answers are the same."""

    class Chats(Behaviour):
        """Moves the log-probabilities of chats alone."""

        def chat_answer(self, fed: tuple[int, ...], data: dict[str, Any]) -> dict[str, Any]:
            answer = super().chat_answer(fed, data)
            for step in (answer["choices"][0].get("logprobs") or {"content": []})["content"]:
                step["logprob"] -= 0.11
            return answer

    replayed(artifact)
    artifact["behaviour"] = Chats(**vars(artifact["behaviour"]))


@mutant("ML909", says="the answer ends early, by a stop string")
def a_stop_string(artifact: Artifact) -> None:
    """A proxy in front of the server ends each answer of a chat at its second token."""
    replayed(artifact, completion=lambda ids, data: ids if by_ids(data) else ids[:2])


@mutant("ML909", says="the client gets only the beginning of their text")
def a_text_that_is_cut(artifact: Artifact) -> None:
    """A stop string cuts the text of a chat, and leaves its token among the ids, as vLLM does."""

    changed_texts(artifact, lambda text, _: text.partition(" it")[0])


@mutant("ML909", says="the client gets another text: the parser of the server or a gateway changes the message")
def a_text_that_is_masked(artifact: Artifact) -> None:
    """A filter of contents masks a word of each chat behind the model, whose ids are right."""
    changed_texts(artifact, lambda text, _: text.replace("Paris", "****"))


@mutant("ML909", says="as a stream the client gets text '")
def a_stream_that_is_masked(artifact: Artifact) -> None:
    """A filter of contents masks a word in streams alone."""
    changed_texts(artifact, lambda text, data: text.replace("Paris", "****") if data.get("stream") else text)


@mutant("ML906", says="where the server parses no control tokens")
def markers_of_another_type(artifact: Artifact) -> None:
    """The file has its control tokens as user-defined ones, which each text spells."""

    class Typed(Behaviour):
        """Encodes letters as control tokens."""

        def respond(self, path: str, data: Any) -> tuple[int, Any]:
            is_text = path == "/tokenize" and not data["parse_special"]
            return (200, {"tokens": [INST]}) if is_text else super().respond(path, data)

    artifact["behaviour"] = Typed(**vars(artifact["behaviour"]))


@mutant("ML911", says="gets repeat_penalty 1.5, at temperature 0, too")
def a_penalty_that_is_shown(artifact: Artifact) -> None:
    """The server shows a penalty among its defaults, and these answers do not change by it."""

    class Showing(Behaviour):
        """Shows a default."""

        def respond(self, path: str, data: Any) -> tuple[int, Any]:
            status, found = super().respond(path, data)
            params = {"repeat_penalty": 1.5, "temperature": 0.800000011920929}
            return status, {**found, "default_generation_settings": {"params": params}} if path == "/props" else found

    replayed(artifact)
    artifact["behaviour"] = Showing(**vars(artifact["behaviour"]))


@mutant("ML907", says="exceeds the available context size")
def a_context_that_is_too_small(artifact: Artifact) -> None:
    """The context of the server is smaller than a prompt."""
    words = "request (300 tokens) exceeds the available context size (256 tokens), try increasing it"
    given = {"refuses": lambda data: bool(data.get("tools")), "refusal": (400, words)}
    artifact["behaviour"] = replace(artifact["behaviour"], **given)


@mutant("ML909", says="a limit ends the answer after 3 tokens, and 64 were asked for")
def a_limit_of_chats(artifact: Artifact) -> None:
    """A proxy in front of the server limits the answers of a chat to three tokens."""
    replayed(artifact, completion=lambda ids, data: ids if by_ids(data) else ids[:3], longest=3)


@mutant("ML909 ML911", says="two answers to one request differ, so they are not greedy")
def a_temperature_of_chats(artifact: Artifact) -> None:
    """A proxy in front of the server sets a temperature for each chat."""
    drawn = iter(oracle().encode_text("one two three four five six seven eight nine ten " * 9))
    replayed(artifact, completion=lambda ids, data: ids if by_ids(data) else (next(drawn), *ids[1:]))


@mutant("ML903 ML909", says="tokens recorded, ")
def messages_that_are_changed_on_the_way(artifact: Artifact) -> None:
    """A proxy in front of the server adds to the messages of a chat, and leaves its preview as it is."""
    replayed(artifact, preview=lambda ids, _: ids, prompt=lambda ids, _: (1, *ids))


@mutant("ML909", says="the client gets other calls")
def a_call_of_another_tool(artifact: Artifact) -> None:
    """vLLM reads a name in a call that the model did not say."""
    artifact |= {"kind": "vllm"}
    replayed(artifact, named="weathers")


@mutant("ML909", says="the server leaves their calls in the text")
def a_call_that_is_not_read(artifact: Artifact) -> None:
    """The server does not read tool calls."""
    replayed(artifact, reads_calls=False)


@mutant("ML909", says='answered \'weather({"city": "Bergen"})\'')
def another_argument_of_a_call(artifact: Artifact) -> None:
    """The answer is right, and the server reads another argument in its call."""
    artifact |= {"kind": "openai"}
    replayed(artifact, shows_ids=False, completion=lambda ids, data: in_bergen(ids) if data.get("tools") else ids)


def in_bergen(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Put another city in a call."""
    text = oracle().decode(ids[1:-1]).replace("Oslo", "Bergen")
    return (ids[0], *oracle().encode_text(text), ids[-1]) if ids[0] == oracle().tool_calls_id else ids


@mutant("ML910", says="answered as by the base")
def an_adapter_that_does_nothing(artifact: Artifact) -> None:
    """The base answers as the adapter does: it is loaded, and not applied."""
    replayed(artifact, base=golden_answers(oracle()))


@mutant("ML910", says="the adapter lora.gguf has the scale 0")
def an_adapter_of_scale_0(artifact: Artifact) -> None:
    """The adapter is loaded with the scale 0."""
    replayed(artifact, scale=0.0)


@mutant("ML910", says="has the scale 0.5")
def half_an_adapter(artifact: Artifact) -> None:
    """The adapter is loaded with the scale 0.5."""
    replayed(artifact, scale=0.5)


@mutant("ML911", says="asked with the temperature 0 alone, it answers")
def a_penalty_of_the_server(artifact: Artifact) -> None:
    """A default of the server changes greedy answers, unless a request spells it out."""
    replayed(artifact, completion=lambda ids, data: ids if by_ids(data) or "repeat_penalty" in data else reworded(ids))


@mutant("ML911", says="asked twice, it answers")
def an_answer_that_is_not_greedy(artifact: Artifact) -> None:
    """The second answer to a prompt is another."""
    seen: set[str] = set()

    def second(ids: tuple[int, ...], data: dict[str, Any]) -> tuple[int, ...]:
        key = str(data.get("messages"))
        spelled_out = "repeat_penalty" in data and not by_ids(data)
        again = spelled_out and key in seen
        seen.update([key] if spelled_out else [])
        return reworded(ids) if again else ids

    replayed(artifact, completion=second)


@mutant("ML801", says="golden transcript")
def a_transcript_cut_off(artifact: Artifact) -> None:
    """A transcript ends early."""
    replayed(artifact)
    file = artifact["golden"][0] / "capital.json"
    file.write_bytes(file.read_bytes()[:300])


@mutant("ML802", says="prompt token 1 is")
def a_transcript_of_another_tokenizer(artifact: Artifact) -> None:
    """A transcript has other ids of its prompt than the tokenizer makes."""
    replayed(artifact)
    [one] = [one for one in golden_answers(oracle()) if one.case == "capital"]
    replace(one, prompt_ids=(1, 1, *one.prompt_ids[1:])).write(artifact["golden"][0])
