"""The commands between an idea and a run: `propose`, `ask`, `limit`, `approve`, `reject`, `rules`, `auto`."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from collections.abc import Sequence

from synth_agent import drafts, pipeline
from synth_agent.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    Busy,
    InvalidInput,
    SynthAgentError,
    nearest,
)
from synth_agent.headless import narrate, tell_refused
from synth_agent.planner import BuiltinPlanner, propose_recipe
from synth_agent.planner.factory import describe, make_conversation
from synth_agent.proposal_words import proposal_text
from synth_agent.recipes import list_recipes
from synth_agent.runs import Limits, Proposal, Run
from synth_agent.workspace import Workspace


def propose(workspace: Workspace, options: argparse.Namespace) -> int:
    """Propose the next experiment, a given recipe, or several experiments; keep them as drafts."""
    _refuse_unheard(workspace, options)
    if options.recipe is not None:
        proposals: Sequence[Proposal] = [_of_recipe(workspace, options.recipe)]
    elif options.alternatives != 1:
        from synth_agent.alternatives import propose_alternatives

        proposals = propose_alternatives(workspace, options.alternatives)
    else:
        proposal = _of_planner(workspace, options)
        proposals = [] if proposal is None else [proposal]
    for proposal in proposals:
        pipeline.validate(workspace, proposal)
        drafts.keep(workspace, proposal)
    if options.json:
        shown = [{"sha256": one.sha256, "proposal": one.content()} for one in proposals]
        print(json.dumps(shown if options.alternatives > 1 else shown[0] if shown else None))
        return EXIT_OK
    if not proposals:
        narrate("nothing is left to propose: add a recipe to recipes/, or name one to repeat")
    for proposal in proposals:
        print(proposal_text(workspace, proposal))
        narrate(f"approve it with: synth-agent approve {proposal.sha256[:12]}")
    return EXIT_OK


def _refuse_unheard(workspace: Workspace, options: argparse.Namespace) -> None:
    """Refuse a wish, or a model asked for by name, where no model is asked.

    Raises:
        InvalidInput: Naming the option.
    """
    kind = options.planner or workspace.settings.planner.kind
    is_single = options.recipe is None and options.alternatives == 1
    if options.wish and (kind == "builtin" or not is_single):
        why = "the built-in planner proposes" if options.recipe is None else "the recipe is given"
        raise InvalidInput(
            "Nobody hears the wish",
            f"--wish {options.wish!r}, but {why}",
            "leave it out, or ask a model for one proposal: --planner llm",
        )
    if options.planner in ("llm", "replay") and not is_single:
        what = "a given recipe" if options.recipe is not None else "alternatives"
        raise InvalidInput(
            "No model is asked",
            f"--planner {options.planner}, but {what} need no model",
            "leave out --planner, or ask the model for one proposal",
        )


def _of_recipe(workspace: Workspace, name: str) -> Proposal:
    recipes = {recipe.name: recipe for recipe in list_recipes(workspace)}
    if name not in recipes:
        raise InvalidInput(
            "No such recipe", f"{name!r} in {workspace.recipes}", nearest(name, recipes)
        )
    return propose_recipe(workspace, recipes[name], _history(workspace))


def _of_planner(workspace: Workspace, options: argparse.Namespace) -> Proposal | None:
    conversation = make_conversation(workspace, options.planner, options.transcript)
    if conversation is None:
        rejections = pipeline.list_rejections(workspace, _left_out)
        return BuiltinPlanner().propose(workspace, _history(workspace), rejections)
    proposed = conversation.propose(options.wish, on_text=_stream)
    print(file=sys.stderr)
    if proposed.note:
        narrate(proposed.note)
    narrate(describe(workspace, options.planner, options.transcript))
    return proposed.proposal


def ask(workspace: Workspace, options: argparse.Namespace) -> int:
    """Ask the model about data and runs; it reads with tools and changes nothing."""
    conversation = make_conversation(workspace, options.planner, options.transcript)
    if conversation is None:
        raise InvalidInput(
            "No model to ask",
            f"{workspace.settings_file}: planner.kind is builtin",
            "set planner.kind: llm and planner.model, and OPENAI_BASE_URL and OPENAI_API_KEY",
        )
    print(conversation.ask(options.question))
    narrate(describe(workspace, options.planner, options.transcript))
    return EXIT_OK


def _stream(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _history(workspace: Workspace) -> list[Run]:
    return pipeline.list_runs(workspace, _left_out)


def _left_out(error: SynthAgentError) -> None:
    narrate(f"left out: {error}")


def limit(workspace: Workspace, options: argparse.Namespace) -> int:
    """Make a proposal of a part of a shown one; it is shown, and approved, by itself."""
    from synth_agent.gate import with_limits

    limits = Limits(options.data_only, options.samples, options.gpu_hours)
    proposal = with_limits(drafts.find(workspace, options.sha256), limits)
    pipeline.validate(workspace, proposal)
    drafts.keep(workspace, proposal)
    print(proposal_text(workspace, proposal))
    narrate(f"approve it with: synth-agent approve {proposal.sha256[:12]}")
    return EXIT_OK


def approve(workspace: Workspace, options: argparse.Namespace) -> str:
    """Approve a shown proposal, start its run, and return the run's id."""
    proposal = drafts.find(workspace, options.sha256)
    if (live := pipeline.live_run(workspace)) is not None:
        raise Busy(
            "A run is live", f"{live}; nothing was approved", "wait or cancel it, and repeat"
        )
    pipeline.validate(workspace, proposal)
    plan = pipeline.approve(
        workspace, proposal, shown_sha256=proposal.sha256, approver=getpass.getuser()
    )
    tell_refused(workspace)
    try:
        pipeline.launch(workspace, plan)
    except SynthAgentError:
        narrate(f"{plan.run_id} is approved: start it with: synth-agent resume {plan.run_id}")
        raise
    print(plan.run_id)
    return plan.run_id


