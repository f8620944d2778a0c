"""The recorded step: what it computes, for which models, and when the model itself runs."""

import pytest
import torch
import transformers as hf
from test_engine_generate import BASE, build

import tilewright as tw
from tilewright import recording
from tilewright.cache import new_cache
from tilewright.native import native
from tilewright.recording import CannotRecord, Recording
from tilewright.step import Stepper

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**BASE),
    "llama-tied-bias": lambda: hf.LlamaConfig(
        **BASE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama-stretched": lambda: hf.LlamaConfig(
        **BASE, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
    ),
    "gelu": lambda: hf.LlamaConfig(**BASE, hidden_act="gelu"),
    "mistral": lambda: hf.MistralConfig(**BASE, sliding_window=None),
    "qwen2": lambda: hf.Qwen2Config(**BASE),
    "qwen3": lambda: hf.Qwen3Config(**BASE, head_dim=16),
}
LENGTHS = (5, 3, 11)  # of the prompts in a batch
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of the largest logit


def accelerated(model):
    tw.accelerate(model)
    return model


def made(name, dtype=torch.float32, pack=False):
    torch.manual_seed(1)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_()
    if pack:
        tw.quantize(model, tw.Int4(32))
    return accelerated(model)


def prompts(lengths=LENGTHS):
    """Token ids, mask and positions, padded to the left."""
    generator = torch.Generator().manual_seed(2)
    width = max(lengths)
    ids = torch.randint(0, 258, (len(lengths), width), generator=generator)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def walk(stepper, lengths=LENGTHS, n=6):
    """Logits (n + 1, B, V) of a prompt and of n given tokens behind it."""
    ids, mask, positions = prompts(lengths)
    found = [stepper(ids, mask, positions).clone()]
    generator = torch.Generator().manual_seed(3)
    for _ in range(n):
        ids = torch.randint(0, 258, (len(lengths), 1), generator=generator)
        mask = torch.cat([mask, mask.new_ones(len(lengths), 1)], dim=1)
        positions = positions[:, -1:] + 1
        found.append(stepper(ids, mask, positions).clone())
    return torch.stack(found)


def by_forward(model):
    stepper = Stepper(model, new_cache(model.config))
    stepper.why_not = "asked for the model's own"
    return stepper


@pytest.mark.parametrize("dtype", LIMITS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("pack", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_recorded_step_is_the_models_forward(name, pack, dtype):
    model = made(name, dtype, pack)
    stepper = Stepper(model, new_cache(model.config))
    found, expected = walk(stepper), walk(by_forward(model))
    assert stepper.why_not is None and stepper._recorded is not None
    error = (found - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() <= LIMITS[dtype]
    if dtype == torch.bfloat16:  # each path's distance to the same weights in float32
        truth = walk(by_forward(made(name, pack=pack)))
        assert (found - truth).norm() <= 1.5 * (expected - truth).norm()


@pytest.mark.parametrize("pack", [False, True], ids=["dense", "packed"])
def test_an_adapter_that_is_not_merged_is_recorded(pack):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    if pack:
        tw.quantize(model, tw.Int4(32))
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = accelerated(peft.get_peft_model(model, settings).eval())
    stepper = Stepper(model, new_cache(model.config))
    found, expected = walk(stepper), walk(by_forward(model))
    assert stepper._recorded is not None, stepper.why_not
    assert (found - expected).abs().max() <= LIMITS[torch.float32] * expected.abs().max()
    with model.disable_adapter():
        plain = walk(by_forward(model))
    assert (expected - plain).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    "method", ["parallel", "sequential", "ia3", "dora", "bitfit", "sparse", "mask"]
)
def test_no_adapter_is_left_out(method):
    """Recorded or not: the adapter has its share."""
    torch.manual_seed(1)
    config = hf.LlamaConfig(**BASE, attention_bias=True)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    plain = walk(by_forward(model))
    options = {"by": "random"} if method == "mask" else {}
    tuned = tw.adapt(model, method, **options)
    with torch.no_grad():
        for parameter in tuned.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    tw.accelerate(tuned.model)
    tuned.model.eval()
    found = walk(Stepper(tuned.model, new_cache(tuned.model.config)))
    expected = walk(by_forward(tuned.model))
    assert (found - expected).abs().max() <= LIMITS[torch.float32] * expected.abs().max()
    assert (expected - plain).abs().max() > 0.05 * plain.abs().max()


def test_the_cache_knows_the_tokens_once_it_is_settled():
    model = made("llama")
    steppers = Stepper(model, new_cache(model.config)), by_forward(model)
    for stepper in steppers:
        walk(stepper)
        stepper.settle()
    ours, theirs = (stepper._cache for stepper in steppers)
    assert ours.get_seq_length() == theirs.get_seq_length() == max(LENGTHS) + 6
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys)
        torch.testing.assert_close(layer.values, other.values)


def test_a_full_cache_grows_and_is_recorded_anew(monkeypatch):
    monkeypatch.setattr("tilewright.cache.GrowingLayer.ROOM", 8)
    model = made("llama")
    stepper = Stepper(model, new_cache(model.config))
    seen = []
    original = Stepper._is_ready
    monkeypatch.setattr(
        Stepper, "_is_ready", lambda self, *a: seen.append(original(self, *a)) or seen[-1]
    )
    found, expected = walk(stepper, (3,), 60), walk(by_forward(model), (3,), 60)
    assert (found - expected).abs().max() <= LIMITS[torch.float32] * expected.abs().max()
    assert seen[:60].count(False) >= 2 and seen[:60].count(True) >= 50


def test_another_number_of_threads_is_recorded_anew():
    model = made("llama")
    stepper = Stepper(model, new_cache(model.config))
    ids, mask, positions = prompts((4,))
    stepper(ids, mask, positions)
    token, one = ids[:, -1:], mask.new_ones(1, 1)
    threads = torch.get_num_threads()
    try:
        steps = []
        for n in (1, 2):
            torch.set_num_threads(n)
            mask, positions = torch.cat([mask, one], 1), positions[:, -1:] + 1
            assert stepper._recorded is None or not stepper._recorded.fits(1)
            steps.append(stepper(token, mask, positions).clone())
        stepper.settle()
        assert stepper._cache.get_seq_length() == 6
    finally:
        torch.set_num_threads(threads)


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


REASONS = {
    "its attention is not accelerated": (lambda: build("llama"), lambda model: None),
    "none of the models": (lambda: accelerated(build("mixtral")), lambda model: None),
    "has a window": (lambda: accelerated(build("mistral-window")), lambda model: None),
    "has hooks": (lambda: made("llama"), hooked),
}


@pytest.mark.parametrize("reason", REASONS)
def test_other_models_go_through_their_forward(reason):
    make, change = REASONS[reason]
    model = make()
    change(model)
    stepper = Stepper(model, new_cache(model.config))
    assert reason in stepper.why_not
    found, expected = walk(stepper), walk(by_forward(model))
    assert torch.equal(found, expected) and stepper._recorded is None


def test_a_hook_on_every_module_is_called():
    model = made("llama")
    called = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(type(module).__name__)
    )
    try:
        stepper = Stepper(model, new_cache(model.config))
        walk(stepper, n=2)
    finally:
        handle.remove()
    assert "hooks on every module" in stepper.why_not
    assert called.count("LlamaDecoderLayer") == 3 * BASE["num_hidden_layers"]


