"""Questions to language-model servers: a real local server with the manners and faults of each kind."""

from __future__ import annotations

import email.utils
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from synth_agent.errors import InvalidInput, SynthAgentError
from synth_agent.planner.endpoint import (
    Budget,
    BudgetSpent,
    ContextTooLong,
    EndpointError,
    EndpointSettings,
    Message,
    OpenAIEndpoint,
    Reply,
    Request,
    ToolCall,
    ToolSpec,
    Transcript,
    forget_abilities,
)
from synth_agent.planner.transcript import read_transcript
from tests import llm_server as servers
from tests.llm_server import DONE, Answer, Call, LlmServer, event, refuse_network

__all__ = ["refuse_network"]

KEY = "canary-7f3a9c51e2d84b06"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
TOOL = ToolSpec("samples", "Show samples.", {"type": "object", "properties": {}})
HELLO = Request((Message("system", "Be brief."), Message("user", "Hello?")))
WITH_SCHEMA = replace(HELLO, schema=SCHEMA)
WITH_TOOL = replace(HELLO, tools=(TOOL,))
JSON_ANSWER = Answer('{"name": "mini"}')
CALLING = Answer("", calls=(Call("samples", {"rows": 3}),))


@pytest.fixture(autouse=True)
def _unknown_servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    forget_abilities()
    yield
    forget_abilities()


@dataclass
class Client:
    """An endpoint with what it writes and how long it pauses."""

    endpoint: OpenAIEndpoint
    budget: Budget
    path: Path
    pauses: list[float] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)

    def ask(self, request: Request = HELLO, **more: Any) -> Reply:
        return self.endpoint.ask(request, **({"on_text": self.shown.append} | more))

    @property
    def paused(self) -> float:
        return sum(self.pauses)


Connect = Callable[..., Client]


@pytest.fixture
def connect(tmp_path: Path) -> Connect:
    def make(server: LlmServer | str, key: str = KEY, **changes: Any) -> Client:
        settings = EndpointSettings("a-model", **changes)
        path, budget = tmp_path / "transcript.jsonl", Budget(settings)
        pauses: list[float] = []
        url = server if isinstance(server, str) else server.url
        endpoint = OpenAIEndpoint(
            settings, key, url, Transcript(path), budget, sleep=pauses.append, seed=3
        )
        return Client(endpoint, budget, path, pauses)

    return make


# The manners of servers


@pytest.mark.parametrize("make", [servers.vllm, servers.ollama, servers.deepseek, servers.qwen])
def test_servers_that_stream(make: Callable[[Answer], servers.Rule], connect: Connect) -> None:
    with LlmServer(make(Answer("Grüße, 你好!", thinking="secretly"))) as server:
        client = connect(server)
        reply = client.ask()
    assert (reply.text, reply.finish, reply.model) == ("Grüße, 你好!", "stop", "served-model")
    assert "".join(client.shown) == reply.text and len(client.shown) > 1
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert server.requests[0].path == "/v1/chat/completions" and not client.pauses


def test_plain_server_is_found_out_once_and_remembered(connect: Connect) -> None:
    request = replace(WITH_SCHEMA, tools=(TOOL,))
    with LlmServer(servers.plain(JSON_ANSWER)) as server:
        client = connect(server)
        first, asked = client.ask(request), len(server.requests)
        second = client.ask(request)
    assert first.text == second.text == JSON_ANSWER.text
    assert asked == 6 and len(server.requests) == 7
    last = server.bodies[-1]
    assert not {"tools", "response_format", "stream_options"} & set(last)
    assert [message["role"] for message in last["messages"]] == ["user"]
    assert '"samples"' in server.requests[-1].prompt and '"name"' in server.requests[-1].prompt
    assert client.shown == [JSON_ANSWER.text] * 2


def test_schema_is_sent_strictly_when_it_is_strict(connect: Connect) -> None:
    with LlmServer(servers.vllm(JSON_ANSWER)) as server:
        client = connect(server)
        assert client.ask(WITH_SCHEMA).text == JSON_ANSWER.text
        client.ask(replace(WITH_SCHEMA, schema={"type": "object", "properties": {}}))
    sent = [body["response_format"]["json_schema"] for body in server.bodies]
    assert [s["strict"] for s in sent] == [True, False]
    assert sent[0]["schema"] == SCHEMA and sent[0]["name"] == "proposal"


