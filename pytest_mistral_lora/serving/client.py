"""Ask a server over HTTP: bounded in time, size and number of requests; the key is never written."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from itertools import count, takewhile
from math import isfinite
from typing import TYPE_CHECKING, Any, Protocol

from pytest_mistral_lora.errors import InputError, NoAnswerError, counted
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.asking_limits import AT_ONCE
from pytest_mistral_lora.records.secrets import SERVER_KEY as KEY
from pytest_mistral_lora.records.secrets import redacted, server_key

if TYPE_CHECKING:
    import httpx

SECONDS = 60.0
MOST_LATE = AT_ONCE
"""After so many requests in a row without an answer in time, no more are sent."""

_LARGEST = 8 << 20
LAST_EVENT = "[DONE]"
"""The data of the event that ends a stream."""

_TRIES = 3
_BUSY = (429, 502, 503, 504)
_LIMITED = 429

BUSY_SECONDS = 60.0
"""The most time to wait for a server that asks to come back later, for each request, in seconds."""

_LONGEST_PAUSE = 5.0
"""The longest pause in seconds before a request to a server that asks to come back, and does not say when."""
_SHOWN, _READ, _KEY = 300, 20_000, 4_000
"""The most characters of a server's text in a message, of the text that is searched for it, and of a key."""
SLOW = (
    "If the server is only slow, as one that loads its model, give each request more time: --request-seconds 600 "
    "(pytest: --mistral-server-request-seconds 600)."
)
BUSY_STEP = (
    "Ask again when the server has less to do, send fewer requests at once (serve-check --at-once 1), or raise its "
    "limit of requests."
)
_WITHOUT_TLS = "If the server has no certificate, write http:// (on this machine alone)."


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a server.

    Attributes:
        status: The HTTP status.
        data: The JSON value; of a stream, the list of the values of its events. None if the body is not JSON.
        text: The beginning of the body on one line, for messages: without the key.
        retry_after: The seconds after which the server wants to be asked again; None if it does not say.
        is_whole: Whether a stream came to its last event, `[DONE]`; True for any other answer.
    """

    status: int
    data: Any
    text: str
    retry_after: float | None = None
    is_whole: bool = True

    @property
    def is_ok(self) -> bool:
        """Whether the request was accepted, and answered in JSON."""
        return self.status == 200 and self.data is not None

    def require_ready(self, place: Place) -> None:
        """Refuse the answer of a server that is not ready.

        Raises:
            InputError: If the server is busy, or loads its model.
        """
        if self.status == 503:
            found = f"the server is busy, or loads its model (HTTP 503: {self.error})"
            raise InputError(found, place=place, next_step="Wait until it is ready, and run the command again.")

    @property
    def message(self) -> str:
        """The server's own message, unchanged; empty if the body has no message."""
        found = self.data
        for name in ("error", "message"):
            # some servers have the text at the top, and not in an object `error`
            found = found.get(name, found) if isinstance(found, Mapping) else found
        return found if isinstance(found, str) else ""

    @property
    def error(self) -> str:
        """The server's message, or the beginning of the body, to put into our message: without the key."""
        return _shown(self.message) or self.text


def _shown(text: str) -> str:
    """Return a server's text for a message: without the key, and if it is long, only its beginning and end."""
    # the first cut may split the key, so that it is not found; the second cut removes that part
    known = redacted(text[:_READ])
    shown = " ".join(known[:-_KEY].split() if len(text) > _READ else known.split())
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN // 2]} … {shown[-_SHOWN // 2 :]}"


def _data(stream: str) -> Iterator[str]:
    """Yield the data of each event of a stream.

    An event has one line of data in each server that we know; lines of other fields are left out, except an error,
    which some send in a field of its own.
    """
    # not splitlines(), which also splits at line separators within a text
    for line in stream.replace("\r\n", "\n").split("\n"):
        name, _, value = line.partition(":")
        if name in ("data", "error"):
            yield value if name == "data" else f'{{"error": {value}}}'


def _events(stream: str) -> Iterator[str]:
    """Yield the data of each event of a stream, up to the event that ends it."""
    yield from takewhile(lambda event: event.strip() != LAST_EVENT, _data(stream))


