"""`synth-agent import` and `imported`: results from elsewhere, into the workspace and out of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from synth_agent.errors import InvalidInput
from synth_agent.imported import Layout, Origin, import_table, list_imported, table_text
from synth_agent.workspace import open_workspace


def import_file(options: argparse.Namespace) -> int:
    """Import a table; print its rows as they were understood."""
    layout = Layout(
        recipe=options.recipe,
        benchmarks=_pairs(options.benchmark, "--benchmark"),
        id=options.id,
        rows=options.rows,
        rows_unit=options.rows_unit,
        baseline=options.baseline,
        absolute=options.absolute,
    )
    origin = Origin(
        name=options.name,
        source=options.source,
        date=options.date,
        relative_to=options.relative_to,
        spread={name: _share(value) for name, value in _pairs(options.spread, "--spread").items()},
        spread_basis=options.spread_basis,
    )
    table = import_table(open_workspace(options.workspace), options.table, layout, origin)
    print(json.dumps(asdict(table)) if options.json else table_text([table]))
    return 0


def show(options: argparse.Namespace) -> int:
    """Print the workspace's imported tables."""
    tables = list_imported(open_workspace(options.workspace))
    shown = table_text(tables) or "no imported results; see: synth-agent import --help"
    print(json.dumps([asdict(one) for one in tables]) if options.json else shown)
    return 0


def _pairs(given: Sequence[str], option: str) -> dict[str, str]:
    pairs = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not name or not separator or not value:
            raise InvalidInput("Not a pair", f"{option} {text!r}", "write NAME=VALUE")
        pairs[name] = value
    return pairs


def _share(value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise InvalidInput("Wrong spread", f"--spread {value!r}", "give a share, such as 0.02")
    return share