def test_deepseek_gets_json_mode_with_the_schema_in_words(connect: Connect) -> None:
    with LlmServer(servers.deepseek(JSON_ANSWER)) as server:
        assert connect(server).ask(WITH_SCHEMA).text == JSON_ANSWER.text
    assert [body["response_format"]["type"] for body in server.bodies] == [
        "json_schema",
        "json_object",
    ]
    assert "JSON schema" in server.requests[1].prompt


@pytest.mark.parametrize("status", [400, 404, 422, 500])
def test_formats_refused_by_name_end_in_words(status: int, connect: Connect) -> None:
    refusal = servers.refuse(status, "response_format is not supported")
    with LlmServer(refusal, refusal, servers.ollama(JSON_ANSWER)) as server:
        client = connect(server)
        assert client.ask(WITH_SCHEMA).text == JSON_ANSWER.text
    assert "response_format" not in server.bodies[-1] and not client.pauses


def test_server_that_ignores_the_format_is_asked_in_words(connect: Connect) -> None:
    with LlmServer(
        servers.ollama(Answer("Certainly! I would...")), servers.ollama(JSON_ANSWER)
    ) as s:
        client = connect(s)
        assert client.ask(WITH_SCHEMA).text == JSON_ANSWER.text
        client.ask(WITH_SCHEMA)
    assert "".join(client.shown) == JSON_ANSWER.text * 2
    assert ["response_format" in body for body in s.bodies] == [True, False, False]


def test_prose_after_words_is_returned_as_it_is(connect: Connect) -> None:
    with LlmServer(servers.ollama(Answer("I will not."))) as server:
        assert connect(server).ask(WITH_SCHEMA).text == "I will not."
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("structured", "first"),
    [("json", {"type": "json_object"}), ("text", None), ("schema", "json_schema")],
)
def test_structured_setting_says_where_to_begin(
    structured: str, first: object, connect: Connect
) -> None:
    with LlmServer(servers.vllm(JSON_ANSWER)) as server:
        connect(server, structured=structured).ask(WITH_SCHEMA)
    sent = server.bodies[0].get("response_format")
    assert (sent["type"] if isinstance(first, str) and sent else sent) == first


def test_structured_by_a_tool_call(connect: Connect) -> None:
    answer = Answer("", calls=(Call("proposal", {"name": "mini"}),))
    with LlmServer(servers.vllm(answer)) as server:
        client = connect(server, structured="tools")
        reply = client.ask(WITH_SCHEMA)
    assert (json.loads(reply.text), reply.tool_calls, reply.finish) == (
        {"name": "mini"},
        (),
        "stop",
    )
    assert client.shown == [reply.text]
    assert server.bodies[0]["tool_choice"]["function"]["name"] == "proposal"


# Thinking


def test_thinking_is_counted_and_recorded_but_not_shown(connect: Connect) -> None:
    answer = Answer("Yes.", thinking="Let me see. " * 20, usage=None)
    for make in (servers.vllm, servers.qwen):
        with LlmServer(make(answer)) as server:
            client = connect(server)
            reply = client.ask()
        assert reply.text == "Yes." == "".join(client.shown)
        assert reply.completion_tokens > 60
        assert "Let me see." in read_transcript(client.path)[-1].thinking


def test_thinking_without_its_first_tag_is_learned(connect: Connect) -> None:
    with LlmServer(servers.qwen(Answer("Yes.", thinking="Hm."), style="orphan")) as server:
        client = connect(server)
        assert client.ask().text == "Yes."
        client.shown.clear()
        assert client.ask().text == "Yes." == "".join(client.shown)


def test_answer_of_a_server_that_was_thought_to_think(connect: Connect) -> None:
    orphan = servers.qwen(Answer("Yes.", thinking="Hm."), style="orphan")
    with LlmServer(orphan, servers.qwen(Answer("No thoughts."))) as server:
        client = connect(server)
        client.ask()
        client.shown.clear()
        assert client.ask().text == "No thoughts." == "".join(client.shown)


def test_thinking_that_never_ends_is_no_answer(connect: Connect) -> None:
    rule = servers.streamed(event({"content": "<think>on and on"}), event({}, "length"), DONE)
    with LlmServer(rule) as server:
        client = connect(server)
        reply = client.ask()
    assert (reply.text, reply.finish, client.shown) == ("", "length", [])


