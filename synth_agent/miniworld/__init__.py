"""The mini world: everything an experiment needs, small enough for two CPU cores.

Pictures of shapes and signs, captions with a known share of realistic mess, instructions, and both
benchmarks in their real formats, all from one seed; and pretrained parts in `assets/`, built by
`python -m synth_agent.miniworld.build`. See `docs/miniworld.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

SEED_SAMPLES = 1600
INSTRUCTION_PICTURES = 1000
TEXTVQA_QUESTIONS = 400
MMBENCH_QUESTIONS = 204


def write_world(
    root: Path,
    *,
    seed: int,
    num_seed_samples: int = SEED_SAMPLES,
    num_instructions: int = INSTRUCTION_PICTURES,
    num_textvqa: int = TEXTVQA_QUESTIONS,
    num_mmbench: int = MMBENCH_QUESTIONS,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write all data of the mini world.

    Args:
        root: Folder to fill; it must be missing or empty.
        seed: The same seed writes the same bytes.
        progress: Called with a line before each part.

    Raises:
        SynthAgentError: If the font is missing.
    """
    from synth_agent.miniworld import datasets

    report = progress or (lambda line: None)
    root.mkdir(parents=True, exist_ok=True)
    report(f"drawing {num_seed_samples} seed samples")
    truth = root / "truth.jsonl"
    datasets.write_seed(root / "seed", truth, num_seed_samples, seed * 1000 + 1)
    report(f"drawing {num_instructions} pictures with instructions")
    datasets.write_instructions(root / "instruct", num_instructions, seed * 1000 + 2)
    report(f"drawing {num_textvqa} TextVQA and {num_mmbench} MMBench questions")
    datasets.write_textvqa(root / "textvqa", num_textvqa, seed * 1000 + 3)
    datasets.write_mmbench(root / "mmbench" / "mmbench_mini.tsv", num_mmbench, seed * 1000 + 4)
