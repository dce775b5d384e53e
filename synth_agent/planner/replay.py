"""An endpoint that repeats a recorded session: no key, no network, byte for byte.

How to run it: point it at a transcript.jsonl. The same questions in the same order get the recorded
replies and failures; the first one that differs stops with the place where it does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from synth_agent import runs
from synth_agent.errors import InvalidInput
from synth_agent.planner.exchange import Reply, Request, ignore_text, never_cancelled
from synth_agent.planner.transcript import differences, read_transcript, request_content


class ReplayEndpoint:
    """Answers from a transcript, in its order.

    Args:
        transcript_path: File that `Transcript` has written.
        secrets: Known secrets that the questions may hold; the recording has them removed.

    Raises:
        InvalidInput: the file is not there or not a transcript.
    """

    def __init__(self, transcript_path: Path, secrets: tuple[str, ...] = ()) -> None:
        self._path = transcript_path
        self._exchanges = read_transcript(transcript_path)
        self._secrets = secrets
        self._lock = threading.Lock()
        self._next = 0

    @property
    def remaining(self) -> int:
        """Exchanges that were not asked for yet."""
        return len(self._exchanges) - self._next

    def ask(
        self,
        request: Request,
        on_text: Callable[[str], None] = ignore_text,
        is_cancelled: Callable[[], bool] = never_cancelled,
    ) -> Reply:
        """Return the recorded reply, its text in one piece, or raise the recorded failure.

        Raises:
            InvalidInput: the recording is at its end, or has another question here.
            SynthAgentError: as recorded.
        """
        with self._lock:
            if self.remaining == 0:
                raise InvalidInput(
                    "The recording is at its end",
                    f"{self._path} has {len(self._exchanges)} exchanges",
                    "replay the session that was recorded, or use a live endpoint",
                )
            exchange = self._exchanges[self._next]
            asked = request_content(request, self._secrets)
            if runs.digest(asked) != exchange.digest:
                first = next(differences(exchange.request, asked), "their digests differ")
                raise InvalidInput(
                    "The recording has another question here",
                    f"{self._path} exchange {self._next + 1}, {first}",
                    "replay with the workspace and the words of the recorded session",
                )
            reply = exchange.reply
            if is_cancelled() and (reply is None or reply.finish != "cancelled"):
                return Reply("", (), "cancelled", "", 0, 0, "")
            self._next += 1
        if reply is None:
            raise exchange.raised() or InvalidInput(
                "Not a transcript",
                f"{self._path} exchange {self._next} has neither reply nor error",
                "give a transcript.jsonl that this program has written",
            )
        if reply.text:
            on_text(reply.text)
        return reply
