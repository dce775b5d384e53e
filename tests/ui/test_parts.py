"""Parts and alternatives at the gate, standing rules, predictions and the words of a comparison."""

from __future__ import annotations

from dataclasses import replace

import pytest
from textual.widgets import Button, Input

from synth_agent import rules
from synth_agent.runs import Comparison, Limits, Prediction, Proposal
from synth_agent.ui.backend import Notebook, calibration_words
from synth_agent.ui.screens.alternatives import AlternativesScreen
from synth_agent.ui.screens.confirm import ConfirmScreen
from synth_agent.ui.screens.limits import LimitsScreen, Mark, hours_limit, samples_limit
from synth_agent.ui.screens.proposal import ProposalScreen
from synth_agent.ui.widgets.predictions import predictions_content
from synth_agent.ui.widgets.scoreboard import difference_block, difference_line
from synth_agent.workspace import Workspace
from tests.ui.conftest import Open, seen, settle
from tests.ui.folder_backend import FolderBackend


class Choosing(FolderBackend):
    """Has two proposals besides the one that is looked at."""

    def alternatives(self, proposal: Proposal) -> tuple[Proposal, ...]:
        others = [self.proposal_of(name) for name in ("similarity", "baseline")]
        found = [proposal, *others]
        names = [replace(one, alternatives=()).sha256 for one in found]
        return tuple(
            replace(one, alternatives=tuple(name for name in names if name != mine))
            for one, mine in zip(found, names, strict=True)
        )


async def test_a_part_is_shown_with_its_own_digest_before_it_can_be_approved(
    backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend, (160, 60)) as pilot:
        await settle(pilot)
        await pilot.press("p")
        await settle(pilot)
        before = seen(pilot)
        await pilot.press("l")
        await settle(pilot)
        form = pilot.app.screen
        assert isinstance(form, LimitsScreen)
        await pilot.press("a", "enter")
        await settle(pilot)
        assert "a whole number from 1" in seen(pilot)
        assert backend.launched == []
        form.query_one("#limit-samples", Input).value = "100"
        form.query_one("#limit-hours", Input).value = "0.5"
        form.query_one(Mark).value = True
        await pilot.press("enter")
        await settle(pilot)
        assert isinstance(pilot.app.screen, ProposalScreen)
        assert not isinstance(pilot.app.focused, Button)
        text = seen(pilot)
        assert "data only, no training, at most 100 samples, at most 0.5 GPU-hours" in text
        assert backend.launched == []
        await pilot.press("a")
        await settle(pilot)
        (plan,) = backend.launched
        assert plan.proposal.limits == Limits(True, 100, 0.5)
        assert plan.proposal.settings["data"]["sample_cap"] == 100
        assert plan.sha256[:16] in text
        assert plan.sha256[:16] not in before


async def test_a_limit_cannot_be_widened_and_the_part_stays(
    backend: FolderBackend, open_app: Open
) -> None:
    part = backend.limited(backend.proposal_of("words"), Limits(samples=50))
    async with open_app(backend, (120, 60)) as pilot:
        await settle(pilot)
        await pilot.app.push_screen(ProposalScreen(backend, part))
        await settle(pilot)
        await pilot.press("l")
        await settle(pilot)
        pilot.app.screen.query_one("#limit-samples", Input).value = "60"
        await pilot.press("enter")
        await settle(pilot)
        assert "Limit cannot be widened" in seen(pilot)
        await pilot.press("escape")
        await settle(pilot)
        assert "at most 50 samples" in seen(pilot)
        assert part.sha256[:16] in seen(pilot)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "٣", "9" * 5000])
def test_numbers_of_samples_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        samples_limit(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "long"])
def test_hours_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="above 0"):
        hours_limit(text)


def test_limits_are_read() -> None:
    assert (samples_limit(" 1,000 "), samples_limit("")) == (1000, None)
    assert (hours_limit(" 1.5 "), hours_limit(" ")) == (1.5, None)


@pytest.mark.parametrize("size", [(80, 24), (160, 48)])
async def test_an_alternative_is_opened_with_the_others_recorded(
    workspace: Workspace, open_app: Open, size: tuple[int, int]
) -> None:
    backend = Choosing(workspace)
    async with open_app(backend, size) as pilot:
        await settle(pilot)
        await pilot.press("p")
        await settle(pilot)
        await pilot.press("n")
        await settle(pilot)
        screen = pilot.app.screen
        assert isinstance(screen, AlternativesScreen)
        columns = {screen.query_one(f"#alternative-{n}").region.x for n in range(3)}
        assert len(columns) == (1 if size[0] < 120 else 3)
        for button in screen.query(Button):
            assert button.region.bottom <= size[1]
        await pilot.press("enter")
        await settle(pilot)
        assert screen is pilot.app.screen
        await pilot.press("2")
        await settle(pilot)
        assert backend.launched == []
        await pilot.press("a")
        await settle(pilot)
        (plan,) = backend.launched
        assert plan.proposal.slug == "similarity"
        assert backend.proposal_of("words").sha256 in plan.proposal.alternatives
        assert len(plan.proposal.alternatives) == 2


