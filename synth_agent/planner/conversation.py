"""A conversation with a language model about the next experiment, which the user steers.

The model reads through `tools` and answers with text or with a proposal, which `proposing` checks. An
invalid proposal goes back with the validator's words, at most twice; then, and whenever the endpoint
fails, the built-in planner proposes and the note says why. Nothing here writes, runs or approves.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from synth_agent import pipeline
from synth_agent.errors import InvalidInput, SynthAgentError
from synth_agent.planner.builtin import BuiltinPlanner, predict
from synth_agent.planner.context import (
    DEFAULT_BUDGET,
    Section,
    build_context,
    render,
    statistics_lines,
)
from synth_agent.planner.exchange import (
    ContextTooLong,
    Endpoint,
    EndpointError,
    Message,
    Reply,
    Request,
    ToolCall,
    ignore_text,
    never_cancelled,
)
from synth_agent.planner.fencing import cut, untrusted, visible
from synth_agent.planner.proposing import read_reply
from synth_agent.planner.reply import schema
from synth_agent.planner.templates import fill
from synth_agent.planner.tools import TOOLS, run_tool
from synth_agent.planner.training_changes import settings_words
from synth_agent.planner.tried import Known
from synth_agent.recipes import Recipe, list_recipes, recipe_from_mapping
from synth_agent.runs import Prediction, Proposal, Rejection, Run
from synth_agent.secrets import redact
from synth_agent.wording import BENCHMARK_NAMES
from synth_agent.workspace import Workspace, known_secrets

MOST_REPAIRS = 2
MOST_TOOL_ROUNDS = 8
MOST_CALLS_A_ROUND = 6
MOST_TOOL_BYTES = 48_000
MOST_WISHES = 10
TOTAL_SECONDS = 300.0
_MOST_TAIL = 8
_MOST_MESSAGE = 2_000
_MOST_ECHO = 6_000
_MOST_SHOWN = 50
_SCHEMA_NAME = "proposal"
_ONCE = re.compile(
    r"(?:(?:propose|show|give|try)\s*(?:me\s*)?)?"
    r"(?:another(?: one)?|again|next(?: one)?|something else|more|go on|"
    r"再来一个|换一个|下一个|另一个|继续)?[.!?。！？\s]*",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"(?:(?:forget|take back|drop the wish|no longer)\b|忘记|忘掉|取消|撤回|不再)[:：,\s]*(.*)",
    re.IGNORECASE | re.DOTALL,
)
_EVERYTHING = frozenset({"", "all", "everything", "all wishes", "全部", "所有", "一切"})
_LATEST = frozenset({"it", "that", "this", "the last", "这个", "那个"})

T = TypeVar("T")
History = tuple[Sequence[Run], Sequence[Rejection]]
Predict = Callable[
    [Workspace, Recipe, Mapping[str, Any], Sequence[Run], Run | None], Sequence[Prediction]
]


class Fallback(Protocol):
    """The planner that proposes when the model cannot."""

    def propose(
        self, workspace: Workspace, history: Sequence[Run], rejections: Sequence[Rejection]
    ) -> Proposal | None:
        """Return the next proposal, or None when there is nothing left to try."""
        ...


@dataclass(frozen=True)
class Proposed:
    """What `Conversation.propose` came to."""

    proposal: Proposal | None
    """None when it was stopped, or when there is nothing left to try."""
    by_llm: bool
    """Whether the language model made it; otherwise the built-in planner did."""
    note: str
    """What the user should know of how it came about; empty when there is nothing to say."""


class _Stopped(Exception):
    """The user does not want the answer any more."""


def load_history(workspace: Workspace) -> History:
    """Return the runs that can be read, oldest first, and the rejections."""
    runs = pipeline.list_runs(workspace, lambda _: None)
    return runs, pipeline.list_rejections(workspace, lambda _: None)


class Conversation:
    """One user's talk with one model about one workspace.

    Args:
        workspace: What is talked about.
        endpoint: Who answers.
        load: Returns runs and rejections; asked before every answer.
        predicting: Gives the built-in model's predictions for a recipe, shown beside the model's own.
        fallback: Proposes when the model cannot; the built-in planner unless given.
        context_tokens: Most tokens of the context, by the estimate of `fencing`.
        total_seconds: Most time of one answer, with all its calls and repairs.
        clock: Seconds that only go forward.
    """

    def __init__(
        self,
        workspace: Workspace,
        endpoint: Endpoint,
        load: Callable[[Workspace], History] = load_history,
        *,
        predicting: Predict = predict,
        fallback: Fallback | None = None,
        context_tokens: int = DEFAULT_BUDGET,
        total_seconds: float = TOTAL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workspace = workspace
        self._endpoint = endpoint
        self._load = load
        self._predict = predicting
        self._fallback = fallback or BuiltinPlanner()
        self._context_tokens = context_tokens
        self._total_seconds = total_seconds
        self._clock = clock
        self._tail: tuple[Message, ...] = ()
        self._shown: tuple[Proposal, ...] = ()
        self._wishes: tuple[str, ...] = ()

    @property
    def wishes(self) -> tuple[str, ...]:
        """What the user asked for and has not taken back, oldest first."""
        return self._wishes

    def take_back(self, wish: str | None = None) -> None:
        """Forget a wish, or all of them."""
        self._wishes = tuple(w for w in self._wishes if wish is not None and w != wish)

    def propose(
        self,
        instruction: str = "",
        on_text: Callable[[str], None] = ignore_text,
        is_cancelled: Callable[[], bool] = never_cancelled,
    ) -> Proposed:
        """Return the next proposal. What `instruction` wishes also holds for later proposals.

        Args:
            instruction: Such as `cheaper` or `only filters`; `another` is meant once, and
                `forget ...` takes a wish back.
            on_text: Called with each piece of the reply, safe to print.
            is_cancelled: Asked often; once true, the answer is given up and nothing is remembered.

        Raises:
            InvalidInput: A recipe or a prompt of the workspace cannot be read.
        """
        # People paste keys: nothing of them is to reach the endpoint, a wish or a later prompt.
        instruction = redact(instruction, known_secrets())
        runs, rejections = self._load(self._workspace)
        wishes = wishes_after(self._wishes, instruction)
        if not any(r.is_measured and r.plan.proposal.kind == "baseline" for r in runs):
            self._wishes = wishes
            return self._built_in(runs, rejections, "The baseline comes first; no model was asked.")
        talk = _Talk(self, on_text, is_cancelled)
        known = Known(runs, rejections, self._shown, list_recipes(self._workspace))
        try:
            proposal, repairs = self._with_less_if_needed(
                lambda budget, tail: self._proposal(talk, known, wishes, instruction, budget, tail)
            )
        except _Stopped:
            return Proposed(None, False, "Stopped before there was a proposal.")
        except (SynthAgentError, OSError) as error:
            self._wishes = wishes
            return self._built_in(runs, rejections, _why(error))
        self._wishes = wishes
        self._shown = (*self._shown, proposal)[-_MOST_SHOWN:]
        words = f"Proposed: {proposal.title}. {proposal.reason}"
        self._remember(instruction or "Propose the next experiment.", words)
        note = f"The model corrected it {repairs} time(s)." if repairs else ""
        return Proposed(proposal, True, note)

    def ask(
        self,
        text: str,
        on_text: Callable[[str], None] = ignore_text,
        is_cancelled: Callable[[], bool] = never_cancelled,
    ) -> str:
        """Return the answer to a question about the data, the runs or the latest proposal.

        Returns:
            Text that is safe to print; empty when it was cancelled.

        Raises:
            SynthAgentError: The endpoint failed, or there was no answer.
        """
        runs, rejections = self._load(self._workspace)
        talk = _Talk(self, on_text, is_cancelled)
        text = redact(text, known_secrets())
        question = cut(visible(text, lines=True), 4 * _MOST_MESSAGE)
        known = Known(runs, rejections, (), list_recipes(self._workspace))

        def answer(budget: int, tail: Sequence[Message]) -> Reply:
            sections = self._sections(known, self._wishes, budget)
            changing = render(s for s in sections if not s.is_stable)
            prompt = fill(self._workspace, "answer", {"changing": changing, "question": question})
            messages = [self._system(sections), *tail, Message("user", prompt)]
            return talk.reply(messages, runs, None)

        try:
            reply = self._with_less_if_needed(answer)
        except _Stopped:
            return ""
        if reply.finish == "refusal" or not reply.text.strip():
            why = visible(reply.refusal)[:300] or "the reply was empty"
            raise EndpointError("No answer", why, "ask in another way")
        said = visible(reply.text, lines=True).strip()
        self._remember(question, said)
        return said

    def _proposal(
        self,
        talk: _Talk,
        known: Known,
        wishes: Sequence[str],
        instruction: str,
        budget: int,
        tail: Sequence[Message],
    ) -> tuple[Proposal, int]:
        """Return a proposal of the model and how often it had to be corrected."""
        sections = self._sections(known, wishes, budget)
        values = {
            "changing": render(s for s in sections if not s.is_stable),
            "instruction": f"The user says: {cut(visible(instruction), 600)}"
            if instruction
            else "",
            "settings": settings_words(),
            "benchmarks": ", ".join(BENCHMARK_NAMES),
        }
        prompt = fill(self._workspace, "propose", values)
        messages = [self._system(sections), *tail, Message("user", prompt)]
        repairs = 0
        while True:
            reply = talk.reply(messages, known.runs, schema())
            try:
                proposal = self._read(reply, known)
            except InvalidInput as error:
                if repairs == MOST_REPAIRS:
                    raise InvalidInput(
                        f"No valid proposal after {MOST_REPAIRS} corrections",
                        f"{error.title}: {error.message}",
                        error.hint,
                    ) from error
                repairs += 1
                messages += self._correction(reply, error)
            else:
                return self._with_predictions(proposal, known.runs), repairs

    def _read(self, reply: Reply, known: Known) -> Proposal:
        if reply.finish == "refusal":
            why = visible(reply.refusal)[:300]
            raise EndpointError("The model refused", why, "ask in another way")
        if reply.finish == "length":
            raise InvalidInput(
                "The reply was cut off", "it was longer than the room for it", "write less"
            )
        given = [call.arguments for call in reply.tool_calls if call.name == _SCHEMA_NAME]
        by = f"{cut(visible(reply.model), 80) or 'language model'}"
        text = given[0] if given else reply.text
        return read_reply(self._workspace, text, known, proposed_by=by)

    def _with_predictions(self, proposal: Proposal, runs: Sequence[Run]) -> Proposal:
        mapping = {key: value for key, value in proposal.recipe.items() if key != "name"}
        recipe = recipe_from_mapping(str(proposal.recipe["name"]), mapping)
        parent = next((run for run in runs if run.id == proposal.parent), None)
        found = self._predict(self._workspace, recipe, proposal.settings, runs, parent)
        return replace(proposal, predictions=(*proposal.predictions, *found))

    def _correction(self, reply: Reply, error: InvalidInput) -> list[Message]:
        values = {
            "problem": untrusted(f"{error.title}: {error.message}", 800),
            "hint": cut(visible(error.hint), 600) or "correct it",
        }
        said = cut(visible(reply.text[:_MOST_ECHO], lines=True), _MOST_ECHO)
        return [
            Message("assistant", said or "(nothing)"),
            Message("user", fill(self._workspace, "repair", values)),
        ]

    def _sections(self, known: Known, wishes: Sequence[str], budget: int) -> tuple[Section, ...]:
        return build_context(
            self._workspace,
            known.runs,
            known.rejections,
            statistics_lines(self._workspace),
            wishes=wishes,
            last=self._shown[-1] if self._shown else None,
            recipes=known.recipes,
            budget=budget,
        )

    def _system(self, sections: Sequence[Section]) -> Message:
        stable = render(section for section in sections if section.is_stable)
        return Message("system", fill(self._workspace, "system", {"stable": stable}))

    def _with_less_if_needed(self, answer: Callable[[int, Sequence[Message]], T]) -> T:
        """Return an answer; a model that cannot take the whole context gets a third of it."""
        try:
            return answer(self._context_tokens, self._tail)
        except ContextTooLong:
            return answer(self._context_tokens // 3, ())

    def _built_in(
        self, runs: Sequence[Run], rejections: Sequence[Rejection], note: str
    ) -> Proposed:
        return Proposed(self._fallback.propose(self._workspace, runs, rejections), False, note)

    def _remember(self, said: str, answered: str) -> None:
        pair = (
            Message("user", cut(visible(said, lines=True), _MOST_MESSAGE)),
            Message("assistant", cut(visible(answered, lines=True), _MOST_MESSAGE)),
        )
        self._tail = (*self._tail, *pair)[-_MOST_TAIL:]


class _Talk:
    """The requests of one answer: its time, its tool calls, and whether it was given up."""

    def __init__(
        self,
        conversation: Conversation,
        on_text: Callable[[str], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self._workspace = conversation._workspace
        self._endpoint = conversation._endpoint
        self._clock = conversation._clock
        self._deadline = self._clock() + conversation._total_seconds
        self._seconds = conversation._total_seconds
        self._on_text = on_text
        self._is_cancelled = is_cancelled
        self._rounds = 0
        self._bytes = 0

    def reply(
        self, messages: list[Message], runs: Sequence[Run], asked: dict[str, Any] | None
    ) -> Reply:
        """Return the reply that ends a turn, after the tool calls that lead to it.

        Args:
            messages: The conversation; calls and their answers are added.
            runs: The loaded runs, for the tools.
            asked: JSON schema of the reply; None for text.

        Raises:
            SynthAgentError: The endpoint failed, time is up, or the model only calls tools.
        """
        while True:
            reply = self._ask(Request(tuple(messages), TOOLS, asked, _SCHEMA_NAME))
            calls = [call for call in reply.tool_calls if call.name != _SCHEMA_NAME]
            if not calls or len(calls) < len(reply.tool_calls):
                return reply
            self._rounds += 1
            if self._rounds > MOST_TOOL_ROUNDS + 1:
                raise EndpointError(
                    "No answer", f"after {MOST_TOOL_ROUNDS} rounds of tool calls", "ask for less"
                )
            said = cut(visible(reply.text[: 2 * _MOST_MESSAGE], lines=True), _MOST_MESSAGE)
            messages.append(Message("assistant", said, reply.tool_calls))
            messages += [
                Message("tool", self._answer(call, number, runs), (), call.id)
                for number, call in enumerate(calls, 1)
            ]

    def _answer(self, call: ToolCall, number: int, runs: Sequence[Run]) -> str:
        if self._is_cancelled():
            raise _Stopped
        is_spent = self._rounds > MOST_TOOL_ROUNDS or self._bytes > MOST_TOOL_BYTES
        if is_spent or number > MOST_CALLS_A_ROUND or self._clock() > self._deadline:
            return '{"error":"no more calls in this turn","fix":"answer with what you know"}'
        text = run_tool(self._workspace, call.name, call.arguments, runs)
        self._bytes += len(text.encode())
        return text

    def _ask(self, request: Request) -> Reply:
        if self._is_cancelled():
            raise _Stopped
        if self._clock() > self._deadline:
            raise self._late()
        reply = self._endpoint.ask(request, self._show, self._is_over)
        if reply.finish == "cancelled":
            raise _Stopped if self._is_cancelled() else self._late()
        return reply

    def _show(self, text: str) -> None:
        self._on_text(visible(text, lines=True))

    def _is_over(self) -> bool:
        return self._is_cancelled() or self._clock() > self._deadline

    def _late(self) -> EndpointError:
        return EndpointError(
            "It took too long", f"more than {self._seconds:g} s in all", "try again"
        )


class LlmPlanner:
    """A language model behind the interface of planners; the built-in one helps out."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        predicting: Predict = predict,
        total_seconds: float = TOTAL_SECONDS,
    ) -> None:
        self._endpoint = endpoint
        self._predict = predicting
        self._total_seconds = total_seconds
        self.last = Proposed(None, False, "")
        """What the latest call came to, with its note."""

    def propose(
        self, workspace: Workspace, history: Sequence[Run], rejections: Sequence[Rejection]
    ) -> Proposal | None:
        """Return the next proposal, or None when there is nothing left to try."""
        conversation = Conversation(
            workspace,
            self._endpoint,
            lambda _: (history, rejections),
            predicting=self._predict,
            total_seconds=self._total_seconds,
        )
        self.last = conversation.propose()
        return self.last.proposal


def wishes_after(wishes: Sequence[str], instruction: str) -> tuple[str, ...]:
    """Return the standing wishes after an instruction.

    `another` and its like are meant once; `forget ...` takes back the wishes that it names, the
    latest (`that`), or all; anything else is a wish.
    """
    said = cut(visible(instruction), 300)
    if _ONCE.fullmatch(said):
        return tuple(wishes)
    if taken := _TAKEN_BACK.fullmatch(said):
        what = taken[1].strip(" .!。！").casefold()
        if what in _EVERYTHING:
            return ()
        if what in _LATEST:
            return tuple(wishes[:-1])
        left = tuple(w for w in wishes if what not in w.casefold() and w.casefold() not in what)
        if len(left) < len(wishes):
            return left
    kept = [wish for wish in wishes if wish != said]
    return tuple([*kept, said][-MOST_WISHES:])


def _why(error: Exception) -> str:
    """Return why the built-in planner proposes, in words that are safe to print."""
    if isinstance(error, SynthAgentError):
        words = f"{error.title}: {error.message}"
    else:
        words = f"the connection failed: {error}"
    return f"The built-in planner proposes, because {cut(visible(words), 400)}."
