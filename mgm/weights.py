"""Weights files: reading them, filling modules from them, writing them.

Knows formats (safetensors, pickles, sharded folders) and no model. Pickled files are read with
`weights_only`, so no code in them can run. Files are mapped or streamed: filling a model or
writing one takes the memory of the model and of a few tensors, never of the file as well.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mgm.errors import InputError
from mgm.files import read_json, write_atomically

INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_INDEX_FILES = (INDEX_FILE, "pytorch_model.bin.index.json")
_DAMAGED = "the file is cut off or damaged; copy it again"
_POINTER = b"version https://git-lfs"
# A mapping is given up after so much of it was read, so that its pages do not add up in memory.
_MAPPED_BYTES = 256_000_000
# What the reader of pickles was seen to raise for files with bytes changed at random.
DAMAGE_ERRORS = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Slots = dict[str, tuple[nn.Module, str]]
"""Name in a file -> module and attribute of the parameter that it fills."""

Rename = Callable[[str], str | None]
"""Name in a file -> name of a slot; None passes the tensor over."""


def read_tensors(
    path: Path, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Read the tensors of a weights file, or of a folder in the Hugging Face layout.

    The tensors are views of the mapped files: they take memory once they are copied, and become
    invalid when a file is overwritten.

    Args:
        path: A `.safetensors` or pickled file, or a folder, sharded or not.
        wanted: Says by name which tensors to read.

    Raises:
        InputError: If there is no such file, or it is not what its name says.
    """
    return dict(_stream(path, wanted))


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a weights file or folder.

    Raises:
        InputError: As `read_tensors`, and if two files of a folder hold the same name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path):
        found = _shapes_in(file)
        twice = sorted(shapes.keys() & found.keys())
        if twice:
            raise InputError(
                "Tensor in two shards", f"{file}: {twice[0]}", "remove shards of an older save"
            )
        shapes.update(found)
    return shapes


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold a folder's weights, all of which exist; a file is its own list.

    Raises:
        InputError: If there are none, or the index is unusable or names a shard that is missing.
    """
    path = path.expanduser()
    if not path.is_dir():
        if not path.exists():
            raise InputError("File not found", str(path), "check the path")
        return [path]
    for name in _INDEX_FILES:
        if (path / name).exists():
            return _indexed_files(path / name)
    for name in WEIGHT_FILES:
        if (path / name).exists():
            return [path / name]
    raise InputError("No weights found", str(path), f"expected one of {', '.join(WEIGHT_FILES)}")


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("Unusable index", f"{index}: weight_map is missing", _DAMAGED)
    shards = list(weight_map.values())
    if not all(isinstance(name, str) and Path(name).name == name for name in shards):
        raise InputError("Unusable index", f"{index}: a shard lies outside the folder", _DAMAGED)
    names = set(shards)
    missing = sorted(name for name in names if not (index.parent / name).exists())
    if missing:
        raise InputError(
            "Shard not found",
            f"{index} names {', '.join(missing)}: not in {index.parent}",
            "the checkpoint is incomplete; copy the missing files beside the index",
        )
    return [index.parent / name for name in sorted(names)]


def _stream(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as views of mapped files; keeping none keeps the memory small."""
    for file in weight_files(path):
        if file.suffix == ".safetensors":
            yield from _stream_safetensors(file, wanted)
        else:
            content = load_pickle(file)
            yield from ((name, value) for name, value in content.items() if wanted(name))


