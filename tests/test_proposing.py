"""A model's reply becomes a checked proposal or words that say what is wrong, whatever it holds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from synth_agent.errors import InvalidInput
from synth_agent.planner.builtin import BuiltinPlanner
from synth_agent.planner.conversation import Conversation
from synth_agent.planner.proposing import read_reply
from synth_agent.planner.reply import MOST_CHARACTERS, schema
from synth_agent.planner.tried import Known
from synth_agent.runs import Proposal, Run
from synth_agent.workspace import Workspace
from tests.planner_world import (
    Scripted,
    fill_workspace,
    history,
    proposal_object,
    rejection,
)

FUZZED = 500


@pytest.fixture
def workspace(git_workspace: Workspace) -> Workspace:
    return fill_workspace(git_workspace)


@pytest.fixture
def runs(workspace: Workspace) -> list[Run]:
    return history(workspace)


def read(workspace: Workspace, runs: list[Run], reply: Any, **known: Any) -> Proposal:
    text = reply if isinstance(reply, str) else json.dumps(reply)
    return read_reply(workspace, text, Known(runs, **known), proposed_by="scripted")


def test_a_valid_reply_is_complete_and_its_numbers_are_computed(
    workspace: Workspace, runs: list[Run]
) -> None:
    given = proposal_object(cost={"seconds": 0}, proposed_by="root", sha256="0", approved=True)
    proposal = read(workspace, runs, given)
    assert (proposal.kind, proposal.parent, proposal.slug) == (
        "explore",
        "0001-baseline",
        "longer-captions",
    )
    assert proposal.proposed_by == "scripted"
    assert proposal.cost.expected_samples == 33, "40 rows of 0 to 39 words, at least 7"
    assert "statistics" in proposal.cost.basis
    (step,) = proposal.recipe["process"]
    assert step["words_num_filter"]["min_num"] == 7
    assert "max_num" in step["words_num_filter"], "every parameter is written out"
    assert proposal.recipe["skip_op_error"] is False
    assert [p.benchmark for p in proposal.predictions] == ["textvqa", "mmbench"]
    assert proposal.settings == runs[0].plan.proposal.settings


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: f"Here it is:\n```json\n{text}\n```\nDo you like it?",
        lambda text: f"I thought of {{min_num: 7}} and [x]. {text} That is all.",
        lambda text: f'{{"proposal": {text}}}',
        lambda text: json.dumps(proposal_object(kind="nonsense")) + "\n" + text,
        lambda text: f"[{text}, {text}]",
        lambda text: f'{{"thinking": "first"}} {text}',
    ],
)
def test_a_reply_is_read_tolerantly(
    workspace: Workspace, runs: list[Run], wrap: Callable[[str], str]
) -> None:
    assert read(workspace, runs, wrap(json.dumps(proposal_object()))).slug == "longer-captions"


def test_data_juicers_own_spelling_and_data_plans_are_read(
    workspace: Workspace, runs: list[Run]
) -> None:
    linear = {"process": [{"words_num_filter": {"min_num": 7}}]}
    assert read(workspace, runs, proposal_object(recipe=linear)).recipe["process"]
    plan = {"branches": [{"name": "long", **linear, "repeat": 2}], "deduplicate": False}
    proposal = read(workspace, runs, proposal_object(recipe=plan))
    assert proposal.recipe["branches"][0]["repeat"] == 2
    assert proposal.cost.expected_samples == 66


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kind": "improve"}, "kind"),
    ({"parent": "0099-none"}, "No such run"),
    ({"parent": None}, "No such run"),
    ({"evidence": ["0042-imagined"]}, "No such run"),
    ({"evidence": []}, "Evidence is missing"),
    ({"predictions": []}, "Predictions do not fit"),
    ({"predictions": [{"benchmark": "vqa", "expected": 1, "low": 0, "high": 2}] * 2}, "do not fit"),
    ({"recipe": None}, "Recipe is missing"),
    ({"recipe": {"process": [{"name": "python_file_mapper"}]}}, "refused"),
    ({"recipe": {"process": [{"name": "words_filter"}]}}, "Unknown operator"),
    ({"recipe": {"process": [{"words_num_filter": {"min_num": "many"}}]}}, "Wrong type"),
    ({"recipe": {"process": [{"words_num_filter": {"least": 3}}]}}, "Unknown parameter"),
    ({"recipe": {"process": "words_num_filter"}}, "No process list"),
    ({"recipe": {"process": [], "branches": [{}]}}, "branch"),
    ({"recipe": {"branches": {"a": 1}}}, "recipe.branches"),
    (
        {"recipe": {"process": [{"image_text_similarity_filter": {"hf_clip": "/etc"}}]}},
        "outside the workspace",
    ),
    ({"recipe": {"process": []}}, "Nothing changes"),
    ({"recipe": {"process": [{"words_num_filter": {"min_num": 3}}]}}, "It was tried"),
    ({"recipe": {"process": [{"words_num_filter": {"min_num": 99}}]}}, "No sample is left"),
    ({"settings": {"seed": 7}}, "A seed is not a change"),
    ({"settings": {"allow_operators": ["python_file_mapper"]}}, "may not be changed"),
    ({"settings": {"data": {"seed": "/etc/passwd"}}}, "may not be changed"),
    ({"settings": {"pretrain": {"max_steps": 1}}}, "may not be changed"),
    ({"settings": {"pretrain": {"learning_rate": 1e9}}}, "Out of range"),
    ({"settings": {"pretrain": {"epochs": 1e6}}}, "Out of range"),
    ({"settings": {"pretrain": {"method": "lora"}}}, "Unknown method"),
    ({"settings": {"finetune": {"micro_batch_size": 7}}}, "Batch sizes do not fit"),
    ({"settings": {"finetune": {"lora_rank": 2.5}}}, "Wrong setting"),
    ({"settings": {"pretrain": {"lora_dropout": 0.2}}}, "Setting has no effect"),
    ({"settings": {"finetune": {"method": "full", "lora_rank": 8}}}, "Setting has no effect"),
    ({"kind": "replicate"}, "A replicate repeats its parent"),
    ({"kind": "baseline"}, "Baseline has a parent"),
    ({"kind": "ablate"}, "An ablation only removes"),
    ({"title": "x" * 5000}, "title"),
    ({"reason": ""}, "reason"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG)
def test_what_is_wrong_is_named(
    workspace: Workspace, runs: list[Run], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(workspace, runs, proposal_object(**changes))
    assert words in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "numbers", [(2, 1, 3), (1, 3, 2), (0, 0, 0), (1, 0, 1e9), (1, float("inf"), 2)]
)
def test_predictions_are_intervals_of_finite_numbers(
    workspace: Workspace, runs: list[Run], numbers: tuple[float, float, float]
) -> None:
    low, expected, high = numbers
    predictions = [
        {"benchmark": name, "low": low, "expected": expected, "high": high}
        for name in ("textvqa", "mmbench")
    ]
    with pytest.raises(InvalidInput):
        read(workspace, runs, proposal_object(predictions=predictions))


def test_a_replicate_gets_a_seed_that_was_not_used(workspace: Workspace, runs: list[Run]) -> None:
    given = proposal_object(kind="replicate", parent="0002-short", recipe=None)
    proposal = read(workspace, runs, given)
    before = runs[1].plan.proposal
    assert proposal.settings == {**before.settings, "seed": before.settings["seed"] + 1}
    assert proposal.recipe["name"] == "short"


def test_an_ablation_removes_operators_of_its_parent(workspace: Workspace, runs: list[Run]) -> None:
    pair = [{"words_num_filter": {"min_num": 5}}, {"text_length_filter": {"min_len": 9}}]
    whole = read(workspace, runs, proposal_object(recipe={"process": pair}))
    parent = replace(runs[0], id="0003-pair")
    parent.plan = replace(runs[0].plan, run_id="0003-pair", proposal=whole)
    given = proposal_object(kind="ablate", parent="0003-pair", recipe={"process": pair[:1]})
    proposal = read(workspace, [*runs, parent], given)
    assert [next(iter(step)) for step in proposal.recipe["process"]] == ["words_num_filter"]


def test_an_ablation_changes_nothing_beside_what_it_removes(
    workspace: Workspace, runs: list[Run]
) -> None:
    pair = [{"words_num_filter": {"min_num": 5}}, {"text_length_filter": {"min_len": 9}}]
    long = {"name": "long", "process": pair, "repeat": 2}
    wholes = {"process": pair}, {"branches": [long]}
    parents = [
        replace(
            runs[0],
            id=f"000{number}-pair",
            plan=replace(
                runs[0].plan,
                proposal=read(workspace, runs, proposal_object(recipe=whole)),
            ),
        )
        for number, whole in enumerate(wholes, 3)
    ]

    def ablation(of: str, recipe: dict[str, Any], **fields: Any) -> Proposal:
        given = proposal_object(kind="ablate", parent=of, recipe=recipe, **fields)
        return read(workspace, [*runs, *parents], given)

    one = {"process": pair[:1]}
    with pytest.raises(InvalidInput, match=r"ablation only removes.*field settings: finetune"):
        ablation("0003-pair", one, settings={"finetune": {"learning_rate": 0.5}})
    kept = {**long, **one}
    assert ablation("0004-pair", {"branches": [kept]}).kind == "ablate"
    for other in (
        {"branches": [{**kept, "repeat": 3}]},
        {"branches": [{**kept, "sample": {"count": 5, "seed": 1}}]},
        {"branches": [kept], "order": {"by": "shuffled", "seed": 1}},
        one,
    ):
        with pytest.raises(InvalidInput, match="ablation only removes"):
            ablation("0004-pair", other)


def test_what_was_rejected_or_shown_does_not_come_again(
    workspace: Workspace, runs: list[Run]
) -> None:
    first = read(workspace, runs, proposal_object())
    run = replace(runs[1], plan=replace(runs[1].plan, proposal=first))
    renamed = proposal_object(name="other-name", title="Another title")
    with pytest.raises(InvalidInput, match="too dear"):
        read(workspace, runs, renamed, rejections=[rejection(run, "too dear")])
    with pytest.raises(InvalidInput, match="shown already"):
        read(workspace, runs, renamed, shown=[first])


def test_the_built_in_planner_knows_what_a_model_proposed(
    workspace: Workspace, runs: list[Run]
) -> None:
    planner = BuiltinPlanner()
    first = planner.propose(workspace, runs, [])
    assert first is not None and first.slug == "pair"
    steps = {"process": first.recipe["process"]}
    same = read(workspace, runs, proposal_object(recipe=steps))
    assert same.recipe["process"] != first.recipe["process"], "every parameter is written out"
    run = replace(runs[1], id="0003-same", plan=replace(runs[1].plan, proposal=same))
    for tried, rejections in (
        (runs, [rejection(run, "too dear")]),
        ([*runs, replace(run, status="failed")], []),
        ([*runs, replace(run, status="approved")], []),
    ):
        again = planner.propose(workspace, tried, rejections)
        assert again is None or again.slug != "pair"


def test_a_permission_of_the_workspace_is_all_that_counts(
    workspace: Workspace, runs: list[Run]
) -> None:
    given = proposal_object(
        recipe={
            "process": [
                {"name": "python_lambda_mapper", "parameters": {"lambda_str": "lambda d: d"}}
            ],
            "allow_operators": ["python_lambda_mapper"],
        },
        allow_operators=["python_lambda_mapper"],
    )
    with pytest.raises(InvalidInput, match="refused"):
        read(workspace, runs, given)


def test_a_taken_name_gets_a_mark(workspace: Workspace, runs: list[Run]) -> None:
    proposal = read(workspace, runs, proposal_object(name="baseline"))
    assert proposal.recipe["name"].startswith("baseline-")
    chinese = read(workspace, runs, proposal_object(name="长标题", title="保留较长的标题"))
    assert chinese.title == "保留较长的标题"
    assert chinese.slug.startswith("explore-")


def test_hidden_characters_do_not_reach_the_proposal(workspace: Workspace, runs: list[Run]) -> None:
    proposal = read(
        workspace, runs, proposal_object(title="A\x1b[2J\u202eB\u200b", reason="x\x07y")
    )
    assert (proposal.title, proposal.reason) == ("AB", "xy")


def test_the_schema_is_json_and_names_every_field() -> None:
    asked = json.loads(json.dumps(schema()))
    assert set(proposal_object()) == set(asked["properties"])


def _truncated(draw: random.Random, text: str) -> str:
    return text[: draw.randrange(len(text))]


def _garbled(draw: random.Random, text: str) -> str:
    letters = list(text)
    for _ in range(draw.randint(1, 12)):
        letters[draw.randrange(len(letters))] = draw.choice('{}[]",:\\\x00\u202ea1é中')
    return "".join(letters)


def _retyped(draw: random.Random, text: str) -> str:
    value = json.loads(text)
    odd: list[Any] = [None, [], {}, 1, -1.5, True, "", "x" * 3000, [[]], {"a": {}}, 10**400]
    for _ in range(draw.randint(1, 3)):
        value[draw.choice(sorted(value))] = draw.choice(odd)
    return json.dumps(value)


def _hostile(draw: random.Random, text: str) -> str:
    value = json.loads(text)
    operator = draw.choice(
        [
            "python_file_mapper",
            "python_lambda_mapper",
            "ray_bts",
            "../../x",
            "os.system",
            "__import__",
        ]
    )
    path = draw.choice(["/etc/passwd", "../..", "~/.ssh", "http://x/y", "$HOME", "C:\\x", "a\x00b"])
    value["recipe"] = {"process": [{operator: {"file_path": path, "hf_clip": path}}]}
    if draw.random() < 0.5:
        value["recipe"] = {"process": [{"image_text_similarity_filter": {"hf_clip": path}}]}
    return json.dumps(value)


def _faked(draw: random.Random, text: str) -> str:
    value = json.loads(text)
    value["evidence"] = [f"{draw.randrange(10**4):04d}-made-up"]
    value["parent"] = draw.choice([value["parent"], "0077-x", "../0001-baseline", "", None])
    return json.dumps(value)


def _not_numbers(draw: random.Random, text: str) -> str:
    return text.replace("1.0", draw.choice(["NaN", "Infinity", "-Infinity", "1e999", "1,0", "'1'"]))


def _deep(draw: random.Random, text: str) -> str:
    count = draw.randint(30, 20_000)
    kind = draw.choice(['{"recipe":', "[", '{"kind":[{"recipe":'])
    return kind * count + text + "}" * draw.choice([0, count])


def _enormous(draw: random.Random, text: str) -> str:
    return text + draw.choice(["x", "{", "[1,", '"']) * draw.randint(150_000, MOST_CHARACTERS * 2)


def _foreign(draw: random.Random, text: str) -> str:
    return draw.choice(
        [
            "",
            "我建议只保留较长的标题，因为短标题信息量不足。",
            "```python\nimport os\nos.system('rm -rf /')\n```",
            '{"openapi": "3.0", "paths": {}}',
            "{'kind': 'explore', 'recipe': None,}",
            json.dumps({"action": "approve", "run": "now"}),
            f"{text[:-1]},}}",
            "null",
            '"' + text.replace('"', '\\"') + '"',
        ]
    )


def _sound(draw: random.Random, text: str) -> str:
    value = json.loads(text)
    value["recipe"] = {"process": [{"words_num_filter": {"min_num": draw.randint(8, 39)}}]}
    return f"说明：\n```json\n{json.dumps(value)}\n```"


MUTATIONS = (
    *(_truncated, _garbled, _retyped, _hostile, _faked, _not_numbers),
    *(_deep, _enormous, _foreign, _sound),
)


class Remembered:
    """The built-in planner, asked once: the history of the test does not change."""

    proposal: Proposal | None = None

    def propose(self, workspace: Workspace, history: Any, rejections: Any) -> Proposal | None:
        self.proposal = self.proposal or BuiltinPlanner().propose(workspace, history, rejections)
        return self.proposal


def test_fuzzed_replies_end_in_a_valid_proposal_or_a_clear_fallback(
    workspace: Workspace, runs: list[Run]
) -> None:
    draw = random.Random(20240601)
    text = json.dumps(proposal_object())
    fallback = Remembered()
    by_model = 0
    for number in range(FUZZED):
        change = MUTATIONS[number % len(MUTATIONS)]
        endpoint = Scripted.of(*(change(draw, text) for _ in range(3)))
        talk = Conversation(
            workspace,
            endpoint,
            lambda _: (runs, ()),
            predicting=lambda *_: (),
            fallback=fallback,
        )
        proposed = talk.propose()
        assert proposed.proposal is not None
        assert proposed.by_llm == (proposed.proposal.proposed_by == "scripted")
        by_model += proposed.by_llm
        if proposed.by_llm:
            steps = [next(iter(step)) for step in proposed.proposal.recipe["process"]]
            assert steps == ["words_num_filter"]
            assert set(proposed.proposal.evidence) <= {run.id for run in runs}
        else:
            assert len(endpoint.requests) == 3
            assert "built-in planner proposes, because" in proposed.note
    assert FUZZED // len(MUTATIONS) <= by_model < FUZZED // 2
