"""Which runs are the two arms of a comparison, which others were tried, and what follows.

Reads runs and their predictions; the decision itself is `referee.judge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from synth_agent.errors import InvalidInput, SynthAgentError
from synth_agent.noise import (
    SeedNoise,
    answered_the_same,
    replicate_key,
    replicates,
    workspace_noise,
)
from synth_agent.pipeline import list_runs, question_scores, read_events
from synth_agent.referee import Judgement, Measured, judge, measure, power_words
from synth_agent.runs import Comparison, Run
from synth_agent.workspace import Workspace

Scores = dict[str, float]
SMALLEST_ASKED = 1.0
"""Percentage points: nobody asks how many seeds a smaller difference takes."""


def compare_runs(workspace: Workspace, earlier: str, later: str) -> list[Comparison]:
    """Judge a run against another on the benchmarks that both have.

    Replicates of either count as further seeds of its arm. Runs that were compared with the same
    parent before this one are tries, whose number widens the interval.

    Raises:
        InvalidInput: If the two answered different questions, or their predictions are missing.
    """
    before, after = read_events(workspace, earlier), read_events(workspace, later)
    history = [run for run in list_runs(workspace, _skip) if run.id not in (earlier, later)]
    history += [before, after]
    names = sorted(before.scores.keys() & after.scores.keys())
    return [_Benchmark(workspace, name, before, after, history).comparison() for name in names]


def _skip(error: SynthAgentError) -> None:
    """Leave out a damaged run: it does not stop the verdict on another."""


def _before(noise: SeedNoise, judgement: Judgement) -> SeedNoise:
    """Return the spread without the degrees of freedom that the two arms' own seeds brought.

    What is planned with so many seeds counts theirs: with both, those of these runs count twice.
    """
    brought = 2 * (min(judgement.seeds, judgement.parent_seeds) - 1)
    is_pooled = judgement.seed_sd == noise.sd
    degrees = max(0.0, noise.degrees - brought) if is_pooled else 0.0
    return replace(noise, sd=judgement.seed_sd, degrees=degrees)


@dataclass(frozen=True)
class _Benchmark:
    """Two runs on one benchmark, among the others of the workspace."""

    workspace: Workspace
    name: str
    before: Run
    after: Run
    history: Sequence[Run]

    def comparison(self) -> Comparison:
        """Return the verdict on `after`."""
        parent, child = self._arm(self.before, self.after), self._arm(self.after, self.before)
        noise, tried = self._noise(), self._tried()
        judgement = judge(
            child,
            parent,
            noise,
            tries=1 + len(tried),
            rivals=self._rivals(tried, parent, noise),
        )
        return Comparison(
            benchmark=self.name,
            parent=self.before.id,
            difference=judgement.points,
            low=judgement.low,
            high=judgement.high,
            num_questions=judgement.num_questions,
            verdict=judgement.outcome,
            expected=judgement.shrunk,
            tries=judgement.tries,
            seeds=judgement.seeds,
            parent_seeds=judgement.parent_seeds,
            question_sd=judgement.question_sd,
            seed_sd=judgement.seed_sd,
            assumed=judgement.assumed,
            basis=judgement.basis,
            power=power_words(
                min(judgement.seeds, judgement.parent_seeds),
                max(abs(judgement.points), SMALLEST_ASKED),
                _before(noise, judgement),
                judgement.question_sd,
                tries=judgement.tries,
            ),
        )

    def _scored(self) -> list[Run]:
        """Return the runs that answered the same questions, as far as their scores tell."""
        return answered_the_same(self.history, self.name, self.after)

    def _arm(self, run: Run, other: Run) -> list[Scores]:
        """Return the scores of a run and of its replicates, without those of the other arm."""
        own, key = question_scores(self._predictions(run)), replicate_key(run)
        if key == replicate_key(other):
            return [own]
        seeds = {run.plan.proposal.settings.get("seed")}
        arm = [own]
        for twin in replicates(self._scored(), self.name).get(key or "", []):
            seed = twin.plan.proposal.settings.get("seed")
            scores = None if seed in seeds else self._readable(twin)
            if scores is not None and scores.keys() == own.keys():
                arm.append(scores)
                seeds.add(seed)
        return arm

    def _predictions(self, run: Run) -> Path:
        return self.workspace.path(run.scores[self.name].predictions)

    def _readable(self, run: Run) -> Scores | None:
        """Return a run's scores; None when its predictions were deleted."""
        try:
            return question_scores(self._predictions(run))
        except InvalidInput:
            return None

    def _noise(self) -> SeedNoise:
        return workspace_noise(self._scored(), self.name, self.before)

    def _tried(self) -> list[Run]:
        """Return the runs of other data that were compared with the same parent before."""
        base, by_id = replicate_key(self.before), {run.id: run for run in self.history}
        tried = []
        for run in self._scored():
            parent = by_id.get(run.plan.proposal.parent or "")
            is_rival = parent is not None and replicate_key(parent) == base
            is_earlier = (run.finished or "~") < (self.after.finished or "~")
            if run.id != self.after.id and is_rival and is_earlier and replicate_key(run) != base:
                tried.append(run)
        return tried

    def _rivals(
        self, tried: Sequence[Run], parent: Sequence[Scores], noise: SeedNoise
    ) -> list[Measured]:
        """Return the other candidates' differences, one a plan, over all its seeds."""
        mine = replicate_key(self.after)
        plans: dict[str, list[Scores]] = {}
        for key, twins in replicates(tried, self.name).items():
            readable = (self._readable(run) for run in twins if key != mine)
            scores = [one for one in readable if one is not None and one.keys() == parent[0].keys()]
            if scores:
                plans[key] = scores
        return [measure(seeds, parent, noise) for seeds in plans.values()]
