"""lib/compaction.py: a smaller network, the same function, whatever is dead or unread."""

import copy

import pytest
import torch
from torch import nn

from lib import integer, metrics, ptq, quantizers
from lib.compaction import compact, take, without_unread
from lib.config import UserError
from lib.metrics import weight_layers
from models.layers import DEPTHWISE, layers
from models.mobilenetv2 import MobileNetV2, standard


def random_network(seed: int, width: float = 0.25) -> MobileNetV2:
    """Random weights and statistics; random rows, columns and filters zero; positive constants."""
    torch.manual_seed(seed)
    model = MobileNetV2(standard(width, 8, dropout=0.0)).eval()
    share = 0.3 + 0.6 * torch.rand(()).item()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(-1.5, 1.5)
                module.bias.uniform_(-1, 2)
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.2, 2)
        for layer in metrics.weight_layers(model).values():
            weight = layer.weight
            weight.mul_(torch.rand_like(weight) > 0.3)
            weight[torch.rand(len(weight)) < share] = 0
            if weight.shape[1] > 1:
                weight[:, torch.rand(weight.shape[1]) < share / 2] = 0
            elif weight.ndim == 4:  # some depthwise filters of a centre alone
                centre = weight[:, :, 1:2, 1:2].clone()
                alone = (torch.rand(len(weight)) < 0.2).nonzero().flatten()
                weight[alone] = 0
                weight[alone, :, 1:2, 1:2] = centre[alone]
        # Whole streams too: channels that no block writes, or none reads.
        for first, last in ((4, 6), (11, 13)):
            for number in range(first, last + 1):
                model.features[number].conv[2].weight[: 3 + seed % 3] = 0
    return model


@pytest.mark.parametrize("seed", range(12))
def test_same_outputs_from_a_smaller_network(seed):
    model = random_network(seed)
    before = copy.deepcopy(model.state_dict())
    smaller, kept = compact(model)
    images = torch.randn(32, 3, 32, 32)
    with torch.no_grad():
        expected, found = model(images), smaller(images)
    assert (expected - found).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(expected.argmax(1), found.argmax(1))
    assert metrics.macs(smaller.settings) < metrics.macs(model.settings)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k: take(v, kept[k]).shape for k, v in before.items()} == {
        k: v.shape for k, v in smaller.state_dict().items()
    }
    # Nothing is left to do, and the settings rebuild it.
    again, _ = compact(smaller)
    assert again.settings == smaller.settings
    MobileNetV2(smaller.settings).load_state_dict(smaller.state_dict())


@pytest.mark.parametrize("seed", range(3))
def test_in_training_mode_and_its_gradients_too(seed):
    """A folded constant moves the running mean alone, so batch statistics give the same outputs."""
    model = random_network(seed)
    with torch.no_grad():  # BN of a constant channel in training mode is its bias: fold that
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.zero_()
    model, (smaller, kept) = model.double(), compact(model.double())
    smaller = smaller.double()
    images = torch.randn(16, 3, 32, 32).double()
    outputs = [m.train()(images) for m in (model, smaller)]
    assert torch.allclose(*outputs, atol=1e-6)
    for m, out in zip((model, smaller), outputs, strict=True):
        m.zero_grad()
        out.square().sum().backward()
    name = "features.9.conv.1.0.weight"
    a, b = (dict(m.named_parameters())[name].grad for m in (model, smaller))
    assert torch.allclose(take(a, kept[name]), b, rtol=1e-4, atol=1e-6)


def test_a_constant_that_padding_makes_uneven_stays():
    model = MobileNetV2(standard(0.1, 8)).eval()
    block = model.features[2].conv
    with torch.no_grad():
        block[0][0].weight[:3] = 0
        block[0][1].bias[:3] = torch.tensor([1.0, 0.0, 1.0])
        block[1][0].weight[2] = 0
        block[1][0].weight[2, 0, 1, 1] = 0.5  # the centre alone: even, so it can go
    hidden = model.settings["blocks"][1]["hidden"]
    _, kept = compact(model)
    gone = set(range(hidden)) - set(kept["features.2.conv.1.0.weight"][0].tolist())
    assert gone == {1, 2}


