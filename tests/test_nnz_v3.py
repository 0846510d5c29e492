"""Versions 2 and 3 of the .nnz file: bit-for-bit round trips, pinned files, the reference decoder
beside the fast one, and refusals by name of all that is damaged, foreign or too large.

The order of the channels, the coder and the vectors themselves: tests/test_nnz_order.py,
tests/test_nnz_coder.py, tests/test_nnz_vectors.py. More damage than fits here:
benchmarks/nnz_file.py --fuzz.
"""

import copy
import json
import random
import re
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import reference_decoder

from benchmarks.nnz_file import damaged, fuzz, made_up, sealed
from lib.nnz import coder, description, frame, v1, v2, v3
from lib.nnz.frame import (
    ChecksumMismatch,
    FormatError,
    LimitExceeded,
    Malformed,
    NotNNZ,
    Truncated,
    UnsupportedVersion,
)

FOLDER = Path(__file__).parent
FORMAT = (FOLDER.parent / "FORMAT.md").read_text()
GOLDEN = sorted((FOLDER / "golden").glob("*.nnz"))


def version_2(meta, tensors):
    """Version 2 of a file, which the program reads and no longer writes."""
    beginning, section, settings = description.pack(meta)
    network = v2.layers(settings)
    matrices = [tensors[f"{x.name}.weight"].reshape(v2.matrix_shape(x)) for x in network]
    return sealed({
        "NETW": section + v2.sha_of(beginning, tensors),
        "CODE": coder.encode(matrices, *v2.kinds_and_groups(network)),
        "SIDE": v2.pack_side(meta, matrices, tensors),
    })  # fmt: skip


def check_round_trip(meta, tensors):
    same(v2.decode(version_2(meta, tensors)), meta, tensors)
    assert sum(v2.part_sizes(version_2(meta, tensors)).values()) == len(version_2(meta, tensors))
    raw, tensors = v3.encode(meta, tensors), v3.in_order(meta, tensors)
    same(v3.decode(raw), meta, tensors)
    sizes = v3.part_sizes(raw)
    side = "scales", "biases", "activation_scales"
    assert list(sizes) == [*coder.PARTS, *side, "metadata", "frame"]
    assert sum(sizes.values()) == len(raw) and min(sizes.values()) >= 0
    return raw, sizes


def same(decoded, meta, tensors):
    found, decoded = decoded
    assert found == meta
    assert list(decoded) == list(tensors)
    for name, value in tensors.items():
        assert decoded[name].dtype == value.dtype and decoded[name].shape == value.shape, name
        assert decoded[name].tobytes() == value.tobytes(), name
        assert decoded[name].flags.writeable


# ---- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 9, 12, 16])
def test_every_width_comes_back(bits):
    check_round_trip(*made_up(bits, bits, act_bits=(4, 8, 32)[bits % 3], coarse=bits % 2 == 0))


def test_coarse_scales_and_biases_pay():
    _, fine = check_round_trip(*made_up(1))
    _, coarse = check_round_trip(*made_up(1, coarse=True))
    assert coarse["scales"] < fine["scales"] / 2 and coarse["biases"] < fine["biases"] / 2
    assert coarse["activation_scales"] < fine["activation_scales"]


def test_layer_bits_and_any_further_keys_come_back():
    meta, tensors = made_up(2, 8)
    scheme = meta["quantization"]
    scheme["layer_bits"] = {"features.0.0": 12, "classifier.1": 2}
    scheme |= {"last_act_bits": 12, "rate": 0.25, "note": ["é", None]}
    meta["data"] |= {"source": "cifar10", "more": {"a": 1}}
    meta["settings"]["width"] = 1.5
    tensors["features.0.0.weight"] = tensors["features.0.0.weight"].astype(np.int16) * 16
    tensors["classifier.1.weight"] = np.sign(tensors["classifier.1.weight"])
    check_round_trip(meta, tensors)


def test_a_classifier_input_that_alone_is_not_quantized_is_refused():
    """Its network has no `pooled.step`, which section 4.2 of the text has for its act_bits."""
    meta, tensors = made_up(2, act_bits=8)
    meta["quantization"]["last_act_bits"] = 32
    with pytest.raises(Malformed, match="last_act_bits"):
        v3.encode(meta, tensors)
    meta, tensors = made_up(2, act_bits=32)
    meta["quantization"]["last_act_bits"] = 32  # as all others
    check_round_trip(meta, tensors)


