"""The address of a server, as a recipe, a manifest and a command line name it."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.secrets import SERVER_KEY

_SHOWN = 300
"""The most characters of an address in a message."""


def require_url(url: str) -> str:
    """Return the address of a server without a slash at its end.

    Raises:
        InputError: If it is not an address, or would send prompts over an open network in plain text.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname if parts.port != 0 else ""
        (host or "").encode("idna")
    except ValueError:  # unclosed brackets, a port beyond 65535, or a host that is no name of a domain
        host = ""
    if not host or parts.scheme not in ("http", "https") or not url.isprintable():
        expected = "http://127.0.0.1:8080" if "://" in url else f"http://{url[:_SHOWN]}"
        raise InputError("no address of a server", place=url[:_SHOWN], expected=expected)
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if parts.scheme == "http" and not is_loopback:
        raise InputError(
            "http to another machine: prompts and the key would cross the network in plain text",
            place=url[:_SHOWN],
            expected="https, or http to 127.0.0.1",
            next_step="Forward the port: ssh -L 8080:127.0.0.1:8080 HOST, and use http://127.0.0.1:8080.",
        )
    if parts.username or parts.password:
        raise InputError("a password in the address", place=host, expected=f"the key in {SERVER_KEY}")
    return url.rstrip("/")


def without_endpoint(url: str) -> str:
    """Return an address without the end that OpenAI's clients have in theirs, to which they append the paths."""
    return url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
