"""How the prompts of a batch are laid out to be read: packed, and what they share only once.

Questions about the same picture begin with the same positions, hundreds of them. Attention is
causal, so their keys and values are the same too, and are made once and copied. Owns which
positions are read in which pass; reading them is `mgm.decoding`'s work.

A position is written as one number, its source: a token id, or -1 - r for row r of the pictures.

Shape legend: N image tokens of one picture, L positions of one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgm.errors import InputError
from mgm.model import IMAGE_TOKEN_ID
from mgm.request import Request

Pictures = tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Prompts that begin alike."""

    members: tuple[int, ...]
    """Their places in the batch."""
    shared: Tensor
    """Sources of the positions that all begin with; empty for a prompt that shares nothing."""
    own: tuple[Tensor, ...]
    """Sources of each member's further positions, one at least."""

    @property
    def num_positions(self) -> int:
        """Positions that are read."""
        return len(self.shared) + sum(len(own) for own in self.own)


@dataclass(frozen=True)
class PrefillPass:
    """Groups that are read together."""

    groups: tuple[Group, ...]

    @property
    def members(self) -> list[int]:
        """Places in the batch of the prompts, in the order of the pass."""
        return [member for group in self.groups for member in group.members]

    @property
    def lengths(self) -> list[int]:
        """Positions of each prompt, shared ones included."""
        return [len(group.shared) + len(own) for group in self.groups for own in group.own]

    def shared_lengths(self) -> list[int]:
        """Return the lengths of the beginnings that are shared."""
        return [len(group.shared) for group in self.groups if len(group.shared)]

    def own_lengths(self) -> list[int]:
        """Return the positions that each prompt has to itself."""
        return [len(own) for group in self.groups for own in group.own]

    def assembly(self) -> Tensor:
        """Return where each prompt's positions are among first the shared, then the own ones."""
        pieces: list[Tensor] = []
        start, own_start = 0, sum(self.shared_lengths())
        for group in self.groups:
            beginning = torch.arange(start, start + len(group.shared))
            for own in group.own:
                pieces += [beginning, torch.arange(own_start, own_start + len(own))]
                own_start += len(own)
            start += len(group.shared)
        return torch.cat(pieces)


def plan_prefill(
    requests: Sequence[Request],
    num_rows: Mapping[str, int],
    limit: int | None,
    most_positions: int,
) -> list[PrefillPass]:
    """Cut a batch into passes of at most `most_positions`, but one group at least.

    Args:
        requests: The batch.
        num_rows: Image tokens N of each picture, in the order of the pictures' rows.
        limit: Longest prompt in positions; what is longer is cut.
        most_positions: Of a pass.

    Raises:
        InputError: A prompt has more or fewer image tokens than pictures.
    """
    groups = _groups(requests, num_rows, limit)
    passes: list[list[Group]] = []
    filled = most_positions
    for group in groups:
        if filled + group.num_positions > most_positions:
            passes.append([])
            filled = 0
        passes[-1].append(group)
        filled += group.num_positions
    return [PrefillPass(tuple(one)) for one in passes]


def _groups(
    requests: Sequence[Request], num_rows: Mapping[str, int], limit: int | None
) -> list[Group]:
    starts, start = {}, 0
    for key, count in num_rows.items():
        starts[key] = start
        start += count
    together: dict[Pictures | int, list[int]] = {}
    for place, request in enumerate(requests):
        together.setdefault(request.images or place, []).append(place)
    groups = []
    for members in together.values():
        sources = [_sources(requests[place], starts, num_rows)[:limit] for place in members]
        length = _shared_length([requests[place] for place in members], num_rows)
        # Each prompt keeps a position of its own, whose hidden state predicts the first token.
        length = min(length, *(len(source) - 1 for source in sources))
        shared = sources[0][:length]
        groups.append(Group(tuple(members), shared, tuple(source[length:] for source in sources)))
    return groups


def _sources(request: Request, starts: Mapping[str, int], num_rows: Mapping[str, int]) -> Tensor:
    """Return the sources (L,) of a prompt's positions."""
    ids = torch.tensor(request.ids)
    cuts = (ids == IMAGE_TOKEN_ID).nonzero().flatten().tolist()
    if len(cuts) != len(request.images):
        raise InputError(
            "Pictures and image tokens do not match",
            f"a prompt has {len(cuts)} image tokens and {len(request.images)} pictures",
            "a question may contain a literal image marker",
        )
    pieces, start = [], 0
    for cut, key in zip(cuts, request.images, strict=True):
        pieces += [ids[start:cut], -1 - starts[key] - torch.arange(num_rows[key])]
        start = cut + 1
    return torch.cat([*pieces, ids[start:]])


def _shared_length(requests: Sequence[Request], num_rows: Mapping[str, int]) -> int:
    """Return the positions that prompts about the same pictures begin with."""
    if len(requests) == 1:
        return 0
    # What the least and the greatest share, all between them share.
    least, greatest = min(r.ids for r in requests), max(r.ids for r in requests)
    common = 0
    for one, other in zip(least, greatest, strict=False):
        if one != other:
            break
        common += 1
    shown = least[:common].count(IMAGE_TOKEN_ID)
    return common - shown + sum(num_rows[key] for key in requests[0].images[:shown])
