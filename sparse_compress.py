"""Write a network as one small `.nnz` file, or read one back, without any loss.

    python sparse_compress.py                                   checkpoints/int8.pth to .nnz
    python sparse_compress.py --decompress X.nnz --out Y.pth    back to a checkpoint
    python sparse_compress.py --decompress X.nnz --onnx Y.onnx  to integers for onnxruntime

in:  checkpoints/int8.pth, or another checkpoint, fp32 or quantized: its weights keep their bits
out: checkpoints/compressed.nnz, in the version of FORMAT.md that can hold it; logs/compress.jsonl

Networks of ptq and qat lose the channels that no layer reads (to_int8.py has removed them already),
and the file has the others in an order of its own.
"""

import dataclasses
from pathlib import Path

import torch

from lib import checkpoint, compressed, config, logs, runtime
from lib.config import UserError, flag
from lib.files import printable, sha256_of, write_bytes


@dataclasses.dataclass
class Settings(config.AfterTraining):
    parent: str | None = flag(
        None, "network to compress; default: checkpoints/int8.pth", heading="files and data"
    )
    decompress: str | None = flag(None, "a .nnz file to turn back into a checkpoint")
    out: str | None = flag(None, "output file; default: checkpoints/compressed.nnz")
    onnx: str | None = flag(None, "with --decompress: an .onnx file to write")
    wandb_artifact: bool = flag(
        False, "with --wandb: upload the file too, with its SHA-256 and those of its ancestors"
    )  # fmt: skip

    def __post_init__(self):
        if self.decompress and not (self.out or self.onnx):
            raise ValueError("--decompress needs --out FILE.pth or --onnx FILE.onnx")
        if self.decompress and (self.out or "").endswith(".onnx"):
            raise ValueError("--out is a .pth file; --onnx FILE.onnx writes the graph")
        if self.decompress and self.parent:
            raise ValueError("--parent and --decompress both name what is read: give one of them")
        if self.onnx and not (self.decompress and self.onnx.endswith(".onnx")):
            raise ValueError("--onnx FILE.onnx goes with --decompress FILE.nnz")
        if self.wandb and self.decompress:
            raise ValueError("--wandb is not for --decompress, which measures nothing")
        if self.wandb_artifact and (self.decompress or not self.wandb):
            raise ValueError("--wandb-artifact goes with --wandb, and not with --decompress")


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    if cfg.decompress:
        decompress(cfg)
    else:
        compress(cfg)


def compress(cfg) -> None:
    """Write the parent as a .nnz file, after checking that it decodes to the same tensors."""
    file = cfg.path(cfg.parent, "checkpoints/int8.pth")
    out = cfg.path(cfg.out, "checkpoints/compressed.nnz")
    config.refuse_replacing(out, file)
    parent = checkpoint.load(file, cfg.assume_downsample)
    parent.build()  # or it says what does not fit: no program could use the file
    parent.class_names()  # or a line says whose the file will have
    raw = compressed.encode(parent)
    decoded = compressed.decode(raw)["state"]
    for name, tensor in compressed.stored(parent)[1].items():
        if not torch.equal(decoded[name], tensor):
            raise UserError(f"{name} of {parent.file} would not decode as it is: nothing written")
    write_bytes(out, raw)
    if out.read_bytes() != raw:
        raise UserError(f"{out} does not hold what was written to it")
    version, parts = compressed.version(raw), compressed.part_sizes(raw)
    about = {"sha256": sha256_of(out), "bytes": len(raw), "ancestors": [
        {key: a.get(key) for key in ("stage", "sha256", "bytes")} for a in parent.lineage()
    ]}  # fmt: skip
    figures = {"bytes": len(raw), "version": version, **parts}
    logs.log_stage(cfg, "compress", figures, (out, about) if cfg.wandb_artifact else None)
    text = ", ".join(f"{kind} {size:,}" for kind, size in parts.items())
    print(f"{out}: {len(raw):,} bytes, version {version} ({text}); parent {parent.bytes:,}; "
          "decoded, identical")  # fmt: skip
    for ancestor in parent.lineage():
        if asked := ancestor["metrics"].get("asked"):
            print(f"{ancestor['stage']} for {printable(str(asked))}: {len(raw):,} bytes came")


def decompress(cfg) -> None:
    """Write a .nnz file as a checkpoint, as an .onnx file, or as both."""
    config.refuse_replacing(cfg.out, cfg.decompress)
    source = checkpoint.load(cfg.decompress)
    if source.stage != "compressed":
        raise UserError(f"{cfg.decompress} is not a .nnz file")
    # The last that was no .nnz file: such a file can be encoded again, as a newer version.
    stage = next((a["stage"] for a in source.ancestors[::-1] if a["stage"] != "compressed"), None)
    if cfg.out and not stage:
        raise UserError(f"{cfg.decompress} does not say which stage's file it was made of")
    if cfg.onnx:
        saved = runtime.export(source, Path(cfg.onnx))
        print(f"{cfg.onnx}: {saved.bytes:,} bytes from {source.bytes:,}")
    if cfg.out:
        saved = checkpoint.save(
            Path(cfg.out), stage, source.build(), cfg, source, metrics={},
            data=source.data, quantization=source.quantization, state=source.state,
            parents_seed=True,
        )  # fmt: skip
        print(f"{cfg.out}: {saved.bytes:,} bytes from {source.bytes:,}")


if __name__ == "__main__":
    config.run(main)
