"""Chat templates that differ between their places, are unsafe, or write other texts than they should."""

from __future__ import annotations

from bench_tokenizer import DEFAULT, TODAY, with_own_prompt, without_system
from gallery import Artifact, mutant


@mutant("ML206", says="the chat template changes")
def template_with_carriage_returns(artifact: Artifact) -> None:
    """A template with carriage returns loses them when it is saved to a file and read as text."""
    (artifact["folder"] / "chat_template.jinja").unlink()
    artifact["tokenizer_config"]["chat_template"] = artifact["template"].replace("\n", "\r\n")


@mutant("ML220", "I26", says="is not that of chat_template.jinja")
def template_differs_between_places(artifact: Artifact) -> None:
    """`tokenizer_config.json` has kept an old template."""
    artifact["tokenizer_config"]["chat_template"] = artifact["template"].replace("[INST]", "[INST] ")


@mutant("ML220", "I26")
def additional_default_differs(artifact: Artifact) -> None:
    """The additional templates include a default that differs."""
    more = artifact["folder"] / "additional_chat_templates"
    more.mkdir()
    (more / "default.jinja").write_text(artifact["template"] + "{# another #}")


@mutant("ML220", says="no default")
def no_default_template(artifact: Artifact) -> None:
    """There is a template for tools, and no default."""
    (artifact["folder"] / "chat_template.jinja").unlink()
    artifact["tokenizer_config"]["chat_template"] = [{"name": "tool_use", "template": artifact["template"]}]


@mutant("ML201 ML209", says="'../../out'")
def template_name_leads_out(artifact: Artifact) -> None:
    """A named template would be saved outside the folder."""
    (artifact["folder"] / "chat_template.jinja").unlink()
    named = [{"name": name, "template": artifact["template"]} for name in ("default", "../../out")]
    artifact["tokenizer_config"]["chat_template"] = named


@mutant("ML221", says="steps")
def endless_loop(artifact: Artifact) -> None:
    """Nested loops run for years."""
    artifact["template"] = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@mutant("ML221", says="MiB")
def enormous_text(artifact: Artifact) -> None:
    """The template makes a text of many gigabytes."""
    artifact["template"] = "{{ 'x' * 10 ** 11 }}" + artifact["template"]


@mutant("ML221", says="__class__")
def unsafe_attributes(artifact: Artifact) -> None:
    """The template reaches for Python's classes."""
    artifact["template"] += "{% if false %}{{ ''.__class__.__mro__ }}{% endif %}"


@mutant("ML221", says="another template")
def include(artifact: Artifact) -> None:
    """The template loads another one."""
    artifact["template"] += "{% if false %}{% include 'other.jinja' %}{% endif %}"


@mutant("ML222", says="is not a template")
def syntax_error(artifact: Artifact) -> None:
    """The template is cut in a tag."""
    artifact["template"] += "{% if"


@mutant("ML222", says="cannot render")
def refuses_everything(artifact: Artifact) -> None:
    """The template refuses a plain question."""
    artifact["template"] = "{{ raise_exception('not today') }}"


@mutant("ML222", says="prints closing_words")
def missing_variable(artifact: Artifact) -> None:
    """The template prints a variable that nothing gives."""
    artifact["template"] += "{{ closing_words }}"


@mutant("ML223", says="strftime_now")
def clock(artifact: Artifact) -> None:
    """The template reads the clock."""
    artifact["template"] = TODAY + artifact["template"]


@mutant("ML224 ML226", says="sailor")
def default_system_prompt(artifact: Artifact) -> None:
    """The template writes a system prompt of its own where a row has none."""
    artifact["template"] = DEFAULT + artifact["template"]


@mutant("ML224", says="holds {today}, which no library replaces")
def own_prompt_with_a_placeholder(artifact: Artifact) -> None:
    """The system prompt of the template's own has a name in braces, as six published ones have."""
    artifact["template"] = with_own_prompt(artifact["template"], "You are kind. Today is {today}.")


@mutant("ML223 ML224", says="holds the date of today")
def own_prompt_with_a_date(artifact: Artifact) -> None:
    """The system prompt of the template's own has a date of the clock, as Mistral Small 3.1's has."""
    dated = with_own_prompt(artifact["template"], "Today is ' ~ strftime_now('%Y-%m-%d') ~ '.")
    artifact["template"] = dated


@mutant("ML222", "I60", says="the chat template is empty")
def empty_template(artifact: Artifact) -> None:
    """The chat template is a file without a letter."""
    artifact["template"] = ""


_CUT = "{% set messages = messages[-10:] if messages | length > 10 else messages %}"


_SHORTENED = (
    "{% set new = namespace(messages=[]) %}{% for m in messages %}"
    "{% set new.messages = new.messages + [dict(m, content=m.content[:9999])] %}{% endfor %}"
    "{% set messages = new.messages %}"
)


@mutant("ML225", "I12", says="'Question 0' is left out of a conversation of 48 messages")
def long_conversation_is_cut(artifact: Artifact) -> None:
    """The template keeps the last ten messages."""
    artifact["template"] = _CUT + artifact["template"]


@mutant("ML225", "I12", says="is left out of a question of 60,000 letters")
def long_text_is_cut(artifact: Artifact) -> None:
    """The template keeps the beginning of a text."""
    artifact["template"] = _SHORTENED + artifact["template"]


@mutant("ML225", "N10", says="is left out of an answer with a thought in tags")
def thoughts_are_dropped(artifact: Artifact) -> None:
    """The template leaves thoughts out of answers, as those of other families do."""
    artifact["template"] = (
        _SHORTENED.replace("m.content[:9999]", "m.content.split('</think>')[-1]") + artifact["template"]
    )


@mutant("ML225", "I12", says="is left out")
def system_prompt_dropped(artifact: Artifact) -> None:
    """The template leaves the system prompt out if the row ends with an answer."""
    artifact["template"] = without_system(artifact["template"])


@mutant("ML203 ML226", "I60", says="writes bos_token")
def bos_is_not_set(artifact: Artifact) -> None:
    """BOS and EOS are not set, and the template writes them as nothing."""
    artifact["tokenizer_config"].update(bos_token=None, eos_token=None)
    (artifact["folder"] / "special_tokens_map.json").unlink()


@mutant("ML226", says="ends with")
def template_without_eos(artifact: Artifact) -> None:
    """The template does not close an answer."""
    artifact["template"] = artifact["template"].replace("eos_token", "'' ")


@mutant("ML226 ML227", "I03", says="encoding a rendered text adds")
def two_bos_in_the_template(artifact: Artifact) -> None:
    """The template writes BOS twice, and the tokenizer a third."""
    artifact["template"] = "{{- bos_token }}" + artifact["template"]
    artifact["tokenizer_json"]["post_processor"] = artifact["bos_post_processor"]


@mutant("ML227", "I03", says="encoding a rendered text adds 1 tokens")
def bos_again_by_the_tokenizer(artifact: Artifact) -> None:
    """The tokenizer puts BOS before every text, rendered conversations too."""
    artifact["tokenizer_json"]["post_processor"] = artifact["bos_post_processor"]
