"""What a training will take of the GPU's memory, before it runs. Arithmetic only: no torch.

Owns the prediction for `numerics = fast` in bfloat16, the choice of how much goes through the model
at once, and the words on what would make an impossible plan fit. Parts that follow from sizes are
counted; what the compiler keeps for the backward pass was measured on an H100 and is named so.
`benchmarks/gpu.py` puts prediction and measurement side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from mgm.config import ModelConfig

GIB = 2**30
CONTEXT = 0.6 * GIB
"""What CUDA and its libraries take beside the allocator's memory: 0.45 to 0.6 GiB on an H100."""
LOGIT_ROWS = 1024
"""Rows of logits that exist together, see `mgm.label_loss`."""
TEXT_TOKENS = {"projector": 31, "lora": 250, "full": 250}
"""Typical text of a sample: captions in stage 1, conversations in stage 2."""
LABEL_SHARE = 0.5
WANTED_TOKENS = {"projector": 16384, "lora": 8192, "full": 8192}
"""Beyond these, larger passes gained under 3 % on an H100."""

Method = Literal["projector", "lora", "full"]


@dataclass(frozen=True)
class Plan:
    """What decides about memory."""

    method: Method
    tokens: int
    """Positions of a pass, pictures included."""
    recomputed_layers: int = 0
    master_weights: Literal["float32", "split24"] = "float32"
    moments: Literal["float32", "8bit"] = "float32"
    lora_rank: int = 64
    text_tokens: int | None = None
    """Text of a sample; None takes what is typical of the stage."""

    def least(self, config: ModelConfig) -> Plan:
        """Return the plan at its smallest: one sample a pass, every layer but one recomputed.

        Recomputing the last one, too, saves nothing: it is made anew when all else is there.
        """
        tokens = config.num_image_tokens + (self.text_tokens or TEXT_TOKENS[self.method])
        layers = config.language["num_hidden_layers"] - 1
        return replace(self, tokens=tokens, recomputed_layers=max(layers, self.recomputed_layers))

    def pictures(self, config: ModelConfig) -> int:
        """Return the pictures of a pass."""
        text = self.text_tokens or TEXT_TOKENS[self.method]
        return max(1, round(self.tokens / (config.num_image_tokens + text)))


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for. The two peaks of a pass are not there at once."""

    weights: float
    """Of the frozen and trained model, in bfloat16."""
    gradients: float
    optimizer: float
    """Masters and moments, and everything of the small trained modules."""
    activations: float
    """Kept for the backward pass, at its largest."""
    backward: float
    """What the backward pass of one layer or of the head needs for the moment."""
    vision: float
    """What encoding the pictures of a pass needs for the moment."""

    @property
    def states(self) -> float:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """The most that is allocated at once."""
        return self.states + max(self.activations + self.backward, self.vision)

    @property
    def reserved(self) -> float:
        """What the allocator takes from the card for that peak."""
        return self.peak * RESERVED_SHARE + RESERVED_BYTES

    @property
    def card(self) -> float:
        """What the card must have free."""
        return self.reserved + CONTEXT


RESERVED_SHARE = 1.02
RESERVED_BYTES = 0.4 * GIB
"""What the allocator takes beside the peak: 0.1 to 1.1 GiB where it was measured."""
WORKSPACE = 0.33 * GIB
"""Of the matrix library and the attention kernels; measured."""


def language_parameters(config: ModelConfig) -> int:
    """Return the parameters of the language model; the head is the embedding."""
    sizes = config.language
    width, mlp = sizes["hidden_size"], sizes["intermediate_size"]
    heads = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    layer = 2 * width * heads + 2 * width * keys + 3 * width * mlp + 2 * width
    return int(sizes["vocab_size"] * width + sizes["num_hidden_layers"] * layer + width)


def tower_parameters(config: ModelConfig) -> int:
    """Return the parameters of both frozen towers, to within the smallest."""
    clip = config.vision
    width, mlp, patch = clip["hidden_size"], clip["intermediate_size"], clip["patch_size"]
    layer = 4 * width * width + 2 * width * mlp + 9 * width + mlp
    places = (clip["image_size"] // patch) ** 2 + 1
    total = clip["num_hidden_layers"] * layer + width * (3 * patch * patch + places + 6)
    sizes = config.high_resolution
    before = 0
    for channels, depth in zip(sizes["hidden_sizes"], sizes["depths"], strict=True):
        total += depth * (8 * channels * channels + 49 * channels + 9 * channels)
        total += 4 * before * channels if before else 48 * channels
        before = channels
    return int(total)


def vision_parameters(config: ModelConfig) -> int:
    """Return the trained parameters of mining and projector."""
    width, high, out = config.vision_width, config.high_resolution_width, config.language_width
    mining = width * width + 2 * high * width + 5 * width + 4 * high
    return mining + width * out + out * out + 2 * out


def adapter_parameters(config: ModelConfig, rank: int) -> int:
    """Return the parameters of LoRA adapters on every linear layer of the language model."""
    sizes = config.language
    width, mlp = sizes["hidden_size"], sizes["intermediate_size"]
    heads = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    both_ends = 2 * (width + heads) + 2 * (width + keys) + 3 * (width + mlp)
    return int(sizes["num_hidden_layers"] * rank * both_ends)


def predict(config: ModelConfig, plan: Plan) -> Memory:
    """Return what a plan takes."""
    language, towers = language_parameters(config), tower_parameters(config)
    small = vision_parameters(config)
    if plan.method == "lora":
        small += adapter_parameters(config, plan.lora_rank)
    weights = 2.0 * (language + towers)
    gradients = 4.0 * small
    optimizer = 12.0 * small  # the weights themselves in float32, and two moments
    if plan.method == "full":
        gradients += 2.0 * language
        optimizer += language * (4 if plan.master_weights == "float32" else 1)
        optimizer += language * (8 if plan.moments == "float32" else 2 + 8 / 256)
    activations, layer = _activations(config, plan)
    return Memory(
        weights,
        gradients,
        optimizer,
        activations,
        max(layer, _head(config, plan)),
        plan.pictures(config) * picture_bytes(config),
    )


def _activations(config: ModelConfig, plan: Plan) -> tuple[float, float]:
    """Return what is kept until the backward pass, and what the one of a layer needs more."""
    sizes = config.language
    width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    kept = _layer_bytes(config, plan.method)
    recomputed = min(plan.recomputed_layers, layers)
    per_token = (layers - recomputed) * kept + recomputed * 2.0 * width
    fixed = plan.pictures(config) * feature_bytes(config) + WORKSPACE
    one = BACKWARD_WIDTHS[plan.method] * 2.0 * sizes["intermediate_size"]
    if recomputed == layers:
        one += kept  # made anew; where some layers were kept, they are gone by then
    return plan.tokens * per_token + fixed, plan.tokens * one


def _layer_bytes(config: ModelConfig, method: Method) -> float:
    """Return the bytes that a layer keeps for each position."""
    sizes = config.language
    width, mlp = sizes["hidden_size"], sizes["intermediate_size"]
    heads = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    narrow, wide = KEPT[method]
    return float(2 * (narrow * width + 2 * heads + 2 * keys + wide * mlp))


KEPT: dict[Method, tuple[float, float]] = {
    "projector": (2.0, 2.0),
    "lora": (6.5, 3.5),
    "full": (4.0, 3.0),
}
"""Tensors of the model's and of the MLP's width that a layer keeps, attention's own aside; counted
on what the compiled layer saves. A dropout mask, a byte a value, is half a tensor."""
BACKWARD_WIDTHS: dict[Method, float] = {"projector": 3.0, "lora": 5.0, "full": 3.0}
"""Tensors of the MLP's width that the backward pass of a layer has beside what was kept; measured."""


