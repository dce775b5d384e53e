"""Results from elsewhere: tables that others published, kept apart from what was measured here.

    runs/imported/<name>/results.json   what the planner reads
    runs/imported/<name>/table.csv|md   the table as it was given
    runs/imported/<name>/README.md      source, date, what is relative to what

Nothing imported is ever a `Score` of a run: its provenance is `imported`, it has no predictions
behind it, and it is evidence for proposals only.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synth_agent.catalogue import load_catalogue
from synth_agent.errors import InvalidInput, nearest
from synth_agent.workspace import Workspace

RESULTS_NAME = "results.json"
PROVENANCE = "imported"
_PACKAGE = Path(__file__).parent
_SHIPPED = (_PACKAGE / "shipped" / "imported", _PACKAGE.parent / "runs" / "imported")
"""Where shipped tables are: in an installed package, in a checkout."""
SHORT_NAMES: Mapping[str, tuple[str, str]] = {
    "sim": ("image_text_similarity_filter", ""),
    "similarity": ("image_text_similarity_filter", ""),
    "text_matching": ("image_text_matching_filter", ""),
    "matching": ("image_text_matching_filter", ""),
    "aesthetics": ("image_aesthetics_filter", ""),
    "watermark": ("image_watermark_filter", ""),
    "nsfw": ("image_nsfw_filter", ""),
    "words_num": ("words_num_filter", ""),
    "dedup": ("document_deduplicator", ""),
    "blip2_caption": ("image_captioning_mapper", "BLIP-2"),
    "llava_caption": ("image_captioning_mapper", "LLaVA"),
}
"""What tables write for an operator, and what that says besides its name."""
_STEP = re.compile(
    r"(?P<name>[A-Za-z][\w-]*)\s*"
    r"(?:\((?P<note>[^()]*)\)|(?P<condition>(?:>=|<=|>|<|=)?\s*[-+]?\d*\.?\d+))?"
)
_REPEATED = re.compile(r"(?:row|id)\s*(?P<row>\S+?)\s+duplicated\s+x\s*(?P<times>\d+)", re.I)
_SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_LARGEST_TABLE = 10_000
"""Rows; a longer file is no table of results."""


@dataclass(frozen=True)
class ImportedStep:
    """One operator of an imported recipe."""

    operator: str
    """Data-Juicer's name; empty when the table's word is not known."""
    condition: str
    """Threshold or model as the table gives it, such as `>=0.32`, `default`, `BLIP-2`."""
    written: str
    """The step as the table has it."""


@dataclass(frozen=True)
class ImportedResult:
    """One row of an imported table."""

    id: str
    recipe: str
    """The recipe as the table has it."""
    steps: tuple[ImportedStep, ...]
    times: int
    """How often its samples are written one after the other; 1 for once."""
    rows: int | None
    """Samples after the recipe; None when the table does not say."""
    values: Mapping[str, float]
    """Benchmark to value, as the table has it."""
    gains: Mapping[str, float]
    """Benchmark to value as times the baseline; empty when the table has no baseline."""


@dataclass(frozen=True)
class ImportedTable:
    """A table of results from elsewhere."""

    name: str
    source: str
    """Who measured it, and where it was published."""
    date: str
    relative_to: str
    """What a gain of 1.0 is; empty when the table has no baseline."""
    spread: Mapping[str, float]
    """Benchmark to the standard deviation of one run, as a share of its score."""
    spread_basis: str
    results: tuple[ImportedResult, ...]
    provenance: str = PROVENANCE

    def unknown_steps(self) -> list[str]:
        """Return the steps whose operator is not known, each once, as the table has them."""
        steps = (step for result in self.results for step in result.steps)
        return list(dict.fromkeys(step.written for step in steps if not step.operator))


@dataclass(frozen=True)
class Layout:
    """Which column of a table means what."""

    recipe: str
    benchmarks: Mapping[str, str]
    """Benchmark (`textvqa`, `mmbench`) to column."""
    id: str | None = None
    """Column of the rows' names; None numbers them from 1."""
    rows: str | None = None
    rows_unit: int = 1
    """What the column of samples counts: 1, or 1000 for thousands."""
    baseline: str | None = None
    """Name (see `id`) of the row that the others are relative to; None when the values are
    multiples of a baseline already, unless `absolute`."""
    absolute: bool = False
    """The values are scores, and no row of the table is their baseline."""


