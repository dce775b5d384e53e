"""The statistics table: what decides a column, parts on disk, values, queries and figures."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from synth_agent.errors import InvalidInput, SynthAgentError
from synth_agent.stages.datajuicer import guard
from synth_agent.statistics import (
    SOURCES,
    ColumnSpec,
    ColumnWriter,
    SampleRow,
    StatisticsTable,
    column_spec,
    write_samples,
)

DATA = "0123abcd"
TEXTS = ("", "one", "one one one", "Zwei!\nthree", "a" * 30, "the end <|__dj__eoc|>")


def name_of(model: str) -> str:
    """A stand-in for a content digest."""
    return f"digest of {model}"


def spec_of(operator: str, **parameters: Any) -> ColumnSpec:
    """The column of an operator that surely has one."""
    spec = column_spec(operator, parameters, name_of)
    assert spec is not None
    return spec


def make_table(
    root: Path, count: int, *columns: tuple[ColumnSpec, Mapping[str, Sequence[Any]]]
) -> StatisticsTable:
    """A data set of `count` samples and columns of as many values."""
    names = [f"s{i}" for i in range(count)]
    write_samples(root, DATA, [SampleRow(f"id-{n}", n, f"text {n}", (f"{n}.jpg",)) for n in names])
    for spec, values in columns:
        ColumnWriter(root, spec).append(names, values)
    return StatisticsTable.open(root, DATA)


LENGTH = spec_of("text_length_filter")
SIMILARITY = spec_of("image_text_similarity_filter", hf_clip="models/clip")
SHAPE = spec_of("image_shape_filter")
LANGUAGE = spec_of("language_id_score_filter")


# What decides a column.


@pytest.mark.parametrize(
    ("operator", "one", "other", "same"),
    [
        ("text_length_filter", {"min_len": 1}, {"min_len": 5, "reversed_range": True}, True),
        ("text_length_filter", {"batch_size": 8}, {"num_proc": 0}, True),
        ("character_repetition_filter", {}, {"rep_len": 10}, True),
        ("character_repetition_filter", {"rep_len": 2}, {"rep_len": 10}, False),
        ("word_repetition_filter", {"rep_len": 2}, {}, False),
        ("words_num_filter", {"lang": "zh"}, {"lang": "en"}, True),
        ("words_num_filter", {"lang": "zh", "tokenization": True}, {"tokenization": True}, False),
        ("alphanumeric_filter", {"tokenization": True}, {}, False),
        ("language_id_score_filter", {"lang": "en"}, {"lang": ["de"], "min_score": 0.1}, True),
        ("text_action_filter", {"lang": "zh"}, {"lang": "en"}, False),
        ("perplexity_filter", {"lang": "zh"}, {"max_ppl": 10}, False),
        ("stopwords_filter", {"words_aug_join_char": "-"}, {}, True),
        ("stopwords_filter", {"words_aug_join_char": "-", "use_words_aug": True}, {}, False),
        ("flagged_words_filter", {"flagged_words_dir": "a"}, {"flagged_words_dir": "b"}, False),
        ("image_text_similarity_filter", {"hf_clip": "a"}, {"hf_clip": "b"}, False),
        ("image_text_similarity_filter", {"reduce_mode": "max"}, {}, False),
        ("image_text_similarity_filter", {"vertical_flip": True}, {}, False),
        ("image_text_similarity_filter", {"any_or_all": "all"}, {"max_score": 0.5}, True),
        ("image_text_matching_filter", {"horizontal_flip": True}, {}, False),
        ("phrase_grounding_recall_filter", {"iou_thr": 1}, {"iou_thr": 1.0}, True),
        ("phrase_grounding_recall_filter", {"conf_thr": 0.5}, {"min_recall": 0.5}, False),
        ("image_subplot_filter", {"min_confidence": 0.1}, {"any_or_all": "all"}, True),
        ("image_subplot_filter", {"min_vertical_lines": 9}, {}, False),
        ("image_shape_filter", {"min_width": 5}, {"max_height": 9}, True),
        ("token_num_filter", {"hf_tokenizer": "a"}, {"hf_tokenizer": "b"}, False),
    ],
)
def test_a_column_depends_on_what_changes_its_values(
    operator: str, one: dict[str, Any], other: dict[str, Any], same: bool
) -> None:
    assert (spec_of(operator, **one).key == spec_of(operator, **other).key) is same


def test_the_model_counts_by_its_content() -> None:
    def content(model: str) -> str:
        return {"models/a": "1", "models/b": "1", "models/c": "2"}[model]

    keys = [
        column_spec("image_watermark_filter", {"hf_watermark_model": f"models/{name}"}, content)
        for name in "abc"
    ]
    first, second, third = (spec.key for spec in keys if spec)
    assert first == second != third
    # This operator chooses the model's class by the path's text.
    aesthetics = [
        column_spec("image_aesthetics_filter", {"hf_scorer_model": f"models/{name}"}, content)
        for name in "ab"
    ]
    assert len({spec.key for spec in aesthetics if spec}) == 2


@pytest.mark.parametrize(
    ("operator", "parameters"),
    [
        ("whitespace_normalization_mapper", {}),
        ("suffix_filter", {}),
        ("no_such_filter", {}),
        ("text_length_filter", {"text_key": "query"}),
        ("image_shape_filter", {"image_key": "pictures"}),
        ("image_aesthetics_filter", {}),
    ],
)
def test_no_column_where_other_things_decide(operator: str, parameters: dict[str, Any]) -> None:
    assert column_spec(operator, parameters, name_of) is None


def test_the_document_is_what_the_key_is_of(tmp_path: Path) -> None:
    spec = spec_of("character_repetition_filter", rep_len=3, max_ratio=0.1)
    assert spec.document() == {
        "operator": "character_repetition_filter",
        "parameters": {"rep_len": 3},
        "models": {},
        "data_juicer": "1.6.1",
        "stats": ["char_rep_ratio"],
    }
    assert len(spec.key) == 24
    assert make_table(tmp_path, 1, (spec, {"char_rep_ratio": [0.5]})).columns() == (spec,)


WITHOUT_MODEL = (
    "text_length_filter",
    "words_num_filter",
    "character_repetition_filter",
    "word_repetition_filter",
    "special_characters_filter",
    "alphanumeric_filter",
    "average_line_length_filter",
    "maximum_line_length_filter",
    "image_shape_filter",
    "image_size_filter",
    "image_aspect_ratio_filter",
)


@pytest.mark.parametrize("operator", WITHOUT_MODEL)
def test_data_juicer_writes_these_stats_whatever_the_thresholds(
    operator: str, tmp_path: Path
) -> None:
    guard()
    from data_juicer.ops import OPERATORS

    picture = tmp_path / "picture.png"
    Image.new("RGB", (30, 20)).save(picture)
    spec = spec_of(operator)

    def score(**parameters: Any) -> list[dict[str, Any]]:
        made = OPERATORS.modules[operator](**parameters)
        rows: dict[str, list[Any]] = {
            "text": list(TEXTS),
            "images": [[str(picture)] * (i % 3) for i in range(len(TEXTS))],
            "__dj__stats__": [{} for _ in TEXTS],
        }
        stats = made.compute_stats(rows)["__dj__stats__"]
        assert all(set(row) == set(spec.stats) for row in stats)
        return [{key: np.asarray(value).tolist() for key, value in row.items()} for row in stats]

    plain = score()
    assert score(reversed_range=True, min_closed_interval=False) == plain
    for stat, kind in SOURCES[operator].stats.items():
        assert {type(row[stat]) is list for row in plain} == {kind == "list"}
    if "rep_len" in SOURCES[operator].parameters:
        assert score(rep_len=1) != plain


# Parts on disk.


def test_later_parts_win_and_rows_share_a_sample(tmp_path: Path) -> None:
    samples = [SampleRow(str(i), f"s{i % 2}", "", ()) for i in range(4)]
    write_samples(tmp_path, DATA, [*samples, SampleRow("4", "s2", "", ())])
    writer = ColumnWriter(tmp_path, LENGTH)
    writer.append(["s0", "s1", "s0", "elsewhere"], {"text_len": [1, 2, 3, 4]})
    table = StatisticsTable.open(tmp_path, DATA)
    before = table.values(LENGTH)
    assert before.flat[:4].tolist() == [3, 2, 3, 2]
    writer.append(["s1", "s2"], {"text_len": [7, 8]}, [None, "broken"])
    after = table.values(LENGTH)
    assert after.flat[:4].tolist() == [3, 7, 3, 7]
    assert after.known.tolist() == [True] * 4 + [False]
    assert after.errors == {4: "broken"}
    assert table.values(LENGTH) is after
    assert ColumnWriter(tmp_path, LENGTH).known() == {"s0", "s1", "s2", "elsewhere"}


def test_parts_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    table = make_table(tmp_path, 1, (LENGTH, {"text_len": [1]}))
    writer = ColumnWriter(tmp_path, LENGTH)
    part = writer.append(["s0"], {"text_len": [2]})
    part.rename(part.with_name("part-1000000.parquet"))
    later = writer.append(["s0"], {"text_len": [3]})
    assert later.name == "part-1000001.parquet"
    later.rename(later.with_name("part-999999.parquet"))
    assert table.values(LENGTH).flat.tolist() == [2]


def test_a_part_appears_complete_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(tmp_path, 1, (LENGTH, {"text_len": [1]}))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        ColumnWriter(tmp_path, LENGTH).append(["s0"], {"text_len": [2]})
    monkeypatch.undo()
    assert table.values(LENGTH).flat.tolist() == [1]
    assert list((tmp_path / "columns" / LENGTH.key).glob("*.partial"))
    ColumnWriter(tmp_path, LENGTH).append(["s0"], {"text_len": [3]})
    assert table.values(LENGTH).flat.tolist() == [3]
    assert not list((tmp_path / "columns" / LENGTH.key).glob("*.partial"))


WRITE_FOREVER = """
import itertools, sys
from pathlib import Path
from synth_agent.statistics import ColumnWriter, column_spec
writer = ColumnWriter(Path(sys.argv[1]), column_spec("text_length_filter", {}, str))
for number in itertools.count():
    names = [f"{number}-{i}" for i in range(500)]
    writer.append(names, {"text_len": [number] * 500})
