"""A language-model server for tests: real HTTP on this machine, with the manners of real servers.

`LlmServer(rules)` answers each POST by the next rule, the last one again and again. A rule is a
function of an `Incoming`. `vllm`, `ollama`, `deepseek`, `qwen` and `plain` make rules that check the
body as those servers do and stream as they do; the rest are faults.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

DONE = "data: [DONE]\n\n"


@pytest.fixture(autouse=True)
def refuse_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sockets connect to this machine and nothing else, in files that import it."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] != "127.0.0.1":
            raise OSError("tests have no network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@dataclass
class Incoming:
    """A request that has arrived, and the ways to answer it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    handler: BaseHTTPRequestHandler
    closed_after: float | None = None
    """Seconds until the other side hung up, for rules that wait for it."""

    def json(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        self.raw(status, json.dumps(value).encode(), "application/json", headers)

    def raw(
        self,
        status: int,
        data: bytes,
        kind: str,
        headers: Mapping[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.handler.send_response(status)
        self.handler.send_header("Content-Type", kind)
        self.handler.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in (headers or {}).items():
            self.handler.send_header(name, value)
        self.handler.end_headers()
        self.handler.wfile.write(data)

    def stream(self, pieces: Iterable[str | bytes], is_chunked: bool = True) -> None:
        """Send an event stream; with chunks, a missing end is seen by the other side."""
        self.begin(is_chunked)
        for piece in pieces:
            self.send(piece, is_chunked)
        if is_chunked:
            self.handler.wfile.write(b"0\r\n\r\n")

    def begin(self, is_chunked: bool = True) -> None:
        self.handler.send_response(200)
        self.handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        if is_chunked:
            self.handler.send_header("Transfer-Encoding", "chunked")
        self.handler.end_headers()

    def send(self, piece: str | bytes, is_chunked: bool = True) -> None:
        data = piece.encode() if isinstance(piece, str) else piece
        if is_chunked:
            data = f"{len(data):x}\r\n".encode() + data + b"\r\n"
        self.handler.wfile.write(data)
        self.handler.wfile.flush()

    def wait_for_hangup(self, seconds: float = 5.0) -> None:
        """Say nothing more until the other side closes the connection."""
        started = time.monotonic()
        connection = self.handler.connection
        while time.monotonic() - started < seconds:
            if select.select([connection], [], [], 0.02)[0] and not connection.recv(1):
                self.closed_after = time.monotonic() - started
                return

    def reset(self) -> None:
        """Break the connection off, not close it."""
        linger = struct.pack("ii", 1, 0)
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.handler.connection.close()

    @property
    def prompt(self) -> str:
        return "\n".join(str(message.get("content")) for message in self.body["messages"])


Rule = Callable[[Incoming], None]


class LlmServer:
    """A server on a free port, to be used in a `with` statement."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = list(rules)
        self.requests: list[Incoming] = []
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._http = Server(("127.0.0.1", 0), Handler)
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> LlmServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [incoming.body for incoming in self.requests]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        data = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        incoming = Incoming(handler.path, headers, json.loads(data or b"{}"), handler)
        with self._lock:
            position = len(self.requests)
            self.requests.append(incoming)
        self.rules[min(position, len(self.rules) - 1)](incoming)


@dataclass(frozen=True)
class Call:
    """A tool call that a server makes."""

    name: str
    arguments: Any
    id: str = "call-a"


@dataclass(frozen=True)
class Answer:
    """What the model behind the server says."""

    text: str = "Hello there."
    thinking: str = ""
    calls: Sequence[Call] = ()
    finish: str = "stop"
    usage: tuple[int, int] | None = (11, 7)
    pieces: int = 3
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the first delta."""


def event(delta: Mapping[str, Any] | None, finish: str | None = None, **more: Any) -> str:
    """One event of a stream; without a delta, one without choices."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    chunk = {
        "id": "chat-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "served-model",
        "choices": choices,
        **more,
    }
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def split(text: str, pieces: int) -> list[str]:
    """Cut a text into so many pieces."""
    size = max(1, -(-len(text) // pieces))
    return [text[start : start + size] for start in range(0, len(text), size)]


def counted(usage: tuple[int, int]) -> dict[str, int]:
    prompt, completion = usage
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def texts(answer: Answer, name: str = "content") -> Iterator[str]:
    text = answer.text if name == "content" else answer.thinking
    for piece in split(text, answer.pieces) if text else ():
        yield event({name: piece})


def refuse(status: int, message: str, code: object = None, **headers: str) -> Rule:
    """A rule that answers with an error in OpenAI's form."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}

    def rule(incoming: Incoming) -> None:
        error = {"message": message, "type": "error", "param": None, "code": code}
        incoming.json(status, {"error": error}, names)

    return rule


def vllm(answer: Answer | None = None, has_tool_parser: bool = True) -> Rule:
    """vLLM: schemas are honoured; tools need a server option; counts come last, without choices."""
    said = answer or Answer()

    def rule(incoming: Incoming) -> None:
        if incoming.body.get("tools") and not has_tool_parser:
            words = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser'
            incoming.json(400, {"object": "error", "message": words, "code": 400})
            return
        incoming.stream(_vllm_stream(said, bool(incoming.body.get("stream_options"))))

    return rule


def _vllm_stream(answer: Answer, has_usage: bool) -> Iterator[str]:
    yield event({"role": "assistant", "content": "", **answer.extra})
    yield from texts(answer, "reasoning_content")
    yield from texts(answer)
    for index, call in enumerate(answer.calls):
        function = {"name": call.name, "arguments": ""}
        first = {"index": index, "id": call.id, "type": "function", "function": function}
        yield event({"tool_calls": [first]})
        for piece in split(json.dumps(call.arguments), 4):
            yield event({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    yield event({"content": ""}, "tool_calls" if answer.calls else answer.finish)
    if has_usage and answer.usage:
        yield event(None, usage=counted(answer.usage))
    yield DONE


def ollama(answer: Answer | None = None, has_tools: bool = True) -> Rule:
    """Ollama: no counts, calls in one piece with the index 0 and finish `stop`, plain errors."""
    said = answer or Answer()

    def pieces() -> Iterator[str]:
        yield from texts(said)
        if said.calls:
            calls = [
                {
                    "id": call.id,
                    "index": 0,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
                }
                for call in said.calls
            ]
            yield event({"role": "assistant", "content": "", "tool_calls": calls})
        yield event({"role": "assistant", "content": ""}, said.finish)
        yield DONE

    def rule(incoming: Incoming) -> None:
        if incoming.body.get("tools") and not has_tools:
            name = f"registry.ollama.ai/library/{incoming.body['model']}"
            words = f"{name} does not support tools"
            incoming.json(400, {"error": {"message": words, "type": "api_error"}})
            return
        incoming.stream(pieces())

    return rule


def deepseek(answer: Answer | None = None) -> Rule:
    """DeepSeek: no schemas, JSON only when the prompt says so, thinking apart, keep-alive lines.

    A conversation with tool calls has to carry the thinking that led to them.
    """
    said = answer or Answer()

    def rule(incoming: Incoming) -> None:
        wanted = incoming.body.get("response_format", {}).get("type")
        if wanted == "json_schema":
            refuse(400, "This response_format type is unavailable now", "invalid_request_error")(
                incoming
            )
            return
        if wanted == "json_object" and "json" not in incoming.prompt.lower():
            refuse(400, "Prompt must contain the word 'json' to use 'response_format'")(incoming)
            return
        for message in incoming.body["messages"]:
            if message.get("tool_calls") and not message.get("reasoning_content"):
                refuse(400, "Missing `reasoning_content` field in the assistant message")(incoming)
                return
        keep_alive = ": keep-alive\n\n"
        stream = _vllm_stream(said, False)
        last = event({"content": ""}, said.finish, usage=counted(said.usage or (1, 1)))
        body = [piece for piece in stream if piece != DONE][:-1] if not said.calls else None
        if body is None:
            incoming.stream([keep_alive, *_vllm_stream(said, True)])
        else:
            incoming.stream([keep_alive, keep_alive, *body, last, DONE])

    return rule


def qwen(answer: Answer | None = None, style: str = "tags") -> Rule:
    """Qwen: thinking in tags in the text, or without the first tag (`orphan`); lines end in CRLF.

    Tool calls come with an id in the first piece alone and arguments that are no text.
    """
    said = answer or Answer()

    def pieces() -> Iterator[str]:
        opened = "<think>\n" if style == "tags" else ""
        whole = f"{opened}{said.thinking}\n</think>\n\n{said.text}" if said.thinking else said.text
        for piece in split(whole, 9):
            yield event({"content": piece}).replace("\n", "\r\n")
        for call in said.calls:
            function = {"name": call.name, "arguments": call.arguments}
            yield event({"tool_calls": [{"type": "function", "function": function}]})
        yield event({}, said.finish).replace("\n", "\r\n")
        if said.usage:
            yield event(None, usage=counted(said.usage)).replace("\n", "\r\n")
        yield DONE

    return lambda incoming: incoming.stream(pieces())


def plain(answer: Answer | None = None) -> Rule:
    """A simple server: no formats, no tools, no options, no system role, and no streaming."""
    said = answer or Answer()

    def rule(incoming: Incoming) -> None:
        for name in ("response_format", "tools", "stream_options"):
            if name in incoming.body:
                detail = [{"loc": ["body", name], "msg": "extra fields not permitted"}]
                incoming.json(422, {"detail": detail})
                return
        if any(message["role"] == "system" for message in incoming.body["messages"]):
            incoming.json(400, {"message": "System role not supported", "code": 400})
            return
        message = {"role": "assistant", "content": said.text}
        choices = [{"index": 0, "message": message, "finish_reason": said.finish}]
        reply: dict[str, Any] = {"id": "1", "model": "served-model", "choices": choices}
        if said.usage:
            reply["usage"] = counted(said.usage)
        incoming.json(200, reply)

    return rule


def streamed(*pieces: str | bytes, is_chunked: bool = True) -> Rule:
    """A rule that streams these pieces as they are."""
    return lambda incoming: incoming.stream(pieces, is_chunked)


def broken(*pieces: str) -> Rule:
    """A rule that streams some pieces and then breaks the connection off."""

    def rule(incoming: Incoming) -> None:
        incoming.begin()
        for piece in pieces:
            incoming.send(piece)
        time.sleep(0.05)
        incoming.reset()

    return rule


def silent(*pieces: str, has_headers: bool = True) -> Rule:
    """A rule that streams some pieces and then nothing until the other side hangs up."""

    def rule(incoming: Incoming) -> None:
        if has_headers:
            incoming.begin()
        for piece in pieces:
            incoming.send(piece)
        incoming.wait_for_hangup()

    return rule


def dripping(piece: str, seconds: float) -> Rule:
    """A rule that sends the same piece again and again, so many seconds apart."""

    def rule(incoming: Incoming) -> None:
        incoming.begin()
        try:
            for _ in range(200):
                incoming.send(piece)
                time.sleep(seconds)
        except OSError:
            incoming.closed_after = 0.0

    return rule