def test_tags_in_the_middle_of_an_answer_stay(connect: Connect) -> None:
    text = "Models write <think> and </think> around it."
    with LlmServer(servers.vllm(Answer(text))) as server:
        assert connect(server).ask().text == text


def test_thinking_goes_back_with_its_tool_call(connect: Connect) -> None:
    with LlmServer(servers.deepseek(replace(CALLING, thinking="I need rows."))) as server:
        client = connect(server)
        calls = client.ask(WITH_TOOL).tool_calls
        turn = (Message("assistant", "", calls), Message("tool", "[]", tool_call_id=calls[0].id))
        client.ask(replace(WITH_TOOL, messages=(*HELLO.messages, *turn)))
    assert server.bodies[1]["messages"][2]["reasoning_content"] == "I need rows."
    assert server.bodies[1]["messages"][3]["tool_call_id"] == calls[0].id


# Tool calls


@pytest.mark.parametrize("make", [servers.vllm, servers.ollama, servers.qwen])
def test_tool_calls_split_whole_and_as_objects(
    make: Callable[[Answer], servers.Rule], connect: Connect
) -> None:
    with LlmServer(make(CALLING)) as server:
        reply = connect(server).ask(WITH_TOOL)
    (call,) = reply.tool_calls
    assert call.name == "samples" and json.loads(call.arguments) == {"rows": 3} and call.id
    assert reply.finish == "tool_calls" and reply.text == ""
    assert server.bodies[0]["tools"][0]["function"]["name"] == "samples"


@pytest.mark.parametrize("make", [servers.vllm, servers.ollama, servers.qwen])
def test_several_tool_calls(make: Callable[[Answer], servers.Rule], connect: Connect) -> None:
    two = Answer("", calls=(Call("samples", {"n": 1}, "a"), Call("samples", {"n": 2}, "b")))
    with LlmServer(make(two)) as server:
        calls = connect(server).ask(WITH_TOOL).tool_calls
    assert [json.loads(call.arguments) for call in calls] == [{"n": 1}, {"n": 2}]
    assert len({call.id for call in calls}) == 2


def test_pieces_without_id_and_index_belong_to_the_last_call(connect: Connect) -> None:
    pieces = [
        event({"tool_calls": [{"function": {"name": "samples", "arguments": '{"a"'}}]}),
        event({"tool_calls": [{"function": {"arguments": ": 1}"}}]}),
        event({"tool_calls": [{"function": {"name": "samples", "arguments": None}}]}),
        event({}, "tool_calls"),
    ]
    with LlmServer(servers.streamed(*pieces, DONE)) as server:
        calls = connect(server).ask(WITH_TOOL).tool_calls
    assert [call.arguments for call in calls] == ['{"a": 1}', "{}"]
    assert all(call.id.startswith("call_") for call in calls) and calls[0].id != calls[1].id


@pytest.mark.parametrize(
    "rule",
    [
        servers.vllm(has_tool_parser=False),
        servers.ollama(has_tools=False),
        servers.refuse(500, "tools param requires --jinja flag"),
    ],
)
def test_server_without_tools_is_told_of_them_in_words(
    rule: servers.Rule, connect: Connect
) -> None:
    said = json.dumps({"tool_calls": [{"name": "samples", "arguments": {"rows": 3}}]})
    with LlmServer(rule, servers.vllm(Answer(f"```json\n{said}\n```"))) as server:
        client = connect(server)
        reply = client.ask(WITH_TOOL)
        results = (
            Message("assistant", "", reply.tool_calls),
            Message("tool", "a cat", tool_call_id=reply.tool_calls[0].id),
        )
        client.ask(replace(WITH_TOOL, messages=(*HELLO.messages, *results)))
    assert reply.finish == "tool_calls" and json.loads(reply.tool_calls[0].arguments) == {"rows": 3}
    assert client.shown == [] and reply.text == ""
    told = server.bodies[-1]["messages"]
    assert "tools" not in server.bodies[-1] and [m["role"] for m in told][2:] == [
        "assistant",
        "user",
    ]
    assert "a cat" in told[-1]["content"] and "samples" in told[-2]["content"]


def test_tool_calls_written_in_tags(connect: Connect) -> None:
    text = 'Let me look. <tool_call>\n{"name": "samples", "arguments": {"rows": 3}}\n</tool_call>'
    with LlmServer(servers.vllm(Answer(text, pieces=20))) as server:
        client = connect(server)
        reply = client.ask(WITH_TOOL)
    assert reply.tool_calls[0].name == "samples" and reply.text == "Let me look."
    assert "".join(client.shown) == "Let me look. "


