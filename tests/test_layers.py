"""models/layers.py: the order of the layers is the network's own."""

import copy

import pytest
import torch

from lib import quantizers
from lib.folding import fold, norm_after
from lib.metrics import weight_layers
from lib.nnz import v2
from models.layers import blocks, layers, places, roles
from models.mobilenetv2 import MobileNetV2, standard

SETTINGS = [standard(0.1, 8), standard(0.35), standard(1.0), standard(1.4, 32)]


@pytest.mark.parametrize("settings", SETTINGS)
def test_layers_are_those_of_the_network_in_the_order_in_which_they_run(settings):
    with torch.device("meta"):
        model = MobileNetV2(settings).eval()
    names = {module: name for name, module in model.named_modules()}
    ran = []
    for module in weight_layers(model).values():
        module.register_forward_hook(lambda module, *_: ran.append(names[module]))
    model(torch.zeros(1, 3, 32, 32, device="meta"))
    described = layers(settings)
    assert [layer.name for layer in described] == ran == list(weight_layers(model))
    for layer in described:
        module = model.get_submodule(layer.name)
        assert layer.shape == tuple(module.weight.shape)
        assert layer.stride == getattr(module, "stride", (1, 1))[0]
        if layer.norm:
            norm = model.get_submodule(layer.norm)
            assert isinstance(norm, torch.nn.BatchNorm2d) and norm.num_features == layer.shape[0]
            assert norm_after(model, layer.name) is norm
            parent, index = layer.name.rsplit(".", 1)
            assert layer.norm == f"{parent}.{int(index) + 1}"  # after it in its Sequential
        for place in (layer.input_place, layer.output_place):
            assert place in places(settings) or place == ""
    assert all([layer.role for layer in own][-2:] == ["depthwise", "project"]
               for own in blocks(settings))  # fmt: skip


def test_roles_of_the_usual_network():
    found = list(roles(standard()).values())
    assert {role: found.count(role) for role in found} == {
        "stem": 1, "depthwise": 17, "project": 17, "expand": 16, "head": 1, "classifier": 1
    }  # fmt: skip
    assert found[:6] == ["stem", "depthwise", "project", "expand", "depthwise", "project"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_places_are_the_modules_in_the_order_in_which_tensors_pass(settings):
    model = MobileNetV2(settings).eval()
    names = {module: name for name, module in model.named_modules()}
    passed = []
    expected = places(settings)
    for name in expected:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, *_: passed.append(names[module]))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    # `addend` of a block without a residual connection is passed too, and is no place.
    assert passed == expected


@pytest.mark.parametrize("settings", SETTINGS)
def test_groups_are_what_compaction_removes_together(settings):
    """A group has one size, and the layers that write it agree."""
    sizes = {}
    for layer in layers(settings):
        assert sizes.setdefault(layer.output_group, layer.shape[0]) == layer.shape[0]
        if layer.role not in ("depthwise", "stem"):
            assert sizes[layer.input_group] == layer.shape[1]
    wider = copy.deepcopy(settings)
    wider["head"] += 1
    assert layers(wider)[-1].shape[1] == layers(settings)[-1].shape[1] + 1


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("bits", [4, 8])
def test_places_are_where_quantizers_stand(settings, bits):
    model = fold(MobileNetV2(settings).eval())
    scheme = {"method": "ptq", "weight_bits": 4, "act_bits": bits, "weight_scale": "channel",
              "layer_bits": {}}  # fmt: skip
    quantizers.attach(model, scheme)
    steps = [name.removesuffix(".step") for name in model.state_dict() if name.endswith(".step")]
    modules = dict(model.named_modules())
    known = [p for p in places(settings) if isinstance(modules[p], quantizers.Quantizer)]
    assert sorted(steps) == sorted(known)
    assert [f"{place}.step" for place in known] == v2.scale_names(settings, bits)