@pytest.mark.parametrize("size", [(80, 24), (160, 48)])
async def test_rules_are_listed_and_revoked_by_a_person(
    workspace: Workspace, open_app: Open, size: tuple[int, int]
) -> None:
    backend = FolderBackend(workspace)
    rules.add(workspace, kind="filters", gpu_hours=6, max_runs=4, by="ada")
    async with open_app(backend, size) as pilot:
        await settle(pilot)
        await pilot.press("r")
        await settle(pilot)
        text = seen(pilot)
        assert "1 of 1 rules stand." in text
        assert "r1 filters" in text
        assert "0 of 4" in text
        assert "0 of 6" in text
        await pilot.press("x")
        await settle(pilot)
        assert isinstance(pilot.app.screen, ConfirmScreen)
        await pilot.press("enter")
        await settle(pilot)
        assert not rules.standing(workspace)[0].problem
        await pilot.press("x", "y")
        await settle(pilot)
        assert "0 of 1 rules stand." in seen(pilot)
        assert "revoked by" in rules.standing(workspace)[0].problem


async def test_without_rules_every_run_waits_for_a_person(
    backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend, (80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("r")
        await settle(pilot)
        assert "No standing rules: every run waits for a person." in seen(pilot)
        await pilot.press("x", "escape")
        await settle(pilot)


def test_predictions_stand_on_one_scale_with_zero_marked() -> None:
    lines = predictions_content(
        [
            Prediction("textvqa", 2.0, 1.0, 3.0, "a model"),
            Prediction("textvqa", 0.5, -3.0, 4.0, "built-in model"),
            Prediction("mmbench", -2.0, -3.0, -1.0, "a model"),
        ],
        80,
    ).plain.split("\n")
    assert lines[0] == "TextVQA  they differ: a gain, a gain, not surely"
    zero = lines[2].index("┼")
    assert lines[1][zero] == lines[4][zero] == "┊"
    assert lines[3] == "MMBench  a loss"
    assert "+2.0 [+1.0, +3.0]" in lines[1]
    assert all(len(line) <= 80 for line in lines)


def test_predictions_without_room_are_numbers() -> None:
    text = predictions_content([Prediction("textvqa", 2.0, 1.0, 3.0, "[b]x")], 38).plain
    assert "[b]x" in text
    assert "+2.0 [+1.0, +3.0]" in text


JUDGED = Comparison(
    "textvqa", "0001-baseline", 3.1, -1.0, 7.2, 500, "inside noise", expected=1.2, tries=3, seeds=1,
    parent_seeds=2, question_sd=1.1, seed_sd=9.4, assumed=True, basis="three tries, a known spread",
)  # fmt: skip


def test_a_judged_difference_says_what_to_expect_and_what_it_rests_on() -> None:
    text = difference_block(JUDGED, 60).plain
    assert "Claimed +3.1, expect +1.2: three tries, a known spread." in text
    line = difference_line(JUDGED, 160).plain
    assert "expect +1.2, seeds 1:2, seed spread 9.4 assumed, try 3, 500 questions" in line


def test_an_older_difference_says_only_what_is_known_of_it() -> None:
    old = Comparison("textvqa", "0001-baseline", 3.1, -1.0, 7.2, 500, "better")
    assert difference_block(old, 120).plain.count("\n") == 0
    assert "95 % paired interval" in difference_line(old, 120).plain


async def test_calibration_is_said_once_there_are_enough_runs(
    workspace: Workspace, open_app: Open
) -> None:
    run = FolderBackend(workspace).notebook().runs[1]
    prediction = Prediction("textvqa", 20.0, 10.0, 30.0, "built-in model")
    guessed = replace(run.plan.proposal, predictions=(prediction,))
    runs = tuple(
        replace(run, id=f"{n:04}-guessed", plan=replace(run.plan, proposal=guessed))
        for n in range(10)
    )
    assert calibration_words(runs[:9]) == ()
    (words,) = calibration_words(runs)
    assert "10 of 10 intervals held" in words

    class Calibrated(FolderBackend):
        def notebook(self) -> Notebook:
            return replace(super().notebook(), calibration=(words,))

    async with open_app(Calibrated(workspace), (160, 48)) as pilot:
        await settle(pilot)
        await pilot.press("4")
        await settle(pilot)
        assert "Predictions of built-in model: 10 of 10 intervals held" in seen(pilot)
