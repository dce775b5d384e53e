"""The sizes and choices that make one Mini-Gemini model.

Owns `ModelConfig`, its two presets (`mgm-2b`, the published model; `mgm-mini`, the one that
trains on two CPU cores) and the translation from and to the configuration files of published
checkpoints. Every model of this package is built from a `ModelConfig`; only its values differ.
It reads configuration files and never weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from mgm.errors import InputError
from mgm.files import read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

LANGUAGE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "pad_token_id",
    "eos_token_id",
    "bos_token_id",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
)
VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
"""What `CLIPVisionConfig` assumes for a key that a config.json leaves out."""

GEMMA_2B: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
CLIP_LARGE_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# Names that OpenCLIP gives to ConvNeXt towers, with the sizes timm builds for them.
CONVNEXT_SIZES: dict[str, dict[str, Any]] = {
    "convnext_base": {"hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3]},
    "convnext_large": {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3]},
    "convnext_xxlarge": {
        "hidden_sizes": [384, 768, 1536, 3072],
        "depths": [3, 4, 30, 3],
        "norm_eps": 1e-5,
    },
}
CONVNEXT_LARGE: dict[str, Any] = {**CONVNEXT_SIZES["convnext_large"], "drop_path_rate": 0.1}
FUSED_STRIDE = 4
"""Pixels of the high-resolution image to one cell of the fused feature map."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the model; equal configurations build equal modules."""

    name: str
    language: dict[str, Any]
    """Arguments of `GemmaConfig`. `hidden_act` is taken literally: `gelu` is the erf GELU."""
    vision: dict[str, Any]
    """Arguments of `CLIPVisionConfig`; `image_size` is the low resolution in pixels."""
    high_resolution: dict[str, Any]
    """ConvNeXt: `hidden_sizes`, `depths`, `drop_path_rate`, and `norm_eps` where not 1e-6."""
    image_size_aux: int
    """Side in pixels of the square high-resolution image."""
    image_grid: int = 1
    """The low-resolution tower sees grid x grid tiles of the picture."""
    image_global: bool = False
    """Whether the tiles are joined by one view of the whole picture; needs a grid above 1."""
    projector_type: str = "mlp2x_gelu"
    vision_select_layer: int = -2
    vision_select_feature: str = "patch"
    tokenizer_model_max_length: int | None = None
    """Longest spliced sequence in positions; None means unlimited."""
    tokenizer_padding_side: str = "right"
    image_aspect_ratio: str = "pad"
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    drop_path: bool = True
    """Whether the frozen ConvNeXt drops blocks at random in training mode, as published."""
    attention: str = "sdpa"
    """`eager`, `sdpa` or `flash_attention_2`."""
    reassociated_mining: bool = True
    """Mine by the reassociated products: equal to rounding, far cheaper."""
    vision_tower_path: str = ""
    """Where the checkpoint said its CLIP came from; a note, never needed to load it."""
    high_resolution_tower_path: str = ""
    extra: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Keys of a read config.json that this package does not use, kept for writing it back."""

    def __post_init__(self) -> None:
        """Refuse combinations from which no model can be built.

        Raises:
            InputError: Naming the field, its value and the value it clashes with.
        """
        if self.vision_select_feature != "patch":
            self._refuse("vision_select_feature", "is not 'patch'", "the CLS token has no window")
        if self.image_global and self.image_grid == 1:
            self._refuse("image_global", "needs image_grid above 1", "set image_grid to 2")
        if self.tokenizer_padding_side not in ("left", "right"):
            self._refuse("tokenizer_padding_side", "is neither 'left' nor 'right'", "")
        if self.attention not in ("eager", "sdpa", "flash_attention_2"):
            self._refuse("attention", "is unknown", "use eager, sdpa or flash_attention_2")
        if not re.fullmatch(r"identity|linear|mlp\d+x_gelu", self.projector_type):
            self._refuse("projector_type", "is unknown", "use linear, mlp2x_gelu or identity")
        layers = self.vision.get("num_hidden_layers", VISION_DEFAULTS["num_hidden_layers"])
        if not -layers - 1 <= self.vision_select_layer <= layers:
            self._refuse("vision_select_layer", f"is none of {layers} layers", "the kit's is -2")
        cells = self.tokens_per_side * self.image_grid * FUSED_STRIDE
        if self.image_size_aux % (8 * FUSED_STRIDE) or self.image_size_aux % cells:
            self._refuse(
                "image_size_aux",
                f"is not a multiple of 32 and of {cells}",
                "each low-resolution patch must cover a whole window of the high-resolution map",
            )

    def _refuse(self, name: str, reason: str, hint: str) -> None:
        value = getattr(self, name)
        raise InputError("Model configuration", f"{name} = {value!r} {reason}", hint)

    @property
    def tokens_per_side(self) -> int:
        """Low-resolution patches along one side of one view (24 for the published model)."""
        return int(self.vision["image_size"]) // int(self.vision["patch_size"])

    @property
    def num_views(self) -> int:
        """Low-resolution views of one picture: its tiles, and the whole where asked."""
        return self.image_grid**2 + int(self.image_global)

    @property
    def num_image_tokens(self) -> int:
        """Positions that one picture takes in the sequence (576 for the published model)."""
        return self.num_views * self.tokens_per_side**2

    @property
    def low_resolution(self) -> int:
        """Side in pixels of one low-resolution view."""
        return int(self.vision["image_size"])

    @property
    def vision_width(self) -> int:
        """Channels of the low-resolution features."""
        return int(self.vision["hidden_size"])

    @property
    def high_resolution_width(self) -> int:
        """Channels of the fused high-resolution map: the sum over its stages."""
        return sum(self.high_resolution["hidden_sizes"])

    @property
    def language_width(self) -> int:
        """Width of the language model."""
        return int(self.language["hidden_size"])

    @property
    def has_drop_path(self) -> bool:
        """Whether the high-resolution tower is random in training mode."""
        return self.drop_path and self.high_resolution.get("drop_path_rate", 0.1) > 0

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes` applied and checked."""
        return replace(self, **changes)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Return the configuration called `mgm-2b` or `mgm-mini`.

        Raises:
            InputError: If there is no preset of that name.
        """
        if name == "mgm-2b":
            base: dict[str, Any] = {
                "language": GEMMA_2B,
                "vision": CLIP_LARGE_336,
                "high_resolution": CONVNEXT_LARGE,
                "image_size_aux": 768,
                "tokenizer_model_max_length": 2048,
            }
        elif name == "mgm-mini":
            base = _MINI
        else:
            raise InputError("Unknown preset", f"{name!r}", "use mgm-2b or mgm-mini")
        return cls(name=name, **{**base, **overrides})

    @classmethod
    def from_mgm_config(
        cls, config_json: Mapping[str, Any], towers: Mapping[str, Any] | None = None
    ) -> Self:
        """Read the config.json of a published-format checkpoint.

        Args:
            config_json: The parsed file.
            towers: The parsed `towers.json` beside it: the sizes of both towers, and where their
                folders are if it says so. Published checkpoints have none: theirs are the towers
                of MGM-2B, which is checked by width.

        Raises:
            InputError: If a key is missing or the tower sizes cannot be known.
        """
        if config_json.get("model_type") != "mgm_gemma":
            raise InputError(
                "Not an MGM configuration",
                f"config.json: model_type = {config_json.get('model_type')!r}, not 'mgm_gemma'",
                "give a bare language model's folder as --language-model",
            )
        _require(config_json, ("mm_projector_type", "mm_vision_select_layer"), "config.json")
        sizes = _read_towers(config_json, towers)
        known = {key: name for name, key in _MGM_KEYS.items() if key in config_json}
        values = {name: config_json[key] for key, name in known.items()}
        values.setdefault("image_size_aux", 320)  # what the original assumes when absent
        language = _pick_language(config_json, "config.json")
        skipped = {*known, *LANGUAGE_FIELDS, *_DERIVED_KEYS}
        extra = {key: value for key, value in config_json.items() if key not in skipped}
        name = sizes.pop("name", None) or ("mgm-2b" if language["hidden_size"] == 2048 else "mgm")
        return cls(name=name, language=language, extra=extra, **{**values, **sizes})

    def to_mgm_config(
        self, *, torch_dtype: str | None = None, is_pretraining: bool = False
    ) -> dict[str, Any]:
        """Return a config.json with the keys and values of the published format.

        Args:
            torch_dtype: Of the weights beside it, `bfloat16` for instance; None leaves it out.
            is_pretraining: Whether it lies beside a projector file. The published trainer then
                still names the language model's class.
        """
        written = {key: getattr(self, name) for name, key in _MGM_KEYS.items()}
        defaults = {
            "use_mm_proj": True,
            "optimize_vision_tower": False,
            "optimize_vision_tower_aux": False,
            "image_grid_pinpoints": None,
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "mm_projector_lr": None,
            "freeze_mm_mlp_adapter": False,
            "use_cache": True,
            **_GEMMA_DEFAULTS,
        }
        derived = {
            "architectures": ["GemmaForCausalLM" if is_pretraining else "MGMGemmaForCausalLM"],
            "model_type": "mgm_gemma",
            "mm_hidden_size": self.vision_width,
            "mm_hidden_size_aux": self.high_resolution_width,
            "tune_mm_mlp_adapter": is_pretraining,
        }
        if torch_dtype is not None:
            derived["torch_dtype"] = torch_dtype
        return {**defaults, **self.extra, **self.language, **written, **derived}

    def to_towers(self) -> dict[str, Any]:
        """Return the tower sizes, which the published config.json does not hold."""
        return {
            "name": self.name,
            "clip_vision": dict(self.vision),
            "convnext_aux": {
                "depths": list(self.high_resolution["depths"]),
                "dims": list(self.high_resolution["hidden_sizes"]),
                "norm_eps": self.high_resolution.get("norm_eps", 1e-6),
                "drop_path_rate": self.high_resolution.get("drop_path_rate", 0.1),
            },
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }

    @classmethod
    def has_published_widths(cls, config_json: Mapping[str, Any]) -> bool:
        """Tell whether a config.json belongs to towers as wide as those of MGM-2B."""
        published = cls.preset("mgm-2b")
        widths = [config_json.get(key) for key in _WIDTH_KEYS]
        return widths == [published.vision_width, published.high_resolution_width]

    @classmethod
    def tower_sizes(cls, vision_dir: Path, high_dir: Path) -> dict[str, Any]:
        """Return the content of a `towers.json` for the towers in two folders.

        Raises:
            InputError: If a file is missing or unusable, or the two towers normalise differently.
        """
        image_mean, image_std = _read_normalisation(vision_dir)
        convnext = _read_convnext(high_dir, image_mean, image_std)
        return {
            "clip_vision": _read_vision(vision_dir),
            "convnext_aux": {"dims": convnext.pop("hidden_sizes"), **convnext},
            "image_mean": list(image_mean),
            "image_std": list(image_std),
        }

    @classmethod
    def from_parts(
        cls, language_dir: Path, vision_dir: Path, high_dir: Path, **overrides: Any
    ) -> Self:
        """Read the sizes of a model that will be put together from three folders.

        Args:
            language_dir: A Gemma folder in the Hugging Face layout.
            vision_dir: A CLIP folder in the Hugging Face layout, whole or vision only.
            high_dir: A ConvNeXt folder, `ConvNextModel` or OpenCLIP.
            overrides: Fields of `ModelConfig` to set. `image_size_aux` is otherwise the size at
                which one patch covers a window of 8 x 8 cells, as in the published model.

        Raises:
            InputError: If a file is missing or unusable, or the two towers normalise differently.
        """
        language_file = language_dir / "config.json"
        written = read_json(language_file)
        if written.get("model_type") != "gemma":
            raise InputError(
                "Not a Gemma folder",
                f"{language_file}: model_type = {written.get('model_type')!r}, not 'gemma'",
                "other models compute otherwise with weights of the same names",
            )
        language = _pick_language(written, str(language_file))
        vision = _read_vision(vision_dir)
        image_mean, image_std = _read_normalisation(vision_dir)
        high_resolution = _read_convnext(high_dir, image_mean, image_std)
        side = int(vision["image_size"]) // int(vision["patch_size"])
        values: dict[str, Any] = {
            "name": "mgm",
            "language": language,
            "vision": vision,
            "high_resolution": high_resolution,
            "image_size_aux": side * 8 * FUSED_STRIDE * int(overrides.get("image_grid", 1)),
            "image_mean": image_mean,
            "image_std": image_std,
            "vision_tower_path": str(vision_dir),
            "high_resolution_tower_path": str(high_dir),
        }
        return cls(**{**values, **overrides})


# Field of ModelConfig -> key in a published config.json.
_MGM_KEYS = {
    "image_size_aux": "image_size_aux",
    "image_grid": "image_grid",
    "image_global": "image_global",
    "image_aspect_ratio": "image_aspect_ratio",
    "projector_type": "mm_projector_type",
    "vision_select_layer": "mm_vision_select_layer",
    "vision_select_feature": "mm_vision_select_feature",
    "tokenizer_model_max_length": "tokenizer_model_max_length",
    "tokenizer_padding_side": "tokenizer_padding_side",
    "vision_tower_path": "mm_vision_tower",
    "high_resolution_tower_path": "mm_vision_tower_aux",
}
_WIDTH_KEYS = ("mm_hidden_size", "mm_hidden_size_aux")
_DERIVED_KEYS = (
    "architectures",
    "model_type",
    *_WIDTH_KEYS,
    "tune_mm_mlp_adapter",
    "torch_dtype",
)
# Values that Gemma's configuration writes although they are its defaults.
_GEMMA_DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}
# Sizes without which the library would silently assume those of a larger Gemma.
_GEMMA_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

_MINI: dict[str, Any] = {
    "language": {
        **GEMMA_2B,
        "vocab_size": 750,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "head_dim": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 512,
    },
    "vision": {
        **CLIP_LARGE_336,
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
    },
    "high_resolution": {
        "hidden_sizes": [24, 48, 96, 192],
        "depths": [1, 1, 3, 1],
        "drop_path_rate": 0.0,
    },
    "image_size_aux": 128,
    "tokenizer_model_max_length": 512,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}


def _pick_language(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the Gemma arguments among the keys of a config.json."""
    picked = {key: config[key] for key in LANGUAGE_FIELDS if config.get(key) is not None}
    rope = config.get("rope_parameters") or {}
    if (
        not isinstance(rope, dict)
        or rope.get("rope_type", "default") != "default"
        or config.get("rope_scaling")
    ):
        raise InputError("Unsupported language model", f"{source}: rope is scaled", "use Gemma")
    if "rope_theta" in rope:
        picked["rope_theta"] = rope["rope_theta"]
    _require(picked, _GEMMA_SIZES, source)
    for key in _GEMMA_SIZES:
        if not isinstance(picked[key], int) or picked[key] < 1:
            raise InputError(
                "Not a Gemma configuration",
                f"{source}: {key} = {picked[key]!r}",
                "it must be a whole number above 0",
            )
    for key, value in picked.items():
        kind = {"hidden_act": str, "eos_token_id": int | list}.get(key, int | float)
        if not isinstance(value, kind):
            raise InputError(
                "Not a Gemma configuration",
                f"{source}: {key} = {value!r}",
                "its value is of another type: restore the file",
            )
    return picked


