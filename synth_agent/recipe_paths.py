"""Paths and model folders that a recipe names: inside the workspace, and without code."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from synth_agent.catalogue import OperatorSpec
from synth_agent.errors import InvalidInput
from synth_agent.recipe_policy import (
    EXPORT_SUFFIXES,
    FILE_PARAMETERS,
    LOCAL_OR_SERVICE,
    MODEL_PREFIX,
    PICKLED_SUFFIXES,
    REVIEWED_OPERATORS,
)
from synth_agent.recipe_yaml import shown

_SERVICE_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}([/:][A-Za-z0-9._-]{1,63}){0,2}")
_WEIGHTS = re.compile(r"\w*model[\w.-]*\.safetensors")
_MOST_FOLDERS = 200
_DRIVE = re.compile(r"[A-Za-z]:")
_NOT_IN_PATHS = frozenset("$%{}[]*?:|<>\"'`!&;\\\n\t")


def check_path(place: str, value: object) -> None:
    is_bad = (
        not isinstance(value, str)
        or not value
        or leaves_workspace(value)
        or bool(_NOT_IN_PATHS.intersection(value))
        or any(part.startswith(".") for part in PurePosixPath(value).parts)
    )
    if is_bad:
        raise InvalidInput(
            "Path outside the workspace",
            f"{place}: {shown(value)}",
            "give a path relative to the workspace root, of letters, digits, - and _, without '..'",
        )


def check_export(place: str, value: str) -> None:
    path = PurePosixPath(value)
    if path.parts[0] != "artifacts" or path.suffix not in EXPORT_SUFFIXES:
        raise InvalidInput(
            "Path outside the artifacts",
            f"{place}: {shown(value)}",
            "give artifacts/processed/NAME.jsonl",
        )


def leaves_workspace(text: str) -> bool:
    path = PurePosixPath(unicodedata.normalize("NFKC", text).replace("\\", "/"))
    return (
        path.is_absolute()
        or ".." in path.parts
        or "://" in text
        or text.startswith("~")
        or "${" in text
        or _DRIVE.match(text) is not None
    )


def check_written(place: str, value: str) -> None:
    """Check that a folder into which an operator writes lies in `artifacts`."""
    if PurePosixPath(value).parts[0] != "artifacts" or len(PurePosixPath(value).parts) < 2:
        raise InvalidInput(
            "Path outside the artifacts", f"{place}: {shown(value)}", "give artifacts/NAME"
        )


def check_links(place: str, value: str, root: Path) -> None:
    """Check that no link on the way leads out of the workspace."""
    if not (root / value).resolve().is_relative_to(root.resolve()):
        raise InvalidInput(
            "Path outside the workspace",
            f"{place}: {value} is a link that leads out",
            "put the files themselves into the workspace",
        )


def check_models(where: str, parameters: Mapping[str, Any], root: Path) -> None:
    """Check that every model that an operator's parameters name is a folder under `root`.

    Raises:
        InvalidInput: naming the parameter and the folder.
    """
    for name, value in parameters.items():
        if name.startswith(MODEL_PREFIX) and not _is_unread(name, parameters):
            _check_folder(f"{where}, parameter {name}", value, root)


def _is_unread(name: str, parameters: Mapping[str, Any]) -> bool:
    """Tell whether a captioner is named that image_diffusion_mapper, given captions, never loads."""
    return (
        name == "hf_img2seq"
        and "hf_diffusion" in parameters
        and bool(parameters.get("caption_key"))
    )


def _check_folder(place: str, value: object, root: Path) -> None:
    if isinstance(value, str) and value and not (root / value).is_dir():
        raise InvalidInput(
            "Model folder is missing",
            f"{place}: {shown(value)[1:-1]} is not a folder of the workspace",
            "put the model there, or name the folder that holds it",
        )


def is_local(parameters: Mapping[str, Any]) -> bool:
    """Return whether an operator that takes a folder or a service's model uses a folder."""
    if "is_api_model" in parameters:
        return not parameters["is_api_model"]
    return bool(parameters.get("is_hf_model") or parameters.get("enable_vllm"))


def _check_service_model(place: str, value: object) -> None:
    if not isinstance(value, str) or not _SERVICE_MODEL.fullmatch(value):
        raise InvalidInput(
            "Bad model name", f"{place}: {shown(value)}", "give the name as the service spells it"
        )


def check_needed_models(
    where: str, spec: OperatorSpec, parameters: Mapping[str, Any], root: Path
) -> None:
    for name, value in parameters.items():
        place = f"{where}, parameter {name}"
        if name in FILE_PARAMETERS and value and isinstance(value, str):
            check_links(place, value, root)
            if not (root / value).is_file():
                raise InvalidInput("File is missing", f"{place}: {value}", "put the file there")
        if name == LOCAL_OR_SERVICE and not is_local(parameters):
            _check_service_model(place, value)
            continue
        if name == "api_model":
            _check_service_model(place, value)
        is_model = name.startswith(MODEL_PREFIX) or name == LOCAL_OR_SERVICE
        if not is_model or _is_unread(name, parameters):
            continue
        if value == "" and spec.name in REVIEWED_OPERATORS:
            raise InvalidInput(
                "Model folder is missing",
                f"{place} is empty, and Data-Juicer would download a model",
                "name a folder of the workspace",
            )
        _check_folder(place, value, root)
        if isinstance(value, str) and value:
            check_links(place, value, root)
            _check_weights(place, root / value)
    scorer = parameters.get("hf_scorer_model")
    if spec.name.endswith("image_aesthetics_filter") and isinstance(scorer, str):
        is_known = "v1" in scorer or ("v2" in scorer and re.search("linear|relu", scorer))
        if not is_known:
            raise InvalidInput(
                "Unknown scorer",
                f"{where}, parameter hf_scorer_model: Data-Juicer tells its kind by the folder's "
                f"name, and {scorer} says none",
                "keep v1, v2 and linear, or v2 and relu in the folder's name",
            )


def _check_weights(place: str, folder: Path) -> None:
    """Check that a model's folder, and those in it, hold neither pickles alone nor code."""
    for count, (path, folders, files) in enumerate(os.walk(folder)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if count > _MOST_FOLDERS:
            raise InvalidInput(
                "Too many folders", f"{place}: {folder.name}", "name the folder of one model"
            )
        _check_files(place, Path(path), files)


def _check_files(place: str, folder: Path, names: Sequence[str]) -> None:
    pickled = sorted(name for name in names if name.lower().endswith(PICKLED_SUFFIXES))
    # Other names in safetensors are not looked for, and the pickle would be loaded.
    if pickled and not any(_WEIGHTS.fullmatch(name) for name in names):
        raise InvalidInput(
            "Pickled model",
            f"{place}: {folder.name} holds {pickled[0]} and no safetensors",
            "convert the weights to safetensors; pickles can run code",
        )
    if code := next((name for name in sorted(names) if name.endswith(".py")), None):
        raise InvalidInput(
            "Model brings code", f"{place}: {folder.name} holds {code}", "remove the file"
        )
