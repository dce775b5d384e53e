"""What a recipe would keep, worked out from the statistics table in place of a run.

Every threshold filter is decided as Data-Juicer decides it: closed and open bounds, reversed ranges,
any or all of a sample's pictures, and samples without pictures. Where a run's outcome cannot be
known, this says so and says why; it never estimates. A run's cap on samples comes after the recipe
and is not part of this.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from synth_agent.catalogue import load_catalogue
from synth_agent.errors import InvalidInput, SynthAgentError
from synth_agent.recipes import Operator, Recipe
from synth_agent.statistics import (
    ColumnSpec,
    Integers,
    Mask,
    SampleRow,
    StatisticsTable,
    Values,
    column_spec,
)

DEDUPLICATOR = "document_deduplicator"
KEPT = -1
STRATA = 10

_OPTION_DEFAULTS = {
    "text_keys": "text",
    "image_key": "images",
    "image_special_token": "<__dj__image>",
    "eoc_special_token": "<|__dj__eoc|>",
}
_SIZE_UNITS = {f"{letter}{i}b": 10 * n for n, letter in enumerate("kmgtpezy", 1) for i in ("", "i")}
_NOT_LETTERS = regex.compile(rf"\s+|\d+|[{regex.escape(string.punctuation)}]")
_OUTCOMES = {
    "mapper": "it changes samples, so their scores are not those of the table",
    "selector": "what it selects depends on the samples that are left",
    "deduplicator": "the table does not hold its hashes",
    "grouper": "it joins samples",
    "aggregator": "it joins samples",
    "filter": "the table does not hold its scores",
    "pipeline": "it makes samples of its own",
}
_SEVERAL = "a data plan has an outcome for each branch"


@dataclass(frozen=True)
class Rule:
    """How a filter decides, given the scores of a sample."""

    bounds: tuple[tuple[str, str, str], ...]
    """Stats, each with the parameters of its lower and upper bound; empty where it has none. An
    element of a list has to satisfy all of them. The one stat of an operator that names it by its
    parameters goes without a name."""
    keeps_empty: bool = True
    """What happens to a sample whose list is empty."""
    drops: bool = False
    """Whether satisfying the bounds is what drops a sample, and reversing the range does nothing."""
    sizes: bool = False
    """Whether bounds are sizes such as 10KB."""
    one_of: tuple[str, str] | None = None
    """A stat that is a string, and the parameter that lists the strings allowed."""


def _between(stat: str, what: str) -> Rule:
    return Rule(((stat, f"min_{what}", f"max_{what}"),))


RULES: Mapping[str, Rule] = {
    "text_length_filter": _between("text_len", "len"),
    "words_num_filter": _between("num_words", "num"),
    "character_repetition_filter": _between("char_rep_ratio", "ratio"),
    "word_repetition_filter": _between("word_rep_ratio", "ratio"),
    "special_characters_filter": _between("special_char_ratio", "ratio"),
    "alphanumeric_filter": _between("", "ratio"),
    "average_line_length_filter": _between("avg_line_length", "len"),
    "maximum_line_length_filter": _between("max_line_length", "len"),
    "text_action_filter": Rule((("num_action", "min_action_num", ""),)),
    "text_entity_dependency_filter": Rule(
        (("num_dependency_edges", "min_dependency_num", ""),), keeps_empty=False
    ),
    "language_id_score_filter": Rule((("lang_score", "min_score", ""),), one_of=("lang", "lang")),
    "flagged_words_filter": _between("flagged_words_ratio", "ratio"),
    "stopwords_filter": _between("stopwords_ratio", "ratio"),
    "perplexity_filter": _between("perplexity", "ppl"),
    "token_num_filter": _between("num_token", "num"),
    "image_shape_filter": Rule(
        (("image_width", "min_width", "max_width"), ("image_height", "min_height", "max_height"))
    ),
    "image_size_filter": Rule((("image_sizes", "min_size", "max_size"),), sizes=True),
    "image_aspect_ratio_filter": _between("aspect_ratios", "ratio"),
    "image_text_similarity_filter": _between("image_text_similarity", "score"),
    "image_text_matching_filter": _between("image_text_matching_score", "score"),
    "image_pair_similarity_filter": _between("image_pair_similarity", "score"),
    "image_aesthetics_filter": _between("image_aesthetics_scores", "score"),
    "image_watermark_filter": Rule((("image_watermark_prob", "", "prob_threshold"),)),
    "image_nsfw_filter": _between("image_nsfw_score", "score"),
    "image_face_count_filter": _between("face_counts", "face_count"),
    "image_face_ratio_filter": _between("face_ratios", "ratio"),
    "image_subplot_filter": Rule(
        (
            ("image_subplot_confidence", "min_confidence", ""),
            ("horizontal_peak_count", "min_horizontal_lines", ""),
            ("vertical_peak_count", "min_vertical_lines", ""),
        ),
        drops=True,
    ),
    "phrase_grounding_recall_filter": _between("phrase_grounding_recall", "recall"),
}
"""The decision of every filter that the statistics table can hold."""


@dataclass(frozen=True)
class OperatorRetention:
    """What one operator of a recipe would leave."""

    name: str
    before: int | None
    """Samples that reach it; None when that is not known."""
    after: int | None
    known: bool
    why: str = ""
    """Why it is not known, or what is worth knowing though it is."""
    column: ColumnSpec | None = None
    """The scores that decide, of a filter that is known."""


@dataclass(frozen=True, eq=False)
class Retention:
    """What a recipe would leave of a data set of N samples."""

    operators: tuple[OperatorRetention, ...]
    keep: Mask
    """(N,) the samples that are left; while `known` is False, those that reach the first operator
    whose outcome is not known."""
    dropped_by: npt.NDArray[np.int32] = field(repr=False)
    """(N,) position of the operator that drops a sample, KEPT for those in `keep`."""

    @property
    def known(self) -> bool:
        """Whether every operator's outcome is known."""
        return all(operator.known for operator in self.operators)

    @property
    def kept(self) -> int | None:
        """How many samples are left; None when that is not known."""
        return int(self.keep.sum()) if self.known else None


