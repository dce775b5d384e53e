"""Data plans: their files, their checks, and what the process stage makes of them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mgm.data import InstructionDataset
from mgm.parity.text import load_tokenizer
from synth_agent.catalogue import load_catalogue
from synth_agent.data import ROW_ID_FIELD
from synth_agent.data_plans import Branch, DataPlan, Draw, Order
from synth_agent.effective import (
    Ladder,
    Training,
    effective,
    processed_effective,
    read_training_list,
)
from synth_agent.errors import InvalidInput
from synth_agent.plan_retention import plan_retention
from synth_agent.recipes import (
    Operator,
    Recipe,
    diff_recipes,
    dump_recipe,
    load_recipe,
    materialise,
    recipe_from_mapping,
    validate_recipe,
)
from synth_agent.runs import Cost, Proposal, dump_proposal, proposal_from
from synth_agent.stages.assemble import in_order, sort_by, without_repetitions
from synth_agent.statistics import (
    ColumnWriter,
    SampleRow,
    StatisticsTable,
    column_spec,
    write_samples,
)
from synth_agent.workspace import Settings, Workspace, stage_environment

ROOT = Path(__file__).parents[1]
MINI = ROOT / "synth_agent" / "miniworld" / "recipes"
OPTIONS = {
    "dataset_path": "data/seed/seed.jsonl",
    "export_path": "artifacts/plain/mine.jsonl",
    "np": 1,
    "auto_op_parallelism": False,
    "skip_op_error": False,
}
NUM_SAMPLES = 24
WORDS = [index % 6 + 1 for index in range(NUM_SAMPLES)]
"""Words of each caption."""
DRIVER = """
import json, random, sys
from synth_agent.stages.datajuicer import guard
from synth_agent.stages.process import main
guard()
import numpy
from data_juicer.ops.base_op import OPERATORS, Mapper

@OPERATORS.register_module("drawing_mapper")
class Drawing(Mapper):
    def process_single(self, sample):
        drawn = f"{random.random()} {numpy.random.rand()} <|__dj__eoc|>"
        return sample | {"text": "<__dj__image>" + drawn}

