"""A key in the environment is found nowhere: no file, no git object, no screen, no log, no process.

One session does everything in which a key could be carried along: the model and the server echo it
in answers, errors and headers, and the user pastes it. Then everything that was kept or shown is
searched, also for parts of it, as a screen breaks lines, and for other spellings.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from synth_agent.planner.endpoint import forget_abilities
from synth_agent.runs import Proposal
from synth_agent.ui.backend import WorkspaceBackend
from synth_agent.ui.screens import proposal as gate
from synth_agent.ui.screens.error import ErrorScreen
from synth_agent.ui.screens.proposal import ProposalScreen
from synth_agent.workspace import Workspace
from tests.llm_server import Answer, LlmServer, refuse, refuse_network, vllm
from tests.planner_world import proposal_object
from tests.ui.conftest import Open, settle
from tests.ui.measured import measured

__all__ = ["refuse_network"]

# Of this process alone: another run of this test on the machine has others in its memory and files.
KEY = f"sk-canary-{os.getpid():07d}Qw7Zx3Vb9Kd5Mt"
PLAIN_KEY = f"{os.getpid():07d}.plain+Hj4/Lr8=Ns2Pg6Tc"
PASSWORD = f"Yf9{os.getpid():07d}Ru3Wn6Sd8Bk"
SETTINGS = "{kind: llm, model: tiny, retries: 0, timeout_seconds: 120}"
COMPUTE = "compute: {warm_worker: false, device: cpu}\n"
_PART = 12
"""A line break leaves so many letters in a row of any secret here."""


@pytest.fixture(autouse=True)
def fresh_abilities() -> Iterator[None]:
    forget_abilities()
    yield
    forget_abilities()


class Session:
    """What a session has shown, and which process arguments were seen meanwhile."""

    def __init__(self, pilot: Pilot[int]) -> None:
        self.pilot = pilot
        self.screens: dict[str, str] = {}
        self.arguments: set[str] = set()

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        started = time.monotonic()
        while not condition():
            screen = shown_text(self.pilot.app.export_screenshot())
            assert time.monotonic() - started < seconds, screen
            self.look()
            await self.pilot.pause(0.05)

    def look(self) -> None:
        """Note the arguments of every process of the machine."""
        for process in psutil.process_iter(["cmdline"]):
            self.arguments.add("\0".join(process.info["cmdline"] or ()))

    async def picture(self, name: str) -> str:
        await settle(self.pilot)
        self.screens[name] = self.pilot.app.export_screenshot(title="synth-agent")
        return shown_text(self.screens[name])

    async def say(self, text: str) -> None:
        self.pilot.app.screen.query_one(Input).value = text
        await self.pilot.press("enter")


def shown_text(svg: str) -> str:
    """Return what a picture shows, without its tags and line ends."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", "", svg)).replace("\xa0", " "))


def parts_of(secret: str) -> set[str]:
    """Return every run of letters of a secret, and of its other spellings, to look for."""
    texts = {secret, quote(secret, safe=""), json.dumps(secret)[1:-1]}
    encoded = {base64.b64encode((pad + secret).encode()).decode()[4:-4] for pad in ("", "x", "xx")}
    return {
        text[at : at + _PART].lower()
        for text in texts | encoded
        for at in range(max(1, len(text) - _PART + 1))
    }


def found_in(text: str, secrets: tuple[str, ...]) -> set[str]:
    """Return the parts of secrets that a text holds."""
    lower = text.lower()
    return {part for secret in secrets for part in parts_of(secret) if part in lower}


def git_objects(root: Path) -> str:
    """Return every object of the repository: commits, messages, notes, trees and files."""
    command = ["git", "-C", str(root), "cat-file", "--batch-all-objects", "--batch"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=600)
    return done.stdout.decode("utf-8", "replace")


def files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield name and content of every file of the workspace, git's own included."""
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(root)), path.read_bytes().decode("utf-8", "replace")


class Carrying(WorkspaceBackend):
    """The real backend, which fails once with the key in the error."""

    defect = ""

    def proposal_of(self, recipe_name: str) -> Proposal:
        if self.defect:
            raise RuntimeError(f"a library says: Authorization: Bearer {self.defect}")
        return super().proposal_of(recipe_name)


def echoing_proposal(key: str) -> str:
    """Return a proposal of a model that writes the key wherever it may write anything."""
    fields = {
        name: f"{name} {key} of it" for name in ("title", "reason", "hypothesis", "refuted_by")
    }
    return json.dumps(proposal_object(**fields))


def answers(key: str, echoed: str) -> list[Callable[..., None]]:
    """Return what the server says, request by request."""
    other = proposal_object(
        title="Other words",
        recipe={"process": [{"name": "words_num_filter", "parameters": {"min_num": 8}}]},
    )
    return [
        vllm(Answer(text=echoing_proposal(key))),
        vllm(Answer(text=f"Your key is {echoed}, sent as Authorization: Bearer {key}.")),
        refuse(401, f"Incorrect API key provided: {key} for {echoed}", "bad", X_Key=key),
        vllm(Answer(text=json.dumps(other))),
    ]