@dataclass(frozen=True)
class Example:
    """A sample that an operator kept or dropped."""

    row: int
    sample: SampleRow
    values: Mapping[str, tuple[float, ...] | str]
    """Its scores under their stats keys; empty for a deduplicator."""


@dataclass(frozen=True)
class Examples:
    """Samples that reached one operator, by what it did to them."""

    kept: tuple[Example, ...]
    dropped: tuple[Example, ...]


@dataclass(frozen=True)
class _Decision:
    """(N,) rows that an operator lets pass, or why that is not known."""

    passes: Mask | None
    why: str = ""
    column: ColumnSpec | None = None


@dataclass(frozen=True)
class _Earlier:
    """What the operators before one have left behind.

    Data-Juicer keeps scores and hashes under their keys alone, whatever parameters and models made
    them: an operator that finds its keys compares what an earlier one wrote.
    """

    model_digest: Callable[[str], str]
    columns: dict[tuple[str, ...], tuple[int, ColumnSpec]] = field(default_factory=dict)
    """The first operator that wrote these stats, and the column that it wrote."""
    hashes: dict[str, tuple[int, tuple[bool, bool]]] = field(default_factory=dict)
    """The first deduplicator, and its `lowercase` and `ignore_non_character`."""


def retention(
    recipe: Recipe, table: StatisticsTable, model_digest: Callable[[str], str]
) -> Retention:
    """Work out what every operator of a recipe would leave.

    Args:
        recipe: A linear recipe that was checked; parameters that it leaves out have their defaults.
            Of a data plan nothing is known here: its branches have outcomes of their own.
        table: The statistics of the data set that it would run on.
        model_digest: Called with a model parameter's value, returns the content's digest.
    """
    keep = np.ones(table.num_rows, dtype=bool)
    dropped_by = np.full(table.num_rows, KEPT, dtype=np.int32)
    if recipe.data_plan is not None:
        branches = OperatorRetention("branches", table.num_rows, None, False, _SEVERAL)
        return Retention((branches,), keep, dropped_by)
    operators: list[OperatorRetention] = []
    earlier = _Earlier(model_digest)
    unknown = _foreign_option(recipe)
    for position, operator in enumerate(recipe.operators):
        before = int(keep.sum())
        if unknown:
            reached = before if position == 0 else None
            operators.append(OperatorRetention(operator.name, reached, None, False, unknown))
            continue
        if before == 0:
            operators.append(OperatorRetention(operator.name, 0, 0, True, "no sample is left"))
            continue
        try:
            decision = _decide(operator, position, keep, table, earlier)
        except SynthAgentError as error:
            decision = _Decision(None, f"{error.title}: {error.message}")
        if decision.passes is None:
            unknown = f"it follows {operator.name}, whose outcome is not known"
            operators.append(OperatorRetention(operator.name, before, None, False, decision.why))
            continue
        dropped_by[keep & ~decision.passes] = position
        keep &= decision.passes
        after, why = int(keep.sum()), decision.why
        operators.append(
            OperatorRetention(operator.name, before, after, True, why, decision.column)
        )
    return Retention(tuple(operators), keep, dropped_by)


