"""The commands about data as files: `synth-agent convert` and `synth-agent check-data`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from synth_agent.data import atomic_file
from synth_agent.data_check import DataReport, Layout, check_data, find_layout
from synth_agent.errors import EXIT_FAILED, EXIT_OK, InvalidInput
from synth_agent.formats import Conversion, Options, convert
from synth_agent.headless import narrate
from synth_agent.terminal import escaped
from synth_agent.wording import duration
from synth_agent.workspace import Workspace, open_workspace

NAMED_PICTURES = 10
LIST_NAME = "unusable-pictures.tsv"
_QUIET_SECONDS = 5.0


def convert_file(options: argparse.Namespace) -> int:
    """Convert a data set and say what would not come back."""
    original = options.original
    if original is None and (workspace := _workspace_here(options.workspace)) is not None:
        default = workspace.path(workspace.settings.data.original)
        original = default if default.is_file() else None
    chosen = Options(original, options.captions, options.marker, options.images, options.keep_ids)
    made = convert(options.source, options.target, chosen)
    if options.json:
        print(json.dumps(asdict(made)))
    else:
        print(_conversion_text(made, options.target))
    return EXIT_OK


def _conversion_text(made: Conversion, target: Path) -> str:
    lines = [f"{target}: {made.records:,} records, {made.source} to {made.target}"]
    if made.left_out:
        named = ", ".join(escaped(field) for field in made.left_out[:NAMED_PICTURES])
        rest = len(made.left_out) - NAMED_PICTURES
        more = f" and {rest:,} more" if rest > 0 else ""
        lines.append(f"left out, as {made.target} have no such fields: {named}{more}")
    if made.changed:
        named = ", ".join(made.changed[:NAMED_PICTURES])
        lines.append(f"{len(made.changed):,} would not come back as they were: {named}")
    else:
        apart = "apart from them, " if made.left_out else ""
        lines.append(f"{apart}every record comes back as it was")
    return "\n".join(lines)


def check(options: argparse.Namespace) -> int:
    """Check a data set, the workspace's seed set unless named."""
    layout, folder = _layout(options)
    narrate(f"checking {layout.samples}")
    report = check_data(layout, _progress())
    listed = _list_pictures(report, folder) if report.unusable else None
    if options.json:
        print(json.dumps(_as_data(report, listed)))
    else:
        print(_report_text(report, listed))
    return EXIT_FAILED if report.unusable or report.problems else EXIT_OK


def _layout(options: argparse.Namespace) -> tuple[Layout, Path]:
    """Return the data set, and the folder for the list of pictures."""
    given: Path | None = options.data
    if given is None:
        workspace = open_workspace(options.workspace)
        data = workspace.settings.data
        folder: Path = options.images or workspace.path(data.images)
        original: Path = options.original or workspace.path(data.original)
        return Layout(workspace.path(data.seed), folder, original), workspace.artifacts
    if given.is_dir():
        found = find_layout(given)
        images: Path = options.images or found.images
        return Layout(found.samples, images, options.original or found.original), Path()
    return Layout(given, options.images or given.parent, options.original), Path()


def _progress() -> Callable[[int, int], None]:
    """Return what prints progress, seldom enough to be read."""
    started = printed = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal printed
        moment = time.monotonic()
        if moment - printed < _QUIET_SECONDS:
            return
        printed = moment
        left = duration((moment - started) * (total - done) / done)
        narrate(f"  {done:,}/{total:,} pictures, {left} left")

    return report


def _list_pictures(report: DataReport, folder: Path) -> Path:
    path = folder / LIST_NAME
    with atomic_file(path) as file:
        file.write("line\tid\tpicture\treason\n")
        for one in report.unusable:
            cells = (_cell(one.id), _cell(one.image), _cell(one.reason))
            file.write("\t".join((str(one.line), *cells)) + "\n")
    return path


def _cell(value: object) -> str:
    """Return a value on one line: ids and file names may hold anything."""
    return escaped(str(value)).replace("\t", "\\t").replace("\n", "\\n")


def _report_text(report: DataReport, listed: Path | None) -> str:
    lines = [
        f"{report.num_samples:,} samples, {report.num_pictures:,} pictures, image marker "
        f"{report.marker or 'none or mixed'}"
    ]
    lines += report.problems
    missing = sum(one.reason == "missing" for one in report.unusable)
    if report.unusable:
        lines.append(
            f"{missing:,} pictures missing, {len(report.unusable) - missing:,} unreadable:"
        )
        lines += [
            f"  line {one.line}, id {_cell(one.id)}: {_cell(one.image)}: {_cell(one.reason)}"
            for one in report.unusable[:NAMED_PICTURES]
        ]
        lines.append(f"all of them: {listed}")
    if not report.unusable and not report.problems:
        lines.append("nothing is wrong")
    return "\n".join(lines)


def _as_data(report: DataReport, listed: Path | None) -> dict[str, object]:
    return {
        "samples": report.num_samples,
        "pictures": report.num_pictures,
        "marker": report.marker,
        "problems": list(report.problems),
        "missing": sum(one.reason == "missing" for one in report.unusable),
        "unreadable": sum(one.reason != "missing" for one in report.unusable),
        "first": [asdict(one) for one in report.unusable[:NAMED_PICTURES]],
        "list": str(listed) if listed else None,
    }


def _workspace_here(start: Path) -> Workspace | None:
    try:
        return open_workspace(start)
    except InvalidInput:
        return None
