"""Weights files: reading them and filling modules from them.

Knows formats (safetensors, pickles, sharded folders) and no model. Pickled files are read with
`weights_only`, so no code in them can run.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mgm.errors import InputError
from mgm.files import read_json

INDEX_FILE = "model.safetensors.index.json"

Slots = dict[str, tuple[nn.Module, str]]
"""Name in a file -> module and attribute of the parameter that it fills."""


def read_tensors(
    path: Path, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Read the tensors of a weights file, or of a folder in the Hugging Face layout.

    Args:
        path: A `.safetensors` or pickled file, or a folder, sharded or not.
        wanted: Says by name which tensors to read.

    Raises:
        InputError: If there is no such file, or it is not what its name says.
    """
    if not path.is_dir():
        return dict(_read_file(path, wanted))
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(path):
        tensors.update(_read_file(file, wanted))
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    for index_name in (INDEX_FILE, "pytorch_model.bin.index.json"):
        index = folder / index_name
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError("Unusable index", f"{index}: weight_map is missing")
            names = sorted(set(weight_map.values()))
            if any(Path(name).name != name for name in names):
                raise InputError("Unusable index", f"{index}: a shard lies outside the folder")
            return [folder / name for name in names]
    known = (
        "model.safetensors",
        "open_clip_model.safetensors",
        "pytorch_model.bin",
        "open_clip_pytorch_model.bin",
    )
    for name in known:
        if (folder / name).exists():
            return [folder / name]
    raise InputError("No weights found", str(folder), f"expected one of {', '.join(known)}")


def _read_file(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    if not path.exists():
        raise InputError("File not found", str(path), "the checkpoint is incomplete")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                for name in filter(wanted, file.keys()):  # noqa: SIM118 (not a mapping)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise InputError("Unreadable weights", f"{path}: {error}") from None
        return
    content = load_pickle(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    for name, value in content.items():
        if isinstance(value, Tensor) and wanted(name):
            yield name, value


def load_pickle(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of tensors without running any code in it.

    Raises:
        InputError: If the file is missing, damaged, or holds more than tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError("File not found", str(path)) from None
    except pickle.UnpicklingError as error:
        raise InputError("Unsafe or damaged pickle", f"{path}: {error}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError("Unreadable weights", f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise InputError("Not a dictionary of tensors", str(path))
    return content


def assign(
    targets: Slots,
    tensors: Mapping[str, Tensor],
    source: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Put tensors into parameters, all or nothing by name and shape.

    Args:
        targets: Name in the file -> module and attribute of the parameter it fills.
        tensors: Name in the file -> value; must have exactly the names of `targets`.
        source: The file or folder, for the error.
        dtype: Of the filled parameters; None keeps the dtype they have.

    Raises:
        InputError: With the missing, unexpected and misshapen names.
    """
    problems = _name_problems(targets.keys(), tensors.keys())
    for name in targets.keys() & tensors.keys():
        module, attribute = targets[name]
        expected, found = tuple(getattr(module, attribute).shape), tuple(tensors[name].shape)
        if expected != found:
            problems.append(f"{name} has shape {found}, not {expected}")
    if problems:
        raise InputError(
            "Weights do not fit the model",
            f"{source}: {'; '.join(problems)}",
            "the files must come from a model with the sizes of this configuration",
        )
    for name, (module, attribute) in targets.items():
        old = getattr(module, attribute)
        # A copy, since a tensor from a mapped file would change or vanish with the file.
        value = tensors[name].to(dtype=dtype or old.dtype, device=old.device, copy=True)
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