async def propose_and_reject(session: Session, key: str) -> None:
    pilot = session.pilot
    await session.until(lambda: "Ask it" in shown_text(pilot.app.export_screenshot()))
    await session.picture("home")
    await pilot.press("p")
    await session.until(lambda: isinstance(pilot.app.screen, ProposalScreen))
    assert "[removed]" in await session.picture("gate")
    await pilot.press("r")
    await settle(pilot)
    await session.say(f"it shows {key} and {PASSWORD}")
    await session.until(lambda: not isinstance(pilot.app.screen, ProposalScreen))
    await session.picture("rejected")


async def ask_and_fail(session: Session, key: str) -> None:
    pilot = session.pilot
    await pilot.press("6")
    await settle(pilot)
    await session.say(f"is {key} right, and {PASSWORD}?")
    await session.until(lambda: "Your key is" in shown_text(pilot.app.export_screenshot()))
    assert "you is [removed] right" in await session.picture("answer")
    await session.say(f"/propose cheaper than {key}")
    await session.until(lambda: isinstance(pilot.app.screen, ProposalScreen))
    await session.picture("fallback at the gate")
    await pilot.press("escape")
    assert "Incorrect API key" in await session.picture("failed endpoint")


async def approve_and_run(session: Session, backend: WorkspaceBackend) -> None:
    pilot = session.pilot
    await pilot.press("escape", "p")
    await session.until(lambda: isinstance(pilot.app.screen, ProposalScreen))
    await session.picture("second gate")
    await pilot.press("a")
    await session.until(lambda: len(list(backend.root.glob("runs/0*/plan.yaml"))) == 3)

    def has_ended() -> bool:
        return backend.live_run() is None and any(r.finished for r in backend.notebook().runs[2:])

    await session.until(has_ended, 120.0)
    for name, keys in (
        ("run", "2"),
        ("results", "3"),
        ("history", "4"),
        ("data", "5"),
        ("end", "1"),
    ):
        await pilot.press(keys)
        await session.picture(name)


async def break_down(session: Session, backend: Carrying, key: str) -> None:
    pilot = session.pilot
    await pilot.press("6")
    await settle(pilot)
    await pilot.press("v")
    await session.until(lambda: isinstance(pilot.app.screen, ProposalScreen))
    backend.defect = key
    await pilot.press("o")
    await settle(pilot)
    await pilot.press("enter")
    await session.until(lambda: isinstance(pilot.app.screen, ErrorScreen))
    assert "a library says" in await session.picture("error")


@pytest.mark.parametrize(
    ("key", "has_password"),
    [(KEY, True), (PLAIN_KEY, False)],
    ids=["and a password in the address", "that looks like nothing"],
)
async def test_a_key_is_found_nowhere(
    git_workspace: Workspace,
    key: str,
    has_password: bool,
    open_app: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setattr(gate, "QUIET_SECONDS", 0.0)
    with git_workspace.settings_file.open("a", encoding="utf-8") as file:
        file.write(COMPUTE)
    with LlmServer(*answers(key, PASSWORD)) as server:
        user = f"//operator:{PASSWORD}@" if has_password else "//"
        monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("//", user))
        backend = Carrying(measured(git_workspace, SETTINGS))
        async with open_app(backend, (120, 40)) as pilot:
            session = Session(pilot)
            await propose_and_reject(session, key)
            await ask_and_fail(session, key)
            await approve_and_run(session, backend)
            await break_down(session, backend, key)
        # It did travel, so that there was something to find.
        sent_as = {"authorization": f"Bearer {key}"}
        if has_password:
            basic = base64.b64encode(f"operator:{PASSWORD}".encode()).decode()
            sent_as = {"authorization": f"Basic {basic}"}
        assert all(sent_as.items() <= sent.headers.items() for sent in server.requests)
        secrets = (key, PASSWORD) if has_password else (key,)
        assert not [sent for sent in server.requests if found_in(sent.prompt, secrets)]
    output = capfd.readouterr()
    texts = dict(files(backend.root))
    assert any(name.startswith("artifacts/planner/") for name in texts)
    assert "artifacts/logs/app.log" in texts
    texts |= {f"screen {name}": shown_text(svg) for name, svg in session.screens.items()}
    texts |= {f"picture {name}": svg for name, svg in session.screens.items()}
    texts |= {"git objects": git_objects(backend.root), "log": caplog.text}
    texts |= {"output": output.out + output.err, "names": "\n".join(texts)}
    texts |= {"process arguments": "\n".join(session.arguments)}
    assert "Approve" in texts["git objects"] or "approve" in texts["git objects"]
    leaks = {name: parts for name, text in texts.items() if (parts := found_in(text, secrets))}
    assert leaks == {}


def test_the_search_finds_what_it_looks_for() -> None:
    for text in (f"a {KEY}", f"x {KEY[5:20]} y", quote(PLAIN_KEY), json.dumps(PLAIN_KEY)):
        assert found_in(text, (KEY, PLAIN_KEY))
    for pad in ("", "a", "bc"):
        encoded = base64.b64encode(f"{pad}{KEY} and more".encode()).decode()
        assert found_in(encoded, (KEY,))
    assert not found_in("sk-canary and nothing else", (KEY, PASSWORD))
