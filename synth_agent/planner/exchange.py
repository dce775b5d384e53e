"""What is asked of a language model and what it answers: values, settings, errors.

Owns the vocabulary that conversations and endpoints share. Pure: nothing here touches a file, the
network or the clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from synth_agent import runs
from synth_agent.errors import EXIT_RETRY, SynthAgentError

Role = Literal["system", "user", "assistant", "tool"]
Finish = Literal["stop", "length", "tool_calls", "refusal", "cancelled"]
Structured = Literal["auto", "schema", "tools", "json", "text"]
_BYTES_PER_TOKEN = 3.5


class EndpointError(SynthAgentError):
    """The endpoint gave no usable reply; the same request may succeed later."""

    exit_code = EXIT_RETRY


class ContextTooLong(SynthAgentError):
    """The messages and the room for the reply are more than the model can take."""


class BudgetSpent(SynthAgentError):
    """A call could have gone over the cap on tokens or money, and was not made."""


@dataclass(frozen=True)
class ToolSpec:
    """A function that the model may ask for."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object."""


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks for."""

    id: str
    """Never empty, unlike what some servers send; unique within a conversation."""
    name: str
    arguments: str
    """JSON text as the model wrote it: it may be invalid."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """What an assistant asked for in this turn."""
    tool_call_id: str | None = None
    """Which call a tool's message answers."""


@dataclass(frozen=True)
class Request:
    """One question to the model, complete in itself."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    schema: Mapping[str, Any] | None = None
    """JSON schema that the reply's text should follow. A server may not hold the model to it."""
    schema_name: str = "proposal"
    max_tokens: int = 4096
    """Room for the reply, thinking included."""

    def content(self) -> dict[str, Any]:
        """Return everything as plain data; what was not said is left out."""
        content: dict[str, Any] = {"messages": [_message(m) for m in self.messages]}
        if self.tools:
            content["tools"] = [
                {"name": t.name, "description": t.description, "parameters": t.parameters}
                for t in self.tools
            ]
        if self.schema is not None:
            content |= {"schema": self.schema, "schema_name": self.schema_name}
        return content | {"max_tokens": self.max_tokens}


@dataclass(frozen=True)
class Reply:
    """What the model said."""

    text: str
    """The answer without the model's thinking and without secrets."""
    tool_calls: tuple[ToolCall, ...]
    finish: Finish
    """`length`: cut off, by the room for the reply or by the server; `cancelled`: by the caller."""
    refusal: str
    """Why the model or its provider would not answer; empty unless `finish` is `refusal`."""
    prompt_tokens: int
    """Of this reply alone; attempts that failed before it are counted in transcript and budget."""
    completion_tokens: int
    """Thinking included."""
    model: str
    """The name that the server gives its model."""


def ignore_text(_: str) -> None:
    """Take a piece of the reply and show it nowhere."""


def never_cancelled() -> bool:
    """Say that nobody wants to stop."""
    return False


class Endpoint(Protocol):
    """Whatever answers requests."""

    def ask(
        self,
        request: Request,
        on_text: Callable[[str], None] = ignore_text,
        is_cancelled: Callable[[], bool] = never_cancelled,
    ) -> Reply:
        """Return the reply to a request.

        Args:
            request: The question.
            on_text: Called with each piece of the answer as it arrives, in the caller's thread.
            is_cancelled: Asked about twenty times a second; once true, the reply so far returns
                with `finish` `cancelled`.

        Raises:
            InvalidInput: the address, the key or the model's name is wrong.
            EndpointError: no usable reply in the time and attempts allowed.
            ContextTooLong: the request does not fit the model.
            BudgetSpent: the call could go over the cap; it was not made.
        """
        ...


@dataclass(frozen=True)
class EndpointSettings:
    """How a model is asked. None of it is secret."""

    model: str
    """Model name as the server knows it."""
    timeout_seconds: float = 120.0
    """Longest time of one question, all attempts and pauses together."""
    first_token_seconds: float = 60.0
    """Longest wait of one attempt for the first word, thinking included."""
    retries: int = 4
    """Attempts after the first one."""
    max_tokens: int = 4096
    """Most room that any request gets for its reply."""
    temperature: float = 0.2
    price_per_million_input: float | None = None
    """Money per million prompt tokens, in any one currency."""
    price_per_million_output: float | None = None
    spend_cap: float | None = None
    """Most money of a session, in the currency of the prices; None for no cap."""
    token_cap: int = 500_000
    """Most tokens of a session, prompts and replies together."""
    structured: Structured = "auto"
    """How a reply is held to a schema: `auto` tries `schema`, then `json`, then `text`; any other
    value begins there and goes down the same way. `tools` wraps the reply in a tool call."""


def estimate_tokens(text: str) -> int:
    """Return about how many tokens a text has: its UTF-8 bytes over 3.5, rounded up."""
    return math.ceil(len(text.encode("utf-8", "surrogatepass")) / _BYTES_PER_TOKEN)


def estimate_prompt_tokens(request: Request) -> int:
    """Return about how many tokens a request's messages, tools and schema have."""
    content = request.content()
    texts = [
        m.content + "".join(c.name + c.arguments for c in m.tool_calls) for m in request.messages
    ]
    texts += [runs.canonical_json(content[name]) for name in ("tools", "schema") if name in content]
    return sum(estimate_tokens(text) for text in texts) + 4 * len(request.messages)


def _message(message: Message) -> dict[str, Any]:
    content: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        content["tool_calls"] = [
            {"id": c.id, "name": c.name, "arguments": c.arguments} for c in message.tool_calls
        ]
    if message.tool_call_id is not None:
        content["tool_call_id"] = message.tool_call_id
    return content
