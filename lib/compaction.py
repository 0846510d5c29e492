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
  block is residual (widths of 0.25 and less), they are the channels of its stream as well, and only
  those that no layer reads are removed.
- A channel of a residual stream is shared by all blocks that add to it. It is constant if no block
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
from models.layers import (
    DEPTHWISE,
    EXPAND,
    HEAD,
    PROJECT,
    STEM,
    Group,
    Layer,
    layers,
)
from models.mobilenetv2 import MobileNetV2


def compact(model: MobileNetV2) -> tuple[MobileNetV2, dict[str, tuple[Tensor | None, ...]]]:
    """Return a copy of the network without its dead channels, and what was kept.

    Returns (smaller, kept). smaller: a new network in the same mode, on the same device, with its
    own settings. kept[name]: for each dimension of that parameter or buffer the indices that stay,
    None for a dimension that never shrinks, so that optimizer state can be cut in the same way
    (`take`). The model itself is not changed. Raises UserError if its batch norms are folded, or if
    other blocks than the first one have no expansion.
    """
    expand = [block.expand is not None for block in model.blocks]
    if model.settings.get("folded") or expand[0] or not all(expand[1:]):
        raise UserError("dead channels are removed from networks with batch norm alone, in "
                        "which each block but the first one expands")  # fmt: skip
    work, network = copy.deepcopy(model).double(), layers(model.settings)
    parts = [
        _Part(layer, work.get_submodule(layer.name), layer.norm and work.get_submodule(layer.norm))
        for layer in network
    ]
    weights = {part.layer.name: part.module.weight for part in parts}
    with torch.no_grad():
        # A list, so that all four run each time.
        while any([
            _absorb_hidden(parts), _absorb_streams(parts), _absorb_head(parts),
            _zero_unread(network, weights),
        ]):  # fmt: skip
            pass
        channels = _kept_channels(network, weights)
    dims = _kept_dims(network, channels)
    dims |= {layer.norm: dims[layer.name][:1] for layer in network if layer.norm}
    state = work.state_dict()
    kept = {name: dims[name.rpartition(".")[0]][: tensor.ndim] for name, tensor in state.items()}
    smaller = MobileNetV2(_resized(model.settings, channels))
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    smaller.load_state_dict({n: take(t, kept[n]).to(dtypes[n]) for n, t in state.items()})
    device = next(model.parameters()).device
    smaller = smaller.to(device, memory_format=torch.channels_last)
    return smaller.train(model.training), kept


def take(tensor: Tensor, kept: tuple[Tensor | None, ...]) -> Tensor:
    """Return the part of a tensor that stays; kept: for each dimension indices, or None for all."""
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
    network = layers(settings)
    weights = {layer.name: state[f"{layer.name}.weight"].clone() for layer in network}
    while _zero_unread(network, weights):
        pass
    channels = _kept_channels(network, weights)
    smaller = _resized(settings, channels)
    if smaller == settings:
        return settings, state
    state = dict(state)
    for name, dims in _kept_dims(network, channels).items():
        state[f"{name}.weight"] = take(state[f"{name}.weight"], dims)
        for part in ("weight_scale", "bias"):
            state[f"{name}.{part}"] = take(state[f"{name}.{part}"], dims[:1])
    return smaller, state


def _read_channels(network: list[Layer], weights: dict[str, Tensor]) -> dict[Group, Tensor]:
    """Return which channels of each group a layer reads, (C,); weights: by name of the layer."""
    read = {}
    for layer in network:
        if layer.role not in (STEM, DEPTHWISE):  # a depthwise layer only hands channels on
            weight = weights[layer.name]
            columns = (weight != 0).reshape(*weight.shape[:2], -1).any(2).any(0)
            read[layer.input_group] = columns | read.get(layer.input_group, columns)
    return read


