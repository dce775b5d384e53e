"""The talk with the planner and the gate behind it, with a real conversation and a scripted model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from synth_agent.planner.conversation import Conversation
from synth_agent.planner.endpoint import forget_abilities
from synth_agent.planner.exchange import EndpointError, Reply, Request
from synth_agent.runs import Limits, Plan, Prediction, Proposal, Run
from synth_agent.ui.backend import WorkspaceBackend
from synth_agent.ui.screens import proposal
from synth_agent.ui.screens.planner import PlannerScreen
from synth_agent.ui.screens.proposal import ProposalScreen, training_words
from synth_agent.ui.screens.wishes import WishesScreen
from synth_agent.workspace import Workspace, open_workspace
from tests.injections import INJECTIONS, disguised
from tests.llm_server import Answer, Call, LlmServer, dripping, event, refuse_network, vllm
from tests.planner_world import Scripted, fill_workspace, history, proposal_object, said
from tests.ui.conftest import Open, seen, settle

__all__ = ["refuse_network"]


class Talking(WorkspaceBackend):
    """The real backend with a scripted model and a written history; launches are recorded."""

    def __init__(self, workspace: Workspace, runs: list[Run], *answers: Any) -> None:
        super().__init__(workspace)
        self.launched: list[Plan] = []
        self.endpoint: Any = Scripted.of(*answers)
        self._runs = runs
        self._talk: Conversation | None = None

    def run(self, run_id: str) -> Run:
        written = {run.id: run for run in self._runs}
        return written[run_id] if run_id in written else super().run(run_id)

    def conversation(self) -> Conversation | None:
        if self._talk is None:
            self._talk = Conversation(
                self._workspace,
                self.endpoint,
                lambda _: (self._runs, ()),
                predicting=lambda *_: (Prediction("textvqa", 0.2, -1.0, 1.4, "built-in model"),),
            )
        return self._talk

    def validate(self, proposal: Proposal) -> None:
        """Say that everything may run: the files of the settings are not what this is about."""

    def launch(self, plan: Plan) -> None:
        self.launched.append(plan)


class Waiting:
    """A model that sends a piece and then nothing until it is cancelled or let go."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.let_go = threading.Event()
        self.was_cancelled = False
        self.started = threading.Event()

    def ask(
        self, request: Request, on_text: Callable[[str], None], is_cancelled: Callable[[], bool]
    ) -> Reply:
        for piece in self.pieces:
            on_text(piece)
        self.started.set()
        while not self.let_go.wait(0.02):
            if is_cancelled():
                self.was_cancelled = True
                return replace(said("".join(self.pieces)), finish="cancelled")
        return said("".join(self.pieces))


@pytest.fixture
def workspace(git_workspace: Workspace) -> Workspace:
    return fill_workspace(git_workspace)


@pytest.fixture
def runs(workspace: Workspace) -> list[Run]:
    return history(workspace)


@pytest.fixture(autouse=True)
def fresh_abilities() -> Iterator[None]:
    forget_abilities()
    yield
    forget_abilities()


async def say(pilot: Pilot[int], text: str) -> None:
    """Write a line and send it."""
    pilot.app.screen.query_one(Input).value = text
    await pilot.press("enter")
    await settle(pilot)


