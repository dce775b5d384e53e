"""Data strategies compared on data quality alone: what is left, how varied, how fitting, how dear.

Figures of a recipe come from its processed data set where one was made, else from the statistics table
where its filters' outcome is known. What neither tells is None, with the reason; nothing is guessed
but the time, which says so.

Lexical diversity is distinct-n: distinct n-grams over all n-grams. It falls with the size of a text,
so that it is taken over draws of one fixed size, and its mean is given.
Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models".
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from synth_agent import analysis
from synth_agent.data import DJ_IMAGE_MARKER, END_OF_CHUNK, Sample, read_samples
from synth_agent.data_keys import known_data_key
from synth_agent.digests import Digests
from synth_agent.effective import capped
from synth_agent.errors import SynthAgentError
from synth_agent.plan_retention import PlanRetention, plan_retention
from synth_agent.processed_sets import find_processed, processed_results
from synth_agent.recipes import Recipe, list_recipes
from synth_agent.statistics import PICTURE_HASHES, ColumnSpec, StatisticsTable, column_spec
from synth_agent.workspace import Workspace

JUDGE = "image_text_similarity_filter"
"""The filter whose scores are compared."""
NGRAMS = 2_000
"""N-grams that distinct-n is taken over; a set with fewer has none."""
DRAWS = 10
_DRAW_SEED = 1024
_QUARTILES = (25, 50, 75)
_WORD = re.compile(r"\w+(?:'\w+)*")
_MARKERS = re.compile("|".join(map(re.escape, (DJ_IMAGE_MARKER, "<image>", END_OF_CHUNK))))

Caption = tuple[str, tuple[str, ...]]
"""A text and the paths of the pictures that it belongs to."""


@dataclass(frozen=True)
class Strategy:
    """A recipe's data, in figures. None means not known."""

    name: str
    title: str
    seed_samples: int
    kept: int | None = None
    """Samples that training would see, after the cap."""
    source: str = ""
    """Where the figures come from: `processed`, `statistics`, or nothing."""
    distinct_1: float | None = None
    distinct_2: float | None = None
    mean_words: float | None = None
    """Words of a caption, markers left out."""
    similarity: tuple[float, float, float] | None = None
    """Quartiles of the similarity of picture and caption."""
    repeated_texts: float | None = None
    """Share of samples whose text an earlier one has."""
    repeated_pictures: float | None = None
    """Share of samples whose pictures an earlier one has."""
    seconds: float | None = None
    """Of the operators, loading Data-Juicer left out."""
    seconds_source: str = ""
    """`measured` or `estimated`, from the rates of processed sets of this workspace."""
    notes: tuple[str, ...] = field(default_factory=tuple)
    """Why figures are missing."""


