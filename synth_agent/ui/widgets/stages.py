"""The stages of a run as lines of text. Pure functions from a run to `Content`."""

from __future__ import annotations

from textual.content import Content

from synth_agent.runs import STAGES, Run, StageState
from synth_agent.ui.plots import bar
from synth_agent.ui.text import STATES, clean, fit, shorten
from synth_agent.wording import duration


def stage_lines(run: Run, shown: str, width: int) -> Content:
    """Return one line a stage: state, name, progress, counts and times.

    Args:
        run: The run.
        shown: The stage whose curve and log are on the screen; it gets a marker.
        width: Cells.
    """
    lines = [_line(run.stages[name], name == shown, width) for name in STAGES]
    return Content("\n").join(lines)


def _line(stage: StageState, is_shown: bool, width: int) -> Content:
    sign = STATES[stage.status]
    head = Content.assemble(
        ("› " if is_shown else "  ", "$accent"),
        (fit(f"{sign.glyph} {sign.word}", 11), f"${sign.style}"),
        (fit(stage.name, 9), "bold" if stage.status == "running" else ""),
    )
    room = max(0, width - 23)
    return Content.assemble(head, " ", _facts(stage, room))


def _facts(stage: StageState, room: int) -> Content:
    if stage.status == "running":
        return progress_words(stage, room)
    if stage.status in ("succeeded", "reused"):
        time = "taken from an earlier run" if stage.status == "reused" else duration(stage.seconds)
        counts = sample_counts(stage)
        return Content.styled(shorten(f"{time}  {counts}".rstrip(), room), "$foreground-muted")
    if stage.status == "failed" and stage.error:
        return Content.styled(shorten(clean(stage.error.get("title", "")), room), "$error")
    return Content("")


def sample_counts(stage: StageState) -> str:
    """Return `1,204 of 3,000 samples kept`, where the stage reports it."""
    kept, seed = stage.result.get("kept"), stage.result.get("seed_samples")
    if not isinstance(kept, int) or not isinstance(seed, int):
        return ""
    share = f" ({100 * kept / seed:.0f} %)" if seed else ""
    return f"{kept:,} of {seed:,} samples kept{share}"


def progress_words(stage: StageState, room: int) -> Content:
    """Return a running stage's bar, counts and estimated time left."""
    progress = stage.progress
    if not progress:
        return Content.styled("starting", "$foreground-muted")
    step, total = progress.get("step") or 0, progress.get("total") or 0
    label = clean(progress.get("label") or progress.get("unit") or "")
    counts = f"{step:,}/{total:,}" if total else f"{step:,}"
    left = progress.get("eta_seconds")
    eta = f"  {duration(left)} left" if left is not None else ""
    words = f"{counts} {label}{eta}" if step or total else f"{label}{eta}"
    bar_width = min(30, room - len(words) - 8)
    if not total or bar_width < 6:
        return Content(shorten(words, room))
    share = step / total
    return Content.assemble(
        (bar(share, bar_width), "$accent"), (f" {100 * share:3.0f} % ", "bold"), f" {words}"
    )


def numbers_line(stage: StageState) -> Content:
    """Return the latest loss, learning rate, gradient norm and rate of a stage."""
    progress = stage.progress
    parts: list[tuple[str, str]] = []
    for key, name, pattern in (
        ("loss", "loss", "{:.4g}"),
        ("lr", "learning rate", "{:.2e}"),
        ("grad_norm", "gradient norm", "{:.3g}"),
        ("samples_per_second", "samples/s", "{:.1f}"),
    ):
        value = progress.get(key)
        if isinstance(value, (int, float)):
            parts += [(f"{name} ", "$foreground-muted"), (pattern.format(value) + "   ", "bold")]
    return Content.assemble(*parts) if parts else Content("")


def current_stage(run: Run) -> str:
    """Return the stage to look at: the running or failed one, else the last that did anything."""
    for status in ("running", "interrupted", "failed", "cancelled"):
        for name in STAGES:
            if run.stages[name].status == status:
                return name
    started = [name for name in STAGES if run.stages[name].status != "waiting"]
    with_curve = [name for name in started if run.stages[name].losses]
    return (with_curve or started or [STAGES[0]])[-1]
