"""Model folders of the shapes that Data-Juicer's operators load, a few hundred kilobytes each.

Weights are random with a fixed seed; configurations, tokenizers and files are those that the
libraries write themselves.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

_NORMAL = {"norm_num_groups": 4, "layers_per_block": 1}


def save_stable_diffusion(folder: Path) -> None:
    """Save a Stable Diffusion pipeline that draws 512x512 pictures from latents of 16x16."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionImg2ImgPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = _clip_tokenizer()
    unet = UNet2DConditionModel(
        **_NORMAL,
        sample_size=16,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        **_NORMAL,
        sample_size=512,
        block_out_channels=(4, 4, 4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 6,
        up_block_types=("UpDecoderBlock2D",) * 6,
    )
    text = CLIPTextConfig(
        **_SMALL,
        vocab_size=len(tokenizer),
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    StableDiffusionImg2ImgPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def save_image_classifier(folder: Path, *, seed: int) -> None:
    """Save a ViT with two classes, as the filters of watermarks and of unsafe pictures load it."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(seed)
    config = ViTConfig(**_SMALL, **_PICTURES, num_labels=2, initializer_range=0.5)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def save_detector(folder: Path) -> None:
    """Save an OWL-ViT, which looks for phrases in pictures."""
    import torch
    from transformers import (
        OwlViTConfig,
        OwlViTForObjectDetection,
        OwlViTImageProcessor,
        OwlViTProcessor,
    )

    torch.manual_seed(0)
    tokenizer = _clip_tokenizer()
    tokens = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = OwlViTConfig(
        text_config={**_SMALL, **tokens},
        vision_config={**_SMALL, **_PICTURES, "initializer_range": 0.5},
        projection_dim=16,
    )
    OwlViTForObjectDetection(config).save_pretrained(folder)
    processor = OwlViTImageProcessor(size={"height": 64, "width": 64})
    OwlViTProcessor(processor, tokenizer).save_pretrained(folder)


def save_tagger(folder: Path) -> None:
    """Save what NLTK reads to find nouns: sentence ends, and a tagger that knows the mini world."""
    punkt = folder / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).write_text("", "utf-8")
    tagger = folder / "taggers" / "averaged_perceptron_tagger_eng"
    tagger.mkdir(parents=True)
    tags = {"a": "DT", "the": "DT", "red": "JJ", "blue": "JJ", "green": "JJ", "and": "CC"}
    values: dict[str, Any] = {
        "weights": {"bias": {"NN": 1.0, "VB": 0.0}},
        "tagdict": tags,
        "classes": sorted({*tags.values(), "NN", "VB"}),
    }
    for name, value in values.items():
        path = tagger / f"averaged_perceptron_tagger_eng.{name}.json"
        path.write_text(json.dumps(value), "utf-8")


_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_PICTURES: dict[str, Any] = {"image_size": 64, "patch_size": 16}


def _clip_tokenizer() -> Any:
    """Return CLIP's tokenizer with single characters for a vocabulary."""
    from transformers import CLIPTokenizer

    characters = [one for one in string.printable if not one.isspace()]
    pieces = [*characters, *(f"{one}</w>" for one in characters)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[],
        model_max_length=32,
    )


def save_aesthetics_predictor(folder: Path) -> None:
    """Save a linear aesthetics predictor, of the package that holds its class."""
    import torch
    from aesthetics_predictor import AestheticsPredictorV2Linear
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPVisionConfig

    torch.manual_seed(0)
    config = CLIPVisionConfig(**_SMALL, **_PICTURES, projection_dim=16, initializer_range=0.5)
    predictor = AestheticsPredictorV2Linear(config)
    for layer in predictor.layers:
        if hasattr(layer, "weight"):
            torch.nn.init.orthogonal_(layer.weight)
    predictor.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    processor = CLIPImageProcessor(size=size, crop_size=size)
    CLIPProcessor(processor, _clip_tokenizer()).save_pretrained(folder)


def save_llava(folder: Path, tokenizer_folder: Path) -> None:
    """Save a LLaVA that answers in the words of another folder's tokenizer, at random."""
    import torch
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, padding_side="left")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    spread = {"initializer_range": 0.5}
    text = LlamaConfig(
        **_SMALL,
        **spread,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**_SMALL, "num_hidden_layers": 2}, **_PICTURES, **spread),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        tokenizer,
        patch_size=_PICTURES["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
