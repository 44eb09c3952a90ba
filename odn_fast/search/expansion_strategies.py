"""In which order a depth search trains depths, and which it leaves out.

Every depth starts from the warmed-up weights and has an order of data of its own, so no depth depends on another: whatever
the strategy, a depth that is trained comes to the same bits. Strategies differ in what they train.

    linear    from shallow to deep, one at a time, until one passes
    parallel  the same, several at a time; deeper ones end as soon as a shallower one passes: the same answer sooner, at the
              price of the work on deeper ones
    bisect    halves what is left after every depth, which finds linear's answer if accuracy grows with depth (where one
              depth passes, all deeper ones would), with about log2 of the trainings

`ended` holds the depths whose training has ended, and whether each passed.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

_MOST_ON_A_GPU = 4  # more trainings at once are slower each, and take memory each


class Moves(NamedTuple):
    """What a search does next: depths to give up, and depths that may be trained now, the first ones first."""

    cancelled: list[int]
    wanted: list[int]


def found(ended: Mapping[int, bool]) -> int | None:
    """The shallowest depth that passed."""
    return min((depth for depth, passed in ended.items() if passed), default=None)


def in_order(first: int, last: int, ended: Mapping[int, bool], under_way: Collection[int] = ()) -> Moves:
    """linear and parallel: every depth below the shallowest that passed has to end, no deeper one does."""
    passed = found(ended)
    bound = last if passed is None else passed - 1
    wanted = [depth for depth in range(first, bound + 1) if depth not in ended and depth not in under_way]
    return Moves(sorted(depth for depth in under_way if depth > bound), wanted)


def bisect(first: int, last: int, ended: Mapping[int, bool]) -> Moves:
    """The middle of the depths among which the answer must be, until it is one depth that has been trained."""
    low, high = first, last
    while low < high:
        middle = (low + high) // 2
        if middle not in ended:
            return Moves([], [middle])
        low, high = (low, middle) if ended[middle] else (middle + 1, high)
    return Moves([], [] if low in ended else [low])


def chosen(strategy: str) -> Callable[[int, int, Mapping[int, bool]], Moves]:
    """What a strategy that trains one depth at a time does next."""
    return bisect if strategy == "bisect" else in_order


def in_words(strategy: str, workers: int | None, threads: int) -> str:
    """What a strategy other than linear does, for the first screen."""
    if strategy == "bisect":
        return "bisect: finds the smallest depth if accuracy grows with depth; not every depth is trained"
    return (f"parallel: {workers} depths at once, each on {threads} thread{'s' if threads > 1 else ''}; a depth that passes ends the "
            "deeper ones")


def none_of(depths: Collection[int]) -> str:
    """The beginning of a sentence that says what none of these depths did."""
    first, *_, last = tried = sorted({*depths}) * (2 if len(depths) == 1 else 1)
    if len(tried) == last - first + 1 or len(depths) == 1:
        return f"no depth from {first} to {last}"
    return f"none of the depths {', '.join(map(str, tried[:-1]))} and {last}"


def share_out(cores: int, depths: int, on_gpu: bool, workers: int | None, threads: int | None) -> tuple[int, int]:
    """Workers, and threads for each, where one or both are left open: as many workers as there are cores and depths for."""
    if workers is None:
        workers = max(1, min(cores // (threads or 1), depths, _MOST_ON_A_GPU if on_gpu else depths))
    return workers, threads or max(1, cores // min(workers, depths))


def longest(strategy: str, seconds: Mapping[int, float], workers: int = 1) -> float:
    """Most time that a strategy can take, from the time of every depth 1st..last that it may train.

    Parallel workers are taken not to slow each other down.
    """
    first, last = min(seconds), max(seconds)
    if strategy == "bisect":
        return max(sum(seconds[depth] for depth in trained_by_bisection(first, last, answer)) for answer in range(first, last + 2))
    # Whoever is done takes the next depth: at most the work shared out evenly, and the longest piece on top.
    return math.fsum(seconds.values()) / workers + (1 - 1 / workers) * max(seconds.values())


def trained_by_bisection(first: int, last: int, answer: int) -> list[int]:
    """The depths that a bisection trains, in order, where depths from `answer` on pass and no others."""
    ended: dict[int, bool] = {}
    while wanted := bisect(first, last, ended).wanted:
        ended[wanted[0]] = wanted[0] >= answer
    return list(ended)
