"""Find the lambda that a budget asks for: a largest file, or a largest loss of accuracy.

    best, attempts = search(attempt, Budget(max_bytes=64_000))

A higher lambda makes a smaller file that is less accurate. So a budget of bytes wants the lowest
lambda whose file fits, and one of accuracy the highest whose file is accurate enough. At a lambda
of 0 bytes count nothing: the most accurate network, and the largest.
"""

import dataclasses
import math
from collections.abc import Callable

from lib import engine
from models.mobilenetv2 import MobileNetV2

FIRST = 0.5  # the lambda that is tried first, as for quantize.py --rd-lambda
LOWEST, HIGHEST = 1 / 4096, 4096.0  # lambdas beyond these are not tried
FACTOR = 4.0  # between lambdas, until one meets the budget and one does not
CLOSE = 1.06  # ratio of two such lambdas at which the search ends: less than 2% of the bytes
FULL = 0.99  # share of a budget of bytes that is used: the search ends, too


@dataclasses.dataclass
class Budget:
    """What is asked for: a size in bytes, or a number of correct answers; or neither."""

    max_bytes: int | None = None
    floor: float | None = None  # correct answers on the validation split, at least

    def met(self, size: int, result: engine.Evaluation | None) -> bool:
        """Whether a file of `size` bytes and that result is within the budget."""
        if self.max_bytes is not None:
            return size <= self.max_bytes
        return self.floor is None or result.correct >= self.floor

    def score(self, size: int, result: engine.Evaluation, errors_per_bit: float) -> float:
        """Return how good a file is, for comparison with others: the higher, the better.

            budget      within it       not within it
            max_bytes   1 + accuracy    -size
            floor       1 / size        correct answers - floor
            none        -(share of wrong answers + errors_per_bit * bits)

        So a file within a budget scores over 0, others under 0. (Without a budget the loss would
        not do in place of wrong answers: soft labels make a network surer of itself, and its loss
        larger where it answers better.)
        """
        if self.max_bytes is not None:
            return 1 + result.accuracy if self.met(size, result) else -size
        if self.floor is not None:
            return 1 / size if self.met(size, result) else result.correct - self.floor
        return -(1 - result.accuracy + errors_per_bit * 8 * size)


@dataclasses.dataclass(eq=False)  # its tensors have no ==
class Attempt:
    """A quantized network, and what came of it."""

    rd_lambda: float
    network: MobileNetV2
    latent: dict | None  # its weights before rounding, of ptq: see lib.ptq.quantize
    bytes: int  # of the .nnz that it becomes; 0 if that was not asked for
    result: engine.Evaluation | None  # on the validation split, if there is one


def search(
    attempt: Callable[[float], Attempt], budget: Budget
) -> tuple[Attempt | None, list[Attempt]]:
    """Find the lambda at the edge of a budget: bracket it, then narrow the bracket to CLOSE.

    attempt: makes an attempt at a lambda.
    Returns (the attempt found, all attempts in their order); None if no lambda meets the budget.
    """
    attempts, met, failed, rd_lambda = [], None, None, FIRST
    upwards = budget.floor is not None  # the highest lambda that meets it, not the lowest

    def meets(rd_lambda: float) -> bool:
        attempts.append(attempt(rd_lambda))
        return budget.met(attempts[-1].bytes, attempts[-1].result)

    while LOWEST <= rd_lambda <= HIGHEST and not _ends(met, failed, budget):
        if meets(rd_lambda):
            met = attempts[-1]
            if len(attempts) == 1 and not upwards and not _ends(met, failed, budget) and meets(0.0):
                return attempts[-1], attempts  # the budget is a generous one: nothing need be saved
        else:
            failed = attempts[-1]
        if met and failed:
            ratio = failed.rd_lambda / met.rd_lambda
            rd_lambda = met.rd_lambda * ratio ** _share(met, failed, budget)
        else:
            rd_lambda *= FACTOR if bool(met) == upwards else 1 / FACTOR
    if not met and upwards and meets(0.0):
        met = attempts[-1]
    return met, attempts


def _ends(met: Attempt | None, failed: Attempt | None, budget: Budget) -> bool:
    """Whether a budget of bytes is used up, or attempts that meet a budget and do not are near
    enough."""
    if met and budget.max_bytes is not None and met.bytes > FULL * budget.max_bytes:
        return True
    return bool(met and failed) and 1 / CLOSE < met.rd_lambda / failed.rd_lambda < CLOSE


def _share(met: Attempt, failed: Attempt, budget: Budget) -> float:
    """Return where to try next, from the lambda of `met` (0) to that of `failed` (1)."""
    if budget.max_bytes is None:
        return 0.5
    # Bytes fall about as a power of lambda: aim a little within the budget.
    wanted = math.log((1 + FULL) / 2 * budget.max_bytes / met.bytes)
    return min(max(wanted / math.log(failed.bytes / met.bytes), 0.1), 0.9)