def _zero_unread(network: list[Layer], weights: dict[str, Tensor]) -> bool:
    """Zero the rows of channels that no layer reads, in place; return whether anything changed."""
    read, changed = _read_channels(network, weights), False
    for layer in network:
        if layer.output_group in read:  # not the logits
            unread = ~read[layer.output_group]
            changed |= bool((weights[layer.name][unread] != 0).any())
            weights[layer.name][unread] = 0
    return changed


def _kept_channels(network: list[Layer], weights: dict[str, Tensor]) -> dict[Group, Tensor]:
    """Return the indices of the channels of each group that are read, or of one channel."""
    return {
        group: is_read.nonzero().flatten() if is_read.any() else torch.tensor([0])
        for group, is_read in _read_channels(network, weights).items()
    }


def _kept_dims(
    network: list[Layer], channels: dict[Group, Tensor]
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Return the rows and the columns of each layer's weight that stay; None: they never go."""
    return {
        layer.name: (
            channels.get(layer.output_group),
            None if layer.role in (STEM, DEPTHWISE) else channels[layer.input_group],
        )
        for layer in network
    }


def _resized(settings: dict, channels: dict[Group, Tensor]) -> dict:
    """Return the settings of a network with these channels alone."""
    resized = copy.deepcopy(settings)
    for layer in layers(settings):
        if layer.role in (STEM, HEAD):
            resized[layer.role] = len(channels[layer.output_group])
        elif layer.role in (DEPTHWISE, PROJECT):
            part = "hidden" if layer.role == DEPTHWISE else "out"
            resized["blocks"][layer.block - 1][part] = len(channels[layer.output_group])
    return resized


class _Part(NamedTuple):
    """A layer of a network, its convolution or linear module, and the batch norm after it."""

    layer: Layer
    module: nn.Module
    norm: nn.BatchNorm2d | None


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


def _absorb_hidden(parts: list[_Part]) -> bool:
    """Absorb constant hidden channels into the projections, in place; return whether any was."""
    changed, producer = False, None
    for part in parts:
        role = part.layer.role
        if role in (STEM, EXPAND):
            producer = part
        elif role == DEPTHWISE:
            depthwise = part
        elif role == PROJECT and part.layer.input_group != part.layer.output_group:
            filters = depthwise.module.weight
            centre = filters[:, 0, 1, 1]
            only_centre = (filters != 0).flatten(1).sum(1) == (centre != 0)
            input_value = _constant(producer.norm).clamp(0, 6)  # where the producer's row is 0
            uniform = _dead_rows(producer.module) & (only_centre | (input_value == 0))
            zero_filter = _dead_rows(depthwise.module)
            sums = torch.where(zero_filter, torch.zeros_like(input_value), centre * input_value)
            output_value = _constant(depthwise.norm, sums).clamp(0, 6)
            changed |= _absorb_constants(
                part.module, part.norm, output_value, uniform | zero_filter
            )
    return changed


def _absorb_streams(parts: list[_Part]) -> bool:
    """Absorb constant channels of streams into the layers that read them, in place.

    Returns whether any was. A stream of the stem's channels is left as it is.
    """
    changed = False
    stem_group = parts[0].layer.output_group
    groups = dict.fromkeys(p.layer.output_group for p in parts if p.layer.role == PROJECT)
    for group in (group for group in groups if group != stem_group):
        writers = [part for part in parts if part.layer.output_group == group]
        unwritten = torch.stack([_dead_rows(writer.module) for writer in writers]).all(0)
        constant = torch.zeros_like(writers[0].norm.bias)
        for part in parts:  # in the order in which they run
            if part.layer.input_group == group:
                changed |= _absorb_constants(part.module, part.norm, constant, unwritten)
            if part.layer.output_group == group:
                constant = constant + _constant(part.norm)
    return changed


def _absorb_head(parts: list[_Part]) -> bool:
    """Absorb constant channels of the head into the classifier's bias; return whether any was."""
    *_, head, classifier = parts
    constant = _constant(head.norm).clamp(0, 6)
    return _absorb_constants(classifier.module, None, constant, _dead_rows(head.module))
