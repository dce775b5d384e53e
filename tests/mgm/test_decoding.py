"""Decoding over a static cache gives the ids of the published decoding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgm import decoding as module
from mgm.decoding import PackedDecoder
from mgm.model import IMAGE_TOKEN_ID, MGM
from mgm.packed_attention import attend, attend_behind
from mgm.padded_decoding import PaddedDecoder
from mgm.request import Decoding, Request

NEVER = frozenset({-1})
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def build(device: str = "cpu", dtype: torch.dtype = torch.float32) -> MGM:
    torch.manual_seed(0)
    model = MGM.preset("mgm-mini").eval()
    for parameter in model.language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(device, dtype)


@pytest.fixture(scope="module")
def model() -> MGM:
    return build()


def rows_of(model: MGM, count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (model.config.num_image_tokens, model.config.language_width)
    return {
        f"p{number}": torch.randn(shape, generator=generator).to(model.device, model.dtype) * 0.1
        for number in range(count)
    }


def requests_of(count: int) -> list[Request]:
    """Prompts about three pictures and, one in five, about none."""
    draw = torch.Generator().manual_seed(count)
    made = []
    for number in range(count):
        text = torch.randint(20, 400, (3 + number % 4,), generator=draw).tolist()
        if number % 5 == 4:
            made.append(Request((2, *text)))
        else:
            made.append(Request((2, 7, IMAGE_TOKEN_ID, 8, *text), (f"p{number % 3}",)))
    return made


@torch.no_grad()
def expected(model: MGM, requests: list[Request], decoding: Decoding) -> list[list[int]]:
    decoder = PaddedDecoder(model, decoding)
    return decoder.finish(decoder.start(requests, rows_of(model)))


@torch.no_grad()
def found(decoder: PackedDecoder, model: MGM, requests: list[Request]) -> list[list[int]]:
    return decoder.finish(decoder.start(requests, rows_of(model)))


@pytest.mark.parametrize("most_positions", [1, 60, 100_000])
def test_ids_equal_those_of_the_padded_decoding(
    model: MGM, monkeypatch: pytest.MonkeyPatch, most_positions: int
) -> None:
    monkeypatch.setattr(module, "PREFILL_POSITIONS", most_positions)
    decoding, requests = Decoding(10, NEVER), requests_of(11)
    wanted = expected(model, requests, decoding)
    assert found(PackedDecoder(model, decoding, compiled=False), model, requests) == wanted
    assert len({tuple(ids) for ids in wanted}) > 6


def test_rows_end_one_by_one(model: MGM) -> None:
    requests = requests_of(11)
    full = expected(model, requests, Decoding(10, NEVER))
    stops = frozenset({full[0][0], full[1][2], full[2][4], full[5][4], full[6][6]})
    decoding = Decoding(10, stops)
    wanted = expected(model, requests, decoding)
    assert found(PackedDecoder(model, decoding, compiled=False), model, requests) == wanted
    assert len({len(ids) for ids in wanted}) > 3


def test_the_cache_serves_batches_of_other_sizes(model: MGM) -> None:
    decoding = Decoding(6, NEVER)
    decoder = PackedDecoder(model, decoding, compiled=False)
    for count in (5, 3, 11, 1, 8):
        requests = requests_of(count)
        assert found(decoder, model, requests) == expected(model, requests, decoding)


def test_a_released_decoder_answers_again(model: MGM) -> None:
    decoding, requests = Decoding(3, NEVER), requests_of(5)
    decoder = PackedDecoder(model, decoding, compiled=False)
    first = found(decoder, model, requests)
    decoder.release()
    assert found(decoder, model, requests) == first


def test_one_token_needs_no_step(model: MGM) -> None:
    decoding, requests = Decoding(1, NEVER), requests_of(5)
    answers = found(PackedDecoder(model, decoding, compiled=False), model, requests)
    assert answers == expected(model, requests, decoding)
    assert [len(ids) for ids in answers] == [1] * 5


@pytest.mark.parametrize("key_heads", [1, 2])
def test_attention_behind_a_beginning_equals_that_of_whole_rows(key_heads: int) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths, own = (7, 4, 12), (2, 4, 1)
    bounds = torch.tensor([0, 7, 11, 23], dtype=torch.int32)
    query = torch.randn(23, 4, 8, generator=draw)
    key, value = torch.randn(2, 23, key_heads, 8, generator=draw).unbind()
    whole = attend(query, key, value, bounds, 12)
    ends = [int(bound) for bound in bounds[1:]]
    kept = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, own, strict=True)])
    own_bounds = torch.tensor([0, 2, 6, 7], dtype=torch.int32)
    part = attend_behind(query[kept], key, value, own_bounds, bounds, max(own), max(lengths))
    torch.testing.assert_close(part, whole[kept])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_replayed_steps_give_the_same_ids_on_a_gpu(compiled: bool) -> None:
    model, decoding = build("cuda"), Decoding(10, NEVER)
    decoder = PackedDecoder(model, decoding, compiled=compiled)
    for count in (11, 4, 7):
        requests = requests_of(count)
        assert found(decoder, model, requests) == expected(model, requests, decoding)
    assert (decoder.times.num_graphs > 0) == compiled
