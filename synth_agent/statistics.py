"""Statistics of a data set: what every filter would score, kept as a table on disk.

Owns the folder `artifacts/statistics` (called `root` here):
`samples/<data key>.parquet` lists the samples of one data set in their order, and
`columns/<column key>/` holds the scores of one filter under one set of parameters and models, keyed
by the digest of a sample's text and pictures. A changed data set reuses the scores of every sample
that it shares. Scores are written by the analysis stage through `ColumnWriter`, and read here.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from synth_agent.catalogue import SUPPORTED_VERSION, load_catalogue
from synth_agent.errors import InvalidInput, SynthAgentError, nearest
from synth_agent.runs import digest

Kind = Literal["number", "list", "string"]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
T = TypeVar("T")

KEY_LENGTH = 24
MAX_RESULT_BYTES = 1 << 20
QUERY_MEMORY = "1GB"

_ARROW: dict[Kind, pa.DataType] = {
    "number": pa.float64(),
    "list": pa.list_(pa.float64()),
    "string": pa.string(),
}
_FIELDS = ("text_key", "image_key", "image_bytes_key")
_DATA_KEY = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]*")
_PART = re.compile(r"part-(\d+)\.parquet")


@dataclass(frozen=True)
class Source:
    """Where a filter's scores come from: the knowledge that its signature does not give."""

    stats: Mapping[str, Kind]
    """The keys that it writes; a list holds one number per picture, chunk or entity."""
    parameters: tuple[str, ...] = ()
    """Parameters that change a score. All others are thresholds or decide how it is computed."""
    models: tuple[str, ...] = ()
    """Parameters that name a folder or file whose content changes a score."""
    only_with: Mapping[str, str] = field(default_factory=dict)
    """Parameters that change a score only while another one, the value here, is true."""
    tokenized_stats: Mapping[str, Kind] = field(default_factory=dict)
    """The keys in place of `stats` while `tokenization` is true."""


_TOKENIZER_LANGUAGE = {"lang": "tokenization"}
_WORD_LIST = ("lang", "tokenization", "use_words_aug")
_WORD_GROUPS = {
    "words_aug_group_sizes": "use_words_aug",
    "words_aug_join_char": "use_words_aug",
}
_FLIPS = ("horizontal_flip", "vertical_flip", "reduce_mode")
_LINES = (
    "canny_threshold1",
    "canny_threshold2",
    "hough_threshold",
    "min_line_length",
    "max_line_gap",
    "angle_tolerance",
)