def _stream_safetensors(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    names = [name for name in _shapes_in(path) if wanted(name)]
    position = 0
    while position < len(names):
        taken = 0
        with safe_open(path, framework="pt") as file:
            while position < len(names) and taken < _MAPPED_BYTES:
                tensor = file.get_tensor(names[position])
                taken += tensor.nbytes
                yield names[position], tensor
                position += 1


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of one file without reading its values."""
    if path.suffix != ".safetensors":
        return {name: tuple(value.shape) for name, value in load_pickle(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Map a pickled dictionary of tensors without running any code in it.

    A dictionary inside it under `state_dict` or `model` stands for the whole; entries that are no
    tensors are passed over.

    Raises:
        InputError: If the file is missing, damaged, or holds more than tensors and plain values.
    """
    path = path.expanduser()
    try:
        # Files of the older format cannot be mapped.
        is_mappable = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mappable)
    except FileNotFoundError:
        raise InputError("File not found", str(path), "check the path") from None
    except pickle.UnpicklingError as error:
        raise _refused_pickle(path, error) from None
    except DAMAGE_ERRORS as error:
        raise _unreadable(path, error) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise InputError("Not a dictionary of tensors", str(path))
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _refused_pickle(path: Path, error: pickle.UnpicklingError) -> InputError:
    """Say what a pickle holds; the library's own text advises to run it."""
    called = re.search(r"GLOBAL (\S+)", str(error))
    if called is not None:
        return InputError(
            "Unsafe pickle",
            f"{path}: it would call {called[1]}, and was not opened",
            "weights hold tensors only; get the file from its author again, as safetensors",
        )
    if _is_pointer(path):
        return _unreadable(path, error)
    return InputError(
        "Unreadable weights", f"{path} holds something else than a dictionary of tensors", _DAMAGED
    )


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, PermissionError):
        return InputError("Unreadable weights", f"{path}: permission denied", "allow reading it")
    if _is_pointer(path):
        return InputError(
            "Unreadable weights", f"{path} is a Git LFS pointer, not the file", "run git lfs pull"
        )
    reason = str(error).strip().partition("\n")[0]
    return InputError("Unreadable weights", f"{path}: {reason}", _DAMAGED)


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def fill(
    targets: Slots,
    path: Path,
    rename: Rename = str,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Put a file's or folder's tensors into parameters, all or nothing by name and shape.

    Names and shapes are compared before the first value is read; values are then streamed to
    where they belong.

    Args:
        targets: Slots, each of which one tensor fills.
        path: A weights file or a folder.
        rename: Name in the file -> name in `targets`.
        dtype: Of the filled parameters; None keeps the dtype they have.
        device: Of the filled parameters; None keeps the device they have.

    Raises:
        InputError: With the missing, unexpected and misshapen names.
    """
    shapes = {rename(name): shape for name, shape in read_shapes(path).items()}
    refuse_misfits(targets, {n: shape for n, shape in shapes.items() if n is not None}, str(path))
    for name, tensor in _stream(path, lambda name: rename(name) is not None):
        module, attribute = targets[rename(name) or ""]
        _put(module, attribute, tensor, dtype, device)


def refuse_misfits(targets: Slots, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Compare the names and shapes that are needed with those that there are.

    Raises:
        InputError: With the missing, unexpected and misshapen names.
    """
    problems = _name_problems(targets.keys(), shapes.keys())
    for name in sorted(targets.keys() & shapes.keys()):
        module, attribute = targets[name]
        expected = tuple(getattr(module, attribute).shape)
        if expected != shapes[name]:
            problems.append(f"{name} has shape {shapes[name]}, not {expected}")
    if problems:
        raise InputError(
            "Weights do not fit the model",
            f"{source}: {'; '.join(problems)}",
            "the files must come from a model with the sizes of this configuration",
        )


def _put(
    module: nn.Module,
    attribute: str,
    tensor: Tensor,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> None:
    old = getattr(module, attribute)
    # A copy, since a tensor from a mapped file would change or vanish with the file.
    value = tensor.to(dtype=dtype or old.dtype, device=device or old.device, copy=True)
    setattr(module, attribute, nn.Parameter(value, requires_grad=old.requires_grad))


def _name_problems(expected: Iterable[str], found: Iterable[str]) -> list[str]:
    expected, found = set(expected), set(found)
    problems = []
    for label, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            listed = sorted(names)
            more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
            problems.append(f"{label}: {', '.join(listed[:8])}{more}")
    return problems


def parameter_slots(
    module: nn.Module, prefix: str = "", rename: Callable[[str], str] = str
) -> Slots:
    """Return every parameter's place under its (renamed, prefixed) name; tied ones once."""
    slots: Slots = {}
    for name, _ in module.named_parameters():
        owner, _, attribute = name.rpartition(".")
        slots[prefix + rename(name)] = (module.get_submodule(owner), attribute)
    return slots


def detached(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on the CPU that a pickle stores alone, copied only where it must be.

    A pickle stores the whole memory behind a view, which may be all weights of a model.
    """
    value = tensor.detach().to(device="cpu", dtype=dtype)
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def write_pickle(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a dictionary of tensors as torch does."""

    def write(target: Path) -> None:
        # Through Python's own file, since torch's does not say why it cannot write.
        with target.open("wb") as file:
            torch.save(dict(tensors), file)

    write_atomically(path, write)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write a safetensors file one tensor after the other, so that only one is held twice.

    Args:
        tensors: On any device, of any strides.
        dtype: Of the written tensors; None keeps what each has.

    Raises:
        ValueError: If a dtype has no name in the format.

    Source: the format's description in the safetensors repository: the length of the header as
    eight little-endian bytes, a JSON header padded with spaces, and the values.
    """
    # Wider types first, so that every value lies at a multiple of its size.
    names = sorted(tensors, key=lambda name: (-(dtype or tensors[name].dtype).itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        stored = dtype or tensors[name].dtype
        if stored not in _SAFETENSORS_NAMES:
            raise ValueError(f"{name}: {stored} has no name in safetensors")
        start, end = end, end + tensors[name].numel() * stored.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[stored],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(target: Path) -> None:
        with target.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                flat = tensors[name].detach().reshape(-1).to(device="cpu", dtype=dtype)
                file.write(flat.contiguous().view(torch.uint8).numpy().data)

    write_atomically(path, write)
