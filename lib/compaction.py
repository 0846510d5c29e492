"""Remove the channels that pruning left dead, exactly: a smaller network with the same outputs.

A channel can go when nobody reads it, or when it is the same constant at every position: then what
it adds to its reader's sums is a constant too, and goes into the reader's batch norm (the running
mean moves by it, so BN stays and training can go on: in training mode the batch mean takes it out
either way) or, behind the head, into the classifier's bias.

- A hidden channel (expand row, depthwise filter, project column) is constant where its depthwise
  filter is zero, or where its expand row is zero and the constant that leaves (BN's, through ReLU6)
  passes the depthwise filter unchanged by the zero padding: it is 0, or only the centre tap is not.
  A positive constant under any other filter is uneven at the border, and stays a channel.
- The stem's channels are the hidden ones of the first block, which has no expansion. Where that
  block is residual (widths of 0.25 and less), they are those of its stream as well: all three stay.
- A channel of a residual stream is shared by all blocks of its stage. It is constant where no block
  writes it (each adds its BN's constant), and unread where no following layer has a column for it.
- A head channel is constant where its row is zero.

Each removal may free others, upstream and downstream: repeated until nothing changes. All sums are
in float64; what is rounded back to float32 are the shifted means and biases.
"""

import copy

import torch
from torch import Tensor, nn

from models.mobilenetv2 import MobileNetV2


def compact(model: MobileNetV2) -> tuple[MobileNetV2, dict[str, tuple[Tensor | None, ...]]]:
    """The network without its dead channels, and which of them live.

    Returns (smaller, kept): a new network of the same mode and device with settings of its own;
    kept[name] has for each dimension of that parameter or buffer the indices that stay, None for
    all, so that optimizer state can follow (`take`). The model itself is left as it was.
    """
    work = copy.deepcopy(model).double()
    parts = _Parts(work)
    with torch.no_grad():
        while any([_hidden(parts), _streams(parts), _head(parts)]):  # all of them, each time
            pass
        live = parts.live()
    kept = _indices(work, parts, live)
    settings = copy.deepcopy(model.settings)
    settings["stem"] = len(live["hidden"][0])
    settings["head"] = len(live["head"])
    for number, block in enumerate(settings["blocks"]):
        block["hidden"] = len(live["hidden"][number])
        block["out"] = len(live["stream"][number])
    smaller = MobileNetV2(settings)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    smaller.load_state_dict(
        {n: take(t, kept[n]).to(dtypes[n]) for n, t in work.state_dict().items()}
    )
    device = next(model.parameters()).device
    smaller = smaller.to(device, memory_format=torch.channels_last)
    return smaller.train(model.training), kept


def take(tensor: Tensor, kept: tuple[Tensor | None, ...]) -> Tensor:
    """The part of a tensor that stays: kept has an index, or None, for each dimension."""
    for dim, index in enumerate(kept):
        if index is not None:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


