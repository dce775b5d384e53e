"""Retention against the real Data-Juicer operators, on scores that are given and that they compute."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synth_agent.catalogue import load_catalogue
from synth_agent.errors import InvalidInput
from synth_agent.recipes import Operator, Recipe
from synth_agent.retention import (
    KEPT,
    RULES,
    Rule,
    examples,
    retention,
    size_in_bytes,
)
from synth_agent.stages.datajuicer import guard
from synth_agent.statistics import (
    SOURCES,
    ColumnWriter,
    SampleRow,
    StatisticsTable,
    column_spec,
    write_samples,
)

ROWS = 60
CASES = 16
DATA = "data"
STATS = "__dj__stats__"
ROW = "row"
GRID = [0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 0.8, 0.9999999999, 1.0, 2.0, 3.0, 10.0]
COUNTS = [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 64.0, 1024.0, 2048.0, 15360.0]
SIZES = ["0", "1KB", "2 KiB", "1.5KB", "10", "15kb", "1MB", "1TB", "0010"]
WORDS = ("en", "de", "zh")
MODELS = {
    "flagged_words_filter": "flagged_words_dir",
    "stopwords_filter": "stopwords_dir",
    "image_face_count_filter": "cv_classifier",
    "image_face_ratio_filter": "cv_classifier",
    "image_aesthetics_filter": "hf_scorer_model",
}


def name_of(model: str) -> str:
    """A stand-in for a content digest."""
    return f"digest of {model}"


@pytest.fixture(scope="module")
def operators(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str, Mapping[str, Any]], Any]]:
    """Build real operators. Models that some load at once are left out: no score is computed."""
    guard()
    from data_juicer.ops import OPERATORS
    from data_juicer.utils.lazy_loader import LazyLoader

    words = tmp_path_factory.mktemp("words")
    for kind in ("flagged_words", "stopwords"):
        (words / f"{kind}.json").write_text(json.dumps({"en": ["the"]}), "utf-8")
    patch = pytest.MonkeyPatch()
    patch.setattr(LazyLoader, "check_packages", lambda *_: None)

    def build(name: str, parameters: Mapping[str, Any]) -> Any:
        module = importlib.import_module(OPERATORS.modules[name].__module__)
        if hasattr(module, "prepare_model"):
            patch.setattr(module, "prepare_model", lambda **_: None)
        given = dict(parameters)
        if MODELS.get(name, "").endswith("_dir"):
            given[MODELS[name]] = str(words)
        return OPERATORS.modules[name](**given)

    yield build
    patch.undo()


def write_table(
    root: Path, operator: str, parameters: Mapping[str, Any], values: Mapping[str, Sequence[Any]]
) -> StatisticsTable:
    """Write one column for as many rows as it has values."""
    rows = len(next(iter(values.values())))
    samples = [SampleRow(f"id {i}", f"digest {i}", f"text {i}", ()) for i in range(rows)]
    write_samples(root, DATA, samples)
    spec = column_spec(operator, parameters, name_of)
    assert spec is not None
    ColumnWriter(root, spec).append([sample.sample for sample in samples], values)
    return StatisticsTable.open(root, DATA)


def recipe_of(*steps: tuple[str, Mapping[str, Any]], **options: Any) -> Recipe:
    """A recipe without a file."""
    made = tuple(Operator(name, dict(parameters)) for name, parameters in steps)
    return Recipe("test", "test", "", made, options)


def draw_values(operator: str, generator: np.random.Generator) -> dict[str, list[Any]]:
    """Scores of `ROWS` rows that often lie exactly on a bound; a third of the lists are empty."""
    source, rule = SOURCES[operator], RULES[operator]
    grid = COUNTS if rule.sizes or operator.endswith(("shape_filter", "num_filter")) else GRID
    lengths = generator.choice([0, 0, 1, 1, 2, 3], ROWS)
    values: dict[str, list[Any]] = {}
    for stat, kind in source.stats.items():
        if kind == "string":
            values[stat] = generator.choice(WORDS, ROWS).tolist()
        elif kind == "number":
            values[stat] = generator.choice(grid, ROWS).tolist()
        else:
            values[stat] = [generator.choice(grid, n).tolist() for n in lengths]
    return values


def draw_parameters(operator: str, generator: np.random.Generator) -> dict[str, Any]:
    """Thresholds in any order, any kind of interval, any or all."""
    rule: Rule = RULES[operator]
    known = load_catalogue().parameters(operator)
    drawn: dict[str, Any] = {}
    for switch in ("min_closed_interval", "max_closed_interval", "reversed_range"):
        if generator.random() < 0.7:
            drawn[switch] = bool(generator.random() < 0.5)
    for bound in [name for _, low, high in rule.bounds for name in (low, high) if name]:
        if generator.random() < 0.2:
            continue
        whole = known[bound].accepts == ("int",)
        value = float(generator.choice(COUNTS if whole else GRID))
        drawn[bound] = str(generator.choice(SIZES)) if rule.sizes else value
        if whole:
            drawn[bound] = int(value)
    if "any_or_all" in known and generator.random() < 0.8:
        drawn["any_or_all"] = str(generator.choice(["any", "all"]))
    if rule.one_of:
        choices: list[Any] = ["", "en", ["en", "de"], ["fr"], []]
        drawn["lang"] = choices[generator.integers(len(choices))]
    return drawn


def kept_by(operator: Any, values: Mapping[str, Sequence[Any]]) -> list[bool]:
    """Ask the operator itself which rows it keeps."""
    from datasets.utils.json import ujson_dumps, ujson_loads

    rows = len(next(iter(values.values())))
    stats = [{stat: values[stat][row] for stat in values} for row in range(rows)]
    # What a data set of scores does to them between scoring and comparing.
    stats = ujson_loads(ujson_dumps(stats))
    if operator.is_batched_op():
        return [bool(kept) for kept in operator.process({STATS: stats})]
    return [bool(operator.process({STATS: row})) for row in stats]


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_filter_decides_as_data_juicer_does(
    name: str, tmp_path: Path, operators: Callable[..., Any]
) -> None:
    generator = np.random.default_rng(sorted(RULES).index(name))
    model = {MODELS[name]: "models/some"} if name in MODELS else {}
    shares = []
    for case in range(CASES):
        # The subplot filter's numbers of lines are thresholds that its scores depend on as well.
        parameters = draw_parameters(name, generator) | model
        values = draw_values(name, generator)
        table = write_table(tmp_path / str(case), name, parameters, values)
        outcome = retention(recipe_of((name, parameters)), table, name_of)
        assert outcome.known, outcome.operators
        expected = kept_by(operators(name, parameters), values)
        assert outcome.keep.tolist() == expected, (parameters, values)
        assert outcome.kept == sum(expected) == outcome.operators[0].after
        assert outcome.operators[0].before == ROWS
        shares.append(sum(expected) / ROWS)
    assert len(set(shares)) > 1


def test_alphanumeric_by_tokens_has_its_own_stat(
    tmp_path: Path, operators: Callable[..., Any]
) -> None:
    parameters = {"tokenization": True, "min_ratio": 0.3, "max_ratio": 0.9}
    values = {"alpha_token_ratio": np.random.default_rng(0).choice(GRID, ROWS).tolist()}
    table = write_table(tmp_path, "alphanumeric_filter", parameters, values)
    outcome = retention(recipe_of(("alphanumeric_filter", parameters)), table, name_of)
    expected = kept_by(operators("alphanumeric_filter", parameters), values)
    assert outcome.keep.tolist() == expected
    plain = recipe_of(("alphanumeric_filter", parameters | {"tokenization": False}))
    assert not retention(plain, table, name_of).known


def test_sizes_are_read_as_data_juicer_reads_them() -> None:
    guard()
    from data_juicer.utils.mm_utils import size_to_bytes

    for text in (*SIZES, "7 GiB", "1e3", "12yb", "1,000 kb"):
        try:
            expected = size_to_bytes(text)
        except ValueError:
            with pytest.raises(InvalidInput, match="Not a size"):
                size_in_bytes(text)
        else:
            assert size_in_bytes(text) == expected
    with pytest.raises(InvalidInput, match="Not a size"):
        size_in_bytes("KB")


def test_rules_and_sources_account_for_every_parameter() -> None:
    assert set(RULES) == set(SOURCES)
    catalogue = load_catalogue()
    for name, rule in RULES.items():
        source = SOURCES[name]
        bounds = {bound for _, low, high in rule.bounds for bound in (low, high) if bound}
        accounted = bounds | {"any_or_all", "trust_remote_code"} | set(source.only_with)
        accounted |= set(source.parameters) | set(source.models)
        accounted |= {rule.one_of[1]} if rule.one_of else set()
        own = set(catalogue.operators[name].parameters)
        assert own <= accounted, name
        assert bounds <= own, name
        stats = {stat for stat, _, _ in rule.bounds if stat} | {(rule.one_of or [""])[0]} - {""}
        assert stats == set(source.stats) or source.tokenized_stats, name


# Recipes that run for real, on samples whose scores Data-Juicer computed.

Run = Callable[[Sequence[tuple[str, Mapping[str, Any]]]], list[list[int]]]
COMPUTED = (
    ("text_length_filter", {}),
    ("words_num_filter", {}),
    ("character_repetition_filter", {"rep_len": 10}),
    ("character_repetition_filter", {"rep_len": 2}),
    ("word_repetition_filter", {"rep_len": 2}),
    ("special_characters_filter", {}),
    ("alphanumeric_filter", {}),
    ("average_line_length_filter", {}),
    ("maximum_line_length_filter", {}),
    ("image_shape_filter", {}),
    ("image_size_filter", {}),
    ("image_aspect_ratio_filter", {}),
)


def draw_records(folder: Path, count: int) -> list[dict[str, Any]]:
    """Samples with repeated texts, several lines and none to three pictures."""
    chooser = random.Random(7)
    pictures = []
    for index, size in enumerate([(8, 8), (8, 16), (40, 10), (64, 64)]):
        pictures.append(str(folder / f"{index}.png"))
        noise = np.random.default_rng(index).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(pictures[-1])
    words = ["red", "Red", "blue", "box", "box.", "42", "sign", "!!", "\n", "the the the"]
    records = []
    for _ in range(count):
        images = chooser.sample(pictures, chooser.choice([0, 1, 1, 2, 3]))
        text = " ".join(chooser.choice(words) for _ in range(chooser.randint(0, 9)))
        if records and chooser.random() < 0.3:
            text = chooser.choice(records)["text"]
            text = chooser.choice([text, text.upper(), f" {text}\x1c", f"{text} 7"])
        text = "<__dj__image>" * len(images) + text + chooser.choice(["", " <|__dj__eoc|>"])
        records.append({"text": text, "images": images, ROW: len(records)})
    return records


def score_directly(operator: Any, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what `compute_stats` gives, without a data set around it."""
    batch: dict[str, list[Any]] = {key: [r[key] for r in records] for key in ("text", "images")}
    batch[STATS] = [{} for _ in records]
    return list(operator.compute_stats(batch)[STATS])


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> tuple[StatisticsTable, Run]:
    """A table of scores that Data-Juicer computed, and a way to run operators on its samples."""
    guard()
    from data_juicer.core.data import NestedDataset
    from data_juicer.ops import OPERATORS

    root = tmp_path_factory.mktemp("computed")
    records = draw_records(root, 120)
    samples = [SampleRow(str(r[ROW]), f"s{r[ROW]}", r["text"], tuple(r["images"])) for r in records]
    write_samples(root, DATA, samples)

    def build(name: str, parameters: Mapping[str, Any]) -> Any:
        return OPERATORS.modules[name](**{**parameters, "num_proc": 0, "skip_op_error": False})

    for name, parameters in COMPUTED:
        spec = column_spec(name, parameters, name_of)
        assert spec is not None
        stats = score_directly(build(name, parameters), records)
        ColumnWriter(root, spec).append(
            [sample.sample for sample in samples],
            {stat: [row[stat] for row in stats] for stat in spec.stats},
        )

    def run(steps: Sequence[tuple[str, Mapping[str, Any]]]) -> list[list[int]]:
        dataset, left = NestedDataset.from_list(records), []
        for name, parameters in steps:
            dataset = build(name, parameters).run(dataset)
            left.append(list(dataset[ROW]) if len(dataset) else [])
            if not left[-1]:
                break
        return left

    return StatisticsTable.open(root, DATA), run


