"""The command `synth-agent`: the app by default, and a headless twin of every action.

Data goes to stdout (`--json` makes it JSON), narration to stderr. Exit codes: 0 ok, 1 failed,
2 usage or invalid input, 3 busy, try again, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from synth_agent import __version__

if TYPE_CHECKING:
    from synth_agent.workspace import Workspace

EXAMPLES = """\
examples:
  synth-agent                        open the app in the workspace here
  synth-agent demo                   make ./demo with the mini world and open the app there
  synth-agent demo --headless        run the demo unattended, with progress line by line
  synth-agent propose                let the planner propose the next experiment
  synth-agent approve 3f9c1a         approve a shown proposal by its sha256 and run it
  synth-agent watch                  follow the live run; Ctrl-C leaves it running
  synth-agent compare 0001-baseline 0002-similarity
  synth-agent analyze                score every sample once
  synth-agent retention similarity   how many samples the recipe would keep, in an instant
  synth-agent fit --card 24GiB       will the training fit, and how long will it take
  synth-agent samples similarity 1   what its first operator keeps and drops
  synth-agent check-data             missing and unreadable pictures of the seed set
  synth-agent convert seed.parquet seed.json --original stage_1.json
"""

FIT_EXAMPLES = """\
examples:
  synth-agent fit                        this machine's GPU, the whole seed set
  synth-agent fit similarity             the samples that a recipe leaves
  synth-agent fit --card 24GiB           a card that is not here, by its memory
  synth-agent fit --card 'H100 80GiB'    with its name, by which measured rates are found