def test_functions_that_were_not_offered_are_text(connect: Connect) -> None:
    text = '<tool_call>{"name": "approve", "arguments": {}}</tool_call>'
    with LlmServer(servers.vllm(Answer(text))) as server:
        reply = connect(server).ask(WITH_TOOL)
    assert reply.tool_calls == () and reply.text == text


def test_invalid_arguments_are_kept_and_sent_back_as_valid_json(connect: Connect) -> None:
    turn = Message("assistant", "", (ToolCall("a", "samples", '{"rows": '),))
    result = Message("tool", "not JSON", tool_call_id="a")
    with LlmServer(servers.vllm()) as server:
        connect(server).ask(replace(WITH_TOOL, messages=(*HELLO.messages, turn, result)))
    sent = server.bodies[0]["messages"][2]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(sent) == {"invalid": '{"rows": '}


# Counts


def test_missing_counts_are_estimated_and_marked(connect: Connect) -> None:
    with LlmServer(servers.ollama(Answer("x" * 70))) as server:
        client = connect(server)
        reply = client.ask()
    assert reply.completion_tokens == 20 and reply.prompt_tokens > 0
    assert read_transcript(client.path)[0].usage.estimated


def test_counts_of_the_last_chunk_replace_running_ones(connect: Connect) -> None:
    pieces = [event({"content": w}, usage=servers.counted((9, n))) for n, w in enumerate("abc", 1)]
    with LlmServer(servers.streamed(*pieces, event({}, "stop"), DONE)) as server:
        client = connect(server, price_per_million_input=1.0, price_per_million_output=10.0)
        reply = client.ask()
    assert (reply.prompt_tokens, reply.completion_tokens) == (9, 3)
    usage = read_transcript(client.path)[0].usage
    assert not usage.estimated and usage.money == pytest.approx(39e-6)
    assert client.budget.spent == usage


# Streams as they come


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([": ping\n\n", "\n\n", event({"content": "ok"}), ":\n", DONE], id="comments"),
        pytest.param(
            [event({"content": "ok"}, "stop").replace("\n", "\r\n"), "data: [DONE]\r\n\r\n"],
            id="crlf",
        ),
        pytest.param(
            [event(None), event({"content": "ok"}, "stop"), event(None), DONE], id="empty"
        ),
        pytest.param([event({"content": "ok"}, "stop")], id="without DONE"),
        pytest.param(["event: message\nid: 1\n" + event({"content": "ok"}, "eos")], id="fields"),
        pytest.param(
            [event({"content": [{"type": "text", "text": "ok"}]}, "stop"), DONE], id="parts"
        ),
        pytest.param([event({"content": "ok", "role": None}, "stop", x=None), DONE], id="nulls"),
    ],
)
def test_streams_as_they_come(pieces: list[str], connect: Connect) -> None:
    with LlmServer(servers.streamed(*pieces)) as server:
        assert connect(server).ask().text == "ok"


def test_letters_cut_in_the_middle_of_their_bytes(connect: Connect) -> None:
    data = (event({"content": "你好"}, "stop") + DONE).encode()
    with LlmServer(servers.streamed(*(data[at : at + 1] for at in range(len(data))))) as server:
        assert connect(server).ask().text == "你好"


@pytest.mark.parametrize(
    ("pieces", "request_", "finish"),
    [
        ([event({"content": "It breaks o"}), DONE], HELLO, "length"),
        ([event({"content": '{"name": "a"}'}), DONE], WITH_SCHEMA, "stop"),
        ([event({"content": '{"name": "a'}), DONE], WITH_SCHEMA, "length"),
        ([event({"content": "All."}), event(None, usage=servers.counted((1, 2)))], HELLO, "stop"),
        ([event({"content": "Too lo"}, "length"), DONE], HELLO, "length"),
        (
            [
                event(
                    {
                        "tool_calls": [
                            {"index": 0, "function": {"name": "samples", "arguments": "{"}}
                        ]
                    }
                )
            ],
            WITH_TOOL,
            "length",
        ),
    ],
)
def test_ends_with_and_without_a_reason(
    pieces: list[str], request_: Request, finish: str, connect: Connect
) -> None:
    with LlmServer(servers.streamed(*pieces, is_chunked=False)) as server:
        assert connect(server).ask(request_).finish == finish