def test_any_float_comes_back():
    meta, tensors = made_up(3)
    tensors["features.0.0.bias"] = np.array([np.nan, -0.0, -np.inf], np.float32)
    tensors["features.0.0.weight_scale"] = np.array([-1e-40, 3e38, -0.5], np.float32)
    tensors["image.step"] = np.array(-0.0, np.float32)
    check_round_trip(meta, tensors)


def test_networks_without_a_live_weight_or_known_ancestor():
    meta, tensors = made_up(4)
    for name, value in tensors.items():
        if name.endswith(".weight"):
            value[:] = 0
    meta["ancestors"][1]["sha256"] = None
    meta["seed"] = None
    _, sizes = check_round_trip(meta, tensors)
    assert sum(sizes[part] for part in coder.PARTS) < 3


def test_only_scales_of_dead_rows_that_are_1_are_left_out():
    meta, tensors = made_up(5, coarse=True)
    assert frame.unpack(version_2(meta, tensors))["SIDE"][0] == v2.DEAD
    name = "features.0.0"
    tensors[f"{name}.weight"][1] = 0
    tensors[f"{name}.weight_scale"][1] = 1.5
    check_round_trip(meta, tensors)
    assert frame.unpack(version_2(meta, tensors))["SIDE"][0] == 0


def test_the_usual_network_takes_few_bytes_beside_its_tensors():
    found = json.loads(description.DICTIONARY)
    assert description.check(found) is None
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=description.DICTIONARY)
    assert len(stream.compress(description.DICTIONARY) + stream.flush()) < 30


def test_numba_writes_the_same_file(monkeypatch):
    if coder.numba is None:
        pytest.skip("numba is not installed")
    network = made_up(6, 8)
    raw = v3.encode(*network)
    sizes = v3.part_sizes(raw)
    monkeypatch.setattr(coder, "COMPILED", False)
    assert raw == v3.encode(*network) and sizes == v3.part_sizes(raw)


@pytest.mark.parametrize("change", [
    lambda m, t: t.pop("classifier.1.bias"),
    lambda m, t: t.update(extra=np.zeros(3, np.float32)),
    lambda m, t: t.update({"classifier.1.bias": np.zeros(5, np.float32)}),
    lambda m, t: t.update({"classifier.1.bias": np.zeros(4)}),
    lambda m, t: t["classifier.1.weight"].__setitem__((0, 0), 8),
    lambda m, t: t["classifier.1.weight"].__setitem__((0, 0), -8),
    lambda m, t: m["quantization"].update(weight_bits=32),
    lambda m, t: m["quantization"].update(layer_bits={"classifier.1": 32}),
    lambda m, t: m["quantization"].update(method="reference"),
    lambda m, t: m["quantization"].pop("act_bits"),
    lambda m, t: m["settings"].update(folded=False),
    lambda m, t: m["settings"].update(head=70000), lambda m, t: m["settings"].update(head=-1),
    lambda m, t: m["settings"].update(blocks=[]),
    lambda m, t: m["settings"].pop("stem"),
    lambda m, t: m["settings"]["blocks"][1].update(out=9),  # residual, but of other channels
    lambda m, t: m["settings"]["blocks"][0].update(hidden=9),  # none, but of other channels
    lambda m, t: m["settings"]["blocks"][0].update(kernel=5),
    lambda m, t: m.update(data={1: 2}),
    lambda m, t: m.update(seed="47"),
])  # fmt: skip
def test_what_the_version_cannot_hold_is_refused(change):
    meta, tensors = made_up(7)
    change(meta, tensors)
    with pytest.raises(Malformed):
        v3.encode(meta, tensors)


# ---- the bytes themselves ------------------------------------------------------------------------


def check_reference_decoder(raw):
    slow, about = reference_decoder.decode_quantized(raw)
    version, write = (v2, version_2) if raw[8] == 2 else (v3, v3.encode)
    meta, tensors = version.decode(raw)
    assert list(slow) == list(tensors)
    for name, value in tensors.items():
        flat = value.reshape(-1)
        assert slow[name] == (flat.view("<u4") if flat.dtype == np.float32 else flat).tolist(), name
    assert about["quantization"] == meta["quantization"]
    again = write(meta, tensors)
    old, new = frame.unpack(raw), frame.unpack(again)
    assert list(new.items())[1:] == list(old.items())[1:]
    if "ng" not in zlib.ZLIB_RUNTIME_VERSION:  # zlib-ng deflates differently, which is legal
        assert again == raw


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_the_reference_decoder_agrees_on_the_pinned_files(path):
    check_reference_decoder(path.read_bytes())


