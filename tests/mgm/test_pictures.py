"""Pictures are decoded ahead and encoded to the rows of the plain way."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from mgm.data import normalised, preprocess_image
from mgm.errors import InputError
from mgm.fast_vision import FastTowers
from mgm.model import MGM
from mgm.pictures import DecodedPictures, PictureEncoder
from mgm.vision import low_resolution_views
from tests.mgm.conftest import tiny_config, tiny_model


def picture(key: str) -> Image.Image:
    pixels = np.random.default_rng(int(key)).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def model() -> MGM:
    return tiny_model().eval()


def test_a_picture_too_large_for_the_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("mgm.pictures.square_pixels", too_large)
    with pytest.raises(InputError, match="7, 50 x 30 pixels: out of memory"):
        DecodedPictures(picture, tiny_config(), 0).take("7")


@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_normalised_later_are_the_preprocessed_picture(workers: int) -> None:
    config = tiny_config()
    pictures = DecodedPictures(picture, config, workers)
    pictures.announce(["3", "4", "3"])
    mean, std = config.image_mean, config.image_std
    for key in ("4", "3", "5", "3"):
        wanted = preprocess_image(picture(key), config.image_size_aux, "pad", mean, std)
        loaded = pictures.take(key)
        assert loaded.dtype == torch.uint8
        assert torch.equal(normalised(loaded, mean, std), wanted)
    pictures.close()


def test_announced_pictures_are_decoded_by_other_threads_and_once() -> None:
    opened: list[tuple[str, int]] = []

    def watched(key: str) -> Image.Image:
        opened.append((key, threading.get_ident()))
        return picture(key)

    pictures = DecodedPictures(watched, tiny_config(), 2)
    pictures.announce(["1", "2"])
    pictures.announce(["2", "1"])
    for key in ("1", "2"):
        pictures.take(key)
    pictures.close()
    assert sorted(key for key, _ in opened) == ["1", "2"]
    assert threading.get_ident() not in {thread for _, thread in opened}


def test_an_error_of_a_thread_reaches_the_caller() -> None:
    def broken(key: str) -> Image.Image:
        raise InputError("Unreadable picture", key, "Fetch it again.")

    pictures = DecodedPictures(broken, tiny_config(), 1)
    pictures.announce(["1"])
    with pytest.raises(InputError, match="Unreadable picture"):
        pictures.take("1")
    pictures.close()


@pytest.mark.parametrize("at_once", [1, 2, 8])
@torch.no_grad()
def test_rows_equal_those_of_the_plain_way(model: MGM, at_once: int) -> None:
    config = model.config
    loaded = [DecodedPictures(picture, config, 0).take(str(number)) for number in range(3)]
    pixels = normalised(torch.stack(loaded), config.image_mean, config.image_std)
    plain = model.encode_images(low_resolution_views(pixels, config), pixels)
    for towers, is_reassociated in ((None, False), (FastTowers(model, compiled=False), True)):
        model.mining.reassociated = is_reassociated
        encoder = PictureEncoder(model, towers, at_once=at_once)
        torch.testing.assert_close(torch.stack(encoder.encode(loaded)), plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pictures_of_several_views_are_mined_the_plain_way() -> None:
    model = tiny_model(image_grid=2, image_global=True, image_size_aux=256).eval()
    pixels = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    plain = model.encode_images(None, pixels)
    model.mining.reassociated = True
    encoder = PictureEncoder(model, None, at_once=4)
    torch.testing.assert_close(torch.stack(encoder.encode(list(pixels))), plain)
