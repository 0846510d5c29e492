"""Find the lambda that meets a budget: a largest file, or a largest loss of accuracy.

    best, attempts = search(attempt, Budget(max_bytes=64_000))

A higher lambda makes a smaller file that is less accurate. So a budget of bytes wants the lowest
lambda whose file fits, and one of accuracy the highest whose file is accurate enough. At a lambda
of 0, bytes count nothing. All this is approximate, since a lower lambda may do worse by chance: so
the best of all attempts that the search makes is taken.
"""

import dataclasses
import math
from collections.abc import Callable

from lib.evaluation import Evaluation
from models.mobilenetv2 import MobileNetV2

FIRST = 0.5  # the lambda that is tried first, as for quantize.py --rd-lambda
LOWEST, HIGHEST = 1 / 4096, 4096.0  # lambdas beyond these are not tried
FACTOR = 4.0  # between lambdas, until one meets the budget and one does not
CLOSE = 1.06  # ratio of two such lambdas at which the search ends: less than 2% of the bytes
FULL = 0.99  # the search also ends at a file that uses this share of a budget of bytes


@dataclasses.dataclass
class Budget:
    """What is asked of a file: a size in bytes, or a number of correct answers; or neither."""

    max_bytes: int | None = None
    min_correct: int | None = None  # correct answers on the validation split

    def met(self, tried: "Attempt") -> bool:
        """Return whether an attempt is within the budget."""
        if self.max_bytes is not None:
            return tried.bytes <= self.max_bytes
        return self.min_correct is None or tried.result.correct >= self.min_correct

    def score(self, tried: "Attempt", wrong_per_bit: float) -> float:
        """Return how good an attempt is, for comparison with others: the higher, the better.

            budget      within it       not within it
            max_bytes   1 + accuracy    -bytes
            min_correct 1 / bytes       correct answers - min_correct
            none        -(share of wrong answers + wrong_per_bit * bits)

        So an attempt within a budget scores over 0, others under 0. (Without a budget, wrong
        answers count and not the loss: soft labels make a network surer of itself, so that its loss
        can rise while its answers become better.)
        """
        if self.max_bytes is not None:
            return 1 + tried.result.accuracy if self.met(tried) else -tried.bytes
        if self.min_correct is not None:
            return 1 / tried.bytes if self.met(tried) else tried.result.correct - self.min_correct
        return -(1 - tried.result.accuracy + wrong_per_bit * 8 * tried.bytes)


def fewest_correct(correct: int, total: int, max_drop: float) -> int:
    """Return the fewest correct answers with which a network loses no more than max_drop.

    correct: answers of the network that it is compared with, of a total. max_drop: percentage
    points, in which a whole number of answers may come out a little too small: 0.06% of 5,000 are
    2.9999999999999996. (Accuracies, as shares, are rounded in the same way.)
    """
    return correct - math.floor(max_drop / 100 * total + 1e-9)


@dataclasses.dataclass(eq=False)  # its tensors have no ==
class Attempt:
    """A quantized network, and what came of it."""

    method: str  # that made it, as in the scheme of lib.quantizers
    rd_lambda: float
    network: MobileNetV2 | None  # None: in qat, where training does not need it: see quantize.py
    latent: dict | None  # weights before rounding, if ptq made it: see lib.ptq.quantize
    bytes: int  # of the .nnz that it becomes; 0 if that was not asked for
    result: Evaluation | None  # on the validation split, if there is one


def search(
    attempt: Callable[[float], Attempt], budget: Budget
) -> tuple[Attempt | None, list[Attempt]]:
    """Look for the lambda at the edge of a budget: bracket it, then narrow the bracket to CLOSE.

    attempt: makes an attempt at a lambda.
    Returns (the `best` attempt on the way there, all attempts in their order).
    """
    attempts, for_bytes = [], budget.max_bytes is not None

    def try_lambda(rd_lambda: float) -> Attempt:
        attempts.append(attempt(rd_lambda))
        return attempts[-1]

    met, failed, rd_lambda = None, None, FIRST
    while not (met and failed) and LOWEST <= rd_lambda <= HIGHEST:
        tried = try_lambda(rd_lambda)
        if budget.met(tried):
            met = tried
        else:
            failed = tried
        if _uses_up(met, budget):
            break
        # At 0, which is no end of the bracket: that goes on by the ratio of its ends.
        if met and for_bytes and len(attempts) == 1 and budget.met(try_lambda(0.0)):
            break  # no byte need be saved
        lower = bool(met) if for_bytes else not met  # bytes are left, or too much accuracy is lost
        rd_lambda *= 1 / FACTOR if lower else FACTOR
    if not met and not for_bytes:
        try_lambda(0.0)
    while met and failed and not _are_close(met, failed, budget):
        ratio = failed.rd_lambda / met.rd_lambda
        tried = try_lambda(met.rd_lambda * ratio ** _share(met, failed, budget))
        if budget.met(tried):
            met = tried
        else:
            failed = tried
    return best(attempts, budget), attempts


def best(attempts: list[Attempt], budget: Budget) -> Attempt | None:
    """Return the attempt that serves a budget best, or None if none meets it.

    For bytes it is the most accurate, and of those the smallest; without validation, the one of the
    lowest lambda. For min_correct it is the smallest, and of those the most accurate. What is left
    equal is decided by the lambda that is nearer to the edge of the budget.
    """
    def by_bytes(tried: Attempt) -> tuple:
        accuracy = (tried.result.correct, -tried.bytes) if tried.result else ()
        return *accuracy, -tried.rd_lambda

    def by_correct(tried: Attempt) -> tuple:
        return -tried.bytes, tried.result.correct, tried.rd_lambda

    meeting = [tried for tried in attempts if budget.met(tried)]
    return max(meeting, key=by_correct if budget.max_bytes is None else by_bytes, default=None)


def _uses_up(met: Attempt | None, budget: Budget) -> bool:
    """Return whether an attempt that meets a budget of bytes leaves next to nothing of it."""
    return bool(met) and budget.max_bytes is not None and met.bytes > FULL * budget.max_bytes


def _are_close(met: Attempt, failed: Attempt, budget: Budget) -> bool:
    """Return whether the lambdas of an attempt that meets the budget and of one that does not are
    near enough to end the search, or the budget is used up."""
    return _uses_up(met, budget) or 1 / CLOSE < met.rd_lambda / failed.rd_lambda < CLOSE


def _share(met: Attempt, failed: Attempt, budget: Budget) -> float:
    """Return where to try next, from the lambda of `met` (0) to that of `failed` (1)."""
    if budget.max_bytes is None:
        return 0.5
    # Bytes fall about as a power of lambda: aim a little within the budget.
    wanted = math.log((1 + FULL) / 2 * budget.max_bytes / met.bytes)
    return min(max(wanted / math.log(failed.bytes / met.bytes), 0.1), 0.9)