def examples(
    retention: Retention, operator_index: int, table: StatisticsTable, count: int, seed: int
) -> Examples:
    """Draw samples that an operator kept and dropped, spread over the range of its scores.

    Args:
        retention: The outcome to illustrate, of this table.
        operator_index: The operator's position in the recipe.
        table: The statistics that the retention was worked out from.
        count: Most samples of each kind.
        seed: The same seed draws the same samples.

    Raises:
        InvalidInput: the operator's outcome is not known.
    """
    operator = retention.operators[operator_index]
    if not operator.known:
        raise InvalidInput(
            "No examples",
            f"{operator.name}: {operator.why}",
            "score the seed set with `synth-agent analyze`; what no score decides, a run shows",
        )
    dropped = retention.dropped_by == operator_index
    passed = (retention.dropped_by > operator_index) | (retention.dropped_by == KEPT)
    order = np.zeros(table.num_rows)
    if operator.column is not None:
        order = table.values(operator.column, operator.column.main_stat).per_row()
    generator = np.random.default_rng(seed)
    drawn = [
        _stratified(np.flatnonzero(rows), order, count, generator) for rows in (passed, dropped)
    ]
    return Examples(*(_examples(rows, table, operator.column) for rows in drawn))


def size_in_bytes(text: str) -> float:
    """Return a size as Data-Juicer reads it: all digits, then all letters as a unit of 1024s.

    Raises:
        InvalidInput: no digits, or an unknown unit.
    """
    digits = "".join(character for character in text if character.isdecimal())
    unit = "".join(character for character in text if character.isalpha()).lower()
    if not digits or (unit and unit not in _SIZE_UNITS):
        raise InvalidInput("Not a size", repr(text), "write a number of bytes, or one like 10KB")
    return float(digits) * 2.0 ** _SIZE_UNITS.get(unit, 0)


def _foreign_option(recipe: Recipe) -> str | None:
    """Return why the table cannot tell anything about a recipe, None when it can."""
    for name, default in _OPTION_DEFAULTS.items():
        if recipe.options.get(name, default) != default:
            return f"the recipe sets {name}, and the table was made without it"
    return None


