"""Data-Juicer's configuration of a recipe, most of it prepared once a process.

Data-Juicer parses a recipe three times over, a third of a small recipe's time. What the parser adds is
the same for all recipes: defaults of the global options, and what it hands from them to every
operator. That is prepared here by Data-Juicer's own parser, once; names, types and bounds of a
recipe were checked before. Recipes with options beyond the usual ones go through the parser whole.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PLACES = ("dataset_path", "export_path", "ds_cache_dir")
"""Options that differ from run to run and are taken over as they are."""
FIXED: Mapping[str, Any] = {
    "np": 1,
    "auto_op_parallelism": False,
    "skip_op_error": False,
    "use_cache": False,
}
"""Options that the prepared configuration was made with; a recipe with others is parsed whole."""
_HANDED_ON = (
    ("text_key", "text_keys"),
    ("image_key", "image_key"),
    ("audio_key", "audio_key"),
    ("video_key", "video_key"),
    ("image_bytes_key", "image_bytes_key"),
    ("turbo", "turbo"),
    ("skip_op_error", "skip_op_error"),
    ("auto_op_parallelism", "auto_op_parallelism"),
    ("num_proc", "np"),
)
"""Parameter of every operator, and the global option that it has where the recipe gives none."""


def configuration(mapping: Mapping[str, Any], folder: Path) -> Any:
    """Return what Data-Juicer's `init_configs` makes of a recipe.

    Args:
        mapping: The recipe, with its places.
        folder: Folder for the recipe file, where one is needed.
    """
    from data_juicer.config import init_configs

    options = {key: value for key, value in mapping.items() if key not in ("process", *PLACES)}
    options.pop("project_name", None)
    if options != FIXED:
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(dict(mapping), sort_keys=False), encoding="utf-8")
        return init_configs(["--config", str(file)])
    from data_juicer.config.config import update_ds_cache_dir_and_related_vars

    config = copy.deepcopy(base())
    for name in PLACES:
        config[name] = mapping[name]
    update_ds_cache_dir_and_related_vars(config.ds_cache_dir)
    config.work_dir = str(folder / "export")
    config.process = [_completed(step, config) for step in mapping["process"]]
    return config


@functools.cache
def base() -> Any:
    """Return the configuration of a recipe without operators; made once a process."""
    from data_juicer.config import init_configs

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "input.jsonl"
        data.touch()
        places = {"dataset_path": str(data), "export_path": str(Path(folder) / "x" / "y.jsonl")}
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump({**FIXED, **places, "process": []}), encoding="utf-8")
        return init_configs(["--config", str(file)])


def _completed(step: Mapping[str, Any], config: Any) -> dict[str, Any]:
    [(name, given)] = step.items()
    parameters = copy.deepcopy(dict(given or {}))
    for parameter, option in (*_HANDED_ON, ("work_dir", "work_dir")):
        if parameters.get(parameter) is None:
            parameters[parameter] = config[option]
    return {name: parameters}
