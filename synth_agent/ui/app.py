"""The app: six places, the gate, and the handlers that own all state.

A reader over the workspace: threads read and post facts, handlers here and in the screens take
them. It may be closed at any time; a run belongs to its worker, not to the app.
"""

from __future__ import annotations

import asyncio
import signal
import traceback
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from textual import on, work
from textual.app import App, SystemCommand
from textual.binding import Binding
from textual.screen import Screen
from textual.theme import Theme
from textual.worker import Worker, WorkerState

from synth_agent.errors import SynthAgentError
from synth_agent.runs import now
from synth_agent.ui.backend import Backend, Notebook, WorkspaceBackend
from synth_agent.ui.messages import (
    Failed,
    NotebookRead,
    PlannerAnswered,
    PlannerAsked,
    ProposalRejected,
    ResultsRequested,
    ReviewRequested,
    RunLaunched,
    RunRequested,
)
from synth_agent.ui.screens.base import NotebookScreen
from synth_agent.ui.screens.data import DataScreen
from synth_agent.ui.screens.error import ErrorScreen
from synth_agent.ui.screens.help import HelpScreen
from synth_agent.ui.screens.history import HistoryScreen
from synth_agent.ui.screens.home import HomeScreen
from synth_agent.ui.screens.planner import PlannerScreen
from synth_agent.ui.screens.proposal import ProposalScreen
from synth_agent.ui.screens.results import ResultsScreen
from synth_agent.ui.screens.run import RunScreen
from synth_agent.ui.talk import Talk
from synth_agent.ui.text import clean
from synth_agent.ui.widgets.navigation import Place

if TYPE_CHECKING:
    from synth_agent.workspace import Workspace

_REFRESH_SECONDS = 1.5
_TERMINATED = 128 + signal.SIGTERM
"""Exit code of a program that was asked to end, as shells give it."""

THEME = Theme(
    name="notebook",
    primary="#7aa2c9",
    secondary="#8fa3b8",
    accent="#e0b36a",
    success="#8fbf7f",
    warning="#e0b36a",
    error="#e08a7d",
    foreground="#d6d9de",
    background="#14171c",
    surface="#1a1e24",
    panel="#262c35",
    dark=True,
    variables={"footer-key-foreground": "#e0b36a", "border": "#4a5768"},
)


