"""models/mobilenetv2.py: torchvision's network to the bit, and settings that are data."""

import random

import pytest
import torch
from torch import nn
from torchvision.models import MobileNetV2 as TorchvisionMobileNetV2
from torchvision.models import mobilenet_v2, resnet18

from lib import metrics
from models.layers import layers
from models.mobilenetv2 import STAGES, MobileNetV2, settings_of, standard


def torchvisions(width: float, seed: int, report: bool):
    """Theirs, drawn from a seed; with the report's strides or as it comes."""
    stages = [[t, c, n, 1 if report and c in (24, 32) else s] for t, c, n, s in STAGES]
    torch.manual_seed(seed)
    model = mobilenet_v2(
        num_classes=10, width_mult=width, dropout=0.2, inverted_residual_setting=stages
    )
    if report:
        model.features[0][0].stride = (1, 1)
    return model


def ours(seed: int, *args, **kwargs):
    torch.manual_seed(seed)
    return MobileNetV2(standard(*args, **kwargs))


def unsettle(model) -> None:
    """Give batch norms and biases values that show when one is misplaced."""
    generator = torch.Generator().manual_seed(5)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))


@pytest.mark.parametrize(
    ("width", "downsample", "size"), [(1.0, 4, 32), (0.5, 32, 64), (1.4, 32, 64), (0.35, 4, 32)]
)
def test_same_names_weights_and_outputs_as_torchvision(width, downsample, size):
    theirs, model = torchvisions(width, 3, downsample == 4), ours(3, width, downsample)
    a, b = theirs.state_dict(), model.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
    unsettle(theirs)
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), theirs.eval()(x))
        outputs = []
        for network in (model, theirs):  # dropout draws the same
            torch.manual_seed(1)
            outputs.append(network.train()(x))
    assert torch.equal(*outputs)
    for name, tensor in theirs.state_dict().items():  # running statistics
        assert torch.equal(model.state_dict()[name], tensor)


def test_sizes_of_the_reports_network():
    model = MobileNetV2(standard())
    assert sum(p.numel() for p in model.parameters()) == 2_236_682
    counts = metrics.layer_counts(model)
    assert len(counts) == 53 and sum(n for _, n, _ in counts) == 2_202_560
    assert metrics.macs(model.settings) == 296_473_088


@pytest.mark.parametrize("downsample", [4, 8, 16, 32])
def test_final_map(downsample):
    model = MobileNetV2(standard(0.1, downsample)).eval()
    with torch.no_grad():
        assert model.features(torch.zeros(1, 3, 32, 32)).shape[2:] == (32 // downsample,) * 2


def test_downsample_8_has_a_third_of_the_macs():
    four, eight = (metrics.macs(standard(1.0, d)) for d in (4, 8))
    assert 3 < four / eight < 3.5


@pytest.mark.parametrize("width", [0.1, 0.35, 0.5, 0.75, 1.0, 1.4])
@pytest.mark.parametrize("downsample", [4, 8])
def test_settings_come_back_from_a_state(width, downsample):
    settings = standard(width, downsample, classes=7)
    with torch.device("meta"):
        state = MobileNetV2(settings).state_dict()
    assert settings_of(state, downsample) == settings


@pytest.mark.parametrize("seed", range(8))
def test_any_channel_counts_are_data(seed):
    """Every width its own, as compaction leaves them: built, run, saved as a state, recovered."""
    rng = random.Random(seed)
    settings = standard()
    settings["stem"] = settings["blocks"][0]["hidden"] = rng.randint(1, 9)
    settings["head"], settings["classes"] = rng.randint(1, 9), rng.randint(2, 12)
    out = settings["stem"]
    for block in settings["blocks"]:
        if block["expand"]:
            block["hidden"] = rng.randint(1, 9)
        if not block["residual"]:
            before, out = out, rng.randint(1, 9)
            out += out == before and block["stride"] == 1  # equal, it would be residual
        block["out"] = out
    model = MobileNetV2(settings).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, settings["classes"])
    again = settings_of(model.state_dict())
    assert again == settings
    MobileNetV2(again).load_state_dict(model.state_dict())


