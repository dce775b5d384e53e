"""Home: the goal, the best result, what runs, and the one thing to do next."""

from __future__ import annotations

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Button

from synth_agent.errors import SynthAgentError
from synth_agent.runs import Proposal, Run
from synth_agent.ui.backend import Backend, Notebook
from synth_agent.ui.messages import (
    Failed,
    NextProposed,
    PlannerAsked,
    ReviewRequested,
    RunRequested,
)
from synth_agent.ui.screens.base import NotebookScreen
from synth_agent.ui.screens.rules import RulesScreen
from synth_agent.ui.talk import Talk
from synth_agent.ui.text import clean
from synth_agent.ui.widgets.drawing import Drawing
from synth_agent.ui.widgets.overview import (
    events_content,
    goal_content,
    live_content,
    recent_content,
    scores_content,
)


class HomeScreen(NotebookScreen):
    """The first screen."""

    PLACE = "home"
    BINDINGS = [
        Binding("p", "propose", "Next experiment", id="home.propose"),
        Binding("w", "watch", "Watch the run", id="home.watch"),
        Binding("r", "rules", "Standing rules", id="home.rules"),
    ]

    def __init__(self, backend: Backend, talk: Talk) -> None:
        super().__init__(backend)
        self._talk = talk
        self._next: Proposal | None = None
        self._model, self._note = "", ""
        self._is_planned = False
        self._problem = ""
        self._planned_for: object = None

    def compose_body(self) -> ComposeResult:
        with VerticalScroll(id="home", can_focus=False):
            yield Drawing(id="goal")
            with Horizontal(id="next", classes="panel"):
                yield Drawing(id="next-words")
                yield Button("Reading…", id="next-action", variant="primary", disabled=True)
            with Horizontal(classes="columns"):
                with Vertical(classes="wide-column"):
                    yield Drawing(id="scores", classes="panel")
                    yield Drawing(id="recent", classes="panel")
                with Vertical(classes="narrow-column"):
                    yield Drawing(id="live", classes="panel")
                    yield Drawing(id="last-events", classes="panel")

    def on_mount(self) -> None:
        for name, title in (
            ("#next", "Next"),
            ("#scores", "Best against baseline"),
            ("#recent", "Recent runs"),
            ("#live", "Running"),
            ("#last-events", "Last events"),
        ):
            self.query_one(name).border_title = title
        goal = goal_content(self.backend.goal, Notebook((), (), None))
        self.query_one("#goal", Drawing).show(lambda width, height: goal)

    def show_notebook(self, notebook: Notebook) -> None:
        decided = (notebook.live, len(notebook.rejections), [r.status for r in notebook.runs])
        if decided != self._planned_for:
            self._planned_for = decided
            self._plan_again()
        self._show_next(notebook)
        goal = goal_content(self.backend.goal, notebook)
        self.query_one("#goal", Drawing).show(lambda width, height: goal)
        self.query_one("#scores", Drawing).show(
            lambda width, height: scores_content(
                notebook, self.backend.baseline, width, self.backend.weights
            )
        )
        self.query_one("#recent", Drawing).show(
            lambda width, height: recent_content(notebook, width)
        )
        self.query_one("#live", Drawing).show(lambda width, height: live_content(notebook, width))
        self.query_one("#last-events", Drawing).show(
            lambda width, height: events_content(notebook, width)
        )

    def _plan_again(self) -> None:
        self._next, self._is_planned, self._problem = None, False, ""
        self._plan()

    def take_proposal(self, proposal: Proposal) -> None:
        """Offer what the model has proposed on the planner's screen."""
        self._next = proposal
        if self.notebook is not None:
            self._show_next(self.notebook)

    @on(Failed)
    def _keep_problem(self, message: Failed) -> None:
        error = message.error
        title = error.title if isinstance(error, SynthAgentError) else type(error).__name__
        self._problem = f"{clean(title)}."
        if self.notebook is not None:
            self._show_next(self.notebook)

    @work(thread=True, exclusive=True, exit_on_error=False, group="plan")
    def _plan(self) -> None:
        state, problem = self._talk.state()
        if state.has_model:
            self.post_message(NextProposed(None, state.words))
        else:
            self.post_message(NextProposed(self.backend.next_proposal(), note=problem))

    @on(NextProposed)
    def _keep_next(self, message: NextProposed) -> None:
        self._is_planned, self._model, self._note = True, message.model, message.note
        # What the model has proposed meanwhile stays.
        self._next = message.proposal or self._next
        if self.notebook is not None:
            self._show_next(self.notebook)

    def _show_next(self, notebook: Notebook) -> None:
        words, label = self._next_step(notebook)
        self.query_one("#next-words", Drawing).show(lambda width, height: words)
        button = self.query_one("#next-action", Button)
        button.label = Content(f" {label} ")
        button.disabled = not label
        button.display = bool(label)
        # Without a button the keys that scroll go to the screen itself.
        home = self.query_one("#home")
        home.can_focus = not label
        if label and self.focused in (None, home):
            button.focus(scroll_visible=False)
        elif not label and self.focused is None:
            home.focus(scroll_visible=False)

    def _next_step(self, notebook: Notebook) -> tuple[Content, str]:
        """Return what to do next in words, and the button's label; no label, no action."""
        waiting = _interrupted(notebook)
        if notebook.live is not None:
            run = notebook.run(notebook.live)
            title = clean(run.plan.proposal.title) if run else ""
            return _words("A run is going. It does not need the app.", title), "Watch it  w"
        if waiting is not None:
            return _waiting_words(waiting), "Open it  w"
        if self._problem:
            return _words("The planner could not propose.", f"{self._problem}  p tries again."), ""
        if not self._is_planned:
            return _words("The planner is reading the history…", ""), ""
        if self._next is None and self._model:
            asked = f"Who: {clean(self._model)}"
            return _words("The language model proposes when it is asked.", asked), "Ask it  p"
        if self._next is None:
            return _words("Every recipe was tried or rejected.", "Add one to recipes/."), ""
        kind = f"{self._next.kind}, recipe {clean(self._next.recipe['name'])}"
        words = [f"Proposed and waiting for you: {kind}"]
        if self._note:
            words.append(f"{clean(self._note)} The built-in planner proposed this.")
        elif self._model:
            words.append(f"By {clean(self._next.proposed_by)}; 6 asks for another")
        return _words(clean(self._next.title), "\n".join(words)), "Review it  p"

    @on(Button.Pressed, "#next-action")
    def _do_next(self) -> None:
        if self.notebook is None:
            return
        if self.notebook.live is not None or _interrupted(self.notebook) is not None:
            self.action_watch()
        else:
            self.action_propose()

    def action_propose(self) -> None:
        if self._next is not None:
            self.post_message(ReviewRequested(self._next))
        elif self._is_planned and self._model:
            self.post_message(PlannerAsked())
        elif self._is_planned:
            self.notify("Every recipe was tried or rejected.", markup=False)
        elif self._problem:
            self._plan_again()
        else:
            self.notify("The planner is still reading the history.", markup=False)

    def action_rules(self) -> None:
        screen = RulesScreen(self.backend)
        screen.notebook = self.notebook
        self.app.push_screen(screen)

    def action_watch(self) -> None:
        if self.notebook is None or not self.notebook.runs:
            self.notify("There is no run yet.", markup=False)
            return
        waiting = _interrupted(self.notebook)
        run_id = self.notebook.live or (waiting or self.notebook.runs[-1]).id
        self.post_message(RunRequested(run_id))


def _words(first: str, second: str) -> Content:
    return Content.assemble((first, "bold"), ("\n" + second, "$foreground-muted"))


def _waiting_words(run: Run) -> Content:
    if run.status == "approved":
        return _words(
            f"{clean(run.id)} was approved and has not started.", "r on its screen starts it."
        )
    return _words(f"{clean(run.id)} was interrupted.", "It continues where it was.")


def _interrupted(notebook: Notebook) -> Run | None:
    """Return the newest run if it was interrupted, or approved but never started."""
    if not notebook.runs or notebook.live is not None:
        return None
    last = notebook.runs[-1]
    return last if last.status in ("interrupted", "approved") else None