class SynthAgentApp(App[int]):
    """The whole application over one backend."""

    TITLE = "synth-agent"
    CSS_PATH = "synth_agent.tcss"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]
    VERTICAL_BREAKPOINTS = [(0, "-short"), (32, "-tall")]
    BINDINGS = [
        Binding("1", "go('home')", "Home", show=False, id="go.home"),
        Binding("2", "go('run')", "Run", show=False, id="go.run"),
        Binding("3", "go('results')", "Results", show=False, id="go.results"),
        Binding("4", "go('history')", "History", show=False, id="go.history"),
        Binding("5", "go('data')", "Data", show=False, id="go.data"),
        Binding("6", "go('planner')", "Planner", show=False, id="go.planner"),
        Binding("question_mark", "help", "Help", key_display="?", id="help"),
        Binding("ctrl+p", "command_palette", "Palette", show=False, id="palette"),
        Binding("q", "quit", "Quit", id="quit"),
    ]

    def __init__(self, source: Workspace | Backend) -> None:
        super().__init__()
        from synth_agent.workspace import Workspace as WorkspaceType

        self.backend: Backend = (
            WorkspaceBackend(source) if isinstance(source, WorkspaceType) else source
        )
        self.notebook: Notebook | None = None
        self._is_reading = False
        self._problem = ""
        """What kept the history from being read the last time."""
        self._carded = ("", "")
        """Title and message of the error that was told last."""
        talk = Talk(self.backend)
        self.home_screen = HomeScreen(self.backend, talk)
        self.run_screen = RunScreen(self.backend)
        self.results_screen = ResultsScreen(self.backend)
        self.planner_screen = PlannerScreen(self.backend, talk)
        self._places: dict[str, NotebookScreen] = {
            "home": self.home_screen,
            "run": self.run_screen,
            "results": self.results_screen,
            "history": HistoryScreen(self.backend),
            "data": DataScreen(self.backend),
            "planner": self.planner_screen,
        }
        for name, screen in self._places.items():
            self.add_mode(name, partial(_itself, screen))

    def on_mount(self) -> None:
        # A process that is ended where it stands leaves its terminal on another screen, with the
        # mouse reported and without a cursor.
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.exit, _TERMINATED, _TERMINATED)
        self.register_theme(THEME)
        self.theme = THEME.name
        self.switch_mode("home")
        self._refresh_notebook()
        self.set_interval(_REFRESH_SECONDS, self._refresh_notebook)

    def _refresh_notebook(self) -> None:
        # A thread cannot be stopped, so a slow read is waited for instead of doubled.
        if not self._is_reading:
            self._is_reading = True
            self._read_notebook()

    @work(thread=True, exit_on_error=False, group="notebook")
    def _read_notebook(self) -> None:
        self.post_message(NotebookRead(self.backend.notebook()))

    @on(NotebookRead)
    def _take_notebook(self, message: NotebookRead) -> None:
        self._problem, self._is_reading = "", False
        if message.notebook is self.notebook:
            return
        self.notebook = message.notebook
        for screen in self._notebook_screens():
            screen.notebook = message.notebook

    def _notebook_screens(self) -> list[NotebookScreen]:
        stacked = [s for s in self.screen_stack if isinstance(s, NotebookScreen)]
        return list(dict.fromkeys([*self._places.values(), *stacked]))

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        error = event.worker.error
        self._is_reading = self._is_reading and event.state != WorkerState.ERROR
        # The history is read again and again: one problem is told once.
        if event.state == WorkerState.ERROR and error is not None and str(error) != self._problem:
            self._problem = str(error)
            self._show_error(error)

    @on(Failed)
    def _take_failure(self, message: Failed) -> None:
        self._show_error(message.error)

    def _show_error(self, error: BaseException) -> None:
        """Show an error as a card, and another one that comes meanwhile as a line beside it."""
        if isinstance(error, SynthAgentError):
            words = (error.title, error.message, error.hint)
        else:
            path = self._log_defect(error)
            words = (
                "A defect in synth-agent",
                f"{type(error).__name__}: {error}",
                f"The app and the run go on. The details are in {path}",
            )
        title, message, hint = map(self.backend.without_secrets, words)
        if not isinstance(self.screen, ErrorScreen):
            self._carded = (title, message)
            self.push_screen(ErrorScreen(title, message, hint))
        elif (title, message) != self._carded:  # a repeated failure does not pile up
            self._carded = (title, message)
            self.notify(clean(message), title=clean(title), severity="error", markup=False)

    def _log_defect(self, error: BaseException) -> str:
        path = self.backend.app_log()
        path.parent.mkdir(parents=True, exist_ok=True)
        details = self.backend.without_secrets("".join(traceback.format_exception(error)))
        with path.open("a", encoding="utf-8") as log:
            log.write(f"{now()}\n{details}\n")
        return str(path)

    def _handle_exception(self, error: Exception) -> None:
        """Log a defect in a handler before the toolkit ends the app with its traceback."""
        self._log_defect(error)
        super()._handle_exception(error)

    @on(ReviewRequested)
    def _open_gate(self, message: ReviewRequested) -> None:
        screen = ProposalScreen(self.backend, message.proposal, is_asked_for=message.is_asked_for)
        screen.notebook = self.notebook
        self.push_screen(screen)

    @on(RunLaunched)
    async def _show_launched(self, message: RunLaunched) -> None:
        await self._leave_gate()
        self.run_screen.open(message.run_id, is_followed=True)
        await self.action_go("run")
        self._refresh_notebook()

    @on(ProposalRejected)
    async def _show_rejected(self, message: ProposalRejected) -> None:
        await self._leave_gate()
        self.notify("Rejected; the reason is in the log.", markup=False)
        self._refresh_notebook()

    async def _leave_gate(self) -> None:
        if isinstance(self.screen, ProposalScreen) and self.screen.is_over:
            await self.pop_screen()

    @on(PlannerAsked)
    async def _ask_planner(self) -> None:
        await self.action_go("planner")
        self.planner_screen.propose()

    @on(PlannerAnswered)
    def _tell_home(self, message: PlannerAnswered) -> None:
        proposal = message.answer.proposal
        if proposal is not None and not message.request.given_up.is_set():
            self.home_screen.take_proposal(proposal)

    @on(RunRequested)
    async def _show_run(self, message: RunRequested) -> None:
        is_live = self.notebook is not None and self.notebook.live == message.run_id
        self.run_screen.open(message.run_id, is_followed=is_live)
        await self.action_go("run")

    @on(ResultsRequested)
    async def _show_results(self, message: ResultsRequested) -> None:
        self.results_screen.open(message.run_id)
        await self.action_go("results")

    @on(Place.Chosen)
    async def _go_to_chosen(self, message: Place.Chosen) -> None:
        await self.action_go(message.place)

    async def action_go(self, place: str) -> None:
        """Go to one of the places; dialogs have to be answered first."""
        if self.screen.is_modal:
            return
        if self.current_mode != place:
            await self.switch_mode(place)

    async def action_leave(self) -> None:
        """Step out one layer: a pushed screen first, then back to Home."""
        if len(self.screen_stack) > 1:
            await self.pop_screen()
        elif self.current_mode != "home":
            await self.switch_mode("home")

    def action_help(self) -> None:
        """Show the keys that work on the present screen."""
        if not self.screen.is_modal:
            self.push_screen(HelpScreen(self.keys_here()))

    def keys_here(self) -> list[tuple[str, str]]:
        """Return key and description of each enabled binding of the present screen."""
        found: dict[str, tuple[str, str]] = {}
        for active in self.screen.active_bindings.values():
            binding = active.binding
            if active.enabled and binding.id and binding.description:
                found.setdefault(binding.id, (self.get_key_display(binding), binding.description))
        return list(found.values())

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Offer every binding of the screen, the themes and a screenshot in the palette."""
        for active in screen.active_bindings.values():
            binding, node = active.binding, active.node
            if active.enabled and binding.id and binding.description:
                yield SystemCommand(
                    binding.description,
                    f"key {self.get_key_display(binding)}",
                    lambda action=binding.action, node=node: self.call_next(
                        self.run_action, action, node
                    ),
                )
        yield SystemCommand("Theme", "Change the colours", self.action_change_theme)
        yield SystemCommand(
            "Screenshot",
            "Save the screen as SVG",
            lambda: self.set_timer(0.1, self.deliver_screenshot),
        )

    async def action_quit(self) -> None:
        """Close the app. A live run goes on, and the last line on the terminal says so."""
        live = self.notebook.live if self.notebook else None
        message = None
        if live is not None:
            message = f"{live} goes on without the app. Open synth-agent again to see it."
        self.exit(0, message=message)


def _itself(screen: NotebookScreen) -> NotebookScreen:
    return screen


def run_app(workspace: Workspace) -> int:
    """Open the app over a workspace and return the exit code."""
    app = SynthAgentApp(workspace)
    result = app.run()
    return app.return_code or result or 0