def test_refusals(connect: Connect) -> None:
    said = [event({"refusal": "I "}), event({"refusal": "cannot."}), event({}, "stop"), DONE]
    filtered = [event({"content": "Well"}), event({"content": ""}, "content_filter"), DONE]
    refused = servers.refuse(400, "filtered by the content management policy", "content_filter")
    rules = (servers.streamed(*said), servers.streamed(*filtered), refused)
    with LlmServer(*rules) as server:
        client = connect(server)
        replies = [client.ask(), client.ask(), client.ask()]
    assert [reply.finish for reply in replies] == ["refusal"] * 3
    assert replies[0].refusal == "I cannot." and "content_filter" in replies[1].refusal
    assert (
        replies[1].text == "Well" and "policy" in replies[2].refusal and len(server.requests) == 3
    )


def test_replies_without_an_end_are_cut_off(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synth_agent.planner.stream._LONGEST_CHARACTERS", 50_000)
    with LlmServer(servers.dripping(event({"content": "x" * 5000}), 0)) as server:
        reply = connect(server).ask()
    assert reply.finish == "length" and 50_000 < len(reply.text) <= 60_000


def test_lone_surrogates_do_not_stop_a_question(connect: Connect) -> None:
    with LlmServer(servers.vllm(Answer("ok"))) as server:
        assert connect(server).ask(Request((Message("user", "a\ud800b"),))).text == "ok"
    assert server.bodies[0]["messages"][0]["content"] == "a?b"


# Faults that pass


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(servers.refuse(500, "oops"), id="500"),
        pytest.param(servers.refuse(503, "loading model"), id="503"),
        pytest.param(servers.refuse(429, "slow down"), id="429"),
        pytest.param(lambda i: i.raw(502, b"<html>Bad gateway</html>", "text/html"), id="html"),
        pytest.param(lambda i: i.reset(), id="reset"),
        pytest.param(lambda i: i.handler.connection.close(), id="closed"),
        pytest.param(servers.streamed(), id="nothing"),
        pytest.param(servers.streamed("data: {not json\n\n"), id="not JSON"),
        pytest.param(servers.streamed("data: 7\n\n"), id="not an object"),
        pytest.param(
            servers.streamed('data: {"error": {"message": "CUDA"}}\n\n'), id="error event"
        ),
        pytest.param(servers.streamed(event({"content": ""}, "stop"), DONE), id="empty"),
        pytest.param(servers.streamed(event({}, "insufficient_system_resource")), id="no resource"),
        pytest.param(servers.broken(event({"reasoning_content": "Hm"})), id="broke while thinking"),
        pytest.param(lambda i: i.raw(200, b"{", "application/json"), id="bad body"),
        pytest.param(lambda i: i.raw(200, b"{", "application/json", length=99), id="cut body"),
    ],
)
def test_faults_that_pass_are_tried_again(fault: servers.Rule, connect: Connect) -> None:
    with LlmServer(fault, fault, servers.vllm()) as server:
        client = connect(server)
        assert client.ask().text == "Hello there." == "".join(client.shown)
    assert len(server.requests) == 3 == read_transcript(client.path)[0].attempts
    # Two pauses of 0.5 and 1 s, each shortened by at most a half.
    assert 0.75 <= client.paused <= 1.6


def test_pauses_grow_and_are_the_same_for_the_same_seed(connect: Connect) -> None:
    with LlmServer(servers.refuse(503, "busy")) as server:
        clients = [connect(server), connect(server)]
        for client in clients:
            with pytest.raises(EndpointError, match="5 attempts"):
                client.ask()
    assert clients[0].pauses == clients[1].pauses
    assert 3.75 <= clients[0].paused <= 7.6 and len(server.requests) == 10


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"Retry_After": "7"}, 6.9, 7.1),
        ({"Retry_After": "{date}"}, 2.0, 5.1),
        ({"Retry_After_Ms": "1500"}, 1.4, 1.6),
        ({"Retry_After": "soon"}, 0.2, 0.6),
        ({"Retry_After": "-5"}, 0.0, 0.1),
    ],
)
def test_server_says_how_long_to_wait(
    headers: dict[str, str], low: float, high: float, connect: Connect
) -> None:
    date = email.utils.formatdate(time.time() + 5, usegmt=True)
    made = {name: value.format(date=date) for name, value in headers.items()}
    with LlmServer(servers.refuse(429, "slow", **made), servers.vllm()) as server:
        client = connect(server)
        client.ask()
    assert low <= client.paused <= high