def reject(workspace: Workspace, options: argparse.Namespace) -> int:
    """Turn a shown proposal down."""
    proposal = drafts.find(workspace, options.sha256)
    print(pipeline.reject(workspace, proposal, reason=options.reason, by=getpass.getuser()))
    tell_refused(workspace)
    return EXIT_OK


def rules(workspace: Workspace, options: argparse.Namespace) -> int:
    """List the standing rules, or let a person at a terminal add or revoke one."""
    from synth_agent import rules as standing_rules

    if options.action == "list":
        states = standing_rules.standing(workspace)
        if options.json:
            print(json.dumps([state.data() for state in states]))
        else:
            print("\n".join(state.words() for state in states) or "no standing rule")
        return EXIT_OK
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InvalidInput(
            "No person here", f"rules {options.action} without a terminal", "type it in a terminal"
        )
    by = getpass.getuser()
    if options.action == "revoke":
        print(standing_rules.revoke(workspace, options.rule, by=by).words())
        tell_refused(workspace)
        return EXIT_OK
    run = options.names[0] if options.kind == "replicates" and options.names else ""
    rule = standing_rules.add(
        workspace,
        kind=options.kind,
        gpu_hours=options.gpu_hours,
        max_runs=options.max_runs,
        by=by,
        days=options.days,
        run=run,
        recipes=tuple(options.names) if options.kind == "recipes" else (),
    )
    print(rule.words())
    tell_refused(workspace)
    return EXIT_OK


def auto(workspace: Workspace, options: argparse.Namespace) -> int:
    """Propose and run inside the standing rules until there is a reason to stop."""
    from synth_agent.auto import Auto, budget_seconds, report

    stop = Auto(
        workspace,
        BuiltinPlanner(),
        seconds=budget_seconds(options.budget),
        most_runs=options.max_runs,
    ).run()
    report(stop, as_json=options.json)
    if stop.code == "stopped by a person":
        return EXIT_INTERRUPTED
    return EXIT_FAILED if stop.code in ("error", "failed twice") else EXIT_OK