codes = [main(arguments) for arguments in json.loads(sys.argv[1])]
print(json.dumps(codes), file=sys.__stdout__)
"""
"""Runs the stage again and again, with one more operator, which draws at random."""


def branch(name: str = "one", *operators: tuple[str, Mapping[str, Any]], **more: Any) -> Branch:
    steps = tuple(Operator(name, dict(parameters)) for name, parameters in operators)
    return Branch(name, steps, **more)


def words(low: int, high: int) -> tuple[str, dict[str, Any]]:
    """Keep captions of so many words; the two markers count as words too."""
    return "words_num_filter", {"min_num": low + 2, "max_num": high + 2}


def plan_recipe(*branches: Branch, **more: Any) -> Recipe:
    recipe = Recipe("mine", "Mine", "", (), OPTIONS, data_plan=DataPlan(branches, **more))
    return materialise(recipe, load_catalogue())


SHORT, LONG = branch("short", words(1, 3)), branch("long", words(3, 6))
DETERMINISTIC = branch(
    "clean",
    words(2, 6),
    ("whitespace_normalization_mapper", {}),
    ("replace_content_mapper", {"pattern": "yes", "repl": "yes indeed"}),
    words(6, 9),
    ("document_deduplicator", {"lowercase": True}),
)
DRAWN = branch("drawn", ("drawing_mapper", {"num_proc": 0}))
PLANS = {
    "merged": plan_recipe(SHORT, replace(LONG, repeat=2, sample=Draw(5, 3))),
    "shuffled": plan_recipe(LONG, SHORT, deduplicate=True, order=Order("shuffled", 7)),
    "sorted": plan_recipe(
        SHORT,
        replace(LONG, repeat=2),
        order=Order("statistic", 0, Operator("words_num_filter", {}), "descending"),
    ),
    "random": Recipe(
        "mine", "Mine", "", (), OPTIONS, data_plan=DataPlan((DRAWN, replace(DRAWN, name="again")))
    ),
    "clean": plan_recipe(branch("all"), DETERMINISTIC),
    "few": plan_recipe(replace(SHORT, sample=Draw(500, 1)), branch("none", words(90, 99))),
    "empty": plan_recipe(branch("none", words(90, 99)), branch("nothing", words(80, 89))),
    "unordered": plan_recipe(
        SHORT, order=Order("statistic", 0, Operator("image_shape_filter", {}))
    ),
}
RUNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(PLANS, ()),
    "capped": ("--cap", "6", "--cap-seed", "5"),
    "random-again": (),
    "random-otherwise": ("--cap-seed", "6"),
}
RECIPE_OF = {"capped": "merged", "random-again": "random", "random-otherwise": "random"}


@dataclass(frozen=True)
class Ran:
    """What the process stage did with every plan of `RUNS`."""

    workspace: Workspace
    codes: Mapping[str, int]
    log: str

    def output(self, name: str) -> Path:
        return self.workspace.root / "artifacts" / name

    def json(self, name: str, file: str) -> Any:
        return json.loads((self.output(name) / file).read_text("utf-8"))

    def samples(self, name: str) -> list[dict[str, Any]]:
        lines = (self.output(name) / "processed.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def rows(self, name: str) -> list[int]:
        """Seed rows of the samples, in their order."""
        return [int(sample["id"].removeprefix("s")) for sample in self.samples(name)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Every plan through the stage, in one process that has loaded Data-Juicer once."""
    root = tmp_path_factory.mktemp("plans")
    workspace = Workspace(root, Settings())
    _write_seed(root / "data" / "seed")
    arguments = []
    for name, more in RUNS.items():
        recipe = PLANS[RECIPE_OF.get(name, name)]
        (root / f"{name}.yaml").write_text(dump_recipe(replace(recipe, name=name)), "utf-8")
        flags = ["--recipe", f"{name}.yaml", "--seed", "data/seed/seed.jsonl", *more]
        flags += ["--images", "data/seed", "--original", "data/seed/stage_1.json"]
        flags += ["--output", f"artifacts/{name}", "--progress", f"{name}.progress.jsonl"]
        arguments.append(flags)
    made = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(arguments)],
        cwd=root,
        env=stage_environment(workspace) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    codes = json.loads(made.stdout.splitlines()[-1])
    return Ran(workspace, dict(zip(RUNS, codes, strict=True)), made.stderr)


