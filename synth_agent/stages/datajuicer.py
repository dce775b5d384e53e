"""The one way Data-Juicer is imported: unable to install packages or to take over the log.

Data-Juicer installs an optional package the moment something asks for it, into the environment it
runs in. Here that attempt is an `ImportError` naming the package. Call `guard()` before anything
else imports `data_juicer`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from synth_agent.stages.grounding import keep_grounding_local


@functools.cache
def guard() -> None:
    """Block installs, leave stderr and Pillow alone, and free models only when torch was imported.

    Data-Juicer sends stderr into a logger that writes files from a thread. When such a file cannot be
    written, on a full disk, the thread reports that to stderr, so to itself, and the process hangs.
    Every operator's run ends with `free_models`, which imports torch to look for a GPU; recipes
    that only read text would wait several seconds for nothing. Importing it makes Pillow take half a
    picture for a whole one, everywhere in the process.
    """
    import data_juicer.config.config as config
    import data_juicer.format.formatter as formatter
    import data_juicer.utils.lazy_loader as lazy_loader
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = False

    def refuse(cls: type, package: str, /, *arguments: object, **options: object) -> NoReturn:
        raise ImportError(f"Data-Juicer needs the package {package!r}, which is not installed")

    lazy_loader.LazyLoader._install_package = classmethod(refuse)
    import data_juicer.ops.base_op as base_op

    free_models = base_op.free_models

    def free_loaded_models(*arguments: Any, **options: Any) -> None:
        if "torch" in sys.modules:
            free_models(*arguments, **options)

    base_op.free_models = free_loaded_models
    formatter.unify_format = functools.partial(_unify_here, formatter.unify_format)
    config.setup_logger = lambda *arguments, **options: None
    keep_grounding_local()


def _unify_here(
    unify: Callable[..., Any],
    dataset: Any,
    *arguments: Any,
    num_proc: int | None = 1,
    **options: Any,
) -> Any:
    """Check a data set that was read, without a pool of processes when one process is to do it."""
    in_pool = num_proc if num_proc and num_proc > 1 else None
    return unify(dataset, *arguments, num_proc=in_pool, **options)