def _decide(
    operator: Operator, position: int, keep: Mask, table: StatisticsTable, earlier: _Earlier
) -> _Decision:
    """Decide which rows an operator lets pass, given those that reach it.

    Raises:
        SynthAgentError: a model is missing, a part of the table cannot be read, or a bound is bad.
    """
    if operator.name not in RULES and operator.name != DEDUPLICATOR:
        spec = load_catalogue().operators.get(operator.name)
        return _Decision(None, _OUTCOMES[spec.kind] if spec else "Data-Juicer does not have it")
    known = load_catalogue().parameters(operator.name)
    parameters = {name: p.default for name, p in known.items()} | dict(operator.parameters)
    if operator.name == DEDUPLICATOR:
        return _decide_duplicates(parameters, position, keep, table, earlier)
    column = column_spec(operator.name, parameters, earlier.model_digest)
    if column is None:
        return _Decision(None, "it reads another field, or a model that the recipe does not name")
    first, compared = earlier.columns.setdefault(column.stats, (position, column))
    why = "" if compared.key == column.key else f"it compares the scores of operator {first + 1}"
    if not table.has(compared):
        return _Decision(None, "the table does not hold its scores under these parameters")
    values = {stat: table.values(compared, stat) for stat in compared.stats}
    if gap := _gap(values, keep):
        return _Decision(None, gap)
    return _Decision(_passes(RULES[operator.name], parameters, values), why, compared)


def _decide_duplicates(
    parameters: Mapping[str, Any],
    position: int,
    keep: Mask,
    table: StatisticsTable,
    earlier: _Earlier,
) -> _Decision:
    if parameters["text_key"] != _OPTION_DEFAULTS["text_keys"]:
        return _Decision(None, "it reads another field than the text")
    own = (bool(parameters["lowercase"]), bool(parameters["ignore_non_character"]))
    first, compared = earlier.hashes.setdefault(DEDUPLICATOR, (position, own))
    why = "" if compared == own else f"it compares the hashes of operator {first + 1}"
    return _Decision(_first_of_each(*compared, keep, table), why)


def _gap(values: Mapping[str, Values], keep: Mask) -> str:
    """Return why scores of rows that reach a filter are missing, nothing when all are there."""
    for stat in values.values():
        missing = keep & ~stat.known
        if not missing.any():
            continue
        failed = [row for row in stat.errors if keep[row]]
        if failed:
            return f"{stat.stat} failed on {_samples(len(failed))}: {stat.errors[failed[0]]}"
        return f"{stat.stat} is missing on {_samples(int(missing.sum()))}"
    return ""


def _samples(count: int) -> str:
    return f"{count:,} sample" if count == 1 else f"{count:,} samples"


def _passes(rule: Rule, parameters: Mapping[str, Any], values: Mapping[str, Values]) -> Mask:
    """Apply a filter's rule to (N,) rows; what it says of rows without values means nothing."""
    scores = [values[stat] if stat else next(iter(values.values())) for stat, _, _ in rule.bounds]
    satisfied = np.ones(len(scores[0].flat), dtype=bool)
    for stat, (_, low, high) in zip(scores, rule.bounds, strict=True):
        satisfied &= _inside(stat.flat, low, high, rule, parameters)
    if scores[0].offsets is not None:
        satisfied = _any_or_all(satisfied, scores[0].offsets, parameters["any_or_all"], rule)
    if rule.one_of and parameters[rule.one_of[1]]:
        satisfied &= _is_one_of(values[rule.one_of[0]], parameters[rule.one_of[1]])
    return satisfied


def _inside(
    scores: npt.NDArray[np.float64],
    low: str,
    high: str,
    rule: Rule,
    parameters: Mapping[str, Any],
) -> Mask:
    """Tell which numbers lie inside bounds; (V,) like `scores`."""
    reverse = parameters["reversed_range"] and not rule.drops
    closed_low = rule.drops or parameters["min_closed_interval"] != reverse
    closed_high = rule.drops or parameters["max_closed_interval"] != reverse
    inside = np.ones(len(scores), dtype=bool)
    if (bound := _bound(low, rule, parameters)) is not None:
        inside &= scores >= bound if closed_low else scores > bound
    if (bound := _bound(high, rule, parameters)) is not None:
        inside &= scores <= bound if closed_high else scores < bound
    return ~inside if reverse else inside


