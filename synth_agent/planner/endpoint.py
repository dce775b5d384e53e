"""Questions to any server that speaks the OpenAI chat completions protocol.

Owns the life of one question: what the server can do, the budget, the attempts and the pauses between
them, what is shown while it arrives, and the record of it. The rest is in its neighbours:
`exchange` (values), `bodies` (requests), `stream` (replies), `connection` (one attempt), `faults`
(errors), `budget`, `transcript`, `replay`.

Rules:
- A server's abilities are found by asking: what it refuses by name is put in another way at once and
  remembered for this address and model as long as the process lives.
- An attempt that broke off is repeated after a growing, jittered pause or as long as the server asks,
  inside `timeout_seconds` altogether; not when a part of the answer was shown, which a second answer
  would contradict.
- No reply is used before it is in the transcript; failures and cancelled questions are in it too.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from synth_agent.errors import SynthAgentError
from synth_agent.planner import bodies, stream
from synth_agent.planner.bodies import Abilities
from synth_agent.planner.budget import Budget, Usage
from synth_agent.planner.connection import Address, Attempt, Patience, run_attempt
from synth_agent.planner.exchange import (
    BudgetSpent,
    ContextTooLong,
    Endpoint,
    EndpointError,
    EndpointSettings,
    Finish,
    Message,
    Reply,
    Request,
    ToolCall,
    ToolSpec,
    estimate_prompt_tokens,
    estimate_tokens,
    ignore_text,
    never_cancelled,
)
from synth_agent.planner.faults import Asked, Fault, silent
from synth_agent.planner.replay import ReplayEndpoint
from synth_agent.planner.transcript import Exchange, Transcript, error_content, request_content
from synth_agent.runs import digest
from synth_agent.secrets import StreamRedactor, redact, without_secrets

__all__ = [
    "Budget",
    "BudgetSpent",
    "ContextTooLong",
    "Endpoint",
    "EndpointError",
    "EndpointSettings",
    "Message",
    "OpenAIEndpoint",
    "ReplayEndpoint",
    "Reply",
    "Request",
    "ToolCall",
    "ToolSpec",
    "Transcript",
    "forget_abilities",
]

_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 20.0
_SLICE_SECONDS = 0.05
_MOST_THOUGHTS = 200
_TAG = "<tool_call>"

_known: dict[tuple[str, str, str], Abilities] = {}
_known_lock = threading.Lock()


def forget_abilities() -> None:
    """Forget what servers can do, so that each is asked anew."""
    with _known_lock:
        _known.clear()


@dataclass
class _Question:
    """One question on its way, through all its attempts."""

    request: Request
    on_text: Callable[[str], None]
    patience: Patience
    prompt_tokens: int
    prefix: str
    """Beginning of the ids of tool calls to which the server gives none."""
    started: float
    attempts: int = 0
    usage: Usage = Usage()
    last: Usage = Usage()
    """Of the last attempt alone."""
    was_shown: bool = False
    thinking: str = ""
    abilities: Abilities = field(default_factory=Abilities)


class OpenAIEndpoint:
    """A server that is asked over the network.

    Args:
        settings: The model and how it is asked.
        key: Secret key; None or empty for servers without keys.
        base_url: The server's address up to and with `/v1`. User and password in it are sent as Basic
            credentials in place of the key.
        transcript: Where every exchange is recorded.
        budget: Counts and caps what is used.
        clock: Seconds that only grow.
        sleep: Waits so many seconds.
        seed: Of the jitter of pauses.

    Raises:
        InvalidInput: the address or the key cannot be used.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        key: str | None,
        base_url: str,
        transcript: Transcript,
        budget: Budget,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        seed: int = 0,
    ) -> None:
        self._settings = settings
        self._address = Address.parse(base_url, key)
        self._secrets = self._address.secrets(base_url)
        shown = redact(without_secrets(base_url.strip()), self._secrets)
        self._asked = Asked(shown, settings.model, self._secrets)
        self._transcript = transcript
        self._budget = budget
        self._clock = clock
        self._sleep = sleep
        self._random = random.Random(seed)
        self._thoughts: dict[str, str] = {}
        self._density = 1.0

    def ask(
        self,
        request: Request,
        on_text: Callable[[str], None] = ignore_text,
        is_cancelled: Callable[[], bool] = never_cancelled,
    ) -> Reply:
        """Return the reply to a request; see `Endpoint.ask`.

        `on_text` gets no piece of a tool call, and none of a reply that turns out not to follow the
        schema before the server is asked for it in words.
        """
        question = self._question(request, on_text, is_cancelled)
        try:
            reply = self._answer(question)
        except SynthAgentError as error:
            self._record(question, None, error_content(error))
            raise
        except BaseException as error:
            stopped = {"kind": type(error).__name__, "title": "Stopped", "message": "", "hint": ""}
            self._record(question, None, stopped)
            raise
        self._record(question, reply, None)
        return reply

    def _question(
        self, request: Request, on_text: Callable[[str], None], is_cancelled: Callable[[], bool]
    ) -> _Question:
        started = self._clock()
        deadline = started + self._settings.timeout_seconds
        wait = self._settings.first_token_seconds
        return _Question(
            request=request,
            on_text=on_text,
            patience=Patience(self._clock, deadline, wait, is_cancelled),
            prompt_tokens=estimate_prompt_tokens(request),
            prefix=f"call_{digest(request_content(request, self._secrets))[:8]}_",
            started=started,
        )

    def _answer(self, question: _Question) -> Reply:
        """Attempt until there is a reply, a failure that stays, or no time left."""
        failures = 0
        while True:
            if question.patience.is_cancelled():
                return self._cancelled(question, "")
            question.abilities = self._abilities()
            outcome = self._attempt(question)
            if isinstance(outcome, Reply):
                return outcome
            if outcome is None:
                continue
            if outcome.kind == "refused":
                return self._reply(question, "", (), refusal=outcome.error.message)
            words = outcome.words
            less = bodies.lesser(question.abilities, question.request, words) if words else None
            if less is not None:
                self._remember(less)
                continue
            if outcome.kind != "again":
                raise outcome.error
            failures += 1
            self._pause(question, outcome, failures)

    def _attempt(self, question: _Question) -> Reply | Fault | None:
        """Ask once. None when the server took the format and ignored it: ask in another way."""
        builder = stream.ReplyBuilder(starts_thinking=question.abilities.starts_thinking)
        shown = _Shown(question, self._secrets)
        attempt = Attempt(builder, shown.feed)
        room = min(question.request.max_tokens, self._settings.max_tokens)
        body = bodies.body_of(
            question.request,
            question.abilities,
            model=self._settings.model,
            temperature=self._settings.temperature,
            max_tokens=room,
            thoughts=self._thoughts,
        )
        expected = math.ceil(question.prompt_tokens * self._density)
        reserved = self._budget.reserve(expected, room)
        question.attempts += 1
        try:
            fault = run_attempt(self._address, self._asked, body, attempt, question.patience)
        finally:
            rest = builder.close()
            question.last = self._usage(question, attempt)
            question.usage += question.last
            question.thinking += builder.thinking
            self._budget.settle(reserved, question.last)
        # Tables and other scripts have more tokens than the estimate: the worst seen is expected.
        counted = builder.prompt_tokens / max(1, question.prompt_tokens)
        self._density = max(self._density, counted)
        if fault is not None:
            return fault
        shown.feed(rest)
        if attempt.was_cancelled:
            return self._cancelled(question, redact(builder.text, self._secrets), builder.model)
        return self._finished(question, builder, shown)

    def _usage(self, question: _Question, attempt: Attempt) -> Usage:
        """Count an attempt: by the server's figures, else by the length of the texts."""
        builder = attempt.builder
        if not attempt.was_taken:
            return self._budget.price(0, 0)
        said = builder.text + builder.thinking + builder.refusal
        said += "".join(call.name + call.arguments for call in builder.calls(""))
        is_estimated = not builder.prompt_tokens or (bool(said) and not builder.completion_tokens)
        return self._budget.price(
            builder.prompt_tokens or question.prompt_tokens,
            builder.completion_tokens or estimate_tokens(said),
            is_estimated,
        )

    def _finished(
        self, question: _Question, builder: stream.ReplyBuilder, shown: _Shown
    ) -> Reply | Fault | None:
        """Make the reply of an attempt that was read to its end."""
        if builder.finish == "insufficient_system_resource":
            return silent(self._asked, "had no resources left in the middle of its answer")
        if builder.filter.is_orphan:
            self._remember(replace(self._abilities(), starts_thinking=True))
        text, calls = self._separated(question, builder, shown)
        finish = stream.finish_of(builder, calls, text)
        is_ended = finish == "stop" or not (builder.finish or builder.is_too_long)
        if is_ended and finish != "refusal" and not calls and not text.strip():
            return silent(self._asked, "gave an empty reply")
        is_held = question.request.schema is not None and question.abilities.form != "text"
        if is_held and finish == "stop" and not stream.has_object(text):
            self._remember(replace(self._abilities(), form="text"))
            if not question.was_shown:
                return None
        if not calls:
            shown.finish()
        if builder.must_return_thinking:
            self._keep_thoughts(calls, builder.reasoning)
        refusal = self._refusal(builder) if finish == "refusal" else ""
        reply = self._reply(question, text, calls, refusal, builder.model)
        return replace(reply, finish=finish)

    def _separated(
        self, question: _Question, builder: stream.ReplyBuilder, shown: _Shown
    ) -> tuple[str, tuple[ToolCall, ...]]:
        """Return text and tool calls, whichever way the server has sent them."""
        request = question.request
        text = redact(builder.text, self._secrets)
        calls = builder.calls(question.prefix)
        if request.tools and not calls:
            names = [tool.name for tool in request.tools]
            text, calls = stream.calls_in_text(text, names, question.prefix)
        calls = self._clean(calls)
        if request.schema is not None and question.abilities.form == "tools":
            given = [call.arguments for call in calls if call.name == request.schema_name]
            calls = tuple(call for call in calls if call.name != request.schema_name)
            if given:
                text = given[0]
                shown.replace(text)
        return text, calls

    def _refusal(self, builder: stream.ReplyBuilder) -> str:
        said = redact(builder.refusal, self._secrets).strip()
        return said or f"the provider stopped the answer ({builder.finish})"

    def _clean(self, calls: tuple[ToolCall, ...]) -> tuple[ToolCall, ...]:
        texts = [[redact(t, self._secrets) for t in (c.id, c.name, c.arguments)] for c in calls]
        return tuple(ToolCall(*three) for three in texts)

    def _reply(
        self,
        question: _Question,
        text: str,
        calls: tuple[ToolCall, ...],
        refusal: str = "",
        model: str = "",
    ) -> Reply:
        name = redact(model or self._settings.model, self._secrets)
        last = question.last
        finish: Finish = "refusal" if refusal else "stop"
        return Reply(text, calls, finish, refusal, last.prompt_tokens, last.completion_tokens, name)

    def _cancelled(self, question: _Question, text: str, model: str = "") -> Reply:
        return replace(self._reply(question, text, (), model=model), finish="cancelled")

    def _pause(self, question: _Question, fault: Fault, failures: int) -> None:
        """Wait before the next attempt, or raise when there is none."""
        error = fault.error
        if question.was_shown:
            message = f"{error.message}; a part of the answer was shown, so it is not asked again"
            raise type(error)(error.title, message, error.hint)
        if failures > self._settings.retries:
            message = f"{error.message} ({question.attempts} attempts)"
            raise type(error)(error.title, message, error.hint)
        growing = min(_PAUSE_SECONDS * 2 ** (failures - 1), _LONGEST_PAUSE_SECONDS)
        jittered = growing * (0.5 + self._random.random() / 2)
        wait = jittered if fault.wait is None else fault.wait
        if self._clock() + wait >= question.patience.deadline:
            asked = "" if fault.wait is None else f", which asks to wait {fault.wait:.0f} s"
            message = f"{error.message}{asked}; timeout_seconds leaves no time for another attempt"
            raise type(error)(error.title, message, error.hint)
        while wait > 0 and not question.patience.is_cancelled():
            self._sleep(min(wait, _SLICE_SECONDS))
            wait -= _SLICE_SECONDS

    def _abilities(self) -> Abilities:
        with _known_lock:
            found = _known.get(self._identity)
        return found or bodies.first_abilities(self._settings.structured)

    def _remember(self, abilities: Abilities) -> None:
        with _known_lock:
            _known[self._identity] = abilities

    @property
    def _identity(self) -> tuple[str, str, str]:
        return self._address.url, self._settings.model, self._settings.structured

    def _keep_thoughts(self, calls: tuple[ToolCall, ...], thought: str) -> None:
        for call in calls:
            self._thoughts[call.id] = redact(thought, self._secrets)
        while len(self._thoughts) > _MOST_THOUGHTS:
            del self._thoughts[next(iter(self._thoughts))]

    def _record(
        self, question: _Question, reply: Reply | None, error: dict[str, str] | None
    ) -> None:
        exchange = Exchange(
            request=request_content(question.request, self._secrets),
            reply=reply,
            error=error,
            usage=question.usage,
            seconds=self._clock() - question.started,
            attempts=question.attempts,
            options={
                "address": self._asked.address,
                "model": self._settings.model,
                "temperature": self._settings.temperature,
                "form": question.abilities.form,
                "tools": question.abilities.tools,
            },
            thinking=question.thinking,
        )
        self._transcript.append(exchange, self._secrets)