@pytest.mark.parametrize("choice", [3, 5, 6, 7])
def test_scores_are_kept_as_a_run_compares_them(
    computed: tuple[StatisticsTable, Run], tmp_path: Path, choice: int
) -> None:
    from data_juicer.core.data import NestedDataset
    from data_juicer.ops import OPERATORS

    name, parameters = COMPUTED[choice]
    spec = column_spec(name, parameters, name_of)
    assert spec is not None
    records = draw_records(tmp_path, 120)
    operator = OPERATORS.modules[name](**parameters, num_proc=0)
    held = [row[STATS] for row in operator.run(NestedDataset.from_list(records), reduce=False)]
    direct = score_directly(operator, records)
    for stat in spec.stats:
        stored = computed[0].values(spec, stat)
        kept = [np.atleast_1d(np.array(row[stat], dtype=float)).tolist() for row in held]
        assert [list(stored.at(row)) for row in range(len(records))] == kept
        assert any(
            np.any(np.asarray(a[stat]) != b[stat]) for a, b in zip(direct, held, strict=True)
        )


def assert_equal(
    steps: Sequence[tuple[str, Mapping[str, Any]]], table: StatisticsTable, run: Run
) -> None:
    outcome = retention(recipe_of(*steps), table, name_of)
    left = run(steps)
    assert outcome.known, outcome.operators
    assert np.flatnonzero(outcome.keep).tolist() == left[-1], steps
    counts = [len(rows) for rows in left] + [0] * (len(steps) - len(left))
    assert [operator.after for operator in outcome.operators] == counts
    assert [operator.before for operator in outcome.operators] == [table.num_rows, *counts[:-1]]


