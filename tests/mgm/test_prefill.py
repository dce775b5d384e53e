"""Which positions of a batch's prompts are read, and which are read once for several prompts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgm.errors import InputError
from mgm.model import IMAGE_TOKEN_ID
from mgm.prefill import PrefillPass, plan_prefill
from mgm.request import Request

NUM_ROWS = {"a": 3, "b": 3, "c": 3}
A, B, C = range(-1, -4, -1), range(-4, -7, -1), range(-7, -10, -1)
REQUESTS = [
    Request((2, 5, IMAGE_TOKEN_ID, 6, 7, 8), ("a",)),
    Request((2, 9), ()),
    Request((2, 5, IMAGE_TOKEN_ID, 6, 7, 9, 10), ("a",)),
    Request((2, 5, IMAGE_TOKEN_ID, 6), ("b",)),
    Request((2, 5, IMAGE_TOKEN_ID, 6, 8), ("a",)),
    Request((2, 9), ()),
    Request((2, IMAGE_TOKEN_ID, 4, IMAGE_TOKEN_ID, 5), ("b", "c")),
    Request((2, IMAGE_TOKEN_ID, 4, IMAGE_TOKEN_ID, 5, 6), ("b", "c")),
]
EXPECTED = [
    [2, 5, *A, 6, 7, 8],
    [2, 9],
    [2, 5, *A, 6, 7, 9, 10],
    [2, 5, *B, 6],
    [2, 5, *A, 6, 8],
    [2, 9],
    [2, *B, 4, *C, 5],
    [2, *B, 4, *C, 5, 6],
]


def read(passes: list[PrefillPass]) -> dict[int, list[int]]:
    """Return every prompt's sources as a reader of the passes puts them together."""
    found: dict[int, list[int]] = {}
    for one in passes:
        shared = [group.shared for group in one.groups]
        own = [piece for group in one.groups for piece in group.own]
        whole = torch.cat([*shared, *own])[one.assembly()]
        for member, sources in zip(one.members, whole.split(one.lengths), strict=True):
            found[member] = sources.tolist()
    return found


def as_list(tensors: tuple[Tensor, ...]) -> list[list[int]]:
    return [tensor.tolist() for tensor in tensors]


@pytest.mark.parametrize("most_positions", [1, 20, 1000])
def test_every_prompt_is_read_whole(most_positions: int) -> None:
    passes = plan_prefill(REQUESTS, NUM_ROWS, None, most_positions)
    assert read(passes) == dict(enumerate(EXPECTED))
    for one in passes:
        assert len(one.groups) == 1 or sum(g.num_positions for g in one.groups) <= most_positions


def test_what_prompts_about_a_picture_begin_with_is_read_once() -> None:
    (one,) = plan_prefill(REQUESTS, NUM_ROWS, None, 1000)
    first, *others = one.groups
    assert first.members == (0, 2, 4)
    assert first.shared.tolist() == [2, 5, *A, 6]
    assert as_list(first.own) == [[7, 8], [7, 9, 10], [8]]
    assert [group.members for group in others] == [(1,), (3,), (5,), (6, 7)]
    assert [len(group.shared) for group in others] == [0, 0, 0, 8]
    # A prompt that another one begins with keeps its last position.
    assert as_list(others[-1].own) == [[5], [5, 6]]


def test_equal_prompts_keep_one_position_each() -> None:
    (one,) = plan_prefill([REQUESTS[0], REQUESTS[0]], NUM_ROWS, None, 1000)
    assert as_list(one.groups[0].own) == [[8], [8]]


def test_pictures_behind_different_texts_are_not_shared() -> None:
    requests = [Request((2, word, IMAGE_TOKEN_ID, 6), ("a",)) for word in (5, 6)]
    (one,) = plan_prefill(requests, NUM_ROWS, None, 1000)
    assert one.groups[0].shared.tolist() == [2]
    assert read([one]) == {0: [2, 5, *A, 6], 1: [2, 6, *A, 6]}


@pytest.mark.parametrize("limit", [1, 4, 6, 8])
def test_prompts_are_cut_to_the_limit(limit: int) -> None:
    passes = plan_prefill(REQUESTS, NUM_ROWS, limit, 1000)
    assert read(passes) == {place: sources[:limit] for place, sources in enumerate(EXPECTED)}


def test_an_image_token_without_a_picture_is_an_input_error() -> None:
    with pytest.raises(InputError, match="2 image tokens and 1 pictures"):
        plan_prefill([Request((2, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID), ("a",))], NUM_ROWS, None, 9)
