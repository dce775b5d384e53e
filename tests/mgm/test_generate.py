"""Batched answering: ids of the original, and independence of what else is in a batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from mgm import generate
from mgm.checkpoint import load_full
from mgm.decoding import PackedDecoder, Started
from mgm.errors import InputError
from mgm.generate import Answerer
from mgm.model import IMAGE_TOKEN_ID, MGM, TowerFeatures
from mgm.padded_decoding import PaddedBatch
from mgm.request import Decoding, Request

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "model_a"
EOS, END_OF_TURN_ID, NEWLINE = 1, 11, 12
NEVER = frozenset({-1})


def load(**overrides: object) -> MGM:
    return load_full(
        GOLDEN, torch.float32, weights=GOLDEN / "weights.safetensors", **overrides
    ).eval()


@pytest.fixture(scope="module")
def model() -> MGM:
    return load()


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(GOLDEN)


def pixels_of(case: str) -> Tensor:
    return load_file(GOLDEN / f"{case}.safetensors")["in.images_aux_u8"].float() / 64 - 2


@pytest.fixture(scope="module")
def pictures() -> dict[str, Tensor]:
    shown = torch.cat([pixels_of("batch_pad"), pixels_of("two_images_one_sample")])
    return {f"picture {number}": picture for number, picture in enumerate(shown)}


@pytest.fixture(scope="module")
def requests(pictures: dict[str, Tensor]) -> list[Request]:
    """Twelve prompts of 4 to 26 ids; most pictures have several, two prompts have none."""
    draw = torch.Generator().manual_seed(5)
    made = []
    for number in range(12):
        length = 4 + 2 * number
        ids = torch.randint(20, 500, (length,), generator=draw).tolist()
        key = list(pictures)[number % len(pictures)]
        if number in (3, 7):
            made.append(Request((2, *ids)))
        else:
            made.append(Request((2, *ids[:2], IMAGE_TOKEN_ID, *ids[2:]), (key,)))
    return made


@pytest.mark.parametrize(
    ("case", "overrides"),
    [
        ("single", {}),
        ("grid2_global", {"image_grid": 2, "image_global": True, "image_size_aux": 256}),
    ],
)
def test_ids_of_the_original_are_reproduced(
    case: str, overrides: dict[str, object], tokenizer: object
) -> None:
    expected = json.loads((GOLDEN / f"{case}.json").read_text())["generate"]
    assert expected["min_top1_top2_margin"] > 1e-3
    picture = pixels_of(case)[0]
    decoding = Decoding(expected["max_new_tokens"], frozenset({expected["eos_token_id"]}))
    answerer = Answerer(load(**overrides), lambda key: picture, decoding)
    (ids,) = answerer.answer([Request(tuple(expected["prompt_ids"]), ("picture",))])
    assert ids == expected["new_ids"]
    assert generate.decode(tokenizer, ids) == expected["text"].strip()


@pytest.mark.parametrize("batch_size", [2, 5, 12])
def test_answers_do_not_depend_on_the_batch(
    model: MGM, requests: list[Request], pictures: dict[str, Tensor], batch_size: int
) -> None:
    alone = {
        position: Answerer(model, pictures.__getitem__, Decoding(12, NEVER)).answer([request])[0]
        for position, request in enumerate(requests)
    }
    together = generate.answer(
        model, requests, pictures.__getitem__, Decoding(12, NEVER), batch_size
    )
    assert dict(together) == alone
    assert len({tuple(ids) for ids in alone.values()}) > 6


def test_rows_stop_one_by_one_at_any_stop_id(
    model: MGM, requests: list[Request], pictures: dict[str, Tensor]
) -> None:
    full = dict(generate.answer(model, requests, pictures.__getitem__, Decoding(12, NEVER), 12))
    stops = frozenset({full[0][1], full[5][3], full[11][6]})
    stopped = dict(generate.answer(model, requests, pictures.__getitem__, Decoding(12, stops), 12))
    for position, ids in full.items():
        ends = [place for place, token in enumerate(ids) if token in stops]
        assert stopped[position] == (ids[: ends[0] + 1] if ends else ids)
    assert len({len(ids) for ids in stopped.values()}) > 2


def test_each_picture_is_encoded_once(
    model: MGM, requests: list[Request], pictures: dict[str, Tensor]
) -> None:
    answerer = Answerer(model, pictures.__getitem__, Decoding(1, NEVER))
    for batch in generate.plan_batches(requests, 2):
        answerer.answer([requests[position] for position in batch])
    shown = {key for request in requests for key in request.images}
    assert answerer.num_encoded == len(shown) == len(pictures)


def test_batches_hold_every_request_once_longest_first(requests: list[Request]) -> None:
    batches = generate.plan_batches(requests, 5)
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert sorted(position for batch in batches for position in batch) == list(range(12))
    longest = max(range(12), key=lambda position: len(requests[position].ids))
    assert batches[0][0] == longest


def test_left_padding_in_the_configuration_changes_nothing(
    requests: list[Request], pictures: dict[str, Tensor], model: MGM
) -> None:
    left = load(tokenizer_padding_side="left")
    decoding = Decoding(4, NEVER)
    assert dict(generate.answer(left, requests, pictures.__getitem__, decoding, 6)) == dict(
        generate.answer(model, requests, pictures.__getitem__, decoding, 6)
    )


def test_a_batch_that_does_not_fit_is_halved(
    model: MGM,
    requests: list[Request],
    pictures: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = Answerer(model, pictures.__getitem__, Decoding(3, NEVER)).answer(requests)
    sizes: list[int] = []
    start = PackedDecoder.start

    def with_little_memory(
        decoder: PackedDecoder, batch: Sequence[Request], rows: dict[str, Tensor]
    ) -> object:
        sizes.append(len(batch))
        if len(batch) > 4:
            raise torch.OutOfMemoryError
        return start(decoder, batch, rows)

    monkeypatch.setattr(PackedDecoder, "start", with_little_memory)
    answerer = Answerer(model, pictures.__getitem__, Decoding(3, NEVER))
    assert answerer.answer(requests) == expected
    assert sizes == [12, 6, 3, 3, 3, 3]
    assert answerer.answer(requests[:6]) == expected[:6]
    assert sizes[6:] == [3, 3]
    sizes.clear()
    streaming = Answerer(model, pictures.__getitem__, Decoding(3, NEVER))
    found = list(streaming.answer_batches([requests[:6], requests[6:]]))
    assert found == [expected[:6], expected[6:]]
    assert sizes == [6, 3, 3, 3, 3]


@pytest.mark.parametrize("numerics", ["fast", "reference"])
def test_a_batch_that_stops_fitting_while_it_is_continued_is_halved(
    model: MGM,
    requests: list[Request],
    pictures: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    numerics: generate.Numerics,
) -> None:
    expected = Answerer(model, pictures.__getitem__, Decoding(3, NEVER)).answer(requests)
    answerer = Answerer(model, pictures.__getitem__, Decoding(3, NEVER), numerics=numerics)
    finish, sizes = answerer.decoder.finish, []

    def with_little_memory(batch: PaddedBatch | Started) -> list[list[int]]:
        sizes.append(batch.num_rows)
        if batch.num_rows > 4:
            raise torch.OutOfMemoryError
        return finish(batch)

    monkeypatch.setattr(answerer.decoder, "finish", with_little_memory)
    found = list(answerer.answer_batches([requests[:6], requests[6:]]))
    assert found == [expected[:6], expected[6:]]
    assert sizes == [6, 3, 3, 3, 3]


def test_pictures_that_do_not_fit_together_are_encoded_in_smaller_groups(
    model: MGM, requests: list[Request], pictures: dict[str, Tensor]
) -> None:
    sizes: list[int] = []

    def with_little_memory(images: Tensor | None, images_aux: Tensor) -> TowerFeatures:
        sizes.append(len(images_aux))
        if len(images_aux) > 2:
            raise torch.OutOfMemoryError
        return model.towers(images, images_aux)

    decoding = Decoding(3, NEVER)
    answerer = Answerer(model, pictures.__getitem__, decoding, towers=with_little_memory)
    expected = Answerer(model, pictures.__getitem__, decoding).answer(requests)
    assert answerer.answer(requests) == expected
    assert sizes[-1] <= 2 < sizes[0]

    def without_memory(images: Tensor | None, images_aux: Tensor) -> TowerFeatures:
        raise torch.OutOfMemoryError

    with pytest.raises(InputError, match="one picture alone"):
        Answerer(model, pictures.__getitem__, decoding, towers=without_memory).answer(requests)


def test_one_request_that_does_not_fit_is_an_input_error(
    model: MGM,
    requests: list[Request],
    pictures: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_memory(*arguments: object) -> Started:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(PackedDecoder, "start", without_memory)
    with pytest.raises(InputError, match="one question alone"):
        Answerer(model, pictures.__getitem__, Decoding(3, NEVER)).answer(requests[:2])


def test_stopping_at_the_end_of_the_turn_gives_the_text_of_stopping_at_eos(
    tokenizer: object,
) -> None:
    assert generate.stop_ids(tokenizer) == {EOS, END_OF_TURN_ID}
    assert generate.stop_ids(tokenizer, at_end_of_turn=False) == {EOS}
    for answer in ("A", "a red bus", " spaced ", "two\nlines", ""):
        ids = tokenizer(answer, add_special_tokens=False).input_ids  # type: ignore[operator]
        until_eos = [*ids, END_OF_TURN_ID, NEWLINE, EOS]
        until_turn = [*ids, END_OF_TURN_ID]
        assert generate.decode(tokenizer, until_turn) == generate.decode(tokenizer, until_eos)
        assert generate.decode(tokenizer, until_turn) == answer.strip()


def test_early_stop_ends_a_real_decoding_with_the_same_text(model: MGM, tokenizer: object) -> None:
    """A model that writes the end of its turn: its embedding is scripted, all else is real."""
    script = [300, 483, END_OF_TURN_ID, NEWLINE, EOS, 300]
    picture = pixels_of("single")[0]
    expected = json.loads((GOLDEN / "single.json").read_text())["generate"]
    request = Request(tuple(expected["prompt_ids"]), ("picture",))

    def written(stops: frozenset[int]) -> list[int]:
        answerer = Answerer(model, lambda key: picture, Decoding(6, stops))
        steps = iter(script)

        def scripted(module: torch.nn.Module, inputs: object, logits: Tensor) -> Tensor:
            logits = torch.zeros_like(logits)
            logits[..., next(steps)] = 1
            return logits

        hook = model.language_model.lm_head.register_forward_hook(scripted)
        try:
            return answerer.answer([request])[0]
        finally:
            hook.remove()

    until_eos = written(generate.stop_ids(tokenizer, at_end_of_turn=False))
    until_turn = written(generate.stop_ids(tokenizer))
    assert (until_eos, until_turn) == (script[:5], script[:3])
    assert generate.decode(tokenizer, until_turn) == generate.decode(tokenizer, until_eos)
