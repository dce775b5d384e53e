"""A run as it goes: stages, loss, rates and the end of the log. A reader: closing it stops nothing.

Only the live run's event log is polled often; its new bytes are read in a thread and folded here.
"""

from __future__ import annotations

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content

from synth_agent.runs import STAGES, EventTail, Run, StageState
from synth_agent.ui.backend import Backend, Notebook
from synth_agent.ui.messages import (
    CancelRequested,
    EarlyJudged,
    EventsArrived,
    Failed,
    LogRead,
    ResultsRequested,
    RunLaunched,
    RunOpened,
)
from synth_agent.ui.plots import line_chart
from synth_agent.ui.screens.base import NotebookScreen
from synth_agent.ui.screens.confirm import ConfirmScreen
from synth_agent.ui.text import STATES, VERDICTS, clean, fit, last_return
from synth_agent.ui.widgets.drawing import Drawing
from synth_agent.ui.widgets.stages import current_stage, numbers_line, stage_lines

_POLL_SECONDS = 0.22
_LOG_EVERY = 3
"""The log is read at every third poll."""
_EARLY_INDENT = 7
_RESUMABLE = ("interrupted", "failed", "cancelled", "approved")


class RunScreen(NotebookScreen):
    """Show one run, the live one unless another was asked for."""

    PLACE = "run"
    BINDINGS = [
        Binding("c", "cancel", "Cancel", id="run.cancel"),
        Binding("r", "resume", "Resume", id="run.resume"),
        Binding("s", "stage", "Other stage", id="run.stage"),
        Binding("enter", "results", "Results", id="run.results"),
    ]

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._run: Run | None = None
        self._wanted: str | None = None
        self._is_followed = True
        """Whether another run that goes live takes the place of this one."""
        self._tail: EventTail | None = None
        self._is_live = False
        self._is_polling = False
        self._polls = 0
        self._judged: object = None
        """For which run and how much of its first stage the early verdict was asked."""
        self._stage: str | None = None
        """The stage that the user chose to look at; None follows the run."""

    @property
    def run_id(self) -> str | None:
        """Id of the run that is shown."""
        return self._wanted

    def compose_body(self) -> ComposeResult:
        with VerticalScroll(id="run", can_focus=False):
            yield Drawing(id="run-head")
            yield Drawing(id="stages", classes="panel")
            yield Drawing(id="early")
            with Horizontal(id="run-panels", classes="columns"):
                with Vertical(id="curve-panel", classes="panel"):
                    yield Drawing(id="numbers")
                    yield Drawing(id="curve")
                with VerticalScroll(id="log-panel", classes="panel"):
                    yield Drawing(id="log")

    def on_mount(self) -> None:
        self.query_one("#stages").border_title = "Stages"
        self.query_one("#log-panel", VerticalScroll).anchor()
        self.query_one("#log-panel").focus()
        self.query_one("#early").display = False
        self._show_nothing()
        if self._wanted is not None:
            self._open(self._wanted)
        self.set_interval(_POLL_SECONDS, self._poll)

    def open(self, run_id: str, *, is_followed: bool = False) -> None:
        """Show a run from its beginning.

        Args:
            run_id: The run.
            is_followed: Give its place to another run that goes live later, instead of keeping it.
        """
        self._wanted, self._stage, self._tail = run_id, None, None
        self._is_followed = is_followed
        if self.is_ready:
            self._open(run_id)

    def show_notebook(self, notebook: Notebook) -> None:
        known = notebook.live or (notebook.runs[-1].id if notebook.runs else None)
        is_new = self._wanted is None or (self._is_followed and notebook.live is not None)
        if is_new and known is not None and known != self._wanted:
            self.open(known, is_followed=True)
        elif self._run is not None and not self._is_live:
            self._adopt(notebook.run(self._run.id))
        if self._run is not None:
            self._judge_early(self._run)

    def _adopt(self, run: Run | None) -> None:
        """Take over what another process made of a run that is not polled."""
        if run is not None and (self._run is None or run.status != self._run.status):
            self.open(run.id, is_followed=self._is_followed)

    @work(thread=True, exclusive=True, exit_on_error=False, group="open")
    def _open(self, run_id: str) -> None:
        is_live = self.backend.live_run() == run_id
        run = self.backend.run(run_id)
        tail = self.backend.events(run_id)
        whole = Run(run.id, run.plan)
        for event in tail.read():
            whole.apply(event)
        self.post_message(RunOpened(whole, tail, is_live))

    @on(RunOpened)
    def _take_run(self, message: RunOpened) -> None:
        if message.run.id != self._wanted:
            return
        self._run, self._tail, self._is_live = message.run, message.tail, message.is_live
        self._is_polling = False
        self._settle()
        self._read_shown_log()

    def _settle(self) -> None:
        """Say interrupted where the log says running but nobody works on it."""
        run = self._run
        if run is None:
            return
        if run.status == "running" and not self._is_live:
            run.status = "interrupted"
        elif run.status == "interrupted" and self._is_live:
            run.status = "running"
        self._redraw(run)
        self._judge_early(run)
        self.refresh_bindings()

    def _judge_early(self, run: Run) -> None:
        """Have the loss judged once for every quarter of the first stage, while no score is there."""
        stage = run.stages["pretrain"]
        done, total = stage.progress.get("step") or 0, stage.progress.get("total") or 0
        quarter = 4 * done // total if total and not run.scores else 0
        asked = (run.id, quarter)
        if self.notebook is not None and asked != self._judged:
            self._judged = asked
            self.query_one("#early").display = False
            if quarter:
                self._ask_early(run, self.notebook.runs)

    @work(thread=True, exclusive=True, exit_on_error=False, group="early")
    def _ask_early(self, run: Run, history: tuple[Run, ...]) -> None:
        self.post_message(EarlyJudged(run.id, self.backend.early_words(run, history)))

    @on(EarlyJudged)
    def _show_early(self, message: EarlyJudged) -> None:
        if self._run is not None and message.run_id == self._run.id and not self._run.scores:
            early = self.query_one("#early", Drawing)
            early.display = bool(message.words)

            def draw(width: int, height: int) -> Content:
                return early_content(message.words, width)

            early.show(draw)
            # Drawn again once it has its place: lines that came with a resize found no room.
            self.call_after_refresh(early.show, draw)

    def _poll(self) -> None:
        watched = self._is_live or (self._run is not None and self._run.status == "approved")
        if not watched or self._is_polling or self._tail is None or self._wanted is None:
            return
        self._is_polling = True
        self._polls += 1
        self._read_events(self._wanted, self._tail)
        if self._polls % _LOG_EVERY == 0:
            self._read_shown_log()

    @work(thread=True, exit_on_error=False, group="events")
    def _read_events(self, run_id: str, tail: EventTail) -> None:
        # Liveness first: a worker that ends in between has then written all that is read after.
        is_live = self.backend.live_run() == run_id
        self.post_message(EventsArrived(run_id, tail.read(), is_live))

    @on(EventsArrived)
    def _take_events(self, message: EventsArrived) -> None:
        self._is_polling = False
        run = self._run
        if run is None or message.run_id != run.id:
            return
        for event in message.events:
            run.apply(event)
        changed = bool(message.events) or message.is_live != self._is_live
        self._is_live = message.is_live
        if changed:
            self._settle()
        if not self._is_live:
            self._read_shown_log()

    @on(Failed)
    def _poll_again(self) -> None:
        self._is_polling = False

    def _read_shown_log(self) -> None:
        if self._run is not None:
            self._read_log(self._run.id, self._shown_stage(self._run))

    @work(thread=True, exclusive=True, exit_on_error=False, group="log")
    def _read_log(self, run_id: str, stage: str) -> None:
        self.post_message(LogRead(run_id, stage, self.backend.log_lines(run_id, stage)))

    @on(LogRead)
    def _show_log(self, message: LogRead) -> None:
        if self._run is None or message.run_id != self._run.id:
            return
        self.query_one("#log-panel").border_title = Content(f"Log of {message.stage}")
        lines = [clean(last_return(line)) for line in message.lines]
        words = Content("\n".join(lines) or "The log is empty.")
        self.query_one("#log", Drawing).show(lambda width, height: words)

    def _shown_stage(self, run: Run) -> str:
        return self._stage or current_stage(run)

    def _show_nothing(self) -> None:
        words = Content.styled(
            "No run yet. Press 1 and start with the baseline.", "$foreground-muted"
        )
        self.query_one("#run-head", Drawing).show(lambda width, height: words)
        self.query_one("#run-panels").display = False
        self.query_one("#stages").display = False

    def _redraw(self, run: Run) -> None:
        shown = self._shown_stage(run)
        stage = run.stages[shown]
        self.query_one("#run-panels").display = True
        self.query_one("#stages").display = True
        head = head_content(run)
        self.query_one("#run-head", Drawing).show(lambda width, height: head)
        self.query_one("#stages", Drawing).show(
            lambda width, height: stage_lines(run, shown, width)
        )
        self.query_one("#curve-panel").border_title = Content(f"Loss of {shown}")
        self.query_one("#numbers", Drawing).show(lambda width, height: numbers_line(stage))
        self.query_one("#curve", Drawing).show(
            lambda width, height: curve_content(stage, width, height)
        )

    def action_stage(self) -> None:
        if self._run is not None:
            following = STAGES.index(self._shown_stage(self._run)) + 1
            self._stage = STAGES[following % len(STAGES)]
            self._redraw(self._run)
            self._read_shown_log()

    def action_results(self) -> None:
        if self._run is None or not self._run.scores:
            self.notify("This run has no score yet.", markup=False)
        else:
            self.post_message(ResultsRequested(self._run.id))

    def action_cancel(self) -> None:
        run = self._run
        if run is None or not self._is_live:
            self.notify("Nothing is running here.", markup=False)
            return
        self.app.push_screen(
            ConfirmScreen(
                "Cancel the run?",
                f"{clean(run.id)} stops, and what its stages finished is kept: it can be resumed.",
                "Cancel the run",
                "Keep it running",
            ),
            self._cancel_if,
        )

    def _cancel_if(self, answer: bool | None) -> None:
        if answer and self._run is not None:
            self._cancel(self._run.id)

    @work(thread=True, exclusive=True, exit_on_error=False, group="decision")
    def _cancel(self, run_id: str) -> None:
        self.backend.cancel(run_id)
        self.post_message(CancelRequested(run_id))

    @on(CancelRequested)
    def _say_cancelled(self) -> None:
        self.notify("The run was told to stop.", markup=False)

    def action_resume(self) -> None:
        run = self._run
        if run is None or run.status not in _RESUMABLE or self._is_live:
            self.notify("Only a run that stopped can be resumed.", markup=False)
            return
        self.notify("Starting the run again where it was.", markup=False)
        self._resume(run.id)

    @work(thread=True, exclusive=True, exit_on_error=False, group="decision")
    def _resume(self, run_id: str) -> None:
        self.backend.resume(run_id)
        self.post_message(RunLaunched(run_id))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Show only the keys that do something in the run's present state."""
        if action == "stage":
            return self._run is not None
        if action == "cancel":
            return self._is_live
        if action == "resume":
            return self._run is not None and not self._is_live and self._run.status in _RESUMABLE
        if action == "results":
            return self._run is not None and bool(self._run.scores)
        return True