SOURCES: Mapping[str, Source] = {
    "text_length_filter": Source({"text_len": "number"}),
    "words_num_filter": Source(
        {"num_words": "number"}, ("tokenization",), only_with=_TOKENIZER_LANGUAGE
    ),
    "character_repetition_filter": Source({"char_rep_ratio": "number"}, ("rep_len",)),
    "word_repetition_filter": Source(
        {"word_rep_ratio": "number"}, ("rep_len", "tokenization"), only_with=_TOKENIZER_LANGUAGE
    ),
    "special_characters_filter": Source({"special_char_ratio": "number"}),
    "alphanumeric_filter": Source(
        {"alnum_ratio": "number"},
        ("tokenization",),
        tokenized_stats={"alpha_token_ratio": "number"},
    ),
    "average_line_length_filter": Source({"avg_line_length": "number"}),
    "maximum_line_length_filter": Source({"max_line_length": "number"}),
    "text_action_filter": Source({"num_action": "number"}, ("lang",)),
    "text_entity_dependency_filter": Source({"num_dependency_edges": "list"}, ("lang",)),
    # Here `lang` says which languages to keep; the model tells them apart without it.
    "language_id_score_filter": Source({"lang": "string", "lang_score": "number"}),
    "flagged_words_filter": Source(
        {"flagged_words_ratio": "number"}, _WORD_LIST, ("flagged_words_dir",), _WORD_GROUPS
    ),
    "stopwords_filter": Source(
        {"stopwords_ratio": "number"}, _WORD_LIST, ("stopwords_dir",), _WORD_GROUPS
    ),
    "perplexity_filter": Source({"perplexity": "number"}, ("lang",)),
    "token_num_filter": Source({"num_token": "number"}, models=("hf_tokenizer",)),
    "image_shape_filter": Source({"image_width": "list", "image_height": "list"}),
    "image_size_filter": Source({"image_sizes": "list"}),
    "image_aspect_ratio_filter": Source({"aspect_ratios": "list"}),
    "image_text_similarity_filter": Source({"image_text_similarity": "list"}, _FLIPS, ("hf_clip",)),
    "image_text_matching_filter": Source(
        {"image_text_matching_score": "list"}, _FLIPS, ("hf_blip",)
    ),
    "image_pair_similarity_filter": Source({"image_pair_similarity": "list"}, models=("hf_clip",)),
    # The model's class and the scale of its scores are chosen by the text of the path.
    "image_aesthetics_filter": Source(
        {"image_aesthetics_scores": "list"}, ("hf_scorer_model",), ("hf_scorer_model",)
    ),
    "image_watermark_filter": Source(
        {"image_watermark_prob": "list"}, models=("hf_watermark_model",)
    ),
    "image_nsfw_filter": Source({"image_nsfw_score": "list"}, models=("hf_nsfw_model",)),
    "image_face_count_filter": Source({"face_counts": "list"}, models=("cv_classifier",)),
    "image_face_ratio_filter": Source({"face_ratios": "list"}, models=("cv_classifier",)),
    # The least numbers of lines are thresholds and also scale the confidence.
    "image_subplot_filter": Source(
        {
            "image_subplot_confidence": "list",
            "horizontal_peak_count": "list",
            "vertical_peak_count": "list",
        },
        ("min_horizontal_lines", "min_vertical_lines", *_LINES),
    ),
    "phrase_grounding_recall_filter": Source(
        {"phrase_grounding_recall": "list"},
        (*_FLIPS, "iou_thr", "large_area_ratio_thr", "conf_thr"),
        ("hf_owlvit",),
    ),
}
"""Filters of Data-Juicer whose scores depend on a sample's text and pictures alone."""

PICTURE_HASHES = "picture_hashes"
OWN_SOURCES: Mapping[str, Source] = {
    PICTURE_HASHES: Source({"image_digest": "string", "image_dhash": "string"}),
}
"""Statistics that are no filter of Data-Juicer. One value a picture, in hex, separated by spaces."""


def source_of(operator: str) -> Source:
    """Return where the scores of a scored operator come from; KeyError for any other."""
    return OWN_SOURCES[operator] if operator in OWN_SOURCES else SOURCES[operator]


@dataclass(frozen=True)
class ColumnSpec:
    """What decides the scores of one column."""

    operator: str
    parameters: Mapping[str, Any]
    """Only those that change a score, every one of them written out."""
    models: Mapping[str, str]
    """Digest of the content that each model parameter names."""
    stats: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Return the content of `column.json`."""
        return {
            "operator": self.operator,
            "parameters": dict(self.parameters),
            "models": dict(self.models),
            "data_juicer": SUPPORTED_VERSION,
            "stats": list(self.stats),
        }

    @property
    def key(self) -> str:
        """The column's name on disk."""
        return digest(self.document())[:KEY_LENGTH]

    @property
    def main_stat(self) -> str:
        """The first stat whose values are numbers; ask only where there is one."""
        return self.numeric_stats[0]

    @property
    def numeric_stats(self) -> tuple[str, ...]:
        """The stats whose values are numbers."""
        return tuple(stat for stat in self.stats if self.kind(stat) != "string")

    def kind(self, stat: str) -> Kind:
        """Return what one value of a stat is."""
        source = source_of(self.operator)
        return {**source.stats, **source.tokenized_stats}[stat]


