"""Whether training fits a card: the words for it, the refusal of a plan, and `synth-agent fit`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mgm.config import ModelConfig
from mgm.memory import CONTEXT, WANTED_TOKENS, choose, predict
from synth_agent import pipeline
from synth_agent.cards import GIB, parse_card
from synth_agent.cli import main
from synth_agent.errors import InvalidInput
from synth_agent.fit import MEASURED_RATES, estimate_cost, training_times
from synth_agent.planner import propose_recipe
from synth_agent.recipes import Recipe
from synth_agent.runs import Limits
from synth_agent.training_fit import StageFit, fit_stages, machine_card, refuse_impossible
from synth_agent.wording import duration
from synth_agent.workspace import Workspace, open_workspace, setting_origins
from tests.cards import BUSY_4090, H100, RTX_4090, SMALL, put_cards, use_cards

FAST = {"numerics": "fast", "drop_path": False}
FULL = {**FAST, "method": "full", "global_batch_size": 128}
SEED_SAMPLES, INSTRUCTIONS = 1024, 256
MGM_2B = ModelConfig.preset("mgm-2b")
BASELINE = Recipe("baseline", "t", "r", (), {"skip_op_error": False})


@pytest.fixture
def workspace(git_workspace: Workspace) -> Workspace:
    """MGM-2B with fast numerics, its parts not there; captions, and instructions with a picture."""
    return settled(git_workspace, pretrain=FAST, finetune=FULL)


def settled(workspace: Workspace, **sections: Any) -> Workspace:
    workspace.settings_file.write_text(yaml.safe_dump({"goal": "test", **sections}))
    made = open_workspace(workspace.root)
    data = made.settings.data
    seed, instructions = made.path(data.seed), made.path(data.instructions)
    seed.parent.mkdir(parents=True, exist_ok=True)
    instructions.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": str(i), "images": [], "text": "x"}) for i in range(SEED_SAMPLES)]
    seed.write_text("\n".join(lines) + "\n")
    turns = [{"from": "human", "value": "q" * 400}, {"from": "gpt", "value": "a" * 600}]
    record = {"id": "1", "image": "a.png", "conversations": turns}
    instructions.write_text(json.dumps([record] * INSTRUCTIONS))
    return made


def settings_of(workspace: Workspace, **sections: dict[str, Any]) -> dict[str, Any]:
    settings = workspace.settings.model_dump(mode="json")
    return settings | {name: {**settings[name], **values} for name, values in sections.items()}


def fits(workspace: Workspace, card: str | None, **sections: dict[str, Any]) -> list[StageFit]:
    named = parse_card(card) if card else None
    return list(fit_stages(workspace, settings_of(workspace, **sections), named))


def test_a_large_card_holds_both_stages(workspace: Workspace) -> None:
    pretrain, finetune = fits(workspace, "80GiB")
    assert (pretrain.fits, finetune.fits) == (True, True)
    assert (pretrain.stage, pretrain.method, finetune.method) == ("pretrain", "projector", "full")
    assert pretrain.memory is not None
    assert pretrain.memory.card < 80 * GIB
    assert pretrain.samples * pretrain.passes >= 256 > pretrain.samples * (pretrain.passes - 1)
    assert finetune.samples * finetune.passes >= 128 > finetune.samples * (finetune.passes - 1)


def test_what_is_chosen_is_what_training_would_choose(workspace: Workspace) -> None:
    card = parse_card("24GiB")
    [pretrain, finetune] = fits(workspace, "24GiB", finetune={"method": "lora"})
    for one, method in ((pretrain, "projector"), (finetune, "lora")):
        assert one.plan is not None
        assert one.plan.method == method
        wanted = replace(one.plan, tokens=WANTED_TOKENS[one.plan.method], recomputed_layers=0)
        assert one.plan == choose(MGM_2B, wanted, card.usable - CONTEXT)
        assert one.memory == predict(MGM_2B, one.plan)
        assert one.memory is not None
        assert one.memory.card <= card.usable


def test_what_does_not_fit_says_what_would(workspace: Workspace) -> None:
    _, finetune = fits(workspace, "24GiB")
    assert finetune.fits is False
    assert finetune.least > 24 * GIB
    assert any("method: lora" in change for change in finetune.changes)
    _, lora = fits(workspace, "24GiB", finetune={"method": "lora"})
    assert lora.fits is True
    _, lean = fits(workspace, "24GiB", finetune={"moments": "8bit", "master_weights": "split24"})
    pair = any("moments: 8bit, master_weights: split24" in change for change in finetune.changes)
    assert lean.fits is pair
    small, _ = fits(workspace, "4GiB")
    assert (small.fits, small.changes) == (False, ())


def test_a_pass_that_settings_name_is_compared_with_what_is_there(workspace: Workspace) -> None:
    given = {"tokens_per_pass": 16384, "recomputed_layers": 0}
    [small, _] = fits(workspace, "12GiB", pretrain=given)
    [large, _] = fits(workspace, "80GiB", pretrain=given)
    assert (small.is_shrunk, large.is_shrunk) == (True, False)
    assert large.plan is not None
    assert (large.plan.tokens, large.plan.recomputed_layers) == (16384, 0)


@pytest.mark.parametrize(
    ("section", "changes", "why"),
    [
        ("pretrain", {"numerics": "reference"}, "numerics: reference"),
        ("pretrain", {"dtype": "float32"}, "dtype: float32"),
        ("compute", {"device": "cpu"}, "compute.device: cpu"),
        ("model", {"name": "mgm-mini"}, "the mini world's model"),
    ],
)
def test_nothing_is_claimed_where_nothing_is_predicted(
    workspace: Workspace, section: str, changes: dict[str, Any], why: str
) -> None:
    [pretrain, _] = fits(workspace, "1GiB", **{section: changes})
    assert (pretrain.fits, pretrain.memory) == (None, None)
    assert pretrain.why == f"not predicted for {why}"


def test_sizes_are_those_of_the_parts_that_are_there(workspace: Workspace) -> None:
    folder = workspace.path(workspace.settings.model.language_model)
    folder.mkdir(parents=True)
    with pytest.raises(InvalidInput, match=r"config\.json"):
        fits(workspace, "24GiB")


def test_without_a_card_memory_is_told_and_no_verdict(workspace: Workspace) -> None:
    pretrain, finetune = fits(workspace, None)
    assert (pretrain.fits, finetune.fits) == (None, None)
    assert pretrain.memory is not None
    assert pretrain.least < pretrain.memory.card


def test_a_plan_that_cannot_fit_the_machine_is_refused(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposal = propose_recipe(workspace, BASELINE, [])
    monkeypatch.setattr(pipeline, "check_settings", lambda *_: None)  # its files are not here
    use_cards(monkeypatch, tmp_path / "none")
    pipeline.validate(workspace, proposal)
    use_cards(monkeypatch, tmp_path / "24", RTX_4090)
    with pytest.raises(InvalidInput, match="Training does not fit the GPU") as raised:
        pipeline.validate(workspace, proposal)
    assert "finetune with method = 'full' takes at least" in raised.value.message
    assert "RTX 4090 with 23.6 GiB" in raised.value.message
    assert "method: lora" in raised.value.hint
    pipeline.validate(workspace, replace(proposal, limits=Limits(data_only=True)))
    use_cards(monkeypatch, tmp_path / "80", H100)
    pipeline.validate(workspace, proposal)


def test_what_others_hold_or_what_is_not_told_refuses_nothing(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = settings_of(workspace, finetune={"method": "lora"})
    use_cards(monkeypatch, tmp_path / "busy", BUSY_4090)
    refuse_impossible(workspace, lora)
    use_cards(monkeypatch, tmp_path / "odd", "no driver")
    refuse_impossible(workspace, settings_of(workspace))
    use_cards(monkeypatch, tmp_path / "small", SMALL)
    refuse_impossible(workspace, settings_of(workspace, compute={"device": "cpu"}))
    with pytest.raises(InvalidInput, match="use a larger card"):
        refuse_impossible(workspace, lora)


def test_time_comes_from_the_rates_of_the_card(workspace: Workspace) -> None:
    settings = settings_of(workspace)
    rates = MEASURED_RATES["NVIDIA H100 80GB HBM3"]
    times = training_times(workspace, settings, [], SEED_SAMPLES, parse_card("H100 80GiB"))
    expected = SEED_SAMPLES / rates["projector"].samples_per_second
    assert times["pretrain"].seconds == pytest.approx(expected)
    # 1,000 characters are about 250 tokens, as in the samples of the measurement.
    expected = INSTRUCTIONS / rates["full"].samples_per_second
    assert times["finetune"].seconds == pytest.approx(expected)
    starts = settings_of(workspace, pretrain={"starts": 3, "start_share": 0.5})
    more = training_times(workspace, starts, [], SEED_SAMPLES, parse_card("H100 80GiB"))
    assert more["pretrain"].seconds == pytest.approx(2 * (times["pretrain"].seconds or 0))


def test_several_processes_are_timed_by_their_own_runs_only(workspace: Workspace) -> None:
    settings = settings_of(workspace, compute={"processes": 2})
    times = training_times(workspace, settings, [], SEED_SAMPLES, parse_card("H100 80GiB"))
    assert {time.seconds for time in times.values()} == {None}


def test_what_would_help_can_be_set_and_leaves_other_plans_as_they_were(
    workspace: Workspace,
) -> None:
    options = {"tokens_per_pass", "recomputed_layers", "master_weights", "moments"}
    before = settings_of(workspace)
    assert options.isdisjoint(before["finetune"])
    _, refused = fits(workspace, "24GiB")
    [pair] = [change for change in refused.changes if "moments: 8bit" in change]
    lean = {"moments": "8bit", "master_weights": "split24"}
    assert all(f"{name}: {value}" in pair for name, value in lean.items())
    made = settled(workspace, pretrain=FAST, finetune={**FULL, **lean, "tokens_per_pass": 4096})
    finetune = settings_of(made)["finetune"]
    assert {name: finetune[name] for name in options & finetune.keys()} == {
        **lean,
        "tokens_per_pass": 4096,
    }
    assert fits(made, "24GiB")[1].fits is True
    every = {key for key, _, _ in setting_origins(made)}
    assert {f"finetune.{name}" for name in options} <= every


@pytest.mark.parametrize(
    ("card", "section", "samples"),
    [
        ("24GiB", {}, SEED_SAMPLES),
        ("PCIe H100 80GiB", {}, SEED_SAMPLES),
        ("NVIDIA 80GiB", {}, SEED_SAMPLES),
        ("a 24GiB", {}, SEED_SAMPLES),
        ("H100 80GiB", {"drop_path": True}, SEED_SAMPLES),
        ("H100 80GiB", {"numerics": "reference"}, SEED_SAMPLES),
        ("H100 80GiB", {"dtype": "float32"}, SEED_SAMPLES),
        ("H100 80GiB", {}, None),
    ],
)
def test_time_is_unknown_where_nothing_like_it_was_measured(
    workspace: Workspace, card: str, section: dict[str, Any], samples: int | None
) -> None:
    settings = settings_of(workspace, pretrain=section)
    time = training_times(workspace, settings, [], samples, parse_card(card))["pretrain"]
    assert time.seconds is None
    assert time.basis


def test_the_cost_of_a_proposal_names_the_time_that_is_known(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(workspace)
    use_cards(monkeypatch, tmp_path / "none")
    basis = estimate_cost(workspace, BASELINE, settings, []).basis
    assert "about" not in basis
    assert "memory" not in basis
    use_cards(monkeypatch, tmp_path / "80", H100)
    cost = estimate_cost(workspace, BASELINE, settings, [])
    assert cost.seconds is None
    rate = MEASURED_RATES["NVIDIA H100 80GB HBM3"]["projector"].samples_per_second
    words = duration(SEED_SAMPLES / rate)
    assert f"pretrain about {words} ({rate:g} samples/s were measured on NVIDIA" in cost.basis


def test_the_cost_of_a_proposal_tells_memory_on_the_machines_card(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cards(monkeypatch, tmp_path / "24", RTX_4090)
    settings = settings_of(workspace)
    pretrain, finetune = fit_stages(workspace, settings, machine_card(workspace, settings))
    basis = estimate_cost(workspace, BASELINE, settings, []).basis
    assert pretrain.memory is not None
    assert f"memory: pretrain {pretrain.memory.card / GIB:.1f} GiB (" in basis
    assert f"finetune at least {finetune.least / GIB:.1f} GiB, which does not fit" in basis
    assert basis.endswith("of NVIDIA GeForce RTX 4090 with 23.6 GiB")


def run_fit(workspace: Workspace, environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "synth_agent", "-w", str(workspace.root), "fit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    return done.returncode, done.stdout


def test_the_command_reads_the_machines_card(workspace: Workspace, tmp_path: Path) -> None:
    code, text = run_fit(workspace, put_cards(tmp_path / "24", [RTX_4090]))
    assert code == 1
    assert "NVIDIA GeForce RTX 4090 with 23.6 GiB for programs, 23.6 GiB free" in text
    rows = {line[:22].strip(): line[22:].split() for line in text.splitlines()}
    assert rows["fits"] == ["yes", "no"]
    assert rows["weights"] == ["5.6", "5.6"]
    assert "one of these makes finetune fit" in text
    code, text = run_fit(workspace, put_cards(tmp_path / "80", [H100]), "--json")
    assert code == 0
    told = json.loads(text)
    assert (told["fits"], told["samples"]) == (True, SEED_SAMPLES)
    assert told["card"]["name"] == "NVIDIA H100 80GB HBM3"
    pretrain, finetune = told["stages"]
    rate = MEASURED_RATES["NVIDIA H100 80GB HBM3"]["projector"].samples_per_second
    assert pretrain["seconds"] == pytest.approx(SEED_SAMPLES / rate)
    parts = pretrain["bytes"]
    moment = max(parts["activations"] + parts["backward"], parts["vision"])
    states = parts["weights"] + parts["gradients"] + parts["optimizer"]
    whole = states + moment + parts["fragmentation"] + parts["context"]
    assert parts["card"] == pytest.approx(whole, abs=8)
    assert finetune["tokens_per_pass"] == WANTED_TOKENS["full"]


def test_the_command_tells_of_a_busy_card(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settled(workspace, pretrain=FAST, finetune={**FAST, "method": "lora"})
    monkeypatch.chdir(workspace.root)
    use_cards(monkeypatch, tmp_path / "busy", BUSY_4090)
    assert main(["fit"]) == 0
    assert "finetune does not fit now: other programs hold 17.6 GiB." in capsys.readouterr().out


def test_a_card_that_is_not_here_is_planned_for(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workspace.root)
    use_cards(monkeypatch, tmp_path / "none")
    assert main(["fit"]) == 0
    assert "none here: name one with --card 24GiB" in capsys.readouterr().out
    assert main(["fit", "--card", "24GiB"]) == 1
    assert main(["fit", "--card", "80GiB"]) == 0
    assert main(["fit", "--card", "large"]) == 2
    assert main(["fit", "simmilarity", "--card", "80GiB"]) == 2
    use_cards(monkeypatch, tmp_path / "odd", "no driver")
    assert main(["fit"]) == 1
    assert "GPU cannot be told" in capsys.readouterr().err


def test_reference_numerics_are_not_predicted(
    git_workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(git_workspace.root)
    settings = git_workspace.root / "synth.yaml"
    as_published = "pretrain: {numerics: reference}\nfinetune: {numerics: reference}\n"
    settings.write_text(settings.read_text() + as_published)
    assert main(["fit", "--card", "24GiB"]) == 0
    text = capsys.readouterr().out
    assert "pretrain: not predicted for numerics: reference" in text
    assert "GiB  " not in text.split("method")[1]
