"""The built-in planner: baseline first, then what teaches most; never what was tried or rejected."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from synth_agent.errors import InvalidInput
from synth_agent.planner import BuiltinPlanner, propose_recipe, workspace_settings
from synth_agent.planner.assessment import assess
from synth_agent.planner.builtin import predict
from synth_agent.planner.evidence import gather
from synth_agent.recipes import load_recipe
from synth_agent.runs import Comparison, Limits, Plan, Proposal, Rejection, Run, Score
from synth_agent.workspace import Workspace

HEAD = "skip_op_error: false\nnp: 1\nauto_op_parallelism: false\n"
RECIPES = {
    "baseline": "# title: Nothing\n# reason: Keeps all.\n" + HEAD + "process: []\n",
    "weak": "# title: Weak\n# reason: w\n# published: textvqa=1.0 mmbench=1.1 rows_k=1 row=2\n"
    + HEAD
    + "process:\n- words_num_filter: {min_num: 3}\n",
    "strong": "# title: Strong\n# reason: s\n# published: textvqa=1.1 mmbench=2.9 rows_k=1 row=1\n"
    + HEAD
    + "process:\n- words_num_filter: {min_num: 5}\n",
    "unknown": "# title: Unknown\n# reason: u\n"
    + HEAD
    + "process:\n- words_num_filter: {min_num: 7}\n",
}


@pytest.fixture
def workspace(git_workspace: Workspace) -> Workspace:
    git_workspace.recipes.mkdir()
    for name, text in RECIPES.items():
        (git_workspace.recipes / f"{name}.yaml").write_text(text)
    return git_workspace


def scored(benchmark: str, percent: float) -> Score:
    return Score(
        benchmark, "val", "accuracy", percent, percent - 2, percent + 2, 0.0, 500, "", "", "x"
    )


def finished(proposal: Proposal, number: int, **scores: float) -> Run:
    run_id = f"{number:04d}-{proposal.slug}"
    run = Run(run_id, Plan(run_id, proposal, "a test", "", proposal.sha256), "succeeded")
    run.scores = {name: scored(name, percent) for name, percent in scores.items()}
    return run


def proposed(workspace: Workspace, history: list[Run], *rejections: Rejection) -> Proposal:
    proposal = BuiltinPlanner().propose(workspace, history, rejections)
    assert proposal is not None
    return proposal


def baseline_run(workspace: Workspace, **scores: float) -> Run:
    return finished(proposed(workspace, []), 1, **scores)


def test_the_baseline_comes_first_then_each_recipe_once_then_nothing(workspace: Workspace) -> None:
    history: list[Run] = []
    order = []
    while (proposal := BuiltinPlanner().propose(workspace, history, ())) is not None:
        order.append(proposal.recipe["name"])
        assert len(order) <= 4
        percent = 30.0 if history else 50.0
        history.append(finished(proposal, len(order), textvqa=percent, mmbench=percent))
    assert order[0] == "baseline"
    assert sorted(order[1:]) == ["strong", "unknown", "weak"]
    assert order.index("strong") < order.index("weak")
    assert history[0].plan.proposal.parent is None
    assert {run.plan.proposal.parent for run in history[1:]} == {"0001-baseline"}


def test_a_rejected_recipe_is_not_proposed_again(workspace: Workspace) -> None:
    history = [baseline_run(workspace, textvqa=50.0, mmbench=50.0)]
    first = proposed(workspace, history)
    rejection = Rejection("0002-x", first, "too dear", "a test", "")
    second = proposed(workspace, history, rejection)
    assert second.recipe["name"] != first.recipe["name"]


def test_a_leader_inside_the_noise_is_repeated_with_another_seed(workspace: Workspace) -> None:
    for name in ("weak", "unknown"):
        (workspace.recipes / f"{name}.yaml").unlink()
    history = [baseline_run(workspace, textvqa=50.0, mmbench=50.0)]
    first = proposed(workspace, history)
    assert (first.kind, first.recipe["name"]) == ("explore", "strong")
    history.append(finished(first, 2, textvqa=50.0, mmbench=51.0))
    again = proposed(workspace, history)
    assert again.kind == "replicate"
    assert again.recipe == first.recipe
    assert again.settings["seed"] == first.settings["seed"] + 1
    assert "0002-strong" in again.evidence
    assert "another run with seed" in again.reason


def test_a_clear_leader_is_not_repeated_and_a_loser_neither(workspace: Workspace) -> None:
    for name in ("weak", "unknown"):
        (workspace.recipes / f"{name}.yaml").unlink()
    history = [baseline_run(workspace, textvqa=50.0, mmbench=50.0)]
    first = proposed(workspace, history)
    for percent in (80.0, 20.0):
        run = finished(first, 2, textvqa=percent, mmbench=percent)
        assert BuiltinPlanner().propose(workspace, [*history, run], ()) is None


def test_the_parts_of_a_leading_combination_are_asked_for(workspace: Workspace) -> None:
    for name in ("strong", "weak", "unknown"):
        (workspace.recipes / f"{name}.yaml").unlink()
    text = (
        "# title: Both\n# reason: b\n"
        + HEAD
        + ("process:\n- words_num_filter: {min_num: 3}\n- image_shape_filter: {min_width: 64}\n")
    )
    (workspace.recipes / "both.yaml").write_text(text)
    history = [baseline_run(workspace, textvqa=50.0, mmbench=50.0)]
    history.append(finished(proposed(workspace, history), 2, textvqa=80.0, mmbench=80.0))
    proposal = proposed(workspace, history)
    assert proposal.kind == "ablate"
    assert len(proposal.recipe["process"]) == 1
    assert proposal.slug.startswith("both-without-")


def test_a_proposal_says_what_it_expects_and_what_would_refute_it(workspace: Workspace) -> None:
    history = [baseline_run(workspace, textvqa=50.0, mmbench=50.0)]
    proposal = proposed(workspace, history)
    assert {one.benchmark for one in proposal.predictions} == {"textvqa", "mmbench"}
    for one in proposal.predictions:
        assert one.low < one.expected < one.high
        assert one.by == "built-in model"
    assert proposal.hypothesis
    assert proposal.refuted_by
    assert "Expected gain" in proposal.reason
    assert "80 %" in proposal.reason


def test_results_move_the_prediction_of_relatives(workspace: Workspace) -> None:
    history = [baseline_run(workspace, textvqa=50.0, mmbench=50.0)]
    strong = load_recipe(workspace.recipes / "strong.yaml")
    unknown = load_recipe(workspace.recipes / "unknown.yaml")
    settings = workspace_settings(workspace)
    before = predict(workspace, unknown, settings, history)
    run = finished(propose_recipe(workspace, strong, history), 2, textvqa=30.0, mmbench=30.0)
    after = predict(workspace, unknown, settings, [*history, run])
    assert [one.expected for one in after] < [one.expected for one in before]
    against = predict(workspace, strong, settings, [*history, run], parent=run)
    assert all(abs(one.expected) < 1e-6 for one in against)
    baseline = load_recipe(workspace.recipes / "baseline.yaml")
    assert predict(workspace, baseline, settings, history) == ()


def test_seeds_and_tries_in_a_verdicts_interval_are_no_noise_of_questions(
    workspace: Workspace,
) -> None:
    history = [baseline_run(workspace, textvqa=50.0, mmbench=50.0)]
    strong = load_recipe(workspace.recipes / "strong.yaml")
    unknown = load_recipe(workspace.recipes / "unknown.yaml")
    run = finished(propose_recipe(workspace, strong, history), 2, textvqa=53.0, mmbench=53.0)

    def expected(half: float, **more: object) -> list[tuple[float, float, float]]:
        compared = {
            name: Comparison(
                name, "0001-baseline", 3.0, 3.0 - half, 3.0 + half, 500, "inside noise", **more
            )  # type: ignore[arg-type]
            for name in run.scores
        }
        told = [*history, replace(run, comparisons=compared)]
        found = predict(workspace, unknown, workspace_settings(workspace), told)
        return [(one.expected, one.low, one.high) for one in found]

    questions_only = expected(1.96)
    assert expected(9.0, question_sd=1.0, tries=1, basis="seeds, questions") == questions_only
    assert expected(30.0, question_sd=1.0, tries=10, basis="seeds, questions") == questions_only


def test_a_replicate_is_predicted_as_it_is_judged_together_with_the_seeds_before_it(
    workspace: Workspace,
) -> None:
    strong = load_recipe(workspace.recipes / "strong.yaml")
    settings = workspace_settings(workspace)
    history = [baseline_run(workspace, textvqa=50.0, mmbench=50.0)]
    history.append(
        finished(propose_recipe(workspace, strong, history), 2, textvqa=60.0, mmbench=50.0)
    )
    (first,) = (
        one for one in predict(workspace, strong, settings, history) if one.benchmark == "textvqa"
    )
    proposal = replace(
        history[1].plan.proposal, settings={**settings, "seed": settings["seed"] + 1}
    )
    history.append(finished(proposal, 3, textvqa=60.0, mmbench=50.0))
    (second,) = (
        one for one in predict(workspace, strong, settings, history) if one.benchmark == "textvqa"
    )
    # Half, then two thirds of the mean that will be measured are known to be 10 points.
    assert 7.5 < first.expected < 10
    assert first.expected < second.expected < 10
    assert 1.2 < (first.high - first.low) / (second.high - second.low) < 2
    alone = predict(workspace, load_recipe(workspace.recipes / "unknown.yaml"), settings, history)
    assert second.high - second.low < 0.5 * (alone[0].high - alone[0].low)


def test_the_same_training_twice_is_one_result(workspace: Workspace) -> None:
    strong = load_recipe(workspace.recipes / "strong.yaml")
    unknown = load_recipe(workspace.recipes / "unknown.yaml")
    settings = workspace_settings(workspace)
    base = baseline_run(workspace, textvqa=50.0, mmbench=50.0)
    run = finished(propose_recipe(workspace, strong, [base]), 2, textvqa=56.0, mmbench=50.0)
    twice = [base, run, replace(run, id="0003-strong"), replace(base, id="0004-baseline")]
    for recipe in (strong, unknown):
        once = predict(workspace, recipe, settings, [base, run])
        assert predict(workspace, recipe, settings, twice) == once
    again = replace(run.plan.proposal, settings={**settings, "seed": settings["seed"] + 1})
    other = finished(again, 3, textvqa=56.0, mmbench=50.0)
    assert predict(workspace, unknown, settings, [base, run, other]) != once
    recipes = [load_recipe(workspace.recipes / f"{name}.yaml") for name in ("baseline", "strong")]
    (candidate,) = assess(workspace, recipes, recipes[0], settings, [*twice, other]).candidates
    assert candidate.replicates == 2


def test_a_recipe_that_trains_on_less_costs_less_time(workspace: Workspace) -> None:
    seed = workspace.path(workspace.settings.data.seed)
    seed.parent.mkdir(parents=True)
    seed.write_text("".join(f'{{"id": "{n}", "text": "", "images": []}}\n' for n in range(2048)))
    half = RECIPES["unknown"].replace("# reason", "# keeps: 0.5\n# reason")
    (workspace.recipes / "unknown.yaml").write_text(half)
    base = baseline_run(workspace, textvqa=50.0, mmbench=50.0)
    for name, seconds in (("process", 0), ("pretrain", 3600), ("finetune", 1800), ("evaluate", 0)):
        stage = replace(base.stages[name], status="succeeded", seconds=float(seconds))
        base.stages[name] = stage
    base.stages["process"].result = {"kept": 2048, "digest": "all"}
    recipes = [
        load_recipe(workspace.recipes / f"{n}.yaml") for n in ("baseline", "unknown", "weak")
    ]
    settings = workspace_settings(workspace)
    assessment = assess(workspace, recipes, recipes[0], settings, [base])
    hours = {one.recipe.name: one.hours for one in assessment.candidates}
    assert hours == {"unknown": pytest.approx(1.0), "weak": pytest.approx(1.5)}


def test_a_published_loss_is_no_gain_over_a_baseline_near_zero(workspace: Workspace) -> None:
    text = RECIPES["weak"].replace("textvqa=1.0 mmbench=1.1", "textvqa=0.5 mmbench=0.5")
    (workspace.recipes / "weak.yaml").write_text(text)
    recipes = [load_recipe(workspace.recipes / f"{name}.yaml") for name in ("baseline", "weak")]
    for percent in (0.0, 0.4, 40.0):
        history = [baseline_run(workspace, textvqa=percent, mmbench=percent)]
        settings = workspace_settings(workspace)
        found = gather(recipes[1:], history, recipes[0], settings)
        assert all((of.results.values <= 0).all() for of in found.values())
        assert all(len(of.results.values) == 1 for of in found.values())


def test_a_filter_that_removes_nothing_is_not_proposed(workspace: Workspace) -> None:
    for name in ("strong", "weak"):
        (workspace.recipes / f"{name}.yaml").unlink()
    seed = workspace.path(workspace.settings.data.seed)
    seed.parent.mkdir(parents=True)
    lines = [
        {"id": str(n), "text": "one two three four five six seven", "images": []} for n in (1, 2)
    ]
    seed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    keeps_all = load_recipe(workspace.recipes / "unknown.yaml")
    history = [baseline_run(workspace, textvqa=50.0, mmbench=50.0)]
    history[0].stages["process"].result = {"kept": 2, "digest": "the same"}
    run = replace(finished(propose_recipe(workspace, keeps_all, history), 2), status="cancelled")
    run.stages["process"].result = {"kept": 2, "digest": "the same"}
    history.append(run)
    assert BuiltinPlanner().propose(workspace, history, ()) is None
    chosen = propose_recipe(workspace, keeps_all, history)
    assert "keeps exactly the samples of the baseline" in chosen.reason
    run.stages["process"].result = {"kept": 1, "digest": "another"}
    assert proposed(workspace, history).recipe["name"] == "unknown"


def test_the_same_history_gives_the_same_proposal(workspace: Workspace) -> None:
    first = BuiltinPlanner().propose(workspace, (), ())
    second = BuiltinPlanner().propose(workspace, (), ())
    assert first is not None
    assert second is not None
    assert first.sha256 == second.sha256


def test_a_recipe_that_was_run_is_a_replicate(workspace: Workspace) -> None:
    baseline = BuiltinPlanner().propose(workspace, (), ())
    assert baseline is not None
    history = [finished(baseline, 1, textvqa=50.0, mmbench=50.0)]
    recipe = load_recipe(Path(workspace.recipes / "weak.yaml"))
    once = propose_recipe(workspace, recipe, history)
    again = propose_recipe(
        workspace, recipe, [*history, finished(once, 2, textvqa=50.0, mmbench=50.0)]
    )
    assert (once.kind, again.kind) == ("explore", "replicate")


def test_a_missing_baseline_is_explained(workspace: Workspace) -> None:
    (workspace.recipes / "baseline.yaml").unlink()
    with pytest.raises(InvalidInput, match="Baseline recipe is missing"):
        BuiltinPlanner().propose(workspace, (), ())
    for path in workspace.recipes.glob("*.yaml"):
        path.unlink()
    with pytest.raises(InvalidInput) as raised:
        BuiltinPlanner().propose(workspace, (), ())
    assert "copy recipes there, baseline.yaml among them" in raised.value.hint


def test_a_recipe_without_its_model_waits(workspace: Workspace) -> None:
    text = RECIPES["strong"].replace(
        "words_num_filter: {min_num: 5}", "image_text_matching_filter: {hf_blip: models/blip}"
    )
    (workspace.recipes / "strong.yaml").write_text(text)
    baseline = BuiltinPlanner().propose(workspace, (), ())
    assert baseline is not None
    history = [finished(baseline, 1, textvqa=50.0, mmbench=50.0)]
    left = {"weak", "unknown"}
    while left:
        proposal = proposed(workspace, history)
        left.remove(proposal.recipe["name"])
        run = finished(proposal, len(history) + 1, textvqa=30.0, mmbench=30.0)
        history.append(run)
    assert proposed(workspace, history).recipe["name"] == "strong"


def test_a_run_of_the_data_alone_is_no_baseline_and_settles_nothing(workspace: Workspace) -> None:
    baseline = proposed(workspace, [])
    processed = finished(replace(baseline, limits=Limits(data_only=True)), 1)
    assert proposed(workspace, [processed]).kind == "baseline"
    measured = baseline_run(workspace, textvqa=20, mmbench=40)
    first = proposed(workspace, [measured])
    looked_at = finished(replace(first, limits=Limits(data_only=True)), 2)
    assert proposed(workspace, [measured, looked_at]).slug == first.slug
