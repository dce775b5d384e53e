"""Write the catalogue of Data-Juicer's operators that the rest of the program reads.

Importing Data-Juicer takes seconds, reading JSON milliseconds, so the catalogue is made once per
Data-Juicer version: `python -m synth_agent.stages.build_catalogue`. Types, defaults and bounds come
from the operators' signatures; choices, ranges of scores and the reasons for refusing an operator,
which the signatures do not state, are written below.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.metadata import requires, version
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from synth_agent.catalogue import CATALOGUE_FILE, NEEDS, SUPPORTED_VERSION
from synth_agent.data import atomic_file
from synth_agent.recipe_policy import PACKAGES
from synth_agent.stages.datajuicer import guard

KINDS = ("Mapper", "Filter", "Deduplicator", "Selector", "Grouper", "Aggregator", "Pipeline")

BATCHED = (
    "image_text_similarity_filter",
    "image_text_matching_filter",
    "image_aesthetics_filter",
    "image_captioning_mapper",
)
CHOICES: dict[str, tuple[str, ...]] = {
    "any_or_all": ("any", "all"),
    "reduce_mode": ("avg", "max", "min"),
    "keep_candidate_mode": ("random_any", "similar_one_simhash", "all"),
    "image_deduplicator.method": ("phash", "dhash", "whash", "ahash"),
    "video_deduplicator.method": ("md5",),
    "fix_unicode_mapper.normalization": ("NFC", "NFKC", "NFD", "NFKD"),
    "document_minhash_deduplicator.tokenization": (
        "space",
        "punctuation",
        "character",
        "sentencepiece",
    ),
    "document_simhash_deduplicator.tokenization": ("space", "punctuation", "character"),
    **{f"batched_{name}.dtype": ("float32", "bfloat16") for name in BATCHED},
    "batched_image_captioning_mapper.dtype": ("float32", "bfloat16", "auto"),
}
"""Values that a parameter takes, by name or by operator and name."""

SHARES = re.compile(r"^(min|max|select|top)_(ratio|score)$|^(prob|jaccard)_threshold$|^min_recall$")
COUNTS = re.compile(r"^(min|max)_(num|len|width|height|ppl|action_num|dependency_num)$")
UNBOUNDED_RATIOS = ("image_aspect_ratio_filter", "video_aspect_ratio_filter")
UNBOUNDED_SCORES = ("video_motion_score", "video_ocr", "optical_flow", "audio_")
COSINES = (
    "image_text_similarity_filter",
    "batched_image_text_similarity_filter",
    "image_pair_similarity_filter",
)

CODE = "runs code that the recipe brings"
SHELL = "starts other programs or installs packages"
PICKLE = "loads pickled weights, which can run code"
NETWORK = "reads from or writes to the network"
CLONE = "clones a repository and downloads weights"
SERVICE = "sends samples to a service on the network"
LANGUAGE_MODEL = "starts a language model with settings that the recipe brings"
DOWNLOAD = "downloads word lists or a model"
PICTURES = "writes new pictures into the seed's image folder, which later runs would see"

DANGERS: dict[str, str] = {
    "python_lambda_mapper": CODE,
    "python_file_mapper": CODE,
    "remove_repeat_sentences_mapper": "runs code that the recipe brings (parameter tokenizer)",
    "image_ohem_selector": "runs code that the recipe brings (parameter score_file)",
    **dict.fromkeys(
        (
            "export_to_lerobot_mapper",
            "image_mmpose_mapper",
            "vggt_mapper",
            "video_active_speaker_detect_mapper",
            "video_camera_calibration_droidcalib_mapper",
            "video_camera_pose_megasam_mapper",
            "video_depth_estimation_mapper",
            "video_undistort_mapper",
        ),
        SHELL,
    ),
    **dict.fromkeys(
        (
            "image_tagging_mapper",
            "image_sam_3d_body_mapper",
            "video_tagging_from_frames_mapper",
            "video_hand_reconstruction_mapper",
            "video_hand_reconstruction_hawor_mapper",
        ),
        CLONE,
    ),
    **dict.fromkeys(
        ("download_file_mapper", "s3_download_file_mapper", "s3_upload_file_mapper"), NETWORK
    ),
    **dict.fromkeys(
        (
            "flagged_words_filter",
            "stopwords_filter",
            "perplexity_filter",
            "language_id_score_filter",
            "text_action_filter",
            "text_entity_dependency_filter",
            "phrase_grounding_recall_filter",
        ),
        DOWNLOAD,
    ),
}
"""Why an operator is refused until a person allows it."""

DANGER_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^video_(human_tracks|hand_|trajectory|camera|action_).*"), PICKLE),
    (re.compile(r".*annotation.*"), SERVICE),
)
SERVICE_PARAMETERS = ("api_model", "api_or_hf_model", "api_endpoint")

FIELDS: dict[str, str] = {
    "text": r"self\.text_key\b",
    "images": r"self\.image_key\b",
    "audio": r"self\.audio_key\b",
    "video": r"self\.video_key\b",
}
"""What an operator's code says where it reads a field of samples."""
MODEL_CODE = re.compile(r"\b(prepare_model|get_model)\(")
GENERATING = re.compile(
    r"hf_(model|img2seq|diffusion)$|enable_vllm$|hf_(video|audio)_.*model$|api_or_hf_model$"
)
"""Parameters of operators that generate text or pictures."""
SCORING = ("query_", "instruction_following_", "llm_perplexity_")
"""First words of operators that take such a model and only score with it."""
BOUNDS = re.compile(r"(min|max)_\w+|\w*threshold|\w+_thr")
ALWAYS_THERE = frozenset(
    {"torch", "torchvision", "transformers", "ray", "numpy", "pillow", "pyarrow", "data-juicer"}
)
"""Packages that this program requires itself."""
OWN_MODULE = "synth_agent.stages."