"""


def test_a_killed_writer_leaves_whole_parts(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(tmp_path)])
    folder = tmp_path / "columns" / LENGTH.key
    deadline = time.monotonic() + 300
    while len(list(folder.glob("part-*.parquet"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    known = ColumnWriter(tmp_path, LENGTH).known()
    parts = list(folder.glob("part-*.parquet"))
    assert len(parts) >= 5
    assert len(known) == 500 * len(parts)


def test_bad_files_are_named(tmp_path: Path) -> None:
    table = make_table(tmp_path, 1, (LENGTH, {"text_len": [1]}))
    folder = tmp_path / "columns" / LENGTH.key
    (folder / "part-000001.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(InvalidInput, match=r"part-000001\.parquet.*delete this file"):
        table.values(LENGTH)
    pq.write_table(pa.table({"sample": ["s0"]}), folder / "part-000001.parquet")
    with pytest.raises(InvalidInput, match=r"part-000001\.parquet"):
        table.values(LENGTH)
    (folder / "column.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"column\.json: a field is missing"):
        table.columns()
    with pytest.raises(InvalidInput, match="analyse the data set first"):
        StatisticsTable.open(tmp_path, "other")
    with pytest.raises(InvalidInput, match="Bad data key"):
        StatisticsTable.open(tmp_path, "../other")


def test_columns_of_another_version_are_passed_over(tmp_path: Path) -> None:
    table = make_table(tmp_path, 1, (LENGTH, {"text_len": [1]}), (SHAPE, _shape([[1]])))
    document = tmp_path / "columns" / SHAPE.key / "column.json"
    document.write_text(document.read_text().replace("1.6.1", "1.7.0"))
    assert table.columns() == (LENGTH,)


def _shape(widths: list[list[int]]) -> dict[str, list[list[int]]]:
    return {"image_width": widths, "image_height": widths}


def test_the_writer_wants_every_stat(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_height"):
        ColumnWriter(tmp_path, SHAPE).append(["s0"], {"image_width": [[1]]})


# Values.


def test_lists_keep_their_shape(tmp_path: Path) -> None:
    scores = [[0.25, 0.75], [], None, [0.5], [float("nan"), 0.25], [None]]
    table = make_table(tmp_path, 6, (SIMILARITY, {"image_text_similarity": scores}))
    values = table.values(SIMILARITY)
    assert values.offsets is not None
    assert values.offsets.tolist() == [0, 2, 2, 2, 3, 5, 6]
    assert values.known.tolist() == [True, True, False, True, False, False]
    assert [values.at(0), values.at(1), values.at(3)] == [(0.25, 0.75), (), (0.5,)]
    np.testing.assert_array_equal(values.per_row()[1:3], [np.nan, np.nan])
    np.testing.assert_allclose(values.per_row()[[0, 3]], [0.5, 0.5])
    assert values.numbers().tolist() == [0.25, 0.75, 0.5]
    assert values.numbers(np.arange(6) > 0).tolist() == [0.5]


def test_means_of_many_lists_are_right(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    widths = [generator.integers(1, 5000, n).tolist() for n in generator.integers(0, 4, 500)]
    table = make_table(tmp_path, 500, (SHAPE, _shape(widths)))
    expected = [np.mean(row) if row else np.nan for row in widths]
    np.testing.assert_allclose(table.values(SHAPE, "image_height").per_row(), expected)
    with pytest.raises(InvalidInput, match="did you mean 'image_width'"):
        table.values(SHAPE, "image_with")


def test_numbers_are_stored_with_ten_decimals(tmp_path: Path) -> None:
    numbers = [50 / 103, -8.24e-07, 1e-11, float("inf"), 7, 123456.75, np.float32(0.1)]
    table = make_table(tmp_path, 7, (LENGTH, {"text_len": numbers}))
    values = table.values(LENGTH)
    expected = [0.4854368932, -8.24e-07, 0, 7, 123456.75, 0.1000000015]
    np.testing.assert_allclose(values.flat[[0, 1, 2, 4, 5, 6]], expected, rtol=1e-14)
    assert values.known.tolist() == [True] * 3 + [False] + [True] * 3


def test_strings_are_words(tmp_path: Path) -> None:
    languages = {"lang": ["en", None, "de"], "lang_score": [0.5, None, 0.25]}
    table = make_table(tmp_path, 3, (LANGUAGE, languages))
    values = table.values(LANGUAGE)
    assert (values.at(0), values.at(2)) == ("en", "de")
    assert values.known.tolist() == [True, False, True]
    assert table.values(LANGUAGE, "lang_score").at(2) == (0.25,)


def test_rows_are_the_samples(tmp_path: Path) -> None:
    table = make_table(tmp_path, 20)
    assert table.num_rows == 20
    assert table.rows([7, 3]) == [
        SampleRow("id-s7", "s7", "text s7", ("s7.jpg",)),
        SampleRow("id-s3", "s3", "text s3", ("s3.jpg",)),
    ]
    assert table.texts()[19] == "text s19"


# Queries.


@pytest.fixture
def queried(tmp_path: Path) -> StatisticsTable:
    """100 samples with a list, a number, a string, and one stat under two parameters."""
    two, ten = (spec_of("character_repetition_filter", rep_len=n) for n in (2, 10))
    lengths: list[int | None] = list(range(100))
    lengths[5] = None
    return make_table(
        tmp_path,
        100,
        (LENGTH, {"text_len": lengths}),
        (SIMILARITY, {"image_text_similarity": [[i / 100] * (i % 3) for i in range(100)]}),
        (LANGUAGE, {"lang": ["en", "de"] * 50, "lang_score": [0.5] * 100}),
        (two, {"char_rep_ratio": [0.2] * 100}),
        (ten, {"char_rep_ratio": [0.1] * 100}),
    )


def test_queries_see_every_stat(queried: StatisticsTable) -> None:
    two = spec_of("character_repetition_filter", rep_len=2)
    result = queried.query(
        f"SELECT id, images, text_len, image_text_similarity, lang, char_rep_ratio,"
        f" char_rep_ratio_{two.key[:6]} AS two FROM samples WHERE row IN (5, 8) ORDER BY row DESC"
        " -- the last first"
    )
    assert result.columns[:3] == ("id", "images", "text_len")
    assert result.rows == (
        ("id-s8", ["s8.jpg"], 8.0, [0.08, 0.08], "en", 0.1, 0.2),
        ("id-s5", ["s5.jpg"], None, [0.05, 0.05], "de", 0.1, 0.2),
    )
    assert not result.truncated
    counts = queried.query("SELECT lang, count(*) FROM samples GROUP BY lang ORDER BY lang;")
    assert counts.rows == (("de", 50), ("en", 50))


def test_queries_see_columns_that_come_later(queried: StatisticsTable, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="num_words"):
        queried.query("SELECT num_words FROM samples")
    writer = ColumnWriter(tmp_path, spec_of("words_num_filter"))
    writer.append(["s0"], {"num_words": [4]})
    assert queried.query("SELECT sum(num_words) FROM samples").rows == ((4.0,),)


def test_queries_are_bounded(queried: StatisticsTable) -> None:
    cut = queried.query("SELECT row FROM samples ORDER BY row", limit_rows=3)
    assert cut.rows == ((0,), (1,), (2,))
    assert cut.truncated
    assert not queried.query("SELECT row FROM samples LIMIT 3", limit_rows=3).truncated
    large = queried.query("SELECT repeat('x', 1000) FROM samples", limit_bytes=5100)
    assert (len(large.rows), large.truncated) == (5, True)
    started = time.monotonic()
    with pytest.raises(SynthAgentError, match="Query took too long"):
        queried.query("SELECT count(*) FROM range(10000000) a, range(10000000) b", timeout_s=0.3)
    assert time.monotonic() - started < 60
    assert queried.query("SELECT 1").rows == ((1,),)


@pytest.mark.parametrize(
    "expression",
    [
        "length(repeat('x', 2000000000) || repeat('y', 2000000000))",
        "length(array_to_string(range(50000000), 'x'))",
        "length(rpad('x', 2000000000, 'y'))",
        "len(list_resize([1], 900000000, 2))",
    ],
)
def test_no_function_takes_the_memory_or_the_time_of_the_machine(
    queried: StatisticsTable, expression: str
) -> None:
    # The database counts neither for single functions and cannot interrupt them.
    with pytest.raises(SynthAgentError, match="Query took too|Query failed"):
        queried.query(f"SELECT {expression}", timeout_s=1.0)
    children = psutil.Process().children(recursive=True)
    assert all(child.memory_info().rss < 2**30 for child in children)
    assert queried.query("SELECT 1").rows == ((1,),)


def test_the_process_of_queries_ends_with_the_table(tmp_path: Path) -> None:
    table = make_table(tmp_path, 3)
    before = set(psutil.Process().children())
    table.query("SELECT 1")
    [child] = set(psutil.Process().children()) - before
    assert not any(name.startswith("OPENAI_") for name in child.environ())
    del table
    gc.collect()
    assert not child.is_running()


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1; SELECT 2",
        "",
        "DROP VIEW samples",
        "CREATE TABLE t AS SELECT 1",
        "SET threads = 1",
        "RESET enable_external_access",
        "COPY samples TO '{folder}/out.csv'",
        "EXPORT DATABASE '{folder}/out'",
        "ATTACH '{folder}/out.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "PRAGMA database_list",
        "CALL pragma_version()",
        "SELECT 1) TO '{folder}/out.csv' --",
        "SELECT * FROM read_text('{folder}/secret.txt')",
        "SELECT * FROM read_csv('{folder}/secret.txt')",
        "SELECT * FROM '{folder}/secret.csv'",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM read_text('https://localhost/x')",
        "SELECT getenv('HOME')",
        "SELECT * FROM Path",
    ],
)
def test_queries_reach_nothing_else(queried: StatisticsTable, tmp_path: Path, sql: str) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secret.csv").write_text("secret\n1\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInput, match="Not a query|Query failed"):
        queried.query(sql.format(folder=tmp_path))
    assert sorted(tmp_path.rglob("*")) == before
    assert queried.query("SELECT count(*) FROM samples").rows == ((100,),)


# Figures.


def test_histogram_and_quantiles(tmp_path: Path) -> None:
    lengths = [float(i) for i in range(10)] + [None]
    table = make_table(tmp_path, 11, (LENGTH, {"text_len": lengths}))
    histogram = table.histogram(LENGTH, bins=5)
    assert histogram.counts.tolist() == [2] * 5
    assert histogram.edges.tolist() == pytest.approx([0, 1.8, 3.6, 5.4, 7.2, 9])
    assert histogram.unknown_rows == 1
    part = table.histogram(LENGTH, bins=2, mask=np.arange(11) < 3, limits=(0, 10))
    assert (part.counts.tolist(), part.unknown_rows) == ([3, 0], 0)
    assert table.quantiles(LENGTH, [0, 0.5, 1]).tolist() == [0, 4.5, 9]
    assert np.isnan(table.quantiles(LENGTH, [0.5], mask=np.arange(11) == 10)).all()
    assert table.histogram(LENGTH, mask=np.arange(11) == 10).counts.sum() == 0


def test_correlation_is_over_rows_with_both(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    x = generator.integers(0, 9, 80).astype(float)
    lists = [[v**3, v**3] if i % 4 else [] for i, v in enumerate(x)]
    table = make_table(
        tmp_path,
        80,
        (LENGTH, {"text_len": x.tolist()}),
        (SIMILARITY, {"image_text_similarity": lists}),
        (LANGUAGE, {"lang": ["en"] * 80, "lang_score": [0.5] * 80}),
    )
    both = np.arange(80) % 4 > 0
    found = table.correlation(LENGTH, SIMILARITY)
    assert found.rows == 60
    assert found.spearman == pytest.approx(1)
    assert found.pearson == pytest.approx(np.corrcoef(x[both], x[both] ** 3)[0, 1])
    constant = table.correlation(LENGTH, LANGUAGE)
    assert (np.isnan(constant.pearson), constant.rows) == (True, 80)
    assert table.quantiles(LANGUAGE, [0.5]).tolist() == [0.5]
    with pytest.raises(InvalidInput, match="Not a number"):
        table.histogram(LANGUAGE, stat="lang")


def test_ties_share_their_rank(tmp_path: Path) -> None:
    table = make_table(
        tmp_path,
        4,
        (LENGTH, {"text_len": [1, 1, 2, 3]}),
        (spec_of("words_num_filter"), {"num_words": [1, 2, 2, 3]}),
    )
    expected = np.corrcoef([0.5, 0.5, 2, 3], [0, 1.5, 1.5, 3])[0, 1]
    found = table.correlation(LENGTH, spec_of("words_num_filter"))
    assert found.spearman == pytest.approx(expected)


def test_drift_against_its_definition(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    numbers = np.round(generator.normal(size=300), 1)
    table = make_table(tmp_path, 300, (LENGTH, {"text_len": numbers.tolist()}))
    mask = (numbers > 0.3) | (generator.random(300) < 0.2)
    subset = numbers[mask]
    distances = [abs(np.mean(subset <= at) - np.mean(numbers <= at)) for at in numbers]
    drift = table.drift(mask, LENGTH)
    assert drift.kolmogorov_smirnov == pytest.approx(max(distances))
    shift = (subset.mean() - numbers.mean()) / numbers.std()
    assert drift.standardised_mean_difference == pytest.approx(shift)
    assert (drift.subset_values, drift.whole_values) == (mask.sum(), 300)
    same = table.drift(np.ones(300, dtype=bool), LENGTH)
    assert (same.kolmogorov_smirnov, same.standardised_mean_difference) == (0, 0)
    with pytest.raises(InvalidInput, match="Nothing to compare"):
        table.drift(np.zeros(300, dtype=bool), LENGTH)


def test_the_matrix_holds_every_pair(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    lengths = generator.integers(0, 20, 50).astype(float)
    lists = [[v, v + 1] if i % 5 else [] for i, v in enumerate(generator.normal(size=50))]
    table = make_table(
        tmp_path,
        50,
        (LENGTH, {"text_len": lengths.tolist()}),
        (SIMILARITY, {"image_text_similarity": lists}),
        (LANGUAGE, {"lang": ["en"] * 50, "lang_score": [0.5] * 50}),
    )
    matrix = table.correlations()
    assert set(matrix.names) == {"text_len", "image_text_similarity", "lang_score"}
    i, j = matrix.names.index("text_len"), matrix.names.index("image_text_similarity")
    expected = table.correlation(LENGTH, SIMILARITY).spearman
    assert matrix.spearman[i, j] == matrix.spearman[j, i] == pytest.approx(expected)
    assert matrix.spearman[i, i] == pytest.approx(1)
    assert np.isnan(matrix.spearman[i, matrix.names.index("lang_score")])


def test_drifts_are_sorted_and_leave_out_what_no_row_has(tmp_path: Path) -> None:
    words = spec_of("words_num_filter")
    table = make_table(
        tmp_path,
        8,
        (LENGTH, {"text_len": [1, 2, 3, 4, 5, 6, 7, 8]}),
        (words, {"num_words": [3, 4] * 4}),
        (SIMILARITY, {"image_text_similarity": [[]] * 4 + [[0.5]] * 4}),
    )
    mask = np.arange(8) < 4
    first, second = table.drifts(mask)
    assert (first.name, first.median, first.whole_median) == ("text_len", 2.5, 4.5)
    assert first.drift == table.drift(mask, LENGTH)
    assert first.drift.kolmogorov_smirnov == 0.5
    assert (second.name, second.drift.kolmogorov_smirnov) == ("num_words", 0.0)
