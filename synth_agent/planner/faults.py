"""What a failed request means: try again, ask in another way, or tell the person what to change.

Owns the reading of errors of the `openai` library and of servers' words. Messages leave here without
secrets and in one short line.
"""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from synth_agent.errors import InvalidInput, SynthAgentError
from synth_agent.planner.exchange import ContextTooLong, EndpointError
from synth_agent.secrets import redact

if TYPE_CHECKING:
    import openai

_TOO_LONG = (
    "context_length",
    "context length",
    "context window",
    "context size",
    "maximum model length",
    "max_model_len",
    "prompt is too long",
    "prompt too long",
    "input is too long",
    "too many tokens",
    "range of input length",
    "reduce the length",
    "exceed_context",
)
_FILTERED = (
    "content_filter",
    "content_policy",
    "data_inspection_failed",
    "content management policy",
)
_NO_MONEY = ("insufficient_quota", "insufficient balance", "billing", "arrearage", "credit balance")
_LONGEST_WORDS = 300


@dataclass(frozen=True)
class Asked:
    """Whom was asked, as it may be shown, and what must not be shown."""

    address: str
    model: str
    secrets: tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """Why an attempt gave no reply."""

    kind: Literal["again", "otherwise", "final", "refused"]
    """Try the same again, try with fewer abilities, stop, or the provider will not answer this."""
    error: SynthAgentError
    wait: float | None = None
    """Seconds that the server asks to wait."""
    words: str = ""
    """The server's message, whole and in lower case: what it objects to."""


def fault_of(error: openai.OpenAIError, asked: Asked) -> Fault:
    """Return what an error of the library means."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return _status_fault(error, asked)
    if isinstance(error, openai.APITimeoutError):
        return silent(asked, "did not answer in time")
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        why = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
        return silent(asked, f"cannot be reached or broke off ({_shown(why, asked)})")
    return stream_fault(str(getattr(error, "body", None) or error), asked)


def stream_fault(words: str, asked: Asked) -> Fault:
    """Return what an error inside a stream means: the request was accepted and then failed."""
    if any(text in words.lower() for text in _TOO_LONG):
        return Fault("final", _too_long(_shown(words, asked), asked))
    return silent(asked, f"failed while answering: {_shown(words, asked)}")


def silent(asked: Asked, what: str) -> Fault:
    """Return the fault of an endpoint that gives nothing usable now and may later."""
    hint = "check that it runs and that OPENAI_BASE_URL is its address, then ask again"
    return Fault("again", EndpointError("No reply from the model", f"{asked.address} {what}", hint))


def web_page(asked: Asked) -> Fault:
    """Return the fault of an address at which a web site is, not a model."""
    hint = "check OPENAI_BASE_URL; for most servers it ends in /v1"
    where = f"{asked.address} answered with a web page"
    return Fault("final", InvalidInput("No model answers at the endpoint's address", where, hint))


def _status_fault(error: openai.APIStatusError, asked: Asked) -> Fault:
    status = error.status_code
    said = _said(error.body) or error.message
    words, shown = f"{said} {error.code or ''}".lower(), _shown(said, asked)
    where = f"{asked.address} answered {status}: {shown}"
    if 300 <= status < 400:
        location = redact(error.response.headers.get("location", ""), asked.secrets)
        target = without_path(location)
        return Fault("final", _redirected(asked, status, target))
    if status != 429 and status < 500 and any(text in words for text in _TOO_LONG):
        return Fault("final", _too_long(shown, asked))
    if status == 402 or (status in (400, 403, 429) and any(text in words for text in _NO_MONEY)):
        hint = "top up the account, or set planner.kind to builtin"
        return Fault("final", InvalidInput("The account has no credit left", where, hint))
    if status < 500 and any(text in words for text in _FILTERED):
        return Fault("refused", EndpointError("The provider refuses the question", where))
    if status in (401, 403):
        hint = "check OPENAI_API_KEY, and that this key may use the model"
        return Fault("final", InvalidInput("The endpoint refuses the key", where, hint))
    if status in (408, 409, 425, 429) or status >= 500:
        title = "The endpoint is overloaded" if status == 429 else "The endpoint failed"
        hint = "wait a little and ask again"
        # Some servers call it their own failure when they lack an ability.
        objected = words if status >= 500 else ""
        wait = retry_after(error.response.headers, time.time())
        return Fault("again", EndpointError(title, where, hint), wait, objected)
    if status == 404:
        return Fault("otherwise", _not_found(where, words, asked), words=words)
    hint = "the server does not accept the request; check the model's name and the server's version"
    return Fault(
        "otherwise", InvalidInput("The endpoint refuses the request", where, hint), None, words
    )


def _not_found(where: str, words: str, asked: Asked) -> InvalidInput:
    if "model" in words or asked.model.lower() in words:
        title = "The endpoint does not know the model"
        hint = "set the model in synth.yaml to a name that the server's /models lists"
        return InvalidInput(title, f"{asked.model!r}: {where}", hint)
    hint = "check OPENAI_BASE_URL; for most servers it ends in /v1"
    return InvalidInput("Nothing answers at the endpoint's address", where, hint)


def _redirected(asked: Asked, status: int, target: str) -> InvalidInput:
    return InvalidInput(
        "The endpoint points elsewhere",
        f"{asked.address} answered {status} and sends to {target or 'another address'}; the key was "
        "not sent there",
        "set OPENAI_BASE_URL to the address that answers itself, if you trust it",
    )


def _too_long(shown: str, asked: Asked) -> ContextTooLong:
    return ContextTooLong(
        "The question is too long for the model",
        f"{asked.model} at {asked.address}: {shown}",
        "shorten the context, lower max_tokens, or use a model with a longer context",
    )


def retry_after(headers: Mapping[str, str], current: float) -> float | None:
    """Return how many seconds a server asks to wait, from seconds or a date; None if it does not.

    Args:
        headers: The response's headers, looked up in lower case.
        current: Seconds since the epoch.
    """
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / scale
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - current
            except (ValueError, OverflowError):
                continue
        if seconds == seconds and seconds != float("inf"):
            return max(0.0, seconds)
    return None


def without_path(address: str) -> str:
    """Return scheme, host and port of a URL: the rest of a redirect's target may be confidential."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return ""
    if not host:
        return ""
    return f"{parts.scheme}://{host}" + (f":{port}" if port else "")


def _said(body: Any) -> str:
    """The message of an error's body, wherever the server puts it."""
    if isinstance(body, Mapping):
        for name in ("message", "error", "detail", "msg"):
            value = body.get(name)
            if isinstance(value, str) and value:
                return value
            if isinstance(value, Mapping | list) and value:
                return _said(value) or json.dumps(value, default=str)
        return json.dumps(dict(body), default=str) if body else ""
    return body if isinstance(body, str) else ""


def _shown(words: str, asked: Asked) -> str:
    # Redacted before it is cut: half a key does not look like one.
    line = " ".join(redact(words, asked.secrets).split())
    line = "".join(letter for letter in line if letter.isprintable())
    return line if len(line) <= _LONGEST_WORDS else line[: _LONGEST_WORDS - 1] + "…"
