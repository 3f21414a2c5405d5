"""The waiting requests, in order. What a step asks of them costs the same however many there are."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from operator import attrgetter

from sempre.engine.scheduling.request import OrderKey, Request

ORDER_KEY = attrgetter("order_key")
# requests of one size class that are looked at in vain before the rest of the class is left for a later step
_MOST_IN_VAIN = 32


class WaitingQueue:
    """Sorted by order key; beside the whole queue there is one for each adapter, and one for each class of prompt costs
    within a factor of two."""

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        self._all: list[Request] = []
        self._by_adapter: dict[str | None, list[Request]] = {}
        self._by_size: dict[int, list[Request]] = {}
        # by request id: a request's tokens may change while it waits
        self._sizes: dict[str, int] = {}
        for request in requests:
            self.add(request)

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._all)

    @property
    def first(self) -> Request:
        return self._all[0]

    def add(self, request: Request) -> None:
        """Queue a request at its place in the order."""
        size = self._sizes[request.request_id] = _cost(request).bit_length()
        insort(self._all, request, key=ORDER_KEY)
        insort(self._by_adapter.setdefault(request.adapter, []), request, key=ORDER_KEY)
        insort(self._by_size.setdefault(size, []), request, key=ORDER_KEY)

    def remove(self, request: Request) -> None:
        size = self._sizes.pop(request.request_id)
        remove(self._all, request)
        remove(self._by_adapter[request.adapter], request)
        if not self._by_adapter[request.adapter]:
            del self._by_adapter[request.adapter]
        remove(self._by_size[size], request)
        if not self._by_size[size]:
            del self._by_size[size]

    def first_of_adapters(self, adapters: Iterable[str]) -> Request | None:
        """The first request without an adapter or with one of `adapters`."""
        heads = (self._by_adapter[adapter][0] for adapter in (None, *adapters) if adapter in self._by_adapter)
        return min(heads, key=ORDER_KEY, default=None)

    def shorter(self, after: OrderKey | None, most: int, share: int, last_priority: int) -> list[Request]:
        """Requests after `after` in the order, from None on all, whose prompts cost at most `most` each and `share`
        together, in order, as many as fit; none has a priority beyond `last_priority`.

        Of each size class only so many are looked at in vain.
        """
        found: list[Request] = []
        heads: list[tuple[OrderKey, int, int]] = []
        in_vain = dict.fromkeys(self._by_size, 0)
        for size in self._by_size:
            start = 0 if after is None else bisect_right(self._by_size[size], after, key=ORDER_KEY)
            self._push(heads, size, start, min(most, share))
        heapify(heads)
        while heads and share:
            key, size, index = heappop(heads)
            if key[0] > last_priority:
                break
            request = self._by_size[size][index]
            cost = _cost(request)
            if not request.awaits_result and cost <= min(most, share):
                found.append(request)
                share -= cost
            else:
                in_vain[size] += 1
            if in_vain[size] < _MOST_IN_VAIN:
                self._push(heads, size, index + 1, min(most, share))
        return found

    def _push(self, heads: list[tuple[OrderKey, int, int]], size: int, index: int, most: int) -> None:
        """Put a request of a size class on the heap, unless all of its class cost more than `most`."""
        requests = self._by_size[size]
        if index < len(requests) and (1 << size) >> 1 <= most:
            heappush(heads, (requests[index].order_key, size, index))

    def check_invariants(self) -> None:
        """Raise AssertionError unless the queues agree."""
        for queues in (self._by_adapter, self._by_size):
            assert sorted((r for queue in queues.values() for r in queue), key=ORDER_KEY) == self._all
            assert all(queue and queue == sorted(queue, key=ORDER_KEY) for queue in queues.values())
        assert all(request.adapter == name for name, queue in self._by_adapter.items() for request in queue)
        assert self._sizes.keys() == {request.request_id for request in self._all}


def remove(queue: list[Request], request: Request) -> None:
    """Remove a request from a queue that is sorted by order key."""
    del queue[bisect_left(queue, request.order_key, key=ORDER_KEY)]


def _cost(request: Request) -> int:
    """Of a step's room for prompts, of a request nothing of which is computed."""
    return request.prompt_cost(0, min(request.num_tokens, request.compute_limit))