def test_wait_beyond_the_total_time_is_not_waited(connect: Connect) -> None:
    with LlmServer(servers.refuse(429, "slow", Retry_After="3600")) as server:
        client = connect(server)
        with pytest.raises(EndpointError, match="3600 s") as caught:
            client.ask()
    assert not client.pauses and caught.value.title == "The endpoint is overloaded"


def test_break_after_text_was_shown_is_not_repeated(connect: Connect) -> None:
    with LlmServer(servers.broken(event({"content": "Half an"}))) as server:
        client = connect(server)
        with pytest.raises(EndpointError, match="was shown"):
            client.ask()
    assert client.shown == ["Half an"] and len(server.requests) == 1
    assert client.budget.spent.tokens > 0 and read_transcript(client.path)[0].error is not None


def test_break_is_repeated_when_nobody_watches(connect: Connect) -> None:
    with LlmServer(servers.broken(event({"content": "Half an"})), servers.vllm()) as server:
        client = connect(server)
        reply = client.endpoint.ask(HELLO)
    assert reply.text == "Hello there."
    spent = client.budget.spent
    assert spent.estimated and spent.tokens > reply.prompt_tokens + reply.completion_tokens


def test_a_count_that_no_model_reaches_is_no_count(connect: Connect) -> None:
    absurd = Answer("Hello there.", usage=(10**30, 10**9))
    with LlmServer(servers.vllm(absurd), servers.vllm()) as server:
        client = connect(server)
        assert client.ask().text == "Hello there."
        assert client.budget.spent.estimated and client.budget.spent.tokens < 1000
        assert client.ask().text == "Hello there."


