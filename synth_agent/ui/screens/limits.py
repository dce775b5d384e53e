"""Which part of a proposal may run. The answer makes another proposal, which is shown again."""

from __future__ import annotations

import math

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Checkbox, Input, Static

from synth_agent.runs import Limits, Proposal

_DIGITS = 20
"""Digits that no number of samples has; Python reads no number of more than 4,300."""


class Mark(Checkbox):
    """A checkbox that is empty when it is off, so that its colour does not stand alone."""

    BUTTON_INNER = " "

    def watch_value(self) -> None:
        self.BUTTON_INNER = "X" if self.value else " "
        super().watch_value()


class LimitsScreen(ModalScreen[Limits | None]):
    """Ask for limits; None when the user goes back. It approves nothing."""

    BINDINGS = [Binding("escape", "dismiss(None)", "Back", id="limits.back")]

    def __init__(self, proposal: Proposal) -> None:
        super().__init__()
        self._limits = proposal.limits

    def compose(self) -> ComposeResult:
        before = self._limits
        with Vertical(classes="dialog"):
            yield Static(Content.styled("Approve a part", "bold"))
            yield Mark("Data only, no training", before.data_only, id="data-only", compact=True)
            with Horizontal(classes="field"):
                yield Static("Samples, at most", classes="field-name")
                samples = "" if before.samples is None else str(before.samples)
                yield Input(samples, placeholder="all", id="limit-samples", compact=True)
            with Horizontal(classes="field"):
                yield Static("GPU-hours, at most", classes="field-name")
                hours = "" if before.gpu_hours is None else f"{before.gpu_hours:g}"
                yield Input(hours, placeholder="no limit", id="limit-hours", compact=True)
            words = "The part has a sha256 of its own. It is shown before it can be approved."
            yield Static(Content.styled(words, "$foreground-muted"), id="limits-words")
            with Horizontal(classes="dialog-buttons"):
                yield Button(" Back  esc ", id="back")
                yield Button(" Show the part  enter ", id="show", variant="primary")

    def on_mount(self) -> None:
        self.query_one("#limit-samples").focus()

    @on(Input.Submitted)
    def _submit(self) -> None:
        try:
            self.dismiss(
                Limits(
                    data_only=self.query_one(Checkbox).value,
                    samples=samples_limit(self.query_one("#limit-samples", Input).value),
                    gpu_hours=hours_limit(self.query_one("#limit-hours", Input).value),
                )
            )
        except ValueError as error:
            self.query_one("#limits-words", Static).update(Content.styled(str(error), "$error"))

    @on(Button.Pressed)
    def _press(self, event: Button.Pressed) -> None:
        event.stop()
        if event.button.id == "show":
            self._submit()
        else:
            self.dismiss(None)


def samples_limit(text: str) -> int | None:
    """Return a number of samples, None for an empty text.

    Raises:
        ValueError: Saying what a valid text is.
    """
    plain = text.strip().replace(",", "").replace("_", "")
    if not plain:
        return None
    number = int(plain) if plain.isascii() and plain.isdigit() and len(plain) < _DIGITS else 0
    if number < 1:
        raise ValueError("Samples: a whole number from 1, or nothing for all.")
    return number


def hours_limit(text: str) -> float | None:
    """Return a number of GPU-hours, None for an empty text.

    Raises:
        ValueError: Saying what a valid text is.
    """
    if not text.strip():
        return None
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not math.isfinite(hours) or hours <= 0:
        raise ValueError("GPU-hours: a number above 0, such as 0.5, or nothing for no limit.")
    return hours
