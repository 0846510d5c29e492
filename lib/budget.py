"""Find the price of a bit that a budget asks for: a largest file, or a largest loss of accuracy.

    best, attempts = search(attempt, meets, costly=True)

A higher price makes a smaller file that is less accurate. So of the prices that meet a budget of
bytes the lowest is wanted, and of those that meet one of accuracy the highest.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lib import compressed, engine
from models.mobilenetv2 import MobileNetV2

FIRST = 0.5  # the price that is tried first, as for quantize.py --rd-lambda
LOWEST, HIGHEST = 1 / 4096, 4096.0  # prices beyond these are not tried
FACTOR = 4.0  # between prices, until one meets the budget and one does not
CLOSE = 1.06  # ratio of two such prices at which the search ends: about 1% of the bytes


@dataclasses.dataclass
class Attempt:
    """A network that was quantized at a price, and what came of it."""

    rd_lambda: float
    network: MobileNetV2
    latent: dict  # its weights before rounding: see lib.ptq.quantize
    bytes: int  # of the file that it becomes
    result: engine.Evaluation | None  # on the validation split, if there is one


def search(
    attempt: Callable[[float], Attempt], meets: Callable[[Attempt], bool], *, highest: bool
) -> tuple[Attempt | None, list[Attempt]]:
    """Find the price at the edge of a budget by bisection, to within CLOSE.

    attempt: makes an attempt at a price. meets: whether an attempt meets the budget. highest: of
    the prices that meet it, look for the highest; else for the lowest.
    Returns (the attempt found, all attempts in their order); None if no price meets the budget.
    """
    attempts = [attempt(FIRST)]
    meeting, failing = (attempts[0], None) if meets(attempts[0]) else (None, attempts[0])
    while not (meeting and failing):
        price = attempts[-1].rd_lambda * (FACTOR if bool(meeting) == highest else 1 / FACTOR)
        if not LOWEST <= price <= HIGHEST:
            return meeting, attempts
        attempts.append(attempt(price))
        if meets(attempts[-1]):
            meeting = attempts[-1]
        else:
            failing = attempts[-1]
    while not 1 / CLOSE < meeting.rd_lambda / failing.rd_lambda < CLOSE:
        attempts.append(attempt((meeting.rd_lambda * failing.rd_lambda) ** 0.5))
        if meets(attempts[-1]):
            meeting = attempts[-1]
        else:
            failing = attempts[-1]
    return meeting, attempts


def encode(network: MobileNetV2, scheme: dict, parent, data: dict, seed: int) -> bytes:
    """Return the .nnz file that a quantized network becomes, by the usual stages.

    parent: the Checkpoint that it was quantized from. Only the hash of the int8.pth in between is
    missing, which takes the same room whatever it is.
    """
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    child = dataclasses.replace(
        parent, settings=network.settings, state=state, quantization=scheme, data=data, seed=seed,
        metrics={}, sha256="0" * 64,
    )  # fmt: skip
    quantized = dataclasses.replace(child, stage="quantized", ancestors=parent.lineage())
    int8 = dataclasses.replace(child, stage="int8", ancestors=quantized.lineage())
    return compressed.encode(dataclasses.replace(int8, file=Path("int8.pth")))
