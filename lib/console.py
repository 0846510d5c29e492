"""What people see of a stage: lines, from the main process alone, and progress bars."""

import sys

import torch
from tqdm import tqdm

from lib import devices, processes


def say(text: str) -> None:
    """Print a line for people, from the main process alone."""
    if processes.is_main():
        tqdm.write(text)
        sys.stdout.flush()


def say_device(device: torch.device) -> None:
    """Print the first line of a stage: what it runs on."""
    world, _ = processes.world_and_rank()
    say(f"device: {device}, {devices.hardware(device)}" + f", {world} processes" * (world > 1))


def progress(note: str):
    """Return a function that shows how far a loop over a list has come."""
    hidden = quiet() or not processes.is_main()
    return lambda items: tqdm(items, desc=note, leave=False, disable=hidden)


def quiet() -> bool:
    """Return whether to hide progress bars: they are for terminals."""
    return not sys.stderr.isatty()
