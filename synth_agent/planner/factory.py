"""The planner that a workspace's settings ask for, connected to its endpoint and its transcript.

A session is a day: its transcript is `artifacts/planner/<date>.jsonl`, and the caps count all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from synth_agent.errors import InvalidInput
from synth_agent.runs import today
from synth_agent.workspace import Workspace, endpoint_access

if TYPE_CHECKING:
    from synth_agent.planner.conversation import Conversation
    from synth_agent.planner.exchange import Endpoint, EndpointSettings

_HOSTED = "api.openai.com"


def make_conversation(
    workspace: Workspace, kind: str | None = None, transcript: Path | None = None
) -> Conversation | None:
    """Return a conversation with the workspace's model, None when no model is asked for.

    Args:
        workspace: Its `planner` settings say which model.
        kind: `builtin`, `llm` or `replay` in place of the setting.
        transcript: What `replay` repeats, in place of the setting.

    Raises:
        InvalidInput: A setting or the key is missing, or the transcript cannot be read.
    """
    settings = workspace.settings.planner
    kind = kind or settings.kind
    if kind == "builtin":
        return None
    # The openai library and the tools take a second to load, which other planners do not need.
    from synth_agent.planner.conversation import Conversation

    endpoint = _replayed(workspace, transcript) if kind == "replay" else _live(workspace)
    return Conversation(
        workspace,
        endpoint,
        context_tokens=settings.context_tokens,
        total_seconds=3 * settings.timeout_seconds,
    )


def describe(workspace: Workspace, kind: str | None = None, transcript: Path | None = None) -> str:
    """Return which planner proposes, and what its model has used today, in one line.

    Args:
        workspace: Its `planner` settings say which model.
        kind: As given to `make_conversation`.
        transcript: As given to `make_conversation`.
    """
    settings = workspace.settings.planner
    kind = kind or settings.kind
    if kind == "builtin":
        return "built-in planner"
    if kind == "replay":
        return f"replay of {transcript or settings.transcript}"
    path = session_transcript(workspace)
    used = f"{settings.model or 'no model'}"
    if not path.is_file():
        return f"{used}, not asked today"
    from synth_agent.planner.transcript import spent

    usages = spent(path)
    tokens = sum(usage.prompt_tokens + usage.completion_tokens for usage in usages)
    money = [usage.money for usage in usages if usage.money is not None]
    cost = f", {sum(money):.4f} spent" if money else ""
    return f"{used}, {tokens:,} of {settings.token_cap:,} tokens today{cost}"


def session_transcript(workspace: Workspace) -> Path:
    """Return where today's exchanges are kept."""
    return workspace.transcript(today())


def endpoint_settings(workspace: Workspace) -> EndpointSettings:
    """Return how the model is asked, as `synth.yaml` says it."""
    from synth_agent.planner.exchange import EndpointSettings

    planner = workspace.settings.planner
    return EndpointSettings(**planner.model_dump(exclude={"kind", "transcript", "context_tokens"}))


def _live(workspace: Workspace) -> Endpoint:
    from synth_agent.planner.endpoint import Budget, OpenAIEndpoint, Transcript
    from synth_agent.planner.transcript import spent

    settings = endpoint_settings(workspace)
    address, key = endpoint_access()
    if not settings.model:
        raise InvalidInput(
            "No model",
            f"{workspace.settings_file}: planner.model is empty",
            "name the model as its server knows it",
        )
    if key is None and _HOSTED in address:
        raise InvalidInput(
            "No key",
            "OPENAI_API_KEY is not set",
            "set it, or set OPENAI_BASE_URL to a server that needs none",
        )
    path = session_transcript(workspace)
    transcript = Transcript(path)
    return OpenAIEndpoint(
        settings, key or "none", address, transcript, Budget(settings, spent(path))
    )


def _replayed(workspace: Workspace, transcript: Path | None) -> Endpoint:
    from synth_agent.planner.replay import ReplayEndpoint

    named = workspace.settings.planner.transcript
    if transcript is None and not named:
        raise InvalidInput(
            "Nothing to replay",
            f"{workspace.settings_file}: planner.transcript is empty",
            "name a transcript, one of artifacts/planner/*.jsonl for example",
        )
    return ReplayEndpoint(transcript or workspace.path(named))