def test_whole_recipes_leave_what_a_run_leaves(computed: tuple[StatisticsTable, Run]) -> None:
    table, run = computed
    generator = np.random.default_rng(5)
    for _ in range(7):
        steps: list[tuple[str, Mapping[str, Any]]] = []
        for choice in generator.choice(len(COMPUTED) + 2, 3, replace=False):
            if choice >= len(COMPUTED):
                drawn = generator.random(2) < 0.5
                flags = {"lowercase": bool(drawn[0]), "ignore_non_character": bool(drawn[1])}
                steps.append(("document_deduplicator", flags))
                continue
            name, value_parameters = COMPUTED[choice]
            spec = column_spec(name, value_parameters, name_of)
            assert spec is not None
            stat, low, high = RULES[name].bounds[0]
            low_bound, high_bound = np.sort(generator.choice(table.values(spec).numbers(), 2))
            bounds: dict[str, Any] = {low: float(low_bound), high: float(high_bound)}
            if name in ("image_size_filter", "image_shape_filter") or "len" in low or "num" in low:
                bounds = {key: int(value) for key, value in bounds.items()}
            if name == "image_size_filter":
                bounds = {key: str(value) for key, value in bounds.items()}
            closed = {"min_closed_interval": bool(generator.random() < 0.5)}
            steps.append((name, {**value_parameters, **bounds, **closed}))
        assert_equal(steps, table, run)


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_the_first_of_equal_texts_is_kept(
    computed: tuple[StatisticsTable, Run], lowercase: bool, ignore: bool
) -> None:
    flags = {"lowercase": lowercase, "ignore_non_character": ignore}
    kept = retention(recipe_of(("document_deduplicator", flags)), computed[0], name_of).kept
    assert kept is not None
    assert kept < computed[0].num_rows
    assert_equal([("document_deduplicator", flags)], *computed)


