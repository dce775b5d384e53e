"""The packed execution of the language model equals the padded one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mgm.lora import attach_lora
from mgm.model import MGM
from mgm.packed import PackedLanguage, Segments, padded_length

LENGTHS = (7, 1, 12, 4)


@pytest.fixture
def model() -> MGM:
    torch.manual_seed(0)
    model = MGM.preset("mgm-mini").eval()
    for parameter in model.language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def rows(model: MGM) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = model.config.language_width
    return [torch.randn(length, width, generator=generator) for length in LENGTHS]


def padded(model: MGM, sequences: list[Tensor]) -> list[Tensor]:
    embeds = pad_sequence(sequences, batch_first=True)
    mask = torch.arange(embeds.shape[1]) < torch.tensor(LENGTHS)[:, None]
    hidden = model.language_model.model(
        inputs_embeds=embeds, attention_mask=mask.long()
    ).last_hidden_state
    return [row[:length] for row, length in zip(hidden, LENGTHS, strict=True)]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("recomputed", [0, 1])
def test_packed_rows_equal_padded_ones(model: MGM, lora: bool, recomputed: int) -> None:
    if lora:
        attach_lora(model, rank=4, alpha=8)
        for name, parameter in model.language_model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    packed = PackedLanguage(model.language_model, compiled=False, recomputed_layers=recomputed)
    sequences = rows(model)
    expected = torch.cat(padded(model, sequences))
    found = packed(torch.cat(sequences), Segments.of(LENGTHS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    trained = [p for p in model.language_model.model.layers.parameters() if p.requires_grad]
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad((expected * direction).sum(), trained)
    got = torch.autograd.grad((found * direction).sum(), trained)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_the_cache_holds_what_later_tokens_attend_to(model: MGM) -> None:
    packed = PackedLanguage(model.language_model, compiled=False)
    cache: list[tuple[Tensor, Tensor]] = []
    sequences = rows(model)
    packed(torch.cat(sequences), Segments.of(LENGTHS), cache)
    output = model.language_model.model(inputs_embeds=sequences[0][None], use_cache=True)
    for (key, value), layer in zip(cache, output.past_key_values.layers, strict=True):
        torch.testing.assert_close(
            key[: LENGTHS[0]].transpose(0, 1), layer.keys[0], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            value[: LENGTHS[0]].transpose(0, 1), layer.values[0], rtol=1e-4, atol=1e-4
        )


def test_dropout_of_adapters_acts_in_training_only(model: MGM) -> None:
    attach_lora(model, rank=4, alpha=8, dropout=0.5)
    for name, parameter in model.language_model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    packed = PackedLanguage(model.language_model, compiled=False)
    row, segments = torch.cat(rows(model)), Segments.of(LENGTHS)
    assert torch.equal(packed(row, segments), packed(row, segments))
    model.train()
    assert not torch.equal(packed(row, segments), packed(row, segments))


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="lengths"):
        Segments.of([3, 0])


def test_lengths_are_rounded_up() -> None:
    assert [padded_length(n) for n in (1, 128, 129)] == [128, 128, 256]