class _Parts:
    """The layers of a network by their part in it."""

    def __init__(self, model: MobileNetV2):
        features = model.features
        self.classifier = model.classifier[1]
        self.head, self.head_norm = features[-1][0], features[-1][1]
        self.blocks = []  # (producer, its norm, depthwise, its norm, project, its norm, residual)
        for number, block in enumerate(features[1:-1]):
            layers = list(block.conv)
            expand = layers.pop(0) if len(layers) == 4 else features[0]
            assert len(layers) == 3 and (number == 0) == (expand is features[0])
            depthwise, project, norm = layers
            self.blocks.append(
                (expand[0], expand[1], depthwise[0], depthwise[1], project, norm, block.residual)
            )
        # Each stream: the blocks that write it. A block that is not residual begins a new one.
        self.streams = []
        for number, block in enumerate(self.blocks):
            if not block[-1] or number == 0:
                self.streams.append([])
            self.streams[-1].append(number)

    @property
    def first_is_residual(self) -> bool:
        """Whether the first block adds the stem's output: then stem, hidden channels and stream are
        the same channels."""
        return self.blocks[0][-1]

    def reader(self, number: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """Who reads the stream behind block `number`, beside later adds to it."""
        after = number + 1
        return self.blocks[after][:2] if after < len(self.blocks) else (self.head, self.head_norm)

    def live(self) -> dict:
        """Indices of the channels that are still read; one at the least in each place."""

        def alive(*readers: Tensor) -> Tensor:
            read = torch.stack([(w != 0).flatten(2).any(2).any(0) for w in readers]).any(0)
            return read.nonzero().flatten() if read.any() else torch.zeros(1, dtype=torch.long)

        hidden = [alive(block[4].weight) for block in self.blocks]
        stream = {}
        for blocks in self.streams:
            index = alive(*(self.reader(b)[0].weight for b in blocks))
            stream |= dict.fromkeys(blocks, index)
        if self.first_is_residual:
            everything = torch.arange(len(self.blocks[0][0].weight))
            hidden[0] = everything
            stream |= dict.fromkeys(self.streams[0], everything)
        head = alive(self.classifier.weight[:, :, None])
        return {"hidden": hidden, "stream": stream, "head": head}


def _constant(norm: nn.BatchNorm2d, inputs: Tensor | float = 0.0) -> Tensor:
    """What batch norm, in eval mode, makes of constant inputs (C,)."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return norm.bias + (inputs - norm.running_mean) * scale


def _dead_rows(layer: nn.Module) -> Tensor:
    return (layer.weight == 0).flatten(1).all(1)


def _fold(layer: nn.Module, norm: nn.BatchNorm2d | None, constant: Tensor, where: Tensor) -> bool:
    """Let a reader know its constant inputs, and read them no longer. Whether that changed it."""
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
    """Zero the rows that nobody reads. Whether that changed them."""
    if not (layer.weight[where] != 0).any():
        return False
    layer.weight[where] = 0
    return True


def _hidden(parts: _Parts) -> bool:
    changed = False
    for produce, produce_norm, depthwise, norm, project, project_norm, _ in parts.blocks[
        parts.first_is_residual :
    ]:
        centre = depthwise.weight[:, 0, 1, 1]
        only_centre = (depthwise.weight != 0).flatten(1).sum(1) == (centre != 0)
        enters = _constant(produce_norm).clamp(0, 6)
        even = _dead_rows(produce) & (only_centre | (enters == 0))
        silent = _dead_rows(depthwise)
        inputs = torch.where(silent, torch.zeros_like(enters), centre * enters)
        leaves = _constant(norm, inputs).clamp(0, 6)
        changed |= _fold(project, project_norm, leaves, even | silent)
        unread = (project.weight == 0).flatten(1).all(0)
        changed |= _stop_writing(depthwise, unread)
        changed |= _stop_writing(produce, unread)
    return changed


def _streams(parts: _Parts) -> bool:
    changed = False
    for numbers in parts.streams[parts.first_is_residual :]:
        writers = [parts.blocks[n][4:6] for n in numbers]
        readers = [parts.reader(n) for n in numbers]
        unwritten = torch.stack([_dead_rows(project) for project, _ in writers]).all(0)
        constant = torch.zeros_like(writers[0][1].bias)
        for (_, norm), (layer, layer_norm) in zip(writers, readers, strict=True):
            constant = constant + _constant(norm)
            changed |= _fold(layer, layer_norm, constant, unwritten)
        unread = torch.stack([(w.weight == 0).flatten(1).all(0) for w, _ in readers]).all(0)
        for project, _ in writers:
            changed |= _stop_writing(project, unread)
    return changed


def _head(parts: _Parts) -> bool:
    constant = _constant(parts.head_norm).clamp(0, 6)
    changed = _fold(parts.classifier, None, constant, _dead_rows(parts.head))
    unread = (parts.classifier.weight == 0).all(0)
    return _stop_writing(parts.head, unread) or changed


def _indices(model: nn.Module, parts: _Parts, live: dict) -> dict:
    """For each tensor of the state dict, the indices that stay in each of its dimensions."""
    rows, columns = {}, {}  # by module
    hidden, stream = live["hidden"], live["stream"]
    for number, (produce, produce_norm, depthwise, norm, project, project_norm, _) in enumerate(
        parts.blocks
    ):
        for module in (produce, produce_norm, depthwise, norm):
            rows[module] = hidden[number]
        rows[project] = rows[project_norm] = stream[number]
        columns[project] = hidden[number]
        columns[parts.reader(number)[0]] = stream[number]
    rows[parts.head] = rows[parts.head_norm] = columns[parts.classifier] = live["head"]
    kept = {}
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            dims = (rows.get(module), columns.get(module) if tensor.ndim > 1 else None)
            kept[f"{prefix}.{name}"] = dims[: tensor.ndim]
    return kept