def test_networks_of_another_shape_are_refused():
    expanding = standard(0.25)
    expanding["blocks"][0]["expand"] = True
    for settings in (expanding, standard(0.25) | {"folded": True}):
        with pytest.raises(UserError, match="dead channels are removed from networks with batch"):
            compact(MobileNetV2(settings))


def test_a_dense_network_is_left_as_it_is():
    model = MobileNetV2(standard(0.25)).eval()
    smaller, _ = compact(model)
    assert smaller.settings == model.settings
    assert all(torch.equal(v, smaller.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_dead_network_still_is_one():
    model = MobileNetV2(standard(0.35)).eval()
    with torch.no_grad():
        for layer in metrics.weight_layers(model).values():
            layer.weight.zero_()
        model.classifier[1].bias.copy_(torch.arange(10.0))
    smaller, _ = compact(model)
    assert torch.equal(smaller(torch.randn(2, 3, 32, 32)), model(torch.randn(2, 3, 32, 32)))
    assert metrics.macs(smaller.settings) < metrics.macs(model.settings) / 50


def test_a_residual_first_block_loses_only_channels_that_no_layer_reads():
    """At widths of 0.25 and less the first block adds the stem's outputs to its own."""
    torch.manual_seed(0)
    model = MobileNetV2(standard(0.25, 8)).eval()
    assert model.settings["blocks"][0]["residual"]
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-0.5, 1.5)
        for layer in weight_layers(model).values():
            layer.weight[torch.rand(len(layer.weight)) < 0.3] = 0
            if layer.weight.shape[1] > 1:
                layer.weight[:, torch.rand(layer.weight.shape[1]) < 0.3] = 0
        project, *others = (
            model.get_submodule(layer.name).weight for layer in layers(model.settings)
            if layer.input_group == ("stem", 0) and layer.role != DEPTHWISE
        )  # fmt: skip
        project[:, :7], project[:, 7] = 1, 0
        for weight in others:
            weight[:, :6], weight[:, 6:] = 1, 0  # so no layer reads channel 7
    x = torch.randn(4, 3, 32, 32)
    smaller, _ = compact(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(smaller(x), expected, atol=1e-5 * expected.abs().max())
    widths = [block["hidden"] for block in smaller.settings["blocks"]]
    first = smaller.settings["blocks"][0]
    assert smaller.settings["stem"] == first["hidden"] == first["out"] == 7
    assert sum(widths[1:]) < sum(block["hidden"] for block in model.settings["blocks"][1:])


@pytest.mark.parametrize("seed", range(3))
def test_a_quantized_network_computes_the_same_without_unread_channels(small, pixels, seed):
    model = small(seed)
    with torch.no_grad():
        model.classifier[1].weight[:, ::3] = 0
        model.features[7][0].weight[:, 5] = 0  # the only layer that reads the last stream
    scheme = ptq.make_scheme(8, 8)
    model, _ = ptq.quantize(model, pixels[:16], scheme)
    levels = quantizers.integer_state(model.state_dict(), scheme)
    settings, state = without_unread(model.settings, levels)
    assert settings["head"] < 32 and settings["blocks"][5]["out"] < 16
    smaller = MobileNetV2(settings)
    quantizers.attach(smaller, scheme)
    smaller.load_state_dict(quantizers.float_state(state))
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    expected = integer.IntegerNetwork(model, levels)(images)
    assert torch.equal(integer.IntegerNetwork(smaller, state)(images), expected)
    again, same = without_unread(settings, state)
    assert again is settings and same is state  # what is left is read


def test_a_group_of_unread_channels_keeps_one(small, pixels):
    model = small(0)
    with torch.no_grad():
        model.classifier[1].weight.zero_()
    scheme = ptq.make_scheme(8, 8)
    model, _ = ptq.quantize(model, pixels[:16], scheme)
    settings, state = without_unread(
        model.settings, quantizers.integer_state(model.state_dict(), scheme)
    )
    assert settings["head"] == 1 and state["classifier.1.weight"].shape == (10, 1)
