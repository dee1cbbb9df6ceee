"""Computes requests that wait together as one batch, so that many visitors wait less.

Whoever asks first computes for all who wait by then; nobody waits for a batch to fill.
"""

import queue
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, NamedTuple


class Job(NamedTuple):
    """A part of a request.

    Attributes:
        key: jobs with equal keys can share a batch.
        item: what is to be computed.
        size: how much of a batch it takes up.
        answer: will hold the result, or the error.
    """

    key: Hashable
    item: Any
    size: int
    answer: Future


class Batches:
    """A function of a batch, to be called by many threads with a few items each.

    Args:
        function: gets a key and a list of items, returns a list of their results.
        limit: the largest sum of sizes in a batch; a larger item gets a batch of its own.
    """

    def __init__(self, function: Callable[[Any, list], list], limit: int):
        self.function, self.limit = function, limit
        self.arrived: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.waiting: list[Job] = []  # who has the turn takes from it
        self.turn = threading.Lock()

    def __call__(self, key: Hashable, items: list, sizes: list[int]) -> list:
        """Return the results of some items, or raise the error that computing them raised."""
        jobs = [Job(key, *one, Future()) for one in zip(items, sizes, strict=True)]
        for job in jobs:
            self.arrived.put(job)
        for job in jobs:
            with self.turn:
                while not job.answer.done():  # else another thread has computed it meanwhile
                    self.compute(self.next_batch())
        return [job.answer.result() for job in jobs]

    def next_batch(self) -> list[Job]:
        """Take the job that has waited longest, and those of its key up to the limit."""
        while not self.arrived.empty():
            self.waiting.append(self.arrived.get())
        batch, later, size = [], [], 0
        for job in self.waiting:
            fits = not batch or job.key == batch[0].key and size + job.size <= self.limit
            (batch if fits else later).append(job)
            size += job.size if fits else 0
        self.waiting = later
        return batch

    def compute(self, batch: list[Job]) -> None:
        """Compute a batch and hand out its results."""
        try:
            results = self.function(batch[0].key, [job.item for job in batch])
            answers = list(zip(batch, results, strict=True))
        except Exception as error:
            for job in batch:
                job.answer.set_exception(error)
        else:
            for job, result in answers:
                job.answer.set_result(result)
