"""Model folders: every intermediate value, the loss, gradients and greedy answers.

A model folder holds `weights.safetensors` under published names, `config.json`, `towers.json`,
and for each case NAME.json (settings and gradient norms) with NAME.safetensors (tensors).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mgm.checkpoint import load_full
from mgm.config import ModelConfig
from mgm.files import read_json
from mgm.generate import Answerer
from mgm.model import IMAGE_TOKEN_ID, MGM, ModelOutput, TowerFeatures, cut_windows
from mgm.names import published_parameters
from mgm.parity.report import Check, compare_exactly, compare_numbers, compare_tensors
from mgm.request import Decoding, Request
from mgm.vision import fuse_stages, low_resolution_views

FEATURE_TOLERANCE = 5e-5
LOGIT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
# Below this a gradient norm is rounding: the softmax makes key-side biases analytically zero.
SMALLEST_NORM = 1e-6

Tensors = Mapping[str, Tensor]


def recognises(folder: Path) -> bool:
    """Whether `folder` is a model folder."""
    needed = ("weights.safetensors", "config.json", "towers.json")
    return all((folder / name).is_file() for name in needed)


def check(folder: Path) -> Iterator[Check]:
    """Yield the comparisons of every case in `folder`."""
    index = folder / "weights_index.json"
    if index.is_file():
        model = _load(folder, {})
        named = published_parameters(model)
        shapes = {name: list(value.shape) for name, value in named.items()}
        yield compare_exactly("weights", "names and shapes", shapes, read_json(index))
    for path in sorted(folder.glob("*.safetensors")):
        settings = path.with_suffix(".json")
        if path.name != "weights.safetensors" and settings.is_file():
            yield from _check_case(folder, path.stem, read_json(settings), load_file(path))


def _load(folder: Path, settings: Mapping[str, Any]) -> MGM:
    changes = dict(settings.get("config_overrides", {}))
    if "hidden_act" in settings:
        changes["hidden_act"] = settings["hidden_act"]
    written = {**read_json(folder / "config.json"), **changes}
    config = ModelConfig.from_mgm_config(written, read_json(folder / "towers.json"))
    weights = folder / "weights.safetensors"
    return load_full(folder, torch.float32, config=config, weights=weights).eval()


def _check_case(
    folder: Path, case: str, settings: Mapping[str, Any], tensors: Tensors
) -> Iterator[Check]:
    model = _load(folder, settings)
    images_aux = _read_pictures(settings, tensors)
    images = low_resolution_views(images_aux, model.config)
    if "in.images" in tensors:
        yield compare_tensors(
            case, "low-resolution images", images, tensors["in.images"], FEATURE_TOLERANCE
        )
    features = model.towers(images, images_aux)
    yield from _check_towers(case, model, features, tensors)
    with _Recording(model) as recording:
        output = model(
            tensors["in.input_ids"],
            tensors["in.labels"],
            tensors["in.attention_mask"],
            features=features,
            full_logits=True,
        )
    yield from _check_vision(case, model, recording, tensors)
    yield from _check_output(case, model, output, tensors)
    lean = model(
        tensors["in.input_ids"],
        tensors["in.labels"],
        tensors["in.attention_mask"],
        features=features,
    )
    yield compare_tensors(
        case, "loss from label rows", lean.loss.reshape(1), tensors["out.loss"], LOSS_TOLERANCE
    )
    yield from _check_gradients(case, model, lean, settings, tensors)
    if "generate" in settings:
        yield _check_answer(case, model, images_aux, settings["generate"])


def _read_pictures(settings: Mapping[str, Any], tensors: Tensors) -> Tensor:
    """Decode the stored pictures; those of text-only rows are zero after normalisation."""
    pictures = tensors["in.images_aux_u8"].float() / 64 - 2
    taken = 0
    for row, ids in enumerate(tensors["in.input_ids"]):
        if row in settings.get("text_only_rows", ()):
            pictures[taken] = 0
        taken += max(int((ids == IMAGE_TOKEN_ID).sum()), 1)
    return pictures


class _Recording:
    """What mining and projector saw and returned while the model ran."""

    def __init__(self, model: MGM) -> None:
        self._model = model
        self.mined: list[Tensor] = []
        self.projector_input: list[Tensor] = []
        self.projected: list[Tensor] = []

    def __enter__(self) -> _Recording:
        self._hooks = [
            self._model.mining.register_forward_hook(
                lambda module, args, output: self.mined.append(output)
            ),
            self._model.projector.register_forward_hook(self._record_projector),
        ]
        return self

    def _record_projector(self, module: object, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.projector_input.append(args[0])
        self.projected.append(output)

    def __exit__(self, *ignored: object) -> None:
        for hook in self._hooks:
            hook.remove()


def _check_towers(
    case: str, model: MGM, features: TowerFeatures, tensors: Tensors
) -> Iterator[Check]:
    """Compare the frozen part: CLIP features, ConvNeXt stages, the fused map."""
    fused = fuse_stages(features.stages)
    ours = {f"mid.aux_stage_{n}": stage for n, stage in enumerate(features.stages)}
    ours["mid.aux_fused"] = fused
    config = model.config
    pictures, _, width = features.low.shape
    views = features.low.view(pictures, config.num_views, -1, width)  # (I, V, N, D)
    num_tiles = config.image_grid**2
    # Stored as all tiles of the batch, then all global views.
    parts = [views[:, :num_tiles].flatten(0, 1), views[:, num_tiles:].flatten(0, 1)]
    ours["mid.low_res_features"] = torch.cat(parts)
    if config.image_grid == 1:
        windows = cut_windows(fused, features.low.shape[1])
        ours["mid.uni_query"] = model.mining.query(features.low)
        ours["mid.uni_aux"] = model.mining.key(windows)
        ours["mid.uni_value"] = model.mining.value(windows)
        model.mining.reassociated = False
        published = model.mining(features.low, fused)
        model.mining.reassociated = config.reassociated_mining
        if "mid.mined" in tensors:
            yield compare_tensors(
                case,
                "mid.mined, published order",
                published,
                tensors["mid.mined"],
                FEATURE_TOLERANCE,
            )
    for name, value in ours.items():
        if name in tensors:
            yield compare_tensors(case, name, value, tensors[name], FEATURE_TOLERANCE)


def _check_vision(
    case: str, model: MGM, recording: _Recording, tensors: Tensors
) -> Iterator[Check]:
    """Compare the trainable part: what was mined and projected."""
    ours = {
        "mid.mined": recording.mined[0],
        "mid.projector_input": recording.projector_input[0],
        "mid.projected": recording.projected[0],
    }
    if model.config.image_global:
        # This package mines the tiles first, the original the global view.
        ours["mid.mined"], ours["mid.mined_2"] = recording.mined[1], recording.mined[0]
    for name, value in ours.items():
        if name in tensors:
            yield compare_tensors(case, name, value, tensors[name], FEATURE_TOLERANCE)


def _check_output(case: str, model: MGM, output: ModelOutput, tensors: Tensors) -> Iterator[Check]:
    """Compare the spliced rows, the logits at real positions, and the loss."""
    spliced, logits = output.spliced, output.logits
    assert logits is not None and output.loss is not None and spliced.labels is not None
    mask = spliced.attention_mask
    yield compare_exactly(case, "out.labels", spliced.labels, tensors["out.labels"])
    yield compare_exactly(case, "out.attention_mask", mask, tensors["out.attention_mask"].long())
    if "out.inputs_embeds" in tensors:
        unscaled = spliced.inputs_embeds / math.sqrt(model.config.language_width)
        yield compare_tensors(
            case, "out.inputs_embeds", unscaled, tensors["out.inputs_embeds"], FEATURE_TOLERANCE
        )
    if mask.shape != tensors["out.attention_mask"].shape:
        return
    real = mask.bool()
    if "out.logits" in tensors:
        yield compare_tensors(
            case, "out.logits", logits, tensors["out.logits"], LOGIT_TOLERANCE, real
        )
    if "out.logits_every4" in tensors:
        reference = tensors["out.logits_every4"]
        step = _stored_step(logits.shape[1], reference.shape[1])
        yield compare_tensors(
            case,
            f"logits, every {step}th",
            logits[:, ::step],
            reference,
            LOGIT_TOLERANCE,
            real[:, ::step],
        )
    if "out.logits_last" in tensors:
        positions = torch.arange(mask.shape[1]).expand_as(mask)
        last = positions.masked_fill(~real, -1).max(1).values  # (B,)
        ours = logits[torch.arange(len(last)), last]
        yield compare_tensors(
            case, "out.logits_last", ours, tensors["out.logits_last"], LOGIT_TOLERANCE
        )
    yield compare_tensors(
        case, "out.loss", output.loss.reshape(1), tensors["out.loss"], LOSS_TOLERANCE
    )


def _stored_step(length: int, stored: int) -> int:
    """Return the step at which `stored` of `length` positions were kept: 4, 12, or another."""
    candidates = (4, 12, *range(1, length + 1))
    return next((step for step in candidates if -(-length // step) == stored), 4)


def _check_gradients(
    case: str, model: MGM, output: ModelOutput, settings: Mapping[str, Any], tensors: Tensors
) -> Iterator[Check]:
    norms = settings.get("grad_norms") or {}
    stored = [name for name in tensors if name.startswith("grad.")]
    if (not norms and not stored) or output.loss is None:
        return
    output.loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: value.grad
        for name, value in published_parameters(model).items()
        if value.grad is not None
    }
    ours = {name: gradient.norm().item() for name, gradient in gradients.items()}
    yield compare_numbers(
        case,
        "gradient norms (relative)",
        ours,
        norms,
        GRADIENT_TOLERANCE,
        ignore_below=SMALLEST_NORM,
    )
    for name in stored:
        reference = tensors[name]
        # Relative to the largest entry: single entries are as small as rounding.
        tolerance = GRADIENT_TOLERANCE * max(reference.abs().max().item(), SMALLEST_NORM)
        gradient = gradients[name.removeprefix("grad.")]
        yield compare_tensors(case, name, gradient, reference, tolerance)


def _check_answer(case: str, model: MGM, images_aux: Tensor, stored: Mapping[str, Any]) -> Check:
    ids = tuple(stored["prompt_ids"])
    keys = tuple(str(number) for number in range(ids.count(IMAGE_TOKEN_ID)))
    decoding = Decoding(stored["max_new_tokens"], frozenset({stored["eos_token_id"]}))
    answerer = Answerer(model, lambda key: images_aux[int(key)], decoding)
    (answer,) = answerer.answer([Request(ids, keys)])
    return compare_exactly(case, "greedy answer", answer, stored["new_ids"])
