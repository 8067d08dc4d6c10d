"""Items of an iterator, made ahead of their use in a background thread."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """`get()` gives the next item of an endless iterator, or raises what it raised; up to `size` items lie ready."""

    def __init__(self, items: Iterator[T], size: int, name: str) -> None:
        self._queue: queue.Queue[T | BaseException] = queue.Queue(size)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(items,), name=name, daemon=True)
        self._thread.start()

    def _produce(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._put(item)
                if self._closed.is_set():
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: T | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def get(self) -> T:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        self._thread.join()