def _head(config: ModelConfig, plan: Plan) -> float:
    """Return what the logits and their gradient need, and the head's own where it is trained."""
    vocabulary, width = config.language["vocab_size"], config.language["hidden_size"]
    text = plan.text_tokens or TEXT_TOKENS[plan.method]
    labels = min(LOGIT_ROWS, plan.pictures(config) * text * LABEL_SHARE)
    gradient = 2.0 * vocabulary * width if plan.method == "full" else 0.0
    return float(labels * vocabulary * 2 * 2 + gradient)


def feature_bytes(config: ModelConfig) -> float:
    """Return what the towers say about one picture, which mining keeps for its backward pass."""
    low = config.num_image_tokens * config.vision_width
    side = config.image_size_aux // 4
    maps = sum(
        channels * (side >> stage) ** 2
        for stage, channels in enumerate(config.high_resolution["hidden_sizes"])
    )
    return float(2 * (low + maps))


def picture_bytes(config: ModelConfig) -> float:
    """Return what encoding one picture needs for the moment, measured in maps of stage 1."""
    first = config.high_resolution["hidden_sizes"][0]
    side = config.image_size_aux // 4
    return float(PICTURE_MAPS * 2 * first * side * side)


PICTURE_MAPS = 7.0
"""Maps of the size of ConvNeXt's first stage, in bfloat16."""


