"""The talk with the planner: questions, answers as they arrive, and proposals for the gate.

What a model says is text and stays text: it is cleaned, never interpreted, and presses no key. A
proposal that arrives is opened at the gate, where only a person decides.
"""

from __future__ import annotations

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.timer import Timer
from textual.widgets import Button, Input
from textual.worker import get_current_worker

from synth_agent.runs import Proposal
from synth_agent.ui.backend import Backend
from synth_agent.ui.messages import (
    Failed,
    PlannerAnswered,
    PlannerReady,
    ReviewRequested,
    ToolsUsed,
)
from synth_agent.ui.screens.base import NotebookScreen
from synth_agent.ui.screens.wishes import WishesScreen
from synth_agent.ui.talk import Answer, Request, Said, Talk, TalkState, tool_words
from synth_agent.ui.text import clean, shorten
from synth_agent.ui.widgets.drawing import Drawing
from synth_agent.ui.widgets.transcript import transcript_content

_REDRAW_SECONDS = 0.1
_MOST_SAID = 200
_SHOWN_STREAM = 6_000
"""Characters of an arriving answer that are laid out again and again."""
_SHOWN_TAIL = 240
"""Characters of a proposal, which is JSON, that are shown while it is written."""
_PROPOSE = "/propose"
_COMMANDS = "Commands: /propose [what you wish], /wishes, /review. Anything else is a question."