class Comparison:
    """Recipes of one workspace under comparison. Statistics and rates are read once."""

    def __init__(self, workspace: Workspace, digests: Digests) -> None:
        """Open the statistics.

        Raises:
            InvalidInput: the seed set or a recipe cannot be read.
        """
        self._workspace = workspace
        self._digests = digests
        self._table = analysis.open_table(workspace, digests)
        self._seed = read_samples(workspace.path(workspace.settings.data.seed))
        self._rates = operator_rates(processed_results(workspace))
        self.judge = similarity_judge(workspace)
        """Parameters of the similarity filter that the workspace's recipes use first."""
        self._scores = self._seed_scores()
        self._contents = self._picture_contents()
        self._lengths: dict[str, int] = {}

    def strategy(self, recipe: Recipe, processed: Path | None = None) -> Strategy:
        """Return a recipe's figures as far as they are known without running it.

        Args:
            recipe: A recipe, linear or a data plan.
            processed: The folder of its processed data set; None looks for one.
        """
        base = Strategy(recipe.name, recipe.title, len(self._seed))
        try:
            folder = processed or find_processed(self._workspace, recipe, self._digests)
        except SynthAgentError as error:
            return replace(base, notes=(f"{error.title}: {error.message}",))
        if folder is not None:
            return self._processed(base, folder)
        retention = self._retention(recipe)
        seconds, source = self._estimate(retention)
        base = replace(base, seconds=seconds, seconds_source=source)
        if retention is None:
            return replace(base, notes=("the seed set was not analysed; analyse it, or use --run",))
        if retention.rows is None:
            return replace(base, notes=(f"run to know: {retention.why}",))
        data = self._workspace.settings.data
        rows = capped(retention.rows.tolist(), data.sample_cap, data.sample_cap_seed)
        made = [caption_of(self._seed[row]) for row in rows]
        return self._described(replace(base, source="statistics"), made, self._scores)

    def unscored(self, folder: Path) -> list[Sample]:
        """Return the distinct samples that a processed data set added, if one of them has no score."""
        if self.judge is None:
            return []
        seed = self._scores or {}
        found: dict[Caption, Sample] = {}
        for sample in read_samples(folder / "processed.jsonl"):
            if sample.images and (caption := caption_of(sample)) not in seed:
                found.setdefault(caption, sample)
        return [] if found.keys() <= self._made_scores(folder).keys() else list(found.values())

    def scored_file(self, folder: Path) -> Path:
        """Return the file, which need not exist, of a processed set's own distinct samples."""
        return self._workspace.artifacts / "strategies" / "scored" / f"{folder.name}.jsonl"

    def _processed(self, base: Strategy, folder: Path) -> Strategy:
        made = [caption_of(sample) for sample in read_samples(folder / "processed.jsonl")]
        result = json.loads((folder / "result.json").read_text("utf-8"))
        seconds = sum(count["seconds"] for count in result["operators"])
        scores = {**(self._scores or {}), **self._made_scores(folder)}
        base = replace(base, source="processed", seconds=seconds, seconds_source="measured")
        return self._described(base, made, scores if self.judge is not None else None)

    def _described(
        self, base: Strategy, made: Sequence[Caption], scores: Mapping[Caption, float] | None
    ) -> Strategy:
        """Return the figures of samples that are there."""
        texts = [text for text, _ in made]
        lengths = [self._length(text) for text in texts]
        similarity, why = _quartiles(made, scores)
        return replace(
            base,
            kept=len(made),
            distinct_1=distinct(texts, 1),
            distinct_2=distinct(texts, 2),
            mean_words=sum(lengths) / len(lengths) if lengths else None,
            similarity=similarity,
            repeated_texts=_repeated(texts),
            repeated_pictures=_repeated(
                [self._content(pictures) for _, pictures in made if pictures]
            ),
            notes=(*base.notes, why) if why else base.notes,
        )

    def _retention(self, recipe: Recipe) -> PlanRetention | None:
        if self._table is None:
            return None
        return plan_retention(recipe, self._table, self._model_digest)

    def _estimate(self, retention: PlanRetention | None) -> tuple[float | None, str]:
        """Return the seconds of the operators by their measured rates."""
        total = 0.0
        for branch in retention.branches if retention is not None else ():
            for operator in branch.retention.operators:
                rate = self._rates.get(operator.name)
                if rate is None or operator.before is None:
                    return None, ""
                total += rate * operator.before
        return (total, "estimated") if retention is not None else (None, "")

    def _seed_scores(self) -> dict[Caption, float] | None:
        """Return the similarity of each seed sample, None when it was not measured."""
        column = self._column()
        if column is None or self._table is None or not self._table.has(column):
            return None
        return _scores(self._table, column)

    def _made_scores(self, folder: Path) -> dict[Caption, float]:
        """Return the similarity of what a processed set added to the seed, as far as measured."""
        path, column = self.scored_file(folder), self._column()
        root = analysis.statistics_root(self._workspace)
        if column is None or not path.is_file():
            return {}
        key = known_data_key(root, self._digests.path(path))
        if key is None:
            return {}
        table = StatisticsTable.open(root, key)
        return _scores(table, column) if table.has(column) else {}

    def _column(self) -> ColumnSpec | None:
        if self.judge is None:
            return None
        try:
            return column_spec(JUDGE, self.judge, self._model_digest)
        except SynthAgentError:  # its model is not there
            return None

    def _picture_contents(self) -> dict[str, str]:
        """Return the content digest of the seed's pictures, where the statistics have them."""
        column = column_spec(PICTURE_HASHES, {}, self._model_digest)
        if self._table is None or column is None or not self._table.has(column):
            return {}
        values = self._table.values(column, "image_digest")
        contents: dict[str, str] = {}
        for row in np.flatnonzero(values.known):
            digests = str(values.at(int(row))).split()
            images = self._seed[int(row)].images
            if len(digests) == len(images):
                contents.update(zip(images, digests, strict=True))
        return contents

    def _length(self, text: str) -> int:
        # Recipes share most of their texts.
        if text not in self._lengths:
            self._lengths[text] = len(words_of(text))
        return self._lengths[text]

    def _content(self, pictures: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self._contents.get(path, path) for path in pictures)

    def _model_digest(self, path: str) -> str:
        return self._digests.path(self._workspace.path(path))


