"""What decides the scores of a column: the filter, its parameters and the models that they name.

Owns the knowledge of Data-Juicer's filters that their signatures do not give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from synth_agent.catalogue import SUPPORTED_VERSION, load_catalogue
from synth_agent.runs import digest

Kind = Literal["number", "list", "string"]

KEY_LENGTH = 24
_FIELDS = ("text_key", "image_key", "image_bytes_key")


@dataclass(frozen=True)
class Source:
    """Where a filter's scores come from: the knowledge that its signature does not give."""

    stats: Mapping[str, Kind]
    """The keys that it writes; a list holds one number per picture, chunk or entity."""
    parameters: tuple[str, ...] = ()
    """Parameters that change a score. All others are thresholds or decide how it is computed."""
    models: tuple[str, ...] = ()
    """Parameters that name a folder or file whose content changes a score."""
    only_with: Mapping[str, str] = field(default_factory=dict)
    """Parameters that change a score only while another one, the value here, is true."""
    tokenized_stats: Mapping[str, Kind] = field(default_factory=dict)
    """The keys in place of `stats` while `tokenization` is true."""


_TOKENIZER_LANGUAGE = {"lang": "tokenization"}
_WORD_LIST = ("lang", "tokenization", "use_words_aug")
_WORD_GROUPS = {
    "words_aug_group_sizes": "use_words_aug",
    "words_aug_join_char": "use_words_aug",
}
_FLIPS = ("horizontal_flip", "vertical_flip", "reduce_mode")
_LINES = (
    "canny_threshold1",
    "canny_threshold2",
    "hough_threshold",
    "min_line_length",
    "max_line_gap",
    "angle_tolerance",
)

SOURCES: Mapping[str, Source] = {
    "text_length_filter": Source({"text_len": "number"}),
    "words_num_filter": Source(
        {"num_words": "number"}, ("tokenization",), only_with=_TOKENIZER_LANGUAGE
    ),
    "character_repetition_filter": Source({"char_rep_ratio": "number"}, ("rep_len",)),
    "word_repetition_filter": Source(
        {"word_rep_ratio": "number"}, ("rep_len", "tokenization"), only_with=_TOKENIZER_LANGUAGE
    ),
    "special_characters_filter": Source({"special_char_ratio": "number"}),
    "alphanumeric_filter": Source(
        {"alnum_ratio": "number"},
        ("tokenization",),
        tokenized_stats={"alpha_token_ratio": "number"},
    ),
    "average_line_length_filter": Source({"avg_line_length": "number"}),
    "maximum_line_length_filter": Source({"max_line_length": "number"}),
    "text_action_filter": Source({"num_action": "number"}, ("lang",)),
    "text_entity_dependency_filter": Source({"num_dependency_edges": "list"}, ("lang",)),
    # Here `lang` says which languages to keep; the model tells them apart without it.
    "language_id_score_filter": Source({"lang": "string", "lang_score": "number"}),
    "flagged_words_filter": Source(
        {"flagged_words_ratio": "number"}, _WORD_LIST, ("flagged_words_dir",), _WORD_GROUPS
    ),
    "stopwords_filter": Source(
        {"stopwords_ratio": "number"}, _WORD_LIST, ("stopwords_dir",), _WORD_GROUPS
    ),
    "perplexity_filter": Source({"perplexity": "number"}, ("lang",)),
    "token_num_filter": Source({"num_token": "number"}, models=("hf_tokenizer",)),
    "image_shape_filter": Source({"image_width": "list", "image_height": "list"}),
    "image_size_filter": Source({"image_sizes": "list"}),
    "image_aspect_ratio_filter": Source({"aspect_ratios": "list"}),
    "image_text_similarity_filter": Source({"image_text_similarity": "list"}, _FLIPS, ("hf_clip",)),
    "image_text_matching_filter": Source(
        {"image_text_matching_score": "list"}, _FLIPS, ("hf_blip",)
    ),
    "image_pair_similarity_filter": Source({"image_pair_similarity": "list"}, models=("hf_clip",)),
    # The model's class and the scale of its scores are chosen by the text of the path.
    "image_aesthetics_filter": Source(
        {"image_aesthetics_scores": "list"}, ("hf_scorer_model",), ("hf_scorer_model",)
    ),
    "image_watermark_filter": Source(
        {"image_watermark_prob": "list"}, models=("hf_watermark_model",)
    ),
    "image_nsfw_filter": Source({"image_nsfw_score": "list"}, models=("hf_nsfw_model",)),
    "image_face_count_filter": Source({"face_counts": "list"}, models=("cv_classifier",)),
    "image_face_ratio_filter": Source({"face_ratios": "list"}, models=("cv_classifier",)),
    # The least numbers of lines are thresholds and also scale the confidence.
    "image_subplot_filter": Source(
        {
            "image_subplot_confidence": "list",
            "horizontal_peak_count": "list",
            "vertical_peak_count": "list",
        },
        ("min_horizontal_lines", "min_vertical_lines", *_LINES),
    ),
    "phrase_grounding_recall_filter": Source(
        {"phrase_grounding_recall": "list"},
        (*_FLIPS, "iou_thr", "large_area_ratio_thr", "conf_thr"),
        ("hf_owlvit",),
    ),
}
"""Filters of Data-Juicer whose scores depend on a sample's text and pictures alone."""