@dataclass(frozen=True)
class Origin:
    """Where a table comes from."""

    name: str
    """Folder name: lower case letters, digits and hyphens."""
    source: str
    date: str
    relative_to: str = ""
    spread: Mapping[str, float] = field(default_factory=dict)
    spread_basis: str = ""


def import_table(workspace: Workspace, path: Path, layout: Layout, origin: Origin) -> ImportedTable:
    """Read a CSV or Markdown table, write it to `runs/imported/<name>/`, and return it.

    Raises:
        InvalidInput: If the table, a column or a value is not as stated, or the name is taken.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidInput(
            "Table cannot be read", f"{path}: {error.strerror}", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(
            "Table cannot be read", f"{path}: {error}", "save it as UTF-8"
        ) from error
    table = parse_table(text, layout, origin, where=str(path))
    folder = workspace.runs / "imported" / origin.name
    if folder.exists():
        raise InvalidInput(
            "Already imported",
            f"{folder} exists",
            "delete the folder to import it again, or give another --name",
        )
    write_table(folder, table, text)
    return table


def parse_table(text: str, layout: Layout, origin: Origin, *, where: str) -> ImportedTable:
    """Return the results that a table's text holds.

    Args:
        text: CSV with a header, or a text with a Markdown table, whose first one is taken.
        layout: Its columns.
        origin: Where it comes from.
        where: Name of the file in error messages.

    Raises:
        InvalidInput: Naming the row and the column.
    """
    _check_origin(origin, layout)
    records = _records(text, where)
    columns = (layout.recipe, layout.id, layout.rows, *layout.benchmarks.values())
    for column in columns:
        if column is not None and column not in records[0]:
            raise InvalidInput(
                "No such column", f"{where}: {column!r}", nearest(column, records[0])
            )
    names = [record[layout.id] if layout.id else str(i) for i, record in enumerate(records, 1)]
    if len(set(names)) < len(names):
        raise InvalidInput(
            "Rows share a name", f"{where}: column {layout.id!r}", "make them unique"
        )
    results = _results(dict(zip(names, records, strict=True)), layout, where)
    relative_to = origin.relative_to or (f"row {layout.baseline}" if layout.baseline else "")
    return ImportedTable(
        name=origin.name,
        source=origin.source,
        date=origin.date,
        relative_to=relative_to,
        spread=dict(origin.spread),
        spread_basis=origin.spread_basis,
        results=results,
    )


def write_table(folder: Path, table: ImportedTable, original: str) -> None:
    """Write an imported table's three files; `results.json` last, since readers look for it."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "md" if _is_markdown(original) else "csv"
    (folder / f"table.{suffix}").write_text(original, "utf-8")
    (folder / "README.md").write_text(_readme(table, suffix), "utf-8")
    content = json.dumps(asdict(table), indent=1, ensure_ascii=False)
    (folder / RESULTS_NAME).write_text(content + "\n", "utf-8")


def bring_shipped(root: Path) -> list[Path]:
    """Copy the shipped tables that a workspace lacks, and return the files written.

    Args:
        root: The workspace's folder, which need not be opened yet.
    """
    written = []
    sources = [path for folder in _SHIPPED for path in sorted(folder.glob(f"*/{RESULTS_NAME}"))]
    for source in sources:
        folder = root / "runs" / "imported" / source.parent.name
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        for path in sorted(source.parent.iterdir()):
            written.append(folder / path.name)
            written[-1].write_bytes(path.read_bytes())
    return written


def list_imported(workspace: Workspace) -> tuple[ImportedTable, ...]:
    """Return the imported tables of a workspace, by name.

    Raises:
        InvalidInput: If one was damaged.
    """
    files = sorted((workspace.runs / "imported").glob(f"*/{RESULTS_NAME}"))
    return tuple(load_table(path) for path in files)


def load_table(path: Path) -> ImportedTable:
    """Read a `results.json`.

    Raises:
        InvalidInput: If it is not one.
    """
    try:
        raw = json.loads(path.read_text("utf-8"))
        results = tuple(_result_from(result) for result in raw.pop("results"))
        table = ImportedTable(results=results, **raw)
        values = [table.spread, *(one.values for one in results), *(one.gains for one in results)]
        if table.provenance != PROVENANCE or not all(map(_is_measured, values)):
            raise ValueError("a provenance other than imported, or a value that is no number")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInput(
            "Imported results are damaged", f"{path}: {error}", "delete the folder and import again"
        ) from error
    return table


