"""Expected interrupts: what a caller may give, what matches, and what a message says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from mshv_irqfd._core import MsiRoute
from mshv_irqfd.errors import MissingInterruptError
from mshv_irqfd.values import DeliveryMode, Interrupt

if TYPE_CHECKING:
    from collections.abc import Callable

    from mshv_irqfd._core import Partition

One: TypeAlias = int | MsiRoute | Interrupt
Expected: TypeAlias = One | Mapping[int, int] | Mapping[MsiRoute, int] | Mapping[Interrupt, int] | Iterable[One]

VECTORS = range(256)


def expected_interrupts(expected: Expected, count: int | None = None, *, counted: bool = True) -> Counter[Interrupt]:
    """The number of each expected interrupt. A field of `Interrupt` that is None matches anything.

    Args:
        expected: a vector, an MSI or an interrupt; a mapping of them to counts; or several of them, each once.
        count: the count of a single one.
        counted: whether the partition counts interrupts.

    Raises:
        ValueError, TypeError: an argument is invalid.
    """
    wanted = Counter[Interrupt]()
    if isinstance(expected, (int, MsiRoute, Interrupt)):
        wanted[_pattern(expected)] = _checked(1 if count is None else count)
    elif count is not None:
        raise TypeError(f"count {count!r} goes with a single interrupt; give several as a mapping to their counts")
    elif isinstance(expected, Mapping):
        for one, number in expected.items():
            wanted[_pattern(one)] += _checked(number)
    elif isinstance(expected, Iterable) and not isinstance(expected, (str, bytes, bytearray)):
        for one in expected:
            wanted[_pattern(one)] += 1
    else:
        raise TypeError(f"{_RULE}; not {expected!r}")
    if not wanted:
        raise ValueError("no interrupt is expected; give one or more")
    for one, number in wanted.items():
        if number > 1 and not counted:
            raise ValueError(
                f"count {number} of {described(one)}: KVM reports that a vector was raised, not how often; "
                "give a count of 1"
            )
    return wanted


_RULE = "an expected interrupt is a vector (an int), an MsiRoute or an Interrupt"


def _pattern(one: object) -> Interrupt:
    if isinstance(one, MsiRoute):
        return Interrupt(one.vector, one.destination, one.delivery_mode, one.logical, one.level)
    if not isinstance(one, (int, Interrupt)) or isinstance(one, bool):
        raise TypeError(f"{_RULE}; not {one!r}")
    pattern = one if isinstance(one, Interrupt) else Interrupt(one)
    if not isinstance(pattern.vector, int):
        raise TypeError(f"a vector is an int, not {pattern.vector!r}")
    if pattern.vector not in VECTORS:
        raise ValueError(f"vector {pattern.vector:#x} is out of range; vectors are 0 to 0xff")
    return pattern


def _checked(count: object) -> int:
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"a count is an int, not {count!r}")
    if count < 1:
        raise ValueError(f"count {count} is out of range; give 1 or more")
    return count


def _matches(pattern: Interrupt, interrupt: Interrupt) -> bool:
    fields = zip(pattern, interrupt, strict=True)
    # KVM knows the vector only.
    return all(mine is None or its is None or mine == its for mine, its in fields)


def matched(wanted: Counter[Interrupt], arrived: Iterable[Interrupt]) -> tuple[list[int], Counter[Interrupt]]:
    """Matches interrupts with those that are wanted.

    Returns:
        The indexes of those that match, and the wanted ones that are missing.
    """
    # By pattern: the indexes of its interrupts, alike ones together.
    taken: dict[Interrupt, dict[Interrupt, list[int]]] = {pattern: {} for pattern in wanted}
    takers: dict[Interrupt, list[Interrupt]] = {}

    def is_taken(index: int, interrupt: Interrupt, asked: set[Interrupt]) -> bool:
        """Gives an interrupt to a pattern, also to one that has enough if another can take one from that."""
        for pattern in takers[interrupt]:
            if pattern in asked:
                continue
            asked.add(pattern)
            mine = taken[pattern]
            if sum(map(len, mine.values())) >= wanted[pattern]:
                given = next((one for one, indexes in mine.items() if is_taken(indexes[-1], one, asked)), None)
                if given is None:
                    continue
                mine[given].pop()
                if not mine[given]:
                    del mine[given]
            mine.setdefault(interrupt, []).append(index)
            return True
        return False

    surplus = set[Interrupt]()
    for index, interrupt in enumerate(arrived):
        if interrupt not in takers:
            takers[interrupt] = [pattern for pattern in wanted if _matches(pattern, interrupt)]
        # What nothing can take now, nothing can later.
        if interrupt not in surplus and not is_taken(index, interrupt, set()):
            surplus.add(interrupt)
    found = sorted(index for mine in taken.values() for indexes in mine.values() for index in indexes)
    have = Counter({pattern: sum(map(len, mine.values())) for pattern, mine in taken.items()})
    return found, wanted - have


def described(interrupt: Interrupt) -> str:
    """An interrupt in words: "vector 0x41 to APIC 0"."""
    text = f"vector {interrupt.vector:#04x}"
    if interrupt.destination is not None:
        text += f" to {'logical destination' if interrupt.logical else 'APIC'} {interrupt.destination}"
    if interrupt.delivery_mode not in (None, DeliveryMode.FIXED):
        text += f", {DeliveryMode(interrupt.delivery_mode).name}"
    return text + (", level-triggered" if interrupt.level else "")


def listed(interrupts: Counter[Interrupt], *, counted: bool = True) -> str:
    """Interrupts in words, with their numbers where they are counted; "none"."""
    each = (f"{number} x {described(one)}" if counted else described(one) for one, number in interrupts.items())
    return "; ".join(each) or "none"


def raise_missing(
    timeout: float,
    missing: Counter[Interrupt],
    wanted: Counter[Interrupt],
    arrived: list[Interrupt],
    *,
    counted: bool = True,
) -> NoReturn:
    """Says which interrupts are missing after a time, and what did arrive."""
    raise MissingInterruptError(
        f"missing after {timeout:g} s: {listed(missing, counted=counted)}; expected "
        f"{listed(wanted, counted=counted)}; arrived: {listed(Counter(arrived), counted=counted)}",
        missing=dict(missing),
        arrived=arrived,
    )


def checked_timeout(timeout: float) -> float:
    """A number of seconds to wait.

    Raises:
        ValueError: it is none.
    """
    if not 0 <= timeout < inf:
        raise ValueError(f"timeout {timeout} is not a valid number of seconds; give a finite number, 0 or more")
    return timeout


def wait(
    partition: Partition,
    wanted: Counter[Interrupt],
    timeout: float,
    *,
    counted: bool = True,
    settle: Callable[[], None] | None = None,
) -> list[Interrupt]:
    """Waits until all wanted interrupts have arrived, and takes them. Leaves all others, and all of them on failure.

    `settle` is called at the deadline, before the last look.
    """
    deadline = monotonic() + checked_timeout(timeout)
    known, left = 0, 0.0
    while True:
        # The first look waits for nothing.
        arrived = partition._arrived_interrupts(left, known)  # noqa: SLF001 -- its Python half
        interrupts = [interrupt for _, interrupt in arrived]
        found, missing = matched(wanted, interrupts)
        if not missing and partition._claim_interrupts([arrived[index][0] for index in found]):  # noqa: SLF001
            return [interrupts[index] for index in found]
        left = max(deadline - monotonic(), 0.0)
        if not missing:
            # Another thread took some of them meanwhile.
            left = 0.0
        elif left == 0.0 and settle is not None:
            settle()
            settle = None
        elif left == 0.0:
            raise_missing(timeout, missing, wanted, interrupts, counted=counted)
        known = max([known, *(number + 1 for number, _ in arrived)])