def test_scores_and_hashes_are_used_again_under_other_parameters(
    computed: tuple[StatisticsTable, Run],
) -> None:
    table, run = computed
    steps: list[tuple[str, Mapping[str, Any]]] = [
        ("character_repetition_filter", {"rep_len": 10, "max_ratio": 0.9}),
        ("character_repetition_filter", {"rep_len": 2, "max_ratio": 0.1}),
        ("document_deduplicator", {}),
        ("document_deduplicator", {"ignore_non_character": True, "lowercase": True}),
    ]
    assert_equal(steps, table, run)
    outcome = retention(recipe_of(*steps), table, name_of)
    assert outcome.operators[1].why == "it compares the scores of operator 1"
    assert outcome.operators[3].why == "it compares the hashes of operator 3"
    assert outcome.operators[3].before == outcome.operators[3].after
    alone = retention(recipe_of(steps[1]), table, name_of)
    assert alone.kept != retention(recipe_of(*steps[:2]), table, name_of).kept


def test_nothing_left_ends_the_recipe(computed: tuple[StatisticsTable, Run]) -> None:
    outcome = retention(
        recipe_of(("text_length_filter", {"min_len": 9999}), ("clean_html_mapper", {})),
        computed[0],
        name_of,
    )
    assert outcome.known
    assert [(o.before, o.after) for o in outcome.operators] == [(120, 0), (0, 0)]