def main() -> None:
    """Write the catalogue beside `catalogue.py`.

    Raises:
        SystemExit: If another Data-Juicer version is installed than the one supported.
    """
    guard()
    import data_juicer.ops  # noqa: F401  registers every operator
    from data_juicer.ops.base_op import OPERATORS

    import synth_agent.stages.endpoint_operators
    import synth_agent.stages.forget_measurements
    import synth_agent.stages.operators  # noqa: F401  registers the program's own

    installed = version("py-data-juicer")
    if installed != SUPPORTED_VERSION:
        raise SystemExit(f"py-data-juicer {installed} is installed, not {SUPPORTED_VERSION}")
    operators = {name: OPERATORS.modules[name] for name in sorted(OPERATORS.modules)}
    base: dict[str, list[dict[str, Any]]] = {}
    described = []
    for name, cls in operators.items():
        kind = _kind(cls)
        base.setdefault(kind, [_base_parameter(*item) for item in cls._BASE_PARAMS.items()])
        described.append(_operator(name, kind, cls))
    document = {"version": installed, "base": base, "operators": described}
    text = json.dumps(document, ensure_ascii=False, indent=1, sort_keys=True)
    with atomic_file(CATALOGUE_FILE) as file:
        # Some defaults lie in the home of whoever builds the catalogue.
        file.write(text.replace(f"{Path.home()}/", "~/") + "\n")


def _kind(cls: type) -> str:
    names = [base.__name__ for base in cls.__mro__]
    return next(kind for kind in KINDS if kind in names).lower()


def _operator(name: str, kind: str, cls: Any) -> dict[str, Any]:
    parameters = [_parameter(name, parameter) for parameter in _signature(cls)]
    names = {parameter["name"] for parameter in parameters}
    needs = _needs(cls, names)
    described = {
        "name": name,
        "kind": kind,
        "summary": _first_paragraph(cls.__doc__ or ""),
        "parameters": parameters,
        "needs": needs,
        "packages": _packages(name, cls),
        "cost": _cost(name, kind, needs, names),
        "is_threshold": kind == "filter" and any(BOUNDS.fullmatch(own) for own in names),
        "source": "synth-agent" if cls.__module__.startswith(OWN_MODULE) else "data-juicer",
    }
    danger = _danger(name, names)
    return {**described, "danger": danger} if danger else described


