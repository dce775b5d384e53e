"""The app by its keys: what a person presses, what is then on the screen and on the disk."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from textual.pilot import Pilot
from textual.widgets import Button, Input, TextArea

from synth_agent.errors import Busy
from synth_agent.runs import Plan, Proposal, load_plan
from synth_agent.ui.app import SynthAgentApp
from synth_agent.ui.messages import Failed
from synth_agent.ui.screens.error import ErrorScreen
from synth_agent.ui.screens.home import HomeScreen
from synth_agent.ui.screens.proposal import ProposalScreen
from synth_agent.ui.widgets.navigation import Place
from synth_agent.workspace import Workspace
from tests.ui.conftest import Open, seen, settle
from tests.ui.folder_backend import FolderBackend
from tests.ui.notebook import Writer, finished_run, proposal_for

PLACES = ("1", "2", "3", "4")


@contextmanager
def held(backend: FolderBackend, run_id: str) -> Iterator[None]:
    """Make a run the live one for a while."""
    backend.live = run_id
    yield
    backend.live = None


def live_run(workspace: Workspace) -> Writer:
    """Write a run that is in the middle of pretraining."""
    run = Writer(workspace, 3, proposal_for(workspace, "words", "0001-baseline"))
    run.start()
    run.stage("process", {"kept": 204, "seed_samples": 300})
    run.event("stage_started", stage="pretrain", key="k", pid=1, pid_started=0.0, command=[])
    run.losses("pretrain", 24, 40)
    run.log("pretrain", "\x1b[31mstep 24\x1b[0m [bold]loss 1.0[/bold]\n")
    return run


async def test_an_empty_notebook_says_what_to_do_first(
    empty: FolderBackend, open_app: Open
) -> None:
    async with open_app(empty) as pilot:
        await settle(pilot)
        text = seen(pilot)
        assert "No score yet. The baseline comes first" in text
        assert "Measure the baseline" in text
        assert "Nothing is running." in text
        for key, words in (("2", "No run yet."), ("3", "No score yet."), ("4", "No runs yet.")):
            await pilot.press(key)
            await settle(pilot)
            assert words in seen(pilot)


async def test_keys_that_would_do_nothing_are_not_offered(
    empty: FolderBackend, open_app: Open
) -> None:
    async with open_app(empty) as pilot:
        await settle(pilot)
        for place, idle in (("2", "Other stage"), ("3", "Filter"), ("4", "Mark")):
            await pilot.press(place)
            await settle(pilot)
            assert idle not in seen(pilot)
        finished_run(empty._workspace, 1, "baseline", None, (20, 14), "baseline")  # noqa: SLF001
        for place, key in (("2", "Other stage"), ("3", "Filter"), ("4", "Mark")):
            await pilot.press(place)
            await until(pilot, key)


async def test_home_is_scrolled_by_keys_when_there_is_nothing_to_do(
    backend: FolderBackend, open_app: Open
) -> None:
    backend.next_proposal = lambda: None  # type: ignore[method-assign]
    async with open_app(backend, (80, 24)) as pilot:
        await settle(pilot)
        assert "Every recipe was tried or rejected." in seen(pilot)
        assert "Last events" not in seen(pilot)
        await pilot.press("end")
        await until(pilot, "Last events")


async def test_home_shows_the_best_against_the_baseline(
    backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend) as pilot:
        await settle(pilot)
        text = seen(pilot)
    assert "40.0 [34.0, 46.0]" in text
    assert "58.0 [52.0, 64.0]" in text
    assert "chance 25.0" in text
    assert "TextVQA +18.0 points [+13.0, +23.0] ▲ better" in text


async def test_the_gate_shows_what_would_run_and_enter_approves_nothing(
    backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend, (120, 60)) as pilot:
        await settle(pilot)
        await pilot.press("p")
        await settle(pilot)
        screen = pilot.app.screen
        assert isinstance(screen, ProposalScreen)
        assert not isinstance(pilot.app.focused, Button)
        text = seen(pilot)
        assert "words_num_filter" in text
        assert "+" in text
        assert "global_batch_size" in text
        await pilot.press("enter", "space")
        await settle(pilot)
        assert backend.launched == []
        assert len(list(backend.root.glob("runs/*/plan.yaml"))) == 2


async def test_approving_runs_exactly_what_was_shown(
    backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend, (120, 60)) as pilot:
        await settle(pilot)
        await pilot.press("p")
        await settle(pilot)
        shown = seen(pilot)
        await pilot.press("a")
        await settle(pilot)
        (plan,) = backend.launched
        assert plan.sha256[:16] in shown
        assert load_plan(backend.root / "runs" / plan.run_id / "plan.yaml") == plan
        assert pilot.app.current_mode == "run"
        assert plan.run_id in seen(pilot)


async def test_a_mouse_click_approves_too(backend: FolderBackend, open_app: Open) -> None:
    async with open_app(backend, (120, 60)) as pilot:
        await settle(pilot)
        await pilot.press("p")
        await settle(pilot)
        await pilot.click("#approve")
        await settle(pilot)
        assert len(backend.launched) == 1


async def edit(pilot, old: str, new: str) -> None:  # type: ignore[no-untyped-def]
    """Replace text in the recipe editor and wait until it was checked."""
    editor = pilot.app.screen.query_one(TextArea)
    assert old in editor.text
    editor.text = editor.text.replace(old, new)
    await pilot.pause(0.4)
    await settle(pilot)


async def test_an_edit_gets_its_own_digest_and_only_that_runs(
    backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend, (120, 60)) as pilot:
        await settle(pilot)
        await pilot.press("p")
        await settle(pilot)
        before = seen(pilot)
        await pilot.press("e")
        await edit(pilot, "min_num: 5", "min_num: 7")
        await pilot.press("escape")
        await settle(pilot)
        after = seen(pilot)
        await pilot.press("a")
        await settle(pilot)
        (plan,) = backend.launched
        assert plan.sha256[:16] in after
        assert plan.sha256[:16] not in before
        assert "'min_num': 7" in str(plan.proposal.recipe)
        assert "editing" in plan.proposal.proposed_by


async def test_an_invalid_edit_says_why_and_cannot_be_approved(
    backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend, (120, 60)) as pilot:
        await settle(pilot)
        await pilot.press("p")
        await settle(pilot)
        await pilot.press("e")
        await edit(pilot, "words_num_filter", "words_numb_filter")
        assert "cannot run" in seen(pilot)
        assert "words_num_filter" in seen(pilot)
        await pilot.click("#approve")
        await settle(pilot)
        assert backend.launched == []
        assert len(list(backend.root.glob("runs/*/plan.yaml"))) == 2


async def test_leaving_the_editor_with_an_invalid_text_returns_to_the_last_valid_one(
    backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend, (120, 60)) as pilot:
        await settle(pilot)
        await pilot.press("p")
        await settle(pilot)
        await pilot.press("e")
        await edit(pilot, "process:", "proces:")
        await pilot.press("escape")
        await settle(pilot)
        assert "✓ checked" in seen(pilot)
        assert "process:" in pilot.app.screen.query_one(TextArea).text
        await pilot.press("escape")
        await settle(pilot)
        assert isinstance(pilot.app.screen, HomeScreen)


async def test_a_rejection_needs_a_reason_and_is_kept(
    backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend, (140, 40)) as pilot:
        await settle(pilot)
        await pilot.press("p")
        await settle(pilot)
        await pilot.press("r", "enter")
        await settle(pilot)
        assert "A reason is needed" in seen(pilot)
        pilot.app.screen.query_one(Input).value = "too [few] samples"
        await pilot.press("enter")
        await settle(pilot)
        assert isinstance(pilot.app.screen, HomeScreen)
        (rejection,) = backend.notebook().rejections
        assert rejection.reason == "too [few] samples"
        await pilot.press("4")
        await settle(pilot)
        assert "rejected" in seen(pilot)
        await pilot.press("down", "down")
        await settle(pilot)
        assert "too [few] samples" in seen(pilot)


async def test_another_recipe_can_be_chosen(backend: FolderBackend, open_app: Open) -> None:
    async with open_app(backend, (120, 60)) as pilot:
        await settle(pilot)
        await pilot.press("p")
        await settle(pilot)
        await pilot.press("o")
        await settle(pilot)
        names = [recipe.name for recipe in backend.recipes()]
        await pilot.press(*["down"] * names.index("similarity"), "enter")
        await settle(pilot)
        assert "recipe similarity" in seen(pilot)


async def test_a_live_run_is_found_and_followed(
    workspace: Workspace, backend: FolderBackend, open_app: Open
) -> None:
    run = live_run(workspace)
    with held(backend, run.id):
        async with open_app(backend) as pilot:
            await settle(pilot)
            assert "A run is going." in seen(pilot)
            assert f"{run.id} running" in seen(pilot)
            await pilot.press("w")
            await settle(pilot)
            assert "60 % 24/40" in seen(pilot)
            assert "step 24 [bold]loss 1.0[/bold]" in seen(pilot)
            run.losses("pretrain", 30, 40)
            await pilot.pause(0.6)
            await settle(pilot)
            assert "75 % 30/40" in seen(pilot)


async def test_a_live_run_with_a_long_name_is_named_on_the_narrow_bar(
    workspace: Workspace, backend: FolderBackend, open_app: Open
) -> None:
    proposal = replace(proposal_for(workspace, "words", None), slug="words-and-all-that-jazz-twice")
    run = Writer(workspace, 3, proposal)
    run.start()
    with held(backend, run.id):
        async with open_app(backend, (80, 24)) as pilot:
            await settle(pilot)
            assert "6 Planner ▶ 0003-words-and-all-…" in seen(pilot)


async def test_a_stage_that_counts_nothing_yet_shows_no_number(
    workspace: Workspace, backend: FolderBackend, open_app: Open
) -> None:
    run = live_run(workspace)
    run.stage("pretrain")
    run.event("stage_started", stage="finetune", key="k", pid=1, pid_started=0.0, command=[])
    run.event("progress", stage="finetune", step=0, total=0, unit="step", label="loading weights")
    with held(backend, run.id):
        async with open_app(backend) as pilot:
            await settle(pilot)
            assert "loading weights" in seen(pilot)
            assert "0 loading" not in seen(pilot)


async def test_a_run_that_goes_live_takes_the_place_of_one_that_nobody_chose(
    workspace: Workspace, backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend) as pilot:
        await settle(pilot)
        await pilot.press("2")
        await settle(pilot)
        assert "Try the recipe similarity ✓ done" in seen(pilot)
        run = live_run(workspace)
        with held(backend, run.id):
            await until(pilot, f"{run.id} Try the recipe words ▶ running")


async def test_a_run_that_was_chosen_stays_when_another_goes_live(
    workspace: Workspace, backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend) as pilot:
        await settle(pilot)
        await pilot.press("3")
        await settle(pilot)
        await pilot.press("v")
        await settle(pilot)
        run = live_run(workspace)
        with held(backend, run.id):
            await until(pilot, f"{run.id} running")
            await settle(pilot)
            assert "Try the recipe similarity ✓ done" in seen(pilot)


async def test_a_live_run_is_followed_on_after_a_failure_to_read_it(
    workspace: Workspace, backend: FolderBackend, open_app: Open
) -> None:
    run = live_run(workspace)
    known = backend.live_run

    def unreadable() -> str | None:
        backend.live_run = known  # type: ignore[method-assign]
        raise OSError("stale file handle")

    with held(backend, run.id):
        async with open_app(backend) as pilot:
            await settle(pilot)
            await pilot.press("w")
            await settle(pilot)
            backend.live_run = unreadable  # type: ignore[method-assign]
            await until(pilot, "stale file handle")
            await pilot.press("escape")
            run.losses("pretrain", 30, 40)
            await until(pilot, "75 % 30/40")


async def test_a_run_without_its_worker_is_interrupted_and_r_resumes_it(
    workspace: Workspace, backend: FolderBackend, open_app: Open
) -> None:
    run = live_run(workspace)
    async with open_app(backend) as pilot:
        await settle(pilot)
        assert "was interrupted" in seen(pilot)
        await pilot.press("w")
        await settle(pilot)
        assert "‖ interrupted" in seen(pilot)
        await pilot.press("r")
        await settle(pilot)
        assert backend.resumed == [run.id]


async def test_a_worker_that_dies_shows_at_once(
    workspace: Workspace, backend: FolderBackend, open_app: Open
) -> None:
    run = live_run(workspace)
    async with open_app(backend) as pilot:
        with held(backend, run.id):
            await settle(pilot)
            await pilot.press("2")
            await settle(pilot)
            assert "▶ running" in seen(pilot)
        await pilot.pause(0.6)
        await settle(pilot)
        assert "‖ interrupted" in seen(pilot)


async def test_a_failed_run_says_what_to_do(
    workspace: Workspace, backend: FolderBackend, open_app: Open
) -> None:
    run = live_run(workspace)
    error = {"title": "Out of memory", "message": "needs 24 GiB", "hint": "halve the micro batch"}
    run.event(
        "stage_finished", stage="pretrain", key="k", status="failed", exit_code=1, seconds=3.0,
        output=None, result=None, error=error,
    )  # fmt: skip
    run.finish("failed", "failed", error)
    async with open_app(backend) as pilot:
        await settle(pilot)
        await pilot.press("2")
        await settle(pilot)
        text = seen(pilot)
        for words in ("✗ failed", "Out of memory", "needs 24 GiB", "halve the micro batch"):
            assert words in text


async def test_cancelling_asks_first_and_the_focus_is_on_no(
    workspace: Workspace, backend: FolderBackend, open_app: Open
) -> None:
    run = live_run(workspace)
    with held(backend, run.id):
        async with open_app(backend) as pilot:
            await settle(pilot)
            await pilot.press("2")
            await settle(pilot)
            await pilot.press("c")
            await settle(pilot)
            await pilot.press("enter")
            await settle(pilot)
            assert backend.cancelled == []
            await pilot.press("c")
            await settle(pilot)
            await pilot.press("y")
            await settle(pilot)
            assert backend.cancelled == [run.id]


async def test_quitting_says_that_the_run_goes_on(
    workspace: Workspace, backend: FolderBackend, open_app: Open
) -> None:
    run = live_run(workspace)
    with held(backend, run.id):
        async with open_app(backend) as pilot:
            await settle(pilot)
            await pilot.press("q")
            await pilot.pause()
            (message,) = pilot.app._exit_renderables  # noqa: SLF001
        assert str(message).startswith(f"{run.id} goes on without the app")
        assert backend.cancelled == []


async def test_results_list_questions_and_filter_them(
    backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend, (160, 48)) as pilot:
        await settle(pilot)
        await pilot.press("3")
        await settle(pilot)
        text = seen(pilot)
        assert "0002-similarity" in text
        assert "50 of 50" in text
        assert "[bold]not bold[/] red link" in text
        await pilot.press("f")
        await settle(pilot)
        assert "wrong, 21 of 50" in seen(pilot)
        await pilot.press("f")
        await settle(pilot)
        assert "right, 29 of 50" in seen(pilot)
        await pilot.press("f")
        await settle(pilot)
        assert "changed, 9 of 50" in seen(pilot)
        assert "✓▲" in seen(pilot)
        await pilot.press("b")
        await settle(pilot)
        assert "MMBench questions: changed, 8 of 40" in seen(pilot)


async def test_a_long_reason_is_read_to_its_end(backend: FolderBackend, open_app: Open) -> None:
    proposal = proposal_for(backend._workspace, "words", None)  # noqa: SLF001
    backend.reject(proposal, " ".join(["too few samples"] * 40) + ", says Ada")
    async with open_app(backend, (80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("4", "down", "down")
        await settle(pilot)
        assert "too few samples" in seen(pilot)
        assert "says Ada" not in seen(pilot)
        await pilot.press("tab", "end")
        await until(pilot, "says Ada")


async def test_runs_are_seen_in_few_lines(backend: FolderBackend, open_app: Open) -> None:
    async with open_app(backend, (60, 12)) as pilot:
        await settle(pilot)
        await pilot.press("4")
        await settle(pilot)
        assert "0002-similarity" in seen(pilot)
        assert "0001-baseline" in seen(pilot)


async def test_two_marked_runs_are_compared(backend: FolderBackend, open_app: Open) -> None:
    async with open_app(backend, (140, 48)) as pilot:
        await settle(pilot)
        await pilot.press("4")
        await settle(pilot)
        await pilot.press("=")
        await settle(pilot)
        assert "History" in seen(pilot)
        await pilot.press("space", "down", "space", "=")
        await settle(pilot)
        text = seen(pilot)
        assert "0001-baseline and 0002-similarity" in text
        assert "image_text_similarity_filter" in text
        assert "points" in text
        await pilot.press("escape")
        await settle(pilot)
        assert pilot.app.current_mode == "history"
        await pilot.press("escape")
        await settle(pilot)
        assert pilot.app.current_mode == "home"


async def test_an_error_becomes_a_card_and_the_app_lives(
    backend: FolderBackend, open_app: Open
) -> None:
    def refuse(plan: Plan) -> None:
        raise Busy("Another run is live", "0009-x holds the lock", "wait for it")

    backend.launch = refuse  # type: ignore[method-assign]
    async with open_app(backend) as pilot:
        await settle(pilot)
        await pilot.press("p")
        await settle(pilot)
        await pilot.press("a")
        await settle(pilot)
        assert isinstance(pilot.app.screen, ErrorScreen)
        text = seen(pilot)
        for words in ("Another run is live", "0009-x holds the lock", "wait for it"):
            assert words in text
        for _ in range(2):  # told once beside the card
            pilot.app.screen.post_message(Failed(Busy("Disk is full", "no space", "free some")))
        await settle(pilot)
        assert [one.title for one in pilot.app._notifications] == ["Disk is full"]  # noqa: SLF001
        await pilot.press("escape")
        await settle(pilot)
        assert not isinstance(pilot.app.screen, ErrorScreen)


@contextmanager
def slow(backend: FolderBackend, name: str) -> Iterator[threading.Event]:
    """Have a call of the backend wait until the event that is given is set."""
    go, call = threading.Event(), getattr(backend, name)

    def waiting(*arguments: object) -> object:
        assert go.wait(60)
        return call(*arguments)

    setattr(backend, name, waiting)
    try:
        yield go
    finally:
        go.set()


async def test_a_failure_to_approve_is_told_to_who_wanted_to_leave(
    backend: FolderBackend, open_app: Open
) -> None:
    def refuse(plan: Plan) -> None:
        raise Busy("Another run is live", "0009-x holds the lock", "wait for it")

    backend.launch = refuse  # type: ignore[method-assign]
    with slow(backend, "approve") as go:
        async with open_app(backend) as pilot:
            await settle(pilot)
            await pilot.press("p")
            await settle(pilot)
            await pilot.press("a", "escape", "r")
            await pilot.pause()
            assert isinstance(pilot.app.screen, ProposalScreen)
            (told,) = pilot.app._notifications  # noqa: SLF001
            assert "Wait for it." in told.message
            go.set()
            await settle(pilot)
            assert "0009-x holds the lock" in seen(pilot)
            await pilot.press("escape", "escape")
            await settle(pilot)
            assert isinstance(pilot.app.screen, HomeScreen)


async def test_a_gate_that_was_decided_while_another_place_was_shown_is_closed(
    backend: FolderBackend, open_app: Open
) -> None:
    with slow(backend, "approve") as go:
        async with open_app(backend) as pilot:
            await settle(pilot)
            await pilot.press("p")
            await settle(pilot)
            await pilot.press("a", "4")
            await pilot.pause()
            assert pilot.app.current_mode == "history"
            go.set()
            await settle(pilot)
            assert pilot.app.current_mode == "run"
            await pilot.press("1")
            await settle(pilot)
            assert isinstance(pilot.app.screen, HomeScreen)
            assert len(backend.launched) == 1


async def test_a_dialog_does_not_follow_to_another_place(
    backend: FolderBackend, open_app: Open
) -> None:
    with slow(backend, "recipes") as go:
        async with open_app(backend) as pilot:
            await settle(pilot)
            await pilot.press("p")
            await settle(pilot)
            await pilot.press("o", "4")
            await pilot.pause()
            go.set()
            await settle(pilot)
            assert len(pilot.app.screen_stack) == 1
            assert pilot.app.current_mode == "history"


async def test_a_defect_is_logged_and_shown(backend: FolderBackend, open_app: Open) -> None:
    def broken() -> Proposal | None:
        raise ZeroDivisionError("a defect")

    backend.next_proposal = broken  # type: ignore[method-assign]
    async with open_app(backend) as pilot:
        await settle(pilot)
        assert "A defect in synth-agent" in seen(pilot)
        assert "ZeroDivisionError: a defect" in backend.app_log().read_text("utf-8")
        await pilot.press("escape", "4")
        await settle(pilot)
        assert pilot.app.current_mode == "history"


async def test_help_and_palette_come_from_the_bindings(
    backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend, (120, 50)) as pilot:
        await settle(pilot)
        app = pilot.app
        assert isinstance(app, SynthAgentApp)
        commands = {command.title for command in app.get_system_commands(app.screen)}
        for key in PLACES:
            await pilot.press(key)
            await settle(pilot)
            keys = app.keys_here()
            await pilot.press("?")
            await settle(pilot)
            text = seen(pilot)
            assert all(description in text for _, description in keys)
            await pilot.press("escape")
            await settle(pilot)
        assert {"Next experiment", "Quit", "History"} <= commands


def test_every_binding_of_ours_has_an_id() -> None:
    from synth_agent.ui.screens.compare import CompareScreen
    from synth_agent.ui.screens.history import HistoryScreen
    from synth_agent.ui.screens.results import ResultsScreen
    from synth_agent.ui.screens.run import RunScreen

    classes = (
        SynthAgentApp, HomeScreen, ProposalScreen, RunScreen, ResultsScreen, HistoryScreen,
        CompareScreen,
    )  # fmt: skip
    bindings = [binding for owner in classes for binding in owner.BINDINGS]
    assert len(bindings) > 20
    assert all(binding.id and binding.description for binding in bindings)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "size", [(1, 1), (5, 2), (30, 8), (60, 16), (80, 24), (160, 48), (300, 90)]
)
async def test_no_size_breaks_a_screen(
    workspace: Workspace, backend: FolderBackend, open_app: Open, size: tuple[int, int]
) -> None:
    run = live_run(workspace)
    with held(backend, run.id):
        async with open_app(backend, size) as pilot:
            await settle(pilot)
            for key in (*PLACES, "1", "p", "e", "escape", "escape", "?", "escape"):
                await pilot.press(key)
                await settle(pilot)
            await pilot.resize_terminal(80, 24)
            await settle(pilot)
            assert "Home" in seen(pilot)


@pytest.mark.parametrize("keys", [("p", "o"), ("ctrl+p",)])
@pytest.mark.parametrize("size", [(1, 1), (4, 3), (8, 5)])
async def test_a_list_lives_through_a_terminal_of_a_few_cells(
    backend: FolderBackend, open_app: Open, keys: tuple[str, ...], size: tuple[int, int]
) -> None:
    async with open_app(backend, (80, 24)) as pilot:
        await settle(pilot)
        for key in keys:
            await pilot.press(key)
            await settle(pilot)
        await pilot.resize_terminal(*size)
        await settle(pilot)
        await pilot.resize_terminal(80, 24)
        await settle(pilot)
        await pilot.press("escape", "escape")
        await until(pilot, "Best against baseline")


@pytest.mark.parametrize("theme", ["ansi-light", "ansi-dark", "textual-light"])
async def test_a_theme_of_the_palette_breaks_no_screen(
    backend: FolderBackend, open_app: Open, theme: str
) -> None:
    async with open_app(backend) as pilot:
        await settle(pilot)
        pilot.app.theme = theme
        for key in (*PLACES, "1", "p"):
            await pilot.press(key)
            await settle(pilot)
        assert isinstance(pilot.app.screen, ProposalScreen)


async def test_states_are_told_without_colour(
    backend: FolderBackend, open_app: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with open_app(backend) as pilot:
        await settle(pilot)
        assert pilot.app.no_color
        assert "▲ better" in seen(pilot)


def test_the_app_loads_no_heavy_library() -> None:
    code = (
        "import sys, synth_agent.ui.app;"
        "print([m for m in ('torch','transformers','data_juicer','openai','datasets','pandas')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout.strip() == "[]"


async def test_the_places_can_be_clicked(backend: FolderBackend, open_app: Open) -> None:
    async with open_app(backend) as pilot:
        await settle(pilot)
        for place in ("history", "results", "run", "home"):
            (link,) = [link for link in pilot.app.screen.query(Place) if link.place == place]
            await pilot.click(link)
            await settle(pilot)
            assert pilot.app.current_mode == place


async def test_the_palette_runs_what_the_keys_run(backend: FolderBackend, open_app: Open) -> None:
    async with open_app(backend) as pilot:
        await settle(pilot)
        await pilot.press("ctrl+p")
        await pilot.pause(0.2)
        await pilot.press(*"history")
        await pilot.pause(0.5)
        await pilot.press("enter")
        await pilot.pause(0.5)
        await settle(pilot)
        assert pilot.app.current_mode == "history"


async def test_the_cursor_of_history_stays_on_its_run(
    workspace: Workspace, backend: FolderBackend, open_app: Open
) -> None:
    async with open_app(backend) as pilot:
        await settle(pilot)
        await pilot.press("4", "down")
        await settle(pilot)
        assert "Try the recipe baseline" in seen(pilot)
        live_run(workspace)
        await until(pilot, "3 runs")
        assert "Try the recipe baseline" in seen(pilot)
        await pilot.press("enter")
        await settle(pilot)
        assert "0001-baseline Try the recipe baseline" in seen(pilot)


async def until(pilot: Pilot[int], words: str) -> None:
    """Wait until something is on the screen, 60 seconds at most."""
    for _ in range(600):
        if words in seen(pilot):
            return
        await pilot.pause(0.1)
    raise AssertionError(f"{words!r} was not shown: {seen(pilot)}")
