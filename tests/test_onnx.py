"""lib/graph.py and lib/runtime.py: graphs that onnxruntime runs on integers, and no others."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

import train
from lib import checkpoint, compressed, data, graph, integer, ptq, quantizers, runtime, synthetic
from lib.config import UserError
from lib.nnz import v2
from models.mobilenetv2 import MobileNetV2, standard

OLD = Path(__file__).parent / "golden/w4a8-1.onnx"  # of QLinearConv, as this project wrote it first


def saved(folder, model, scheme, name="int8"):
    """A checkpoint as to_int8.py writes it; with no scheme, one as train.py does."""
    state = quantizers.integer_state(model.state_dict(), scheme) if scheme else None
    return checkpoint.save(
        folder / f"{name}.pth", "int8" if scheme else "baseline", model, train.Settings(), None,
        metrics={}, data={"source": "cifar10", "val_size": 30}, quantization=scheme, state=state,
    )  # fmt: skip


@pytest.fixture(scope="module")
def images():
    """64 images, and noise that drives activations to their ends."""
    pictures = torch.from_numpy(synthetic.make(64, 1)[0]).permute(0, 3, 1, 2)
    noise = torch.randint(0, 2, pictures.shape, generator=torch.Generator().manual_seed(0)) * 255
    return torch.cat([pictures, noise.to(torch.uint8)]).contiguous()


@pytest.fixture(scope="module", params=[8, 4])
def source(request, small, pixels, tmp_path_factory):
    """W8A8 and W4A8."""
    scheme = ptq.make_scheme(request.param, 8)
    model, _ = ptq.quantize(small(1), pixels, scheme)
    return saved(tmp_path_factory.mktemp("source"), model, scheme)


@pytest.fixture(scope="module")
def exported(source):
    return runtime.export(source, source.file.with_suffix(".onnx"))


@pytest.fixture
def vnni(source, tmp_path):
    """The same network for processors with VNNI."""
    return runtime.export(source, tmp_path / "vnni.onnx", "vnni")


def run(raw: bytes, images):
    return runtime._Session(raw, "test")(images)


# ---- the same network ----------------------------------------------------------------------------


def test_onnxruntime_answers_as_the_integer_network(source, exported, images):
    ours, theirs = integer.convert(source)(images), run(exported.graph, images)
    assert (ours.argmax(1) == theirs.argmax(1))[:64].sum() >= 63
    assert (ours - theirs).abs().mean() < 0.01 * ours.std()


def test_openvino_answers_as_the_integer_network(source, exported, vnni, images):
    openvino = pytest.importorskip("openvino")
    core, ours = openvino.Core(), integer.convert(source)(images)
    for file in (exported,) if runtime.saturates() else (exported, vnni):
        compiled = core.compile_model(core.read_model(file.graph, b""), "CPU")
        theirs = torch.from_numpy(compiled({"images": images.numpy()})["logits"])
        assert (ours.argmax(1) == theirs.argmax(1))[:64].sum() >= 62
        assert (ours - theirs).abs().mean() < 0.05 * ours.std()


def test_signed_levels_end_where_onnxruntime_clips(source, images):
    """Those of the first stream, with a step so small that both ends are reached."""
    model = source.build()
    model.features[1].stream.step.div_(8)
    state = quantizers.integer_state(model.state_dict(), source.quantization)
    network = integer.IntegerNetwork(model, state)
    x = network.stem(network.table[torch.arange(3).view(3, 1, 1), images.long()])
    ours = network.blocks[0](x)
    assert (ours == -128).any() and (ours == 127).any()
    made, name = graph.int8(network, {}), network.blocks[0].layers[-1].name
    made.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    session = runtime.session(made.SerializeToString(), 1)
    (theirs,) = session.run([name], {"images": images.numpy()})
    theirs = torch.from_numpy(theirs[:, : ours.shape[1]]).to(torch.int16) - 128
    assert (ours != theirs).float().mean() < 1e-4


def test_the_image_has_the_same_levels(source, exported):
    """All 256 values in all three channels, from the graph's own first nodes."""
    values = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 3, 32, 32)
    values = np.concatenate([values, np.roll(values, 1, 1), np.roll(values, 2, 1)])
    model = onnx.load_from_string(exported.graph)
    model.graph.output.append(onnx.helper.make_tensor_value_info("image", TensorProto.UINT8, None))
    levels = runtime.session(model.SerializeToString(), 1).run(["image"], {"images": values})[0]
    table = integer.convert(source).table.numpy()
    expected = table[np.arange(3)[:, None, None], values]
    assert np.array_equal(levels.astype(int) - 128, expected)


