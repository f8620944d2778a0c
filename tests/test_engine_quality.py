"""What quantization does to a trained model's predictions, against noise of the same size."""

import copy
import math

import pytest
import torch
import transformers as hf

import tilewright as tw
from tilewright.data import byte_tokenizer, encode, pack
from tilewright.quality import compare_models
from tilewright.quantized import quantized_layers

# groups that are short against every row, so that the error of a format hardly depends on the layer
FORMATS = {
    "int8, groups of 32": tw.Int8(group_size=32),
    "int4, groups of 32": tw.Int4(group_size=32),
    "nf4, groups of 64": tw.NF4(group_size=64),
    "nf4, groups of 64, nested": tw.NF4(group_size=64, double_quant=True),
    "fp8, one scale a row": tw.FP8(),
}
DRAWS = 2

pytestmark = pytest.mark.slow  # it trains a model first


def nearest(values, levels):
    """Each value's nearest level, float64, by looking at all of them."""
    return levels[(values[..., None] - levels).abs().argmin(-1)]


def error_on_normal_weights(format):
    """rms of (decoded - w) / rms of w for normal w, from the format's definition alone."""
    torch.manual_seed(11)
    group = {"FP8": 64}.get(type(format).__name__) or format.group_size
    w = torch.randn(2000, group, dtype=torch.float64)
    unit = w / w.abs().amax(1, keepdim=True)
    if isinstance(format, tw.FP8):
        decoded = (unit * 448).to(torch.float8_e4m3fn).double() / 448
    elif isinstance(format, tw.NF4):
        # quantiles of the normal distribution (QLoRA, section 3)
        p = torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1]
        q = torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1]
        positive, negative = (torch.special.ndtri(t) for t in (p, q))
        table = torch.cat([-negative, positive.new_zeros(1), positive.flip(0)])
        decoded = nearest(unit, table / table.abs().max())
    else:
        steps = 127 if isinstance(format, tw.Int8) else 7
        decoded = (unit * steps).round() / steps
    return ((decoded - unit) * w.abs().amax(1, keepdim=True)).square().mean().sqrt().item()


@pytest.fixture(scope="module")
def trained():
    """A model of 0.2 million parameters after some learning, and rows that it is judged on."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=258, max_position_embeddings=128, bos_token_id=None,
        eos_token_id=256, pad_token_id=257, initializer_range=0.1,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    tokenizer = byte_tokenizer(128)
    texts = [hf.__doc__ or "", *(str(m.__doc__) for m in vars(math).values()), pytest.__doc__ or ""]
    texts += [str(f.__doc__) for f in vars(torch).values() if callable(f)][:150]
    tw.finetune(
        model, [t for t in texts if len(t) > 40], tokenizer=tokenizer, steps=40, context=128,
        rows=4, learning_rate=5e-3, stock=True,
    )  # fmt: skip
    held_out = [str(f.__doc__) for f in vars(torch.Tensor).values() if callable(f)][:60]
    rows = pack(encode(tokenizer, [t for t in held_out if len(t) > 40]), 128, 257)
    keep = slice(0, 10)
    rows = type(rows)(
        rows.input_ids[keep], rows.position_ids[keep], rows.labels[keep], rows.n_pieces
    )
    return model.eval(), rows


def perturbed(model, relative, seed):
    """The layers that quantize would pack, with normal noise of `relative` times their rms."""
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in noisy.named_parameters():
            if "proj" in name:
                rms = parameter.square().mean().sqrt()
                parameter += relative * rms * torch.randn(parameter.shape, generator=generator)
    return noisy


@pytest.fixture(scope="module")
def noise(trained):
    """Format -> the mean of (KL, share of other top tokens) under noise of its size."""
    model, rows = trained
    found, known = {}, {}
    for name, format in FORMATS.items():
        relative = error_on_normal_weights(format)
        if relative in known:
            found[name] = known[relative]
            continue
        draws = [compare_models(model, perturbed(model, relative, s), rows) for s in range(DRAWS)]
        kl = sum(d.kl for d in draws) / DRAWS
        found[name] = known[relative] = kl, sum(1 - d.same_top for d in draws) / DRAWS
    return found


def gate(found, noise):
    """Divergence grows with the square of the error: twice the noise's is 1.4 times its error."""
    kl, other_top = noise
    # the share of other top tokens is counted, so it scatters by its binomial deviation
    scatter = 3 * math.sqrt(other_top * (1 - other_top) / found.n_tokens)
    return found.kl <= 2 * kl and 1 - found.same_top <= 1.5 * other_top + scatter + 2e-3


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_costs_no_more_than_noise_of_its_size(format, trained, noise):
    model, rows = trained
    packed = copy.deepcopy(model)
    tw.quantize(packed, FORMATS[format])
    found = compare_models(model, packed, rows)
    assert found.n_tokens == rows.n_valid > 1000
    assert gate(found, noise[format]), (found, noise[format])
    # sizes that a reader expects: the loss moves by much less than the divergence's own order
    change = math.log(found.perplexity_after / found.perplexity_before)
    assert abs(change) <= math.sqrt(2 * found.kl)


@pytest.mark.parametrize("format", FORMATS)
def test_the_gate_sees_wrong_scales(format, trained, noise):
    """One layer's scales moved along by a row; and, for 8 bits, all weights 5 % too large."""
    model, rows = trained
    packed = copy.deepcopy(model)
    tw.quantize(packed, FORMATS[format])
    for _, layer in quantized_layers(packed):
        if FORMATS[format] == tw.Int8(group_size=32) or isinstance(FORMATS[format], tw.FP8):
            layer.scales *= 1.05
        else:
            layer.scales = layer.scales.flip(2).contiguous()
    assert not gate(compare_models(model, packed, rows), noise[format])


def test_the_measures_are_those_of_the_definition(trained):
    model, rows = trained
    rows = type(rows)(rows.input_ids[:2], rows.position_ids[:2], rows.labels[:2], rows.n_pieces)
    other = perturbed(model, 0.1, seed=7)
    found = compare_models(model, other, rows)
    kls, same, nll = [], [], [[], []]
    for n in range(len(rows)):
        batch = rows.batch([n])
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            p, q = (m(**batch, use_cache=False).logits[0].double() for m in (model, other))
        for i in range(1, len(labels)):
            if labels[i] < 0:
                continue
            a, b = p[i - 1].softmax(0), q[i - 1].softmax(0)
            kls.append((a * (a.log() - b.log())).sum().item())
            same.append(float(a.argmax() == b.argmax()))
            for at, of in enumerate((a, b)):
                nll[at].append(-of[labels[i]].log().item())
    n = len(kls)
    assert found.n_tokens == n
    assert found.kl == pytest.approx(sum(kls) / n, rel=1e-4)
    assert found.kl_largest == pytest.approx(max(kls), rel=1e-3)
    assert found.same_top == pytest.approx(sum(same) / n)
    assert found.perplexity_before == pytest.approx(math.exp(sum(nll[0]) / n), rel=1e-5)
    assert found.perplexity_after == pytest.approx(math.exp(sum(nll[1]) / n), rel=1e-5)
    alike = compare_models(model, copy.deepcopy(model), rows)
    assert alike.kl == 0 and alike.same_top == 1


def test_rows_without_a_prediction_are_refused(trained):
    model, _ = trained
    with pytest.raises(ValueError, match="compare_models: rows hold no token that has a predec"):
        compare_models(model, model, pack([[1], [2]], 2, 257))
