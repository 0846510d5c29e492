"""Remove the channels that pruning left dead, exactly: a smaller network with the same outputs.

A channel can be removed if no layer reads it, or if it has the same constant value at every
position. In the second case what it adds to the sums of the layer that reads it is a constant too,
which goes into that layer's batch norm: the running mean moves by it. (Batch norm stays, so that
training can continue; in training mode the batch mean removes the constant in any case.) Behind the
head it goes into the classifier's bias.

- A hidden channel (expand row, depthwise filter, project column) is constant where its depthwise
  filter is zero, or where its expand row is zero and the constant that batch norm and ReLU6 then
  give passes the depthwise filter unchanged by the zero padding: it is 0, or only the filter's
  centre tap is non-zero. A positive constant under any other filter is uneven at the border, and
  stays a channel.
- The stem's channels are the hidden channels of the first block, which has no expansion. If that
  block is residual (widths of 0.25 and less), they are the channels of its stream as well, and all
  three are left as they are.
- A channel of a residual stream is shared by all blocks of its stage. It is constant if no block
  writes it (each block still adds the constant of its batch norm), and unread if every layer that
  reads the stream has zeros in its column.
- A head channel is constant if its row is zero.

One removal may make others possible, before and after it: the rules are repeated until nothing
changes. All sums are in float64; the shifted means and biases are rounded back to float32.

Quantization zeroes further weights. From a quantized network, `without_unread` removes the channels
that no layer reads. Constant ones stay, since a bias may be unable to hold their value.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib.config import UserError
from models.layers import DEPTHWISE, HEAD, PROJECT, STEM, layers
from models.mobilenetv2 import MobileNetV2


def compact(model: MobileNetV2) -> tuple[MobileNetV2, dict[str, tuple[Tensor | None, ...]]]:
    """Return a copy of the network without its dead channels, and what was kept.

    Returns (smaller, kept). smaller: a new network in the same mode, on the same device, with its
    own settings. kept[name]: for each dimension of that parameter or buffer the indices that stay,
    None for all, so that optimizer state can be cut in the same way (`take`). The model itself is
    not changed.
    """
    work = copy.deepcopy(model).double()
    parts = _Parts(work)
    with torch.no_grad():
        # A list, so that all three run each time.
        while any([_simplify_hidden(parts), _simplify_streams(parts), _simplify_head(parts)]):
            pass
        channels = parts.kept_channels()
    kept = _indices(work, parts, channels)
    settings = copy.deepcopy(model.settings)
    settings["stem"] = len(channels["hidden"][0])
    settings["head"] = len(channels["head"])
    for number, block in enumerate(settings["blocks"]):
        block["hidden"] = len(channels["hidden"][number])
        block["out"] = len(channels["stream"][number])
    smaller = MobileNetV2(settings)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    smaller.load_state_dict(
        {n: take(t, kept[n]).to(dtypes[n]) for n, t in work.state_dict().items()}
    )
    device = next(model.parameters()).device
    smaller = smaller.to(device, memory_format=torch.channels_last)
    return smaller.train(model.training), kept


def take(tensor: Tensor, kept: tuple[Tensor | None, ...]) -> Tensor:
    """Return the part of a tensor that stays; kept: indices or None (all) for each dimension."""
    for dim, index in enumerate(kept):
        if index is not None:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def without_unread(settings: dict, state: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Return settings and state of a quantized network without the channels that no layer reads.

    state: tensors named `<layer>.weight`, `<layer>.weight_scale` and `<layer>.bias`, weights as
    levels or as floats, and any without channels. Both are new where something changed. A group of
    channels keeps at least one.
    """
    while True:
        network, read = layers(settings), {}
        for layer in network:
            if layer.role not in (STEM, DEPTHWISE):  # a depthwise layer only hands channels on
                weight = state[f"{layer.name}.weight"]
                columns = (weight != 0).reshape(*weight.shape[:2], -1).any(2).any(0)
                read[layer.input_group] = columns | read.get(layer.input_group, columns)
        kept = {}
        for group, is_read in read.items():
            if not is_read.all() and len(is_read) > 1:
                kept[group] = is_read.nonzero().flatten() if is_read.any() else torch.tensor([0])
        if not kept:
            return settings, state
        settings, state = copy.deepcopy(settings), dict(state)
        for layer in network:
            rows = kept.get(layer.output_group)
            columns = None if layer.role in (STEM, DEPTHWISE) else kept.get(layer.input_group)
            for part, index in (
                ("weight", (rows, columns)), ("weight_scale", (rows,)), ("bias", (rows,))
            ):  # fmt: skip
                name = f"{layer.name}.{part}"
                state[name] = take(state[name], index)
            width = len(state[f"{layer.name}.bias"])
            if layer.role in (STEM, HEAD):
                settings[layer.role] = width
            elif layer.role in (DEPTHWISE, PROJECT):
                part = "hidden" if layer.role == DEPTHWISE else "out"
                settings["blocks"][layer.block - 1][part] = width


