"""Imported tables: what is read, what is refused, and the one that is shipped."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from synth_agent.errors import InvalidInput
from synth_agent.imported import (
    Layout,
    Origin,
    bring_shipped,
    import_table,
    list_imported,
    load_table,
    parse_table,
    table_text,
)
from synth_agent.workspace import Settings, Workspace

SHIPPED = Path(__file__).parents[1] / "runs/imported/better-synth-2024"
ORIGIN = Origin("their-table", "Somebody, a report", "2025-03", "their baseline")
LAYOUT = Layout(recipe="ops", benchmarks={"textvqa": "TextVQA"}, id="id", rows="rows")
CSV = """id,ops,rows,TextVQA
base,none(all),1000,40.0
a,sim>=0.3 | dedup,600,44.0
b,row a duplicated x3,1800,42.0
c,frobnicate(7),"1,200",
"""
MARKDOWN = """# Our results

| id | ops | rows | TextVQA |
|:---|:---:|---:|---|
| 1 | `image_text_similarity_filter>=0.3` \\| nsfw | 0.6 | 1.10x |
| 2 | words_num(default) | 0.5 | 0.98 |

| other | table |
|---|---|
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, Settings())


def _message(text: str, layout: Layout = LAYOUT, origin: Origin = ORIGIN) -> str:
    with pytest.raises(InvalidInput) as caught:
        parse_table(text, layout, origin, where="t.csv")
    return str(caught.value)


def test_csv_with_a_baseline_row_becomes_relative() -> None:
    layout = replace(LAYOUT, baseline="base")
    table = parse_table(CSV, layout, replace(ORIGIN, relative_to=""), where="t.csv")
    base, a, b, c = table.results
    assert base.gains == {"textvqa": 1.0}
    assert a.values == {"textvqa": 44.0}
    assert a.gains == {"textvqa": pytest.approx(1.1)}
    assert [(s.operator, s.condition) for s in a.steps] == [
        ("image_text_similarity_filter", ">=0.3"),
        ("document_deduplicator", ""),
    ]
    assert (b.steps, b.times, b.rows) == (a.steps, 3, 1800)
    assert (c.rows, c.values, c.gains) == (1200, {}, {})
    assert table.relative_to == "row base"
    assert table.unknown_steps() == ["none(all)", "frobnicate(7)"]
    assert table.provenance == "imported"


def test_markdown_with_multiples_of_a_baseline() -> None:
    layout = replace(LAYOUT, rows_unit=1000)
    one, two = parse_table(MARKDOWN, layout, ORIGIN, where="t.md").results
    assert [step.operator for step in one.steps] == [
        "image_text_similarity_filter",
        "image_nsfw_filter",
    ]
    assert one.gains == {"textvqa": 1.1}
    assert one.rows == 600
    assert two.steps[0].condition == "default"


def test_absolute_scores_without_a_baseline_have_no_gain() -> None:
    layout = replace(LAYOUT, absolute=True)
    table = parse_table(CSV, layout, replace(ORIGIN, relative_to=""), where="t.csv")
    assert table.results[1].values == {"textvqa": 44.0}
    assert table.results[1].gains == {}


def test_what_one_means_has_to_be_said() -> None:
    assert "--relative-to" in _message(CSV, origin=replace(ORIGIN, relative_to=""))


@pytest.mark.parametrize(
    ("text", "layout", "said"),
    [
        (CSV, replace(LAYOUT, recipe="op"), "did you mean 'ops'"),
        (CSV.replace("44.0", "high"), LAYOUT, "row a, column 'TextVQA': 'high'"),
        (CSV.replace("44.0", "nan"), LAYOUT, "Not a number"),
        (CSV.replace("44.0", "-4"), LAYOUT, "row a, column 'TextVQA': '-4'"),
        (CSV.replace("44.0", "50%"), LAYOUT, "Not a multiple"),
        (CSV.replace("TextVQA", "ops", 1), LAYOUT, "Columns share a name"),
        (CSV.replace("b,row", "a,row"), LAYOUT, "share a name"),
        (CSV.replace("row a dup", "row z dup"), LAYOUT, "another row"),
        (CSV.replace("row a dup", "row b dup"), LAYOUT, "another row"),
        (CSV.replace("600,44.0", "600"), LAYOUT, "row 2 has 3 cells"),
        (CSV, replace(LAYOUT, baseline="zero"), "No such row"),
        (CSV, replace(LAYOUT, baseline="c"), "above zero"),
        (CSV, replace(LAYOUT, baseline="a", absolute=True), "Contradiction"),
        (CSV, replace(LAYOUT, benchmarks={}), "NAME=COLUMN"),
        (CSV.replace("dedup", "dedup\x1b[2J"), LAYOUT, "control characters"),
        ("id,ops\n", LAYOUT, "Not a table"),
        ("", LAYOUT, "Not a table"),
    ],
)
def test_wrong_tables_are_refused_by_name(text: str, layout: Layout, said: str) -> None:
    assert said in _message(text, layout)


