"""Data-Juicer's diffusion mapper, kept from drawing a picture forever.

The mapper draws anew for as long as the pipeline's safety checker refuses a picture, which it may do
every time. Here it gives up after some draws and names the caption. The pipeline's progress bars,
a line for every step of every picture, are left out of the log.
"""

from __future__ import annotations

from typing import Any

MOST_DRAWS = 20
"""Pictures that are drawn for one caption before the run is stopped."""
SIDE = 512
"""Width and height that the mapper draws in, whatever the picture's size."""


def with_bounded_draws(operator: Any) -> Any:
    """Return an operator; a diffusion mapper is made to stop where no draw is accepted."""
    if operator._name != "image_diffusion_mapper":
        return operator

    def draw(caption: str, image: Any, rank: int | None = None) -> Any:
        from data_juicer.utils.model_utils import get_model

        pipeline = get_model(operator.model_key, rank, operator.use_cuda())
        pipeline.set_progress_bar_config(disable=True)
        return draw_picture(pipeline, caption, image, operator.strength, operator.guidance_scale)

    operator._real_guidance = draw
    return operator


def draw_picture(
    pipeline: Any, caption: str, image: Any, strength: float, guidance_scale: float
) -> Any:
    """Draw a picture from a caption and another picture, as the mapper does.

    Args:
        pipeline: An image-to-image pipeline of diffusers.
        caption: What to draw.
        image: The picture to start from, of any size.
        strength: How much of it is replaced by noise, 0 to 1.
        guidance_scale: How closely the caption is followed.

    Returns:
        The picture, of the size of `image`.

    Raises:
        ValueError: the safety checker refused every draw; it names the caption.
    """
    from PIL import Image

    canvas = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    for _ in range(MOST_DRAWS):
        made = pipeline(
            image=canvas, prompt=[caption], strength=strength, guidance_scale=guidance_scale
        )
        if pipeline.safety_checker is None or not made.nsfw_content_detected[0]:
            return made.images[0].resize(image.size, Image.Resampling.BILINEAR)
    raise ValueError(f"the safety checker refused {MOST_DRAWS} pictures of {caption!r}")
