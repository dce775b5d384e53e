"""What is asked for soon, made ahead by threads: how pictures are decoded while a GPU works."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

MOST_WAITING = 96
"""Made and not yet taken: a decoded picture is 1.7 MB at the published size."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ReadAhead(Generic[K, V]):
    """Makes values by key, ahead of their use. Its methods may be called by several threads.

    Args:
        make: Makes the value of a key; its errors reach who takes the value.
        workers: Threads; 0 makes each value when it is taken.
    """

    def __init__(self, make: Callable[[K], V], workers: int) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._waiting: dict[K, Future[V]] = {}
        self._lock = Lock()

    def announce(self, keys: Iterable[K]) -> None:
        """Start to make what will be taken soon, in order, as much as may wait."""
        if self._pool is None:
            return
        with self._lock:
            for key in keys:
                if len(self._waiting) >= MOST_WAITING:
                    return
                if key not in self._waiting:
                    self._waiting[key] = self._pool.submit(self._make, key)

    def take(self, key: K) -> V:
        """Return the value of a key, which is made again when it is taken again."""
        return self.take_all([key])[key]

    def take_all(self, keys: Iterable[K]) -> dict[K, V]:
        """Return the values of keys; those that nobody announced are made side by side."""
        different = dict.fromkeys(keys)
        if self._pool is None:
            return {key: self._make(key) for key in different}
        with self._lock:
            futures = {
                key: self._waiting.pop(key)
                if key in self._waiting
                else self._pool.submit(self._make, key)
                for key in different
            }
        return {key: future.result() for key, future in futures.items()}

    def close(self) -> None:
        """Stop making."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