@pytest.mark.parametrize("name", ["", "../up", "A", "a/b", ".hidden", "x" * 65])
def test_names_stay_inside_the_folder(name: str) -> None:
    assert "Wrong name" in _message(CSV, origin=replace(ORIGIN, name=name))


def test_source_and_date_are_required() -> None:
    assert "Source is missing" in _message(CSV, origin=replace(ORIGIN, source=" "))


def test_import_writes_what_is_read_again(workspace: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "given.csv"
    path.write_text(CSV, "utf-8")
    origin = replace(ORIGIN, spread={"textvqa": 0.03}, spread_basis="three runs each.")
    table = import_table(workspace, path, LAYOUT, origin)
    assert list_imported(workspace) == (table,)
    folder = workspace.runs / "imported" / "their-table"
    assert (folder / "table.csv").read_text("utf-8") == CSV
    readme = (folder / "README.md").read_text("utf-8")
    for said in ("Somebody, a report", "2025-03", "`imported`", "their baseline", "frobnicate(7)"):
        assert said in readme
    assert "a            600  textvqa 44  sim>=0.3 | dedup" in table_text([table])
    with pytest.raises(InvalidInput, match="Already imported"):
        import_table(workspace, path, LAYOUT, origin)


def test_missing_files_are_named(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nothing\.csv.*check the path"):
        import_table(workspace, tmp_path / "nothing.csv", LAYOUT, ORIGIN)
    assert list_imported(workspace) == ()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.pop("source"),
        lambda raw: raw.update(provenance="measured"),
        lambda raw: raw["results"][0]["gains"].update(textvqa="1.1"),
        lambda raw: raw["results"][0].update(surprise=1),
        lambda raw: raw.update(results=None),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, damage: object) -> None:
    raw = json.loads((SHIPPED / "results.json").read_text("utf-8"))
    damage(raw)  # type: ignore[operator]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(raw), "utf-8")
    with pytest.raises(InvalidInput, match="import again"):
        load_table(path)


def test_the_shipped_table_has_all_rows_and_follows_from_its_text(workspace: Workspace) -> None:
    written = bring_shipped(workspace.root)
    assert [path.name for path in written] == ["README.md", "results.json", "table.csv"]
    assert bring_shipped(workspace.root) == []
    (table,) = list_imported(workspace)
    assert len(table.results) == 15
    assert table.provenance == "imported"
    assert table.unknown_steps() == []
    by_id = {result.id: result for result in table.results}
    assert by_id["3"].gains == {"textvqa": 1.0606, "mmbench": 2.9151}
    assert by_id["3"].rows == 222_000
    assert by_id["11"].times == 4
    assert by_id["11"].steps == by_id["10"].steps
    assert "/" not in table.source
    layout = Layout(
        recipe="ops",
        benchmarks={"textvqa": "TextVQA", "mmbench": "MMBench"},
        id="id",
        rows="rows_k",
        rows_unit=1000,
    )
    origin = Origin(
        table.name, table.source, table.date, table.relative_to, table.spread, table.spread_basis
    )
    text = (SHIPPED / "table.csv").read_text("utf-8")
    assert parse_table(text, layout, origin, where="table.csv") == table


def test_the_shipped_table_agrees_with_the_recipes_headers() -> None:
    """Two copies of the same published figures: the headers of `recipes/` and the table."""
    by_id = {result.id: result for result in load_table(SHIPPED / "results.json").results}
    recipes = SHIPPED.parents[2] / "recipes"
    compared = 0
    for path in recipes.rglob("*.yaml"):
        for line in path.read_text("utf-8").splitlines():
            if line.startswith("# published:"):
                said = dict(part.split("=") for part in line.split(":", 1)[1].split())
                gains = by_id[said["row"]].gains
                assert float(said["textvqa"]) == gains["textvqa"]
                assert float(said["mmbench"]) == gains["mmbench"]
                compared += 1
    assert compared >= 15


def test_a_cell_without_an_end_is_refused() -> None:
    before = csv.field_size_limit(100_000)  # other libraries in the process raise it
    try:
        assert "field limit" in _message(CSV.replace("44.0", "4" * 200_000))
    finally:
        csv.field_size_limit(before)
    assert len(_message(CSV.replace("44.0", "4" * 1000))) < 300
