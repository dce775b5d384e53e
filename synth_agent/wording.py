"""How facts are said: the same words in the app and on the command line. Imports nothing."""

from __future__ import annotations

SEED_CAVEAT = (
    "Intervals cover the choice of questions, not the training seed: repeat the plan with another "
    "seed before trusting a small difference."
)
BENCHMARK_NAMES = {"textvqa": "TextVQA", "mmbench": "MMBench"}


def benchmark_name(benchmark: str) -> str:
    """Return a benchmark's name as it is written in papers."""
    return BENCHMARK_NAMES.get(benchmark, benchmark)


def basis_words(difference: float, expected: float | None, basis: str, power: str = "") -> str:
    """Return what to expect of a difference and what its interval rests on.

    A comparison without a basis has an interval over questions only.
    """
    if not basis or expected is None:
        return SEED_CAVEAT
    told = f" {power[:1].upper()}{power[1:]}." if power else ""
    return f"Claimed {difference:+.1f}, expect {expected:+.1f}: {basis}.{told}"


def duration(seconds: float | None) -> str:
    """Return a time span as people say it: `48 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
