"""The command line: what goes where, exit codes, and messages that name file, field and fix."""

import json
from pathlib import Path

import pytest

from synth_agent.cli import main
from synth_agent.workspace import Workspace


@pytest.fixture
def root(git_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(git_workspace.root)
    return git_workspace.root


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gaol: x\n", ("gaol", "goal")),
        ("pretrain:\n  learning_rat: 1\n", ("pretrain.learning_rat", "learning_rate")),
        ("finetune:\n  method: lorra\n", ("finetune.method", "lorra", "lora")),
        ("goal: [\n", ("not YAML",)),
        ("- a\n", ("not a mapping",)),
    ],
)
def test_wrong_settings_name_file_key_and_fix(
    root: Path, capsys: pytest.CaptureFixture[str], text: str, told: tuple[str, ...]
) -> None:
    (root / "synth.yaml").write_text(text)
    assert main(["runs"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "synth.yaml" in output.err
    assert all(part in output.err for part in told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"goal: caf\xe9\n", ("not UTF-8",)),
        (b"pretrain: {epochs: 2}\nseed: 1\npretrain: {dtype: float32}\n", ("'pretrain'", "twice")),
        (b"goal: 2024-13-45\n", ("month must be",)),
        (b"seed: " + b"9" * 5000, ("limit",)),
        (b"goal: " + b"[" * 3000, ("nested too deeply",)),
        (b"pretrain: {learning_rate: .inf}\n", ("pretrain.learning_rate", "finite")),
        (b"finetune: {projector_learning_rate: -1}\n", ("finetune.projector_learning_rate",)),
        (b"seed: 99999999999999999999\n", ("seed", "less than")),
        (b'data: {seed: "a\\0b"}\n', ("data.seed", "NUL")),
        (b'goal: "\\ud800"\n', ("goal", "half of a character")),
    ],
)
def test_settings_that_cannot_be_meant_are_no_traceback(
    root: Path, capsys: pytest.CaptureFixture[str], text: bytes, told: tuple[str, ...]
) -> None:
    (root / "synth.yaml").write_bytes(text)
    assert main(["runs"]) == 2
    error = capsys.readouterr().err
    assert str(root / "synth.yaml") in error
    assert all(part in error for part in told)


def test_settings_may_share_values_by_anchors(root: Path) -> None:
    (root / "synth.yaml").write_text(
        "pretrain: &both {epochs: 2}\nfinetune: {<<: *both, epochs: 3}\n"
    )
    assert main(["runs"]) == 0


def test_what_the_system_refuses_names_the_file(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "synth.yaml").write_text(f"data: {{seed: {'a' * 300}}}\n")
    assert main(["statistics"]) == 1
    error = capsys.readouterr().err
    assert f"{root}/{'a' * 300}: File name too long" in error
    assert main(["convert", "synth.yaml", "synth.yaml/x.jsonl"]) in (1, 2)
    assert "synth.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "watch", "resume", "compare"])
def test_a_run_that_is_not_there_is_named_with_the_nearest(
    root: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    names = ["0001-similarty"] * (2 if command == "compare" else 1)
    assert main([command, *names]) == 2
    assert "no run was approved yet" in capsys.readouterr().err
    (root / "runs" / "0001-similarity").mkdir(parents=True)
    (root / "runs" / "0001-similarity" / "plan.yaml").touch()
    assert main([command, *names]) == 2
    assert "did you mean '0001-similarity'?" in capsys.readouterr().err


def test_errors_are_data_when_data_is_asked_for(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "synth.yaml").write_text("gaol: x\n")
    assert main(["runs", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["hint"] == "did you mean 'goal'?"


def test_an_unknown_operator_is_named_with_the_nearest(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = root / "typo.yaml"
    recipe.write_text(
        "# title: t\n# reason: r\nskip_op_error: false\nprocess:\n- words_num_filtr: {}\n"
    )
    assert main(["validate", str(recipe)]) == 2
    told = capsys.readouterr().err
    assert "typo.yaml" in told
    assert "words_num_filter" in told


def test_outside_a_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 2
    assert "synth-agent demo" in capsys.readouterr().err


def test_a_demo_never_overwrites_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["demo", str(tmp_path), "--headless"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_settings_are_shown_with_their_origin(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["goal"] == {"key": "goal", "value": "test", "origin": "file"}
    assert rows["pretrain.learning_rate"]["origin"] == "default"


def test_nothing_is_approved_that_was_not_shown(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["approve", "0123456789"]) == 2
    assert "No such proposal" in capsys.readouterr().err


def test_the_app_needs_a_terminal(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "No terminal" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "examples:" in capsys.readouterr().out
