"""`mgm.weights`: every file format, damaged files, hostile files, and what is written."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mgm.errors import InputError
from mgm.files import read_json
from mgm.weights import fill, parameter_slots, read_shapes, read_tensors, write_safetensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "first.weight": torch.randn(5, 3, generator=generator).to(dtype),
        "first.bias": torch.randn(5, generator=generator).to(dtype),
        "second.weight": torch.randn(2, 5, generator=generator).to(dtype),
        "second.bias": torch.randn(2, generator=generator).to(dtype),
    }


def _module() -> nn.Module:
    return nn.ModuleDict({"first": nn.Linear(3, 5), "second": nn.Linear(5, 2)})


def _single(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def _pickled(folder: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def _old_pickle(folder: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _open_clip(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "open_clip_model.safetensors")


def _sharded(folder: Path, tensors: dict[str, Tensor]) -> None:
    _shards(folder, tensors, "model.safetensors.index.json", "model-{}.safetensors", save_file)


def _sharded_pickles(folder: Path, tensors: dict[str, Tensor]) -> None:
    _shards(folder, tensors, "pytorch_model.bin.index.json", "pytorch_model-{}.bin", torch.save)


def _shards(
    folder: Path,
    tensors: dict[str, Tensor],
    index: str,
    pattern: str,
    save: Callable[[dict[str, Tensor], Path], object],
) -> None:
    weight_map = {}
    for number, part in enumerate(("first", "second"), start=1):
        shard = pattern.format(f"{number:05d}-of-00002")
        chosen = {name: value for name, value in tensors.items() if name.startswith(part)}
        save(chosen, folder / shard)
        weight_map |= dict.fromkeys(chosen, shard)
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / index).write_text(json.dumps(content))


LAYOUTS = (_single, _pickled, _old_pickle, _open_clip, _sharded, _sharded_pickles)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_and_precision_is_read(
    tmp_path: Path, write: Callable[[Path, dict[str, Tensor]], None], dtype: torch.dtype
) -> None:
    tensors = _tensors(dtype)
    write(tmp_path, tensors)
    assert read_shapes(tmp_path) == {name: tuple(v.shape) for name, v in tensors.items()}
    found = read_tensors(tmp_path)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    module = _module()
    fill(parameter_slots(module), tmp_path)
    for name, parameter in module.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, tensors[name].float())
    fill(parameter_slots(module), tmp_path, dtype=torch.bfloat16)
    assert module.get_parameter("first.weight").dtype == torch.bfloat16


def test_values_do_not_change_with_the_file(tmp_path: Path) -> None:
    _single(tmp_path, _tensors())
    module = _module()
    fill(parameter_slots(module), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(module.get_parameter("first.weight"), _tensors()["first.weight"])


def test_what_does_not_fit_is_listed_and_nothing_is_filled(tmp_path: Path) -> None:
    tensors = _tensors()
    tensors["third.bias"] = tensors.pop("second.bias")
    tensors["first.bias"] = torch.zeros(6)
    _sharded(tmp_path, tensors)
    save_file({"third.bias": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    module = _module()
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    with pytest.raises(InputError) as error:
        fill(parameter_slots(module), tmp_path)
    told = error.value.message
    assert str(tmp_path) in told
    assert "missing: second.bias, second.weight" in told
    assert "unexpected: third.bias" in told
    assert "first.bias has shape (6,), not (5,)" in told
    assert all(torch.equal(value, before[n]) for n, value in module.named_parameters())


def test_a_missing_shard_is_named_with_its_index(tmp_path: Path) -> None:
    _sharded(tmp_path, _tensors())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError) as error:
        read_tensors(tmp_path)
    assert "model-00002-of-00002.safetensors" in error.value.message
    assert "model.safetensors.index.json" in error.value.message
    assert "incomplete" in error.value.hint


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {}},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": "../b.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
    ],
)
def test_an_unusable_index_is_refused(tmp_path: Path, index: dict[str, object]) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        read_tensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    _sharded(tmp_path, _tensors())
    save_file(_tensors(), tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match=r"00002-of-00002\.safetensors: first\.bias"):
        read_shapes(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
@pytest.mark.parametrize("write", [_single, _pickled, _old_pickle])
def test_a_cut_off_file_is_named(
    tmp_path: Path, write: Callable[[Path, dict[str, Tensor]], None], kept: int
) -> None:
    write(tmp_path, _tensors())
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:kept])
    module = _module()
    with pytest.raises(InputError) as error:
        fill(parameter_slots(module), tmp_path)
    assert file.name in error.value.message
    assert "cut off or damaged" in error.value.hint
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("write", [_single, _pickled, _old_pickle])
def test_damaged_files_end_in_an_error_that_names_them(
    tmp_path: Path, write: Callable[[Path, dict[str, Tensor]], None]
) -> None:
    write(tmp_path, _tensors())
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    drawn = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(drawn.choice((1, 3, 20))):
            damaged[drawn.randrange(min(len(damaged), 700))] = drawn.randrange(256)
        file.write_bytes(damaged)
        try:
            read_shapes(tmp_path)
        except InputError as error:
            assert file.name in error.message


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_told_from_a_damaged_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(InputError, match="git lfs pull"):
        read_tensors(tmp_path)


class _Hostile:
    """Unpickles by creating a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("kind", ["zip", "plain"])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, kind: str) -> None:
    trace, file = tmp_path / "trace", tmp_path / "mm_projector.bin"
    content = {"model.mm_projector.0.weight": torch.zeros(2), "x": _Hostile(trace)}
    if kind == "zip":
        torch.save(content, file)
        torch.load(file, weights_only=False)
    else:
        file.write_bytes(pickle.dumps({"x": _Hostile(trace)}, protocol=2))
        pickle.loads(file.read_bytes())
    assert trace.exists(), "an unguarded reader runs it"
    trace.rmdir()
    with pytest.raises(InputError) as error:
        read_tensors(file)
    assert not trace.exists()
    assert "mkdir" in error.value.message
    assert str(file) in error.value.message
    assert "weights_only" not in str(error.value), "the library's advice is to run it"