def _signature(cls: Any) -> list[inspect.Parameter]:
    """Return an operator's parameters; the program's own also take those of the stock operator."""
    found: dict[str, inspect.Parameter] = {}
    owners = cls.__mro__ if cls.__module__.startswith(OWN_MODULE) else (cls,)
    for owner in owners:
        if owner.__name__ in KINDS:
            break
        if owner is not cls and "__init__" not in vars(owner):
            continue
        for parameter in inspect.signature(owner.__init__).parameters.values():
            if parameter.name != "self" and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                found.setdefault(parameter.name, parameter)
    return list(found.values())


def _modules(cls: Any) -> list[types.ModuleType]:
    """Return the modules in which an operator is written, the bases of all operators left out."""
    names = [
        owner.__module__
        for owner in cls.__mro__
        if owner.__module__.startswith(("data_juicer.ops.", OWN_MODULE))
        and owner.__module__ != "data_juicer.ops.base_op"
    ]
    return [sys.modules[name] for name in dict.fromkeys(names)]


def _needs(cls: Any, parameters: set[str]) -> list[str]:
    code = "\n".join(
        inspect.getsource(owner)
        for owner in cls.__mro__
        if sys.modules.get(owner.__module__) in _modules(cls)
    )
    needs = {field for field, pattern in FIELDS.items() if re.search(pattern, code)}
    names_model = any(name.startswith("hf_") for name in parameters)
    # Several operators load a tokenizer only if a parameter that recipes leave alone asks for it.
    if names_model or (MODEL_CODE.search(code) and not parameters & {"tokenization", "tokenizer"}):
        needs.add("model")
    if cls._accelerator == "cuda":
        needs.add("gpu")
    if parameters.intersection(SERVICE_PARAMETERS):
        needs.add("service")
        if not parameters & {"is_hf_model", "is_api_model", "enable_vllm"}:
            needs.discard("model")
    if DANGERS.get(cls._name) in (NETWORK, CLONE, DOWNLOAD):
        needs.add("network")
    return [need for need in NEEDS if need in needs]


def _packages(name: str, cls: Any) -> list[str]:
    from data_juicer.utils.lazy_loader import LazyLoader

    required = {
        _normal(re.split(r"[^\w.-]", line)[0])
        for line in requires("py-data-juicer") or ()
        if "extra ==" not in line
    }
    found = {package for _, package in PACKAGES.get(name, ())}
    for module in _modules(cls):
        for value in vars(module).values():
            # The loader's own attribute access would import the package.
            if type(value) is LazyLoader:
                package = object.__getattribute__(value, "_package_name")
                if not isinstance(package, str) or package.startswith("git+"):
                    package = object.__getattribute__(value, "_module_name").split(".")[0]
                found.add(_normal(re.split(r"[@\[ ]", package)[0]))
    renamed = {"cv2": "opencv-contrib-python", "opencv-python": "opencv-contrib-python"}
    found = {renamed.get(package, package) for package in found}
    return sorted(found - required - ALWAYS_THERE)


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _cost(name: str, kind: str, needs: Sequence[str], parameters: set[str]) -> str:
    if "service" in needs:
        return "service"
    if {"video", "audio"} & set(needs):
        return "media"
    is_generating = any(GENERATING.fullmatch(parameter) for parameter in parameters)
    if is_generating and kind != "filter" and not name.startswith(SCORING):
        return "generation"
    if "model" in needs or "gpu" in needs:
        return "model"
    return "picture" if "images" in needs else "text"


def _danger(name: str, parameters: set[str]) -> str:
    if name in DANGERS:
        return DANGERS[name]
    if parameters.intersection(SERVICE_PARAMETERS):
        return SERVICE
    if "model_params" in parameters:
        return LANGUAGE_MODEL
    for pattern, reason in DANGER_PATTERNS:
        if pattern.match(name):
            return reason
    return PICTURES if "save_dir" in parameters else ""


