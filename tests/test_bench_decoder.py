"""The benchmark of the decoder: its model, its figures, and that all variants agree."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tilewright
from tilewright import QuantizedLinear, cli
from tilewright.bench import bench_decoder, ceilings, decoder_model, run
from tilewright.bench.bench_decoder import SMALL
from tilewright.bench.variant import Variant

TINY = {
    name: {**bench_decoder.small(case), "T": 5, "P": min(case["P"], 7)}
    for name, case in bench_decoder.CASES.items()
    if "512" not in name
}
by_case = pytest.mark.parametrize("case", TINY.values(), ids=TINY)


@pytest.fixture
def tiny(monkeypatch):
    variants = {n: v for n, v in bench_decoder.VARIANTS.items() if "llama.cpp" not in n}
    monkeypatch.setattr(bench_decoder, "CASES", TINY)
    monkeypatch.setattr(bench_decoder, "VARIANTS", variants)
    monkeypatch.setattr(bench_decoder, "quick", lambda case: case)
    known = ceilings.Ceilings(fma=100.0, bf16_dot=200.0, int8_dot=None, read=10.0, how="made up")
    monkeypatch.setattr(ceilings, "measure", lambda device: known)


def run_tiny(*arguments):
    return run.main(["decoder", "--quick", "--seconds", "0.01", *arguments])


def session(attention, case, dtype=torch.float32):
    inputs = bench_decoder.make_inputs(case, dtype, "cpu")
    return bench_decoder.hosted(attention, case, inputs)["session"]


# --- the model ---


def test_the_large_shape_is_that_of_a_llama_of_one_billion():
    shape = bench_decoder.LARGE
    with torch.device("meta"):
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(decoder_model.config_of(shape))
    sizes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    expected = {
        f"model.layers.{layer}.{name}": size
        for layer in range(shape.layers)
        for name, size in shape.layer_matrices.items()
    }
    assert sizes == {**expected, "lm_head": (shape.vocab, shape.hidden)}
    assert 1.09e9 < sum(p.numel() for p in model.parameters()) < 1.11e9
    in_layers = sum(n_out * n_in for n_out, n_in in expected.values())
    assert shape.layer_weights == in_layers


@pytest.mark.parametrize("format", decoder_model.FORMATS)
def test_both_models_hold_the_values_of_the_codes(format):
    ours = decoder_model.hosted(SMALL, format, "tilewright", torch.float32, "cpu")
    dense = decoder_model.hosted(SMALL, format, "sdpa", torch.float32, "cpu")
    layers = dict(dense.named_modules())
    packed = [(n, m) for n, m in ours.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(packed) == 7 * SMALL.layers + 1
    assert {m.format for n, m in packed if n != "lm_head"} == {format}
    for name, layer in packed:
        assert type(layers[name]) is nn.Linear
        assert torch.equal(layers[name].weight, tilewright.dequantize_weight(layer.packed))
    own = dict(ours.named_parameters())
    for name, parameter in own.items():
        assert torch.equal(parameter, dict(dense.named_parameters())[name])
    assert len(own) == 2 + 2 * SMALL.layers  # the embedding and the norms: nothing else is dense


# --- what a call is ---


@by_case
def test_a_call_gives_the_logits_of_a_pass_over_all_tokens_and_can_be_repeated(case):
    model = decoder_model.hosted(SMALL, case["format"], "eager", torch.float32, "cpu")
    tokens = bench_decoder.make_inputs(case, torch.float32, "cpu")["tokens"]
    with torch.no_grad():
        whole = model(tokens[None]).logits[0]
    expected = whole[case["P"] :] if case["P"] else whole[-1:]
    for attention in ("sdpa", "tilewright"):
        run_once = session(attention, case)
        first, second = run_once(), run_once()
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-4)


def test_operations_are_those_that_torch_counts():
    for name in ("decode-int4", "prefill-128-int4"):
        case = TINY[name]
        run_once = session("eager", case)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run_once()
        # what torch computes of pairs that the mask then hides
        before, n = case["P"], case["T"]
        hidden = 0 if before else n * (n - 1) // 2
        pairs = 4 * SMALL.layers * SMALL.hidden * hidden
        angles = 2 * SMALL.head_width // 2 * n  # a product of one column, of positions
        counted = counter.get_total_flops() - pairs
        operations, n_bytes = bench_decoder.work(case, 2, "fwd")
        assert 0 <= counted - operations <= angles
        passes, tokens = (n, n * before + n * (n + 1) // 2) if before else (1, n)
        weights = SMALL.layer_weights * 4.5 / 8 + SMALL.vocab * SMALL.hidden
        kept = 2 * SMALL.layers * SMALL.kv_heads * SMALL.head_width * 2
        assert n_bytes == passes * weights + kept * tokens


# --- agreement ---


@by_case
def test_every_variant_is_the_same_model(case):
    variants = {
        name: v
        for name, v in bench_decoder.VARIANTS.items()
        if v.applies(case) and v.why_not() is None
    }
    errors = run.check(bench_decoder, case, "bf16", "fwd", "cpu", variants)
    assert set(errors) == set(variants)
    for name, (error, wrong) in errors.items():
        assert wrong == "", name
        # llama.cpp rounds activations to 8 bits before each product
        assert error < (3e-2 if "llama.cpp" in name else 1.5e-2), name


@pytest.mark.usefixtures("tiny")
def test_a_layer_wrong_by_one_percent_gets_no_time(monkeypatch, capsys):
    packed: Any = QuantizedLinear.packed

    def spoilt(layer):
        weight = packed.fget(layer)
        return replace(weight, scales=1.01 * weight.scales)

    monkeypatch.setattr(QuantizedLinear, "packed", property(spoilt))
    assert run_tiny("--case", "decode-nf4") == 1
    printed = capsys.readouterr()
    (ours,) = [line for line in printed.out.splitlines() if "| tilewright " in line]
    assert "wrong: output errs by" in ours and "tokens/s" not in ours
    assert "wrong result, so no speed is shown" in printed.err


# --- the run ---


@pytest.mark.usefixtures("tiny")
def test_a_run_shows_tokens_a_second(tmp_path, capsys):
    file = tmp_path / "r.json"
    assert run_tiny("--json", str(file)) == 0
    head, _, *lines = [ln for ln in capsys.readouterr().out.splitlines() if ln.startswith("| ")]
    assert head.split("|")[-2] == " tokens/s   "
    assert len(lines) == 4 * 2  # cases, variants
    for row in json.loads(file.read_text())["results"]:
        rate = TINY[row["case"]]["T"] / (row["times"]["median_us"] / 1e6)
        assert row["per_second"] == {"tokens": pytest.approx(rate)}


@pytest.mark.usefixtures("tiny")
def test_a_peer_that_is_missing_is_named_with_its_reason(monkeypatch, capsys):
    absent = Variant(lambda case, session: None, why_not=lambda: "it is not installed")
    monkeypatch.setitem(bench_decoder.VARIANTS, "other", absent)
    assert run_tiny("--case", "prefill-128-nf4", "--no-check") == 0
    printed = capsys.readouterr().out
    assert "Left out, other: it is not installed\n" in printed and "| other " not in printed


@pytest.mark.usefixtures("tiny")
def test_quick_takes_the_smaller_shape_and_says_so(monkeypatch, capsys):
    taken = []
    real = bench_decoder.counts

    def remembered(case):
        taken.append(case["T"])
        return real(case)

    monkeypatch.setattr(bench_decoder, "counts", remembered)
    monkeypatch.setattr(bench_decoder, "quick", lambda case: {**case, "T": 3})
    assert cli.main(["bench", "decoder", "--quick", "--seconds", "0.01", "--no-check"]) == 0
    assert taken == [3] * 4
    assert "By --quick in smaller shapes" in capsys.readouterr().out
