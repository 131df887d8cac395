"""Chat templates with one fault each: a prefix that changes the messages before the healthy template reads them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


def each_message(change: str, keep: str = "true") -> str:
    """Return Jinja that replaces each `m` of the messages by an expression."""
    kept = f"{{%- if {keep} %}}{{%- set ns.list = ns.list + [{change}] %}}{{%- endif %}}"
    loop = f"{{%- for m in messages %}}{kept}{{%- endfor %}}"
    return f"{{%- set ns = namespace(list=[]) %}}{loop}{{%- set messages = ns.list %}}"


def _each_item(key: str, change: str) -> str:
    """Return Jinja that replaces each item `i` of a list in each message by an expression."""
    items = f"{{%- for i in m.{key} %}}{{%- set items.list = items.list + [{change}] %}}{{%- endfor %}}"
    is_list = f"m.{key} is defined and m.{key} is not string and m.{key} is not none"
    made = f"{{%- set items = namespace(list=[]) %}}{items}{{%- set ns.list = ns.list + [dict(m, {key}=items.list)] %}}"
    message = f"{{%- if {is_list} %}}{made}{{%- else %}}{{%- set ns.list = ns.list + [m] %}}{{%- endif %}}"
    loop = f"{{%- for m in messages %}}{message}{{%- endfor %}}"
    return f"{{%- set ns = namespace(list=[]) %}}{loop}{{%- set messages = ns.list %}}"


def _refuse(condition: str, words: str) -> str:
    refused = f"{{%- if {condition} %}}{{{{ raise_exception('{words}') }}}}{{%- endif %}}"
    return f"{{%- for m in messages %}}{refused}{{%- endfor %}}"


def _stripped(role: str) -> str:
    return each_message(f"dict(m, content=m.content|trim) if m.role == '{role}' and m.content is string else m")


_BEFORE = "messages[loop.index0 - 1]"
_HAS_CHUNKS = "m.content is defined and m.content is not string and m.content is not none"

FAULTY: Mapping[str, str] = MappingProxyType(
    {
        "call-without-content-refused": _refuse("m.tool_calls and m.content is not defined", "no content"),
        "neighbours-not-joined": _refuse(
            f"not loop.first and m.role == {_BEFORE}.role and m.role in ['user', 'assistant']", "roles must alternate"
        ),
        "chunks-not-joined": each_message(
            f"dict(m, content=m.content|map(attribute='text')|join('')) if m.role == 'user' and {_HAS_CHUNKS} else m"
        ),
        "several-system-messages": _refuse(
            f"not loop.first and m.role == 'system' and {_BEFORE}.role == 'system'", "one system message"
        ),
        "empty-system-prompt-written": each_message(
            "dict(m, content='-') if m.role == 'system' and not m.content else m"
        ),
        "tool-calls-refused": _refuse("m.role == 'tool' or m.tool_calls", "only user and assistant"),
        "system-prompt-dropped": each_message("m", "m.role != 'system'"),
        "later-system-message-dropped": each_message("m", "loop.first or m.role != 'system'"),
        "tools-not-rendered": "{%- set tools = none %}",
        "content-beside-call-dropped": each_message("dict(m, content='') if m.tool_calls else m"),
        "thinking-dropped": each_message(
            "dict(m, content=m.content|selectattr('type', 'equalto', 'text')|map(attribute='text')|join('\\n\\n'))"
            f" if {_HAS_CHUNKS} and m.role != 'tool' else m"
        ),
        "open-thinking-closed": _each_item("content", "dict(i, closed=true) if i.type == 'thinking' else i"),
        "arguments-quoted-twice": _each_item(
            "tool_calls",
            "dict(i, function=dict(i.function, arguments=i.function.arguments|tojson))"
            " if i.function.arguments is string else i",
        ),
        "user-text-stripped": _stripped("user"),
        "answer-stripped": _stripped("assistant"),
        "system-prompt-stripped": _stripped("system"),
        "result-stripped": _stripped("tool"),
    }
)
"""The prefix that gives a template each named fault."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""A template of another layout, which marks no answers."""
CHATML_MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
)
"""The same with marks around its answers."""
