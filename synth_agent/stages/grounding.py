"""What Data-Juicer's filter of phrase grounding needs beside its detector, from this machine only.

The filter by itself downloads NLTK's older data, which are pickles, takes away NLTK's guard against
pickles, and calls a method of the detector's processor that transformers 5 names otherwise.
"""

from __future__ import annotations

import functools
from typing import Any

NLTK_DATA = {
    "punkt_tab": "tokenizers/punkt_tab/english/",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng/",
}
"""What finding nouns reads, plain text and JSON, and where NLTK looks for it."""


def keep_grounding_local() -> None:
    """Let the filter use data that are here, or say which are missing, once it is made."""
    import data_juicer.ops.filter.phrase_grounding_recall_filter as phrases

    phrases.prepare_model = functools.partial(_prepared, phrases.prepare_model)


def _prepared(prepare_model: Any, model_type: str, **given: Any) -> Any:
    """Return the loader of a model, as the filter asks for its detector and its tagger."""
    if model_type != "nltk_pos_tagger":
        return prepare_model(model_type=model_type, **given)
    _check_data()
    _rename_for_transformers()
    return functools.partial(_tagger)


def _check_data() -> None:
    """Stop NLTK from downloading, and check that it has what it needs.

    Raises:
        FileNotFoundError: naming the data and the command that fetches them.
    """
    import data_juicer.utils.nltk_utils as nltk_utils
    import nltk

    nltk.download = _download_nothing
    nltk_utils.patch_nltk_pickle_security = _leave_guarded
    for name, path in NLTK_DATA.items():
        try:
            nltk.data.find(path)
        except LookupError:
            raise FileNotFoundError(
                f"NLTK's data {name} are not here; python -m nltk.downloader {' '.join(NLTK_DATA)}"
                " fetches them, and NLTK_DATA names their folder"
            ) from None


def _rename_for_transformers() -> None:
    from transformers import OwlViTProcessor

    if not hasattr(OwlViTProcessor, "post_process_object_detection"):
        OwlViTProcessor.post_process_object_detection = (
            OwlViTProcessor.post_process_grounded_object_detection
        )


def _tagger(device: str | None = None) -> Any:
    """Return NLTK's tagger; it runs on the CPU wherever the detector runs."""
    import nltk

    return nltk.pos_tag


def _download_nothing(*arguments: Any, **options: Any) -> bool:
    return False


def _leave_guarded() -> None:
    return None