def test_the_reference_decoder_agrees_where_the_stem_and_the_first_block_are_one_group():
    """A first block without expansion that is residual, as at widths of 0.25 and less."""
    meta, tensors = made_up(8)
    block = meta["settings"]["blocks"][0]
    block |= {"residual": True, "out": 3}
    settings, scheme = meta["settings"], meta["quantization"]
    settings["blocks"][1] |= {"out": 3}
    _, groups = v2.kinds_and_groups(v2.layers(settings))
    assert {*groups[0], *groups[1], *groups[2]} == {("stem", 0), None}
    draw = np.random.default_rng(0)
    tensors = {
        name: (draw.normal(size=shape) * 2).astype(stored)
        for name, (stored, shape) in v2.tensors_of(settings, scheme).items()
    }
    check_reference_decoder(check_round_trip(meta, tensors)[0])
    check_reference_decoder(version_2(meta, tensors))


def test_a_file_need_not_say_the_stride_of_the_stem():
    meta, tensors = made_up(9)
    del meta["settings"]["stem_stride"]
    check_reference_decoder(check_round_trip(meta, tensors)[0])


def test_the_pinned_files_are_there():
    assert [path.name for path in GOLDEN] == [
        "w12a16.nnz", "w2a32.nnz", "w4a8-3.nnz", "w4a8.nnz", "w8a6-3.nnz", "w8a6.nnz"
    ]  # fmt: skip
    assert [path.read_bytes()[8] for path in GOLDEN] == [2, 2, 3, 2, 3, 2]


def test_example_of_the_text():
    text = FORMAT[FORMAT.index("## 9.") : FORMAT.index("## 10.")]
    raw = bytes.fromhex(re.search(r"```hex\n(.*?)```", text, re.S)[1])
    check_reference_decoder(raw)
    meta, tensors = v2.decode(raw)
    assert tensors["classifier.1.weight"].tolist() == [[-5, 0], [2, 0]]
    assert tensors["classifier.1.weight_scale"].tolist() == [0.25, 0.3125]
    assert meta["ancestors"][1]["sha256"] == "ab" * 32
    written = re.search(r"```json\n(.*?)\n```", text, re.S)[1].encode()
    found, _ = description.inflate(frame.unpack(raw)["NETW"], 1000)
    assert found == written and len(found) == 389
    for row in re.findall(r"^\| (\d+)-(\d+) \|.*\| `([0-9A-F ]+)( \.\.\.)?` \|$", text, re.M):
        first, last, shown = int(row[0]), int(row[1]), bytes.fromhex(row[2])
        assert raw[first : last + 1][: len(shown)] == shown
        assert row[3] or len(shown) == last + 1 - first


