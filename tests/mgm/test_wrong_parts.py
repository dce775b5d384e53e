"""Trainings whose parts do not belong together: told before anything is trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mgm.tokenizer_files import read_tokenizer
from mgm.train import main
from tests.mgm.tiny_training import arguments, write_parts


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    return write_parts(tmp_path / "parts")


def train(parts: dict[str, Path], output: Path) -> int:
    return main(arguments(parts, output, "projector", output, max_steps=1))


def _without_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def _damaged(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "trunc', "utf-8")


def _without_padding(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text("utf-8"))
    del content["pad_token"]
    path.write_text(json.dumps(content), "utf-8")


def _of_a_larger_model(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "vocab_size": 300}), "utf-8")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:300].clone()
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_without_files, "holds neither of tokenizer.json, tokenizer.model"),
        (_damaged, "tokenizer.json"),
        (_without_padding, "it has no pad_token"),
        (_of_a_larger_model, "the embedding has 300 rows"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(
    parts: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    told: str,
) -> None:
    spoil(parts["language_model"])
    assert train(parts, tmp_path / "out") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / "mm_projector.bin").exists()


@pytest.mark.parametrize("kind", ["gemma2", "llama", None])
def test_a_language_model_of_another_kind_is_refused(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str | None
) -> None:
    path = parts["language_model"] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "model_type": kind}))
    assert train(parts, tmp_path / "out") == 2
    assert f"{path}: model_type = {kind!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("language_model/config.json", {"hidden_act": "foo"}, "hidden_act = 'foo'"),
        ("language_model/config.json", {"rope_parameters": [1]}, "rope"),
        ("vision_tower/preprocessor_config.json", {"image_mean": 0.5}, "image_mean = 0.5"),
        ("language_model/model.safetensors.index.json", {"weight_map": {"a": ["b"]}}, "index.json"),
    ],
)
def test_a_value_of_another_type_is_named(
    parts: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    change: dict[str, object],
    told: str,
) -> None:
    path = parts["language_model"].parent / file
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **change}), "utf-8")
    assert train(parts, tmp_path / "out") == 2
    assert told in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_told_before_weights_are_loaded(
    parts: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "file"
    file.write_text("", "utf-8")
    monkeypatch.setattr("mgm.train.prepare_model", lambda settings: pytest.fail("loaded"))
    assert train(parts, file) == 2
    assert f"{file}: File exists" in capsys.readouterr().err


def test_a_full_models_tokenizer_is_read_without_a_warning(
    parts: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = parts["language_model"]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    plain = read_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mgm_gemma"}), "utf-8")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    again = read_tokenizer(folder)
    assert caplog.text == ""
    assert type(again) is type(plain)
    assert again("a<eos>b").input_ids == plain("a<eos>b").input_ids
