"""The one evaluation that is behind every accuracy: a network on a whole split of images."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lib import console, data, devices, quantizers
from lib.config import UserError

BATCH = 128  # the report's; its dynamic activation ranges depend on it
# A batch for a GPU, which would wait for the host between the layers of a smaller one. It divides
# the splits of CIFAR-10: a GPU's libraries take seconds to choose kernels for each new shape.
GPU_BATCH = 1000


class BrokenNetworkError(UserError):
    """A network answers with logits that are NaN or infinite."""


@dataclasses.dataclass
class Evaluation:
    """The predictions of a network on a split, with its accuracy and loss."""

    correct: int
    total: int
    loss: float  # mean cross-entropy
    predictions: Tensor  # int64 (total,), on the CPU

    @property
    def accuracy(self) -> float:
        """The share of correct answers."""
        return self.correct / self.total

    def __str__(self) -> str:
        return f"{self.accuracy:.2%} ({self.correct}/{self.total})"


@torch.inference_mode()
def evaluate(model: nn.Module, split: data.Split, amp: bool = False) -> Evaluation:
    """Evaluate a model on a whole split, in its order; in fp32 unless `amp`.

    The model stays in eval mode.
    """
    model.eval()
    dynamic = any(quantizers.is_dynamic(module) for module in model.modules())
    on_gpu = split.images.device.type == "cuda"
    batch = GPU_BATCH if on_gpu and not dynamic else BATCH

    def network(images: Tensor) -> Tensor:
        with devices.autocast(split.images.device, amp):
            return model(data.normalize(images)).float()

    return evaluate_function(network, split, batch=batch)


@torch.inference_mode()
def evaluate_function(
    network: Callable, split: data.Split, note: str = "evaluate", batch: int = BATCH
) -> Evaluation:
    """Evaluate any function from uint8 images (n, 3, 32, 32) to logits (n, classes).

    note: what the progress bar is called. Raises BrokenNetworkError for logits that are NaN or
    infinite: an accuracy would be of nothing.
    """
    starts = range(0, len(split), batch)
    shown = tqdm(starts, desc=note, leave=False, disable=console.quiet())
    logits = torch.cat([network(split.images[a : a + batch]) for a in shown])
    if not logits.isfinite().all():
        raise BrokenNetworkError("the network answers with NaN or infinite logits")
    predictions = logits.argmax(1)
    correct = int((predictions == split.labels).sum())
    loss = float(F.cross_entropy(logits, split.labels))
    return Evaluation(correct, len(split), loss, predictions.cpu())