def column_spec(
    operator: str, parameters: Mapping[str, Any], model_digest: Callable[[str], str]
) -> ColumnSpec | None:
    """Return the column that holds a filter's scores.

    Args:
        operator: Name of an operator of Data-Juicer.
        parameters: As a recipe gives them; defaults are filled in.
        model_digest: Called with a model parameter's value, returns the content's digest.

    Returns:
        None where the scores are not decided by text and pictures alone: another kind of operator,
        other fields, or a model that the parameters do not name.
    """
    if operator in OWN_SOURCES:
        return ColumnSpec(operator, {}, {}, tuple(OWN_SOURCES[operator].stats))
    source = SOURCES.get(operator)
    if source is None:
        return None
    known = load_catalogue().parameters(operator)
    values = {name: parameter.default for name, parameter in known.items()} | dict(parameters)
    if any(values[name] != known[name].default for name in _FIELDS):
        return None
    if not all(isinstance(values[name], str) and values[name] for name in source.models):
        return None
    needed = list(source.parameters)
    needed += [name for name, switch in source.only_with.items() if values[switch]]
    # 1 and 1.0 are one value of a real parameter, and must be one column.
    chosen = {
        name: float(values[name])
        if type(values[name]) is int and "float" in known[name].accepts
        else values[name]
        for name in needed
    }
    tokenized = source.tokenized_stats and values["tokenization"]
    return ColumnSpec(
        operator,
        chosen,
        {name: model_digest(values[name]) for name in source.models},
        tuple(source.tokenized_stats if tokenized else source.stats),
    )


@dataclass(frozen=True)
class SampleRow:
    """One sample of a data set."""

    id: str
    sample: str
    """Hex digest of the text and of the pictures' contents."""
    text: str
    images: tuple[str, ...]


def write_samples(root: Path, data_key: str, samples: Iterable[SampleRow]) -> Path:
    """Write the list of a data set's samples, completely or not at all, and return its path."""
    rows = list(samples)
    table = pa.table(
        {
            "row": pa.array(range(len(rows)), pa.int64()),
            "id": pa.array([row.id for row in rows], pa.string()),
            "sample": pa.array([row.sample for row in rows], pa.string()),
            "text": pa.array([row.text for row in rows], pa.string()),
            "images": pa.array([list(row.images) for row in rows], pa.list_(pa.string())),
        }
    )
    path = _samples_file(root, data_key)
    _write_table(table, path)
    return path


class ColumnWriter:
    """Adds scores to one column, a part at a time. Only one process may write a column."""

    def __init__(self, root: Path, spec: ColumnSpec) -> None:
        self.spec = spec
        self._folder = root / "columns" / spec.key
        self._folder.mkdir(parents=True, exist_ok=True)
        document = self._folder / "column.json"
        if not document.exists():
            _publish(document, json.dumps(spec.document(), indent=1).encode() + b"\n")

    def known(self, *, with_errors: bool = True) -> set[str]:
        """Return the digests of the samples that have a score, or an error unless told otherwise."""
        known: set[str] = set()
        for part in _parts(self._folder):
            if with_errors:
                known.update(_read_table(part, ["sample"])["sample"].to_pylist())
                continue
            table = _read_table(part, ["sample", "error"])
            scored = table["error"].is_null()
            # The latest part decides.
            known -= set(table["sample"].filter(pc.invert(scored)).to_pylist())
            known |= set(table["sample"].filter(scored).to_pylist())
        return known

    def append(
        self,
        samples: Sequence[str],
        values: Mapping[str, Sequence[Any]],
        errors: Sequence[str | None] | None = None,
    ) -> Path:
        """Write one part, completely or not at all.

        Args:
            samples: Digests of the samples. One that has a value already gets the new one.
            values: For each stats key, a value per sample as `compute_stats` gives it; None where
                there is an error. Numbers are stored as a run compares them, which is rounded.
            errors: Why a sample has no value; None for a sample that has one.

        Returns:
            The part's path.
        """
        if set(values) != set(self.spec.stats):
            raise ValueError(f"values of {sorted(values)}, expected {list(self.spec.stats)}")
        arrays: dict[str, pa.Array] = {"sample": pa.array(samples, pa.string())}
        for stat in self.spec.stats:
            stored = _ARROW[self.spec.kind(stat)]
            arrays[stat] = pa.array(_as_compared(pa.array(values[stat], stored)), stored)
        arrays["error"] = pa.array(errors or [None] * len(samples), pa.string())
        for leftover in self._folder.glob("*.partial"):
            leftover.unlink(missing_ok=True)
        parts = _parts(self._folder)
        number = _number(parts[-1]) + 1 if parts else 0
        path = self._folder / f"part-{number:06d}.parquet"
        _write_table(pa.table(arrays), path)
        return path