def _write_seed(folder: Path) -> None:
    """24 captions of one to six words; the second half repeats the first's in upper case."""
    (folder / "images").mkdir(parents=True)
    records, original = [], []
    for row, count in enumerate(WORDS):
        Image.new("RGB", (8 + row, 8), (row * 10, 0, 0)).save(folder / "images" / f"{row}.png")
        caption = " ".join(["yes"] * (count - 1) + [f"n{row % 12}"])
        caption = caption.upper() if row >= 12 else caption
        text = f"<__dj__image>\n{caption} <|__dj__eoc|>"
        picture = f"images/{row}.png"
        records.append({"id": f"s{row}", "images": [picture], "text": text})
        asked = {"from": "human", "value": f"<image>\nWhat is {row}?"}
        said = {"from": "gpt", "value": "seed answer"}
        original.append({"id": f"s{row}", "image": picture, "conversations": [asked, said]})
    (folder / "seed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    (folder / "stage_1.json").write_text(json.dumps(original), "utf-8")


def rows_of(low: int, high: int) -> list[int]:
    return [row for row, count in enumerate(WORDS) if low <= count <= high]


BASE: dict[str, Any] = {"branches": [{"name": "a", "process": []}]}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"branches": []}, ("branches", "[]")),
        ({"branches": "a"}, ("branches", "'a'")),
        ({"branches": [[]]}, ("branch 1", "[]")),
        ({"branches": [{"process": []}]}, ("branch 1", "field name", "None")),
        ({"branches": [{"name": "A b", "process": []}]}, ("branch 1", "field name", "'A b'")),
        ({"branches": [{"name": "x" * 33, "process": []}]}, ("branch 1", "field name")),
        ({"branches": [{"name": "a"}]}, ("branch 1 (a)", "process = None")),
        (
            {"branches": [{"name": "a", "process": [{"x": {}, "y": {}}]}]},
            ("branch 1 (a), operator 1",),
        ),
        ({"branches": [*BASE["branches"], *BASE["branches"]]}, ("branch 2, field name", "'a'")),
        ({"branches": [{"name": "a", "process": [], "repeats": 2}]}, ("repeats", "'repeat'")),
        *(
            ({"branches": [{"name": "a", "process": [], field: value}]}, (where, repr(value)))
            for field, value, where in (
                ("repeat", 0, "field repeat"),
                ("repeat", 101, "field repeat"),
                ("repeat", 1.5, "field repeat"),
                ("repeat", True, "field repeat"),
                ("sample", 5, "field sample"),
            )
        ),
        *(
            ({"branches": [{"name": "a", "process": [], "sample": value}]}, (where,))
            for value, where in (
                ({"count": 5}, "field sample.seed: None"),
                ({"seed": 5}, "field sample.count: None"),
                ({"count": 0, "seed": 1}, "field sample.count: 0"),
                ({"count": 1, "seed": -1}, "field sample.seed: -1"),
                ({"count": 1, "seed": 2**32}, "field sample.seed"),
                ({"count": 1, "seed": 1, "share": 2}, "'share'"),
            )
        ),
        ({"process": []}, ("process and branches",)),
        ({"merge": "interleave"}, ("field merge", "'interleave'")),
        ({"deduplicate": "yes"}, ("field deduplicate", "'yes'")),
        (
            {"deduplicate": True, "branches": [{"name": "a", "process": [], "repeat": 2}]},
            ("branch a, field repeat",),
        ),
        ({"order": "given"}, ("field order", "'given'")),
        ({"order": {}}, ("field order.by", "None")),
        ({"order": {"by": "length"}}, ("field order.by", "'length'")),
        ({"order": {"by": "shuffled"}}, ("field order.seed", "None")),
        ({"order": {"by": "given", "seed": 1}}, ("field order", "'seed'")),
        ({"order": {"by": "statistic"}}, ("field order.operator", "None")),
        (
            {"order": {"by": "statistic", "operator": "x", "parameters": 3}},
            ("field order.parameters", "3"),
        ),
        (
            {"order": {"by": "statistic", "operator": "x", "direction": "down"}},
            ("field order.direction", "'down'"),
        ),
    ],
)
def test_a_bad_field_is_named(
    changed: dict[str, Any], named: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({**OPTIONS, **BASE, **changed}, sort_keys=False), "utf-8")
    with pytest.raises(InvalidInput) as caught:
        load_recipe(path)
    assert caught.value.hint
    for word in ("bad.yaml", *named):
        assert word in str(caught.value)


@pytest.mark.parametrize("field", ["merge", "deduplicate", "order"])
def test_a_linear_recipe_has_no_field_of_a_plan(field: str) -> None:
    with pytest.raises(InvalidInput, match=f"bad.yaml: {field}"):
        recipe_from_mapping("bad", {"process": [], field: None})


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        (plan_recipe(branch("a", ("words_num_filter", {"min_num": "x"}))), "branch 1 (a)"),
        (
            plan_recipe(SHORT, order=Order("statistic", 0, Operator("clean_links_mapper", {}))),
            "field order.operator: clean_links_mapper",
        ),
        (
            plan_recipe(
                SHORT,
                order=Order("statistic", 0, Operator("image_text_similarity_filter", {})),
            ),
            "field order (image_text_similarity_filter), parameter hf_clip",
        ),
    ],
)
def test_operators_are_checked_wherever_they_stand(
    recipe: Recipe, named: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput) as caught:
        validate_recipe(recipe, load_catalogue(), Workspace(tmp_path, Settings()))
    assert named in str(caught.value)


def test_an_unknown_operator_of_a_branch_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"branch 2 \(b\), operator 1: words_filter"):
        plan_recipe(SHORT, branch("b", ("words_filter", {})))
    with pytest.raises(InvalidInput, match="field order: words_filter"):
        plan_recipe(SHORT, order=Order("statistic", 0, Operator("words_filter", {})))


