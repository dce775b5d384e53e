"""What a session of questions to a language model has cost, and the cap on it.

A call is made only when its worst case fits under the cap: the whole prompt and all the room for the
reply. Calls that fail count with what they are likely to have used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from synth_agent.errors import InvalidInput
from synth_agent.planner.exchange import BudgetSpent, EndpointSettings


@dataclass(frozen=True)
class Usage:
    """Tokens of one or more calls, and their money where prices are known."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: float | None = None
    estimated: bool = False
    """True when a server did not count and the tokens come from the length of the texts."""

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        known = [usage.money for usage in (self, other) if usage.money is not None]
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            sum(known) if known else None,
            self.estimated or other.estimated,
        )


class Budget:
    """Counts tokens and money of a session and refuses calls that could go over the cap.

    Safe to share between threads: what a running call may still use is set aside.

    Args:
        settings: Prices and caps.
        spent: What earlier calls of the same session have used; see `transcript.spent`.

    Raises:
        InvalidInput: a cap or price is negative, or money is capped without prices.
    """

    def __init__(self, settings: EndpointSettings, spent: Iterable[Usage] = ()) -> None:
        _check(settings)
        self._settings = settings
        self._lock = threading.Lock()
        self._spent = sum(spent, Usage())
        self._reserved = Usage()

    @property
    def spent(self) -> Usage:
        """Everything that was counted so far."""
        with self._lock:
            return self._spent

    def price(self, prompt_tokens: int, completion_tokens: int, estimated: bool = False) -> Usage:
        """Return tokens with their money; None where no price is set."""
        prices = (self._settings.price_per_million_input, self._settings.price_per_million_output)
        counts = (prompt_tokens, completion_tokens)
        money = None
        if any(price is not None for price in prices):
            money = sum((p or 0.0) * n for p, n in zip(prices, counts, strict=True)) / 1e6
        return Usage(prompt_tokens, completion_tokens, money, estimated)

    def reserve(self, prompt_tokens: int, max_tokens: int) -> Usage:
        """Set aside the worst case of a call and return it, to be given to `settle`.

        Raises:
            BudgetSpent: the call could go over a cap. Nothing was set aside.
        """
        worst = self.price(prompt_tokens, max_tokens)
        with self._lock:
            used = self._spent + self._reserved
            if used.tokens + worst.tokens > self._settings.token_cap:
                raise self._refusal("token_cap", f"{worst.tokens:,} tokens more", used)
            cap = self._settings.spend_cap
            if cap is not None and (used.money or 0.0) + (worst.money or 0.0) > cap:
                raise self._refusal("spend_cap", f"{worst.money or 0.0:.4f} more", used)
            self._reserved += worst
        return worst

    def settle(self, reserved: Usage, used: Usage) -> None:
        """Count what a call has used in place of what was set aside for it."""
        with self._lock:
            self._reserved = Usage(
                self._reserved.prompt_tokens - reserved.prompt_tokens,
                self._reserved.completion_tokens - reserved.completion_tokens,
                None
                if self._reserved.money is None
                else self._reserved.money - (reserved.money or 0.0),
            )
            self._spent += used

    def _refusal(self, field: str, need: str, used: Usage) -> BudgetSpent:
        caps = f"{self._settings.token_cap:,} tokens"
        if self._settings.spend_cap is not None:
            caps += f" and {self._settings.spend_cap:.4f} in money"
        money = "" if used.money is None else f" and {used.money:.4f} in money"
        return BudgetSpent(
            "The model's budget is spent",
            f"{used.tokens:,} tokens{money} of {caps} are used, and the next question could take "
            f"{need}",
            f"raise {field}, or go on with the built-in planner, which costs nothing",
        )


def _check(settings: EndpointSettings) -> None:
    names = ("token_cap", "spend_cap", "price_per_million_input", "price_per_million_output")
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= 0:
            raise InvalidInput("Invalid budget", f"{name} is {value}", "give zero or more")
    prices = (settings.price_per_million_input, settings.price_per_million_output)
    if settings.spend_cap is not None and None in prices:
        raise InvalidInput(
            "Money is capped without prices",
            f"spend_cap is {settings.spend_cap}",
            "set price_per_million_input and price_per_million_output, or cap tokens alone",
        )