@dataclass(frozen=True, eq=False)
class Values:
    """One stat of every row of a data set of N rows."""

    stat: str
    flat: Floats
    """(N,) numbers, or (V,) all the lists' numbers. Of strings, positions in `words`."""
    offsets: Integers | None
    """(N + 1,) where each row's list starts in `flat`; None when a row has one number."""
    known: Mask
    """(N,) False where the stat was not computed, failed or is not a number."""
    errors: Mapping[int, str]
    """Why rows failed."""
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Guard the arrays: whoever asks next gets the same ones."""
        for array in (self.flat, self.offsets, self.known):
            if array is not None:
                array.setflags(write=False)

    def at(self, row: int) -> tuple[float, ...] | str:
        """Return the value of a row that has one: its numbers, or its string."""
        if self.words:
            return self.words[int(self.flat[row])]
        if self.offsets is None:
            return (float(self.flat[row]),)
        start, end = self.offsets[row], self.offsets[row + 1]
        return tuple(float(number) for number in self.flat[start:end])

    def per_row(self) -> Floats:
        """Return (N,) numbers: a list's mean, NaN for an empty list and where nothing is known."""
        if self.offsets is None:
            return np.where(self.known, self.flat, np.nan)
        lengths = np.diff(self.offsets)
        filled = lengths > 0
        means = np.full(len(lengths), np.nan)
        if filled.any():
            # reduceat is wrong for empty lists only, and between those that are not lies nothing.
            sums = np.add.reduceat(self.flat, self.offsets[:-1][filled])
            means[filled] = sums / lengths[filled]
        means[~self.known] = np.nan
        return means

    def numbers(self, mask: Mask | None = None) -> Floats:
        """Return all known numbers of the rows in `mask`, of every row without one."""
        rows = self.known if mask is None else self.known & mask
        if self.offsets is None:
            return self.flat[rows]
        return self.flat[np.repeat(rows, np.diff(self.offsets))]


@dataclass(frozen=True)
class QueryResult:
    """What a query found."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    truncated: bool
    """Whether there was more than the limits let through."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of a stat's numbers in bins of equal width."""

    edges: Floats  # (B + 1,)
    counts: Integers  # (B,)
    unknown_rows: int


@dataclass(frozen=True)
class Correlation:
    """How two stats go together over the rows that have both."""

    pearson: float
    spearman: float
    rows: int


@dataclass(frozen=True, eq=False)
class CorrelationMatrix:
    """Spearman's rank correlation of every two stats, over the rows that have both."""

    names: tuple[str, ...]
    """As queries name the stats."""
    spearman: Floats
    """(S, S), NaN where it is not defined."""


@dataclass(frozen=True)
class DriftLine:
    """A stat of some rows beside that of all rows."""

    name: str
    """As queries name the stat."""
    median: float
    whole_median: float
    drift: Drift


@dataclass(frozen=True)
class Drift:
    """How far a stat of some rows is from that of all rows."""

    kolmogorov_smirnov: float
    """Largest distance of the two cumulative distributions, 0 to 1."""
    standardised_mean_difference: float
    """Difference of the means in standard deviations of all rows."""
    subset_values: int
    whole_values: int


