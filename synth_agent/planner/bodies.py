"""Requests as JSON bodies of the chat completions protocol, by what a server can do.

Owns the differences between servers on the way out. What a server cannot do is said in words in the
system message: the schema that the reply should follow, and the tools that can be asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from synth_agent.planner.exchange import Message, Request, Structured, ToolCall, ToolSpec

Form = Literal["schema", "tools", "json", "text"]


@dataclass(frozen=True)
class Abilities:
    """What a server is known or hoped to understand. Starts hopeful, shrinks by its answers."""

    form: Form = "schema"
    """How a reply is held to a schema."""
    tools: bool = True
    usage: bool = True
    """Whether it can be asked for token counts in a stream."""
    temperature: bool = True
    system: bool = True
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    starts_thinking: bool = False
    """Replies begin inside the model's thinking, without the tag that opens it."""


def first_abilities(structured: Structured) -> Abilities:
    """Return where to begin with a server that nothing is known of."""
    return Abilities(form="schema" if structured == "auto" else structured)


def lesser(abilities: Abilities, request: Request, words: str) -> Abilities | None:
    """Return what to try after a server refused a body; None when its words name nothing of it.

    Args:
        abilities: What the refused body relied on.
        request: What was asked.
        words: The server's message in lower case.
    """

    def names(*texts: str) -> bool:
        return any(text in words for text in texts)

    if request.schema is not None and abilities.form in ("schema", "json"):
        formats = (
            "response_format",
            "response format",
            "json_schema",
            "json_object",
            "json schema",
        )
        if names(*formats, "structured output", "grammar", "guided"):
            return replace(abilities, form="json" if abilities.form == "schema" else "text")
    has_forced_tool = request.schema is not None and abilities.form == "tools"
    if (has_forced_tool or (request.tools and abilities.tools)) and names("tool", "function"):
        if has_forced_tool:
            return replace(abilities, form="json")
        return replace(abilities, tools=False)
    if abilities.usage and names("stream_options", "include_usage"):
        return replace(abilities, usage=False)
    if abilities.length_field == "max_tokens" and names("max_completion_tokens"):
        return replace(abilities, length_field="max_completion_tokens")
    if abilities.temperature and names("temperature"):
        return replace(abilities, temperature=False)
    if abilities.system and names("system role", "role system", "system message"):
        return replace(abilities, system=False)
    return None


def body_of(
    request: Request,
    abilities: Abilities,
    *,
    model: str,
    temperature: float,
    max_tokens: int,
    thoughts: Mapping[str, str],
) -> dict[str, Any]:
    """Return the JSON body of a streamed request.

    Args:
        thoughts: The thinking that preceded a tool call, by the call's id: some servers refuse a
            conversation in which it is missing.
    """
    messages = _with_words(request.messages, _words(request, abilities))
    if not abilities.tools:
        messages = [_tools_as_text(message) for message in messages]
    sent = [_message(message, thoughts) for message in messages]
    body: dict[str, Any] = {
        "model": model,
        "messages": sent if abilities.system else _without_system(sent),
        "stream": True,
        abilities.length_field: max_tokens,
    }
    if abilities.usage:
        body["stream_options"] = {"include_usage": True}
    if abilities.temperature:
        body["temperature"] = temperature
    tools = [_tool(t.name, t.description, t.parameters) for t in request.tools if abilities.tools]
    if request.schema is not None:
        if abilities.form == "schema":
            body["response_format"] = _json_schema(request.schema_name, request.schema)
        elif abilities.form == "json":
            body["response_format"] = {"type": "json_object"}
        elif abilities.form == "tools":
            described = "Give the answer by calling this function."
            tools.append(_tool(request.schema_name, described, request.schema))
            if not request.tools:
                chosen = {"type": "function", "function": {"name": request.schema_name}}
                body["tool_choice"] = chosen
    if tools:
        body["tools"] = tools
    return body


def _words(request: Request, abilities: Abilities) -> str:
    """What the protocol's fields do not say to this server."""
    words = []
    if request.tools and not abilities.tools:
        words.append(_tool_words(request.tools))
    if request.schema is not None and abilities.form in ("json", "text"):
        schema = json.dumps(request.schema, ensure_ascii=False, sort_keys=True)
        words.append(
            "Answer with one JSON object and nothing else: no prose, no code fence. It follows this "
            f"JSON schema:\n{schema}"
        )
    return "\n\n".join(words)


def _tool_words(tools: Sequence[ToolSpec]) -> str:
    lines = [
        json.dumps(
            {"name": t.name, "description": t.description, "parameters": t.parameters},
            ensure_ascii=False,
            sort_keys=True,
        )
        for t in tools
    ]
    return (
        "These functions can be called, each described by one line of JSON:\n"
        + "\n".join(lines)
        + '\nTo call some, answer with only this JSON: {"tool_calls": [{"name": "...", "arguments": '
        "{...}}]}. The results follow in the next message. Otherwise answer as asked."
    )


def _with_words(messages: Sequence[Message], words: str) -> list[Message]:
    """Add words to the first system message, which stays the same from turn to turn."""
    if not words:
        return list(messages)
    if messages and messages[0].role == "system":
        first = replace(messages[0], content=f"{messages[0].content}\n\n{words}")
        return [first, *messages[1:]]
    return [Message("system", words), *messages]


def _tools_as_text(message: Message) -> Message:
    if message.role == "tool":
        words = f"Result of call {message.tool_call_id}:\n{message.content}"
        return Message("user", words)
    if message.tool_calls:
        calls = [
            {"id": c.id, "name": c.name, "arguments": json.loads(_valid_arguments(c))}
            for c in message.tool_calls
        ]
        said = json.dumps({"tool_calls": calls}, ensure_ascii=False)
        return Message("assistant", f"{message.content}\n{said}".strip())
    return message


def _message(message: Message, thoughts: Mapping[str, str]) -> dict[str, Any]:
    sent: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        sent["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _valid_arguments(call)},
            }
            for call in message.tool_calls
        ]
        known = [thoughts[call.id] for call in message.tool_calls if call.id in thoughts]
        if known:
            sent["reasoning_content"] = known[0]
    if message.tool_call_id is not None:
        sent["tool_call_id"] = message.tool_call_id
    return sent


def _valid_arguments(call: ToolCall) -> str:
    # Servers parse the arguments of earlier calls and refuse the whole request over a bad one.
    try:
        value = json.loads(call.arguments)
    except (ValueError, RecursionError):
        value = None
    return call.arguments if isinstance(value, dict) else json.dumps({"invalid": call.arguments})


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say what the system messages say at the start of the first user message."""
    said = [message["content"] for message in messages if message["role"] == "system"]
    rest = [dict(message) for message in messages if message["role"] != "system"]
    if not rest or rest[0]["role"] != "user":
        rest.insert(0, {"role": "user", "content": ""})
    rest[0]["content"] = "\n\n".join([*said, rest[0]["content"]]).strip()
    return rest


def _tool(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _json_schema(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    described = {"name": name, "schema": schema, "strict": _is_strict(schema)}
    return {"type": "json_schema", "json_schema": described}


def _is_strict(schema: Any) -> bool:
    """Tell whether every object of a schema is closed and complete, which strict servers demand."""
    if isinstance(schema, list | tuple):
        return all(_is_strict(item) for item in schema)
    if not isinstance(schema, Mapping):
        return True
    if schema.get("type") == "object":
        named = set(schema.get("properties", {}))
        if (
            schema.get("additionalProperties") is not False
            or set(schema.get("required", ())) != named
        ):
            return False
    return all(_is_strict(item) for item in schema.values())