Exit code 1 when a stage does not fit the card.
"""

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["--version"], ["-V"]):
        print(f"synth-agent {__version__}")
        return 0
    options = build_parser().parse_args(given)
    from synth_agent.errors import EXIT_INTERRUPTED
    from synth_agent.terminal import escaped_output

    # The app draws for itself.
    draws = options.command in (_open_app, _demo)
    try:
        with nullcontext() if draws else escaped_output():
            return _run(options)
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    from synth_agent.errors import EXIT_INTERRUPTED, SynthAgentError, system_error

    try:
        command: Command = options.command
        return command(options)
    except SynthAgentError as error:
        _show_error(error, as_json=getattr(options, "json", False))
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except OSError as error:
        told = system_error(error)
        _show_error(told, as_json=getattr(options, "json", False))
        return told.exit_code


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = argparse.ArgumentParser(
        prog="synth-agent",
        description="Run data-synthesis experiments for multimodal LLMs and keep their notebook.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"synth-agent {__version__}")
    parser.add_argument(
        "-w", "--workspace", type=Path, default=Path(), help="workspace folder (default: here)"
    )
    parser.set_defaults(command=_open_app)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_demo(commands)
    _add_gate(commands)
    _add_runs(commands)
    _add_reading(commands)
    _add_data(commands)
    _add_strategies(commands)
    _add_fit(commands)
    _add_formats(commands)
    _add_operators(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser("demo", help="make a workspace with the mini world and use it")
    demo.add_argument("folder", nargs="?", type=Path, default=Path("demo"), metavar="DIR")
    demo.add_argument("--headless", action="store_true", help="run unattended, without the app")
    demo.add_argument("--json", action="store_true", help="print the results as JSON")
    demo.set_defaults(command=_demo)


def _add_gate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    propose = commands.add_parser("propose", help="propose the next experiment, or a given recipe")
    propose.add_argument("recipe", nargs="?", help="recipe name (default: the planner chooses)")
    propose.add_argument(
        "--alternatives",
        type=int,
        default=1,
        metavar="N",
        help="show two or three of the built-in planner to choose from",
    )
    propose.add_argument(
        "--wish", default="", metavar="TEXT", help="tell the model: cheaper, only filters, ..."
    )
    propose.add_argument("--json", action="store_true")
    ask = commands.add_parser("ask", help="ask the model about data and runs; it only reads")
    ask.add_argument("question")
    for parser in (propose, ask):
        parser.add_argument(
            "--planner", choices=("builtin", "llm", "replay"), help="in place of the setting"
        )
        parser.add_argument("--transcript", type=Path, metavar="FILE", help="what replay repeats")
    approve = commands.add_parser("approve", help="approve a shown proposal and run it")
    approve.add_argument("sha256", help="sha256 of the proposal, or its first characters")
    approve.add_argument("--wait", action="store_true", help="follow the run to its end")
    reject = commands.add_parser("reject", help="turn a shown proposal down")
    reject.add_argument("sha256")
    reject.add_argument("--reason", required=True, help="why; the planner respects it")
    limit = commands.add_parser("limit", help="make a proposal of a part of a shown one")
    limit.add_argument("sha256")
    limit.add_argument("--data-only", action="store_true", help="stop before training")
    limit.add_argument("--samples", type=int, metavar="N", help="train on at most so many")
    limit.add_argument("--gpu-hours", type=float, metavar="H", help="stop after so much time")
    auto = commands.add_parser(
        "auto", help="run what the built-in planner proposes inside the standing rules"
    )
    auto.add_argument("--budget", required=True, metavar="TIME", help="wall time, 6h or 90m")
    auto.add_argument("--max-runs", type=int, metavar="N")
    auto.add_argument("--json", action="store_true")
    for parser in (propose, ask, approve, reject, limit, auto):
        parser.set_defaults(command=_gate, name=parser.prog.split()[-1])
    _add_rules(commands)


def _add_rules(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    rules = commands.add_parser("rules", help="what may run without being asked each time")
    rules.set_defaults(command=_gate, name="rules", action="list", json=False)
    actions = rules.add_subparsers(metavar="ACTION")
    shown = actions.add_parser("list", help="list the rules (default)")
    shown.add_argument("--json", action="store_true")
    shown.set_defaults(action="list")
    add = actions.add_parser("add", help="add a rule, at a terminal")
    add.add_argument("kind", choices=("replicates", "recipes", "filters"))
    add.add_argument("names", nargs="*", metavar="RUN|RECIPE", help="the run, or the recipes")
    add.add_argument("--gpu-hours", type=float, required=True, metavar="H", help="over all runs")
    add.add_argument("--max-runs", type=int, required=True, metavar="N")
    add.add_argument("--days", type=float, default=7.0, help="until it expires (default: 7)")
    add.set_defaults(action="add")
    revoke = actions.add_parser("revoke", help="end a rule, at a terminal")
    revoke.add_argument("rule", metavar="ID")
    revoke.set_defaults(action="revoke")


def _add_runs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    watch = commands.add_parser("watch", help="follow a run; Ctrl-C leaves it running")
    watch.add_argument("run", nargs="?", help="run id (default: the live run)")
    watch.set_defaults(command=_watch)
    resume = commands.add_parser("resume", help="continue an interrupted, failed or cancelled run")
    resume.add_argument("run")
    resume.add_argument("--wait", action="store_true", help="follow the run to its end")
    resume.set_defaults(command=_resume)
    cancel = commands.add_parser("cancel", help="stop the live run; it can be resumed")
    cancel.add_argument("run")
    cancel.set_defaults(command=_cancel)


def _add_reading(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    runs = commands.add_parser("runs", help="list all runs")
    runs.add_argument("--json", action="store_true")
    runs.set_defaults(command=_runs)
    show = commands.add_parser("show", help="show a run's results")
    show.add_argument("run")
    show.add_argument("--json", action="store_true")
    show.set_defaults(command=_show)
    compare = commands.add_parser("compare", help="compare two runs on the same questions")
    compare.add_argument("earlier")
    compare.add_argument("later")
    compare.add_argument("--json", action="store_true")
    compare.set_defaults(command=_compare)
    validate = commands.add_parser("validate", help="check a recipe file without running it")
    validate.add_argument("recipe", type=Path, metavar="FILE")
    validate.set_defaults(command=_validate)
    config = commands.add_parser("config", help="show every setting and where it comes from")
    config.add_argument("--json", action="store_true")
    config.set_defaults(command=_config)


def _add_strategies(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    strategies = commands.add_parser("strategies", help="compare recipes on data quality alone")
    strategies.add_argument(
        "recipes", nargs="*", metavar="RECIPE", help="names or files (default: all recipes)"
    )
    strategies.add_argument(
        "--run", action="store_true", help="process and score what was not processed yet"
    )
    strategies.add_argument("--json", action="store_true")
    strategies.set_defaults(command=_strategies)


def _add_fit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    fit = commands.add_parser(
        "fit",
        help="will the training fit the GPU, and how long will it take",
        description="Predict memory and time of both training stages. Nothing is run.",
        epilog=FIT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fit.add_argument(
        "recipe", nargs="?", help="recipe name, or a file (default: the whole seed set)"
    )
    fit.add_argument("--card", metavar="SIZE", help="plan for a card of this memory, as 24GiB")
    fit.add_argument("--json", action="store_true")
    fit.set_defaults(command=_fit)


def _fit(options: argparse.Namespace) -> int:
    from synth_agent.fit_command import fit

    return fit(_open(options), options)


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    analyze = commands.add_parser(
        "analyze", help="score every sample once, so that recipes are judged without running them"
    )
    analyze.add_argument(
        "--operator", action="append", metavar="NAME", help="only these filters (default: all)"
    )
    analyze.add_argument(
        "--retry-failed", action="store_true", help="score once more what could not be scored"
    )
    analyze.add_argument("--json", action="store_true")
    statistics = commands.add_parser("statistics", help="show the scores of the seed set")
    other = statistics.add_mutually_exclusive_group()
    other.add_argument(
        "--correlation", action="store_true", help="rank correlation of every two statistics"
    )
    other.add_argument(
        "--drift", metavar="RECIPE", help="what the recipe keeps against the whole seed set"
    )
    statistics.add_argument("--json", action="store_true")
    contamination = commands.add_parser(
        "contamination", help="what training data shares with the evaluation sets"
    )
    contamination.add_argument(
        "data", nargs="?", metavar="RUN|RECIPE", help="default: the whole seed set"
    )
    contamination.add_argument("--json", action="store_true")
    retention = commands.add_parser("retention", help="how many samples a recipe would keep")
    retention.add_argument("recipe", help="recipe name, or a file")
    retention.add_argument("--json", action="store_true")
    samples = commands.add_parser("samples", help="what an operator of a recipe keeps and drops")
    samples.add_argument("recipe", help="recipe name, or a file")
    samples.add_argument("operator", nargs="?", type=int, default=1, help="its number (default: 1)")
    samples.add_argument("-n", "--count", type=int, default=5, help="samples of each kind")
    samples.add_argument("--seed", type=int, default=0, help="of the drawing")
    samples.add_argument("--json", action="store_true")
    for parser in (analyze, statistics, contamination, retention, samples):
        parser.set_defaults(command=_data, name=parser.prog.split()[-1])


def _add_formats(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = commands.add_parser(
        "convert", help="JSONL or Parquet samples to LLaVA's JSON, or the other way"
    )
    convert.add_argument("source", type=Path, metavar="IN", help="its content tells its format")
    convert.add_argument(
        "target", type=Path, metavar="OUT", help="*.json (LLaVA), *.jsonl or *.parquet"
    )
    convert.add_argument(
        "--original", type=Path, help="LLaVA file with the questions of captions, by id"
    )
    convert.add_argument(
        "--captions", action="store_true", help="make captions: answers without their questions"
    )
    convert.add_argument(
        "--marker",
        choices=("<__dj__image>", "<image>"),
        help="image marker of the samples made (default: that of the samples given, and "
        "<__dj__image> for conversations)",
    )
    convert.add_argument(
        "--images", type=Path, metavar="DIR", help="make absolute paths relative to this folder"
    )
    convert.add_argument("--keep-ids", action="store_true", help="leave numeric ids as they are")
    convert.set_defaults(command=_convert)
    _add_imported(commands)
    check = commands.add_parser(
        "check-data", help="list bad records, and pictures that are missing or unreadable"
    )
    check.add_argument("data", nargs="?", type=Path, help="file or folder (default: the seed set)")
    check.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures")
    check.add_argument("--original", type=Path, help="LLaVA file with the questions")
    check.set_defaults(command=_check_data)
    for parser in (convert, check):
        parser.add_argument("--json", action="store_true")


def _add_operators(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    operators = commands.add_parser(
        "operators", help="list the operators that recipes may use, or show one"
    )
    operators.add_argument("operator", nargs="?", metavar="NAME")
    operators.add_argument("--all", action="store_true", help="also those that are refused")
    operators.add_argument("--json", action="store_true")
    operators.set_defaults(command=_operators)


def _operators(options: argparse.Namespace) -> int:
    from synth_agent import operator_commands

    return operator_commands.operators(_open(options), options)


def _add_imported(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    table = commands.add_parser(
        "import", help="results from elsewhere, as weak evidence for proposals"
    )
    table.add_argument("table", type=Path, metavar="FILE", help="CSV, or a Markdown table")
    table.add_argument("--name", required=True, help="folder name under runs/imported/")
    table.add_argument("--source", required=True, help="who measured it, and where it is published")
    table.add_argument("--date", required=True, help="when it was published")
    table.add_argument("--recipe", required=True, metavar="COLUMN", help="column of the recipes")
    table.add_argument(
        "--benchmark", action="append", required=True, metavar="NAME=COLUMN",
        help="for instance textvqa=TextVQA; several times",
    )  # fmt: skip
    table.add_argument("--id", metavar="COLUMN", help="column of the rows' names")
    table.add_argument("--rows", metavar="COLUMN", help="column of the numbers of samples")
    table.add_argument("--rows-unit", type=int, default=1, choices=(1, 1000))
    table.add_argument("--baseline", metavar="ROW", help="row that the others are relative to")
    table.add_argument("--absolute", action="store_true", help="scores without a baseline")
    table.add_argument("--relative-to", default="", help="what 1.0 is, in words")
    table.add_argument(
        "--spread", action="append", default=[], metavar="NAME=SHARE",
        help="standard deviation of one run as a share of its score",
    )  # fmt: skip
    table.add_argument("--spread-basis", default="", help="where the spread comes from, in words")
    shown = commands.add_parser("imported", help="show the imported results")
    for parser, command in ((table, _import), (shown, _imported)):
        parser.add_argument("--json", action="store_true")
        parser.set_defaults(command=command)


def _import(options: argparse.Namespace) -> int:
    from synth_agent import import_commands

    return import_commands.import_file(options)


def _imported(options: argparse.Namespace) -> int:
    from synth_agent import import_commands

    return import_commands.show(options)


def _convert(options: argparse.Namespace) -> int:
    from synth_agent import format_commands

    return format_commands.convert_file(options)


def _check_data(options: argparse.Namespace) -> int:
    from synth_agent import format_commands

    return format_commands.check(options)


def _strategies(options: argparse.Namespace) -> int:
    from synth_agent.strategy_command import strategies

    return strategies(_open(options), options)


def _data(options: argparse.Namespace) -> int:
    from synth_agent import data_commands

    workspace = _open(options)
    command = {
        "analyze": data_commands.analyze,
        "statistics": data_commands.statistics,
        "contamination": data_commands.contamination,
        "retention": data_commands.retention,
        "samples": data_commands.samples,
    }[options.name]
    return command(workspace, options)


def _show_error(error: Exception, *, as_json: bool) -> None:
    from synth_agent.errors import SynthAgentError

    assert isinstance(error, SynthAgentError)
    if as_json:
        print(json.dumps({"error": error.as_dict()}))
        return
    print(f"error: {error.title}\n  {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  what to do: {error.hint}", file=sys.stderr)


def _open(options: argparse.Namespace) -> Workspace:
    from synth_agent.workspace import open_workspace

    return open_workspace(options.workspace)


def _has_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _run_app(workspace: Workspace) -> int:
    from synth_agent.ui.app import run_app

    return run_app(workspace)


def _open_app(options: argparse.Namespace) -> int:
    from synth_agent.errors import InvalidInput

    workspace = _open(options)
    if not _has_terminal():
        raise InvalidInput(
            "No terminal", "the app needs one", "use a command instead; see synth-agent --help"
        )
    return _run_app(workspace)


def _demo(options: argparse.Namespace) -> int:
    from synth_agent import headless
    from synth_agent.demo import prepare_demo, run_demo

    workspace = prepare_demo(options.folder, headless.narrate)
    if options.headless or options.json or not _has_terminal():
        return run_demo(workspace, as_json=options.json)
    return _run_app(workspace)


def _gate(options: argparse.Namespace) -> int:
    from synth_agent import gate_commands

    workspace = _open(options)
    if options.name == "approve":
        run_id = gate_commands.approve(workspace, options)
        return _wait(workspace, run_id) if options.wait else 0
    command = {
        "propose": gate_commands.propose,
        "ask": gate_commands.ask,
        "limit": gate_commands.limit,
        "reject": gate_commands.reject,
        "rules": gate_commands.rules,
        "auto": gate_commands.auto,
    }[options.name]
    return command(workspace, options)


def _watch(options: argparse.Namespace) -> int:
    from synth_agent import headless, pipeline

    workspace = _open(options)
    run_id = options.run or pipeline.live_run(workspace)
    if run_id is None:
        headless.narrate("no run is live; name one: synth-agent watch RUN")
        return 0
    return _wait(workspace, run_id)


def _resume(options: argparse.Namespace) -> int:
    from synth_agent import pipeline
    from synth_agent.runs import now

    workspace, started = _open(options), now()
    pipeline.resume(workspace, options.run)
    return _wait(workspace, options.run, since=started) if options.wait else 0


def _cancel(options: argparse.Namespace) -> int:
    from synth_agent import pipeline

    pipeline.cancel(_open(options), options.run)
    return 0


def _wait(workspace: Workspace, run_id: str, since: str = "") -> int:
    from synth_agent import headless
    from synth_agent.errors import EXIT_FAILED, EXIT_OK

    run = headless.follow(workspace, run_id, since=since)
    headless.tell_refused(workspace)
    print(headless.run_text(run, workspace.settings.weights))
    return EXIT_OK if run.status == "succeeded" else EXIT_FAILED


def _runs(options: argparse.Namespace) -> int:
    from synth_agent import headless, pipeline
    from synth_agent.wording import benchmark_name

    workspace = _open(options)
    runs = pipeline.list_runs(workspace, lambda error: headless.narrate(f"left out: {error}"))
    headless.tell_refused(workspace)
    if options.json:
        print(json.dumps([headless.run_data(run) for run in runs]))
        return 0
    for run in runs:
        scores = "  ".join(
            f"{benchmark_name(name)} {score.percent:.1f}" for name, score in run.scores.items()
        )
        print(f"{run.id:<24} {run.status:<12} {run.verdict or '':<13} {scores}".rstrip())
    return 0


def _show(options: argparse.Namespace) -> int:
    from synth_agent import headless, pipeline

    workspace = _open(options)
    run = pipeline.load_run(workspace, options.run)
    weights = workspace.settings.weights
    print(json.dumps(headless.run_data(run)) if options.json else headless.run_text(run, weights))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from synth_agent import verdicts
    from synth_agent.errors import InvalidInput
    from synth_agent.weighting import weigh
    from synth_agent.wording import basis_words, benchmark_name

    workspace = _open(options)
    comparisons = verdicts.compare_runs(workspace, options.earlier, options.later)
    if not comparisons:
        raise InvalidInput(
            "Nothing to compare",
            f"{options.earlier} and {options.later} have no score of the same benchmark",
            "see what they have: synth-agent runs; resume a run that has not finished",
        )
    if options.json:
        print(json.dumps([asdict(comparison) for comparison in comparisons]))
        return 0
    for value in comparisons:
        name = benchmark_name(value.benchmark)
        print(
            f"{name:<8} {value.difference:+5.1f} points [{value.low:+.1f}, {value.high:+.1f}] "
            f"on {value.num_questions} questions: {value.verdict}"
        )
        print(f"         {basis_words(value.difference, value.expected, value.basis, value.power)}")
    if (weighted := weigh(comparisons, workspace.settings.weights)) is not None:
        print(f"Weighted {weighted.line()}")
    return 0


def _validate(options: argparse.Namespace) -> int:
    from synth_agent.recipes import load_catalogue, load_recipe, validate_recipe

    workspace = _open(options)
    validate_recipe(load_recipe(options.recipe), load_catalogue(), workspace)
    print(f"{options.recipe}: valid")
    return 0


def _config(options: argparse.Namespace) -> int:
    from synth_agent.workspace import setting_origins

    values = setting_origins(_open(options))
    if options.json:
        print(json.dumps([{"key": k, "value": v, "origin": o} for k, v, o in values]))
        return 0
    width = max(len(key) for key, _, _ in values)
    for key, value, origin in values:
        print(f"{key:<{width}}  {json.dumps(value)}  ({origin})")
    return 0
