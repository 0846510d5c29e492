"""Data-parallel training by torchrun: the processes, what they agree on, and their batch norm.

In a single process, without torchrun, the functions here need no special case: nothing waits,
`discard` deletes its files, and `from_main_process` returns its value. Only `synchronize_batchnorm`
is for several: its batch norm cannot train without `start` having joined them.
"""

import atexit
import contextlib
import hashlib
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lib.config import UserError


def start(device: torch.device, share: bool = False) -> None:
    """Join the other processes if torchrun started this one.

    share: the processes may have one GPU together, which NCCL refuses; they can then only wait for
        each other, not add tensors.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # Hours: a process may wait for another that has the longer half of a sweep.
        dist.init_process_group(
            "nccl" if device.type == "cuda" and not share else "gloo", timeout=timedelta(hours=12)
        )


def stop() -> None:
    """Wait for all processes and leave them."""
    wait()  # the main process may still be writing
    release()
    if dist.is_initialized():
        dist.destroy_process_group()


def world_and_rank() -> tuple[int, int]:
    """Return the number of processes and the number of this one, from 0."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def is_main() -> bool:
    """Return whether this is the process that prints and writes files (rank 0)."""
    return world_and_rank()[1] == 0


_claimed = {}  # the open lock files of this process, by the path that is claimed


def claim(path: Path) -> None:
    """Keep other runs from working on `path` until `stop`, or until this process ends: two would
    write one state.

    Raises UserError if another run on this machine has claimed it. The lock is a file in the folder
    for temporary ones. Where locks cannot be had, nothing is kept.
    """
    path = path.resolve()
    try:
        import fcntl  # not on Windows
    except ImportError:
        return
    if path in _claimed or not is_main():
        return
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    lock = Path(tempfile.gettempdir(), f"mobilenetv2-cifar10-{name}.lock")
    with contextlib.suppress(PermissionError):  # another user's
        handle = lock.open("a")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise UserError(f"another process works on {path}") from None
        _claimed[path] = handle
        atexit.register(release)


def release() -> None:
    """Give up what `claim` has claimed."""
    for handle in _claimed.values():
        Path(handle.name).unlink(missing_ok=True)
        handle.close()
    _claimed.clear()


def wait() -> None:
    """Wait until all processes are here: before one reads what another wrote or deleted."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first():
    """Context manager: the main process runs the block before the others (a download, say)."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


@contextlib.contextmanager
def all_threads():
    """Context manager: this process has the threads of all processes, which wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads * world_and_rank()[0])
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def from_main_process(value: float, device: torch.device) -> float:
    """Return the main process's value in all processes, so that they decide alike on it."""
    if dist.is_initialized():
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(shared, 0)
        value = shared.item()
    return value


def concatenate(x: Tensor, dim: int) -> Tensor:
    """Return the tensors of all processes, in their order, as one along a dimension."""
    world, _ = world_and_rank()
    if world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


def discard(*files: Path) -> None:
    """Delete files once for all processes, and wait until that is done."""
    if is_main():
        for file in files:
            file.unlink(missing_ok=True)
    wait()


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class _SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the global batch on the CPU, whose tensors torch's SyncBatchNorm refuses.

    In eval mode, and in a state dict, this is an ordinary BatchNorm2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() / x.shape[1] * dist.get_world_size()
        mean = _AllReduce.apply(x32.sum((0, 2, 3))) / count
        centred = x32 - mean.view(1, -1, 1, 1)
        # Two passes: the mean of squares minus the square of the mean loses digits in float32.
        var = _AllReduce.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


class _CudaSyncBatchNorm(nn.SyncBatchNorm, nn.BatchNorm2d):
    """torch's SyncBatchNorm, of few kernels, which is a BatchNorm2d for the rest of the code."""

    process_group = None  # all processes


def synchronize_batchnorm(model: nn.Module) -> None:
    """Make every BatchNorm2d of the model use the statistics of the global batch, in place."""
    kind = _SyncBatchNorm if dist.get_backend() == "gloo" else _CudaSyncBatchNorm
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = kind