class PlannerScreen(NotebookScreen):
    """Ask the planner, have it propose, and take wishes back."""

    PLACE = "planner"
    BINDINGS = [
        Binding("i", "write", "Write", id="planner.write"),
        Binding("p", "propose", "Propose", id="planner.propose"),
        Binding("v", "review", "Review it", id="planner.review"),
        Binding("w", "wishes", "Wishes", id="planner.wishes"),
        Binding("escape", "leave", "Stop, back", id="planner.back"),
    ]

    def __init__(self, backend: Backend, talk: Talk) -> None:
        super().__init__(backend)
        self._talk = talk
        self._has_begun, self._is_wanted = False, False
        self._said: list[Said] = []
        self._request: Request | None = None
        """What is waited for; None when nothing is."""
        self._proposal: Proposal | None = None
        """The latest that was proposed here."""
        self._state = TalkState(words="…")
        self._tools: tuple[str, ...] = ()
        self._drawn = ""
        self._redrawing: Timer | None = None

    def compose_body(self) -> ComposeResult:
        with VerticalScroll(id="talk"):
            yield Drawing(id="talk-past")
            yield Drawing(id="talk-now")
        with Vertical(id="talk-below"):
            yield Drawing(id="talk-wishes")
            yield Input(
                placeholder="Ask, or /propose [what you wish].  esc: to the keys", id="talk-input"
            )
            with Horizontal(id="talk-line"):
                yield Drawing(id="talk-status")
                yield Button("Propose  p", id="propose", compact=True)
                yield Button("Review it  v", id="review", variant="primary", compact=True)
                yield Button("Stop  esc", id="stop", variant="warning", compact=True)

    def on_mount(self) -> None:
        self.query_one("#talk-now").display = False
        self.query_one(Input).focus()
        self._redrawing = self.set_interval(_REDRAW_SECONDS, self._draw_stream, pause=True)
        self._draw()
        self._begin()

    def on_unmount(self) -> None:
        self._give_up()

    @work(thread=True, exit_on_error=False, group="planner")
    def _begin(self) -> None:
        said, state = self._talk.greeting()
        self.post_message(PlannerReady(said, state))

    @on(PlannerReady)
    def _greet(self, message: PlannerReady) -> None:
        self._state, self._has_begun = message.state, True
        self._add(*message.said)
        if self._is_wanted:
            self.propose()

    def propose(self) -> None:
        """Ask for a proposal on behalf of another screen, once this one knows whom to ask."""
        self._is_wanted = not self._has_begun
        if self._has_begun:
            self.action_propose()

    @on(Input.Submitted)
    def _submit(self, event: Input.Submitted) -> None:
        event.stop()
        text = self.backend.without_secrets(event.value.strip())
        command, _, rest = text.partition(" ")
        if not text:
            return
        if command in ("/wishes", "/review"):
            event.input.clear()
            self.run_worker(self.run_action(command[1:]))
        elif text.startswith("/") and command != _PROPOSE:
            self._add(Said("note", _COMMANDS))
        elif self._request is not None:
            self.notify("Wait for the answer, or stop it with esc.", markup=False)
        else:
            event.input.clear()
            is_proposal = command == _PROPOSE
            self._add(Said("you", text))
            self._ask(Request(rest.strip() if is_proposal else text, is_proposal))

    def action_propose(self) -> None:
        if self._request is None:
            self._add(Said("you", _PROPOSE))
            self._ask(Request("", True))
        else:
            self.notify("Wait for the answer, or stop it with esc.", markup=False)

    def _ask(self, request: Request) -> None:
        self._request, self._tools, self._drawn = request, (), ""
        self._draw()
        if self._redrawing is not None:
            self._redrawing.resume()
        self._answer(request)

    @work(thread=True, exit_on_error=False, group="planner")
    def _answer(self, request: Request) -> None:
        worker = get_current_worker()

        def is_over() -> bool:
            return request.given_up.is_set() or worker.is_cancelled

        def on_tools(names: tuple[str, ...]) -> None:
            self.post_message(ToolsUsed(request, names))

        answer = self._talk.answer(request, is_over, on_tools)
        self.post_message(PlannerAnswered(request, answer))

    @on(ToolsUsed)
    def _count_tools(self, message: ToolsUsed) -> None:
        if message.request is self._request:
            self._tools += message.names
            self._draw_stream(is_forced=True)

    @on(PlannerAnswered)
    def _take(self, message: PlannerAnswered) -> None:
        self._state = message.answer.state
        if message.request is not self._request:
            self._draw()
            return
        self._rest()
        self._add(*message.answer.said)
        if message.answer.proposal is not None:
            self._open(message.answer)

    def _open(self, answer: Answer) -> None:
        """Show a proposal at the gate, but never under the fingers of somebody who is typing."""
        self._proposal = answer.proposal
        self._draw()
        if self.is_current and not self.query_one(Input).value and self._proposal is not None:
            self.post_message(ReviewRequested(self._proposal, is_asked_for=False))
        else:
            self.notify("The proposal is there: v on the Planner screen shows it.", markup=False)

    @on(Failed)
    def _recover(self) -> None:
        self._rest()

    def _rest(self) -> None:
        self._request = None
        if self._redrawing is not None:
            self._redrawing.pause()
        self._draw()

    def _give_up(self) -> bool:
        if self._request is None:
            return False
        self._request.given_up.set()
        return True

    async def action_leave(self) -> None:
        """Stop what is waited for; else leave the text for the keys; else go back."""
        request = self._request
        if request is not None:
            said = "" if request.is_proposal else request.streamed()
            self._give_up()
            self._rest()
            kept = (Said("planner", said),) if said else ()
            self._add(*kept, Said("note", "Stopped. Nothing of it is remembered."))
        elif self.query_one(Input).has_focus:
            self.query_one("#talk").focus()
        else:
            await super().action_leave()

    def action_write(self) -> None:
        self.query_one(Input).focus()

    def action_review(self) -> None:
        if self._proposal is None:
            self.notify("Nothing was proposed here yet: p asks for it.", markup=False)
        else:
            self.post_message(ReviewRequested(self._proposal))

    def action_wishes(self) -> None:
        if self._request is not None:
            self.notify("Wait for the answer, or stop it with esc.", markup=False)
        elif not self._state.wishes:
            words = "No wish stands. /propose cheaper, for example, makes one."
            self.notify(words, markup=False)
        else:
            self.app.push_screen(WishesScreen(self._state.wishes), self._take_back)

    def _take_back(self, wish: str | None) -> None:
        if wish is not None:
            self._forget(wish)

    @work(thread=True, exit_on_error=False, group="planner")
    def _forget(self, wish: str) -> None:
        state = self._talk.take_back(wish)
        self.post_message(PlannerReady((Said("note", f"Taken back: {wish}"),), state))

    @on(Button.Pressed)
    async def _press(self, event: Button.Pressed) -> None:
        event.stop()
        if event.button.id == "stop":
            await self.action_leave()
        else:
            await self.run_action(str(event.button.id))

    def _add(self, *said: Said) -> None:
        self._said = [*self._said, *said][-_MOST_SAID:]
        self._draw()

    def _draw(self) -> None:
        said = tuple(self._said)
        self.query_one("#talk-past", Drawing).show(
            lambda width, height: transcript_content(said, width)
        )
        is_waiting = self._request is not None
        self.query_one("#talk-now").display = is_waiting
        if is_waiting:
            self._draw_stream(is_forced=True)
        wishes = self._state.wishes
        line = self.query_one("#talk-wishes", Drawing)
        line.display = bool(wishes)
        line.show(lambda width, height: wishes_content(wishes, width))
        words = Content.styled(clean(self._state.words), "$foreground-muted")
        self.query_one("#talk-status", Drawing).show(lambda width, height: words)
        self.query_one("#stop").display = is_waiting
        self.query_one("#propose").display = not is_waiting
        self.query_one("#review").display = self._proposal is not None and not is_waiting
        self.query_one("#talk", VerticalScroll).scroll_end(animate=False)

    def _draw_stream(self, is_forced: bool = False) -> None:
        request = self._request
        if request is None:
            return
        text = request.streamed()
        if text == self._drawn and not is_forced:
            return
        self._drawn = text
        now = self._now_words(request, text)
        talk = self.query_one("#talk", VerticalScroll)
        is_followed = talk.is_vertical_scroll_end
        self.query_one("#talk-now", Drawing).show(
            lambda width, height: transcript_content(now, width)
        )
        # Whoever has scrolled up reads; only those at the end are taken along.
        if is_followed:
            talk.scroll_end(animate=False)

    def _now_words(self, request: Request, text: str) -> tuple[Said, ...]:
        """Return what is known of an answer that is still arriving."""
        tools = (Said("tools", tool_words(self._tools)),) if self._tools else ()
        if request.is_proposal:
            words = f"writes a proposal, {len(text):,} characters" if text else "is thinking"
            tail = f"\n… {text[-_SHOWN_TAIL:]}" if text else ""
            return *tools, Said("note", f"The planner {words}…  esc stops it{tail}")
        if not text:
            return *tools, Said("note", "The planner is thinking…  esc stops it")
        return *tools, Said("planner", text[-_SHOWN_STREAM:])


def wishes_content(wishes: tuple[str, ...], width: int) -> Content:
    """Return the standing wishes in a line."""
    words = " · ".join(clean(wish) for wish in wishes)
    return Content.assemble(
        ("Wishes  ", "$accent"),
        shorten(words, max(8, width - 24)),
        ("   w takes back", "$foreground-muted"),
    )