class StatisticsTable:
    """The statistics of one data set. Values are read once and kept."""

    def __init__(self, root: Path, samples: pa.Table) -> None:
        self._root = root
        self._samples = samples
        self._cache: dict[tuple[str, str], tuple[tuple[str, ...], Values]] = {}
        self._remembered: dict[Hashable, Any] = {}
        self._lock = threading.Lock()
        self._database: tuple[object, duckdb.DuckDBPyConnection] | None = None

    @classmethod
    def open(cls, root: Path, data_key: str) -> StatisticsTable:
        """Open the statistics of a data set.

        Args:
            root: The folder `artifacts/statistics`.
            data_key: Names the data set.

        Raises:
            InvalidInput: the data set was not analysed, or its file cannot be read.
        """
        path = _samples_file(root, data_key)
        if not path.exists():
            raise InvalidInput(
                "No statistics", f"{path} does not exist", "analyse the data set first"
            )
        samples = _read_table(path, ["row", "id", "sample", "text", "images"])
        return cls(root, samples.sort_by("row").combine_chunks())

    @property
    def num_rows(self) -> int:
        """How many samples the data set has."""
        return int(self._samples.num_rows)

    def columns(self) -> tuple[ColumnSpec, ...]:
        """Return the columns on disk of this Data-Juicer version, by operator and key."""
        specs = []
        for path in (self._root / "columns").glob("*/column.json"):
            document = _read_document(path)
            if document.get("data_juicer") != SUPPORTED_VERSION:
                continue
            if document["operator"] in SOURCES or document["operator"] in OWN_SOURCES:
                specs.append(
                    ColumnSpec(
                        document["operator"],
                        document["parameters"],
                        document["models"],
                        tuple(document["stats"]),
                    )
                )
        return tuple(sorted(specs, key=lambda spec: (spec.operator, spec.key)))

    def has(self, spec: ColumnSpec) -> bool:
        """Tell whether any score of the column was ever written."""
        return bool(_part_names(self._root / "columns" / spec.key))

    def parts_of(self, operator: str | None = None) -> tuple[str, ...]:
        """Return what tells apart the states on disk of an operator's columns, or of all."""
        return tuple(
            f"{spec.key}/{name}"
            for spec in self.columns()
            if operator in (None, spec.operator)
            for name in _part_names(self._root / "columns" / spec.key)
        )

    def values(self, spec: ColumnSpec, stat: str | None = None) -> Values:
        """Return one stat of a column for every row, the column's first unless named.

        Raises:
            InvalidInput: the column has no such stat, or a part cannot be read.
        """
        stat = stat or spec.stats[0]
        if stat not in spec.stats:
            raise InvalidInput(
                "Unknown stat", f"{spec.operator}: {stat}", nearest(stat, spec.stats)
            )
        folder = self._root / "columns" / spec.key
        names = _part_names(folder)
        cached = self._cache.get((spec.key, stat))
        if cached is None or cached[0] != names:
            cached = (names, self._load(folder, spec, stat))
            self._cache[spec.key, stat] = cached
        return cached[1]

    def texts(self) -> list[str]:
        """Return the text of every row."""
        return self.remember("texts", lambda: list(self._samples["text"].to_pylist()))

    def remember(self, what: Hashable, compute: Callable[[], T]) -> T:
        """Return what `compute` made of the samples the first time; samples do not change."""
        if what not in self._remembered:
            self._remembered[what] = compute()
        made: T = self._remembered[what]
        return made

    def rows(self, positions: Sequence[int] | Integers) -> list[SampleRow]:
        """Return the samples at positions, in the order given."""
        taken = self._samples.take(pa.array(np.asarray(positions, dtype=np.int64)))
        return [
            SampleRow(row["id"], row["sample"], row["text"], tuple(row["images"] or ()))
            for row in taken.to_pylist()
        ]

    def histogram(
        self,
        spec: ColumnSpec,
        *,
        bins: int = 40,
        stat: str | None = None,
        mask: Mask | None = None,
        limits: tuple[float, float] | None = None,
    ) -> Histogram:
        """Count a stat's numbers in bins of equal width, of the rows in `mask` if it is given."""
        values = self._figures(spec, stat)
        numbers = values.numbers(mask)
        numbers = numbers[np.isfinite(numbers)]
        unknown = ~values.known if mask is None else ~values.known & mask
        counts, edges = np.histogram(numbers, bins=bins, range=limits)
        return Histogram(edges, counts.astype(np.int64), int(unknown.sum()))

    def quantiles(
        self,
        spec: ColumnSpec,
        probabilities: Sequence[float],
        *,
        stat: str | None = None,
        mask: Mask | None = None,
    ) -> Floats:
        """Return (len(probabilities),) quantiles of a stat's numbers, NaN when there are none."""
        numbers = self._figures(spec, stat).numbers(mask)
        if not len(numbers):
            return np.full(len(probabilities), np.nan)
        return np.asarray(np.quantile(numbers, probabilities), dtype=np.float64)

    def correlation(self, a: ColumnSpec, b: ColumnSpec) -> Correlation:
        """Correlate the main stats of two columns; a list counts as its mean.

        The coefficients are NaN where they are not defined: under two rows, or a constant stat.
        """
        first, second = self._figures(a).per_row(), self._figures(b).per_row()
        both = np.isfinite(first) & np.isfinite(second)
        x, y = first[both], second[both]
        return Correlation(_pearson(x, y), _pearson(_ranks(x), _ranks(y)), int(both.sum()))

    def drift(self, mask: Mask, spec: ColumnSpec, stat: str | None = None) -> Drift:
        """Compare a stat's numbers of the rows in `mask` (N,) with those of all rows.

        Raises:
            InvalidInput: there is nothing to compare.
        """
        values = self._figures(spec, stat)
        whole, subset = np.sort(values.numbers()), np.sort(values.numbers(mask))
        if not len(subset):
            raise InvalidInput(
                "Nothing to compare",
                f"{spec.operator}: no known value among the chosen rows",
                "choose rows that have one",
            )
        at = np.unique(whole)
        below_whole = np.searchsorted(whole, at, side="right") / len(whole)
        below_subset = np.searchsorted(subset, at, side="right") / len(subset)
        deviation = float(np.std(whole))
        difference = float(np.mean(subset) - np.mean(whole))
        return Drift(
            float(np.max(np.abs(below_whole - below_subset))),
            difference / deviation if deviation > 0 else 0.0,
            len(subset),
            len(whole),
        )

    def correlations(self) -> CorrelationMatrix:
        """Correlate every two stats by Spearman's coefficient; a list counts as its mean."""
        names = self._numeric_names()
        columns = [self.values(spec, stat).per_row() for spec, stat in names.values()]
        known = [np.isfinite(column) for column in columns]
        ranks = [_ranks(column) for column in columns]
        matrix = np.full((len(columns), len(columns)), np.nan)
        for i, first in enumerate(columns):
            for j in range(i + 1):
                both = known[i] & known[j]
                # Ranks of all rows are those of the common rows when no row lacks either.
                pair = (
                    (ranks[i], ranks[j])
                    if both.all()
                    else (_ranks(first[both]), _ranks(columns[j][both]))
                )
                matrix[i, j] = matrix[j, i] = _pearson(*pair)
        return CorrelationMatrix(tuple(names), matrix)

    def drifts(self, mask: Mask) -> tuple[DriftLine, ...]:
        """Return the drift of every stat that some row in `mask` (N,) has, the largest first."""
        lines = []
        for name, (spec, stat) in self._numeric_names().items():
            values = self.values(spec, stat)
            subset, whole = values.numbers(mask), values.numbers()
            if len(subset):
                drift = self.drift(mask, spec, stat)
                lines.append(
                    DriftLine(name, float(np.median(subset)), float(np.median(whole)), drift)
                )
        return tuple(sorted(lines, key=lambda line: -line.drift.kolmogorov_smirnov))

    def _numeric_names(self) -> dict[str, tuple[ColumnSpec, str]]:
        named = self.column_names()
        return {
            name: (spec, stat)
            for name, (spec, stat) in sorted(named.items(), key=lambda item: item[1][0].operator)
            if stat in spec.numeric_stats and self.values(spec, stat).known.any()
        }

    def _figures(self, spec: ColumnSpec, stat: str | None = None) -> Values:
        """Return a stat that is a number, the column's main one unless named."""
        values = self.values(spec, stat or spec.main_stat)
        if spec.kind(values.stat) == "string":
            raise InvalidInput("Not a number", f"{spec.operator}: {stat}", "choose another stat")
        return values

    def column_names(self) -> dict[str, tuple[ColumnSpec, str]]:
        """Return the names that queries use for the stats.

        A stat goes by its own key. Where columns share one, the column with default parameters has
        it, and the others add the start of their column key.
        """
        names: dict[str, tuple[ColumnSpec, str]] = {}
        for spec in sorted(self.columns(), key=lambda spec: (not _is_default(spec), spec.key)):
            for stat in spec.stats:
                names[stat if stat not in names else f"{stat}_{spec.key[:6]}"] = (spec, stat)
        return names

    def query(
        self,
        sql: str,
        limit_rows: int = 100,
        timeout_s: float = 5.0,
        *,
        limit_bytes: int = MAX_RESULT_BYTES,
    ) -> QueryResult:
        """Run one SELECT over the view `samples`: row, id, sample, text, images and every stat.

        The database is in memory and can reach neither files nor network.

        Args:
            sql: One statement in DuckDB's dialect.
            limit_rows: Most rows that are returned.
            timeout_s: Seconds after which it is interrupted.
            limit_bytes: Most bytes of text that are returned.

        Raises:
            InvalidInput: not one SELECT, or the database refuses it.
            SynthAgentError: it took too long.
        """
        with self._lock:
            database = self._open_database()
            _check_select(database, sql)
            timer = threading.Timer(timeout_s, database.interrupt)
            timer.start()
            try:
                # The newline ends a comment that the statement may close with.
                cursor = database.execute(
                    f"SELECT * FROM (\n{sql.strip().rstrip(';')}\n) LIMIT {limit_rows + 1}"
                )
                columns = tuple(column[0] for column in cursor.description or ())
                rows = cursor.fetchall()
            except duckdb.InterruptException as error:
                raise SynthAgentError(
                    "Query took too long", f"more than {timeout_s:g} s", "ask for less at a time"
                ) from error
            except duckdb.Error as error:
                raise _refused(error) from error
            finally:
                timer.cancel()
        return _bounded(columns, rows, limit_rows, limit_bytes)

    def _open_database(self) -> duckdb.DuckDBPyConnection:
        """Return the database, with the view built anew when columns changed on disk."""
        names = self.column_names()
        state = {
            name: (spec.key, stat, _part_names(self._root / "columns" / spec.key))
            for name, (spec, stat) in names.items()
        }
        if self._database is not None and self._database[0] == state:
            return self._database[1]
        view = self._samples
        for name, (spec, stat) in names.items():
            view = view.append_column(name, _arrow(self.values(spec, stat), spec.kind(stat)))
        database = duckdb.connect(":memory:")
        database.register("samples", view)
        for setting in (
            f"memory_limit = '{QUERY_MEMORY}'",
            "threads = 2",
            "temp_directory = ''",
            "autoinstall_known_extensions = false",
            "autoload_known_extensions = false",
            "python_enable_replacements = false",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            database.execute(f"SET {setting}")
        self._database = (state, database)
        return database

    def _load(self, folder: Path, spec: ColumnSpec, stat: str) -> Values:
        kind = spec.kind(stat)
        schema = pa.schema({"sample": pa.string(), stat: _ARROW[kind], "error": pa.string()})
        # The first of equal samples is found below, and the latest has to win.
        tables = [_read_table(part, schema.names).cast(schema) for part in _parts(folder)][::-1]
        parts = pa.concat_tables([_reverse(table) for table in tables] or [schema.empty_table()])
        found = pc.index_in(
            self._samples["sample"].combine_chunks(), parts["sample"].combine_chunks()
        )
        rows = parts.take(found)
        return _values(stat, kind, rows[stat].combine_chunks(), rows["error"].combine_chunks())


def _values(stat: str, kind: Kind, stored: Any, error: Any) -> Values:
    """Return arrow values, aligned with the rows of a data set, as numpy arrays."""
    messages = {
        int(row): str(error[int(row)])
        for row in np.flatnonzero(error.is_valid().to_numpy(zero_copy_only=False))
    }
    known = stored.is_valid().to_numpy(zero_copy_only=False).copy()
    known[list(messages)] = False
    if kind == "string":
        words = stored.dictionary_encode()
        flat = words.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.float64)
        return Values(stat, flat, None, known, messages, tuple(words.dictionary.to_pylist()))
    if kind == "number":
        flat = _to_floats(stored)
        return Values(stat, flat, None, known & ~np.isnan(flat), messages)
    lengths = pc.list_value_length(stored).fill_null(0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    flat = _to_floats(stored.flatten())
    bad = np.concatenate(([0], np.cumsum(np.isnan(flat), dtype=np.int64)))
    known &= bad[offsets[1:]] == bad[offsets[:-1]]
    return Values(stat, flat, offsets, known, messages)


def _to_floats(array: Any) -> Floats:
    return np.asarray(array.fill_null(np.nan).to_numpy(zero_copy_only=False), dtype=np.float64)


def _as_compared(scores: Any) -> Any:
    """Return scores as filters get to see them in a run.

    Between scoring and comparing, a run's data set holds scores as JSON of ten decimals, which also
    turns what is not finite into null. Reading such a number back is not correctly rounded, so only
    the same encoder gives the same bits.
    """
    from pandas.io.json import (  # type: ignore[import-untyped]
        ujson_dumps,
        ujson_loads,
    )

    return ujson_loads(ujson_dumps(scores.to_pylist()))


def _arrow(values: Values, kind: Kind) -> Any:
    """Return values as an arrow array with nulls where nothing is known."""
    unknown = pa.array(~values.known)
    if kind == "string":
        words = [values.words[int(i)] if i >= 0 else None for i in values.flat]
        return pa.array(words, pa.string(), mask=~values.known)
    if values.offsets is None:
        return pa.array(values.flat, mask=~values.known)
    offsets = pa.array(values.offsets.astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values.flat), mask=unknown)


