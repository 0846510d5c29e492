"""lib/nnz/order.py: what the order of channels carries comes back, from any order, and no network
has two files."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import reference_decoder

from benchmarks.nnz_file import made_up
from lib.nnz import frame, order, v2, v3
from lib.nnz.frame import Malformed

FORMAT = (Path(__file__).parent.parent / "FORMAT.md").read_text()


def two_layers(channels, draw, twins=0):
    """A group that is the rows of one layer and the columns of the next, in the order of its keys;
    `twins` of its channels share their key with another."""
    first = draw.integers(-7, 8, (channels, 9))
    second = draw.integers(-7, 8, (4, channels))
    for i in range(twins):
        first[i + twins], second[:, i + twins] = first[i], second[:, i]
    groups = [("g", None), (None, "g")]
    matrices = [first, second]
    return order.permute(matrices, groups, order.by_key(matrices, groups)), groups


@pytest.mark.parametrize(("channels", "twins"), [(1, 0), (2, 1), (6, 0), (40, 7), (1300, 20)])
@pytest.mark.parametrize("length", [0, 1, 5, 3000])
def test_what_is_carried_comes_back(channels, twins, length):
    draw = np.random.default_rng(channels + length)
    matrices, groups = two_layers(channels, draw, twins)
    data = draw.bytes(length)
    carried, rest = order.carry(data, matrices, groups)
    again, collected = order.collect(carried, groups)
    assert all(map(np.array_equal, again, matrices))
    assert (collected + rest)[:length] == data and not any((collected + rest)[length:])
    single = channels - 2 * twins
    possible = math.lgamma(single + 1) / math.log(2) / 8  # bytes
    # A byte at most is lost per 4,096 bits or more.
    assert possible - 1 - possible / 512 <= len(collected) <= possible
    assert rest == data[len(collected) :]


def test_example_of_the_text():
    text = FORMAT[FORMAT.index("Example: 6 single channels") : FORMAT.index("## 5. The coder")]
    byte = int(re.search(r"carry the byte (\d+)", text)[1])
    digits = [int(d) for d in re.search(r"The digits ([\d, ]+) stand", text)[1].split(",")]
    numbers = [int(n) for n in re.search(r"numbers\s+([\d, ]+)\.", text)[1].split(",")]
    assert order._digits(bytes([byte]), [6, 5, 4, 3, 2, 1]) == (digits, 1)
    matrices, groups = two_layers(6, np.random.default_rng(0))
    carried, _ = order.carry(bytes([byte]), matrices, groups)
    assert np.array_equal(carried[0], matrices[0][numbers])


def shuffled(meta, tensors, draw):
    """The same network with its channels in another order."""
    network = v2.layers(meta["settings"])
    groups = v2.kinds_and_groups(network)[1]
    orders, other = {}, dict(tensors)
    for layer, (rows, columns) in zip(network, groups, strict=True):
        name = f"{layer.name}.weight"
        if rows:
            index = orders.setdefault(rows, draw.permutation(layer.shape[0]))
            for part in ("weight", "weight_scale", "bias"):
                other[f"{layer.name}.{part}"] = other[f"{layer.name}.{part}"][index]
        if columns:
            index = orders.setdefault(columns, draw.permutation(layer.shape[1]))
            other[name] = np.ascontiguousarray(other[name][:, index])
    return other


@pytest.mark.parametrize("seed", range(5))
def test_every_order_of_a_network_makes_the_same_file(seed):
    """Without twins, of which any may be the first."""
    meta, tensors = made_up(seed, 8)
    draw = np.random.default_rng(seed)
    for value in tensors.values():
        if value.dtype == np.int8:
            value[value == 0] = draw.choice([-3, 5], value[value == 0].shape)
    raw = v3.encode(meta, tensors)
    others = [v3.encode(meta, shuffled(meta, tensors, draw)) for _ in range(3)]
    assert others == [raw] * 3
    assert v3.encode(*v3.decode(raw)) == raw


def test_a_file_is_smaller_by_what_its_order_carries():
    """And no larger where there is less to carry than its order could."""
    draw = np.random.default_rng(0)
    meta, tensors = made_up(1, 8)
    wide = meta["settings"] | {"head": 400}
    meta = meta | {"settings": wide}
    tensors = {
        name: draw.normal(size=shape).astype(np.float32) if kind == "float32"
        else draw.integers(-127, 128, shape).astype(kind)
        for name, (kind, shape) in v2.tensors_of(wide, meta["quantization"]).items()
    }  # fmt: skip
    payloads = frame.unpack(v3.encode(meta, tensors))
    network = v2.layers(wide)
    matrices = [tensors[f"{x.name}.weight"].reshape(v2.matrix_shape(x)) for x in network]
    side = v2.pack_side(meta, matrices, tensors)
    assert len(side) - len(payloads["REST"]) >= math.lgamma(401) / math.log(2) / 8 - 3
    for value in tensors.values():  # next to nothing to say of the floats
        if value.dtype == np.float32:
            value[...] = 1
    payloads = frame.unpack(v3.encode(meta, tensors))
    assert len(payloads["REST"]) == 0
    v3.decode(v3.encode(meta, tensors))
    slow, _ = reference_decoder.decode_quantized(v3.encode(meta, tensors))
    assert slow["features.4.0.bias"] == [0x3F800000] * 400


def test_orders_of_no_file_are_refused():
    matrices, groups = two_layers(6, np.random.default_rng(1), twins=1)
    carried, _ = order.carry(b"", matrices, groups)
    order.collect(carried, groups)
    front = order.permute(carried, groups, {"g": np.roll(np.arange(6), 1)})  # a twin comes first
    with pytest.raises(Malformed, match="one key"):
        order.collect(front, groups)
    matrices, groups = two_layers(6, np.random.default_rng(1))
    last = order.permute(matrices, groups, {"g": np.arange(6)[::-1]})  # number 719: no byte
    with pytest.raises(Malformed, match="stands for no bytes"):
        order.collect(last, groups)
    assert order.collect(matrices, groups)[1] == b"\0"


def test_bytes_that_are_left_over_must_be_zeros():
    """If nothing is left in REST, the order may carry more than there is to carry."""
    with pytest.raises(Malformed):
        v2.parse_side(b"\1" + bytes(6) + b"\1", padded=True)
    v2.parse_side(b"\1" + bytes(6) + b"\0", padded=True)
    with pytest.raises(Malformed):
        v2.parse_side(b"\1" + bytes(6) + b"\0")
