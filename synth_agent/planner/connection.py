"""One attempt at one request: connect, send, read the stream, and stop at any moment.

Owns the only use of the `openai` client. An attempt has its own event loop and its own connection, so
that giving up closes the connection at once, also while the server is silent.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import logging
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from synth_agent.errors import InvalidInput
from synth_agent.planner.faults import Asked, Fault, fault_of, silent, stream_fault, web_page
from synth_agent.planner.stream import BadChunk, ReplyBuilder
from synth_agent.secrets import secrets_of_address, secrets_of_key, without_secrets

if TYPE_CHECKING:
    import openai

_PATH = "/chat/completions"
_POLL_SECONDS = 0.05
_CLOSING_SECONDS = 0.3

_TALKATIVE = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")


@dataclass(frozen=True)
class Address:
    """Where the server is and how to be let in. Its parts are secret, `shown` and `secrets` aside."""

    url: str
    """Without user, password and query."""
    query: Mapping[str, str] = field(repr=False)
    key: str = field(repr=False)
    basic: str = field(repr=False)
    """Basic credentials of the URL, encoded; they take the place of the key."""

    @classmethod
    def parse(cls, base_url: str, key: str | None) -> Address:
        """Read the address and the key as people give them.

        Raises:
            InvalidInput: the URL is not http or https with a host, or the key cannot be sent.
        """
        base_url, key = base_url.strip(), (key or "").strip()
        # People copy the address of the call itself out of documentation.
        base_url = base_url.rstrip("/").removesuffix(_PATH)
        try:
            parts = urlsplit(base_url)
            is_valid = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port
        except ValueError:
            is_valid = False
        if not is_valid:
            raise InvalidInput(
                "The endpoint's address is not a URL",
                "OPENAI_BASE_URL must begin with http:// or https:// and name a host",
                "such as http://127.0.0.1:8000/v1",
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise InvalidInput(
                "The key cannot be sent",
                "OPENAI_API_KEY holds a blank, a line break or letters outside ASCII",
                "copy the key again",
            )
        userinfo, at, _ = parts.netloc.rpartition("@")
        basic = base64.b64encode(unquote(userinfo).encode()).decode() if at else ""
        return cls(without_secrets(base_url), dict(parse_qsl(parts.query)), key, basic)

    def secrets(self, base_url: str) -> tuple[str, ...]:
        """Return what must not be written or shown."""
        basic = (self.basic,) if self.basic else ()
        return (*secrets_of_key(self.key), *basic, *secrets_of_address(base_url))

    @property
    def is_local(self) -> bool:
        """The server is on this machine: no proxy stands between."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")


@dataclass(frozen=True)
class Patience:
    """When an attempt is given up."""

    clock: Callable[[], float]
    deadline: float
    """On that clock."""
    first_token_seconds: float
    is_cancelled: Callable[[], bool]


@dataclass
class Attempt:
    """What is seen of one attempt while it runs."""

    builder: ReplyBuilder
    show: Callable[[str], None]
    """Takes the pieces of the answer."""
    was_taken: bool = False
    """The server has accepted the request, or may have worked on it without saying so."""
    was_cancelled: bool = False


def run_attempt(
    address: Address, asked: Asked, body: Mapping[str, Any], attempt: Attempt, patience: Patience
) -> Fault | None:
    """Send a request and read its reply into `attempt`; None when it was read to its end.

    The connection is closed when this returns or raises. What `show` and `is_cancelled` raise is
    passed on.
    """
    return _run(_watched(address, asked, body, attempt, patience))


def _run(work: Coroutine[Any, Any, Fault | None]) -> Fault | None:
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    try:
        return loop.run_until_complete(task)
    finally:
        if not task.done():
            # Ctrl-C leaves the loop in the middle: the connection is still to be closed.
            task.cancel()
            loop.run_until_complete(asyncio.wait({task}, timeout=2 * _CLOSING_SECONDS))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _watched(
    address: Address, asked: Asked, body: Mapping[str, Any], attempt: Attempt, patience: Patience
) -> Fault | None:
    started = patience.clock()
    task = asyncio.ensure_future(_exchange(address, asked, body, attempt))
    try:
        while True:
            await asyncio.wait({task}, timeout=_POLL_SECONDS)
            if task.done():
                return task.result()
            if patience.is_cancelled():
                attempt.was_cancelled = attempt.was_taken = True
                return None
            late = _lateness(attempt, patience, started)
            if late:
                attempt.was_taken = True
                return silent(asked, late)
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=_CLOSING_SECONDS)
        if task.done() and not task.cancelled():
            task.exception()


def _lateness(attempt: Attempt, patience: Patience, started: float) -> str:
    current = patience.clock()
    if current > patience.deadline:
        return "took longer than timeout_seconds allows"
    if not attempt.builder.has_started and current - started > patience.first_token_seconds:
        return f"said nothing for {patience.first_token_seconds:g} s (first_token_seconds)"
    return ""


async def _exchange(
    address: Address, asked: Asked, body: Mapping[str, Any], attempt: Attempt
) -> Fault | None:
    import openai

    client = _client(address)
    try:
        stream = await client.post(
            _PATH,
            cast_to=object,
            body=_sendable(body),
            stream=True,
            stream_cls=openai.AsyncStream[object],
        )
        attempt.was_taken = True
        try:
            await _read(stream, attempt)
        finally:
            await stream.close()
    except openai.OpenAIError as error:
        return fault_of(error, asked)
    except BadChunk as error:
        return stream_fault(str(error), asked)
    except _transport_errors() as error:
        return silent(asked, f"broke off ({type(error).__name__})")
    except _NotJson:
        return silent(asked, "sent what is not JSON")
    except _WebPage:
        return web_page(asked)
    finally:
        await client.close()
    return None


class _NotJson(Exception):
    """A chunk or a body cannot be parsed."""


class _WebPage(Exception):
    """The answer is a page for people."""


async def _read(stream: openai.AsyncStream[object], attempt: Attempt) -> None:
    kind = stream.response.headers.get("content-type", "")
    if "text/html" in kind:
        raise _WebPage
    if "application/json" in kind:
        # The server does not stream: the reply is the body.
        data = await stream.response.aread()
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            raise _NotJson from None
        attempt.show(attempt.builder.feed(chunk))
        return
    chunks = stream.__aiter__()
    while True:
        try:
            chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except (ValueError, RecursionError):
            raise _NotJson from None
        attempt.show(attempt.builder.feed(chunk))
        if attempt.builder.is_too_long:
            return


def _client(address: Address) -> openai.AsyncOpenAI:
    import openai

    # They log headers and bodies, which a server can fill with what it was sent.
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    headers = {"Connection": "close"}
    if address.basic:
        headers["Authorization"] = f"Basic {address.basic}"
    return openai.AsyncOpenAI(
        api_key=address.key or "none",
        base_url=address.url,
        max_retries=0,
        default_headers=headers,
        default_query=dict(address.query),
        # A redirect would carry the key to whatever host it names.
        http_client=openai.DefaultAsyncHttpxClient(
            follow_redirects=False, trust_env=not address.is_local, timeout=None
        ),
    )


def _sendable(body: Mapping[str, Any]) -> Any:
    """Replace lone surrogates, which no UTF-8 text can hold."""
    return json.loads(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))


def _transport_errors() -> tuple[type[Exception], ...]:
    # The library raises errors of the client that it came with, and these came with two.
    loaded = [sys.modules[name] for name in ("httpx2", "httpx") if name in sys.modules]
    return tuple(kind for module in loaded for kind in (module.HTTPError, module.StreamError))
