"""Who proposes on Home: the model that the settings name, over HTTP, and else the built-in planner."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from textual.pilot import Pilot

from synth_agent.planner.endpoint import forget_abilities
from synth_agent.ui.backend import WorkspaceBackend
from synth_agent.ui.screens.home import HomeScreen
from synth_agent.ui.screens.planner import PlannerScreen
from synth_agent.ui.screens.proposal import ProposalScreen
from synth_agent.workspace import Workspace, open_workspace
from tests.llm_server import Answer, LlmServer, dripping, event, refuse, refuse_network, vllm
from tests.planner_world import fill_workspace, proposal_object
from tests.ui.conftest import Open, seen, settle
from tests.ui.measured import measured

__all__ = ["refuse_network"]

LLM = "{kind: llm, model: tiny, retries: 0, timeout_seconds: 120}"


@pytest.fixture(autouse=True)
def fresh_abilities() -> Iterator[None]:
    forget_abilities()
    yield
    forget_abilities()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LlmServer]:
    """A model that proposes whatever it is asked."""
    with LlmServer(vllm(Answer(text=json.dumps(proposal_object())))) as served:
        monkeypatch.setenv("OPENAI_BASE_URL", served.url)
        monkeypatch.setenv("OPENAI_API_KEY", "a-key-for-tests")
        yield served


@pytest.fixture
def backend(git_workspace: Workspace) -> WorkspaceBackend:
    return WorkspaceBackend(measured(git_workspace, LLM))


async def until(pilot: Pilot[int], condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, seen(pilot)
        await pilot.pause(0.03)


async def test_home_asks_the_model_and_keeps_what_it_proposed(
    backend: WorkspaceBackend, server: LlmServer, open_app: Open
) -> None:
    async with open_app(backend, (160, 48)) as pilot:
        await until(pilot, lambda: "Ask it p" in seen(pilot))
        assert "tiny" in seen(pilot)
        assert server.requests == []
        await pilot.press("p")
        await until(pilot, lambda: isinstance(pilot.app.screen, ProposalScreen))
        await settle(pilot)
        assert "Longer captions teach more." in seen(pilot)
        assert "served-model" in seen(pilot)
        assert len(server.requests) == 1
        await pilot.press("escape", "escape", "escape")
        await settle(pilot)
        assert isinstance(pilot.app.screen, HomeScreen)
        text = seen(pilot)
        assert "Keep longer captions" in text
        assert "By served-model" in text
        await pilot.press("p")
        await settle(pilot)
        assert isinstance(pilot.app.screen, ProposalScreen)
        assert len(server.requests) == 1
    assert not list(backend.root.glob("runs/0003*"))


async def test_the_answer_is_shown_as_it_arrives_and_escape_hangs_up(
    backend: WorkspaceBackend, server: LlmServer, open_app: Open
) -> None:
    server.rules = [dripping(event({"content": '{"title": '}), 0.05)]
    async with open_app(backend, (100, 30)) as pilot:
        await until(pilot, lambda: "Ask it p" in seen(pilot))
        await pilot.press("p")
        await until(pilot, lambda: '{"title": {"title":' in seen(pilot))
        await pilot.press("escape")
        await until(pilot, lambda: "Stopped." in seen(pilot), 15.0)
        await until(pilot, lambda: server.requests[0].closed_after is not None, 15.0)
        await pilot.press("escape", "escape")
        await settle(pilot)
        assert isinstance(pilot.app.screen, HomeScreen)
        assert "Ask it p" in seen(pilot)


async def test_a_failing_model_is_named_and_the_built_in_planner_proposes(
    backend: WorkspaceBackend, server: LlmServer, open_app: Open
) -> None:
    server.rules = [refuse(500, "the card has fallen off the bus")]
    async with open_app(backend, (160, 48)) as pilot:
        await until(pilot, lambda: "Ask it p" in seen(pilot))
        await pilot.press("p")
        await until(pilot, lambda: isinstance(pilot.app.screen, ProposalScreen))
        await settle(pilot)
        assert "built-in planner" in seen(pilot)
        await pilot.press("escape")
        await settle(pilot)
        assert isinstance(pilot.app.screen, PlannerScreen)
        text = seen(pilot)
        assert "The built-in planner proposed this." in text
        assert "the card has fallen off the bus" in text
        await pilot.press("1")
        await settle(pilot)


@pytest.mark.parametrize("missing", ["key", "model"])
async def test_without_key_or_model_home_says_so_and_proposes_by_itself(
    git_workspace: Workspace, open_app: Open, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    settings = LLM if missing == "key" else "{kind: llm}"
    words = "OPENAI_API_KEY is not set" if missing == "key" else "planner.model is empty"
    backend = WorkspaceBackend(measured(git_workspace, settings))
    async with open_app(backend, (100, 30)) as pilot:
        await until(pilot, lambda: "Review it p" in seen(pilot))
        text = seen(pilot)
        assert words in text
        assert "The built-in planner proposed this." in text
        await pilot.press("p")
        await until(pilot, lambda: isinstance(pilot.app.screen, ProposalScreen))


async def test_before_the_baseline_no_model_is_asked(
    git_workspace: Workspace, server: LlmServer, open_app: Open
) -> None:
    fill_workspace(git_workspace)
    with git_workspace.settings_file.open("a", encoding="utf-8") as file:
        file.write(f"planner: {LLM}\n")
    backend = WorkspaceBackend(open_workspace(git_workspace.root))
    async with open_app(backend, (160, 48)) as pilot:
        await until(pilot, lambda: "Ask it p" in seen(pilot))
        await pilot.press("p")
        await until(pilot, lambda: isinstance(pilot.app.screen, ProposalScreen))
        await settle(pilot)
        assert "Measure the baseline" in seen(pilot)
        assert server.requests == []