def test_pickles_of_anything_else_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file.bin"
    file.write_bytes(pickle.dumps({"x": Path("a")}, protocol=4))
    with pytest.raises(InputError, match=r"file\.bin"):
        read_tensors(file)
    torch.save([torch.zeros(2)], file)
    with pytest.raises(InputError, match="Not a dictionary"):
        read_tensors(file)


def test_paths_may_be_relative_or_start_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    _sharded(folder, _tensors())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (Path("folder"), Path("./folder/../folder"), Path("~/folder")):
        assert read_shapes(path).keys() == _tensors().keys()
        module = _module()
        fill(parameter_slots(module), path)
        assert read_json(path / "model.safetensors.index.json")["weight_map"]


def test_reading_writes_nothing_into_the_folder(tmp_path: Path) -> None:
    _sharded(tmp_path, _tensors())
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]}
    tmp_path.chmod(0o555)
    try:
        fill(parameter_slots(_module()), tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]} == before


def test_a_file_that_is_not_there_or_no_folder_of_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        read_tensors(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_written_files_are_read_by_the_library(tmp_path: Path, dtype: torch.dtype | None) -> None:
    tensors = _tensors() | {
        "odd": torch.randn(3).bfloat16(),
        "turned": torch.randn(4, 6).t(),
        "part": torch.randn(10, 10)[2:5, ::3],
        "number": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "trained": nn.Parameter(torch.randn(2, 2)),
    }
    path = tmp_path / "a.safetensors"
    write_safetensors(path, tensors, dtype)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == (dtype or value.dtype)
        assert torch.equal(found[name], value.detach().to(dtype=dtype))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_written_files_are_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "ours", _tensors())
    save_file(_tensors(), tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with pytest.raises(ValueError, match="complex64"):
        write_safetensors(tmp_path / "no", {"a": torch.zeros(2, dtype=torch.complex64)})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, _tensors())
    before = path.read_bytes()
    with pytest.raises(NotImplementedError):
        write_safetensors(path, {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")})
    assert path.read_bytes() == before
    shutil.rmtree(tmp_path)
