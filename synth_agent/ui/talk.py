"""Talking to the planner in a thread: one request at a time, given up at once when nobody waits.

Owns the order of requests, what was streamed so far, and the words for what came of each. Knows
nothing of widgets.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from synth_agent.errors import InvalidInput, SynthAgentError
from synth_agent.runs import Proposal
from synth_agent.ui.backend import Backend

Who = Literal["you", "planner", "tools", "note", "proposal"]
_LOOK_SECONDS = 0.5
_MOST_STREAMED = 100_000
"""Characters of an answer that are shown while it arrives."""
HOW_TO_CONNECT = (
    "No language model is connected; the built-in planner proposes without one. To talk to a model, "
    "set planner.kind: llm and planner.model in synth.yaml, OPENAI_BASE_URL to the address of an "
    "OpenAI-compatible server and OPENAI_API_KEY to its key, and start synth-agent again."
)


@dataclass(frozen=True)
class Said:
    """Something in the transcript."""

    who: Who
    text: str


@dataclass(frozen=True)
class TalkState:
    """What holds of the talk as a whole."""

    wishes: tuple[str, ...] = ()
    words: str = ""
    """Which planner, and what its model has used."""
    has_model: bool = False


@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    said: tuple[Said, ...]
    state: TalkState
    proposal: Proposal | None = None


@dataclass(eq=False)
class Request:
    """A question, or a wish for a proposal, that can be given up."""

    text: str
    is_proposal: bool
    given_up: threading.Event = field(default_factory=threading.Event)
    _pieces: list[str] = field(default_factory=list)
    _length: int = 0

    def take_piece(self, text: str) -> None:
        """Keep a piece of the answer. Called in the request's thread."""
        if self._length < _MOST_STREAMED:
            self._pieces.append(text)
            self._length += len(text)

    def streamed(self) -> str:
        """Return what has arrived so far."""
        return "".join(self._pieces)


class Talk:
    """The talk with the planner that the workspace asks for."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._turn = threading.Lock()

    def state(self) -> tuple[TalkState, str]:
        """Return the state, and what is wrong with the settings of the model, if anything is."""
        try:
            conversation, problem = self._backend.conversation(), ""
        except InvalidInput as error:
            conversation, problem = None, problem_words(error)
        wishes = () if conversation is None else conversation.wishes
        return TalkState(wishes, self._words(), conversation is not None), problem

    def _words(self) -> str:
        try:
            return self._backend.planner_words()
        except SynthAgentError as error:
            return error.title

    def greeting(self) -> tuple[tuple[Said, ...], TalkState]:
        """Return what to say before anything was asked."""
        state, problem = self.state()
        if problem:
            return (Said("note", f"{problem} The built-in planner proposes until then."),), state
        if not state.has_model:
            return (Said("note", HOW_TO_CONNECT),), state
        words = "Ask about the data, the runs or a proposal. Nothing runs before you approve it."
        return (Said("note", words),), state

    def answer(
        self, request: Request, is_over: Callable[[], bool], on_tools: Callable[..., None]
    ) -> Answer:
        """Return what comes of a request. Waits for an earlier one that was given up to end.

        Args:
            request: What is asked.
            is_over: Whether nobody waits for the answer any more; asked often.
            on_tools: Called with the names of the tools that the model has used since the last call.
        """
        with self._turn:
            watch = ToolWatch(self._backend.exchanges())

            def is_cancelled() -> bool:
                names = watch.look()
                if names:
                    on_tools(names)
                return is_over()

            if is_over():
                return Answer((), self.state()[0])
            try:
                said, proposal = self._ask(request, is_cancelled)
            except SynthAgentError as error:
                said, proposal = (Said("note", problem_words(error)),), None
            tools = tool_words(watch.rest())
            found = (Said("tools", tools), *said) if tools else said
            return Answer(found, self.state()[0], proposal)

    def _ask(
        self, request: Request, is_cancelled: Callable[[], bool]
    ) -> tuple[tuple[Said, ...], Proposal | None]:
        problem = ""
        try:
            conversation = self._backend.conversation()
        except InvalidInput as error:
            conversation, problem = None, problem_words(error)
        if conversation is None:
            return self._built_in(request, problem)
        if not request.is_proposal:
            text = conversation.ask(request.text, request.take_piece, is_cancelled)
            return ((Said("planner", text),) if text else ()), None
        proposed = conversation.propose(request.text, request.take_piece, is_cancelled)
        if proposed.proposal is None:
            return (Said("note", proposed.note or NOTHING_LEFT),), None
        note = proposed.note
        if not proposed.by_llm:
            note = f"The built-in planner proposed this. {note}"
        return _told(proposed.proposal, note), proposed.proposal

    def _built_in(self, request: Request, problem: str) -> tuple[tuple[Said, ...], Proposal | None]:
        if not request.is_proposal:
            return (Said("note", problem or HOW_TO_CONNECT),), None
        proposal = self._backend.next_proposal()
        note = f"{problem} The built-in planner proposed this." if problem else ""
        if request.text:
            note = f"{note} The built-in planner reads no wishes.".strip()
        if proposal is None:
            return (Said("note", NOTHING_LEFT),), None
        return _told(proposal, note), proposal

    def take_back(self, wish: str) -> TalkState:
        """Forget a standing wish."""
        with self._turn:
            conversation = self._backend.conversation()
            if conversation is not None:
                conversation.take_back(wish)
            return self.state()[0]


NOTHING_LEFT = "Every recipe was tried or rejected: there is nothing left to propose."


def _told(proposal: Proposal, note: str) -> tuple[Said, ...]:
    said = Said("proposal", f"{proposal.title}\n{proposal.reason}")
    return (Said("note", note), said) if note else (said,)


def problem_words(error: SynthAgentError) -> str:
    """Return an error in a line."""
    return f"{error.title}: {error.message}" + (f" ({error.hint})." if error.hint else ".")


class ToolWatch:
    """Reads from the growing file of exchanges which tools the model has used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.is_file() else 0
        self._looked = monotonic()
        self._names: list[str] = []

    def look(self) -> tuple[str, ...]:
        """Return the names of tools used since the last call, at most twice a second."""
        if monotonic() - self._looked < _LOOK_SECONDS:
            return ()
        self._looked = monotonic()
        return self._read()

    def rest(self) -> tuple[str, ...]:
        """Return the names of all tools used, those not told yet included."""
        self._read()
        return tuple(self._names)

    def _read(self) -> tuple[str, ...]:
        if not self._path.is_file():
            return ()
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        names = [name for line in data[:end].splitlines() for name in _tools_of(line)]
        self._names += names
        return tuple(names)


def _tools_of(line: bytes) -> list[str]:
    try:
        reply: Any = json.loads(line).get("reply") or {}
        return [str(call["name"]) for call in reply.get("tool_calls", ()) if not _is_answer(call)]
    except (ValueError, AttributeError, KeyError, TypeError):
        # A damaged line is the transcript's concern; here it only costs a name.
        return []


def _is_answer(call: Any) -> bool:
    """Tell whether a call is how a server without schemas hands over the proposal itself."""
    return bool(call["name"] == "proposal")


def tool_words(names: tuple[str, ...]) -> str:
    """Return which tools were used, with how often: `runs, statistics x 3`."""
    counted = Counter(names)
    return ", ".join(name if n == 1 else f"{name} x {n}" for name, n in counted.items())