def _result_from(raw: Mapping[str, Any]) -> ImportedResult:
    values = dict(raw)
    values["steps"] = tuple(ImportedStep(**step) for step in values["steps"])
    return ImportedResult(**values)


def _is_measured(values: Mapping[str, Any]) -> bool:
    return all(isinstance(one, (int, float)) and math.isfinite(one) for one in values.values())


def _check_origin(origin: Origin, layout: Layout) -> None:
    if not _SAFE_NAME.fullmatch(origin.name):
        raise InvalidInput(
            "Wrong name", f"--name {origin.name!r}", "use lower case letters, digits and hyphens"
        )
    if not origin.source.strip() or not origin.date.strip():
        raise InvalidInput(
            "Source is missing", "--source and --date are empty", "say who measured it, and when"
        )
    if not layout.benchmarks:
        raise InvalidInput("No benchmark column", "--benchmark", "give at least one NAME=COLUMN")
    if layout.baseline is not None and layout.absolute:
        raise InvalidInput(
            "Contradiction", "--absolute together with --baseline", "leave one of them out"
        )
    if layout.baseline is None and not layout.absolute and not origin.relative_to.strip():
        raise InvalidInput(
            "What is 1.0?",
            "the values are multiples of something that is not stated",
            "say of what with --relative-to, name the --baseline row, or give --absolute",
        )


def _is_markdown(text: str) -> bool:
    return any(line.lstrip().startswith("|") for line in text.splitlines())


def _records(text: str, where: str) -> list[dict[str, str]]:
    """Return the rows of a table as mappings from column to cell."""
    try:
        rows = _markdown_rows(text) if _is_markdown(text) else list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise InvalidInput(
            "Not a table of results", f"{where}: {error}", "give short cells, and close each quote"
        ) from error
    rows = [[" ".join(cell.split()) for cell in row] for row in rows]
    rows = [row for row in rows if any(row)]
    if not 2 <= len(rows) <= _LARGEST_TABLE:
        raise InvalidInput(
            "Not a table of results",
            f"{where}: {len(rows)} lines",
            f"give a header and 1 to {_LARGEST_TABLE:,} rows, as CSV or as a Markdown table",
        )
    header = rows[0]
    for cell in (cell for row in rows for cell in row):
        if not cell.isprintable():
            raise InvalidInput(
                "Unprintable characters", f"{where}: cell {cell!r}", "remove control characters"
            )
    for column in header:
        if column and header.count(column) > 1:
            raise InvalidInput(
                "Columns share a name", f"{where}: {column!r}", "give each column its own"
            )
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(header):
            raise InvalidInput(
                "Row does not fit the header",
                f"{where}: row {number} has {len(row)} cells, the header {len(header)}",
                "quote commas in CSV cells; write | as \\| in Markdown cells",
            )
    return [dict(zip(header, row, strict=True)) for row in rows[1:]]


def _markdown_rows(text: str) -> list[list[str]]:
    """Return the cells of the first Markdown table, without its rule."""
    lines: list[str] = []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("|"):
            lines.append(line)
        elif lines:
            break
    rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines]
    rows = [[cell.replace("\\|", "|").replace("`", "") for cell in row] for row in rows]
    return [row for row in rows if not all(re.fullmatch(r"\s*:?-+:?\s*", cell) for cell in row)]


def _results(
    records: Mapping[str, Mapping[str, str]], layout: Layout, where: str
) -> tuple[ImportedResult, ...]:
    values = {
        name: {
            benchmark: _score(record[column], layout, f"{where}: row {name}, column {column!r}")
            for benchmark, column in layout.benchmarks.items()
            if record[column]
        }
        for name, record in records.items()
    }
    base = _baseline_values(values, layout, where)
    recipes = {name: record[layout.recipe] for name, record in records.items()}
    results = []
    for name, record in records.items():
        steps, times = _steps(name, recipes, where)
        gains = {
            benchmark: value / (base[benchmark] if base else 1.0)
            for benchmark, value in values[name].items()
            if not layout.absolute and (not base or benchmark in base)
        }
        rows = record[layout.rows].replace(",", "") if layout.rows else ""
        count = _number(rows, f"{where}: row {name}, column {layout.rows!r}") if rows else None
        results.append(
            ImportedResult(
                id=name,
                recipe=recipes[name],
                steps=steps,
                times=times,
                rows=None if count is None else round(count * layout.rows_unit),
                values=values[name],
                gains={benchmark: round(gain, 6) for benchmark, gain in gains.items()},
            )
        )
    return tuple(results)