# What cannot be known.


@pytest.fixture
def lengths(tmp_path: Path) -> StatisticsTable:
    """A table of text lengths 0 to 9; row 9 failed, row 8 was not computed."""
    samples = [SampleRow(f"id {i}", f"digest {i}", f"text {i // 2}", ()) for i in range(10)]
    write_samples(tmp_path, DATA, samples)
    spec = column_spec("text_length_filter", {}, name_of)
    assert spec is not None
    writer = ColumnWriter(tmp_path, spec)
    writer.append([f"digest {i}" for i in range(8)], {"text_len": list(range(8))})
    writer.append(["digest 9"], {"text_len": [None]}, ["the picture is broken"])
    return StatisticsTable.open(tmp_path, DATA)


LENGTH = ("text_length_filter", {"min_len": 3})


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (("whitespace_normalization_mapper", {}), "it changes samples"),
        (("random_selector", {"select_ratio": 0.5}), "what it selects depends on the samples"),
        (("image_deduplicator", {}), "the table does not hold its hashes"),
        (("suffix_filter", {}), "the table does not hold its scores"),
        (("words_num_filter", {}), "under these parameters"),
        (("text_length_filter", {"text_key": "query"}), "it reads another field"),
        (("image_aesthetics_filter", {}), "a model that the recipe does not name"),
        (("no_such_filter", {}), "Data-Juicer does not have it"),
        (LENGTH, "text_len failed on 1 sample: the picture is broken"),
    ],
)
def test_the_unknown_is_named_and_hides_what_follows(
    lengths: StatisticsTable, step: tuple[str, Mapping[str, Any]], why: str
) -> None:
    outcome = retention(recipe_of(("document_deduplicator", {}), step, LENGTH), lengths, name_of)
    first, second, third = outcome.operators
    assert (first.before, first.after, first.known) == (10, 5, True)
    if step == LENGTH:
        # Row 9 repeats row 8, whose score is missing.
        why = "text_len is missing on 1 sample"
    assert (second.before, second.after, second.known) == (5, None, False)
    assert why in second.why
    assert (third.before, third.after, third.known) == (None, None, False)
    assert third.why == f"it follows {step[0]}, whose outcome is not known"
    assert outcome.kept is None
    assert outcome.keep.sum() == 5


