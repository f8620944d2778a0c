"""llama.cpp as a peer: the same weights in its blocks and files, and its products."""

import pytest
import torch
from yardstick import rms

import tilewright
from tilewright.bench import bench_linear, decoder_model, peers_ggml, peers_llama_cpp, run
from tilewright.bench.bench_decoder import SMALL
from tilewright.ops.common.packed import unpack_rows

FORMATS = {
    "int4, groups of 64": tilewright.Int4(64, solver="minmax"),
    "int4, groups of 32": tilewright.Int4(32),
    "int4, one scale a row": tilewright.Int4(None),
    "int8, one scale a row": tilewright.Int8(),
    "int8, groups of 64": tilewright.Int8(64),
}


def packed(format, n_out=24, n_in=192):
    generator = torch.Generator().manual_seed(0)
    return tilewright.quantize_weight(torch.randn(n_out, n_in, generator=generator), format)


@pytest.fixture
def ggml():
    why_not = peers_ggml.why_not()
    if why_not is not None:
        pytest.skip(f"llama.cpp: {why_not}")


@pytest.fixture
def llama_cpp():
    why_not = peers_llama_cpp.why_not()
    if why_not is not None:
        pytest.skip(f"llama.cpp: {why_not}")


# --- blocks ---


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_blocks_decode_by_ggufs_own_rules_to_the_same_weight(format):
    gguf = pytest.importorskip("gguf")
    weight = packed(format)
    kind, blocks = peers_ggml.blocks_of(weight)
    type_ = gguf.GGMLQuantizationType[kind]
    assert type_.value == peers_ggml.TYPES[kind]
    decoded = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), type_))
    exact = tilewright.dequantize_weight(weight, torch.float32)
    # a scale is a float16 there: half an ulp of it
    assert (decoded - exact).abs().max() <= 2**-11 * exact.abs().max()
    scales = unpack_rows(weight.scales, weight.out_features)
    if torch.equal(scales.float(), scales.half().float()):
        assert torch.equal(decoded, exact)


@pytest.mark.parametrize(
    ("format", "n_in", "said"),
    [
        (tilewright.NF4(64), 192, "packed is nf4 (24, 192) in groups of 64"),
        (tilewright.Int4(64, symmetric=False), 192, "packed is uint4"),
        (tilewright.Int4(8), 192, "in groups of 8, need int4 or int8 in groups of a multiple"),
        (tilewright.Int8(), 40, "packed is int8 (24, 40)"),
    ],
    ids=["nf4", "offsets", "short groups", "a part of a group"],
)
def test_what_ggml_has_no_blocks_for_is_refused(format, n_in, said):
    with pytest.raises(ValueError) as refusal:
        peers_ggml.blocks_of(packed(format, n_in=n_in))
    assert said in str(refusal.value)


def test_without_the_package_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(peers_ggml, "PACKAGE", "no-such-package-python")
    assert "pip install --no-deps no-such-package-python" in peers_ggml.why_not()
    monkeypatch.setitem(peers_llama_cpp.NEEDED, "no_such_module", "no-such-package")
    assert "no-such-package not installed" in peers_llama_cpp.why_not()


def test_a_library_whose_products_die_is_left_out(monkeypatch, tmp_path):
    pytest.importorskip("llama_cpp")
    for status, said in (("-11", "exit status -11"), ("7", "exit status 7")):
        dying = tmp_path / f"python{status}"
        dying.write_text(f"#!/bin/sh\n{'kill -11 $$' if status == '-11' else 'exit ' + status}\n")
        dying.chmod(0o755)
        monkeypatch.setattr(peers_ggml.sys, "executable", str(dying))
        peers_ggml._why_broken.cache_clear()
        assert f"its products fail here ({said})" in peers_ggml.why_not()
    peers_ggml._why_broken.cache_clear()


# --- products ---