def _is_default(spec: ColumnSpec) -> bool:
    if spec.operator in OWN_SOURCES:
        return True
    known = load_catalogue().parameters(spec.operator)
    return all(
        value == known[name].default
        for name, value in spec.parameters.items()
        if name not in spec.models
    )


def _check_select(database: duckdb.DuckDBPyConnection, sql: str) -> None:
    try:
        statements = database.extract_statements(sql)
    except duckdb.Error as error:
        raise _refused(error) from error
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise InvalidInput("Not a query", sql.strip()[:200], "write one SELECT statement")


def _refused(error: duckdb.Error) -> InvalidInput:
    return InvalidInput(
        "Query failed",
        str(error).strip().splitlines()[0],
        "the view is `samples`; its columns are row, id, sample, text, images and the stats",
    )


def _bounded(
    columns: tuple[str, ...], rows: Sequence[tuple[Any, ...]], limit_rows: int, limit_bytes: int
) -> QueryResult:
    kept: list[tuple[Any, ...]] = []
    size = 0
    for row in rows[:limit_rows]:
        size += len(json.dumps(row, default=str, ensure_ascii=False).encode())
        if size > limit_bytes:
            break
        kept.append(row)
    return QueryResult(columns, tuple(kept), len(kept) < len(rows))


def _pearson(x: Floats, y: Floats) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(numbers: Floats) -> Floats:
    """Return ranks from 0; equal numbers share the mean of theirs."""
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[inverse], dtype=np.float64)