class _Shown:
    """Shows the answer as it arrives, but nothing that is no answer: secrets, calls, wrong forms."""

    def __init__(self, question: _Question, secrets: tuple[str, ...]) -> None:
        self._question = question
        self._redactor = StreamRedactor(secrets)
        self._text = ""
        self._position = 0

    def feed(self, piece: str) -> None:
        """Take a piece of the answer and show what can be shown."""
        if piece:
            self._text += self._redactor.feed(piece)
            self._show(self._end())

    def finish(self) -> None:
        """Show the rest."""
        self._text += self._redactor.close()
        self._show(len(self._text))

    def replace(self, text: str) -> None:
        """Show another text, which came in another way, unless something was shown already."""
        if not self._position:
            self._text = text

    def _show(self, end: int) -> None:
        if end <= self._position:
            return
        piece, self._position = self._text[self._position : end], end
        if self._question.on_text is not ignore_text:
            self._question.was_shown = True
        self._question.on_text(piece)

    def _end(self) -> int:
        """How far the text can be shown while more may come."""
        request, abilities = self._question.request, self._question.abilities
        head = self._text.lstrip()
        if not head:
            return 0
        begins_json = head.startswith(("{", "`"))
        if request.schema is not None and abilities.form != "text" and not begins_json:
            return 0
        if request.tools and not abilities.tools and begins_json:
            return 0
        if not request.tools:
            return len(self._text)
        at = self._text.find(_TAG)
        if at >= 0:
            return at
        sizes = range(min(len(_TAG), len(self._text)), 0, -1)
        held = next((size for size in sizes if self._text.endswith(_TAG[:size])), 0)
        return len(self._text) - held