def test_contents_and_references_of_the_text():
    headings = re.findall(r"^#+ (.*)$", FORMAT, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#(.*?)\)", FORMAT)) <= anchors
    numbers = {heading.split()[0].rstrip(".") for heading in headings}
    decoder = (FOLDER / "reference_decoder.py").read_text()
    assert set(re.findall(r"[Ss]ections? (\d+(?:\.\d+)?)", FORMAT + decoder)) <= numbers
    for module in re.findall(r"`((?:lib|tests)/[\w/]+\.py)`", FORMAT):
        assert (FOLDER.parent / module).is_file()


def test_the_dictionary_is_that_of_the_text():
    text = re.search(r"zdict.*?```json\n(.*?)\n```", FORMAT, re.S)[1].encode()
    assert text == description.DICTIONARY and f"{len(text):,} bytes" in FORMAT


# ---- what must be refused ------------------------------------------------------------------------


def refuse(raw, error=FormatError, match=None, **limit):
    with pytest.raises(error, match=match) as caught:
        (v2 if raw[8:9] == b"\2" else v3).decode(raw, **limit)
    assert type(caught.value) is not FormatError
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.fixture(scope="module")
def small():
    return v3.encode(*made_up(0, 4, 8, coarse=True))


def test_every_truncation(small):
    for size in range(len(small)):
        refuse(small[:size], Truncated)
    refuse(small + b"\0", Malformed)


def test_every_bit_flip(small):
    for bit in range(8 * len(small)):
        flipped = bytearray(small)
        flipped[bit // 8] ^= 1 << bit % 8
        refuse(bytes(flipped))


def test_random_damage():
    found = fuzz(150, seed=1)
    assert sum(found.values()) == 150 and found["Malformed"] > found["the same network"]


def test_every_byte_of_a_sealed_section_counts(small):
    """With the CRCs made right again, the parsers, the coder or the SHA-256 refuse."""
    draw = random.Random(2)
    payloads = dict(frame.unpack(small))
    for tag, payload in payloads.items():
        for _ in range(25):
            changed = damaged(bytes(payload), draw)
            if changed == payload:
                continue
            raw = sealed(payloads | {tag: changed})
            try:
                found = v3.decode(raw)
            except FormatError as error:
                assert type(error) is not FormatError
            else:  # deflated otherwise, but the same
                assert tag == "NETW" and found[0] == v3.decode(small)[0]


@pytest.mark.parametrize("raw", [
    b"PK\3\4" + bytes(100), b"\x80\x02ctorch\n", b"", b"\x89PNG\r\n\x1a\n" + bytes(40),
])  # fmt: skip
def test_foreign_files(raw):
    refuse(raw, (NotNNZ, Truncated))


def test_version_1_is_another_module_s():
    refuse(v1.encode({}, {}, {}, {}), UnsupportedVersion)
    for read in (v1.decode, v1.part_sizes):
        with pytest.raises(UnsupportedVersion):
            read(v3.encode(*made_up()))


def described(change, widths=None, text=None, tail=b""):
    """A file of a description that may be illegal, sealed. Its section CODE is illegal in any case:
    only the message tells what was refused."""
    found = json.loads(description.DICTIONARY)
    change(found)
    text = frame.canonical(found) if text is None else text
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=description.DICTIONARY)
    numbers = b"".join(map(frame.varint, [1] * 25)) if widths is None else widths
    payload = stream.compress(text) + stream.flush() + numbers + bytes(64) + tail
    return sealed({"NETW": payload, "CODE": b"\1", "SIDE": b"\0" * 7})


@pytest.mark.parametrize("change", [
    lambda d: d.pop("seed"), lambda d: d.update(more=1), lambda d: d.update(seed=1.5),
    lambda d: d.update(seed=-1), lambda d: d.update(seed=1 << 32),
    lambda d: d["quantization"].update(act_bits=32.0),
    lambda d: d.update(settings=5), lambda d: d.update(quantization=[]),
    lambda d: d.update(data=[]), lambda d: d.update(mean="0"), lambda d: d.update(std=[1, 1, 1]),
    lambda d: d.update(mean=[0.5] * 2), lambda d: d.update(std=[0.5] * 4),
    lambda d: d.update(std=[0.5, 0.0, 0.5]), lambda d: d.update(std=[0.5, 0.5, -0.5]),
    lambda d: d.update(ancestors=[], parent=None), lambda d: d.update(ancestors=[1], parent=0),
    lambda d: d.update(parent=4), lambda d: d.update(parent=-1), lambda d: d.update(parent=True),
    lambda d: d.update(weights=0), lambda d: d.update(weights=1 << 32),
    lambda d: d["settings"].update(blocks={}), lambda d: d["settings"].update(blocks=[1]),
    lambda d: d["settings"].update(blocks=d["settings"]["blocks"] * 20),
    lambda d: d["settings"].update(stem=8), lambda d: d["settings"].update(classes=0),
    lambda d: d["settings"].update(folded=1),
    lambda d: d["settings"]["blocks"][3].update(expand=1),
    lambda d: d["settings"]["blocks"][3].update(stride=0),
    lambda d: d["settings"]["blocks"][3].update(kernel=3),
    lambda d: d["settings"]["blocks"][4].update(stride=2),  # which is residual
    lambda d: d["settings"].update(stem_stride=0), lambda d: d["settings"].update(stem_stride=1.0),
    lambda d: d["settings"].update(dropout=1), lambda d: d["settings"].update(dropout=None),
    lambda d: d["quantization"].update(weight_bits=17),
    lambda d: d["quantization"].update(act_bits=1),
    lambda d: d["quantization"].update(last_act_bits=None),
    lambda d: d["quantization"].update(last_act_bits=32),
    lambda d: d["quantization"].update(layer_bits={"x": "8"}),
    lambda d: d["quantization"].update(layer_bits=[]),
    lambda d: d["quantization"].update(method=["ptq"]),
])  # fmt: skip
def test_illegal_descriptions(change):
    refuse(described(change), Malformed, "^section NETW: (?!a width outside|.* too many)")


@pytest.mark.parametrize(("options", "error"), [
    ({"widths": b""}, Malformed),
    ({"widths": b"\x80\0" + b"\1" * 24}, Malformed),  # longer than it needs
    ({"widths": b"\0" + b"\1" * 24}, Malformed),
    ({"widths": b"\x80\x80\4" + b"\1" * 24}, Malformed),  # 65,536
    ({"widths": b"\xff" * 26}, Malformed),
    ({"widths": b"\xff\xff\3" * 25}, LimitExceeded),
    ({"tail": b"\0"}, Malformed),
    ({"text": b"{}"}, Malformed),
    ({"text": b" " + description.DICTIONARY}, Malformed),
    ({"text": b"\xff"}, Malformed),
    ({"text": b"[" * 5000}, Malformed),
    ({"text": b'"' + b"a" * description.TEXT_LIMIT}, LimitExceeded),
])  # fmt: skip
def test_illegal_sections(options, error):
    refuse(described(lambda d: None, **options), error, "^section NETW|weights, over the limit")


def test_a_legal_description_is_not_what_is_refused():
    refuse(described(lambda d: None), Malformed, "^section CODE")
    refuse(described(lambda d: d["settings"].pop("dropout")), Malformed, "^section CODE")


def test_huge_sizes_are_refused_before_anything_is_allocated():
    tracemalloc.start()
    try:
        refuse(described(lambda d: None, widths=b"\xff\xff\3" * 25), LimitExceeded)
        many = frame.varint(2000) * 25  # within what a long section may hold: not of one byte
        refuse(described(lambda d: None, widths=many), LimitExceeded)
        bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
        stream = b"".join(bomb.compress(b" " * (1 << 20)) for _ in range(64)) + bomb.flush()
        refuse(sealed({"NETW": stream, "CODE": b"", "SIDE": b""}), LimitExceeded)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6


def test_limit(small):
    v3.decode(small, limit=1 << 14)
    refuse(small, LimitExceeded, limit=len(small) - 1)
    refuse(small, LimitExceeded, limit=len(small) + 1)  # the file is not, its tensors are


def side(flags=0, groups=None, **changed):
    """A file of the small network, of version 2, with another SIDE and its own SHA-256."""
    payloads = dict(frame.unpack(version_2(*made_up(0, 4, 8, coarse=True))))
    return sealed(payloads | {"SIDE": bytes([flags]) + (groups or bytes(payloads["SIDE"][1:]))})


def test_illegal_sides():
    v2.decode(side(1))
    body = bytes(frame.unpack(side())["SIDE"][1:])
    refuse(side(3, body), Malformed)  # a reserved flag
    refuse(side(0, body), Malformed)  # scales for all rows, but only those of some
    refuse(side(1, body + b"\0"), Malformed)
    refuse(side(1, body[:-1]), Malformed)
    refuse(side(1, b"\xff\xff\xff\xff\x0f" + body), Malformed)
    refuse(side(1, b"\xff\xff\xff\xff\x1f" + body), Malformed)  # over 32 bits


def test_levels_outside_their_bits(small):
    meta, tensors = made_up(0, 4, 8, coarse=True)
    network = v2.layers(meta["settings"])
    matrices = [tensors[f"{x.name}.weight"].reshape(v2.matrix_shape(x)).copy() for x in network]
    matrices[-1][0, 0] = 8
    code = coder.encode(matrices, *v2.kinds_and_groups(network))
    refuse(sealed(dict(frame.unpack(small)) | {"CODE": code}), Malformed)


def test_other_tensors_than_were_hashed(small):
    meta, tensors = made_up(0, 4, 8, coarse=True)
    other = copy.deepcopy(tensors)
    other["classifier.1.bias"][0] += 0.125
    raw = v3.encode(meta, other)
    assert len(frame.unpack(raw)["REST"]) == len(frame.unpack(small)["REST"])
    mixed = dict(frame.unpack(small)) | {"REST": frame.unpack(raw)["REST"]}
    refuse(sealed(mixed), ChecksumMismatch)
    other = made_up(0, 4, 8, coarse=True)[0]
    other["ancestors"][1]["sha256"] = "ff" * 32
    head = bytearray(frame.unpack(small)["NETW"])
    head[-64:-32] = b"\xff" * 32  # the parent is hashed, too
    refuse(sealed(dict(frame.unpack(small)) | {"NETW": head}), ChecksumMismatch)


def test_the_command_line_of_the_benchmark(tmp_path, small):
    (tmp_path / "x.nnz").write_bytes(small)
    command = [sys.executable, "benchmarks/nnz_file.py", tmp_path / "x.nnz", "--turns=1"]
    run = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"{len(small):,} bytes" in run.stdout and "plain Python" in run.stdout