def _require(config: Mapping[str, Any], keys: tuple[str, ...], source: str) -> None:
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise InputError(
            "Incomplete configuration",
            f"{source}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            "copy the file that belongs to these weights again",
        )


def _read_towers(config: Mapping[str, Any], towers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that describe the towers."""
    if towers is None:
        published = ModelConfig.preset("mgm-2b")
        if not ModelConfig.has_published_widths(config):
            widths = [config.get(key) for key in _WIDTH_KEYS]
            raise InputError(
                "Unknown vision towers",
                f"config.json: {', '.join(_WIDTH_KEYS)} = {widths}",
                "give the towers' folders, or put a towers.json with their sizes beside it",
            )
        return {
            "vision": dict(published.vision),
            "high_resolution": dict(published.high_resolution),
        }
    _require(towers, ("clip_vision", "convnext_aux"), "towers.json")
    clip, convnext = towers["clip_vision"], towers["convnext_aux"]
    _require(convnext, ("dims", "depths"), "towers.json, convnext_aux")
    high_resolution = {
        "hidden_sizes": list(convnext["dims"]),
        "depths": list(convnext["depths"]),
        "drop_path_rate": convnext.get("drop_path_rate", 0.1),
        "norm_eps": convnext.get("norm_eps", 1e-6),
    }
    values: dict[str, Any] = {
        "name": towers.get("name"),
        "vision": {key: clip[key] for key in VISION_FIELDS if key in clip},
        "high_resolution": high_resolution,
    }
    for key in ("image_mean", "image_std"):
        if key in towers:
            values[key] = tuple(towers[key])
    for key in ("vision_tower_path", "high_resolution_tower_path"):
        if key in towers:
            values[key] = str(towers[key])
    return values


def _read_vision(folder: Path) -> dict[str, Any]:
    """Return the vision sizes of a CLIP folder; keys left out have the library's defaults."""
    config = read_json(folder / "config.json")
    vision = config.get("vision_config", config)
    if config.get("model_type") not in ("clip", "clip_vision_model"):
        raise InputError("Not a CLIP folder", f"{folder}/config.json: model_type")
    return {key: vision.get(key, VISION_DEFAULTS[key]) for key in VISION_FIELDS}


def _read_normalisation(
    folder: Path,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the mean and deviation of a CLIP folder, or the published ones if it has none."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return CLIP_MEAN, CLIP_STD
    content = read_json(path)
    mean = content.get("image_mean", CLIP_MEAN)
    std = content.get("image_std", CLIP_STD)
    for key, values in (("image_mean", mean), ("image_std", std)):
        is_three = isinstance(values, list | tuple) and len(values) == 3
        if not is_three or not all(isinstance(value, int | float) for value in values):
            raise InputError(
                "Unusable preprocessing", f"{path}: {key} = {values!r}", "give three numbers"
            )
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _read_convnext(
    folder: Path, image_mean: tuple[float, ...], image_std: tuple[float, ...]
) -> dict[str, Any]:
    """Return the sizes of a ConvNeXt folder in either layout."""
    open_clip = folder / "open_clip_config.json"
    if not open_clip.exists():
        config = read_json(folder / "config.json")
        if config.get("model_type") != "convnext":
            raise InputError("Not a ConvNeXt folder", f"{folder}/config.json: model_type")
        if config.get("patch_size", FUSED_STRIDE) != FUSED_STRIDE:
            raise InputError("Unsupported ConvNeXt", f"{folder}/config.json: patch_size is not 4")
        return {
            "hidden_sizes": list(config.get("hidden_sizes") or [96, 192, 384, 768]),
            "depths": list(config.get("depths") or [3, 3, 9, 3]),
            "drop_path_rate": config.get("drop_path_rate", 0.0),
        }
    config = read_json(open_clip)
    preprocess = config.get("preprocess_cfg") or {}
    if (tuple(preprocess.get("mean", image_mean)), tuple(preprocess.get("std", image_std))) != (
        tuple(image_mean),
        tuple(image_std),
    ):
        raise InputError(
            "Towers normalise differently",
            f"{open_clip}: preprocess_cfg differs from the CLIP folder's mean and std",
            "both towers read the same tensor, so they need the same normalisation",
        )
    vision = config.get("model_cfg", {}).get("vision_cfg", {})
    model = vision.get("timm_model_name", "")
    if model not in CONVNEXT_SIZES:
        known = ", ".join(CONVNEXT_SIZES)
        raise InputError("Unsupported ConvNeXt", f"{open_clip}: timm_model_name {model!r}", known)
    return {**CONVNEXT_SIZES[model], "drop_path_rate": vision.get("timm_drop_path", 0.1)}