PICTURE_HASHES = "picture_hashes"
OWN_SOURCES: Mapping[str, Source] = {
    PICTURE_HASHES: Source({"image_digest": "string", "image_dhash": "string"}),
}
"""Statistics that are no filter of Data-Juicer. One value a picture, in hex, separated by spaces."""


def source_of(operator: str) -> Source:
    """Return where the scores of a scored operator come from; KeyError for any other."""
    return OWN_SOURCES[operator] if operator in OWN_SOURCES else SOURCES[operator]


@dataclass(frozen=True)
class ColumnSpec:
    """What decides the scores of one column."""

    operator: str
    parameters: Mapping[str, Any]
    """Only those that change a score, every one of them written out."""
    models: Mapping[str, str]
    """Digest of the content that each model parameter names."""
    stats: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Return the content of `column.json`."""
        return {
            "operator": self.operator,
            "parameters": dict(self.parameters),
            "models": dict(self.models),
            "data_juicer": SUPPORTED_VERSION,
            "stats": list(self.stats),
        }

    @property
    def key(self) -> str:
        """The column's name on disk."""
        return digest(self.document())[:KEY_LENGTH]

    @property
    def main_stat(self) -> str:
        """The first stat whose values are numbers; ask only where there is one."""
        return self.numeric_stats[0]

    @property
    def numeric_stats(self) -> tuple[str, ...]:
        """The stats whose values are numbers."""
        return tuple(stat for stat in self.stats if self.kind(stat) != "string")

    def kind(self, stat: str) -> Kind:
        """Return what one value of a stat is."""
        source = source_of(self.operator)
        return {**source.stats, **source.tokenized_stats}[stat]


def column_spec(
    operator: str, parameters: Mapping[str, Any], model_digest: Callable[[str], str]
) -> ColumnSpec | None:
    """Return the column that holds a filter's scores.

    Args:
        operator: Name of an operator of Data-Juicer.
        parameters: As a recipe gives them; defaults are filled in.
        model_digest: Called with a model parameter's value, returns the content's digest.

    Returns:
        None where the scores are not decided by text and pictures alone: another kind of operator,
        other fields, or a model that the parameters do not name.
    """
    if operator in OWN_SOURCES:
        return ColumnSpec(operator, {}, {}, tuple(OWN_SOURCES[operator].stats))
    source = SOURCES.get(operator)
    if source is None:
        return None
    known = load_catalogue().parameters(operator)
    values = {name: parameter.default for name, parameter in known.items()} | dict(parameters)
    if any(values[name] != known[name].default for name in _FIELDS):
        return None
    if not all(isinstance(values[name], str) and values[name] for name in source.models):
        return None
    needed = list(source.parameters)
    needed += [name for name, switch in source.only_with.items() if values[switch]]
    # 1 and 1.0 are one value of a real parameter, and must be one column.
    chosen = {
        name: float(values[name])
        if type(values[name]) is int and "float" in known[name].accepts
        else values[name]
        for name in needed
    }
    tokenized = source.tokenized_stats and values["tokenization"]
    return ColumnSpec(
        operator,
        chosen,
        {name: model_digest(values[name]) for name in source.models},
        tuple(source.tokenized_stats if tokenized else source.stats),
    )


def is_default(spec: ColumnSpec) -> bool:
    """Tell whether a column has the parameters that its filter has by default."""
    if spec.operator in OWN_SOURCES:
        return True
    known = load_catalogue().parameters(spec.operator)
    return all(
        value == known[name].default
        for name, value in spec.parameters.items()
        if name not in spec.models
    )
