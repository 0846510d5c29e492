"""CUDA graphs: the kernels of a training step are recorded once, then launched together.

A training step of MobileNetV2 is some 800 kernels, a step of QAT several thousand. Launched one by
one, they take the host longer than they take the GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lib.config import UserError, reason

# Steps before the recording: in these, libraries choose and load their kernels.
WARM_UP = 3


class Replayed:
    """Calls a step, records it on call number WARM_UP + 1, and replays the recording from then on.

    step: a function of tensors on the GPU that returns nothing. Its results stay in tensors that
        exist already, such as weights. A replay repeats the kernels alone, not the Python code:
        what changes from step to step must be given as tensors, and nothing may wait for the GPU.
    """

    def __init__(self, step: Callable[..., None]):
        self.step = step
        self.calls, self.inputs, self.replay = 0, (), None

    def __call__(self, *inputs: Tensor) -> None:
        """Do the step. inputs: tensors of the same shapes and strides in every call.

        Raises UserError if the step cannot be recorded.
        """
        self.calls += 1
        if self.calls <= WARM_UP:
            self.step(*inputs)
            return
        if self.replay is None:
            self.inputs = [x.clone() for x in inputs]
            try:
                self.replay = record(self.step, self.inputs)
            except RuntimeError as error:
                raise UserError(
                    f"the step cannot be recorded ({reason(error)}): give --no-cuda-graph"
                ) from error
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.replay()


def record(step: Callable[..., None], inputs: list[Tensor]) -> Callable[[], None]:
    """Record a step without doing it; return the function that does it, on what is then in
    `inputs`.

    Raises RuntimeError if the step does what a recording cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*inputs)
    return graph.replay