def test_settings_are_plain_and_not_shared():
    def plain(value):
        if isinstance(value, dict):
            return all(type(k) is str and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return type(value) in (int, float, bool)

    a, b = standard(), standard()
    assert plain(a) and a == b
    a["blocks"][0]["out"] = 1
    assert standard() == b
    assert len(b["blocks"]) == sum(repeats for _, _, repeats, _ in STAGES) == 17


def test_settings_of_do_not_hold_the_state():
    state = MobileNetV2(standard(0.1)).state_dict()
    found = settings_of(state)
    assert {type(block["hidden"]) for block in found["blocks"]} == {int}


def without(*names):
    return lambda state: {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize("change", [
    without("features.0.0.weight"),
    without("features.7.conv.2.weight"),
    without("classifier.1.weight", "classifier.1.bias"),
    lambda state: {f"module.{k}": v for k, v in state.items()},
    lambda state: state | {"features.3.conv.2.weight": torch.zeros(5)},
    lambda state: state | {"features.18.0.weight": torch.zeros(())},
    lambda state: state | {"features.0.0.weight": 3},
    lambda state: resnet18().state_dict(),
    lambda state: {},
])  # fmt: skip
def test_states_of_other_networks_are_refused(change):
    state = change(MobileNetV2(standard(0.1)).state_dict())
    with pytest.raises(ValueError, match=r"not the state dict of a MobileNetV2 \(at "):
        settings_of(state)


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [({"downsample": 5}, r"downsample must be one of \[4, 8, 16, 32\], not 5"),
     ({"width": 0}, "width must be over 0"), ({"width": -1}, "width must be over 0"),
     ({"width": float("nan")}, "width must be over 0"),
     ({"dropout": 1}, r"dropout must be in \[0, 1\)"), ({"dropout": -0.1}, "dropout must be in")],
)  # fmt: skip
def test_impossible_settings(kwargs, what):
    with pytest.raises(ValueError, match=what):
        standard(**kwargs)


def test_gradients_are_channels_last_as_the_activations_are():
    """Batch norm is many times slower where they are not."""
    model = ours(0, 0.35).to(memory_format=torch.channels_last)
    seen = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_full_backward_hook(lambda _, __, gradients: seen.extend(gradients))
    x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    model(x).sum().backward()
    assert len(seen) == 52
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)


def test_strided_depthwise_layers_keep_fp32_under_autocast():
    """They compute in fp32, for want of a bf16 kernel, and hand on what the others do."""
    torch.manual_seed(0)
    model = MobileNetV2(standard(0.35, 8, 0.0)).train()
    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride[0] > 1]
    assert len(strided) == 3
    seen = []
    for layer in strided:
        layer.register_forward_hook(lambda _, x, y: seen.append((x[0].dtype, y.dtype)))
    after = []
    for block in (model.features[4], model.features[7], model.features[14]):
        block.conv[1].register_forward_hook(lambda _, x, y: after.append(y.dtype))
    x = torch.randn(16, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert seen == [(torch.float32, torch.float32)] * 3
    assert after == [torch.bfloat16] * 3
    seen.clear()
    model.double()(x.double())  # without autocast nothing is cast
    assert seen == [(torch.float64, torch.float64)] * 3


STRIDES = {4: (1, 1, 1), 8: (1, 1, 2), 16: (1, 2, 2), 32: (2, 2, 2)}  # stem, second, third stage


@pytest.mark.parametrize("width", [0.1, 0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4])
@pytest.mark.parametrize("downsample", STRIDES)
def test_a_plain_state_dict_runs_as_torchvision_runs_it(width, downsample):
    """Residual connections included, which torchvision gives by shape and stride alone."""
    stem, second, third = STRIDES[downsample]
    stages = [[t, c, n, s] for t, c, n, s in STAGES]
    stages[1][3], stages[2][3] = second, third
    torch.manual_seed(0)
    theirs = TorchvisionMobileNetV2(
        num_classes=10, width_mult=width, inverted_residual_setting=stages
    ).eval()
    theirs.features[0][0].stride = (stem, stem)
    unsettle(theirs)
    settings = settings_of(theirs.state_dict(), downsample)
    assert settings == standard(width, downsample)
    model = MobileNetV2(settings).eval()
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), theirs(x))


def test_named_fields_are_the_layers_of_that_role():
    model = MobileNetV2(standard(0.1))
    names = {module: name for name, module in model.named_modules()}
    assert (names[model.stem], names[model.head]) == ("features.0", "features.18")
    assert names[model.linear] == "classifier.1" and model.stem.activation is model.stem[2]
    fields = []
    for block in model.blocks:
        expand = [] if block.expand is None else [block.expand]
        for part in (*expand, block.depthwise):
            assert isinstance(part.norm, nn.BatchNorm2d)
            fields.append(names[part.conv])
        assert isinstance(block.project_norm, nn.BatchNorm2d)
        fields.append(names[block.project])
        hidden = block.depthwise.conv.groups
        assert hidden == block.depthwise.conv.out_channels == block.project.in_channels
    inner = [layer.name for layer in layers(model.settings) if layer.block is not None]
    assert fields == inner