def test_types_of_weights_padding_and_order_change_no_bit(source, exported, images, monkeypatch):
    """onnxruntime's kernels for uint8 by int8 saturate on AVX2 where _pairs_fit were wrong."""
    logits = run(exported.graph, images)
    network = integer.convert(source)
    monkeypatch.setattr(graph, "_order", lambda kernel: slice(None))
    assert torch.equal(run(graph.to_bytes(graph.int8(network, {})), images), logits)
    monkeypatch.setattr(graph, "_pairs_fit", lambda kernel: False)
    assert torch.equal(run(graph.to_bytes(graph.int8(network, {})), images), logits)
    monkeypatch.setattr(graph, "MULTIPLE", 1)
    assert torch.equal(run(graph.to_bytes(graph.int8(network, {})), images), logits)


def test_multipliers_are_those_of_onnxruntime(source, exported):
    """Which multiplies and divides scales in float32, as in its qlinearconv.cc."""
    model = onnx.load_from_string(exported.graph)
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes = {n.name: n for n in model.graph.node}
    for layer in integer.convert(source).layers():
        read, weight, bias = nodes[f"{layer.name}.output"].input
        scales = [nodes[name].input[1] for name in (read, weight, layer.name, bias)]
        x, w, y, unit = (values[name] for name in scales)
        assert np.array_equal(unit, x * w)  # or the nodes would not mean what the kernel computes
        theirs = np.sort((x * w / y)[: len(layer.bias)])  # hidden channels have another order
        m = layer.requantize
        ours = (m.mantissa.double() * 2.0 ** -m.shift.double()).flatten()
        assert theirs.dtype == np.float32
        assert np.array_equal(theirs, np.sort(ours.numpy()))


def test_channels_are_ordered_then_padded_with_zeros():
    weight = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int8).view(3, 2, 1, 1)
    scale, bias = torch.tensor([0.5, 0.25, 0.125]).double(), torch.tensor([7, -8, 9]).int()
    out_order, in_order = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
    w, s, b = graph._arrange(weight, scale, bias, out_order, in_order, pad_inputs=True)
    assert w.shape == (16, 16, 1, 1) and s.shape == b.shape == (16,)
    assert w[:3, :2, 0, 0].tolist() == [[6, 5], [2, 1], [4, 3]] and w.count_nonzero() == 6
    assert s.tolist() == [0.125, 0.5, 0.25] + [1.0] * 13 and b.tolist() == [9, 7, -8] + [0] * 13
    assert (w.dtype, s.dtype, b.dtype) == (torch.int8, torch.float32, torch.int32)
    for padded in (graph._arrange(w, s, b, pad_inputs=True),  # are multiples already
                   graph._arrange(w[:, :2], s, b, pad_inputs=False)):  # fmt: skip
        for array, given in zip(padded, (w[:, : padded[0].shape[1]], s, b), strict=True):
            assert torch.equal(array, given)


@pytest.mark.parametrize(("row", "neighbours", "any_two"), [
    ([127, 1, 0, 0], True, True), ([127, 2, 0, 0], False, False),
    ([-64, -64, 64, 64], True, True), ([-64, -65, 0, 0], False, False),
    ([127, -127, -127, 127], True, False), ([0, 127, 127, 0], True, False),
])  # fmt: skip
def test_which_pairs_fit_into_16_bits(row, neighbours, any_two):
    kernel = torch.tensor(row, dtype=torch.int8)
    assert graph._pairs_fit(kernel.view(1, 4, 1, 1)) is neighbours
    assert graph._pairs_fit(kernel.view(1, 4)) is neighbours  # of the classifier
    assert graph._pairs_fit(kernel.view(1, 1, 2, 2)) is any_two  # of a larger kernel