def _bound(name: str, rule: Rule, parameters: Mapping[str, Any]) -> float | None:
    value = parameters[name] if name else None
    if value is None:
        return None
    return float(size_in_bytes(value) if rule.sizes else value)


def _any_or_all(satisfied: Mask, offsets: Integers, mode: str, rule: Rule) -> Mask:
    """Return (N,) rows, from (V,) elements of their lists."""
    # Unlike reduceat, differences of running counts are right for empty lists too.
    counts = np.concatenate(([0], np.cumsum(satisfied, dtype=np.int64)))
    hits = counts[offsets[1:]] - counts[offsets[:-1]]
    lengths = np.diff(offsets)
    rows = hits > 0 if mode == "any" else hits == lengths
    if rule.drops:
        rows = ~rows
    rows[lengths == 0] = rule.keeps_empty
    return np.asarray(rows, dtype=bool)


def _is_one_of(values: Values, allowed: str | list[str]) -> Mask:
    words = [allowed] if isinstance(allowed, str) else allowed
    codes = [code for code, word in enumerate(values.words) if word in words]
    return np.isin(values.flat, codes)


def _first_of_each(
    lowercase: bool, ignore_non_character: bool, keep: Mask, table: StatisticsTable
) -> Mask:
    """Return (N,) rows whose text no earlier row of `keep` has."""
    codes = _text_codes(table, lowercase, ignore_non_character)
    rows = np.flatnonzero(keep)
    first = np.empty(table.num_rows, dtype=np.int64)
    # Of equal indices the last assignment stays, so the rows go backwards.
    first[codes[rows[::-1]]] = rows[::-1]
    passes = np.zeros(table.num_rows, dtype=bool)
    passes[rows] = first[codes[rows]] == rows
    return passes


def _text_codes(table: StatisticsTable, lowercase: bool, ignore_non_character: bool) -> Integers:
    """Return (N,) numbers that are equal where the deduplicator's texts are."""

    def compute() -> Integers:
        numbers: dict[str, int] = {}
        codes = np.empty(table.num_rows, dtype=np.int64)
        for row, text in enumerate(table.texts()):
            if lowercase:
                text = text.lower()
            if ignore_non_character:
                text = _NOT_LETTERS.sub("", text)
            codes[row] = numbers.setdefault(text.strip(), len(numbers))
        return codes

    return table.remember(("text codes", lowercase, ignore_non_character), compute)


def _stratified(
    rows: Integers,
    order: npt.NDArray[np.float64],
    count: int,
    generator: np.random.Generator,
) -> list[int]:
    """Draw up to `count` rows, as evenly as possible from equal shares of their order."""
    ordered = rows[np.argsort(order[rows], kind="stable")]
    if len(ordered) <= count:
        return [int(row) for row in ordered]
    strata = np.array_split(ordered, min(count, STRATA))
    shares = np.full(len(strata), count // len(strata))
    shares[generator.permutation(len(strata))[: count % len(strata)]] += 1
    drawn: list[int] = []
    for stratum, share in zip(strata, shares, strict=True):
        chosen = generator.choice(len(stratum), size=int(share), replace=False)
        drawn += [int(row) for row in stratum[np.sort(chosen)]]
    return drawn


def _examples(
    rows: list[int], table: StatisticsTable, column: ColumnSpec | None
) -> tuple[Example, ...]:
    stats = column.stats if column else ()
    values = {stat: table.values(column, stat) for stat in stats} if column else {}
    return tuple(
        Example(row, sample, {stat: values[stat].at(row) for stat in stats})
        for row, sample in zip(rows, table.rows(rows), strict=True)
    )
