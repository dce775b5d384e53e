"""Masters beside bfloat16 weights: what is exact is compared bit by bit, the rest by its error."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mgm import adamw_step
from mgm.master_weights import MasterAdamW, Masters, Moments
from mgm.optimization import parameter_groups, set_learning_rate
from mgm.quantised_moments import BLOCK, decode, encode, quotient_bound
from mgm.split_weights import join, random_bits, random_key, split

COMBINATIONS: list[tuple[Masters, Moments]] = [
    ("float32", "float32"),
    ("float32", "8bit"),
    ("split24", "float32"),
    ("split24", "8bit"),
]
ODD = 3 * BLOCK + 77
CPU = torch.device("cpu")
FIRST_BITS = [-889199728, -787275391, -726475646]
"""Of the indices 0 to 2 under the key (1, 2), from the hash in whole numbers."""


def _parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    """Return two bfloat16 weights of odd sizes, a bfloat16 norm and a float32 weight."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.02 * torch.randn(shape, generator=generator)

    return {
        "language_model.a.weight": nn.Parameter(draw(ODD, 3).bfloat16()),
        "language_model.b.weight": nn.Parameter(draw(7, 5).bfloat16()),
        "language_model.norm.weight": nn.Parameter(draw(19).bfloat16()),
        "projector.0.weight": nn.Parameter(draw(11, 13)),
    }


def _optimizer(
    named: dict[str, nn.Parameter], master: Masters, moments: Moments, **options: Any
) -> MasterAdamW:
    groups = parameter_groups(named.items(), 1e-3, 3e-3, 0.1)
    return MasterAdamW(groups, (0.9, 0.999), 1e-8, master=master, moments=moments, **options)


def _set_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in named.values():
        noise = torch.randn(parameter.shape, generator=generator)
        spread = torch.exp(torch.randn(parameter.shape, generator=generator))
        parameter.grad = (1e-3 * noise * spread).to(parameter.dtype)


def _train(
    named: dict[str, nn.Parameter], optimizer: MasterAdamW, steps: range, scale: float = 1.0
) -> None:
    for step in steps:
        set_learning_rate(optimizer, 1 / (1 + step))
        _set_gradients(named, step)
        optimizer.step(scale)
        optimizer.zero_grad(set_to_none=True)


def test_float32_masters_equal_torch_adamw_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_step, "SLICE", 4 * BLOCK)
    named = _parameters()
    copies = {name: nn.Parameter(p.detach().float()) for name, p in named.items()}
    optimizer = _optimizer(named, "float32", "float32")
    expected = torch.optim.AdamW(
        parameter_groups(copies.items(), 1e-3, 3e-3, 0.1), betas=(0.9, 0.999), eps=1e-8
    )
    for step in range(25):
        for each in (optimizer, expected):
            set_learning_rate(each, 1 / (1 + step))
        _set_gradients(named, step)
        for name, parameter in named.items():
            assert parameter.grad is not None
            copies[name].grad = parameter.grad.float() * 0.25
        optimizer.step(torch.tensor(0.25))
        expected.step()
    for name, parameter in named.items():
        assert torch.equal(optimizer.master(parameter), copies[name])
        assert torch.equal(parameter, copies[name].to(parameter.dtype))


def test_a_split_weight_is_joined_exactly_and_its_high_part_is_the_nearest_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 30, (10_000,), generator=generator)
    whole = torch.ldexp(torch.randn(10_000, generator=generator), exponents)
    high, low = split(whole)
    joined = join(high, low)
    assert torch.equal(joined.view(torch.int32), whole.view(torch.int32) & ~0xFF)
    ties = joined.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(high[~ties], joined.bfloat16()[~ties])
    special = torch.tensor([0.0, -0.0, 1.0, -1.99999, math.inf, -math.inf])
    assert torch.equal(join(*split(special))[[0, 1, 2, 4, 5]], special[[0, 1, 2, 4, 5]])
    assert split(special)[0][3] == -2


def test_rounding_to_24_bits_is_right_on_average() -> None:
    whole = torch.full((200_000,), 0.02)
    place = 2.0**-21
    for share in (0.1, 0.5, 0.9):
        exact = join(*split(whole)) + share * place
        bits = random_bits(0, len(exact), random_key(3, 7, 1), CPU)
        rounded = join(*split(exact, bits)).double()
        assert set(((rounded - rounded.min()) / place).unique().tolist()) == {0.0, 1.0}
        # Four standard errors, and the 24-bit grid of the float32 that is rounded.
        allowed = place * (4 * math.sqrt(share * (1 - share) / len(exact)) + 2**-8)
        assert abs(rounded.mean() - exact.double().mean()) < allowed