def choose(config: ModelConfig, plan: Plan, free: float) -> Plan | None:
    """Return the plan of the pass that fits and takes the least time, None where nothing fits.

    Args:
        plan: Its `tokens` are the most that are wanted; its `recomputed_layers` the least.
        free: Bytes that the allocator may take.
    """
    layers = config.language["num_hidden_layers"]
    fitting = [
        candidate
        for tokens in _descending(plan.tokens, plan.least(config).tokens)
        for recomputed in range(plan.recomputed_layers, max(layers, plan.recomputed_layers + 1))
        if predict(
            config, candidate := replace(plan, tokens=tokens, recomputed_layers=recomputed)
        ).reserved
        <= free
    ]
    return min(fitting, key=lambda one: _time_of_a_position(one, layers), default=None)


def _time_of_a_position(plan: Plan, layers: int) -> float:
    """Return the time of a position in multiples of a very long pass's that recomputes nothing."""
    recomputed = plan.recomputed_layers / layers
    return (1 + RECOMPUTE_COST * recomputed) * (1 + PASS_COST_TOKENS / plan.tokens)


RECOMPUTE_COST = 0.25
"""Of recomputing every layer, in passes without: 0.22 to 0.26 on an H100."""
PASS_COST_TOKENS = 500.0
"""A pass costs as much time as so many positions beside its own. 300 from 5,120 against 19,456 of
them on an H100, and more for short ones, whose launches the accelerator waits for."""


def _descending(most: int, least: int) -> Iterator[int]:
    tokens = most
    while tokens > least:
        yield tokens
        tokens = tokens * 3 // 4 // 128 * 128
    yield least  # a pass holds one sample, whatever was asked for


def single_changes(config: ModelConfig, plan: Plan, free: float) -> list[str]:
    """Return the single changes each of which would make an impossible plan fit.

    Smaller passes and recomputed layers are not among them: `choose` has tried those. Leaner
    masters and moments count as one change where neither helps alone.
    """
    masters, moments = {"master_weights": "split24"}, {"moments": "8bit"}
    candidates: dict[str, dict[str, Any]] = {}
    if plan.method == "full":
        candidates = {
            "8-bit moments (moments: 8bit)": moments,
            "24-bit masters (master_weights: split24)": masters,
            "8-bit moments with 24-bit masters (moments: 8bit, master_weights: split24)": {
                **masters,
                **moments,
            },
            "train adapters (method: lora)": {"method": "lora"},
        }
    elif plan.method == "lora" and plan.lora_rank > SMALL_RANK:
        candidates = {f"smaller adapters (lora_rank: {SMALL_RANK})": {"lora_rank": SMALL_RANK}}
    found: dict[str, dict[str, Any]] = {}
    for word, change in candidates.items():
        is_larger = any(one.items() < change.items() for one in found.values())
        candidate = replace(plan, **change)
        if candidate != plan and not is_larger and choose(config, candidate, free) is not None:
            found[word] = change
    return list(found)


SMALL_RANK = 16
"""Rank of adapters that is proposed where larger ones do not fit."""
