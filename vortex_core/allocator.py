"""How torch's caching allocator rounds and fits, as arithmetic, so that what it will reserve is known before it does.

Rules of the native backend (c10/cuda/CUDACachingAllocator.cpp, torch 2.6 to 2.13): sizes are multiples of 512 bytes.
Up to 1 MiB comes from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, more from a segment of its own in
steps of 2 MiB. A request takes the smallest free block that holds it, lowest address first, and leaves the rest free
where that is large enough to be of use; neighbours that are free are one block again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import lru_cache

MIB = 2**20
ROUND = 512
SMALL = (
    MIB  # the largest request that goes to the small pool, and what a large block's rest must exceed to be split off
)
SMALL_SEGMENT = 2 * MIB
MEDIUM = 10 * MIB  # below it, large requests share segments
MEDIUM_SEGMENT = 20 * MIB
LARGE_STEP = 2 * MIB

MORE = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # steps by which a block may turn out larger than it must be

Event = tuple[int, int]  # an allocation's number, and its bytes: taken where positive, given back where 0


def round_up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def segment(size: int) -> int:
    """Bytes torch asks of the driver for a request that no free block holds."""
    if size <= SMALL:
        return SMALL_SEGMENT
    return MEDIUM_SEGMENT if size < MEDIUM else round_up(size, LARGE_STEP)


class Pool:
    """One of the two pools (small or large) of the allocator. `reserved` is the bytes of its segments."""

    def __init__(self, *, small: bool, block: int = 0) -> None:
        self._least = ROUND if small else SMALL + 1  # what a rest must have to stay a block
        self._free: list[tuple[int, int]] = []  # sorted: bytes and address
        self._starts: dict[int, int] = {}  # of free blocks: bytes by address, and by the address after them
        self._ends: dict[int, int] = {}
        self._next = 0  # address of the next segment; a gap before it keeps segments apart
        self.reserved = 0
        if block:
            self._add(*self._grow(block))

    def _grow(self, size: int) -> tuple[int, int]:
        address = self._next
        self._next += size + 1
        self.reserved += size
        return size, address

    def _add(self, size: int, address: int) -> None:
        insort(self._free, (size, address))
        self._starts[address] = self._ends[address + size] = size

    def _remove(self, size: int, address: int) -> None:
        del self._free[bisect_left(self._free, (size, address))], self._starts[address], self._ends[address + size]

    def take(self, size: int) -> tuple[int, int]:
        """The block that a request of `size` gets: its bytes, at least `size`, and its address."""
        at = bisect_left(self._free, (size, 0))
        if at < len(self._free):
            have, address = self._free[at]
            self._remove(have, address)
        else:
            have, address = self._grow(segment(size))
        if have - size < self._least:
            return have, address
        self._add(have - size, address + size)
        return size, address

    def give(self, size: int, address: int) -> None:
        """Free a block that `take` gave; it joins the free ones beside it."""
        after = self._starts.get(address + size)
        if after is not None:
            self._remove(after, address + size)
            size += after
        before = self._ends.get(address)
        if before is not None:
            self._remove(before, address - before)
            size, address = size + before, address - before
        self._add(size, address)


@lru_cache(maxsize=1024)
def reserved(sizes: tuple[int, ...]) -> int:
    """Bytes torch reserves for allocations of these `sizes`, made in this order and kept."""
    pools = {True: Pool(small=True), False: Pool(small=False)}
    for size in sizes:
        pools[size <= SMALL].take(round_up(size, ROUND))
    return sum(pool.reserved for pool in pools.values())


def block_for(events: Sequence[Event]) -> int:
    """Bytes that one free block must have so that torch serves all `events` from it; a multiple of 2 MiB.

    Larger blocks serve them, too (those of `MORE`), which does not go without saying: the smallest free block that
    holds a request may be cut so that a large one fits nowhere any more. Requests for the small pool never come from
    the block; what they take at most is added, since it is reserved beside it.
    """
    small, large = _peak(events, small=True), _peak(events, small=False)
    block = round_up(large, LARGE_STEP)
    while block and not all(serves(block + more * LARGE_STEP, events) for more in MORE):
        block += max(LARGE_STEP, round_up(block // 100, LARGE_STEP))
    return block + (round_up(small, SMALL_SEGMENT) + SMALL_SEGMENT if small else 0)


def _peak(events: Sequence[Event], *, small: bool) -> int:
    taken: dict[int, int] = {}
    now = most = 0
    for number, size in events:
        if size and (size <= SMALL) is small:
            taken[number] = round_up(size, ROUND)
            now += taken[number]
            most = max(most, now)
        elif number in taken:
            now -= taken.pop(number)
    return most


def serves(block: int, events: Sequence[Event]) -> bool:
    """Whether torch serves all large `events` from one free block of so many bytes."""
    pool = Pool(small=False, block=block)
    taken: dict[int, tuple[int, int]] = {}
    for number, size in events:
        if size > SMALL:
            taken[number] = pool.take(round_up(size, ROUND))
            if pool.reserved > block:
                return False
        elif number in taken:
            pool.give(*taken.pop(number))
    return True