def _samples_file(root: Path, data_key: str) -> Path:
    if not _DATA_KEY.fullmatch(data_key):
        raise InvalidInput("Bad data key", repr(data_key), "use letters, digits, '-', '_' and '.'")
    return root / "samples" / f"{data_key}.parquet"


def _number(part: Path) -> int:
    match = _PART.fullmatch(part.name)
    assert match is not None
    return int(match[1])


def _part_names(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(p.name for p in folder.iterdir() if _PART.fullmatch(p.name)))
    except FileNotFoundError:
        return ()


def _parts(folder: Path) -> list[Path]:
    """Return a column's parts, the oldest first."""
    return sorted((folder / name for name in _part_names(folder)), key=_number)


def _reverse(table: pa.Table) -> pa.Table:
    return table.take(pa.array(np.arange(table.num_rows)[::-1]))


def _read_table(path: Path, columns: Sequence[str]) -> Any:
    try:
        return pq.read_table(path, use_threads=False).select(list(columns))
    except (pa.ArrowException, KeyError, OSError) as error:
        raise InvalidInput(
            "Statistics cannot be read",
            f"{path}: {str(error).splitlines()[0]}",
            "delete this file and analyse the data set again",
        ) from error


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not {"operator", "parameters", "models", "stats"} <= set(document):
            raise ValueError("a field is missing")
    except (ValueError, TypeError) as error:
        raise InvalidInput(
            "Statistics cannot be read", f"{path}: {error}", "delete its folder and analyse again"
        ) from error
    return dict(document)


def _write_table(table: pa.Table, path: Path) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    _publish(path, sink.getvalue())


def _publish(path: Path, content: Any) -> None:
    """Write a file that appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
