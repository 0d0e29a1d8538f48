"""How torch's caching allocator rounds and fits, as arithmetic, so that what it will reserve is known before it does.

Rules of the native backend (c10/cuda/CUDACachingAllocator.cpp, torch 2.6 to 2.13): sizes are multiples of 512 bytes.
Up to 1 MiB comes from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, more from a segment of its own in
steps of 2 MiB. A request takes the smallest free block that holds it, lowest address first, and leaves the rest free
where that is large enough to be of use; neighbours that are free are one block again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MIB = 2**20
ROUND = 512
SMALL = (
    MIB  # the largest request that goes to the small pool, and what a large block's rest must exceed to be split off
)
SMALL_SEGMENT = 2 * MIB
MEDIUM = 10 * MIB  # below it, large requests share segments
MEDIUM_SEGMENT = 20 * MIB
LARGE_STEP = 2 * MIB

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
        self._blocks: list[list[int]] = []  # by address: [address, bytes, taken]; segments leave a gap between them
        self.reserved = 0
        if block:
            self._grow(block)

    def _grow(self, size: int) -> list[int]:
        end = self._blocks[-1][0] + self._blocks[-1][1] + 1 if self._blocks else 0
        self._blocks.append([end, size, 0])
        self.reserved += size
        return self._blocks[-1]

    def take(self, size: int) -> list[int]:
        """The block that a request of `size` gets."""
        free = [block for block in self._blocks if not block[2] and block[1] >= size]
        found = min(free, key=lambda block: (block[1], block[0])) if free else self._grow(segment(size))
        rest = found[1] - size
        if rest >= self._least:
            self._blocks.insert(self._blocks.index(found) + 1, [found[0] + size, rest, 0])
            found[1] = size
        found[2] = 1
        return found

    def give(self, block: list[int]) -> None:
        """Free a block that `take` gave."""
        block[2] = 0
        at = self._blocks.index(block)
        for left in (at, at - 1):
            if 0 <= left < len(self._blocks) - 1:
                one, two = self._blocks[left : left + 2]
                if not one[2] and not two[2] and one[0] + one[1] == two[0]:
                    one[1] += two[1]
                    del self._blocks[left + 1]


def reserved(sizes: Iterable[int]) -> int:
    """Bytes torch reserves for allocations of these `sizes`, made in this order and kept."""
    pools = {True: Pool(small=True), False: Pool(small=False)}
    for size in sizes:
        pools[size <= SMALL].take(round_up(size, ROUND))
    return sum(pool.reserved for pool in pools.values())


def block_for(events: Sequence[Event]) -> int:
    """Bytes that one free block must have so that torch serves all `events` from it; a multiple of 2 MiB.

    Requests for the small pool never come from it; what they take at most is added, since it is reserved beside it.
    """
    sizes = {number: round_up(size, ROUND) for number, size in events if size}
    small, large = _peak(events, sizes, small=True), _peak(events, sizes, small=False)
    block = round_up(large, LARGE_STEP)
    while block and not _serves(block, events, sizes):
        block += max(LARGE_STEP, round_up(block // 100, LARGE_STEP))
    return block + (round_up(small, SMALL_SEGMENT) + SMALL_SEGMENT if small else 0)


def _peak(events: Sequence[Event], sizes: dict[int, int], *, small: bool) -> int:
    now = most = 0
    for number, size in events:
        if (sizes[number] <= SMALL) is small:
            now += sizes[number] if size else -sizes[number]
            most = max(most, now)
    return most


def _serves(block: int, events: Sequence[Event], sizes: dict[int, int]) -> bool:
    pool = Pool(small=False, block=block)
    taken: dict[int, list[int]] = {}
    for number, size in events:
        if sizes[number] <= SMALL:
            continue
        if size:
            taken[number] = pool.take(sizes[number])
            if pool.reserved > block:
                return False
        else:
            pool.give(taken.pop(number))
    return True
