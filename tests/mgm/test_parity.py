"""`mgm.parity`: agreement with the reference folders, and that disagreement is noticed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgm.names import published_parameters
from mgm.parity.__main__ import find_checks, main
from mgm.parity.report import (
    Check,
    compare_exactly,
    compare_named_tensors,
    compare_numbers,
    compare_tensors,
    format_table,
)
from mgm.vision import low_resolution_views
from tests.mgm.conftest import tiny_config, tiny_model


def test_every_reference_folder_is_within_tolerance(
    golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(golden)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("comparisons, 0 beyond tolerance")
    kinds = {path.name for path in golden.iterdir() if path.is_dir()} - {"dj_llava"}
    assert {line.split()[1] for line in lines[1:-1]} == {*kinds, golden.name}
    cases = {line.split()[2] for line in lines if " model_a " in line}
    assert cases == {"weights"} | {
        path.stem for path in (golden / "model_a").glob("*.safetensors") if path.stem != "weights"
    }


def test_a_changed_reference_is_reported_and_fails(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(golden / "model_a", folder)
    for path in folder.glob("*.safetensors"):
        if path.stem not in ("weights", "single"):
            path.unlink()
    tensors = load_file(folder / "single.safetensors")
    tensors["mid.projected"][0, 3, 5] += 1e-3
    save_file(tensors, folder / "single.safetensors")
    settings = json.loads((folder / "single.json").read_text())
    settings["grad_norms"]["model.norm.weight"] *= 1.001
    settings["generate"]["new_ids"][0] += 1
    (folder / "single.json").write_text(json.dumps(settings))
    assert main([str(folder), "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["is_ok"] is False
    failed = {check["quantity"]: check for check in content["checks"] if not check["is_ok"]}
    assert set(failed) == {"mid.projected", "gradient norms (relative)", "greedy answer"}
    assert failed["mid.projected"]["difference"] == pytest.approx(1e-3, rel=1e-2)
    assert failed["gradient norms (relative)"]["detail"] == "model.norm.weight"


def test_a_changed_run_is_reported(golden: Path, tmp_path: Path) -> None:
    for name in ("train_run", "preprocess", "conversations"):
        shutil.copytree(golden / name, tmp_path / name)
    shutil.copy(golden / "model_a" / "tokenizer.json", tmp_path / "conversations")
    shutil.copy(golden / "model_a" / "tokenizer_config.json", tmp_path / "conversations")
    (tmp_path / "preprocess" / "meta.json").unlink()
    (tmp_path / "conversations" / "conversations.json").unlink()
    path = tmp_path / "train_run" / "meta.json"
    meta = json.loads(path.read_text())
    meta["stage1"]["log"][4]["loss"] += 0.001
    meta["lora"]["log"][0]["grad_norm"] *= 1.01
    meta["stage2"]["param_groups"][0]["n_params"] += 1
    path.write_text(json.dumps(meta))
    failed = {(c.case, c.quantity): c.detail for c in find_checks(tmp_path) if not c.is_ok}
    groups = "optimizer groups (rate, tensors)"
    details = {key: failed[key] for key in failed if key[1] != groups}
    assert details == {
        ("stage1", "loss"): "step 5",
        ("stage1, fast", "loss"): "step 5",
        ("lora", "grad_norm (relative)"): "step 1",
        ("lora, fast", "grad_norm (relative)"): "step 1",
    }
    assert {key for key in failed if key[1] == groups} == {
        ("stage2", groups),
        ("stage2, fast", groups),
    }


def _write_model_folder(folder: Path) -> None:
    """Write a reference folder of another size, with this package's own values."""
    folder.mkdir()
    language = {**tiny_config().language, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = tiny_model(seed=7, language=language, tokenizer_model_max_length=30).eval()
    config = model.config
    save_file(
        {name: value.detach() for name, value in published_parameters(model).items()},
        folder / "weights.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config.to_mgm_config()))
    (folder / "towers.json").write_text(json.dumps(config.to_towers()))
    pixels = torch.randint(0, 256, (3, 3, 128, 128), dtype=torch.uint8)
    ids = torch.tensor([[2, -200, 9, -200, 11, 12], [2, 8, 9, 10, 1, 0]])
    labels = ids.masked_fill(torch.arange(6) < 4, -100)
    aux = pixels.float() / 64 - 2
    aux[2] = 0
    mask = (ids != 0).long()
    output = model(ids, labels, mask, low_resolution_views(aux, config), aux, full_logits=True)
    assert output.loss is not None
    assert output.logits is not None
    assert output.spliced.labels is not None
    tensors = {
        "in.images_aux_u8": pixels,
        "in.input_ids": ids,
        "in.labels": labels,
        "in.attention_mask": mask.to(torch.uint8),
        "out.labels": output.spliced.labels,
        "out.attention_mask": output.spliced.attention_mask.to(torch.uint8),
        "out.logits_every4": output.logits[:, ::4].contiguous(),
        "out.loss": output.loss.reshape(1),
    }
    save_file({name: value.detach() for name, value in tensors.items()}, folder / "a.safetensors")
    (folder / "a.json").write_text(json.dumps({"text_only_rows": [1], "hidden_act": "gelu"}))


def test_folders_of_other_sizes_are_recognised_by_content(tmp_path: Path) -> None:
    _write_model_folder(tmp_path / "anything")
    checks = list(find_checks(tmp_path))
    assert {check.quantity for check in checks} >= {"out.loss", "logits, every 4th", "out.labels"}
    assert all(check.is_ok for check in checks), format_table(checks)
    assert {check.folder for check in checks} == {"anything"}


def test_a_folder_that_cannot_be_read_through_fails_alone(tmp_path: Path) -> None:
    _write_model_folder(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "weights.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "bad" / "weights.safetensors")
    checks = list(find_checks(tmp_path))
    failed = [check for check in checks if not check.is_ok]
    assert [check.folder for check in failed] == ["bad"]
    assert "missing: model.norm.weight" in failed[0].detail
    assert any(check.folder == "good" for check in checks)


def test_nothing_to_compare_is_an_input_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no reference folder" in capsys.readouterr().err
    assert main([str(tmp_path / "absent"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["title"] == "Folder not found"


def test_comparisons_count_what_differs() -> None:
    ones = torch.ones(2, 3)
    assert compare_tensors("", "", ones, ones, 0).is_ok
    assert compare_tensors("", "", ones, torch.ones(3, 2), 9).difference == math.inf
    holes = ones.clone()
    holes[0, 0] = math.nan
    assert not compare_tensors("", "", holes, ones, 1e9).is_ok
    assert compare_tensors("", "", holes, holes, 0).is_ok
    first_row = torch.tensor([True, False])
    assert compare_tensors("", "", ones, ones + first_row[:, None], 0, ~first_row).is_ok
    assert compare_exactly("", "", [1, 2, 3], [1, 5, 6]).difference == 2
    assert compare_exactly("", "", [1, 2], [1]).difference == 1
    assert compare_exactly("", "", {"a": 1}, {"a": 1, "b": 2}).difference == 1
    pair = {"a": ones, "b": ones * 2}
    assert compare_named_tensors("", "", pair, {"a": ones, "b": ones}, 0).detail == "b"
    assert compare_named_tensors("", "", pair, pair, 0).detail == "2 tensors"
    assert not compare_named_tensors("", "", pair, {"c": ones}, 9).is_ok
    assert compare_numbers("", "", {"a": 1.0}, {"a": 1.5}, 0.4).difference == 0.5
    assert not compare_numbers("", "", {}, {"a": 1.0}, 9).is_ok
    assert not compare_numbers("", "", {"a": math.nan}, {"a": 1.0}, 9).is_ok
    assert compare_numbers("", "", {"a": 1.0}, {"a": 1e-9}, 0, ignore_below=1e-6).is_ok
    assert Check("", "", math.inf, 0).as_dict()["difference"] is None