class AnswerStore(Protocol):
    """Keeps answers, so that a request is not sent again: see `serving.kept`."""

    def open(self, server: Mapping[str, Any]) -> None:
        """Read what is kept of a server."""

    def find(self, path: str, data: Any) -> Answer | None:
        """Return the answer to a request; None if it is not kept."""

    def add(self, path: str, data: Any, answer: Answer) -> None:
        """Keep the answer to a request."""


class _DroppedError(Exception):
    """The server closed the connection before it answered; no request of ours changes anything if it comes again."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass
class ServerClient:
    """Sends the requests of one run to one server.

    Attributes:
        url: The address, as `require_url` returns it.
        seconds: Limit of each request.
        at_once: The most open requests.
        kept: The answers of an earlier run, which are not asked for again; None to ask for all.
    """

    url: str
    seconds: float
    at_once: int = AT_ONCE
    kept: AnswerStore | None = field(default=None, repr=False)
    _open: httpx.AsyncClient | None = field(default=None, repr=False)
    _lost: InputError | None = field(default=None, repr=False)
    _has_answered: bool = field(default=False, repr=False)
    _late: int = field(default=0, repr=False)
    _free_at: float = field(default=0.0, repr=False)
    _gate: asyncio.Semaphore = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._gate = asyncio.Semaphore(self.at_once)

    async def __aenter__(self) -> ServerClient:
        """Open the connections.

        Raises:
            ImportError: If httpx is not installed.
            InputError: If the key has characters that a header cannot have.
        """
        import httpx

        key = server_key()
        if not (key.isascii() and key.isprintable()):
            step = f"Set it again: export {KEY}=…"
            found = "the key has a character that no request can have"
            raise InputError(found, place=KEY, expected="printable ASCII", next_step=step)
        # a compressed answer could fill the memory when it is decompressed, layer by layer
        headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
        # a redirect could lead off the host, with the key; proxies of the environment are not asked for, and the
        # authorities that it names (SSL_CERT_FILE) are
        try:
            self._open = httpx.AsyncClient(
                base_url=self.url,
                headers=headers,
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # no cookie is kept
                timeout=self.seconds,
                follow_redirects=False,
                trust_env=False,
                verify=httpx.create_ssl_context(),
            )
        except httpx.InvalidURL as error:  # it knows more of the names of domains than `require_url`
            raise InputError(f"no address of a server: {error}", place=self.url[:_SHOWN]) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        if self._open is not None:
            await self._open.aclose()

    def place_of(self, path: str) -> Place:
        """Return the place of an endpoint: its address."""
        return Place.of(f"{self.url}{path}")

    async def get(self, path: str) -> Answer:
        """Return the answer to a question without a body: see `post`."""
        return await self.post(path, None, method="GET")

    async def post(self, path: str, data: Any, *, method: str = "POST") -> Answer:
        """Send JSON and return the answer; a busy server is asked again, when it wants to be.

        Raises:
            NoAnswerError: If the server does not answer, is too slow, or stays busy.
            InputError: If its answer is too large, or it refuses the key.
        """
        known = self.kept.find(path, data) if self.kept is not None and method == "POST" else None
        if known is not None:
            return known
        answer = await self._asked(path, data, method)
        if self.kept is not None and method == "POST":
            self.kept.add(path, data, answer)
        return answer

    async def _asked(self, path: str, data: Any, method: str) -> Answer:
        import httpx

        place = self.place_of(path)
        async with self._gate:
            began = time.monotonic()
            for attempt in count():
                while (rest := self._free_at - time.monotonic()) > 0:
                    await asyncio.sleep(rest)
                if self._lost is not None:
                    raise self._lost
                try:
                    answer = await asyncio.wait_for(self._send(method, path, data), self.seconds)
                except (TimeoutError, httpx.TimeoutException) as error:
                    found = f"no answer in {self.seconds:g} s"
                    self._late += 1
                    step = self._other_scheme("https") or SLOW
                    late = NoAnswerError(found, place=place, next_step=step)
                    # a server that lets each request wait would keep the run for minutes a row
                    self._lost = late if self._late >= MOST_LATE else self._lost
                    raise late from error
                except _DroppedError as error:
                    # its connection may have been idle, and closed by the server as the request was on its way
                    if not self._has_answered or attempt + 1 >= _TRIES:
                        raise self._failed(error.reason, place) from error
                except httpx.ConnectError as error:
                    if "[SSL" in str(error) or attempt + 1 >= _TRIES:
                        # the next row does not need to wait as long
                        self._lost = self._no_connection(str(error))
                        raise self._lost from error
                except (httpx.HTTPError, OSError, ValueError) as error:
                    raise self._failed(error, place) from error
                else:
                    self._has_answered, self._late = True, 0
                    if answer.status == 401 or answer.status == 403:
                        found = (
                            f"the server {'refuses the' if server_key() else 'asks for a'} key (HTTP {answer.status})"
                        )
                        raise InputError(found, place=place, next_step=f"Set its key: export {KEY}=…")
                    asks_later = answer.status == _LIMITED or answer.retry_after is not None
                    if answer.status not in _BUSY or (not asks_later and attempt + 1 >= _TRIES):
                        return answer
                    if asks_later:
                        self._put_off(answer, began, attempt, place)
                        continue
                await asyncio.sleep(0.2 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _put_off(self, answer: Answer, began: float, attempt: int, place: Place) -> None:
        """Put all requests off until a busy server wants to be asked again.

        Raises:
            NoAnswerError: If that is later than `BUSY_SECONDS` after the first try.
        """
        pause = min(0.2 * 2**attempt, _LONGEST_PAUSE) if answer.retry_after is None else answer.retry_after
        waited = time.monotonic() - began
        if waited + pause > BUSY_SECONDS:
            asked = "" if answer.retry_after is None else f", Retry-After {answer.retry_after:g} s"
            found = f"the server is busy (HTTP {answer.status}{asked}: {answer.error})"
            sent = f"{counted(attempt + 1, 'request')} in {waited:.0f} s"
            raise NoAnswerError(f"{found}, after {sent}", place=place, next_step=BUSY_STEP)
        self._free_at = max(self._free_at, time.monotonic() + pause)

    def _other_scheme(self, scheme: str) -> str:
        """Return the next step for a server that has never answered: try the address with the other scheme."""
        if self._has_answered or not self.url.startswith(f"{scheme}:"):
            return ""
        return "If the server asks for https, write https://." if scheme == "http" else _WITHOUT_TLS

    def _failed(self, error: Exception, place: Place) -> InputError:
        found = f"the connection failed: {type(error).__name__} {_shown(str(error))}"
        # an answer that came, and cannot be read, is the server's own
        kind = InputError if isinstance(error, ValueError) else NoAnswerError
        return kind(found, place=place, next_step=self._other_scheme("http"))

    def _no_connection(self, error: str) -> InputError:
        if "CERTIFICATE_VERIFY_FAILED" in error:
            step = "If it is of an authority of your own, name the file of that: export SSL_CERT_FILE=authority.pem"
            return InputError(f"its certificate is not trusted: {error}", place=self.url, next_step=step)
        if "[SSL" in error:
            return InputError(f"no secure connection: {error}", place=self.url, next_step=_WITHOUT_TLS)
        found = f"no server answers there{' any more' if self._has_answered else ''}"
        return NoAnswerError(found, place=self.url, next_step="Start the server, or look at its address.")

    async def _send(self, method: str, path: str, data: Any) -> Answer:
        import httpx

        assert self._open is not None
        request = self._open.build_request(method, path, json=data)
        try:
            response = await self._open.send(request, stream=True)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
            raise _DroppedError(error) from error
        body = bytearray()
        try:
            is_stream = response.headers.get("Content-Type", "").startswith("text/event-stream")
            encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
            if encoding not in ("", "identity"):
                raise ValueError(f"the answer is packed ({_shown(encoding)}), and identity was asked for")
            async for part in response.aiter_raw():
                body += part
                if len(body) > _LARGEST:
                    raise ValueError(f"the answer is larger than {_LARGEST >> 20} MiB")
        finally:
            await response.aclose()
        text = bytes(body).decode("utf-8", "replace")
        try:
            value = [json.loads(event) for event in _events(text)] if is_stream else json.loads(text)
        except (ValueError, RecursionError):  # not JSON, a number with too many digits, or too many levels
            value = None
        retry_after = _seconds(response.headers.get("Retry-After", ""))
        is_whole = not is_stream or any(event.strip() == LAST_EVENT for event in _data(text))
        return Answer(response.status_code, value, _shown(text), retry_after, is_whole)


def _seconds(retry_after: str) -> float | None:
    """Return the seconds that a header `Retry-After` has, as a number or as a time; None without one."""
    try:
        found = float(retry_after)
    except ValueError:
        try:
            found = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(found, 0.0) if isfinite(found) else None
