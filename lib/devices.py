"""The device that a stage runs on: chosen by its name, tried out, described; its precision."""

import contextlib
import ctypes
import os
import platform
import re
import sys
import warnings
from pathlib import Path

import torch

from lib.config import UserError, reason

# What a driver of NVIDIA leaves on Linux, and under Windows' WSL.
SIGNS_OF_A_GPU = [Path("/proc/driver/nvidia"), Path("/dev/nvidia0"), Path("/dev/dxg")]

# Instruction sets that decide how fast a CPU trains (bf16, AMX) and runs integers (VNNI), by the
# names of torch.cpu.get_capabilities.
INSTRUCTIONS = {
    "avx2": "AVX2", "avx512_f": "AVX-512", "avx512_bf16": "bf16", "avx512_vnni": "VNNI",
    "avx_vnni": "VNNI", "amx_tile": "AMX",
}  # fmt: skip


def choose(name: str, share: bool = False) -> torch.device:
    """Return the device of a name, and make it the current one.

    `auto` is CUDA if there is one that works, else the CPU; a line says why where there is a GPU
    that does not. Under torchrun `cuda` is one GPU per process, or with `share` the processes share
    those that there are. Raises UserError if the device cannot be used.
    """
    if name == "auto":
        why = _why_no_cuda()
        if why and int(os.environ.get("RANK", 0)) == 0:
            print(
                f"warning: running on the CPU, since this machine's GPU cannot be used: {why}; "
                f"this is torch {torch.__version__}: see pytorch.org/get-started for pytorch.org's "
                "index of the builds that suit other GPUs and drivers", file=sys.stderr,
            )  # fmt: skip
        name = "cpu" if why is not None else "cuda"
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):
        raise UserError(f"--device {name} cannot be used here: give auto, cpu, cuda or cuda:NUMBER")
    if name == "cuda":
        name = _gpu(share)
    elif name.startswith("cuda:") and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not share:
        raise UserError(f"--device {name} is one GPU, for several processes: give --device cuda")
    try:
        chosen = torch.device(name)
        _probe(chosen)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UserError(f"--device {name} cannot be used here: {_first_sentence(error)}") from None
    if chosen.type == "cpu":
        _keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # fp32 figures are fp32; training uses bf16 anyway
    return chosen


def _first_sentence(error: BaseException) -> str:
    """Return what an error of torch says first: its lists of backends are long."""
    return reason(error).split(". ")[0].rstrip(".")


def _gpu(share: bool) -> str:
    """Return the name of this process's GPU."""
    number = int(os.environ.get("LOCAL_RANK", 0))
    return f"cuda:{number % max(1, torch.cuda.device_count()) if share else number}"


def _probe(chosen: torch.device) -> None:
    """Make a device the current one and run a kernel on it. Raises what torch raises.

    Pinned memory and the question whether there is bf16 are of the current device. A driver or a
    GPU that is too old for this PyTorch shows when a kernel runs; float64 is needed for sums.
    """
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    (torch.ones(2, dtype=torch.float64, device=chosen) + 1).sum().item()


def _why_no_cuda() -> str | None:
    """Return why a GPU cannot be used: "" if this machine shows none, None if it can."""
    with warnings.catch_warnings(action="ignore"):  # torch's of an old driver; ours says it too
        available = torch.cuda.is_available()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if not available and (hidden or not any(sign.exists() for sign in SIGNS_OF_A_GPU)):
        return ""
    if not torch.backends.cuda.is_built():
        return "this PyTorch was built without CUDA"
    try:
        _probe(torch.device(_gpu(share=True)))
    except (RuntimeError, AssertionError) as error:
        return _first_sentence(error)
    return None


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation.

    By default it returns every activation to the kernel, which has to zero the pages again (a third
    of an evaluation's time on 2 cores).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, 1 << 30)


def hardware(device: torch.device) -> str:
    """Return a device and what matters of it: "AMD EPYC, 2 threads (AVX2, AVX-512, bf16, VNNI)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, cpuinfo = None, Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name = re.search(r"^model name\s*: (.+)", cpuinfo.read_text(), re.M)
    name = name[1] if name else platform.processor() or platform.machine()
    has = torch.cpu.get_capabilities()
    known = dict.fromkeys(label for key, label in INSTRUCTIONS.items() if has.get(key))
    count = torch.get_num_threads()
    return f"{name}, {count} thread" + "s" * (count > 1) + f" ({', '.join(known)})" * bool(known)


def autocast(device: torch.device, enabled: bool):
    """Return the context manager of mixed precision, switched off where it would be slow."""
    dtype = torch.float16 if is_fp16(device) else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=is_mixed(device, enabled))


def is_mixed(device: torch.device, amp: bool) -> bool:
    """Return whether training with `amp` runs in mixed precision on this device."""
    return amp and not _slow_bf16(device)


def is_fp16(device: torch.device) -> bool:
    """Return whether mixed precision is fp16, which needs loss scaling (CUDA without bf16)."""
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def _slow_bf16(device: torch.device) -> bool:
    """Return whether this is a CPU for which oneDNN has only reference code in bf16, which is 100
    times slower than fp32 (seen on one with AVX2 alone)."""
    if device.type != "cpu":
        return False
    with_onednn = torch.backends.mkldnn.is_available()
    return not (with_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
