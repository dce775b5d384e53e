"""The record of questions to a language model: complete, without secrets, and fit to be replayed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from synth_agent.errors import InvalidInput, SynthAgentError
from synth_agent.planner.budget import Usage
from synth_agent.planner.endpoint import (
    Budget,
    BudgetSpent,
    EndpointError,
    EndpointSettings,
    Message,
    OpenAIEndpoint,
    ReplayEndpoint,
    Reply,
    Request,
    ToolCall,
    ToolSpec,
    Transcript,
    forget_abilities,
)
from synth_agent.planner.transcript import Exchange, read_transcript, request_content, spent
from synth_agent.secrets import (
    REMOVED,
    StreamRedactor,
    redact,
    redact_value,
    secrets_of_address,
    without_secrets,
)
from tests import llm_server as servers
from tests.llm_server import DONE, Answer, Call, LlmServer, event, refuse_network

__all__ = ["refuse_network"]

CANARY = "canary-7f3a9c51e2d84b06/with+odd=letters"
TOOL = ToolSpec("samples", "Show samples.", {"type": "object", "properties": {}})
HELLO = Request((Message("user", "Hello?"),), (TOOL,), {"type": "object"}, max_tokens=100)
REPLY = Reply("你好 \u2028 \ud800", (ToolCall("a", "samples", '{"n": '),), "length", "", 3, 4, "m")


def exchange(text: str = "Hello?", **more: Any) -> Exchange:
    request = request_content(replace(HELLO, messages=(Message("user", text),)))
    made: dict[str, Any] = {
        "request": request,
        "reply": REPLY,
        "error": None,
        "usage": Usage(3, 4, 0.5, True),
        "seconds": 1.5,
        "attempts": 2,
        "options": {"model": "m"},
        "thinking": "Hm.",
    }
    return Exchange(**(made | more))


@pytest.fixture(autouse=True)
def _unknown_servers() -> Iterator[None]:
    forget_abilities()
    yield
    forget_abilities()


def connected(server: LlmServer, folder: Path, key: str = CANARY, **changes: Any) -> OpenAIEndpoint:
    settings = EndpointSettings("a-model", **changes)
    transcript = Transcript(folder / "transcript.jsonl")
    budget = Budget(settings)
    return OpenAIEndpoint(
        settings, key, server.url, transcript, budget, sleep=lambda _: None, seed=1
    )


def test_importing_the_client_is_light() -> None:
    code = "import sys, synth_agent.planner.endpoint; print(sorted({'openai', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# The file


def test_exchanges_read_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "transcript.jsonl"
    transcript = Transcript(path)
    error = {"kind": "EndpointError", "title": "No", "message": "it is off", "hint": "start it"}
    written = [exchange(), exchange("two\nlines"), exchange(reply=None, error=error)]
    for one in written:
        transcript.append(one)
    found = read_transcript(path)
    assert [replace(one, time="") for one in found] == written
    assert [one.digest for one in found] == [one.digest for one in written]
    raised = found[2].raised()
    assert isinstance(raised, EndpointError) and raised.hint == "start it"
    assert len(path.read_bytes().split(b"\n")) == 4 and path.stat().st_mode & 0o077 == 0
    assert sum(spent(path), Usage()) == Usage(9, 12, 1.5, True)


def test_line_holds_what_a_reader_needs(tmp_path: Path) -> None:
    with LlmServer(servers.vllm(Answer("{}", thinking="Hm."))) as server:
        endpoint = connected(server, tmp_path, price_per_million_input=1e6)
        endpoint.ask(HELLO)
    (line,) = (tmp_path / "transcript.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["request"]["messages"] == [{"role": "user", "content": "Hello?"}]
    assert record["request"]["tools"][0]["name"] == "samples" and record["time"].endswith("+00:00")
    assert record["options"]["model"] == "a-model" and record["options"]["address"] == server.url
    assert record["usage"] == {
        "prompt_tokens": 11,
        "completion_tokens": 7,
        "money": 11.0,
        "estimated": False,
    }
    assert record["attempts"] == 1 and record["thinking"] == "Hm." and record["error"] is None


def test_torn_last_line_is_ignored_and_then_dropped(tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    Transcript(path).append(exchange())
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    assert len(read_transcript(path)) == 1
    Transcript(path).append(exchange("again"))
    assert [one.request["messages"][0]["content"] for one in read_transcript(path)] == [
        "Hello?",
        "again",
    ]


@pytest.mark.parametrize("line", ["{}", "not JSON", "[]", '{"request": {}, "reply": {"text": 1}}'])
def test_lines_that_are_no_exchanges_are_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    Transcript(path).append(exchange())
    path.write_bytes(path.read_bytes() + line.encode() + b"\n")
    with pytest.raises(InvalidInput, match="line 2"):
        read_transcript(path)


def test_transcript_that_cannot_be_written_is_named_before_any_question(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="transcript.jsonl"):
        Transcript(tmp_path / "file" / "transcript.jsonl")
    with pytest.raises(InvalidInput, match="missing.jsonl"):
        read_transcript(tmp_path / "missing.jsonl")
    assert spent(tmp_path / "missing.jsonl") == ()


def test_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "transcript.jsonl"
    transcript = Transcript(path)
    transcript.append(exchange())
    write, whole = os.write, path.read_bytes()

    def fill(descriptor: int, data: bytes) -> int:
        if len(data) > 100:
            return write(descriptor, data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fill)
    with pytest.raises(InvalidInput, match="No space left"):
        transcript.append(exchange("Hello?" + "x" * 90))
    assert path.read_bytes() == whole


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    transcript = Transcript(tmp_path / "transcript.jsonl")

    def write(name: str) -> None:
        for _ in range(10):
            transcript.append(exchange(name * 3000))

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_transcript(transcript.path)) == 40


# The budget


def test_budget_sets_aside_what_running_calls_may_use() -> None:
    budget = Budget(EndpointSettings("m", token_cap=100))
    first = budget.reserve(30, 30)
    with pytest.raises(BudgetSpent, match="token_cap"):
        budget.reserve(20, 21)
    second = budget.reserve(20, 20)
    budget.settle(first, budget.price(30, 1))
    budget.settle(second, Usage())
    assert budget.spent == Usage(30, 1)
    budget.reserve(60, 9)
    with pytest.raises(BudgetSpent, match="100 tokens"):
        budget.reserve(1, 0)


def test_budget_goes_on_from_a_transcript(tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    Transcript(path).append(exchange())
    settings = EndpointSettings(
        "m", spend_cap=0.6, price_per_million_input=1e5, price_per_million_output=1e5
    )
    budget = Budget(settings, spent(path))
    assert budget.spent.money == 0.5
    with pytest.raises(BudgetSpent, match=r"0\.5000 in money of .* 0\.6000"):
        budget.reserve(1, 1)
    budget.settle(budget.reserve(0, 1), Usage())


@pytest.mark.parametrize(
    "changes",
    [
        {"token_cap": -1},
        {"spend_cap": float("nan"), "price_per_million_input": 1, "price_per_million_output": 1},
        {"spend_cap": 1.0},
        {"spend_cap": 1.0, "price_per_million_input": 1.0},
    ],
)
def test_budgets_that_cannot_be_kept(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        Budget(EndpointSettings("m", **changes))


# Replay


def session(endpoint: OpenAIEndpoint | ReplayEndpoint) -> tuple[list[object], str]:
    """A conversation whose questions depend on the replies, with a failure in it."""
    shown: list[str] = []
    results: list[object] = []
    messages: tuple[Message, ...] = HELLO.messages
    for turn in range(5):
        request = replace(HELLO, messages=messages, schema=None)
        try:
            reply = endpoint.ask(request, shown.append, partial(bool, turn == 3))
        except SynthAgentError as error:
            results.append((type(error), str(error)))
            messages = (*messages, Message("user", f"You failed: {error.title}"))
            continue
        results.append(reply)
        answers = [Message("tool", "rows", tool_call_id=call.id) for call in reply.tool_calls]
        messages = (*messages, Message("assistant", reply.text, reply.tool_calls), *answers)
    return results, "".join(shown)


def test_replay_repeats_a_session_byte_for_byte(tmp_path: Path) -> None:
    calling = Answer("Let me look.", calls=(Call("samples", {"n": 1}, ""),))
    said = f"你好, {CANARY} {CANARY[:20]}"
    rules = (servers.vllm(calling), servers.refuse(400, "no"), servers.qwen(Answer(said)))
    with LlmServer(*rules) as server:
        live = session(connected(server, tmp_path))
    path = tmp_path / "transcript.jsonl"
    recorded = path.read_bytes()
    assert session(ReplayEndpoint(path)) == live
    assert [getattr(one, "finish", "error") for one in live[0]] == [
        "tool_calls",
        "error",
        "stop",
        "cancelled",
        "stop",
    ]
    assert path.read_bytes() == recorded and CANARY not in recorded.decode()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"messages": (Message("user", "Hello!"),)}, r"messages\[0\].content from character 5"),
        ({"messages": (*HELLO.messages, Message("user", "?"))}, "messages: 1 recorded, 2 asked"),
        ({"messages": (Message("system", "Hello?"),)}, r"messages\[0\].role"),
        ({"tools": ()}, "tools: only in the recording"),
        ({"schema": {"type": "array"}}, "schema.type from character 0"),
        ({"max_tokens": 7}, "max_tokens: recorded 100, asked 7"),
    ],
)
def test_replay_names_the_first_difference(
    change: dict[str, Any], where: str, tmp_path: Path
) -> None:
    path = tmp_path / "transcript.jsonl"
    Transcript(path).append(exchange())
    replay = ReplayEndpoint(path)
    with pytest.raises(InvalidInput, match=f"exchange 1, {where}"):
        replay.ask(replace(HELLO, **change))
    assert replay.ask(HELLO) == REPLY and replay.remaining == 0
    with pytest.raises(InvalidInput, match="at its end"):
        replay.ask(HELLO)


def test_replay_can_be_cancelled_without_losing_its_place(tmp_path: Path) -> None:
    Transcript(tmp_path / "t.jsonl").append(exchange())
    replay = ReplayEndpoint(tmp_path / "t.jsonl")
    assert replay.ask(HELLO, is_cancelled=lambda: True).finish == "cancelled"
    assert replay.ask(HELLO) == REPLY


# Secrets


@pytest.mark.parametrize(
    "text",
    [
        "key sk-abcdefghijklmnop1234",
        "Incorrect API key provided: sk-proj-ab************wxyz.",
        "Authorization: Bearer abcdef0123456789",
        '{"authorization": "Basic abcdef0123456789"}',
        "http://me:abcdef0123456789@host/v1",
        "https://host/v1?api-key=abcdef0123456789&x=1",
        "hf_abcdefghijklmnop1234",
        "token eyJhbGciOiJI.eyJzdWIiOiJ.abcdef0123456789",
    ],
)
def test_what_looks_like_a_key_is_removed(text: str) -> None:
    shown = redact(text)
    assert REMOVED in shown
    for part in ("abcdef", "wxyz", "eyJhbG"):
        assert part not in shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "A task-specific-recipe-with-words, risk-averse.",
        "Words such as sk-1 or disk-image-of-a-cat are fine.",
        "http://127.0.0.1:8000/v1 and me@example.org",
        "the bearer of the ring",
    ],
)
def test_ordinary_words_stay(text: str) -> None:
    assert redact(text, ("", "ab")) == text


def test_known_secrets_are_removed_in_every_spelling() -> None:
    secret = 'odd "key" +/=é'
    spelled = [
        secret,
        json.dumps(secret),
        "b2RkICJrZXkiICsvPcOp",
        "odd%20%22key%22%20%2B%2F%3D%C3%A9",
    ]
    for text in spelled:
        assert redact(f"<{text}>", [secret]).strip('"<>') == REMOVED
    assert redact_value({secret: [1, None, (secret,)]}, [secret]) == {REMOVED: [1, None, [REMOVED]]}


def test_address_is_shown_without_its_secrets() -> None:
    address = "https://me:p%40ssw0rd@host:8000/v1/?token=abcdef#x"
    assert without_secrets(address) == "https://host:8000/v1"
    assert {"p@ssw0rd", "p%40ssw0rd", "abcdef"} <= set(secrets_of_address(address))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_streams_are_redacted_across_pieces(size: int) -> None:
    text = f"Ask: {CANARY}. Skip sk-abcdefghijklmnop1234 and canary-birds, s"
    redactor = StreamRedactor((CANARY,))
    pieces = [redactor.feed(text[at : at + size]) for at in range(0, len(text), size)]
    shown = "".join([*pieces, redactor.close()])
    assert CANARY not in shown and "abcdefgh" not in shown
    assert shown.startswith(f"Ask: {REMOVED}. Skip {REMOVED}") and shown.endswith("canary-birds, s")


@pytest.mark.parametrize("size", [1, 2, 5, 16])
@pytest.mark.parametrize(
    ("secret", "is_known"),
    [
        ("sk-canary-9876543210fedcba", True),
        ("hf_abcdefghijklmnopqrstuvwxyz", True),
        ("abcabcabcabc", True),
        ("ghp_abcdefghijklmnop0123", False),
        ("glpat-abcdefghijklmnop", False),
        ("xoxb-abcdefghijklmnop", False),
        ("AKIAABCDEFGHIJKLMNOP", False),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl", False),
    ],
)
def test_no_part_of_a_key_is_shown_however_it_is_split(
    secret: str, is_known: bool, size: int
) -> None:
    for text in (f"key={secret}. And {secret}", f"{secret} {secret}\n", secret):
        redactor = StreamRedactor((secret,) if is_known else ())
        pieces = [redactor.feed(text[at : at + size]) for at in range(0, len(text), size)]
        shown = "".join([*pieces, redactor.close()])
        assert shown == text.replace(secret, REMOVED)


def test_text_is_held_back_only_while_it_may_be_a_secret() -> None:
    redactor = StreamRedactor((CANARY,))
    assert redactor.feed("see the can") == "see the "
    assert redactor.feed("dle") == "candle"


def echoes() -> list[servers.Rule]:
    """Servers that say the key back in every way."""
    spread = [event({"content": piece}) for piece in servers.split(f"It is {CANARY}!", 12)]
    call = {"id": CANARY, "function": {"name": CANARY, "arguments": {"key": CANARY}}}
    where = f"http://{CANARY.upper()}.invalid/{CANARY}"
    return [
        *(servers.refuse(status, f"Bad key {CANARY}") for status in (400, 401, 403, 404, 429, 500)),
        servers.refuse(400, f"maximum context length {CANARY}"),
        servers.refuse(400, f"content_filter {CANARY}"),
        lambda i: i.json(302, {}, {"Location": where}),
        lambda i: i.json(200, {"choices": [{"message": {"content": json.dumps(i.headers)}}]}),
        lambda i: i.raw(500, str(i.headers).encode(), "text/plain"),
        servers.streamed(*spread, event({}, "stop"), DONE),
        servers.streamed(event({"content": "x", "reasoning_content": CANARY}, "stop"), DONE),
        servers.streamed(event({"content": "x", "refusal": CANARY}, "stop"), DONE),
        servers.streamed(event({"content": "x"}, "stop", model=CANARY), DONE),
        servers.streamed(event({"tool_calls": [call]}, "tool_calls"), DONE),
        servers.streamed(f'data: {{"error": {{"message": "{CANARY}"}}}}\n\n'),
        servers.streamed(f"data: {CANARY}\n\n"),
        servers.broken(event({"content": CANARY})),
        lambda i: i.reset(),
    ]


@pytest.mark.parametrize("position", range(len(echoes())))
def test_canary_is_found_nowhere(
    position: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []
    request = replace(HELLO, messages=(Message("user", f"My key is {CANARY}."),))
    with LlmServer(echoes()[position]) as server:
        for changed in (request, replace(request, tools=(), schema=None)):
            endpoint = connected(server, tmp_path, retries=1)
            try:
                seen.append(repr(endpoint.ask(changed, seen.append)))
            except SynthAgentError as error:
                seen += [
                    str(error),
                    repr(error.as_dict()),
                    "".join(traceback.format_exception(error)),
                ]
            seen.append(repr(vars(endpoint)["_address"]) + repr(endpoint))
        assert server.requests[0].headers["authorization"] == f"Bearer {CANARY}"
    found = "".join([*seen, caplog.text, *capfd.readouterr()])
    found += "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert CANARY not in found and json.dumps(CANARY)[1:-1] not in found and len(seen) >= 4
    assert "canary-7f3a" not in found.lower()