def _first_paragraph(text: str) -> str:
    paragraph = inspect.cleandoc(text).split("\n\n")[0]
    return " ".join(paragraph.split())


def _base_parameter(name: str, described: tuple[type | None, Any]) -> dict[str, Any]:
    kind, default = described
    parameter: dict[str, Any] = {
        "name": name,
        "type": kind.__name__ if kind else "Any",
        "accepts": [kind.__name__] if kind else ["any"],
        "default": default,
        "required": False,
    }
    if name in ("num_proc", "batch_size"):
        parameter.update(accepts=["int", "null"], minimum=0 if name == "num_proc" else 1)
    return parameter


def _parameter(operator: str, parameter: inspect.Parameter) -> dict[str, Any]:
    required = parameter.default is parameter.empty
    default = None if required else _plain(parameter.default)
    annotation = parameter.annotation
    if annotation is parameter.empty and parameter.default is not None and not required:
        annotation = type(parameter.default)
    accepts, limits, choices = _annotation(annotation)
    if default is None and not required:
        accepts.add("null")
    described: dict[str, Any] = {
        "name": parameter.name,
        "type": _type_text(parameter.annotation),
        "accepts": sorted(accepts),
        "default": default,
        "required": required,
        **limits,
        **_known_range(operator, parameter.name, accepts),
    }
    choices = CHOICES.get(f"{operator}.{parameter.name}", CHOICES.get(parameter.name, choices))
    if choices and (required or default is None or default in choices):
        described["choices"] = list(choices)
    return described


def _known_range(operator: str, name: str, accepts: set[str]) -> dict[str, float]:
    if not accepts & {"int", "float"}:
        return {}
    if operator in COSINES and SHARES.match(name):
        return {"minimum": -1, "maximum": 1}
    if operator in UNBOUNDED_RATIOS and SHARES.match(name):
        return {"minimum": 0}
    if SHARES.match(name) and not any(word in operator for word in UNBOUNDED_SCORES):
        return {"minimum": 0, "maximum": 1}
    return {"minimum": 0} if COUNTS.match(name) else {}


def _annotation(annotation: Any) -> tuple[set[str], dict[str, float], tuple[Any, ...]]:
    """Return the accepted plain types, the bounds and the choices of an annotation."""
    origin = get_origin(annotation)
    if origin is Annotated:
        accepts, limits, choices = _annotation(get_args(annotation)[0])
        for mark in get_args(annotation)[1:]:
            limits.update(_limits(mark, "int" in accepts))
        return accepts, limits, choices
    if origin in (Union, types.UnionType):
        parts = [_annotation(part) for part in get_args(annotation)]
        limits = {} if len(parts) > 2 else {k: v for part in parts for k, v in part[1].items()}
        return set().union(*(part[0] for part in parts)), limits, ()
    if origin is Literal:
        values = get_args(annotation)
        return {type(value).__name__ for value in values}, {}, values
    if annotation is type(None):
        return {"null"}, {}, ()
    plain = origin or annotation
    if plain in (int, float, str, bool):
        return {plain.__name__}, {}, ()
    if plain in (list, tuple, typing.Sequence):
        return {"list"}, {}, ()
    if isinstance(plain, type) and issubclass(plain, Mapping):
        return {"dict"}, {}, ()
    return {"any"}, {}, ()


def _limits(mark: Any, whole: bool) -> dict[str, float]:
    limits: dict[str, float] = {}
    for name, key, step in (("ge", "minimum", 0), ("gt", "minimum", 1)):
        if getattr(mark, name, None) is not None:
            limits[key] = getattr(mark, name) + (step if whole else 0)
    for name, key, step in (("le", "maximum", 0), ("lt", "maximum", 1)):
        if getattr(mark, name, None) is not None:
            limits[key] = getattr(mark, name) - (step if whole else 0)
    return limits


def _type_text(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return "Any"
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return str(value)


if __name__ == "__main__":
    main()