def test_an_error_hides_the_outcome_only_where_its_row_is_left(lengths: StatisticsTable) -> None:
    outcome = retention(recipe_of(LENGTH), lengths, name_of)
    assert outcome.operators[0].why == "text_len failed on 1 sample: the picture is broken"
    assert not outcome.known


def test_an_option_that_changes_the_text_hides_everything(lengths: StatisticsTable) -> None:
    outcome = retention(recipe_of(LENGTH, text_keys="query"), lengths, name_of)
    assert (outcome.operators[0].before, outcome.operators[0].after) == (10, None)
    assert "text_keys" in outcome.operators[0].why
    same = recipe_of(("document_deduplicator", {}), text_keys="text", image_key="images")
    assert retention(same, lengths, name_of).known


def test_a_missing_model_and_a_bad_size_are_reasons(lengths: StatisticsTable) -> None:
    def missing(model: str) -> str:
        raise InvalidInput("Model folder is missing", model, "")

    outcome = retention(
        recipe_of(("image_text_similarity_filter", {"hf_clip": "models/x"})), lengths, missing
    )
    assert outcome.operators[0].why == "Model folder is missing: models/x"


def test_a_bad_size_is_a_reason(tmp_path: Path) -> None:
    table = write_table(tmp_path, "image_size_filter", {}, {"image_sizes": [[1.0], []]})
    outcome = retention(recipe_of(("image_size_filter", {"min_size": "10XB"})), table, name_of)
    assert outcome.operators[0].why == "Not a size: '10XB'"


# Examples.


def test_examples_are_spread_over_the_scores_and_repeatable(tmp_path: Path) -> None:
    scores = np.random.default_rng(2).permutation(1000) / 1000
    values = {"image_text_similarity": [[float(score)] for score in scores]}
    steps = ("image_text_similarity_filter", {"hf_clip": "m", "min_score": 0.5})
    table = write_table(tmp_path, *steps, values)
    recipe = recipe_of(("document_deduplicator", {}), steps)
    outcome = retention(recipe, table, name_of)
    drawn = examples(outcome, 1, table, 10, seed=3)
    assert drawn == examples(outcome, 1, table, 10, seed=3)
    assert drawn != examples(outcome, 1, table, 10, seed=4)
    for group, low in ((drawn.kept, 0.5), (drawn.dropped, 0.0)):
        found = sorted(float(example.values["image_text_similarity"][0]) for example in group)
        assert [int((score - low) * 20) for score in found] == list(range(10))
    assert all(outcome.dropped_by[example.row] == KEPT for example in drawn.kept)
    assert all(outcome.dropped_by[example.row] == 1 for example in drawn.dropped)
    assert drawn.kept[0].sample.text == f"text {drawn.kept[0].row}"
    repeated = examples(outcome, 0, table, 7, seed=0)
    assert (len(repeated.kept), repeated.dropped) == (7, ())
    assert repeated.kept[0].values == {}


def test_examples_of_one_operator_count_what_later_ones_drop(lengths: StatisticsTable) -> None:
    recipe = recipe_of(("document_deduplicator", {}), ("suffix_filter", {}))
    outcome = retention(recipe, lengths, name_of)
    drawn = examples(outcome, 0, lengths, 100, seed=0)
    assert [example.row for example in drawn.kept] == [0, 2, 4, 6, 8]
    assert [example.row for example in drawn.dropped] == [1, 3, 5, 7, 9]
    with pytest.raises(InvalidInput, match="No examples"):
        examples(outcome, 1, lengths, 5, seed=0)