def test_the_digest_of_a_linear_recipe_is_that_of_its_mapping() -> None:
    mapping = {
        "np": 1,
        "skip_op_error": False,
        "dataset_path": "a.jsonl",
        "process": [
            {"words_num_filter": {"min_num": 3, "lang": "en"}},
            {"document_deduplicator": None},
        ],
    }
    recipe = recipe_from_mapping("mine", mapping)
    assert recipe.digest == "55fcdf1db6bf334dcb06146cb943009d10f3bdbe7c67716aa85905542b478c51"
    assert recipe.branches == (Branch("", recipe.operators),)
    assert recipe.all_operators() == recipe.operators


def test_the_digest_of_a_plan_is_of_what_it_does() -> None:
    merged = PLANS["merged"]
    assert merged.data_plan is not None
    renamed = plan_recipe(
        replace(SHORT, name="x"), replace(LONG, name="y", repeat=2, sample=Draw(5, 3))
    )
    assert renamed.digest == merged.digest
    others = {recipe.digest for recipe in PLANS.values()}
    assert len(others) == len(PLANS)
    plan = replace(merged.data_plan, order=Order("shuffled", 1))
    assert replace(merged, data_plan=plan).digest not in others


@pytest.mark.parametrize("name", ["recaption-band", "matching-doubled", "curriculum"])
def test_a_plan_survives_file_and_mapping(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(MINI / f"{name}.yaml")
    path = tmp_path / f"{name}.yaml"
    path.write_text(dump_recipe(recipe), "utf-8")
    assert load_recipe(path) == recipe
    again = recipe_from_mapping(name, {"name": name, **recipe.mapping()})
    assert again.data_plan == recipe.data_plan
    assert again.digest == recipe.digest


def test_a_proposal_with_a_plan_survives_its_file() -> None:
    recipe = PLANS["sorted"]
    proposal = Proposal(
        title="Mine",
        slug="mine",
        kind="explore",
        reason="none",
        evidence=(),
        parent=None,
        recipe={"name": recipe.name, **recipe.mapping()},
        settings={},
        cost=Cost(NUM_SAMPLES, None, None, "not known"),
        proposed_by="a test",
    )
    again = proposal_from(yaml.safe_load(dump_proposal(proposal)))
    assert again.sha256 == proposal.sha256
    read = recipe_from_mapping("mine", again.recipe)
    assert read.data_plan == recipe.data_plan
    assert read.digest == recipe.digest


def test_the_difference_of_plans_is_per_branch() -> None:
    parent = Recipe("a", "A", "", (), OPTIONS, data_plan=DataPlan((SHORT, LONG)))
    changed = replace(LONG, repeat=2, operators=branch("", words(4, 6)).operators)
    child = Recipe(
        "b", "B", "", (), OPTIONS,
        data_plan=DataPlan((changed, branch("new", words(1, 1))), order=Order("shuffled", 3)),
    )  # fmt: skip
    lines = [f"{line.sign}{line.text}" for line in diff_recipes(parent, child)]
    assert lines == [
        "-branch short",
        "-  words_num_filter",
        "-    min_num: 3",
        "-    max_num: 5",
        "-    repeat: 1",
        "-    sample: null",
        " branch long",
        "   words_num_filter",
        "-    min_num: 5",
        "+    min_num: 6",
        "-    repeat: 1",
        "+    repeat: 2",
        "+branch new",
        "+  words_num_filter",
        "+    min_num: 3",
        "+    max_num: 3",
        "+    repeat: 1",
        "+    sample: null",
        "-order: {by: given}",
        "+order: {by: shuffled, seed: 3}",
    ]
    assert {line.sign for line in diff_recipes(child, child)} == {" "}
    linear = Recipe("c", "C", "", SHORT.operators, OPTIONS)
    assert {line.sign for line in diff_recipes(linear, child)} == {"-", "+"}


def test_draws_repetitions_and_merge(ran: Ran) -> None:
    short, long = rows_of(1, 3), rows_of(3, 6)
    drawn = [long[i] for i in sorted(random.Random(3).sample(range(len(long)), 5))]
    assert ran.codes["merged"] == 0
    assert ran.rows("merged") == short + drawn + drawn
    result = ran.json("merged", "result.json")
    assert [
        (share["name"], share["left"], share["taken"], share["repeat"], share["samples"])
        for share in result["branches"]
    ] == [("short", len(short), len(short), 1, len(short)), ("long", len(long), 5, 2, 10)]
    assert result["kept"] == result["before_cap"] == result["merged"] == len(short) + 10
    counts = {(c["branch"], c["name"]): (c["before"], c["after"]) for c in result["operators"]}
    assert counts["short", "words_num_filter"] == (NUM_SAMPLES, len(short))
    assert counts["long", "words_num_filter"] == (NUM_SAMPLES, len(long))
    told = ran.json("merged", "rows.json")
    assert told["kept"] == sorted({*short, *drawn})
    assert [one["kept"] for one in told["branches"]] == [short, long]
    gone = sorted({*range(NUM_SAMPLES)} - {*short, *drawn})
    assert told["dropped"] == {"every branch": gone}


def test_repetitions_are_dropped_and_the_rest_shuffled(ran: Ran) -> None:
    expected = rows_of(3, 6) + [row for row in rows_of(1, 3) if WORDS[row] < 3]
    random.Random(7).shuffle(expected)
    assert ran.rows("shuffled") == expected
    result = ran.json("shuffled", "result.json")
    assert result["repetitions"] == len(rows_of(3, 3))
    assert result["merged"] - result["repetitions"] == result["kept"]


def test_the_statistic_orders_and_equals_keep_their_order(ran: Ran) -> None:
    given = rows_of(1, 3) + 2 * rows_of(3, 6)
    assert ran.rows("sorted") == sorted(given, key=lambda row: -WORDS[row])
    assert ran.json("sorted", "result.json")["without_statistic"] == 0


def test_the_cap_comes_after_the_merge_and_keeps_the_order(ran: Ran) -> None:
    merged = ran.rows("merged")
    positions = sorted(random.Random(5).sample(range(len(merged)), 6))
    assert ran.rows("capped") == [merged[position] for position in positions]
    result = ran.json("capped", "result.json")
    assert (result["kept"], result["before_cap"]) == (6, len(merged))


def test_the_same_seed_gives_the_same_samples(ran: Ran) -> None:
    digests = {
        name: ran.json(name, "result.json")["digest"] for name in RUNS if name.startswith("random")
    }
    assert digests["random"] == digests["random-again"] != digests["random-otherwise"]
    texts = [sample["text"] for sample in ran.samples("random")]
    assert len(set(texts)) == len(texts) == 2 * NUM_SAMPLES


def test_what_falls_short_is_said(ran: Ran) -> None:
    assert ran.rows("few") == rows_of(1, 3)
    notes = [share["note"] for share in ran.json("few", "result.json")["branches"]]
    assert notes == [
        f"{len(rows_of(1, 3))} left, fewer than the 500 to be drawn: all are taken",
        "no sample is left",
    ]
    assert f"branch short: {notes[0]}" in ran.log


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("empty", "none (words_num_filter), nothing (words_num_filter)"),
        ("unordered", "field order (image_shape_filter): it measures image_height, image_width"),
    ],
)
def test_what_cannot_be_is_an_error(ran: Ran, name: str, named: str) -> None:
    assert ran.codes[name] != 0
    lines = (ran.workspace.root / f"{name}.progress.jsonl").read_text("utf-8").splitlines()
    assert named in json.loads(lines[-1])["error"]["message"]
    assert not (ran.output(name) / "result.json").exists()


