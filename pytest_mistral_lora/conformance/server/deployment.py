"""Whether a server serves what the folder of an adapter or a merged model declares: under its name, and as that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.server_target import NotServedError, ServerTarget
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.serving.server import Server, ServerFacts

_WORDS = {"adapter": "an adapter", "merged": "a whole model"}


def not_served(target: ServerTarget, error: NotServedError) -> Result:
    """ML933: the server has no model of the declared name, for which the other checks would have asked."""
    return Result((Finding("ML933", error.found, Place.of(target.url), error.expected),))


def judged_deployment(target: ServerTarget) -> Result:
    """ML933: the server has a model of the declared name, and serves it as it is declared."""
    declared, facts, server = target.declared, target.answers.facts, target.server
    if declared is None or target.is_elsewhere:
        return Result(not_checked=f"{target.adapter} declares another server than this one")
    if not server.lists_models:
        return Result(not_checked=f"{server.title} does not list what the server serves")
    name = str(declared["name"])
    if name not in facts.models:
        return not_served(target, NotServedError.of(target, facts))
    served = _served_as(server, facts, name)
    if not served:
        return Result(not_checked=f"{server.title} does not show whether {name} is an adapter or a whole model")
    if served != declared["as"]:
        found, expected = f"{name} is served as {_WORDS[served]}", f"{_WORDS[declared['as']]}, {target.declared_by}"
        return Result((Finding("ML933", found, Place.of(target.url), expected),))
    return Result(facts=(("deployment of", f"{name} is served as {_WORDS[served]}, {target.declared_by}"),))


def _served_as(server: Server, facts: ServerFacts, name: str) -> str:
    """Return `adapter` or `merged`, by what the server lists; empty if that does not tell."""
    if facts.scales is not None:
        # one that is loaded with the scale 0 may be switched on in each request
        scales = [scale for _, scale in facts.scales]
        return "adapter" if any(scales) else "" if scales else "merged"
    if name in facts.adapters:
        return "adapter"
    return "merged" if facts.adapters or server.lists_parents else ""