def _baseline_values(
    values: Mapping[str, Mapping[str, float]], layout: Layout, where: str
) -> Mapping[str, float]:
    if layout.baseline is None:
        return {}
    if layout.baseline not in values:
        raise InvalidInput(
            "No such row",
            f"{where}: baseline {layout.baseline!r}",
            nearest(layout.baseline, values),
        )
    base = values[layout.baseline]
    if not base or min(base.values()) <= 0:
        raise InvalidInput(
            "Baseline has no score",
            f"{where}: row {layout.baseline}: {dict(base)}",
            "name a row whose scores are above zero",
        )
    return base


def _score(cell: str, layout: Layout, where: str) -> float:
    is_multiple = layout.baseline is None and not layout.absolute
    if is_multiple and "%" in cell:
        raise InvalidInput(
            "Not a multiple",
            f"{where}: {cell!r}",
            "write 0.5 for 50 % of the baseline, name the baseline's row, or say that values are scores",
        )
    return _number(cell, where)


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell.rstrip("%x× "))
    except ValueError:
        value = math.nan
    told = f"{where}: {cell[:80]!r}"
    if not math.isfinite(value):
        raise InvalidInput("Not a number", told, "correct the cell or empty it")
    if value < 0:
        raise InvalidInput("Below zero", told, "give a score or a count, no change")
    return value


def _steps(
    name: str, recipes: Mapping[str, str], where: str, seen: Iterable[str] = ()
) -> tuple[tuple[ImportedStep, ...], int]:
    """Return a row's steps and how often its samples are written, following other rows' names."""
    repeated = _REPEATED.fullmatch(recipes[name])
    if repeated is None:
        parts = re.split(r"\s*(?:\||;|\+)\s*", recipes[name])
        return tuple(_step(part) for part in parts if part), 1
    other = repeated["row"]
    if other not in recipes or other in (name, *seen):
        raise InvalidInput(
            "No such row",
            f"{where}: row {name}: {recipes[name]!r}",
            "name another row of the table",
        )
    steps, times = _steps(other, recipes, where, (name, *seen))
    return steps, times * int(repeated["times"])


def _step(written: str) -> ImportedStep:
    match = _STEP.fullmatch(written)
    if match is None:
        return ImportedStep("", "", written)
    word = match["name"]
    said = (match["note"] or match["condition"] or "").replace(" ", "")
    operator, besides = SHORT_NAMES.get(word, (word, ""))
    if operator not in load_catalogue().operators:
        operator = ""
    return ImportedStep(operator, " ".join(filter(None, (besides, said))), written)


def _readme(table: ImportedTable, suffix: str) -> str:
    spread = ", ".join(f"{value:g} of the score on {name}" for name, value in table.spread.items())
    lines = [
        f"# {table.name}",
        "",
        "Imported results: nothing here was measured by this workspace.",
        "",
        f"- Source: {table.source}",
        f"- Date: {table.date}",
        f"- Provenance: `{table.provenance}`, {len(table.results)} rows, no predictions",
        f"- Relative to: {table.relative_to or 'nothing; the values are scores'}",
    ]
    if spread:
        lines.append(f"- Spread of one run: {spread}. {table.spread_basis}".rstrip())
    if unknown := table.unknown_steps():
        lines.append(f"- Steps without a known operator: {', '.join(unknown)}")
    lines += [
        "",
        f"`table.{suffix}` is the table as given, `{RESULTS_NAME}` what planners read.",
        "",
    ]
    return "\n".join(lines)


def table_text(tables: Sequence[ImportedTable]) -> str:
    """Return imported tables as lines for the command line."""
    lines = []
    for table in tables:
        lines.append(f"{table.name}  {len(table.results)} rows, {table.provenance}: {table.source}")
        lines.append(f"  relative to {table.relative_to or 'nothing; the values are scores'}")
        for result in table.results:
            shown = result.gains or result.values
            scores = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            rows = "" if result.rows is None else f"{result.rows:,}"
            lines.append(f"  {result.id:<6} {rows:>9}  {scores}  {result.recipe}")
    return "\n".join(lines)
