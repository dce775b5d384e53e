"""The built-in planner: baseline first, then by evidence, never again what was tried or rejected."""

from pathlib import Path

import pytest

from synth_agent.errors import InvalidInput
from synth_agent.planner import BuiltinPlanner, propose_recipe
from synth_agent.recipes import load_recipe
from synth_agent.runs import Plan, Proposal, Rejection, Run
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


def finished(proposal: Proposal, number: int) -> Run:
    run_id = f"{number:04d}-{proposal.slug}"
    return Run(run_id, Plan(run_id, proposal, "a test", "", proposal.sha256), "succeeded")


def test_the_order_is_baseline_then_evidence_then_nothing(workspace: Workspace) -> None:
    history: list[Run] = []
    order = []
    while (proposal := BuiltinPlanner().propose(workspace, history, ())) is not None:
        order.append(proposal.recipe["name"])
        history.append(finished(proposal, len(order)))
    assert order == ["baseline", "strong", "weak", "unknown"]
    assert history[0].plan.proposal.parent is None
    assert {run.plan.proposal.parent for run in history[1:]} == {"0001-baseline"}


def test_a_rejected_recipe_is_not_proposed_again(workspace: Workspace) -> None:
    baseline = BuiltinPlanner().propose(workspace, (), ())
    assert baseline is not None
    history = [finished(baseline, 1)]
    first = BuiltinPlanner().propose(workspace, history, ())
    assert first is not None
    rejection = Rejection("0002-strong", first, "too dear", "a test", "")
    second = BuiltinPlanner().propose(workspace, history, [rejection])
    assert second is not None
    assert second.recipe["name"] == "weak"


def test_the_same_history_gives_the_same_proposal(workspace: Workspace) -> None:
    first = BuiltinPlanner().propose(workspace, (), ())
    second = BuiltinPlanner().propose(workspace, (), ())
    assert first is not None
    assert second is not None
    assert first.sha256 == second.sha256


def test_a_recipe_that_was_run_is_a_replicate(workspace: Workspace) -> None:
    baseline = BuiltinPlanner().propose(workspace, (), ())
    assert baseline is not None
    history = [finished(baseline, 1)]
    recipe = load_recipe(Path(workspace.recipes / "weak.yaml"))
    once = propose_recipe(workspace, recipe, history)
    again = propose_recipe(workspace, recipe, [*history, finished(once, 2)])
    assert (once.kind, again.kind) == ("explore", "replicate")


def test_a_missing_baseline_is_explained(workspace: Workspace) -> None:
    (workspace.recipes / "baseline.yaml").unlink()
    with pytest.raises(InvalidInput, match="Baseline recipe is missing"):
        BuiltinPlanner().propose(workspace, (), ())


def test_a_recipe_without_its_model_waits(workspace: Workspace) -> None:
    text = RECIPES["strong"].replace(
        "words_num_filter: {min_num: 5}", "image_text_matching_filter: {hf_blip: models/blip}"
    )
    (workspace.recipes / "strong.yaml").write_text(text)
    baseline = BuiltinPlanner().propose(workspace, (), ())
    assert baseline is not None
    history = [finished(baseline, 1)]
    proposal = BuiltinPlanner().propose(workspace, history, ())
    assert proposal is not None
    assert proposal.recipe["name"] == "weak"