async def until(pilot: Pilot[int], condition: Callable[[], bool], seconds: float = 60.0) -> float:
    """Wait for something and return how many seconds it took."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if condition():
            return time.monotonic() - started
        await pilot.pause(0.03)
    raise AssertionError(f"not within {seconds} s: {seen(pilot)}")


async def open_planner(pilot: Pilot[int]) -> None:
    await settle(pilot)
    await pilot.press("6")
    await settle(pilot)
    assert isinstance(pilot.app.screen, PlannerScreen)


def plans(backend: WorkspaceBackend) -> list[Path]:
    return list(backend.root.glob("runs/*/plan.yaml"))


@pytest.mark.parametrize("size", [(80, 24), (160, 48)])
async def test_a_question_is_answered_and_nothing_else_happens(
    workspace: Workspace, runs: list[Run], open_app: Open, size: tuple[int, int]
) -> None:
    backend = Talking(workspace, runs, "Short captions say little.")
    async with open_app(backend, size) as pilot:
        await open_planner(pilot)
        await say(pilot, "why did it lose?")
        text = seen(pilot)
        assert "you why did it lose?" in text
        assert "planner Short captions say little." in text
        assert "Ask, or /propose" in text
        assert "6 Planner" in text
        assert pilot.app.screen.query_one(Input).region.bottom <= size[1]
    assert plans(backend) == []


async def test_a_proposal_of_the_model_is_opened_at_the_gate_and_approved_only_by_a_person(
    workspace: Workspace, runs: list[Run], open_app: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Talking(workspace, runs, proposal_object())
    monkeypatch.setattr(proposal, "QUIET_SECONDS", 600.0)
    async with open_app(backend, (160, 60)) as pilot:
        await open_planner(pilot)
        await say(pilot, "/propose only filters")
        await settle(pilot)
        assert isinstance(pilot.app.screen, ProposalScreen)
        text = seen(pilot)
        assert "Longer captions teach more." in text
        assert "No gain on either benchmark." in text
        assert "they differ" in text or "both expect a gain, not surely" in text
        assert "built-in model" in text
        assert "scripted" in text
        assert plans(backend) == []
        await pilot.press("a")
        await settle(pilot)
        assert plans(backend) == []
        monkeypatch.setattr(proposal, "QUIET_SECONDS", 0.0)
        await pilot.press("a")
        await settle(pilot)
        (plan,) = backend.launched
        assert plan.sha256 in text
        assert plan.proposal.title == "Keep longer captions"


async def test_typing_that_goes_on_when_the_gate_opens_approves_nothing(
    workspace: Workspace, runs: list[Run], open_app: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Talking(workspace, runs, proposal_object())
    # On a slow machine two keys lie further apart.
    monkeypatch.setattr(proposal, "QUIET_SECONDS", 600.0)
    async with open_app(backend, (120, 40)) as pilot:
        await open_planner(pilot)
        await say(pilot, "/propose")
        await settle(pilot)
        assert isinstance(pilot.app.screen, ProposalScreen)
        for _ in range(5):
            await pilot.press("z", "a", "b")
        await settle(pilot)
        assert backend.launched == []
        assert plans(backend) == []


async def test_a_proposal_waits_while_somebody_writes(
    workspace: Workspace, runs: list[Run], open_app: Open
) -> None:
    backend = Talking(workspace, runs)
    backend.endpoint = waiting = Waiting()
    async with open_app(backend, (120, 40)) as pilot:
        await open_planner(pilot)
        pilot.app.screen.query_one(Input).value = "/propose"
        await pilot.press("enter")
        await until(pilot, waiting.started.is_set)
        await pilot.press("a", "p", "p")
        backend.endpoint.ask = lambda *_: said("no JSON")
        waiting.let_go.set()
        await settle(pilot)
        assert isinstance(pilot.app.screen, PlannerScreen)
        assert pilot.app.screen.query_one(Input).value == "app"
        assert "The built-in planner proposed this." in seen(pilot)
        await pilot.press("escape", "v")
        await settle(pilot)
        assert isinstance(pilot.app.screen, ProposalScreen)
        assert plans(backend) == []


async def test_an_answer_is_shown_while_it_arrives_and_escape_stops_it(
    workspace: Workspace, runs: list[Run], open_app: Open
) -> None:
    backend = Talking(workspace, runs)
    backend.endpoint = waiting = Waiting("The first ", "half")
    async with open_app(backend) as pilot:
        await open_planner(pilot)
        pilot.app.screen.query_one(Input).value = "what helped?"
        await pilot.press("enter")
        await until(pilot, lambda: "planner The first half" in seen(pilot))
        await pilot.press("escape")
        taken = await until(pilot, lambda: "Stopped." in seen(pilot))
        assert taken < 1
        await until(pilot, lambda: waiting.was_cancelled, 30.0)
        backend.endpoint.ask = lambda *_: said("The second answer.")
        await say(pilot, "and now?")
        text = seen(pilot)
        assert "The second answer." in text
        assert text.count("The first half") == 1


async def test_closing_the_app_in_the_middle_of_an_answer_ends_it(
    workspace: Workspace, runs: list[Run], open_app: Open
) -> None:
    backend = Talking(workspace, runs)
    backend.endpoint = waiting = Waiting("half")
    async with open_app(backend) as pilot:
        await open_planner(pilot)
        pilot.app.screen.query_one(Input).value = "what helped?"
        await pilot.press("enter")
        await until(pilot, waiting.started.is_set)
        await pilot.app.action_quit()
    started = time.monotonic()
    while not waiting.was_cancelled and time.monotonic() - started < 30:
        time.sleep(0.02)
    assert waiting.was_cancelled


async def test_wishes_stand_and_are_taken_back(
    workspace: Workspace, runs: list[Run], open_app: Open
) -> None:
    backend = Talking(workspace, runs, proposal_object())
    async with open_app(backend, (120, 40)) as pilot:
        await open_planner(pilot)
        await say(pilot, "/propose cheaper")
        await settle(pilot)
        await pilot.press("escape")
        await settle(pilot)
        assert "Wishes cheaper" in seen(pilot)
        await pilot.press("escape", "w")
        await settle(pilot)
        assert isinstance(pilot.app.screen, WishesScreen)
        await pilot.press("enter")
        await settle(pilot)
        assert "Taken back: cheaper" in seen(pilot)
        talk = backend.conversation()
        assert talk is not None
        assert talk.wishes == ()


async def test_when_the_model_fails_the_built_in_planner_proposes_and_says_why(
    workspace: Workspace, runs: list[Run], open_app: Open
) -> None:
    backend = Talking(workspace, runs, EndpointError("It is down", "no answer", "start it"))
    async with open_app(backend, (120, 40)) as pilot:
        await open_planner(pilot)
        await say(pilot, "/propose")
        await settle(pilot)
        await pilot.press("escape")
        await settle(pilot)
        text = seen(pilot)
        assert "The built-in planner proposed this." in text
        assert "It is down" in text


@pytest.mark.parametrize("number", [0, 1, 7, 21, 43])
async def test_orders_in_an_answer_are_only_shown(
    workspace: Workspace, runs: list[Run], open_app: Open, number: int
) -> None:
    hostile = f"{disguised(number)} [bold]a[/] [@click=app.quit]x[/]"
    steps = proposal_object(title=INJECTIONS[number], reason=hostile, hypothesis=hostile)
    backend = Talking(workspace, runs, hostile, steps)
    async with open_app(backend, (120, 40)) as pilot:
        await open_planner(pilot)
        await say(pilot, "what next?")
        await settle(pilot)
        text = seen(pilot)
        assert "[@click=app.quit]x[/]" in text
        assert "\x1b" not in text
        await say(pilot, "/propose")
        await settle(pilot)
        assert backend.launched == []
        assert plans(backend) == []


async def test_without_a_model_it_says_how_to_connect_one_and_still_proposes(
    workspace: Workspace, open_app: Open
) -> None:
    async with open_app(WorkspaceBackend(workspace), (100, 30)) as pilot:
        await open_planner(pilot)
        text = seen(pilot)
        for words in ("planner.kind: llm", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
            assert words in text
        await say(pilot, "hello?")
        assert isinstance(pilot.app.screen, PlannerScreen)
        await say(pilot, "/propose")
        await settle(pilot)
        assert isinstance(pilot.app.screen, ProposalScreen)
        assert "Measure the baseline" in seen(pilot)


async def test_a_model_without_a_key_is_named_and_the_app_goes_on(
    workspace: Workspace, open_app: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    backend = WorkspaceBackend(connected(workspace))
    async with open_app(backend, (100, 30)) as pilot:
        await open_planner(pilot)
        assert "OPENAI_API_KEY is not set" in seen(pilot)


def connected(workspace: Workspace) -> Workspace:
    """Return the workspace with a model in its settings."""
    settings = "planner: {kind: llm, model: tiny, price_per_million_output: 2}\n"
    with (workspace.root / "synth.yaml").open("a", encoding="utf-8") as file:
        file.write(settings)
    return open_workspace(workspace.root)


@pytest.fixture
def served(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[WorkspaceBackend, LlmServer]]:
    """The real backend and a real server that it talks to over HTTP."""
    with LlmServer(
        vllm(Answer(calls=[Call("runs", {})])), vllm(Answer(text="Nothing was measured yet."))
    ) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "a-key-for-tests")
        yield WorkspaceBackend(connected(workspace)), server


async def test_over_http_tools_and_tokens_are_shown(
    served: tuple[WorkspaceBackend, LlmServer], open_app: Open
) -> None:
    backend, server = served
    async with open_app(backend, (100, 30)) as pilot:
        await open_planner(pilot)
        assert "0 of 500,000 tokens today" in seen(pilot)
        await say(pilot, "what do we know?")
        text = seen(pilot)
        assert "looked at runs" in text
        assert "Nothing was measured yet." in text
        assert "36 of 500,000 tokens today" in text
        assert len(server.requests) == 2


async def test_over_http_escape_hangs_up(
    served: tuple[WorkspaceBackend, LlmServer], open_app: Open
) -> None:
    backend, server = served
    server.rules = [dripping(event({"content": "word "}), 0.05)]
    async with open_app(backend, (100, 30)) as pilot:
        await open_planner(pilot)
        pilot.app.screen.query_one(Input).value = "count"
        await pilot.press("enter")
        await until(pilot, lambda: "word word" in seen(pilot))
        await pilot.press("escape")
        assert await until(pilot, lambda: "Stopped." in seen(pilot)) < 1
        await until(pilot, lambda: server.requests[0].closed_after is not None, 30.0)


def test_an_edit_keeps_the_settings_and_the_limits_that_were_proposed(
    workspace: Workspace, runs: list[Run]
) -> None:
    backend = Talking(workspace, runs)
    proposal = replace(backend.proposal_of("short"), parent="0001-baseline")
    settings = {**proposal.settings, "seed": 77}
    limited = backend.limited(replace(proposal, settings=settings), Limits(samples=9))
    text = backend.recipe_text(limited).replace("min_num: 3", "min_num: 6")
    edited = backend.edited(limited, text)
    assert edited.settings == limited.settings
    assert edited.limits == Limits(samples=9)
    assert edited.parent == "0001-baseline"
    assert edited.recipe["process"][0]["words_num_filter"]["min_num"] == 6
    assert edited.sha256 != limited.sha256


def test_what_training_would_see_is_counted_from_the_statistics(
    workspace: Workspace, runs: list[Run]
) -> None:
    backend = Talking(workspace, runs)
    expected = backend.expected_effective(backend.proposal_of("short"))
    assert expected is not None
    assert expected.unique == 37
    words = training_words(expected)
    assert f"{expected.steps:,} steps" in words
    assert "37 distinct samples" in words
