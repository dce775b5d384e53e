"""Replies put together from the pieces in which servers stream them.

Owns the differences between servers on the way in: thinking in its own field or in the text, tool
calls whole or split, with or without ids and indices, counts in the last piece or nowhere, ends
without a reason, answers that were never a stream. Pure: chunks in, reply out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from synth_agent.planner.exchange import Finish, ToolCall

_OPEN, _CLOSE = "<think>", "</think>"
_ORPHAN = re.compile(r"(?m)^[ \t]*</think>\s*")
_TAGGED_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_FENCE = re.compile(r"\A\s*```[\w-]*\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
_LONGEST_CHARACTERS = 2_000_000
"""No reply is longer: a server that never stops is cut off here."""
_MOST_TOKENS = 10_000_000
"""No model reads or writes more at once: a server that counts more does not count."""
_CUT = ("length", "max_tokens", "model_length")
_FILTERED = ("content_filter", "safety", "sensitive")


class BadChunk(Exception):
    """The server says in its stream that it failed."""


class AnswerFilter:
    """Separates a model's thinking from its answer while the text arrives.

    Args:
        starts_thinking: The text is known to begin inside the thinking.
    """

    def __init__(self, starts_thinking: bool = False) -> None:
        self._state = "thinking" if starts_thinking else "start"
        self._is_guess = starts_thinking
        self._buffer = ""
        self._answer: list[str] = []
        self._thinking: list[str] = []
        self.is_orphan = False
        """The thinking ended without having begun, which is only seen when it is too late."""

    def feed(self, piece: str) -> str:
        """Return what belongs to the answer."""
        self._buffer += piece
        if self._state == "thinking":
            self._think()
        if self._state == "start":
            self._start()
        if self._state != "answer":
            return ""
        found, self._buffer = self._buffer, ""
        self._answer.append(found)
        return found

    def close(self, is_cut: bool = False) -> str:
        """Return the rest of the answer. A guess at thinking that never ended was an answer."""
        rest, self._buffer = self._buffer, ""
        if self._state == "thinking" and (is_cut or not self._is_guess):
            self._thinking.append(rest)
            return ""
        self._answer.append(rest)
        return rest

    @property
    def answer(self) -> str:
        """The whole answer so far."""
        text = "".join(self._answer)
        found = None if _OPEN in text else _ORPHAN.search(text)
        if found is None:
            return text
        self.is_orphan = True
        return text[found.end() :]

    @property
    def thinking(self) -> str:
        """The thinking that stood in the text."""
        return "".join(self._thinking)

    def _start(self) -> None:
        text = self._buffer.lstrip()
        if text.startswith(_OPEN):
            self._state, self._is_guess, self._buffer = "thinking", False, text[len(_OPEN) :]
            self._think()
            if self._state == "start":
                self._start()
        elif text and not _OPEN.startswith(text):
            self._state = "answer"
            if self._thinking:
                self._buffer = text

    def _think(self) -> None:
        thought, tag, rest = self._buffer.partition(_CLOSE)
        if tag:
            self._thinking.append(thought)
            self._state, self._buffer = "start", rest


@dataclass
class _Call:
    id: str = ""
    name: str = ""
    arguments: str = ""
    index: int | None = None


@dataclass
class ReplyBuilder:
    """Collects the chunks of one reply."""

    starts_thinking: bool = False
    model: str = ""
    finish: str | None = None
    refusal: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Counts of the server; 0 where it gave none."""
    has_started: bool = False
    """Something of the reply has come: thinking, text, or a call."""
    has_usage: bool = False
    reasoning: str = ""
    must_return_thinking: bool = False
    """The server has a field of its own for thinking and wants it back beside tool calls."""
    is_too_long: bool = False
    _calls: list[_Call] = field(default_factory=list)
    _characters: int = 0

    def __post_init__(self) -> None:
        self.filter = AnswerFilter(self.starts_thinking)

    def feed(self, chunk: object) -> str:
        """Take one chunk, of a stream or whole, and return the piece of the answer in it.

        Raises:
            BadChunk: the chunk is not a mapping or says that the server failed.
        """
        if not isinstance(chunk, Mapping):
            raise BadChunk(f"expected an object, got {str(chunk)[:100]!r}")
        if chunk.get("error"):
            raise BadChunk(json.dumps(chunk["error"], default=str)[:1000])
        if isinstance(name := chunk.get("model"), str) and name:
            self.model = name
        self._count(chunk.get("usage"))
        choices = chunk.get("choices")
        if not isinstance(choices, Sequence) or not choices or not isinstance(choices[0], Mapping):
            return ""
        choice = choices[0]
        if isinstance(choice.get("finish_reason"), str) and choice["finish_reason"]:
            self.finish = choice["finish_reason"]
        delta = choice.get("delta") or choice.get("message")
        return self._delta(delta) if isinstance(delta, Mapping) else ""

    def close(self) -> str:
        """Return the rest of the answer once the stream has ended."""
        return self.filter.close(is_cut=self.finish in _CUT)

    @property
    def text(self) -> str:
        return self.filter.answer

    @property
    def thinking(self) -> str:
        return self.reasoning + self.filter.thinking

    def calls(self, prefix: str) -> tuple[ToolCall, ...]:
        """Return the tool calls; one without an id gets one that begins with `prefix`."""
        found = [call for call in self._calls if call.name or call.arguments]
        return tuple(
            ToolCall(call.id or f"{prefix}{position}", call.name, call.arguments or "{}")
            for position, call in enumerate(found)
        )

    def _delta(self, delta: Mapping[str, Any]) -> str:
        thought = delta.get("reasoning_content") or delta.get("reasoning") or delta.get("thinking")
        if isinstance(thought, str):
            self.reasoning += thought
            self.must_return_thinking |= bool(delta.get("reasoning_content"))
        if isinstance(refusal := delta.get("refusal"), str):
            self.refusal += refusal
        calls = delta.get("tool_calls")
        for call in calls if isinstance(calls, Sequence) and not isinstance(calls, str) else ():
            if isinstance(call, Mapping):
                self._call(call)
        if isinstance(single := delta.get("function_call"), Mapping):
            self._call({"index": 0, "function": single})
        text = _text(delta.get("content"))
        self._characters += len(text) + (len(thought) if isinstance(thought, str) else 0)
        self.is_too_long = self._characters > _LONGEST_CHARACTERS
        self.has_started |= bool(text or thought or refusal or self._calls)
        return self.filter.feed(text) if text else ""

    def _call(self, delta: Mapping[str, Any]) -> None:
        function = delta.get("function")
        function = function if isinstance(function, Mapping) else delta
        name = function.get("name") if isinstance(function.get("name"), str) else ""
        identity = delta.get("id") if isinstance(delta.get("id"), str) else ""
        index = delta.get("index") if isinstance(delta.get("index"), int) else None
        call = self._matching(identity or "", index, name or "")
        call.name = call.name or name or ""
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            call.arguments += arguments
        elif arguments is not None:
            call.arguments = json.dumps(arguments, ensure_ascii=False)
        self._characters += len(arguments) if isinstance(arguments, str) else 0

    def _matching(self, identity: str, index: int | None, name: str) -> _Call:
        """Find the call that a piece belongs to: by id, then by index, then the last one."""
        for call in self._calls:
            if identity and call.id == identity:
                return call
        # A different id under a known index is another call: some servers number all of them 0.
        if index is not None:
            same = [call for call in self._calls if call.index == index]
            if same and (not identity or not same[-1].id):
                same[-1].id = same[-1].id or identity
                return same[-1]
        elif self._calls and not identity and not name:
            return self._calls[-1]
        self._calls.append(_Call(identity, index=index))
        return self._calls[-1]

    def _count(self, usage: object) -> None:
        if not isinstance(usage, Mapping):
            return
        for name in ("prompt_tokens", "completion_tokens"):
            value = usage.get(name)
            if type(value) is int and 0 < value <= _MOST_TOKENS:
                self.has_usage = True
                setattr(self, name, value)


