"""The gate: exactly what would run, why, and what it takes. Nothing runs before a person says so.

What is approved is what is shown: the digest that was drawn is handed over with the approval, and
the pipeline refuses any other content. Editing makes another proposal with another digest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.timer import Timer
from textual.widgets import Button, TextArea
from textual.worker import Worker, WorkerState, get_current_worker

from synth_agent.errors import SynthAgentError
from synth_agent.runs import Cost, Limits, Proposal
from synth_agent.ui.backend import Backend
from synth_agent.ui.messages import (
    AlternativesFound,
    EditChecked,
    Failed,
    ProposalReady,
    ProposalRejected,
    RecipesListed,
    RunLaunched,
)
from synth_agent.ui.screens.alternatives import AlternativesScreen
from synth_agent.ui.screens.base import NotebookScreen
from synth_agent.ui.screens.choose_recipe import ChooseRecipeScreen
from synth_agent.ui.screens.limits import LimitsScreen
from synth_agent.ui.screens.reason import ReasonScreen
from synth_agent.ui.talk import problem_words
from synth_agent.ui.text import clean, fit
from synth_agent.ui.widgets.drawing import Drawing
from synth_agent.ui.widgets.predictions import predictions_content
from synth_agent.ui.widgets.recipe_diff import difference_content
from synth_agent.wording import duration

if TYPE_CHECKING:
    from synth_agent.effective import Effective
    from synth_agent.recipes import DiffLine

_CHECK_DELAY_SECONDS = 0.25
_SHOWN_DIGITS = 16
_DECISIONS = ("approve", "edit", "reject", "limit", "alternatives", "other")
QUIET_SECONDS = 1.0
"""Pause in typing after which a key on a screen that opened by itself is meant for it."""


class ProposalScreen(NotebookScreen):
    """Show one proposal and take the decision on it."""

    PLACE = "home"
    BINDINGS = [
        Binding("a", "approve", "Approve", id="proposal.approve"),
        Binding("e", "edit", "Edit", id="proposal.edit"),
        Binding("r", "reject", "Reject", id="proposal.reject"),
        Binding("l", "limit", "Part", id="proposal.limit"),
        Binding("n", "alternatives", "Others", id="proposal.alternatives"),
        Binding("o", "other", "Recipe", show=False, id="proposal.other"),
        Binding("escape", "leave", "Back", id="proposal.back"),
    ]

    def __init__(self, backend: Backend, proposal: Proposal, *, is_asked_for: bool = True) -> None:
        super().__init__(backend)
        self._proposal = proposal
        self._last_key = -QUIET_SECONDS if is_asked_for else monotonic()
        self._is_asked_for = is_asked_for
        self._shown_sha256: str | None = None
        """Digest of what is drawn; None while nothing, or something unchecked, is."""
        self._checking: Timer | None = None
        self._is_deciding = False
        self.is_over = False
        """Whether the decision was carried out: there is nothing left to do here."""

    def compose_body(self) -> ComposeResult:
        with Horizontal(id="gate"):
            with VerticalScroll(id="gate-facts"), Horizontal(classes="columns"):
                with Vertical(classes="wide-column"):
                    yield Drawing(id="proposal-card", classes="panel")
                    yield Drawing(id="proposal-predictions", classes="panel")
                    yield Drawing(id="recipe-difference", classes="panel")
                with Vertical(classes="narrow-column"):
                    yield Drawing(id="proposal-settings", classes="panel")
            yield TextArea(
                "", language=None, id="recipe-editor", show_line_numbers=True, tab_behavior="focus"
            )
        yield Drawing(id="proposal-status")
        with Horizontal(id="decisions"):
            yield Button("Approve and run  a", id="approve", variant="success", compact=True)
            yield Button("Part  l", id="limit", compact=True)
            yield Button("Edit  e", id="edit", compact=True)
            yield Button("Reject  r", id="reject", compact=True)
            yield Button("Others  n", id="alternatives", compact=True)
            yield Button("Recipe  o", id="other", compact=True)

    def on_mount(self) -> None:
        self.query_one("#proposal-card").border_title = "Proposal"
        self.query_one("#proposal-predictions").border_title = "Predictions"
        self.query_one("#proposal-predictions").display = False
        self.query_one("#recipe-difference").border_title = "Recipe"
        self.query_one("#proposal-settings").border_title = "Settings that will run"
        self.query_one("#recipe-editor").border_title = "Recipe, as it would run"
        self.query_one("#gate-facts").focus()
        self._prepare(self._proposal)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Show the keys of the gate as idle while a decision is carried out."""
        return None if self._is_deciding and action in _DECISIONS else True

    def _set_deciding(self, is_deciding: bool) -> None:
        self._is_deciding = is_deciding
        self.refresh_bindings()

    @work(thread=True, exclusive=True, exit_on_error=False, group="proposal")
    def _prepare(self, proposal: Proposal) -> None:
        self._report(proposal)

    def _report(self, proposal: Proposal) -> None:
        """Gather what the screen shows of a proposal. Called in a thread."""
        problem = ""
        try:
            self.backend.validate(proposal)
        except SynthAgentError as error:
            problem = problem_words(error)
        text = self.backend.recipe_text(proposal)
        difference = self.backend.difference(proposal)
        expected = self._expected(proposal)
        # A check that was overtaken by another must not bring its proposal back.
        if not get_current_worker().is_cancelled:
            self.post_message(ProposalReady(proposal, difference, text, problem, expected))

    def _expected(self, proposal: Proposal) -> Effective | None:
        """Return what training would see; that it cannot be told keeps nobody from deciding."""
        try:
            return self.backend.expected_effective(proposal)
        except SynthAgentError:
            return None

    @on(ProposalReady)
    def _show_ready(self, message: ProposalReady) -> None:
        with self.prevent(TextArea.Changed):
            self.query_one(TextArea).load_text(message.text)
        self._show_proposal(message.proposal, message.difference, message.expected)
        if message.problem:
            self._refuse(message.problem)

    def _refuse(self, problem: str) -> None:
        """Say why what is shown cannot run; it cannot be approved."""
        self._shown_sha256 = None
        self.query_one("#approve", Button).disabled = True
        self._say(Content.assemble(("✗ cannot run  ", "bold $error"), clean(problem)))

    def _show_proposal(
        self, proposal: Proposal, difference: list[DiffLine], expected: Effective | None
    ) -> None:
        self._proposal = proposal
        self._shown_sha256 = proposal.sha256
        self.query_one("#approve", Button).disabled = False
        against = f"against {clean(proposal.parent)}" if proposal.parent else "complete"
        self.query_one("#recipe-difference").border_title = Content(f"Recipe, {against}")
        changes = difference_content(difference)
        self.query_one("#proposal-card", Drawing).show(
            lambda width, height: card_content(proposal, width, expected)
        )
        predictions = self.query_one("#proposal-predictions", Drawing)
        predictions.display = bool(proposal.predictions)
        against_run = clean(proposal.parent) if proposal.parent else "the baseline"
        predictions.border_title = Content(f"Predictions, points against {against_run}")
        predictions.show(lambda width, height: predictions_content(proposal.predictions, width))
        self.query_one("#recipe-difference", Drawing).show(lambda width, height: changes)
        self.query_one("#proposal-settings", Drawing).show(
            lambda width, height: settings_content(proposal.settings, width)
        )
        self._say(
            Content.assemble(
                ("✓ checked  ", "$success"),
                ("sha256 ", "$foreground-muted"),
                proposal.sha256[:_SHOWN_DIGITS],
            )
        )

    def _say(self, words: Content) -> None:
        self.query_one("#proposal-status", Drawing).show(lambda width, height: words)

    def action_edit(self) -> None:
        self.add_class("-editing")
        self.query_one(TextArea).focus()

    async def action_leave(self) -> None:
        if self._is_deciding:
            # Who has left would not be told if it fails.
            self.notify("The decision is being carried out. Wait for it.", markup=False)
            return
        if self.has_class("-editing"):
            self.remove_class("-editing")
            self.query_one("#gate-facts").focus()
            if self._shown_sha256 is None:
                self._prepare(self._proposal)
            return
        self.dismiss()

    @on(TextArea.Changed)
    def _check_later(self) -> None:
        self._shown_sha256 = None
        self._say(Content.styled("… checking the edited recipe", "$foreground-muted"))
        if self._checking is not None:
            self._checking.stop()
        self._checking = self.set_timer(_CHECK_DELAY_SECONDS, self._check_now)

    def _check_now(self) -> None:
        self._check(self._proposal, self.query_one(TextArea).text)

    @work(thread=True, exclusive=True, exit_on_error=False, group="proposal")
    def _check(self, original: Proposal, text: str) -> None:
        try:
            proposal = self.backend.edited(original, text)
            difference = self.backend.difference(proposal)
        except SynthAgentError as error:
            self.post_message(EditChecked(text, None, [], problem_words(error)))
        else:
            expected = self._expected(proposal)
            self.post_message(EditChecked(text, proposal, difference, "", expected))

    @on(EditChecked)
    def _show_checked(self, message: EditChecked) -> None:
        if message.text != self.query_one(TextArea).text:
            return
        if message.proposal is None:
            self._refuse(message.problem)
        else:
            self._show_proposal(message.proposal, message.difference, message.expected)

    def on_key(self, event: events.Key) -> None:
        if event.key != "a":
            self._last_key = monotonic()

    def action_approve(self) -> None:
        if self._is_deciding:
            return
        if not self._is_asked_for and not self._was_quiet():
            words = "The proposal has just opened. Look at it, then press a again."
            self.notify(words, severity="warning", markup=False)
            return
        if self._shown_sha256 is None:
            self.notify("Only what was checked and can run can be approved.", severity="warning")
            return
        self._set_deciding(True)
        self._say(Content.styled("… approving and starting the run", "$foreground-muted"))
        self._approve(self._proposal, self._shown_sha256)

    def _was_quiet(self) -> bool:
        """Tell whether typing that was meant for another screen is over."""
        before, self._last_key = self._last_key, monotonic()
        return self._last_key - before >= QUIET_SECONDS

    @work(thread=True, exit_on_error=False, group="decision")
    def _approve(self, proposal: Proposal, shown_sha256: str) -> None:
        plan = self.backend.approve(proposal, shown_sha256)
        self.backend.launch(plan)
        self.post_message(RunLaunched(plan.run_id))

    @on(RunLaunched)
    @on(ProposalRejected)
    def _end(self) -> None:
        self.is_over = True

    def on_screen_resume(self) -> None:
        """Close a gate that was decided while another place was shown."""
        if self.is_over:
            self.dismiss()

    def action_reject(self) -> None:
        title = clean(self._proposal.title)
        self.app.push_screen(ReasonScreen(title), self._reject_for)

    def _reject_for(self, reason: str | None) -> None:
        if reason is not None and not self._is_deciding:
            self._set_deciding(True)
            self._reject(self._proposal, reason)

    @work(thread=True, exit_on_error=False, group="decision")
    def _reject(self, proposal: Proposal, reason: str) -> None:
        self.post_message(ProposalRejected(self.backend.reject(proposal, reason)))

    def action_limit(self) -> None:
        if self._shown_sha256 is None:
            self.notify("Only what was checked and can run has a part.", severity="warning")
            return
        self.app.push_screen(LimitsScreen(self._proposal), self._take_limits)

    def _take_limits(self, limits: Limits | None) -> None:
        if limits is not None and limits != self._proposal.limits:
            self._wait("… checking the part")
            self._limit(self._proposal, limits)

    @work(thread=True, exclusive=True, exit_on_error=False, group="proposal")
    def _limit(self, proposal: Proposal, limits: Limits) -> None:
        try:
            limited = self.backend.limited(proposal, limits)
        except SynthAgentError as error:
            self.post_message(Failed(error))
            limited = proposal
        self._report(limited)

    def action_alternatives(self) -> None:
        self._say(Content.styled("… asking the planner for alternatives", "$foreground-muted"))
        self._find_alternatives(self._proposal)

    @work(thread=True, exclusive=True, exit_on_error=False, group="alternatives")
    def _find_alternatives(self, proposal: Proposal) -> None:
        self.post_message(AlternativesFound(self.backend.alternatives(proposal)))

    @on(AlternativesFound)
    def _compare_alternatives(self, message: AlternativesFound) -> None:
        if self._is_deciding:
            return
        self._prepare(self._proposal)
        if len(message.proposals) < 2:
            self.notify("There is nothing else to try.", markup=False)
        elif self.is_current:
            self.app.push_screen(AlternativesScreen(message.proposals), self._take_alternative)

    def _take_alternative(self, proposal: Proposal | None) -> None:
        if proposal is not None:
            self._wait("… reading the proposal")
            self._prepare(proposal)

    def _wait(self, words: str) -> None:
        """Take what is shown off the table until the next is."""
        self._shown_sha256 = None
        self._say(Content.styled(words, "$foreground-muted"))

    @work(thread=True, exclusive=True, exit_on_error=False, group="recipes")
    def action_other(self) -> None:
        self.post_message(RecipesListed(self.backend.recipes()))

    @on(RecipesListed)
    def _offer(self, message: RecipesListed) -> None:
        # Whoever has gone elsewhere meanwhile does not want a dialog over that.
        if self.is_current and not self._is_deciding:
            self.app.push_screen(ChooseRecipeScreen(message.recipes), self._take)

    def _take(self, name: str | None) -> None:
        if name is not None:
            self._wait("… reading the recipe")
            self._prepare_recipe(name)

    @work(thread=True, exclusive=True, exit_on_error=False, group="proposal")
    def _prepare_recipe(self, name: str) -> None:
        self._report(self.backend.proposal_of(name))

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        if event.state == WorkerState.ERROR and event.worker.group == "decision":
            self._set_deciding(False)

    @on(Failed)
    def _recover(self) -> None:
        if self._shown_sha256 is not None:
            self._say(Content.styled("✗ not decided: see the error", "$error"))

    @on(Button.Pressed)
    async def _press(self, event: Button.Pressed) -> None:
        event.stop()
        await self.run_action(str(event.button.id))