@pytest.mark.parametrize("count", [2, 7, 40, 95, 96])
def test_an_order_in_which_pairs_fit(count):
    rng = torch.Generator().manual_seed(count)
    shape = (12, count, 1, 1)
    kernel = torch.randint(-40, 41, shape, dtype=torch.int8, generator=rng)
    kernel[:, ::2] = 0
    kernel[:, : count // 4] = 127  # no two of these fit
    order = graph._order(kernel)
    assert order.sort().values.tolist() == list(range(count))
    even = torch.nn.functional.pad(kernel[:, order], (0, 0, 0, 0, 0, count % 2))
    assert graph._pairs_fit(even)
    if count > 4:
        assert not graph._pairs_fit(kernel[:, : count // 2 * 2])
    kernel[:, : count // 2 + 1] = 127  # more than there are partners
    assert torch.equal(graph._order(kernel), torch.arange(count))


def test_any_number_of_images(exported, images):
    whole = run(exported.graph, images)
    for count in (1, 3, 128):
        assert torch.equal(run(exported.graph, images[:count]), whole[:count])


def test_the_fp32_graph_is_the_torch_network(small, pixels):
    model = small(3)
    raw = graph.to_bytes(graph.fp32(model, {}))
    (logits,) = runtime.session(raw, 1).run(None, {"images": pixels.contiguous().numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(logits), model(pixels), atol=1e-3, rtol=1e-4)


# ---- what is in the file -------------------------------------------------------------------------


def test_standard_operators_and_integer_weights(source, exported):
    model = onnx.load_from_string(exported.graph)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert {n.domain for n in model.graph.node} == {""}
    (images,), (logits,) = model.graph.input, model.graph.output
    assert images.type.tensor_type.elem_type == TensorProto.UINT8
    assert [d.dim_value or d.dim_param for d in images.type.tensor_type.shape.dim] == [
        "n", 3, 32, 32]  # fmt: skip
    assert logits.type.tensor_type.elem_type == TensorProto.FLOAT
    state = source.state
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.name.endswith(".weight"):
            assert array.dtype in (np.int8, np.uint8)
            levels = array.astype(int) - 128 * (array.dtype == np.uint8)
            own = state[tensor.name].numpy()
            assert (levels != 0).sum() == (own != 0).sum()
            assert np.abs(levels).max() <= quantizers.max_level(source.quantization["weight_bits"])
        elif array.dtype == np.float32:  # scales alone
            assert array.size < 100
    if source.quantization["weight_bits"] == 4:  # no pair of these can saturate
        assert weight_types(exported) == {TensorProto.INT8}


def weight_types(file) -> set[int]:
    tensors = onnx.load_from_string(file.graph).graph.initializer
    return {t.data_type for t in tensors if t.name.endswith(".weight")}


def test_each_operator_stands_between_levels(exported):
    """What makes the graph QDQ: floats are read from levels, and written to levels at once."""
    model = onnx.load_from_string(exported.graph)
    made_by = {n.output[0]: n.op_type for n in model.graph.node}
    read_by = {i: n.op_type for n in model.graph.node for i in n.input}
    kinds, floats = Counter(), ("Conv", "Gemm", "GlobalAveragePool")
    for node in model.graph.node:
        if node.op_type in floats or node.name.endswith(".sum.output"):
            kinds[node.op_type] += 1
            assert {made_by[i] for i in node.input} == {"DequantizeLinear"}
            assert node.output[0] == "logits" or read_by[node.output[0]] == "QuantizeLinear"
    assert kinds == {"Conv": 19, "Add": 2, "GlobalAveragePool": 1, "Gemm": 1}


@pytest.mark.parametrize("target", graph.TARGETS)
def test_the_optimized_graph_has_no_float_convolution(source, target, tmp_path):
    raw = graph.to_bytes(graph.int8(integer.convert(source), {}, target))
    runtime.session(raw, 1, optimized=tmp_path / "x.onnx")
    kinds = Counter(n.op_type for n in onnx.load(tmp_path / "x.onnx").graph.node)
    assert kinds["QLinearConv"] == 19 and kinds["QGemm"] == 1
    assert kinds["QLinearAdd"] == 2 and kinds["QLinearGlobalAveragePool"] == 1
    assert not [k for k in kinds if "Conv" in k and k != "QLinearConv"]
    assert not {"DequantizeLinear", "QuantizeLinear", "Gemm", "MatMul"} & set(kinds)


def test_the_same_bytes_every_time_and_from_the_compressed_file(source, exported, tmp_path):
    assert runtime.export(source, tmp_path / "again.onnx").graph == exported.graph
    packed = tmp_path / "x.nnz"
    packed.write_bytes(compressed.encode(source))
    settings, state = compressed.stored(source)  # what to_int8.py makes of it
    stored = dataclasses.replace(source, settings=settings, state=state)
    exported = runtime.export(stored, tmp_path / "stored.onnx")
    unpacked = runtime.export(checkpoint.load(packed), tmp_path / "nnz.onnx")
    a, b = (onnx.load_from_string(x.graph) for x in (exported, unpacked))
    assert a.graph == b.graph
    assert unpacked.ancestors[-1]["sha256"] == checkpoint.load(packed).sha256


def test_it_says_where_it_comes_from(source, exported):
    assert exported.ancestors == source.lineage() and exported.ancestors[-1]["stage"] == "int8"
    assert exported.settings == source.settings and exported.stage == "onnx"
    assert exported.quantization == source.quantization
    assert exported.bytes == exported.file.stat().st_size
    for name, levels in exported.state.items():  # without the padding, perhaps in another order
        flipped = source.state[f"{name}_scale"] < 0
        own = source.state[name].to(torch.int16)
        own = torch.where(quantizers.per_row(flipped, own), -own, own)
        assert levels.shape == own.shape
        assert torch.equal(levels.flatten().sort().values, own.flatten().sort().values)


# ---- for which processors ------------------------------------------------------------------------


def test_for_processors_with_vnni_all_weights_are_int8(source, exported, vnni, images):
    assert exported.target == "any" and vnni.target == runtime.load(vnni.file).target == "vnni"
    assert weight_types(vnni) == {TensorProto.INT8}
    for name, levels in vnni.state.items():  # in the network's own order
        flipped = source.state[f"{name}_scale"] < 0
        own = source.state[name].to(torch.int16)
        assert torch.equal(levels, torch.where(quantizers.per_row(flipped, own), -own, own))
    if not runtime.saturates():
        assert torch.equal(runtime.network(vnni)(images), run(exported.graph, images))


def test_no_wrong_answers_on_a_processor_that_saturates(exported, vnni, images, monkeypatch):
    monkeypatch.setattr(runtime, "saturates", lambda: True)
    with pytest.raises(UserError, match="vnni.onnx is for processors with VNNI, and this one has"):
        runtime.network(vnni)
    assert runtime.network(exported)(images[:1]).shape == (1, 10)


def test_which_processors_saturate():
    """Those with AVX2, if they have no instruction that sums four products in 32 bits."""
    has = torch.cpu.get_capabilities()
    if not has.get("avx2"):
        pytest.skip("not of this kind")
    assert runtime.saturates() is not (has["avx512_vnni"] or has["avx_vnni"])


def test_files_of_before_there_were_targets(images):
    old = runtime.load(OLD)
    assert old.target == "any" and old.settings["head"] == 7
    # Its activation scales are random numbers: no checkpoint would be built of it.
    meta, tensors = v2.decode(OLD.with_name("w4a8.nnz").read_bytes())
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    model = MobileNetV2(meta["settings"])
    quantizers.attach(model, meta["quantization"])
    model.load_state_dict(quantizers.float_state(state))
    network = integer.IntegerNetwork(model, state)
    assert (runtime.network(old)(images) - network(images)).abs().max() < 1e-3
    new = run(graph.to_bytes(graph.int8(network, {})), images)
    assert torch.allclose(runtime.network(old)(images), new, rtol=1e-6)


# ---- which arithmetic ----------------------------------------------------------------------------


def test_each_file_runs_as_what_it_holds(source, exported, small, tmp_path, images):
    fake = checkpoint.save(
        tmp_path / "quantized.pth", "quantized", source.build(), train.Settings(), None,
        metrics={}, data={}, quantization=source.quantization,
    )  # fmt: skip
    for file, kind in [(source, "integers"), (exported, "onnxruntime"), (fake, "float32"),
                       (saved(tmp_path, small(1), None), "float32")]:  # fmt: skip
        network = runtime.network(runtime.load(file.file))
        assert network.arithmetic == kind
        assert network(images[:2]).shape == (2, 10) and network(images[:2]).dtype == torch.float32
    assert runtime.network(source, integers=False).arithmetic == "float32"
    with torch.no_grad():
        expected = fake.build()(data.normalize(images[:2]))
    assert torch.equal(runtime.network(fake)(images[:2]), expected)


# ---- refused -------------------------------------------------------------------------------------


def test_networks_without_a_graph(tmp_path):
    model = MobileNetV2(standard(0.1, 8))
    plain = saved(tmp_path, model, None, "plain")
    reference = quantizers.quantize_reference(model, 8, 8)
    for source, what in [
        (plain, "it is not quantized"),
        (saved(tmp_path, model, reference, "reference"), "change with every batch"),
        (dataclass_like(plain, ptq.make_scheme(8, 6)), "activations have 6 bits"),
        (dataclass_like(plain, ptq.make_scheme(8, 16)), "and 8 is most"),
    ]:
        with pytest.raises(UserError, match=what):
            runtime.export(source, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def dataclass_like(source, scheme):
    found = checkpoint.load(source.file)
    found.quantization = scheme
    return found


def test_files_that_are_not_ours(exported, small, tmp_path):
    path = tmp_path / "x.onnx"
    foreign = onnx.load_from_string(graph.to_bytes(graph.fp32(small(1), {})))
    del foreign.metadata_props[:]
    ours = onnx.load_from_string(exported.graph)
    cases = [(foreign.SerializeToString(), "no ONNX file of ours"), (b"", "no ONNX file of ours"),
             (b"nonsense", "not an ONNX file, or is damaged"),
             (exported.graph[:-100], "not an ONNX file, or is damaged")]  # fmt: skip
    meta = json.loads({p.key: p.value for p in ours.metadata_props}[graph.META])
    for spoilt in ("[]", "{", "null", json.dumps(meta | {"settings": {}}),
                   json.dumps(meta | {"settings": meta["settings"] | {"stem": 999}}),
                   json.dumps(meta | {"settings": meta["settings"] | {"stem_stride": 0}}),
                   json.dumps(meta | {"quantization": {"method": "ptq"}}),
                   json.dumps(meta | {"ancestors": [None]}), "[" * 100_000):  # fmt: skip
        onnx.helper.set_model_props(ours, {"format": graph.FORMAT, graph.META: spoilt})
        cases.append((ours.SerializeToString(), "does not fit its own description"))
    for raw, what in cases:
        path.write_bytes(raw)
        with pytest.raises(UserError, match=what) as caught:
            runtime.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist: `make int8`"):
        runtime.load(tmp_path / "none.onnx")


def test_a_graph_that_onnxruntime_does_not_take(exported, tmp_path):
    model = onnx.load_from_string(exported.graph)
    model.graph.node[3].op_type = "NoSuchOperator"
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    found = runtime.load(tmp_path / "x.onnx")
    with pytest.raises(UserError, match="onnxruntime does not take"):
        runtime.network(found)


def test_a_graph_that_onnxruntime_cannot_run(exported, images, tmp_path):
    model = onnx.load_from_string(exported.graph)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 31
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    network = runtime.network(runtime.load(tmp_path / "x.onnx"))
    with pytest.raises(UserError, match=r"cannot run .*x\.onnx: .*dimensions") as caught:
        network(images)
    assert "\n" not in str(caught.value)


def test_a_graph_is_no_parent(exported):
    with pytest.raises(UserError, match="give the .pth that it was made of"):
        checkpoint.load(exported.file)
    with pytest.raises(UserError, match="start from the .pth"):
        exported.build()
