"""Facts that threads and screens report; the handlers that receive them own all state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from textual.message import Message

from synth_agent.runs import Comparison, Event, EventTail, Proposal, Run
from synth_agent.ui.backend import Notebook, OperatorExamples, RecipeChoice
from synth_agent.ui.questions import Question

if TYPE_CHECKING:
    from synth_agent.changes import OperatorChanges
    from synth_agent.effective import Effective
    from synth_agent.overview import Overview, Relations
    from synth_agent.recipes import DiffLine
    from synth_agent.rules import Standing
    from synth_agent.ui.talk import Answer, Request, Said, TalkState


@dataclass
class NotebookRead(Message):
    """The history was read."""

    notebook: Notebook


@dataclass
class NextProposed(Message):
    """It is known what comes next; no proposal means that nothing is left to try.

    With a language model nothing is proposed before somebody asks it.
    """

    proposal: Proposal | None
    model: str = ""
    """The model that would be asked, and what it has used; empty without one."""
    note: str = ""
    """Why the built-in planner proposes although a model is set; empty when none is."""


@dataclass
class PlannerAsked(Message):
    """The user wants the model to propose, on the screen that shows its answer as it arrives."""


@dataclass
class Failed(Message):
    """Something that a thread did ended in an error."""

    error: BaseException


@dataclass
class ReviewRequested(Message):
    """A proposal is to be shown at the gate."""

    proposal: Proposal
    is_asked_for: bool = True
    """Whether a person has just asked to see it; otherwise keys may still be meant for elsewhere."""


@dataclass
class ProposalReady(Message):
    """A proposal is complete, with its difference from its parent and its recipe's text."""

    proposal: Proposal
    difference: list[DiffLine]
    text: str
    problem: str
    """Why it cannot run; empty when it can."""
    expected: Effective | None = None
    """What training would see of its samples."""


@dataclass
class EditChecked(Message):
    """An edited recipe was checked: a new proposal, or why it is none."""

    text: str
    proposal: Proposal | None
    difference: list[DiffLine]
    problem: str
    expected: Effective | None = None


@dataclass
class AlternativesFound(Message):
    """The planner was asked for more; one proposal alone means that there is nothing else."""

    proposals: tuple[Proposal, ...]


@dataclass
class PlannerReady(Message):
    """It is known who proposes: what the screen says of it, and the state of the talk."""

    said: tuple[Said, ...]
    state: TalkState


@dataclass
class PlannerAnswered(Message):
    """A request to the planner ended, or was given up."""

    request: Request
    answer: Answer


@dataclass
class ToolsUsed(Message):
    """The model has looked something up."""

    request: Request
    names: tuple[str, ...]


@dataclass
class RulesRead(Message):
    """The standing rules were read, or why they cannot be."""

    rules: tuple[Standing, ...]
    problem: str


@dataclass
class RecipesListed(Message):
    """The workspace's recipes were read."""

    recipes: list[RecipeChoice]


@dataclass
class RunLaunched(Message):
    """A worker was started for a run."""

    run_id: str


@dataclass
class ProposalRejected(Message):
    """A rejection was recorded."""

    rejection_id: str


@dataclass
class RunRequested(Message):
    """The user wants to see a run's stages."""

    run_id: str


@dataclass
class ResultsRequested(Message):
    """The user wants to see a run's scores."""

    run_id: str


@dataclass
class RunOpened(Message):
    """A run was read from its beginning; `tail` continues after what `run` holds."""

    run: Run
    tail: EventTail
    is_live: bool


@dataclass
class EventsArrived(Message):
    """A run's log grew, or its worker came or went."""

    run_id: str
    events: list[Event]
    is_live: bool


@dataclass
class EarlyJudged(Message):
    """A run was judged by its loss so far; no words where nothing is measured to go by."""

    run_id: str
    words: tuple[str, ...]


@dataclass
class LogRead(Message):
    """The end of a stage's log was read."""

    run_id: str
    stage: str
    lines: list[str]


@dataclass
class CancelRequested(Message):
    """The worker was told to stop."""

    run_id: str


@dataclass
class QuestionsRead(Message):
    """A run's answered questions were read."""

    run_id: str
    questions: list[Question]
    changes: list[OperatorChanges]


@dataclass
class DataRead(Message):
    """The seed set's statistics were read; None before the first analysis."""

    overview: Overview | None


@dataclass
class RelationsRead(Message):
    """Correlations and a recipe's drift were computed; None before the first analysis."""

    relations: Relations | None


@dataclass
class AnalysisProgressed(Message):
    """The analysis says how far it is."""

    label: str
    step: int
    total: int


@dataclass
class AnalysisEnded(Message):
    """The analysis ended; `problems` says what could not be scored."""

    problems: list[str]


@dataclass
class SamplesDrawn(Message):
    """Samples that each operator of a recipe keeps and drops were drawn."""

    operators: list[OperatorExamples]


@dataclass
class RunsCompared(Message):
    """Two runs were compared."""

    comparisons: list[Comparison]
    difference: list[DiffLine]
    problem: str