def test_attention_that_stays_stock_is_left_to_it():
    model = made("llama")
    model.model.layers[1].self_attn._tilewright_attention.stays_stock = "a reason"
    assert "a reason" in Stepper(model, new_cache(model.config)).why_not


def test_what_cannot_be_recorded_is_found_while_recording():
    torch.manual_seed(1)
    config = hf.LlamaConfig(**BASE, hidden_act="relu")
    model = accelerated(hf.AutoModelForCausalLM.from_config(config).eval())
    stepper = Stepper(model, new_cache(model.config))
    assert stepper.why_not is None
    found, expected = walk(stepper), walk(by_forward(model))
    assert "its activation is" in stepper.why_not
    assert torch.equal(found, expected)


def test_an_operator_that_is_none_of_a_kernel_is_noticed(monkeypatch):
    """With the reference forced, nothing is recorded, and nothing may be taken for done."""
    monkeypatch.setenv("TILEWRIGHT_IMPL", "reference")
    model = made("llama")
    stepper = Stepper(model, new_cache(model.config))
    found, expected = walk(stepper), walk(by_forward(model))
    assert "made 0 calls of kernels" in stepper.why_not
    assert torch.equal(found, expected)


def test_greedy_output_is_that_of_stock(monkeypatch):
    stock = build("llama")
    model = accelerated(build("llama"))
    asked = [[1, 2, 3], list(range(60, 80)), [7] * 5]
    taken = []
    original = Stepper._is_ready
    monkeypatch.setattr(
        Stepper, "_is_ready", lambda self, *a: taken.append(original(self, *a)) or taken[-1]
    )
    found = tw.generate(model, asked, max_new_tokens=30)
    assert taken.count(True) > 20
    with torch.no_grad():
        for ids, generation in zip(asked, found, strict=True):
            out = stock.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)
            assert generation.tokens == out[0, len(ids) :].tolist()


# --- recordings by themselves ---


def test_a_recording_reads_what_lies_there_when_it_is_made():
    x, weight = torch.randn(2, 64), torch.randn(64)
    calls = Recording()
    with calls.on():
        y = tw.rms_norm(x, weight)
        calls.keep((x, weight))
    assert len(calls) == 1
    for _ in range(2):
        x.copy_(torch.randn(2, 64))
        calls()
        assert torch.equal(y, tw.rms_norm(x, weight))


def test_a_temporary_of_a_call_lives_as_long_as_the_recording():
    layer = tw.QuantizedLinear(
        tw.quantize_weight(torch.randn(64, 64).bfloat16(), tw.Int4(32)),
        torch.nn.Parameter(torch.randn(64).bfloat16()),  # the kernel reads it in float32
    )
    x = torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        expected = layer(x)
        calls = Recording()
        with calls.on():
            y = layer(x)
        held = [torch.full((64,), 1e9) for _ in range(64)]  # what has been given back is taken
        calls()
    assert len(held) == 64 and torch.equal(y, expected)


def test_recordings_do_not_nest_and_end_with_their_block():
    calls = Recording()
    with calls.on():
        assert recording.current() is calls
        with pytest.raises(ValueError, match="records already"), Recording().on():
            pass
        with pytest.raises(ValueError, match="part of another"):
            Recording()()
    assert recording.current() is None
    with pytest.raises(RuntimeError, match="spoilt"), calls.on():
        raise RuntimeError("spoilt")
    assert recording.current() is None
    native().Recording().start  # noqa: B018
    x = torch.randn(2, 8)
    assert torch.isfinite(tw.rms_norm(x)).all()


def test_a_copy_that_torch_would_make_is_refused():
    generator = torch.Generator().manual_seed(0)
    weight = tw.quantize_weight(torch.randn(32, 64, generator=generator), tw.Int4(32))
    from dataclasses import replace

    ordered = replace(weight, input_order=torch.randperm(64, generator=generator).int())
    with torch.no_grad(), pytest.raises(CannotRecord, match="input_order"), Recording().on():
        tw.quantized_linear(torch.randn(1, 64), ordered)
    assert recording.current() is None
