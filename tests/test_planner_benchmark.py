"""The planner benchmark: its worlds, its measures, the anchors of random search, and no leak."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.planner import TABLE, Session, judged, play, replay, shuffled, true_values
from benchmarks.planner_players import (
    BuiltinPlayer,
    Choice,
    GreedyPlayer,
    Player,
    RandomPlayer,
    RecordedPlayer,
    Seen,
)
from benchmarks.planner_worlds import World, build_arm, read_table, simulate

TASKS = ("TextVQA", "geometric mean")


@pytest.fixture(scope="module")
def table() -> World:
    return read_table(TABLE)


def mean_of(sessions: list[Session]) -> tuple[float, float]:
    return (
        float(np.mean([one.regret for one in sessions])),
        float(np.mean([one.optimism for one in sessions])),
    )


def test_the_table_is_read_as_recipes(table: World) -> None:
    assert len(table.arms) == 15
    assert true_values(table, "TextVQA").max() == pytest.approx(1.0995)
    assert true_values(table, "geometric mean")[6] == pytest.approx((1.0995 * 2.9804) ** 0.5)
    duplicated = table.arms[10]
    assert duplicated.repeat == 4
    assert duplicated.steps == table.arms[9].steps
    assert len(table.arms[4].recipe.operators) == 2


def test_an_unknown_step_is_named() -> None:
    with pytest.raises(ValueError, match="magic"):
        build_arm(["magic>=1"], 1, 10.0, 10.0)


def test_another_table_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    path.write_text(
        "id,ops,rows_k,eff_k,MMBench,TextVQA\n1,dedup,90,90,1.1,1.2\n2,sim>=0.3,9,9,2,1\n"
    )
    world = read_table(path)
    session = replay(BuiltinPlayer(), world, "TextVQA", 5, 0)
    assert session.regret in (0.0, 1.0)


@pytest.mark.parametrize(
    ("task", "regret", "optimism"), [("TextVQA", 0.222, 0.016), ("geometric mean", 0.082, 0.030)]
)
def test_random_search_reaches_the_published_anchors(
    table: World, task: str, regret: float, optimism: float
) -> None:
    found = mean_of([replay(RandomPlayer(), table, task, 8, seed) for seed in range(1500)])
    assert found == (pytest.approx(regret, abs=0.02), pytest.approx(optimism, abs=0.012))


@pytest.mark.parametrize(
    ("task", "regret", "optimism"), [("TextVQA", 0.18, 0.010), ("geometric mean", 0.06, 0.020)]
)
def test_the_built_in_planner_reaches_its_goals(
    table: World, task: str, regret: float, optimism: float
) -> None:
    sessions = [replay(BuiltinPlayer(), table, task, 8, seed) for seed in range(150)]
    found = mean_of(sessions)
    assert found[0] <= regret
    assert found[1] <= optimism
    assert sum(one.invalid + one.duplicates for one in sessions) == 0


def test_nothing_is_won_where_results_do_not_belong_to_recipes(table: World) -> None:
    ours = mean_of([shuffled(BuiltinPlayer(), table, "TextVQA", 8, seed) for seed in range(150)])
    chance = mean_of([shuffled(RandomPlayer(), table, "TextVQA", 8, seed) for seed in range(1000)])
    assert ours[0] >= chance[0] - 0.04


def test_the_order_of_the_arms_does_not_matter(table: World) -> None:
    order = np.random.default_rng(0).permutation(15)
    moved = table.permuted(order, order)
    assert moved.truth["TextVQA"].tolist() == table.truth["TextVQA"][order].tolist()
    assert moved.arms[0] == table.arms[order[0]]


def test_simulated_worlds_have_what_they_promise() -> None:
    worlds = [simulate(seed) for seed in range(30)]
    assert len({arm.steps for arm in worlds[0].arms}) > 10
    jumps = [np.diff(np.sort(world.truth["MMBench"])).max() for world in worlds]
    assert np.median(jumps) > 30  # two modes
    assert max(arm.repeat for world in worlds for arm in world.arms) > 1
    assert any("llava_caption" in arm.steps for world in worlds for arm in world.arms)
    generator = np.random.default_rng(0)
    ended = [worlds[0].run(0, generator) for _ in range(400)]
    assert 0 < sum(result is None for result in ended) < 100
    again = simulate(3)
    assert again.truth["TextVQA"].tolist() == worlds[3].truth["TextVQA"].tolist()


def test_the_built_in_planner_beats_chance_in_simulated_worlds() -> None:
    regrets: dict[str, list[float]] = {"random": [], "built-in": []}
    for number in range(5000, 5020):
        world = simulate(number)
        for name, player in (("random", RandomPlayer()), ("built-in", BuiltinPlayer())):
            sessions = [play(player, world, "TextVQA", 12.0, s, by_cost=True) for s in range(2)]
            regrets[name] += [one.regret for one in sessions]
    assert np.mean(regrets["built-in"]) < 0.8 * np.mean(regrets["random"])


@pytest.mark.parametrize("player", [RandomPlayer(), GreedyPlayer(), BuiltinPlayer()])
@pytest.mark.parametrize("task", TASKS)
def test_sessions_are_the_same_for_the_same_seed(table: World, player: Player, task: str) -> None:
    assert replay(player, table, task, 5, 7) == replay(player, table, task, 5, 7)


def test_recorded_choices_are_played_and_faults_counted(table: World, tmp_path: Path) -> None:
    path = tmp_path / "recorded.jsonl"
    path.write_text("[6, 6, 99]\n[2, 3, 4, 5]\n")
    player = RecordedPlayer(path)
    first = play(player, table, "TextVQA", 4, 0)
    assert (first.invalid, first.duplicates, first.choices) == (2, 0, 4)
    assert first.regret == 0.0
    assert play(player, table, "TextVQA", 4, 0).invalid == 0


def test_what_is_repeated_unawares_is_a_duplicate(table: World) -> None:
    class Forgetful(RandomPlayer):
        def choose(self, seen: Seen, generator: np.random.Generator) -> Choice:
            return Choice(0)

    assert play(Forgetful(), table, "TextVQA", 5, 0).duplicates == 4


def test_no_result_means_the_baseline(table: World) -> None:
    seen = Seen(table.arms, table.features(), {"TextVQA": 1.0})
    session = judged(BuiltinPlayer(), seen, table, "TextVQA", True, (0, 0))
    assert session.optimism == 0.0
    assert session.regret == pytest.approx((1.0995 - 1) / (1.0995 - 0.9967))