def test_nobody_listens(connect: Connect) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        client = connect(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", retries=1)
        with pytest.raises(EndpointError, match="cannot be reached") as caught:
            client.ask()
    assert "OPENAI_BASE_URL" in caught.value.hint and client.budget.spent.tokens == 0


# Time


@pytest.mark.parametrize("has_headers", [True, False])
def test_silence_is_given_up_and_tried_again(has_headers: bool, connect: Connect) -> None:
    keep_alive = (": keep-alive\n\n",) if has_headers else ()
    quiet = servers.silent(*keep_alive, has_headers=has_headers)
    with LlmServer(quiet, servers.vllm()) as server:
        client = connect(server, first_token_seconds=0.2)
        assert client.ask().text == "Hello there."
        wait_until(lambda: server.requests[0].closed_after is not None)
    assert client.budget.spent.prompt_tokens > 11


def test_slow_drip_ends_at_the_total_time(connect: Connect) -> None:
    with LlmServer(servers.dripping(event({"content": "."}), 0.02)) as server:
        client = connect(server, timeout_seconds=0.4)
        started = time.monotonic()
        with pytest.raises(EndpointError, match="timeout_seconds"):
            client.ask()
        assert time.monotonic() - started < 10
        wait_until(lambda: server.requests[0].closed_after is not None)


# Faults that stay


@pytest.mark.parametrize(
    ("rule", "kind", "words"),
    [
        (servers.refuse(401, "Incorrect API key"), InvalidInput, "OPENAI_API_KEY"),
        (servers.refuse(403, "Forbidden"), InvalidInput, "OPENAI_API_KEY"),
        (servers.refuse(404, "The model `a-model` does not exist"), InvalidInput, "synth.yaml"),
        (servers.refuse(404, "Not Found"), InvalidInput, "/v1"),
        (lambda i: i.raw(404, b"404 page not found", "text/plain"), InvalidInput, "/v1"),
        (lambda i: i.raw(200, b"<html>Hi</html>", "text/html"), InvalidInput, "web page"),
        (servers.refuse(402, "Insufficient Balance"), InvalidInput, "credit"),
        (servers.refuse(429, "Quota", "insufficient_quota"), InvalidInput, "credit"),
        (servers.refuse(400, "messages must alternate"), InvalidInput, "messages must alternate"),
        (
            servers.refuse(400, "This model's maximum context length is 4096 tokens"),
            ContextTooLong,
            "shorten the context",
        ),
        (servers.refuse(400, "too long", "context_length_exceeded"), ContextTooLong, "max_tokens"),
        (servers.refuse(400, "Range of input length should be [1, 6000]"), ContextTooLong, "6000"),
        (
            servers.streamed('data: {"error": {"message": "exceeds the context size"}}\n\n'),
            ContextTooLong,
            "context size",
        ),
    ],
)
def test_faults_that_stay_are_told_with_their_fix(
    rule: servers.Rule, kind: type[SynthAgentError], words: str, connect: Connect
) -> None:
    with LlmServer(rule) as server:
        client = connect(server)
        with pytest.raises(kind, match=words):
            client.ask()
    assert len(server.requests) == 1 and not client.pauses
    assert client.budget.spent.completion_tokens == 0
    recorded = read_transcript(client.path)[0]
    assert recorded.error is not None and recorded.error["kind"] == kind.__name__


@pytest.mark.parametrize(
    ("message", "gone", "there"),
    [
        ("Unrecognized request argument: stream_options", "stream_options", None),
        (
            "Use 'max_completion_tokens' instead of 'max_tokens'",
            "max_tokens",
            "max_completion_tokens",
        ),
        ("'temperature' does not support 0.2 with this model", "temperature", None),
    ],
)
def test_options_that_a_server_refuses_are_left_out(
    message: str, gone: str, there: str | None, connect: Connect
) -> None:
    with LlmServer(servers.refuse(400, message), servers.vllm()) as server:
        assert connect(server).ask().text == "Hello there."
    assert gone in server.bodies[0] and gone not in server.bodies[1]
    assert there is None or there in server.bodies[1]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_do_not_carry_the_key_away(status: int, connect: Connect) -> None:
    with LlmServer(servers.vllm()) as other:
        target = f"{other.url}/chat/completions?token=private"
        with LlmServer(lambda i: i.json(status, {}, {"Location": target})) as server:
            with pytest.raises(InvalidInput, match=f"127.0.0.1:{other.port}") as caught:
                connect(server).ask()
            assert len(server.requests) == 1 and not other.requests
    assert "private" not in str(caught.value)


def test_proxies_are_not_used_for_this_machine(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LlmServer(servers.vllm()) as proxy, LlmServer(servers.vllm()) as server:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{proxy.port}")
        connect(server).ask()
        assert len(server.requests) == 1 and not proxy.requests
        connect("http://models.invalid/v1").ask()
        assert proxy.requests[0].path == "http://models.invalid/v1/chat/completions"


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000/v1", "ftp://host/v1", "http://", "http://[x/v1"]
)
def test_addresses_that_are_none(url: str, connect: Connect) -> None:
    with pytest.raises(InvalidInput, match="OPENAI_BASE_URL"):
        connect(url)


@pytest.mark.parametrize("key", ["two words-0123", "line\nbreak-0123", "clé-secrète-0123"])
def test_keys_that_cannot_be_sent_are_not_shown(key: str, connect: Connect) -> None:
    with pytest.raises(InvalidInput) as caught:
        connect("http://127.0.0.1:1/v1", key=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize("more", ["/", "/chat/completions", "/chat/completions/", " "])
def test_addresses_as_people_copy_them(more: str, connect: Connect) -> None:
    with LlmServer(servers.vllm()) as server:
        connect(server.url + more).ask()
    assert server.requests[0].path == "/v1/chat/completions"


def test_password_and_query_of_the_address_are_sent_but_apart(connect: Connect) -> None:
    with LlmServer(servers.vllm()) as server:
        address = server.url.replace("://", "://me:pass-word@") + "?api-version=2024-secret"
        client = connect(address, key="")
        client.ask()
    assert server.requests[0].headers["authorization"].startswith("Basic ")
    assert server.requests[0].path == "/v1/chat/completions?api-version=2024-secret"
    written = client.path.read_text()
    assert "pass-word" not in written and "2024-secret" not in written


# Stopping


@pytest.mark.parametrize(
    ("pieces", "has_headers"), [((), False), ((), True), ((event({"content": "One"}),), True)]
)
def test_cancel_closes_the_connection_at_once(
    pieces: tuple[str, ...], has_headers: bool, connect: Connect
) -> None:
    stop = threading.Event()
    with LlmServer(servers.silent(*pieces, has_headers=has_headers)) as server:
        client = connect(server)
        threading.Timer(0.2, stop.set).start()
        started = time.monotonic()
        reply = client.ask(is_cancelled=stop.is_set)
        took = time.monotonic() - started
        wait_until(lambda: server.requests[0].closed_after is not None)
    assert reply.finish == "cancelled" and reply.text == ("One" if pieces else "")
    assert took < 15 and (server.requests[0].closed_after or 99) < 15
    recorded = read_transcript(client.path)[0]
    assert recorded.reply == reply and recorded.usage.tokens > 0


def test_cancel_before_and_during_a_pause(connect: Connect) -> None:
    with LlmServer(servers.refuse(503, "busy")) as server:
        client = connect(server)
        assert client.ask(is_cancelled=lambda: True).finish == "cancelled"
        assert not server.requests
        reply = client.ask(is_cancelled=lambda: len(client.pauses) > 2)
    assert reply.finish == "cancelled" and len(server.requests) == 1 and client.paused < 0.3


def test_error_of_whoever_watches_closes_the_connection(connect: Connect) -> None:
    def watch(piece: str) -> None:
        raise KeyboardInterrupt

    with LlmServer(servers.silent(event({"content": "One"}))) as server:
        client = connect(server)
        with pytest.raises(KeyboardInterrupt):
            client.ask(on_text=watch)
        wait_until(lambda: server.requests[0].closed_after is not None)
    recorded = read_transcript(client.path)[0]
    assert recorded.error is not None and recorded.error["kind"] == "KeyboardInterrupt"
    assert recorded.usage.tokens > 0 and client.budget.spent == recorded.usage


def test_interrupt_closes_the_connection_and_is_recorded(connect: Connect) -> None:
    with LlmServer(servers.silent()) as server:
        client = connect(server)
        timer = threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            client.ask()
        wait_until(lambda: server.requests[0].closed_after is not None)
    assert read_transcript(client.path)[0].usage.prompt_tokens > 0


def test_questions_from_several_threads(connect: Connect) -> None:
    def rule(incoming: servers.Incoming) -> None:
        servers.vllm(Answer(incoming.prompt.split()[-1], pieces=1))(incoming)

    replies: dict[str, str] = {}
    with LlmServer(rule) as server:
        client = connect(server)

        def ask(word: str) -> None:
            replies[word] = client.ask(Request((Message("user", f"Say {word}"),))).text

        threads = [threading.Thread(target=ask, args=(f"w{n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert replies == {f"w{n}": f"w{n}" for n in range(8)}
    assert client.budget.spent.tokens == 8 * 18 and len(read_transcript(client.path)) == 8


# Budget


def test_prompts_that_proved_longer_than_estimated_are_expected_to_be(connect: Connect) -> None:
    with LlmServer(servers.vllm(Answer(usage=(400, 1)))) as server:
        client = connect(server, token_cap=700, max_tokens=10)
        client.ask()
        with pytest.raises(BudgetSpent, match="could take 410 tokens"):
            client.ask()
    assert len(server.requests) == 1


def test_budget_stops_before_the_call_that_could_go_over(connect: Connect) -> None:
    with LlmServer(servers.vllm(Answer(usage=(900, 100)))) as server:
        client = connect(server, token_cap=1800, max_tokens=800)
        client.ask()
        with pytest.raises(BudgetSpent, match="1,000 tokens of 1,800 tokens"):
            client.ask()
    assert len(server.requests) == 1 and client.budget.spent.tokens == 1000
    assert [e.error is None for e in read_transcript(client.path)] == [True, False]


def test_money_is_capped(connect: Connect) -> None:
    prices = {"price_per_million_input": 1.0, "price_per_million_output": 100.0}
    with LlmServer(servers.vllm(Answer(usage=(1000, 900)))) as server:
        client = connect(server, spend_cap=0.15, max_tokens=1000, **prices)
        client.ask()
        with pytest.raises(BudgetSpent, match="0.0910 in money"):
            client.ask()
    assert len(server.requests) == 1


def test_room_for_the_reply_is_the_smaller_of_both(connect: Connect) -> None:
    with LlmServer(servers.vllm()) as server:
        client = connect(server, max_tokens=100)
        client.ask()
        client.ask(replace(HELLO, max_tokens=10))
    assert [body["max_tokens"] for body in server.bodies] == [100, 10]


def wait_until(is_true: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
