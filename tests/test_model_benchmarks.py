"""What the benchmarks of the model make up and conclude, without a GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gpu_answering import CASES, MMBENCH, TEXTVQA, Benchmark, Questions
from benchmarks.gpu_scaling import compare, run
from benchmarks.gpu_scaling import table as scaling_table
from benchmarks.gpu_training import SAMPLES
from benchmarks.numerics import table
from mgm.distributed import ALONE
from mgm.model import IMAGE_TOKEN_ID


@pytest.mark.parametrize("benchmark", [TEXTVQA, MMBENCH], ids=lambda one: one.name)
def test_questions_cost_what_the_real_ones_do(benchmark: Benchmark, tmp_path: Path) -> None:
    questions = Questions(benchmark, tmp_path, vocabulary=1000)
    asked = questions.requests(400, benchmark.per_picture, "asked")
    text = [len(request.ids) - 1 for request in asked]  # the picture's place is no text
    assert sum(text) / len(text) == pytest.approx(benchmark.text_tokens, abs=1)
    assert all(request.ids.count(IMAGE_TOKEN_ID) == 1 for request in asked)
    shared = Counter(request.images for request in asked)
    assert len(asked) / len(shared) == pytest.approx(benchmark.per_picture, rel=0.01)
    assert questions.open(asked[0].images[0]).size == benchmark.size
    assert not shared.keys() & {one.images for one in questions.requests(2, 1, "warm")}


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_numerics_are_compared_in_the_spread_of_the_reference() -> None:
    names = ("TextVQA", "MMBench", "MMBench plain", "stage-1 loss", "stage-2 loss")
    records = [
        {"numerics": numerics, "seed": seed, **dict.fromkeys(names, value)}
        for numerics, values in (("fast", (61.0, 65.0)), ("reference", (60.0, 64.0)))
        for seed, value in enumerate(values, 1)
    ]
    report = table(records, "0001-baseline")
    assert "| reference | 1 | 60.0 |" in report
    assert "| fast | all | 63.0 ± 2.8 [61.0, 65.0] |" in report
    assert "TextVQA: fast minus reference +1.000, the reference's standard deviation" in report
    assert "is 2.828: 0.35 of it" in report


def test_processes_are_compared_with_one() -> None:
    alone = {"processes": 1, "samples_per_second": 40.0, "allocated_gib": 30.0, "losses": [2.0, 4]}
    both = {"processes": 2, "samples_per_second": 76.0, "allocated_gib": 31.0, "losses": [2.0, 4.1]}
    record = compare("lora", both, alone)
    assert record["scaling"] == pytest.approx(1.9)
    assert record["largest_loss_difference"] == pytest.approx(0.025)
    assert "| lora | 2 | 76.0 | 40.0 | 1.90 | 2.5e-02 | 31.0, 30.0 |" in scaling_table([record])


@pytest.mark.parametrize("case", ["stage 1", "lora"])
def test_trainings_of_made_up_records_are_real_ones(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SAMPLES, "pretrain", 8)
    monkeypatch.setitem(SAMPLES, "lora", 8)
    [record] = run([case], "mgm-mini", ALONE)
    losses = record["together"]["losses"]
    assert losses == record["alone"]["losses"]
    assert len(losses) == 6 and all(6.0 < loss < 7.5 for loss in losses)  # log(750) at first
    assert all(norm > 0 for norm in record["together"]["gradient_norms"])