def finish_of(builder: ReplyBuilder, calls: Sequence[ToolCall], text: str) -> Finish:
    """Return how a reply that was read to its end has ended.

    Servers that give no reason: a reply is complete when they counted its tokens or when it is whole
    JSON, and cut off otherwise.
    """
    if builder.refusal or builder.finish in _FILTERED:
        return "refusal"
    if builder.finish in _CUT or builder.is_too_long:
        return "length"
    is_whole = bool(builder.finish) or builder.has_usage
    if calls:
        return "tool_calls" if is_whole or all(_is_object(c.arguments) for c in calls) else "length"
    return "stop" if is_whole or _is_object(unfenced(text)) else "length"


def calls_in_text(text: str, names: Sequence[str], prefix: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Return the text without the tool calls written in it, and these calls.

    Read are `<tool_call>{...}</tool_call>`, as models write that have learned so, and a whole text
    that is `{"tool_calls": [...]}`. Functions that were not offered are no calls.
    """
    found: list[object] = []
    tagged = _TAGGED_CALL.findall(text)
    if tagged:
        found = [_parsed(part) for part in tagged]
    elif isinstance(whole := _parsed(unfenced(text)), dict) and isinstance(
        whole.get("tool_calls"), list
    ):
        found = whole["tool_calls"]
    calls = []
    for position, item in enumerate(found):
        if not isinstance(item, dict):
            return text, ()
        item = item.get("function") if isinstance(item.get("function"), dict) else item
        if not isinstance(item, dict) or item.get("name") not in names:
            return text, ()
        given = item.get("arguments", {})
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        calls.append(ToolCall(f"{prefix}{position}", item["name"], arguments))
    if not calls:
        return text, ()
    return (_TAGGED_CALL.sub("", text).strip() if tagged else ""), tuple(calls)


def unfenced(text: str) -> str:
    """Return what stands in a code fence around a whole text, or the text."""
    found = _FENCE.match(text)
    return found[1] if found else text.strip()


def has_object(text: str) -> bool:
    """Tell whether a JSON object stands somewhere in a text."""
    decoder = json.JSONDecoder()
    start = -1
    for _ in range(20):
        start = text.find("{", start + 1)
        if start < 0:
            return False
        try:
            decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        return True
    return False


def _text(content: object) -> str:
    """Text of a message's content, which some servers send in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(text for text in texts if isinstance(text, str))
    return ""


def _is_object(text: str) -> bool:
    return isinstance(_parsed(text), dict)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
