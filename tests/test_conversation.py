"""A conversation with a scripted model: steering, tools, repair, failure, and what stays untouched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synth_agent import pipeline
from synth_agent.errors import InvalidInput
from synth_agent.planner.context import DEFAULT_BUDGET
from synth_agent.planner.conversation import (
    MOST_REPAIRS,
    MOST_TOOL_BYTES,
    MOST_TOOL_ROUNDS,
    MOST_WISHES,
    Conversation,
    LlmPlanner,
    wishes_after,
)
from synth_agent.planner.endpoint import (
    Budget,
    EndpointSettings,
    OpenAIEndpoint,
    Transcript,
    forget_abilities,
)
from synth_agent.planner.exchange import BudgetSpent, ContextTooLong, EndpointError, ToolCall
from synth_agent.planner.fencing import estimated_tokens
from synth_agent.planner.templates import NAMES, fill, find_template
from synth_agent.runs import Prediction, Run
from synth_agent.workspace import Workspace
from tests import llm_server
from tests.injections import INJECTIONS, disguised
from tests.llm_server import refuse_network
from tests.planner_world import (
    Scripted,
    files_of,
    fill_workspace,
    history,
    long_history,
    proposal_object,
    said,
)
from tests.test_context import outside_fences, poisoned

__all__ = ["refuse_network"]


@pytest.fixture
def workspace(git_workspace: Workspace) -> Workspace:
    return fill_workspace(git_workspace)


@pytest.fixture
def runs(workspace: Workspace) -> list[Run]:
    return history(workspace)


def talk(
    workspace: Workspace, runs: list[Run], *answers: Any, **options: Any
) -> tuple[Conversation, Scripted]:
    """Return a conversation and the model that it is with."""
    endpoint = Scripted.of(*answers)
    options = {"predicting": lambda *_: (), **options}
    return Conversation(workspace, endpoint, lambda _: (runs, ()), **options), endpoint


def words(endpoint: Scripted, number: int) -> str:
    return "\n".join(message.content for message in endpoint.requests[number].messages)


def minimum(number: int, **changes: Any) -> dict[str, Any]:
    """Return a proposal to keep captions of so many words."""
    recipe = {"process": [{"name": "words_num_filter", "parameters": {"min_num": number}}]}
    return proposal_object(recipe=recipe, name=f"words-{number}", **changes)


def test_a_proposal_of_the_model_comes_with_the_built_in_prediction(
    workspace: Workspace, runs: list[Run]
) -> None:
    asked: list[Run | None] = []

    def predicting(*arguments: Any) -> tuple[Prediction, ...]:
        asked.append(arguments[-1])
        return (Prediction("textvqa", 0.2, -1.0, 1.4, "built-in model"),)

    pieces: list[str] = []
    conversation, endpoint = talk(workspace, runs, proposal_object(), predicting=predicting)
    proposed = conversation.propose(on_text=pieces.append)
    assert proposed.by_llm
    assert proposed.note == ""
    assert proposed.proposal is not None
    by = [p.by for p in proposed.proposal.predictions]
    assert by == ["scripted", "scripted", "built-in model"]
    assert [run.id for run in asked if run] == ["0001-baseline"]
    assert "longer-captions" in "".join(pieces)
    request = endpoint.requests[0]
    assert request.schema is not None
    assert {tool.name for tool in request.tools} >= {"statistics", "runs", "fit"}
    assert [message.role for message in request.messages] == ["system", "user"]


def test_the_model_is_told_what_its_settings_may_be(workspace: Workspace, runs: list[Run]) -> None:
    conversation, endpoint = talk(workspace, runs, proposal_object())
    conversation.propose()
    for told in (
        "lora_rank 1 to 1024",
        "warmup_ratio 0 to 0.5",
        "method of finetune: full or lora",
    ):
        assert told in words(endpoint, 0)


def test_without_a_baseline_no_model_is_asked(workspace: Workspace) -> None:
    conversation, endpoint = talk(workspace, [])
    proposed = conversation.propose()
    assert proposed.proposal is not None
    assert proposed.proposal.kind == "baseline"
    assert not proposed.by_llm
    assert endpoint.requests == []


def test_the_validators_words_go_back_and_the_model_corrects_itself(
    workspace: Workspace, runs: list[Run]
) -> None:
    wrong = proposal_object(evidence=["0042-imagined"])
    conversation, endpoint = talk(workspace, runs, wrong, "{nonsense", proposal_object())
    proposed = conversation.propose()
    assert proposed.by_llm
    assert "2 time(s)" in proposed.note
    assert "0042-imagined" in endpoint.requests[1].messages[-1].content
    assert "No such run" in endpoint.requests[1].messages[-1].content
    assert "not valid JSON" in endpoint.requests[2].messages[-1].content


def test_after_two_corrections_the_built_in_planner_proposes(
    workspace: Workspace, runs: list[Run]
) -> None:
    conversation, endpoint = talk(workspace, runs, *["no JSON here"] * 5)
    proposed = conversation.propose()
    assert len(endpoint.requests) == MOST_REPAIRS + 1
    assert proposed.proposal is not None
    assert not proposed.by_llm
    assert "No valid proposal after 2 corrections" in proposed.note


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (EndpointError("Endpoint is down", "refused", "start it"), "Endpoint is down"),
        (BudgetSpent("Budget is spent", "500000 tokens", "raise it"), "Budget is spent"),
        (InvalidInput("Wrong key", "401", "correct it"), "Wrong key"),
        (ConnectionResetError("reset by peer"), "connection failed"),
        (TimeoutError("timed out"), "connection failed"),
        (said("", finish="refusal", refusal="I cannot \x1b[2Jhelp"), "I cannot help"),
    ],
)
def test_a_failing_endpoint_leads_to_the_built_in_planner(
    workspace: Workspace, runs: list[Run], failure: Any, reason: str
) -> None:
    conversation, _ = talk(workspace, runs, failure)
    proposed = conversation.propose("cheaper")
    assert proposed.proposal is not None
    assert not proposed.by_llm
    assert reason in proposed.note
    assert conversation.wishes == ("cheaper",)


def test_a_reply_that_is_cut_off_is_asked_for_again(workspace: Workspace, runs: list[Run]) -> None:
    cut_off = said('{"kind": "explore", ', finish="length")
    conversation, endpoint = talk(workspace, runs, cut_off, proposal_object())
    assert conversation.propose().by_llm
    assert "cut off" in endpoint.requests[1].messages[-1].content


def test_a_small_model_gets_a_smaller_context(workspace: Workspace, runs: list[Run]) -> None:
    full = ContextTooLong("Too long", "4096 tokens", "shorten")
    steps = {"process": [{"words_num_filter": {"min_num": 7, "max_num": 20}}]}
    answers = full, proposal_object(recipe=steps)
    conversation, endpoint = talk(workspace, long_history(workspace, 50), *answers)
    assert conversation.propose().by_llm
    assert len(words(endpoint, 1)) < len(words(endpoint, 0)) * 0.7


def test_wishes_hold_until_they_are_taken_back(workspace: Workspace, runs: list[Run]) -> None:
    conversation, endpoint = talk(workspace, runs, *(minimum(n) for n in range(8, 13)))
    for instruction in ("cheaper", "in Chinese", "another", "forget cheaper", "forget everything"):
        assert conversation.propose(instruction).by_llm
    standing = [
        [wish for wish in ("cheaper", "in Chinese") if f"- {wish}" in words(endpoint, number)]
        for number in range(5)
    ]
    both = ["cheaper", "in Chinese"]
    assert standing == [["cheaper"], both, both, ["in Chinese"], []]
    assert conversation.wishes == ()


def test_instructions_are_understood_in_two_languages() -> None:
    wishes = ("cheaper", "只用过滤器")
    assert wishes_after(wishes, "") == wishes
    assert wishes_after(wishes, "Another one!") == wishes
    assert wishes_after(wishes, "换一个。") == wishes
    assert wishes_after(wishes, "取消 只用过滤器") == ("cheaper",)
    assert wishes_after(wishes, "forget that") == ("cheaper",)
    assert wishes_after(wishes, "取消") == ()
    assert wishes_after(wishes, "no longer captions than 30 words")[-1].startswith("no longer")
    assert wishes_after(wishes, "cheaper") == ("只用过滤器", "cheaper")
    many = tuple(f"wish {i}" for i in range(MOST_WISHES))
    assert len(wishes_after(many, "one more")) == MOST_WISHES
    assert wishes_after((), "in\x1b[2J Chinese") == ("in Chinese",)


def test_another_is_another(workspace: Workspace, runs: list[Run]) -> None:
    again = proposal_object(name="the-same-again")
    conversation, endpoint = talk(workspace, runs, proposal_object(), again, minimum(9))
    first, second = conversation.propose(), conversation.propose("another")
    assert first.proposal is not None
    assert second.proposal is not None
    assert second.by_llm
    assert second.proposal.slug == "words-9"
    assert "shown already" in endpoint.requests[2].messages[-1].content
    assert "Keep longer captions" in words(endpoint, 1)


def test_a_question_is_answered_with_tools(workspace: Workspace, runs: list[Run]) -> None:
    sql = json.dumps({"sql": "SELECT max(num_words) AS most FROM samples"})
    calls = (ToolCall("a", "statistics", sql), ToolCall("b", "runs", '{"run": "0002-short"}'))
    conversation, endpoint = talk(
        workspace, runs, said("", *calls), "39 words.\x1b[31m", "Because of 0002-short."
    )
    assert conversation.ask("How long is the longest caption?") == "39 words."
    answers = [m for m in endpoint.requests[1].messages if m.role == "tool"]
    assert [m.tool_call_id for m in answers] == ["a", "b"]
    assert json.loads(answers[0].content)["rows"] == [["39.0"]]
    assert conversation.ask("why?") == "Because of 0002-short."
    assert "39 words." in words(endpoint, 2), "the conversation goes on"
    assert endpoint.requests[2].schema is None


def test_tool_calls_are_limited(workspace: Workspace, runs: list[Run]) -> None:
    many = said("", *(ToolCall(str(i), "operators", "{}") for i in range(30)))
    conversation, endpoint = talk(workspace, runs, *[many] * 20)
    with pytest.raises(EndpointError, match="rounds of tool calls"):
        conversation.ask("What operators are there?")
    assert len(endpoint.requests) == MOST_TOOL_ROUNDS + 2
    text = "".join(m.content for m in endpoint.requests[-1].messages if m.role == "tool")
    assert len(text.encode()) < 2 * MOST_TOOL_BYTES
    last = [m.content for m in endpoint.requests[-1].messages if m.role == "tool"][-1]
    assert "no more calls" in last


def test_a_proposal_may_be_preceded_by_reading(workspace: Workspace, runs: list[Run]) -> None:
    conversation, endpoint = talk(
        workspace, runs, said("", ToolCall("a", "fit", '{"recipe": "short"}')), proposal_object()
    )
    assert conversation.propose().by_llm
    assert len(endpoint.requests) == 2


def test_a_proposal_may_come_as_a_call(workspace: Workspace, runs: list[Run]) -> None:
    call = ToolCall("a", "proposal", json.dumps(proposal_object()))
    conversation, _ = talk(workspace, runs, said("", call))
    assert conversation.propose().by_llm


def test_the_conversation_stays_bounded(workspace: Workspace) -> None:
    runs = long_history(workspace, 200)
    conversation, endpoint = talk(workspace, runs, *["x" * 50_000] * 30)
    for number in range(30):
        conversation.ask(f"question {number} " + "y" * 50_000)
    sizes = [len(words(endpoint, number)) for number in range(30)]
    assert max(sizes[10:]) == sizes[10]
    empty = estimated_tokens(fill(workspace, "system", {"stable": ""}))
    assert estimated_tokens(endpoint.requests[-1].messages[0].content) < DEFAULT_BUDGET + empty


def test_cancelling_ends_without_a_proposal_and_forgets_nothing(
    workspace: Workspace, runs: list[Run]
) -> None:
    conversation, endpoint = talk(workspace, runs, proposal_object(), proposal_object())
    stopped = conversation.propose("cheaper", is_cancelled=lambda: bool(endpoint.requests))
    assert stopped.proposal is None
    assert conversation.wishes == ()
    assert conversation.propose().by_llm
    assert conversation.ask("why?", is_cancelled=lambda: True) == ""


def test_an_interrupt_passes_through_and_leaves_the_conversation_usable(
    workspace: Workspace, runs: list[Run]
) -> None:
    conversation, _ = talk(workspace, runs, KeyboardInterrupt(), proposal_object())
    with pytest.raises(KeyboardInterrupt):
        conversation.propose("cheaper")
    assert conversation.wishes == ()
    assert conversation.propose().by_llm


def test_the_total_time_is_limited(workspace: Workspace, runs: list[Run]) -> None:
    now = [0.0]

    def slow(_: object) -> str:
        now[0] += 40.0
        return "no JSON"

    conversation, endpoint = talk(
        workspace, runs, *[slow] * 5, total_seconds=60.0, clock=lambda: now[0]
    )
    proposed = conversation.propose()
    assert proposed.proposal is not None
    assert "took too long" in proposed.note
    assert len(endpoint.requests) == 2


def test_an_endpoint_that_is_told_to_stop_by_the_clock_is_a_failure(
    workspace: Workspace, runs: list[Run]
) -> None:
    now = [0.0]

    def cut_short(_: object) -> Any:
        now[0] = 100.0
        return replace(said("half"), finish="cancelled")

    conversation, _ = talk(workspace, runs, cut_short, total_seconds=60.0, clock=lambda: now[0])
    proposed = conversation.propose()
    assert proposed.proposal is not None
    assert "took too long" in proposed.note


def test_the_planner_has_the_interface_of_planners(workspace: Workspace, runs: list[Run]) -> None:
    planner = LlmPlanner(Scripted.of(proposal_object()), predicting=lambda *_: ())
    proposal = planner.propose(workspace, runs, ())
    assert proposal is not None
    assert planner.last.by_llm
    fails = LlmPlanner(Scripted.of(OSError("gone")))
    assert fails.propose(workspace, runs, ()) is not None
    assert "gone" in fails.last.note


@pytest.mark.parametrize("style", ["vllm", "ollama", "deepseek", "qwen"])
def test_it_works_over_the_network_with_each_kind_of_server(
    workspace: Workspace, runs: list[Run], style: str, tmp_path: Path
) -> None:
    forget_abilities()
    make = getattr(llm_server, style)
    call = llm_server.Call("statistics", {"sql": "SELECT count(*) FROM samples"})
    answers = [
        llm_server.Answer("", thinking="I look.", calls=(call,)),
        llm_server.Answer("40 samples."),
        llm_server.Answer(json.dumps(proposal_object())),
    ]
    with llm_server.LlmServer(*(make(answer) for answer in answers)) as server:
        settings = EndpointSettings("a-model", retries=0)
        transcript = Transcript(tmp_path / "transcript.jsonl")
        endpoint = OpenAIEndpoint(settings, "a-key", server.url, transcript, Budget(settings))
        conversation = Conversation(
            workspace, endpoint, lambda _: (runs, ()), predicting=lambda *_: ()
        )
        assert conversation.ask("How many samples are there?") == "40 samples."
        assert conversation.propose("cheaper").by_llm
        told = json.dumps(server.bodies[1]["messages"])
        assert "count_star()" in told
        assert "40" in told
    forget_abilities()


def obedient(text: str) -> list[Any]:
    """Return what a model says that does whatever it reads."""
    calls = [
        ("approve", {"run": "0001-baseline"}),
        ("write_file", {"path": "synth.yaml", "text": text}),
        ("statistics", {"sql": "COPY samples TO 'out.csv'"}),
        ("statistics", {"sql": "SELECT * FROM read_text('/etc/passwd')"}),
        ("runs", {"run": "../../etc/passwd"}),
        ("retention", {"process": [{"python_file_mapper": {"file_path": "x.py"}}]}),
    ]
    asked = said(
        text, *(ToolCall(str(i), name, json.dumps(given)) for i, (name, given) in enumerate(calls))
    )
    hostile: list[dict[str, Any]] = [
        {"recipe": {"process": [{"python_lambda_mapper": {"lambda_str": "lambda d: d"}}]}},
        {"recipe": {"process": [{"image_text_similarity_filter": {"hf_clip": "../../root"}}]}},
        {"settings": {"allow_operators": ["python_file_mapper"]}, "approved": True, "title": text},
    ]
    return [asked, *(proposal_object(**changes) for changes in hostile)]


@pytest.mark.parametrize("number", range(len(INJECTIONS)))
def test_a_model_that_obeys_what_it_reads_changes_nothing(
    workspace: Workspace, number: int
) -> None:
    text = disguised(number)
    runs = poisoned(workspace, text)
    before = files_of(workspace.root)
    conversation, endpoint = talk(workspace, runs, *obedient(text), said(text))
    proposed = conversation.propose()
    assert not proposed.by_llm
    assert proposed.proposal is not None
    assert proposed.proposal.kind in ("explore", "exploit", "replicate", "ablate", "baseline")
    assert conversation.ask("What is there?")
    assert files_of(workspace.root) == before
    assert pipeline.list_runs(workspace) == []
    answers = [m.content for m in endpoint.requests[1].messages if m.role == "tool"]
    assert len(answers) == 6
    assert all("error" in json.loads(answer) for answer in answers)
    prompt = outside_fences(endpoint.requests[0].messages[1].content)
    assert "\x1b" not in prompt


def test_a_template_with_an_unknown_value_is_an_error(workspace: Workspace) -> None:
    workspace.prompts.mkdir()
    (workspace.prompts / "repair.md").write_text("{{problem}} {{colour}}")
    with pytest.raises(InvalidInput, match="colour"):
        fill(workspace, "repair", {"problem": "x", "hint": "y"})
    (workspace.prompts / "repair.md").write_text("{{problem}}")
    assert fill(workspace, "repair", {"problem": "{{hint}}"}) == "{{hint}}"


@pytest.mark.parametrize("name", NAMES)
def test_every_template_is_shipped(workspace: Workspace, name: str) -> None:
    assert find_template(workspace, name).read_text().strip()


def test_a_missing_template_is_explained(workspace: Workspace) -> None:
    with pytest.raises(InvalidInput, match="Prompt template is missing"):
        find_template(workspace, "poem")
