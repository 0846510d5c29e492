"""The logs of the stages: JSON lines in files, and Weights & Biases where it is asked for."""

import contextlib
import json
import os
import sys
from pathlib import Path

from lib.config import UserError, identity, reason
from lib.files import write_bytes

WANDB_SECONDS = 15  # to wait for W&B to answer, unless WANDB_INIT_TIMEOUT says otherwise


class Log:
    """A log of JSON lines in a file, and in W&B if asked for. Only the main process writes.

    config: the settings that W&B shows for the run.
    """

    def __init__(self, path: Path, config: dict, wandb: bool = False):
        self.path, self.config, self.wandb, self.run = path, config, wandb, None
        self.active = int(os.environ.get("RANK", 0)) == 0

    def begin(self, past: list[dict]) -> None:
        """Start the file again, with the past lines of a resumed run: one whole run per file."""
        if not self.active:
            return
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in past).encode())
        if self.wandb:
            self.run = start_wandb(self.path.parent, name=self.path.stem, config=self.config)
            for line in past:
                self.run.log(_numbers(line))

    def __call__(self, line: dict) -> None:
        """Append a line."""
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.run:
            self.run.log(_numbers(line))

    def close(self, summary: dict, charts: list[Path] = (), artifact: tuple | None = None) -> None:
        """End the W&B run, if there is one, with these figures as its summary.

        charts: image files that the run shows too. artifact: (file, its metadata) to upload.
        """
        if self.run:
            self.run.summary.update(summary)
            log_charts(self.run, charts)
            if artifact:
                log_artifact(self.run, *artifact)
            finish_wandb(self.run)


def log_stage(cfg, name: str, figures: dict, artifact: tuple | None = None) -> None:
    """Write logs/<name>.jsonl with the one line of a stage that has no epochs, and W&B alike."""
    log = Log(cfg.in_run(f"logs/{name}.jsonl"), identity(cfg), cfg.wandb)
    log.begin([])
    log(figures)
    log.close(figures, artifact=artifact)


def _numbers(line: dict) -> dict:
    """Return what W&B can draw of a line."""
    return {k: v for k, v in line.items() if isinstance(v, (int, float))}


def start_wandb(folder: Path, **options):
    """Start a W&B run: as WANDB_MODE says, else online if there is a key or a login, else offline.

    If that fails (no network, a wrong key), a line says why, and this run and later ones of the
    process are offline. options: of wandb.init. Raises UserError if a run cannot be offline either.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb  # slow to import, and optional
    except ImportError:
        raise UserError("--wandb needs the package wandb: pip install wandb") from None

    def begin(mode: str):
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mobilenetv2-cifar10"), dir=str(folder),
            mode=mode, settings=wandb.Settings(silent=True, init_timeout=timeout), **options,
        )  # fmt: skip

    try:
        timeout = float(os.environ.get("WANDB_INIT_TIMEOUT", WANDB_SECONDS))
    except ValueError as error:
        raise UserError(f"WANDB_INIT_TIMEOUT, in seconds: {error}") from None
    mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_key() else "offline")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return begin(mode)
    except (wandb.Error, ValueError) as error:
        if mode != "online":
            raise UserError(f"W&B does not start, WANDB_MODE={mode}: {reason(error)}") from None
        print(f"W&B: going on offline: {reason(error)}", file=sys.stderr)
    os.environ["WANDB_MODE"] = "offline"  # so that the next run of a sweep does not wait again
    return begin("offline")


def log_charts(run, charts: list[Path]) -> None:
    """Show image files in a W&B run, each under its name without folders."""
    import wandb

    images = {path.stem: wandb.Image(str(path)) for path in charts if path.is_file()}
    if images:
        run.log(images)


def log_artifact(run, path: Path, metadata: dict) -> None:
    """Upload a file as an artifact of a W&B run, under its name without folders."""
    import wandb

    artifact = wandb.Artifact(path.name, type="model", metadata=metadata)
    artifact.add_file(str(path))
    run.log_artifact(artifact)


def _wandb_key() -> bool:
    """Return whether this machine can log in to W&B."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, ValueError):  # no such file, or not of UTF-8
        return "api.wandb.ai" in (Path.home() / ".netrc").read_text()
    return False


def finish_wandb(run) -> None:
    """End a W&B run; if it is offline, say how to upload it."""
    folder = Path(run.dir).parent
    offline = run.settings.mode == "offline"
    run.finish()
    if offline:
        print(f"W&B: the run is offline: wandb sync {folder}", file=sys.stderr)


def read_log(path: Path, torn: bool = False) -> list[dict]:
    """Return the lines of a log; none if there is no file. Raises UserError if it is damaged.

    torn: leave out a last line without its end, as a stage that was killed may leave it.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text().splitlines(keepends=True)
        if torn and lines and not lines[-1].endswith("\n"):
            lines.pop()
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError:  # a stage was killed while it wrote
        raise UserError(f"{path} is damaged: run its stage again") from None
