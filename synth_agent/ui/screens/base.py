"""What all full screens share: the backend, the history, and what happens when a thread fails."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.binding import Binding
from textual.reactive import reactive
from textual.screen import Screen
from textual.widgets import Footer
from textual.worker import Worker, WorkerState

from synth_agent.ui.backend import Backend, Notebook
from synth_agent.ui.messages import Failed
from synth_agent.ui.widgets.navigation import NavigationBar


class NotebookScreen(Screen[None]):
    """A screen over the history. The app sets `notebook`; the screen posts messages to the app."""

    PLACE = "home"
    """Name of the place that the navigation bar marks."""
    BINDINGS = [Binding("escape", "leave", "Back", id="back", show=False)]

    notebook: reactive[Notebook | None] = reactive(None)

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        self.is_ready = False
        """Whether the widgets are there."""

    def compose(self) -> ComposeResult:
        yield NavigationBar(self.PLACE, self.backend.root)
        yield from self.compose_body()
        yield Footer(show_command_palette=False)

    def compose_body(self) -> ComposeResult:
        """Yield what is between the navigation bar and the footer."""
        yield from ()

    def watch_notebook(self, notebook: Notebook | None) -> None:
        bars = self.query(NavigationBar)
        # What was read may arrive while the app closes, when the widgets are gone already.
        if notebook is not None and self.is_ready and bars:
            bars.first().show_live(notebook.live)
            self.show_notebook(notebook)

    def on_mount(self) -> None:
        # Runs after the subclass's own handler.
        self.is_ready = True
        if self.notebook is not None:
            self.watch_notebook(self.notebook)

    def show_notebook(self, notebook: Notebook) -> None:
        """Draw the history."""

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        if event.state == WorkerState.ERROR and event.worker.error is not None:
            self.post_message(Failed(event.worker.error))

    async def action_leave(self) -> None:
        await self.run_action("app.leave")