def similarity_judge(workspace: Workspace) -> Mapping[str, Any] | None:
    """Return the parameters of the recipes' first similarity filter, None when none has one.

    Raises:
        InvalidInput: a recipe cannot be read.
    """
    for recipe in list_recipes(workspace):
        for operator in recipe.all_operators():
            if operator.name == JUDGE:
                return operator.parameters
    return None


def operator_rates(results: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return seconds a sample of each operator, over all processed sets given.

    Args:
        results: What `result.json` says of each.
    """
    seconds: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    for result in results:
        for count in result.get("operators", ()):
            seconds[count["name"]] += count["seconds"]
            samples[count["name"]] += count["before"]
    return {name: seconds[name] / samples[name] for name in samples if samples[name]}


def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a text in lower case, markers and punctuation left out."""
    return tuple(_WORD.findall(_MARKERS.sub(" ", text).lower()))


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Return the share of distinct n-grams among `NGRAMS` of them, the mean of several draws.

    Texts are drawn without replacement until there are enough; n-grams do not cross from one text to
    another. The draws are the same every time.

    Args:
        texts: Captions, markers included.
        n: Words of an n-gram.

    Returns:
        None when all texts together have fewer than `NGRAMS`.
    """
    generator = random.Random(_DRAW_SEED)
    shares = []
    for _ in range(DRAWS):
        drawn: list[tuple[str, ...]] = []
        for position in _drawn_positions(len(texts), generator):
            words = words_of(texts[position])
            drawn += zip(*(words[start:] for start in range(n)), strict=False)
            if len(drawn) >= NGRAMS:
                break
        if len(drawn) < NGRAMS:
            return None
        shares.append(len(set(drawn[:NGRAMS])) / NGRAMS)
    return sum(shares) / DRAWS


def _drawn_positions(count: int, generator: random.Random) -> Iterator[int]:
    """Yield all positions once in random order, without laying out the whole order at first."""
    seen: set[int] = set()
    while len(seen) < count // 2:
        position = generator.randrange(count)
        if position not in seen:
            seen.add(position)
            yield position
    rest = [position for position in range(count) if position not in seen]
    generator.shuffle(rest)
    yield from rest


def caption_of(sample: Sample) -> Caption:
    """Return what a sample teaches: its text and its pictures."""
    return sample.text, sample.images


def _scores(table: StatisticsTable, column: ColumnSpec) -> dict[Caption, float]:
    """Return the score of each sample of a table that has one."""
    per_row = table.values(column).per_row()
    known = np.flatnonzero(~np.isnan(per_row))
    rows = table.rows(known)
    return {
        (row.text, row.images): float(per_row[position])
        for position, row in zip(known, rows, strict=True)
    }


def _quartiles(
    made: Sequence[Caption], scores: Mapping[Caption, float] | None
) -> tuple[tuple[float, float, float] | None, str]:
    """Return the quartiles of the samples with pictures, or why there are none."""
    if scores is None:
        return None, "no similarity: no recipe names the model, or the seed was not analysed"
    judged = [caption for caption in made if caption[1]]
    found = [scores[caption] for caption in judged if caption in scores]
    if not found or len(found) < len(judged):
        missing = len(judged) - len(found)
        return None, f"no similarity: {missing:,} samples were not scored; --run scores them"
    low, middle, high = np.percentile(found, _QUARTILES)
    return (float(low), float(middle), float(high)), ""


def _repeated(values: Sequence[Hashable]) -> float | None:
    """Return the share of values that occurred before; None when there is no value."""
    return 1 - len(set(values)) / len(values) if values else None
