"""Standing rules: what may run without asking, how much of it is left, and how to end it.

Rules are made on the command line, in words that say what they cover; here a person ends them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import DataTable

from synth_agent.errors import SynthAgentError
from synth_agent.ui.backend import Backend
from synth_agent.ui.messages import RulesRead
from synth_agent.ui.screens.base import NotebookScreen
from synth_agent.ui.screens.confirm import ConfirmScreen
from synth_agent.ui.talk import problem_words
from synth_agent.ui.text import clean, shorten
from synth_agent.ui.widgets.drawing import Drawing

if TYPE_CHECKING:
    from synth_agent.rules import Standing

_HOW_TO_ADD = "synth-agent rules add makes one; synth-agent auto runs what they cover."
_COLUMNS = ("rule", "state", "runs", "GPU-hours", "until (UTC)", "by")


class RulesScreen(NotebookScreen):
    """List the rules; end one after a question."""

    PLACE = "home"
    BINDINGS = [
        Binding("x", "revoke", "Revoke", id="rules.revoke"),
        Binding("escape", "leave", "Back", id="rules.back"),
    ]

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._rules: tuple[Standing, ...] = ()
        self._asked = ""
        """Id of the rule that the question before revoking is about."""

    def compose_body(self) -> ComposeResult:
        yield Drawing(id="rules-head")
        yield DataTable(id="rules", cursor_type="row")
        with VerticalScroll(id="rules-detail", classes="panel"):
            yield Drawing(id="rules-words")

    def on_mount(self) -> None:
        self.query_one(DataTable).add_columns(*_COLUMNS)
        self.query_one(DataTable).focus()
        self._say("Reading the rules…")
        self._read()

    def _say(self, words: str) -> None:
        content = Content.styled(clean(words), "$foreground-muted")
        self.query_one("#rules-head", Drawing).show(lambda width, height: content)

    @work(thread=True, exclusive=True, exit_on_error=False, group="rules")
    def _read(self) -> None:
        self._report()

    def _report(self) -> None:
        try:
            self.post_message(RulesRead(self.backend.rules(), ""))
        except SynthAgentError as error:
            self.post_message(RulesRead((), problem_words(error)))

    @on(RulesRead)
    def _show(self, message: RulesRead) -> None:
        self._rules = message.rules
        standing = sum(1 for one in message.rules if not one.problem)
        words = f"{standing} of {len(message.rules)} rules stand. {_HOW_TO_ADD}"
        self._say(message.problem or words if message.rules else message.problem or _nothing())
        table = self.query_one(DataTable)
        cursor = table.cursor_row
        table.clear()
        for number, one in enumerate(message.rules):
            table.add_row(*_cells(one), key=str(number))
        table.move_cursor(row=min(cursor, max(0, table.row_count - 1)))
        self.query_one("#rules-detail").display = bool(message.rules)

    def _chosen(self) -> Standing | None:
        row = self.query_one(DataTable).cursor_row
        return self._rules[row] if 0 <= row < len(self._rules) else None

    @on(DataTable.RowHighlighted)
    def _follow_cursor(self) -> None:
        chosen = self._chosen()
        words = Content(clean(chosen.words())) if chosen else Content("")
        self.query_one("#rules-words", Drawing).show(lambda width, height: words)
        self.query_one("#rules-detail").scroll_home(animate=False)

    def action_revoke(self) -> None:
        chosen = self._chosen()
        if chosen is None or chosen.rule is None or chosen.rule.revoked_by:
            self.notify("There is no rule here that could be revoked.", markup=False)
            return
        screen = ConfirmScreen(
            f"Revoke {clean(chosen.id)}?",
            f"{clean(chosen.rule.words())}\n\nIt approves nothing any more. A run that it approved "
            "goes on.",
            yes="Revoke",
            no="Keep it",
        )
        self._asked = chosen.id
        self.app.push_screen(screen, self._answer)

    def _answer(self, yes: bool | None) -> None:
        if yes:
            self._revoke(self._asked)

    @work(thread=True, exit_on_error=False, group="rules")
    def _revoke(self, rule_id: str) -> None:
        self.backend.revoke(rule_id)
        self._report()


def _nothing() -> str:
    return f"No standing rules: every run waits for a person. {_HOW_TO_ADD}"


def _cells(one: Standing) -> list[Text]:
    rule = one.rule
    state = shorten(clean(one.problem), 24) or "stands"
    if rule is None:
        return [Text(clean(one.id)), Text(state), *(Text(""),) * 4]
    return [
        Text(f"{clean(one.id)} {rule.kind}"),
        Text(state),
        Text(f"{len(one.runs)} of {rule.max_runs}"),
        Text(f"{one.gpu_hours:.2g} of {rule.gpu_hours:g}"),
        Text(clean(rule.expires[:16].replace("T", " "))),
        Text(shorten(clean(rule.by), 16)),
    ]