def head_content(run: Run) -> Content:
    """Return the run's name, state and, where it failed, what to do."""
    sign = STATES[run.status]
    verdict = ""
    if run.verdict is not None and run.verdict != "failed":
        verdict = f"  {VERDICTS[run.verdict].text}"
    lines = [
        Content.assemble(
            (clean(run.id), "bold"),
            f"  {clean(run.plan.proposal.title)}  ",
            (sign.text, f"bold ${sign.style}"),
            (verdict, "$foreground-muted"),
        )
    ]
    error = run.error or next((s.error for s in run.stages.values() if s.error), None)
    if run.status == "failed" and error:
        lines += [
            Content.assemble(("✗ " + clean(error.get("title", "")), "bold $error")),
            Content(clean(error.get("message", ""))),
            Content.assemble(
                ("What to do  ", "$foreground-muted"),
                clean(error.get("hint", "")) or "read the log below, then press r to resume",
            ),
        ]
    elif run.status == "interrupted":
        words = "Its worker is gone. Nothing that was finished is lost: r continues it."
        lines.append(Content.styled(words, "$warning"))
    elif run.status == "cancelled":
        lines.append(Content.styled("A person stopped it. r continues it.", "$foreground-muted"))
    elif run.status == "approved":
        lines.append(Content.styled("Approved; waiting for its worker.", "$foreground-muted"))
    lines += [
        Content.styled("note: " + clean(note), "$foreground-muted") for note in run.notes[-2:]
    ]
    return Content("\n").join(lines)


def early_content(words: tuple[str, ...], width: int) -> Content:
    """Return early verdicts, one a benchmark, wrapped beside their name."""
    lines: list[Content] = []
    for one in words:
        for line in Content(clean(one)).wrap(max(10, width - _EARLY_INDENT)):
            label = fit("Early" if not lines else "", _EARLY_INDENT)
            lines.append(Content.assemble((label, "$foreground-muted"), line))
    return Content("\n").join(lines)


def curve_content(stage: StageState, width: int, height: int) -> Content:
    """Return the loss curve, or why there is none."""
    lines = line_chart(stage.losses, width, max(3, height))
    if not lines:
        return Content.styled("No loss: this stage has not reported any.", "$foreground-muted")
    return Content.styled("\n".join(lines), "$primary")