def card_content(proposal: Proposal, width: int, expected: Effective | None = None) -> Content:
    """Return title, kind, reason, hypothesis, evidence, cost and digest of a proposal."""
    facts = [
        ("Only", proposal.limits.words()),
        ("Why", clean(proposal.reason)),
        ("Supposed", clean(proposal.hypothesis)),
        ("Refuted", clean(proposal.refuted_by)),
        ("Evidence", ", ".join(clean(e) for e in proposal.evidence) or "none"),
        ("Samples", samples_words(proposal.cost)),
        ("Training", training_words(expected)),
        ("Time", duration(proposal.cost.seconds)),
        ("Basis", clean(proposal.cost.basis)),
        ("Beside", ", ".join(sha256[:_SHOWN_DIGITS] for sha256 in proposal.alternatives)),
        ("From", clean(proposal.proposed_by)),
    ]
    facts = [(name, text) for name, text in facts if text]
    head = Content.assemble(
        (clean(proposal.title), "bold"),
        (f"  {proposal.kind}, recipe {clean(proposal.recipe['name'])}", "$foreground-muted"),
    )
    return Content("\n").join(
        [head, Content(""), *_fact_lines(facts, width), *_digest_lines(proposal.sha256, width)]
    )


def _digest_lines(sha256: str, width: int) -> Iterator[Content]:
    """Yield a digest in full, nearer to its name than other facts so that it fits in 73 cells."""
    label = fit("sha256", 10 if width >= 10 + len(sha256) else 8)
    for number, line in enumerate(Content(sha256).wrap(max(10, width - len(label)))):
        name = label if number == 0 else " " * len(label)
        yield Content.assemble((name, "$foreground-muted"), line)