def test_random_bits_are_uniform_and_their_own_in_every_step_and_parameter() -> None:
    count = 1 << 16
    keys = [random_key(0, 1, 0), random_key(0, 2, 0), random_key(0, 1, 1), random_key(1, 1, 0)]
    drawn = [random_bits(0, count, key, CPU) for key in keys]
    for bits in drawn:
        places = torch.stack([(bits >> place) & 1 for place in range(32)]).double()
        assert (places.mean(1) - 0.5).abs().max() < 4.5 * 0.5 / math.sqrt(count)
    for other in drawn[1:]:
        assert (drawn[0] == other).sum() < 5
    # A range is part of a longer one, so slices and whole parameters draw alike.
    assert torch.equal(random_bits(1000, 1500, keys[0], CPU), drawn[0][1000:1500])
    # Fixed values: a state is continued with the bits it was begun with.
    assert random_bits(0, 3, (1, 2), CPU).tolist() == FIRST_BITS


def _drift(kind: str, steps: int = 2000) -> tuple[Tensor, Tensor]:
    """Fit a linear map by noisy gradients at a rate of 2e-5; return first and last weights."""
    generator = torch.Generator().manual_seed(5)
    start = (0.02 * torch.randn(40, 32, generator=generator)).bfloat16()
    goal = start.double() + 0.02 * torch.randn(40, 32, generator=generator).double()
    dtype = {"float64": torch.float64, "float32": torch.float32}.get(kind, torch.bfloat16)
    weight = nn.Parameter(start.to(dtype))
    groups = [{"params": [weight], "lr": 2e-5, "peak_lr": 2e-5, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer
    if kind in ("split24", "split24 8bit"):
        moments: Moments = "8bit" if kind.endswith("8bit") else "float32"
        optimizer = MasterAdamW(groups, master="split24", moments=moments)
    else:
        optimizer = torch.optim.AdamW(groups)
    inputs = torch.randn(256, 32, generator=generator).double()
    for step in range(steps):
        rows = inputs[(step * 16) % 256 :][:16]
        error = rows @ (weight.detach().double() - goal).t()
        weight.grad = (error.t() @ rows / 16).to(dtype)
        optimizer.step()
    last = optimizer.master(weight) if isinstance(optimizer, MasterAdamW) else weight.detach()
    return start.double(), last.double()


def test_split_masters_drift_as_float32_does_where_bfloat16_stands_still() -> None:
    start, truth = _drift("float64")
    travelled = (truth - start).norm()
    off = {
        kind: float((_drift(kind)[1] - truth).norm() / travelled)
        for kind in ("float32", "split24", "split24 8bit", "bfloat16")
    }
    assert off["float32"] < 0.001
    assert off["split24"] < 0.002
    assert off["split24 8bit"] < 0.05
    assert off["bfloat16"] > 0.5


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, ODD])
def test_moments_in_bytes_are_right_on_average(size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    v = torch.exp(2 * torch.randn(size, generator=generator)) * 1e-8
    m = 0.3 * torch.randn(size, generator=generator) * v.sqrt()
    bound = quotient_bound(0.9, 0.999)
    repeats = 400
    sums = torch.zeros(2, size, dtype=torch.float64)
    for repeat in range(repeats):
        bits = random_bits(0, size, random_key(0, repeat, 0), CPU)
        codes = encode(m, v, bits, bound)
        assert [code.dtype for code in codes[:2]] == [torch.int8, torch.uint8]
        got = decode(*codes)
        sums += torch.stack(got)
        # One code of c**3 apart is 6 / c of v; the smallest c here is above 20.
        assert ((got[1] - v).abs() <= 0.35 * v).all()
    mean_m, mean_v = sums / repeats
    assert ((mean_v - v).abs() / v).max() < 0.35 / math.sqrt(repeats) * 4
    one_code = (m.abs() / v.sqrt()).max() / 127 * v.sqrt()
    assert ((mean_m - m).abs() / one_code).max() < 5 * 0.5 / math.sqrt(repeats)


def test_a_second_moment_above_zero_is_never_decoded_as_zero() -> None:
    v = torch.zeros(ODD)
    v[::3] = 1e-30
    v[0] = 1.0
    m = 1e-15 * torch.ones(ODD)
    bound = quotient_bound(0.9, 0.999)
    got_m, got_v = decode(*encode(m, v, random_bits(0, ODD, (1, 1), CPU), bound))
    assert torch.equal(got_v > 0, v > 0)
    assert (got_m[v == 0] == 0).all()
    assert (got_m.abs() <= bound * got_v.sqrt() * (1 + 1e-5)).all()
    zeros = torch.zeros(ODD)
    for part in encode(zeros, zeros, random_bits(0, ODD, (1, 1), CPU), bound):
        assert (part == 0).all()


def test_no_update_exceeds_the_bound_of_exact_moments() -> None:
    """Gradients of one large element among tiny, rare and vanishing ones."""
    weight = nn.Parameter(torch.zeros(ODD, dtype=torch.bfloat16))
    groups = [{"params": [weight], "lr": 1.0, "weight_decay": 0.0}]
    optimizer = MasterAdamW(groups, master="float32", moments="8bit")
    generator = torch.Generator().manual_seed(3)
    before = optimizer.master(weight)
    for step in range(1, 200):
        gradient = torch.randn(ODD, generator=generator) * 10.0 ** (-(torch.arange(ODD) % 23))
        rare = torch.rand(ODD, generator=generator) < 0.02
        gradient[200:700] = torch.where(rare, gradient, 0.0)[200:700]
        weight.grad = gradient.bfloat16()
        optimizer.step()
        after = optimizer.master(weight)
        correction = (1 - 0.9**step) / math.sqrt(1 - 0.999**step)
        assert (after - before).abs().max() * correction <= quotient_bound(0.9, 0.999) * 1.001
        before = after


def test_moments_need_betas_that_bound_their_quotient() -> None:
    with pytest.raises(ValueError, match="beta1"):
        MasterAdamW(
            [{"params": [nn.Parameter(torch.zeros(3).bfloat16())]}],
            (0.999, 0.9),
            master="split24",
            moments="8bit",
        )


def _final_loss(master: Masters, moments: Moments) -> float:
    """Train a transformer layer to copy from three places earlier; return the last steps' loss."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(17, 48),
        nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, norm_first=True),
        nn.Linear(48, 17),
    )
    position = torch.randn(20, 48) * 0.5
    model = model.bfloat16()
    groups = parameter_groups(model.named_parameters(), 3e-3, None, 0.01)
    optimizer = MasterAdamW(groups, master=master, moments=moments)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(90):
        tokens = torch.randint(17, (16, 20), generator=generator)
        embedded = model[0](tokens)
        logits = model[2](model[1](embedded + position.to(embedded.dtype))).float()
        loss = nn.functional.cross_entropy(logits[:, 3:].flatten(0, 1), tokens[:, :-3].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def test_a_small_transformer_learns_as_well_with_bytes_as_with_float32() -> None:
    exact = _final_loss("float32", "float32")
    small = _final_loss("split24", "8bit")
    chance = math.log(17)
    assert exact < 0.6 * chance
    # In the middle of the fall, where a different path would show.
    assert abs(small - exact) < 0.01 * (chance - exact)


@pytest.mark.parametrize(("master", "moments"), COMBINATIONS)
def test_a_training_continued_from_a_file_ends_bit_equal(
    master: Masters, moments: Moments, tmp_path: Path
) -> None:
    whole = _parameters()
    _train(whole, _optimizer(whole, master, moments, seed=9), range(12))

    begun = _parameters()
    first = _optimizer(begun, master, moments, seed=9)
    _train(begun, first, range(5))
    content = {"weights": begun, "optimizer": first.state_dict()}
    path = tmp_path / "state.pt"
    torch.save(content, path)
    loaded = torch.load(path, weights_only=True)

    continued = _parameters(seed=1)
    second = _optimizer(continued, master, moments)
    with torch.no_grad():
        for name, parameter in continued.items():
            parameter.copy_(loaded["weights"][name])
    second.load_state_dict(loaded["optimizer"])
    _assert_same(second.state_dict(), first.state_dict())
    _train(continued, second, range(5, 12))
    for name, parameter in whole.items():
        assert torch.equal(parameter, continued[name])


def _assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["param_groups"] == other["param_groups"]
    assert (one["step_count"], one["seed"]) == (other["step_count"], other["seed"])
    assert one["state"].keys() == other["state"].keys()
    for index, tensors in one["state"].items():
        assert tensors.keys() == other["state"][index].keys()
        for name, value in tensors.items():
            assert value.dtype == other["state"][index][name].dtype
            assert torch.equal(value, other["state"][index][name])


def test_a_state_of_other_masters_is_refused_and_changes_nothing() -> None:
    named = _parameters()
    optimizer = _optimizer(named, "split24", "8bit")
    _train(named, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    other = _optimizer(_parameters(), "float32", "8bit")
    with pytest.raises(ValueError, match="parameter 0"):
        optimizer.load_state_dict(other.state_dict())
    fewer = _parameters()
    fewer.pop("language_model.b.weight")
    with pytest.raises(ValueError, match="groups"):
        optimizer.load_state_dict(_optimizer(fewer, "split24", "8bit").state_dict())
    _assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize(("master", "moments"), COMBINATIONS)
def test_no_gradient_is_a_gradient_of_zero(master: Masters, moments: Moments) -> None:
    ends = []
    for absent in (True, False):
        named = _parameters()
        optimizer = _optimizer(named, master, moments)
        _train(named, optimizer, range(3))
        moved = {name: parameter.detach().clone() for name, parameter in named.items()}
        for _ in range(4):
            for parameter in named.values():
                parameter.grad = None if absent else torch.zeros_like(parameter)
            optimizer.step()
        assert all(not torch.equal(moved[name], p) for name, p in named.items())
        ends.append(named)
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name])


@pytest.mark.parametrize(("master", "moments"), COMBINATIONS)
def test_weights_that_never_had_a_gradient_only_decay(master: Masters, moments: Moments) -> None:
    named = _parameters()
    start = {name: parameter.detach().double() for name, parameter in named.items()}
    optimizer = _optimizer(named, master, moments)
    for _ in range(50):
        optimizer.step()
    rate = {"projector.0.weight": 3e-3, "language_model.norm.weight": 0.0}
    for name, parameter in named.items():
        shrunk = start[name] * (1 - rate.get(name, 1e-3) * 0.1) ** 50
        got = optimizer.master(parameter).double()
        # Each of 50 roundings to 24 bits is off by less than 2**-15 of the weight, to either side.
        assert torch.allclose(got, shrunk, rtol=6 * math.sqrt(50) * 2**-16, atol=1e-9)
        assert abs(got.abs().sum() / shrunk.abs().sum() - 1) < 1e-4
        assert (got.norm() < start[name].norm()) == (name != "language_model.norm.weight")


def test_a_rate_of_zero_leaves_every_weight_as_it_is() -> None:
    named = _parameters()
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = _optimizer(named, "split24", "8bit")
    set_learning_rate(optimizer, 0.0)
    _set_gradients(named, 0)
    optimizer.step()
    for name, parameter in named.items():
        assert torch.equal(optimizer.master(parameter), start[name].float())


@pytest.mark.parametrize(
    ("master", "moments", "expected"),
    [
        ("float32", "float32", 14),
        ("float32", "8bit", 8 + 8 / BLOCK),
        ("split24", "float32", 11),
        ("split24", "8bit", 5 + 8 / BLOCK),
    ],
)
def test_bytes_of_a_weight(master: Masters, moments: Moments, expected: float) -> None:
    weight = nn.Parameter(torch.zeros(4, 16 * BLOCK, dtype=torch.bfloat16))
    optimizer = MasterAdamW([{"params": [weight]}], master=master, moments=moments)
    kept = [weight, *optimizer.state_dict()["state"][0].values()]
    assert sum(t.numel() * t.element_size() for t in kept) / weight.numel() == expected


def test_a_state_keeps_its_types_in_a_file() -> None:
    named = _parameters()
    optimizer = _optimizer(named, "split24", "8bit")
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    tensors = torch.load(buffer, weights_only=True)["state"][0]
    assert {name: value.dtype for name, value in tensors.items()} == {
        "low": torch.int8,
        "first": torch.int8,
        "second": torch.uint8,
        "first_unit": torch.float32,
        "second_unit": torch.float32,
    }


def test_slices_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for size in (BLOCK, 1 << 20):
        monkeypatch.setattr(adamw_step, "SLICE", size)
        named = _parameters()
        _train(named, _optimizer(named, "split24", "8bit"), range(4), scale=0.7)
        ends.append(named)
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name])


def test_what_cannot_be_trained_is_refused() -> None:
    for bad in (torch.zeros(3, dtype=torch.float16), torch.zeros(4, 3).t().bfloat16()):
        with pytest.raises(ValueError, match="parameter"):
            MasterAdamW([{"params": [nn.Parameter(bad)]}], master="float32", moments="float32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("master", "moments"), COMBINATIONS)
def test_the_gpu_agrees_with_the_cpu(master: Masters, moments: Moments) -> None:
    there = {name: nn.Parameter(p.detach().cuda()) for name, p in _parameters().items()}
    here = _parameters()
    on_gpu, on_cpu = (_optimizer(named, master, moments) for named in (there, here))
    _train(there, on_gpu, range(8), scale=0.5)
    _train(here, on_cpu, range(8), scale=0.5)
    for name, parameter in here.items():
        apart = (on_gpu.master(there[name]).cpu() - on_cpu.master(parameter)).abs()
        # A code that falls on the other side of its dice is rare, and worth a part of an update.
        assert apart.max() < 1e-4
        assert (apart > 1e-6).float().mean() < 0.01