class _Block(NamedTuple):
    """The layers of a block; `producer` makes its hidden channels: its expansion, or the stem."""

    producer: nn.Conv2d
    producer_norm: nn.BatchNorm2d
    depthwise: nn.Conv2d
    depthwise_norm: nn.BatchNorm2d
    project: nn.Conv2d
    project_norm: nn.BatchNorm2d
    residual: bool


class _Parts:
    """The layers of a network by their role, and the blocks that share a residual stream."""

    def __init__(self, model: MobileNetV2):
        self.classifier = model.linear
        self.head, self.head_norm = model.head.conv, model.head.norm
        self.blocks: list[_Block] = []
        expand = [block.expand is not None for block in model.blocks]
        if model.settings.get("folded") or expand[0] or not all(expand[1:]):
            raise UserError("dead channels are removed from networks with batch norm alone, in "
                            "which each block but the first one expands")  # fmt: skip
        for block in model.blocks:
            producer = block.expand or model.stem
            self.blocks.append(_Block(
                producer.conv, producer.norm, block.depthwise.conv, block.depthwise.norm,
                block.project, block.project_norm, block.residual,
            ))  # fmt: skip
        # Each stream: the blocks that write it. A block that is not residual begins a new one.
        self.streams: list[list[int]] = []
        for number, block in enumerate(self.blocks):
            if not block.residual or number == 0:
                self.streams.append([])
            self.streams[-1].append(number)

    @property
    def first_is_residual(self) -> bool:
        """Return whether the first block adds the stem's output to its own.

        If so, the stem's channels, the block's hidden channels and those of its stream are the
        same channels.
        """
        return self.blocks[0].residual

    def reader(self, number: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """Return the layer, and its norm, that reads the stream after block `number`."""
        if number + 1 == len(self.blocks):
            return self.head, self.head_norm
        after = self.blocks[number + 1]
        return after.producer, after.producer_norm

    def kept_channels(self) -> dict:
        """Return the indices of the channels that are still read, at least one per group."""

        def read_channels(*readers: Tensor) -> Tensor:
            read = torch.stack([(w != 0).flatten(2).any(2).any(0) for w in readers]).any(0)
            return read.nonzero().flatten() if read.any() else torch.zeros(1, dtype=torch.long)

        hidden = [read_channels(block.project.weight) for block in self.blocks]
        stream = {}
        for blocks in self.streams:
            index = read_channels(*(self.reader(b)[0].weight for b in blocks))
            stream |= dict.fromkeys(blocks, index)
        if self.first_is_residual:
            everything = torch.arange(len(self.blocks[0].producer.weight))
            hidden[0] = everything
            stream |= dict.fromkeys(self.streams[0], everything)
        head = read_channels(self.classifier.weight[:, :, None])
        return {"hidden": hidden, "stream": stream, "head": head}


def _constant(norm: nn.BatchNorm2d, inputs: Tensor | float = 0.0) -> Tensor:
    """Return what batch norm in eval mode makes of constant inputs (C,)."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return norm.bias + (inputs - norm.running_mean) * scale


def _dead_rows(layer: nn.Module) -> Tensor:
    return (layer.weight == 0).flatten(1).all(1)


def _absorb_constants(
    layer: nn.Module, norm: nn.BatchNorm2d | None, constant: Tensor, where: Tensor
) -> bool:
    """Move the effect of a layer's constant input channels into its norm or bias.

    constant: (in,), the value of each channel; where: (in,), which of them are constant. The
    columns of those become zero. norm None: the classifier. Returns whether anything changed.
    """
    columns = layer.weight.flatten(1)  # a 1x1 convolution or a linear layer
    if not (columns[:, where] != 0).any():
        return False
    shift = columns[:, where] @ constant[where]
    if norm is None:
        layer.bias += shift
    else:
        norm.running_mean -= shift
    layer.weight[:, where] = 0
    return True


def _stop_writing(layer: nn.Module, where: Tensor) -> bool:
    """Zero the rows of a layer that no layer reads; return whether anything changed."""
    if not (layer.weight[where] != 0).any():
        return False
    layer.weight[where] = 0
    return True


def _simplify_hidden(parts: _Parts) -> bool:
    """Absorb constant hidden channels into the projections, zero the rows of unread ones, in place.

    Returns whether anything changed.
    """
    changed = False
    for block in parts.blocks[parts.first_is_residual :]:
        centre = block.depthwise.weight[:, 0, 1, 1]
        only_centre = (block.depthwise.weight != 0).flatten(1).sum(1) == (centre != 0)
        input_value = _constant(block.producer_norm).clamp(0, 6)  # where the producer's row is 0
        uniform = _dead_rows(block.producer) & (only_centre | (input_value == 0))
        zero_filter = _dead_rows(block.depthwise)
        sums = torch.where(zero_filter, torch.zeros_like(input_value), centre * input_value)
        output_value = _constant(block.depthwise_norm, sums).clamp(0, 6)
        changed |= _absorb_constants(
            block.project, block.project_norm, output_value, uniform | zero_filter
        )
        unread = (block.project.weight == 0).flatten(1).all(0)
        changed |= _stop_writing(block.depthwise, unread)
        changed |= _stop_writing(block.producer, unread)
    return changed


def _simplify_streams(parts: _Parts) -> bool:
    """Absorb constant stream channels into the layers that read them, zero unread rows, in place.

    Returns whether anything changed.
    """
    changed = False
    for numbers in parts.streams[parts.first_is_residual :]:
        writers = [(parts.blocks[n].project, parts.blocks[n].project_norm) for n in numbers]
        readers = [parts.reader(n) for n in numbers]
        unwritten = torch.stack([_dead_rows(project) for project, _ in writers]).all(0)
        constant = torch.zeros_like(writers[0][1].bias)
        for (_, norm), (layer, layer_norm) in zip(writers, readers, strict=True):
            constant = constant + _constant(norm)
            changed |= _absorb_constants(layer, layer_norm, constant, unwritten)
        unread = torch.stack([(w.weight == 0).flatten(1).all(0) for w, _ in readers]).all(0)
        for project, _ in writers:
            changed |= _stop_writing(project, unread)
    return changed


def _simplify_head(parts: _Parts) -> bool:
    """Absorb constant head channels into the classifier's bias, zero unread rows, in place.

    Returns whether anything changed.
    """
    constant = _constant(parts.head_norm).clamp(0, 6)
    changed = _absorb_constants(parts.classifier, None, constant, _dead_rows(parts.head))
    unread = (parts.classifier.weight == 0).all(0)
    return _stop_writing(parts.head, unread) or changed


def _indices(model: nn.Module, parts: _Parts, channels: dict) -> dict:
    """Return, per tensor of the state dict, the indices that stay in each of its dimensions."""
    rows, columns = {}, {}  # by module
    hidden, stream = channels["hidden"], channels["stream"]
    for number, block in enumerate(parts.blocks):
        for module in (
            block.producer, block.producer_norm, block.depthwise, block.depthwise_norm
        ):  # fmt: skip
            rows[module] = hidden[number]
        rows[block.project] = rows[block.project_norm] = stream[number]
        columns[block.project] = hidden[number]
        columns[parts.reader(number)[0]] = stream[number]
    rows[parts.head] = rows[parts.head_norm] = columns[parts.classifier] = channels["head"]
    kept = {}
    for prefix, module in model.named_modules():
        parameters = module.named_parameters(recurse=False)
        for name, tensor in [*parameters, *module.named_buffers(recurse=False)]:
            dims = (rows.get(module), columns.get(module) if tensor.ndim > 1 else None)
            kept[f"{prefix}.{name}"] = dims[: tensor.ndim]
    return kept