def training_words(expected: Effective | None) -> str:
    """Return how many distinct samples the first stage would see, how often, in how many steps."""
    if expected is None:
        return ""
    return (
        f"{expected.steps:,} steps of the first stage see {expected.unique:,} distinct samples "
        f"{expected.mean_passes:.1f} times on average"
    )


def samples_words(cost: Cost) -> str:
    """Return the expected samples, with the share of the seed set."""
    if cost.expected_samples is None:
        return f"unknown, of {cost.seed_samples:,} seed samples"
    if not cost.seed_samples:
        return f"{cost.expected_samples:,}"
    share = 100 * cost.expected_samples / cost.seed_samples
    return f"about {cost.expected_samples:,} of {cost.seed_samples:,} ({share:.0f} %)"


def _fact_lines(facts: list[tuple[str, str]], width: int) -> Iterator[Content]:
    """Yield `name  text` with the text wrapped beside the name."""
    indent = 10
    for name, text in facts:
        wrapped = Content(text).wrap(max(10, width - indent))
        for count, line in enumerate(wrapped):
            label = fit(name if count == 0 else "", indent)
            yield Content.assemble((label, "$foreground-muted"), line)


def settings_content(settings: Mapping[str, Any], width: int) -> Content:
    """Return every setting under its section's name."""
    lines: list[Content] = []
    for section, values in settings.items():
        if not isinstance(values, Mapping):
            lines.append(Content.assemble((fit(clean(section), 28), "bold"), clean(values)))
            continue
        lines.append(Content.styled(clean(section), "bold"))
        for key, value in flatten(values):
            lines += _setting_lines(clean(key), clean(value), width)
    return Content("\n").join(lines)


def _setting_lines(key: str, value: str, width: int) -> Iterator[Content]:
    """Yield one setting; a value without room beside its key goes below it."""
    key_width = 26
    if len(key) >= key_width or len(value) > width - key_width - 2:
        yield Content.styled(f"  {key}", "$foreground-muted")
        for line in Content(value).wrap(max(10, width - 4)):
            yield Content.assemble("    ", line)
    else:
        yield Content.assemble((f"  {fit(key, key_width)}", "$foreground-muted"), value)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested settings with dotted keys."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "–" if value is None else str(value)