def test_a_branch_file_gives_the_same_with_data_juicer_alone(ran: Ran) -> None:
    file = ran.output("clean") / "branch-2-clean.yaml"
    config = yaml.safe_load(file.read_text("utf-8"))
    steps = [name for step in config["process"] for name in step]
    assert steps.count("forget_measurements_mapper") == 1
    plain = subprocess.run(
        [str(Path(sys.executable).parent / "dj-process"), "--config", str(file)],
        cwd=ran.workspace.root,
        env=stage_environment(ran.workspace) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert plain.returncode == 0, plain.stderr[-2000:]
    export = ran.workspace.root / config["export_path"]
    root = f"{ran.workspace.root.resolve()}/data/seed/"
    exported = [
        {**row, "images": [path.removeprefix(root) for path in row["images"]]}
        for row in map(json.loads, export.read_text("utf-8").splitlines())
    ]
    mine = ran.samples("clean")[NUM_SAMPLES:]
    assert exported == mine
    assert 0 < len(mine) < NUM_SAMPLES
    assert any("indeed" in sample["text"] for sample in mine)


def test_repeated_samples_keep_their_questions_and_can_be_trained_on(ran: Ran) -> None:
    records = ran.json("merged", "processed.json")
    rows = ran.rows("merged")
    assert [record["id"] for record in records] == [f"s{row}" for row in rows]
    assert len(set(rows)) < len(rows)
    for row, record in zip(rows, records, strict=True):
        question, answer = record["conversations"]
        assert question["value"] == f"<image>\nWhat is {row}?"
        assert answer["value"] != "seed answer"
        assert record["image"] == f"images/{row}.png"
    tokenizer = load_tokenizer(ROOT / "tests" / "data" / "golden" / "train_run")
    data = InstructionDataset(
        ran.output("merged") / "processed.json", ran.workspace.root / "data" / "seed", tokenizer
    )
    assert len(data) == len(rows)
    batch = data.collate(range(len(rows)))
    assert batch.record_ids == tuple(f"s{row}" for row in rows)
    assert len(data.pictures) == len(set(rows))


@pytest.mark.parametrize("name", ["merged", "shuffled", "sorted", "few"])
def test_the_statistics_foretell_what_the_stage_makes(ran: Ran, name: str, tmp_path: Path) -> None:
    samples = [SampleRow(f"s{row}", f"digest {row}", "", ()) for row in range(NUM_SAMPLES)]
    write_samples(tmp_path, "data", samples)
    spec = column_spec("words_num_filter", {}, str)
    assert spec is not None
    scores = {"num_words": [float(count + 2) for count in WORDS]}
    ColumnWriter(tmp_path, spec).append([sample.sample for sample in samples], scores)
    told = plan_retention(PLANS[name], StatisticsTable.open(tmp_path, "data"), str)
    assert told.rows is not None
    seed = ran.workspace.root / "data" / "seed" / "seed.jsonl"
    listed = read_training_list(ran.output(name), seed)
    assert list(listed.rows) == ran.rows(name)
    assert sorted(told.rows.tolist()) == sorted(listed.rows)
    training = Training(4, 2)
    found = processed_effective(ran.output(name), seed, training)
    assert effective(found.ladder, told.rows.tolist(), training) == found
    left = sum(branch.left or 0 for branch in told.branches)
    assert found.ladder == Ladder(NUM_SAMPLES, left, left, len(listed.rows))


def test_repetitions_are_of_row_and_text_and_the_first_stays() -> None:
    rows = [
        {ROW_ID_FIELD: row, "text": text, "n": n}
        for n, (row, text) in enumerate(
            [(1, "a"), (2, "b"), (1, "a"), (1, "c"), (2, "b"), (3, "a")]
        )
    ]
    assert [row["n"] for row in without_repetitions(rows)] == [0, 1, 3, 5]


def test_samples_without_a_statistic_come_last() -> None:
    rows = [{"n": n} for n in range(5)]
    values = [2.0, None, 1.0, 2.0, None]
    up, missing = sort_by(rows, values, descending=False)
    assert ([row["n"] for row in up], missing) == ([2, 0, 3, 1, 4], 2)
    down, _ = sort_by(rows, values, descending=True)
    assert [row["n"] for row in down] == [0, 3, 2, 1, 4]
    order = Order("statistic", 0, Operator("x", {}), "descending")
    assert in_order(order, rows, lambda operator: values) == (down, 2)
