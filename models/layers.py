"""The order of a network's layers: their names, roles, shapes, and places.

    for layer in layers(settings):
        print(layer.name, layer.role, layer.shape, layer.input_place, "->", layer.output_place)

Whatever needs the names and shapes of layers takes them from here.
It works on settings (see models.mobilenetv2.standard), which are plain data, and knows no torch.

Two kinds of names are used for what lies between layers:

- A *place* is the module through which a tensor of activations passes, such as `features.3.stream`;
  a quantizer can stand there. Those of a network, in order: `places(settings)`.
- A *channel group* is a set of channels that several layers share, in the same order: all blocks of
  one residual stream, say. Two layers with the same group have the same channels there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

STEM, EXPAND, DEPTHWISE = "stem", "expand", "depthwise"
PROJECT, HEAD, CLASSIFIER = "project", "head", "classifier"

Group = tuple[str, int]  # ("stem", 0), ("hidden", block), ("stream", block that begins it), ...


@dataclass(frozen=True)
class Layer:
    """A convolution or the classifier."""

    name: str  # of its module: `<name>.weight` is in the state dict
    role: str  # one of the six above
    block: int | None  # number of its block, from 1 as in `features.<block>`; None outside blocks
    shape: tuple[int, ...]  # of its weight: (out, in / groups, height, width) or (out, in)
    stride: int
    norm: str | None  # name of the batch norm after it; None: the classifier's, which has none
    input_place: str
    output_place: str  # "" for the classifier, whose outputs are the logits
    input_group: Group
    output_group: Group

    @property
    def has_relu6(self) -> bool:
        """Whether a ReLU6 follows: nowhere after a linear projection or the classifier."""
        return self.role not in (PROJECT, CLASSIFIER)


def layers(settings: dict) -> list[Layer]:
    """All Conv2d and Linear layers, in the order in which they run."""
    return list(_walk(settings))


def _walk(settings: dict) -> Iterator[Layer]:
    channels, group, stream_place = settings["stem"], ("stem", 0), "features.0.2"
    yield Layer(
        "features.0.0", STEM, None, (channels, 3, 3, 3), settings["stem_stride"], "features.0.1",
        "image", stream_place, ("image", 0), group,
    )  # fmt: skip
    for number, block in enumerate(settings["blocks"], start=1):
        hidden, out, stride = block["hidden"], block["out"], block["stride"]
        residual, prefix = block["residual"], f"features.{number}"
        before = f"{prefix}.input"  # the places before and after a layer
        inner, stream = group, group if residual else ("stream", number)
        position = 0  # in the block's Sequential
        if block["expand"]:
            inner, after = ("hidden", number), f"{prefix}.conv.0.2"
            yield Layer(
                f"{prefix}.conv.0.0", EXPAND, number, (hidden, channels, 1, 1), 1,
                f"{prefix}.conv.0.1", before, after, group, inner,
            )  # fmt: skip
            before, position = after, 1
        after = f"{prefix}.conv.{position}.2"
        yield Layer(
            f"{prefix}.conv.{position}.0", DEPTHWISE, number, (hidden, 1, 3, 3), stride,
            f"{prefix}.conv.{position}.1", before, after, inner, inner,
        )  # fmt: skip
        yield Layer(
            f"{prefix}.conv.{position + 1}", PROJECT, number, (out, hidden, 1, 1), 1,
            f"{prefix}.conv.{position + 2}", after,
            f"{prefix}.addend" if residual else f"{prefix}.stream", inner, stream,
        )  # fmt: skip
        channels, group, stream_place = out, stream, f"{prefix}.stream"
    number, head = len(settings["blocks"]) + 1, settings["head"]
    yield Layer(
        f"features.{number}.0", HEAD, None, (head, channels, 1, 1), 1, f"features.{number}.1",
        stream_place, f"features.{number}.2", group, ("head", 0),
    )  # fmt: skip
    yield Layer(
        "classifier.1", CLASSIFIER, None, (settings["classes"], head), 1, None, "pooled", "",
        ("head", 0), ("classes", 0),
    )  # fmt: skip


def roles(settings: dict) -> dict[str, str]:
    """The role of each layer, by the layer's name."""
    return {layer.name: layer.role for layer in layers(settings)}


def blocks(settings: dict) -> list[list[Layer]]:
    """The layers of each block: expand (not in all), depthwise, project."""
    by_block = [[] for _ in settings["blocks"]]
    for layer in layers(settings):
        if layer.block is not None:
            by_block[layer.block - 1].append(layer)
    return by_block


def places(settings: dict) -> list[str]:
    """All places of activations, in the order in which tensors pass them.

    `image`; after each ReLU6; of each block `input`, what its first layer reads; `addend`, what a
    residual block's projection gives; `stream`, what leaves the block; `pooled`.
    """
    names = ["image", "features.0.2"]
    for number, block_layers in enumerate(blocks(settings), start=1):
        names.append(f"features.{number}.input")
        names += [layer.output_place for layer in block_layers]
        if settings["blocks"][number - 1]["residual"]:  # else the last layer's place is `stream`
            names.append(f"features.{number}.stream")
    return [*names, f"features.{len(settings['blocks']) + 1}.2", "pooled"]
