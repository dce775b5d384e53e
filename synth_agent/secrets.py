"""Secrets that must not be written or shown: keys and passwords are taken out of texts and values.

Owns the one rule of what counts as a secret. Known secrets are replaced wherever they occur, also in
the spellings that other layers give them; texts that look like a key are replaced without being
known.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

REMOVED = "[removed]"
_SHORTEST = 4
"""A shorter text is no secret that can be looked for: it occurs in ordinary words."""
_SHORTEST_KEY = 8
"""Shorter keys are words such as `none`, which servers without keys are given."""

_LOOKS_SECRET = re.compile(
    r"""
    (?<![A-Za-z0-9])(?:sk|pk|rk)-[\w\-*.]{12,}          # keys of model services, also half masked
    | (?<![A-Za-z0-9])(?:hf_|gh[pousr]_|glpat-|xox[abpr]-)[\w\-]{12,}
    | (?<![A-Za-z0-9])AKIA[0-9A-Z]{12,}
    | (?<![A-Za-z0-9])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*   # signed tokens
    """,
    re.VERBOSE,
)
_AUTHORIZATION = re.compile(
    r"""(?i)((?:authorization|x-api-key|api-key)["']?\s*[:=]\s*["']?)(?:(?:bearer|basic)\s+)?[^\s"',;}]+"""
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)[\w\-.~+/=*]{8,}")
_USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]{1,20}://)[^\s/@\"'<>]{1,500}@")
_QUERY = re.compile(r"(?i)([?&](?:api[-_]?key|key|token|access_token|secret|sig)=)[^\s&#\"'<>]+")
_UNFINISHED = re.compile(
    r"""
    (?<![A-Za-z0-9])(?:
        [spr](?:k(?:-[\w\-*.]*)?)?
        | h(?:f(?:_[\w\-]*)?)?
        | g(?:h(?:[pousr](?:_[\w\-]*)?)?|l(?:p(?:a(?:t(?:-[\w\-]*)?)?)?)?)?
        | x(?:o(?:x(?:[abpr](?:-[\w\-]*)?)?)?)?
        | A(?:K(?:I(?:A[0-9A-Z]*)?)?)?
        | e(?:y(?:J[\w.\-]*)?)?
    )\Z
    """,
    re.VERBOSE,
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text without the secrets and without whatever looks like a key or a password.

    Args:
        text: Anything that is going to be written or shown.
        secrets: Known secrets, found in any case of letters, as host names lose theirs; empty and
            very short ones are left alone.
    """
    if known := spellings(secrets):
        text = _any_of(known).sub(REMOVED, text)
    text = _LOOKS_SECRET.sub(REMOVED, text)
    text = _AUTHORIZATION.sub(rf"\1{REMOVED}", text)
    text = _BEARER.sub(rf"\1{REMOVED}", text)
    text = _USERINFO.sub(rf"\1{REMOVED}@", text)
    return _QUERY.sub(rf"\1{REMOVED}", text)


def redact_value(value: Any, secrets: Iterable[str] = ()) -> Any:
    """Return plain data with every text in it, names included, redacted."""
    known = tuple(secrets)
    if isinstance(value, str):
        return redact(value, known)
    if isinstance(value, Mapping):
        return {redact(str(name), known): redact_value(item, known) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_value(item, known) for item in value]
    return value


def spellings(secrets: Iterable[str]) -> tuple[str, ...]:
    """Return the secrets as they occur in URLs, JSON and headers too, longest first."""
    found: set[str] = set()
    for secret in secrets:
        if len(secret.strip()) < _SHORTEST:
            continue
        for text in {secret, secret.strip()}:
            encoded = base64.b64encode(text.encode("utf-8", "surrogatepass")).decode()
            quoted = json.dumps(text)[1:-1]
            safe = text.encode("utf-8", "replace").decode()
            found |= {text, quoted, quote(safe, safe=""), quote_plus(safe), encoded}
    return tuple(sorted(found, key=lambda text: (-len(text), text)))


@lru_cache(maxsize=64)
def _any_of(known: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, known)), re.IGNORECASE)


def secrets_of_address(address: str) -> tuple[str, ...]:
    """Return what a URL says in confidence: the password, and the values of its query."""
    parts = urlsplit(address)
    userinfo, at, _ = parts.netloc.rpartition("@")
    found = [value for _, value in parse_qsl(parts.query)]
    if at:
        password = userinfo.partition(":")[2]
        found += [userinfo, unquote(userinfo), password, unquote(password)]
    return tuple(dict.fromkeys(text for text in found if len(text) >= _SHORTEST))


def secrets_of_key(key: str) -> tuple[str, ...]:
    """Return the key, or nothing when it is a word such as `none` or `EMPTY`."""
    return (key,) if len(key.strip()) >= _SHORTEST_KEY else ()


def without_secrets(address: str) -> str:
    """Return a URL without user, password, query and fragment: what may be shown of it."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


class StreamRedactor:
    """Redacts a text that arrives in pieces: what may be the start of a secret waits for the rest."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = tuple(secrets)
        self._spellings = spellings(self._secrets)
        self._held = ""

    def feed(self, piece: str) -> str:
        """Return what can be shown after one more piece."""
        # Looked at as it came: half of a key looks like a key, and its rest like nothing.
        text = self._held + piece
        safe = len(text) - self._unfinished(text)
        for start, end in sorted(self._found(text), reverse=True):
            if start < safe < end or end == len(text):
                safe = min(safe, start)
        self._held = text[safe:]
        return redact(text[:safe], self._secrets)

    def close(self) -> str:
        """Return what was held back, redacted."""
        held, self._held = self._held, ""
        return redact(held, self._secrets)

    def _found(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where secrets are, those that may still grow included."""
        patterns = [_LOOKS_SECRET, *([_any_of(self._spellings)] if self._spellings else [])]
        for pattern in patterns:
            yield from (found.span() for found in pattern.finditer(text))

    def _unfinished(self, text: str) -> int:
        """Length of the end that may grow into a secret."""
        found = _UNFINISHED.search(text)
        longest = len(text) - found.start() if found else 0
        for secret in self._spellings:
            for length in range(min(len(secret) - 1, len(text)), longest, -1):
                if text[-length:].lower() == secret[:length].lower():
                    longest = length
                    break
        return longest