@pytest.mark.usefixtures("ggml")
@pytest.mark.parametrize("n_tokens", [1, 5, 40])
@pytest.mark.parametrize("n_out", [17, 96])  # 17 fits no interleaved layout
@pytest.mark.parametrize("format", list(FORMATS.values())[::3], ids=list(FORMATS)[::3])
def test_products_are_those_of_the_decoded_weight(format, n_out, n_tokens):
    weight = packed(format, n_out, 512)
    x = torch.randn(n_tokens, 512, generator=torch.Generator().manual_seed(1))
    product = peers_ggml.Product(*peers_ggml.blocks_of(weight), x, threads=2)
    truth = x.double() @ tilewright.dequantize_weight(weight, torch.float32).double().T
    # activations in 8 bits, 32 with a scale: an error of 1 / 127 of the largest, uniform
    assert 1e-5 < rms(product().double() - truth) / rms(truth) < 1e-2
    first = product().clone()
    assert torch.equal(product(), first)


@pytest.mark.usefixtures("ggml")
def test_a_result_outlives_its_product():
    weight = packed(FORMATS["int4, groups of 64"], 64, 512)
    x = torch.randn(3, 512)

    def made():
        return peers_ggml.Product(*peers_ggml.blocks_of(weight), x, threads=1)

    kept = made()()
    copy = kept.clone()
    for _ in range(20):
        made()()
    assert torch.equal(kept, copy)


@pytest.mark.usefixtures("ggml")
def test_blocks_of_another_size_are_refused():
    kind, blocks = peers_ggml.blocks_of(packed(FORMATS["int4, groups of 64"]))
    with pytest.raises(ValueError, match="blocks has 2592 bytes, need 3456 for Q4_0"):
        peers_ggml.Product(kind, blocks, torch.ones(1, 256), threads=1)


@pytest.mark.usefixtures("ggml")
@pytest.mark.parametrize("name", ["int4-1", "int4-128", "int8-1", "int8-128-int8-activations"])
def test_the_benchmark_compares_it_with_the_reference(name):
    case = bench_linear.CASES[name]
    kind = {"int4": "llama.cpp Q4_0", "int8": "llama.cpp Q8_0"}[case["format"]]
    variants = {n: v for n, v in bench_linear.VARIANTS.items() if n in ("tilewright", kind)}
    errors = run.check(bench_linear, case, "bf16", "fwd", "cpu", variants)
    assert 1e-4 < errors[kind][0] < 2e-2
    if "fwd+bwd" in case["modes"]:
        errors = run.check(bench_linear, case, "bf16", "fwd+bwd", "cpu", variants)
        assert errors[kind] == (None, "")  # it cannot, and the table says why


# --- files ---


def test_a_file_holds_the_models_weights(tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    peers_llama_cpp.write_gguf(path, SMALL, "int4")
    found = tilewright.read_gguf(path)
    ours = decoder_model.packed_weights(SMALL, "int4")
    plain = decoder_model.plain_weights(SMALL)
    assert set(found) == {peers_llama_cpp.name_in_file(name) for name in (*ours, *plain)}
    for name, weight in ours.items():
        exact = tilewright.dequantize_weight(weight, torch.float32)
        got = tilewright.dequantize_weight(found[peers_llama_cpp.name_in_file(name)])
        if name.endswith(("q_proj", "k_proj")):
            # neighbours there are the halves of a head here
            pairs = got.view(-1, SMALL.head_width // 2, 2, got.shape[1])
            got = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], 1).reshape(exact.shape)
        assert (got - exact).abs().max() <= 2**-11 * exact.abs().max(), name
    for name, weight in plain.items():
        assert torch.equal(found[peers_llama_cpp.name_in_file(name)].float(), weight.float())


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("before", [0, 9])
def test_a_session_can_be_repeated_and_agrees_with_the_dense_model(before):
    tokens = torch.randint(0, SMALL.vocab, (16,), generator=torch.Generator().manual_seed(3))
    session = peers_llama_cpp.Session(SMALL, "int4", tokens, before, threads=2)
    first, second = session(), session()
    assert torch.equal(first, second)
    dense = decoder_model.hosted(SMALL, "int4", "eager", torch.float64, "cpu")
    with torch.no_grad():
        truth = dense(tokens[None]).logits[0]
    truth = truth[before:] if before else truth[-1:]
    assert rms(first.double() - truth) / rms(truth) < 3e-2
