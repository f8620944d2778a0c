"""An accelerated model's q, k and v, gate and up by one linear_group: the same bits, every hook
heard."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_models as tiny
import torch
from linear_inputs import bitwise
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

import tilewright as tw
from tilewright.adapt import together

TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
BOTH = [3, 2] * 2  # q, k and v, gate and up of each layer


def build(base="nf4", dtype=torch.float32, targets=TARGETS, **options):
    model = tiny.seeded(tiny.DECODERS["llama"]).to(dtype)
    if base != "dense":
        tw.quantize(model, tw.NF4(group_size=16) if base == "nf4" else tw.Int8())
    if targets:
        torch.manual_seed(3)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False,
                            **options)  # fmt: skip
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    return model


def projection(model, name):
    """The first layer's."""
    return next(m for n, m in model.named_modules() if n.endswith(name))


@pytest.fixture
def groups(monkeypatch):
    """How many layers each call of linear_group has."""
    calls, usual = [], together.linear_group

    def counted(x, layers):
        calls.append(len(layers))
        return usual(x, layers)

    monkeypatch.setattr(together, "linear_group", counted)
    return calls


def outcome(model, seed=5):
    """Logits, and the gradients of what trains."""
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(tiny.tokens()).logits
    if logits.requires_grad:
        logits.float().square().mean().backward()
    return logits.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def one_by_one(monkeypatch, model, **options):
    with monkeypatch.context() as patched:
        patched.setattr(together, "_layers", lambda *_: None)
        return outcome(model, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_results_have_the_bits_of_separate_calls(monkeypatch, groups, base, dtype, dropout):
    model = build(base, dtype, lora_dropout=dropout).train()
    tw.accelerate(model)
    logits, grads = one_by_one(monkeypatch, model)
    assert groups == []
    ours, our_grads = outcome(model)
    assert groups == BOTH
    assert bitwise(logits, ours) and grads.keys() == our_grads.keys()
    eps = torch.finfo(dtype).eps
    for name, grad in grads.items():
        if ".1.mlp" in name:  # nothing of dx has reached these yet
            assert bitwise(grad, our_grads[name]), name
        else:
            off = (grad - our_grads[name]).float().norm()
            assert off <= 8 * eps * grad.float().norm(), name
    assert not all(bitwise(g, our_grads[n]) for n, g in grads.items()), "dx is summed otherwise"


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_packed_layers_without_adapters(monkeypatch, groups, base):
    model = build(base, torch.bfloat16, targets=None).eval()
    tw.accelerate(model)
    with torch.no_grad():
        expected, _ = one_by_one(monkeypatch, model)
        for _ in range(2):  # the second time by the prepared call
            assert bitwise(outcome(model)[0], expected)
    assert groups == BOTH * 2


def test_some_layers_have_an_adapter_and_others_none(monkeypatch, groups):
    model = build("nf4", targets=["v_proj", "up_proj"])
    tw.accelerate(model)
    expected, _ = one_by_one(monkeypatch, model)
    assert bitwise(outcome(model)[0], expected) and groups == BOTH


def test_a_plain_linear_beside_an_adapter_is_left_to_torch(groups):
    model = build("dense", targets=["q_proj", "v_proj", "up_proj"])
    assert "q, k, v" not in {r.kind for r in tw.accelerate(model).replaced}
    outcome(model)
    assert groups == []


def test_the_report_and_restore(groups):
    model = build("nf4").eval()
    stock, _ = outcome(model)
    classes = [type(m) for m in model.modules()]
    report = tw.accelerate(model)
    rows = [r for r in report.replaced if r.kind == "q, k, v"]
    assert [(r.was, r.now) for r in rows] == [("LlamaAttention", "linear_group")] * 2
    outcome(model)
    assert groups == BOTH
    tw.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert bitwise(outcome(model)[0], stock) and groups == BOTH


@pytest.mark.parametrize("family", ["qwen3", "mistral, window"])
def test_other_families(monkeypatch, groups, family):
    model = tiny.seeded(tiny.DECODERS[family]).eval()
    tw.quantize(model, tw.NF4(group_size=16))
    tw.accelerate(model)
    with torch.no_grad():
        expected, _ = one_by_one(monkeypatch, model)
        assert bitwise(outcome(model)[0], expected) and groups == BOTH


class WithASecondLook(LlamaAttention):
    def forward(self, hidden_states, *args, **kwargs):
        self.seen = self.k_proj(hidden_states)
        return super().forward(hidden_states, *args, **kwargs)


def test_an_attention_layer_with_a_forward_of_its_own_is_left_alone(groups):
    model = build("nf4", targets=None).eval()
    for layer in model.model.layers:
        layer.self_attn.__class__ = WithASecondLook
    report = tw.accelerate(model)
    reasons = {s.reason for s in report.skipped if s.kind == "q, k, v"}
    assert reasons == {"its forward does not begin with q_proj, k_proj and v_proj of one input"}
    outcome(model)
    assert groups == [2, 2]


def test_copies_and_pickled_models_run_the_same(groups):
    model = build("nf4").eval()
    tw.accelerate(model)
    expected, _ = outcome(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        groups.clear()
        assert bitwise(outcome(again)[0], expected) and groups == BOTH
        tw.restore(again)


def test_nothing_is_kept_ready(monkeypatch):
    model = build("nf4").eval()
    tw.accelerate(model)
    outcome(model)
    assert together._ready.results == {}
    attention = model.base_model.model.model.layers[0].self_attn
    monkeypatch.setattr(attention.config, "_attn_implementation_internal", "no such function")
    with pytest.raises(Exception, match="no such function"):
        outcome(model)
    assert together._ready.results == {}


def test_a_result_is_for_its_own_input():
    q, x = (
        tw.QuantizedLinear.from_linear(nn.Linear(16, 8), tw.NF4(group_size=16)),
        torch.ones(2, 16),
    )
    expected = q(2 * x)
    with together.made_ahead(x, q, q):
        assert bitwise(q(2 * x), expected)
    with together.made_ahead(x, q, q):
        assert together.take_ready(q, x) is not None and together.take_ready(q, x) is None


def test_generation_from_a_cache(groups):
    model = build("nf4").eval()
    ids = tiny.tokens()[:1, :4]
    stock = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    tw.accelerate(model)
    ours = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(stock, ours) and groups == BOTH * 6


def test_several_threads_at_once():
    model = build("nf4").eval()
    tw.accelerate(model)
    batches = [tiny.tokens().roll(n, 1) for n in range(6)]
    with torch.no_grad():
        expected = [model(b).logits for b in batches]

    def run(batch):
        with torch.no_grad():
            return model(batch).logits

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            for ours, one in zip(pool.map(run, batches), expected, strict=True):
                assert bitwise(ours, one)


def hook_of_forward(module):
    return module.register_forward_hook(lambda *_: None)


def hook_before(module):
    return module.register_forward_pre_hook(lambda *_: None)


def hook_of_backward(module):
    return module.register_full_backward_hook(lambda *_: None)


class Patched:
    """A forward of the instance's own, as offloading puts it there."""

    def __init__(self, module):
        self.module, usual = module, module.forward
        module.forward = lambda x: usual(x)

    def remove(self):
        del self.module.forward


class Compiled:
    def __init__(self, module):
        self.module = module
        module._compiled_call_impl = module._call_impl

    def remove(self):
        self.module._compiled_call_impl = None


WATCHED = [hook_of_forward, hook_before, hook_of_backward, Patched, Compiled]


@pytest.mark.parametrize("watch", WATCHED, ids=[w.__name__ for w in WATCHED])
@pytest.mark.parametrize("which", ["gate_proj", "up_proj", "q_proj", "v_proj"])
@pytest.mark.parametrize("base", ["adapter", "packed"])
def test_a_projection_that_somebody_watches_is_called(groups, base, which, watch):
    model = build("nf4", targets=TARGETS if base == "adapter" else None)
    tw.accelerate(model)
    expected, _ = outcome(model)
    groups.clear()
    handle = watch(projection(model, which))
    assert bitwise(outcome(model)[0], expected)
    assert groups == ([2, 3, 2] if which in ("q_proj", "v_proj") else [3, 3, 2])
    handle.remove()
    outcome(model)
    assert groups[3:] == BOTH


def test_hooks_see_what_they_saw(groups):
    model = build("nf4").eval()
    tw.accelerate(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        outcome(model)
    finally:
        handle.remove()
    assert groups == []
    assert sum("Linear" in name for name in seen) >= 2 * 7
    for name in ("k_proj", "up_proj"):
        projection(model, name).register_forward_hook(lambda module, given, y: 2 * y)
    doubled, _ = outcome(model)
    tw.restore(model)
    assert (doubled - outcome(model)[0]).abs().max() <= 2e-5


def test_adapters_that_peft_has_to_run(groups):
    model = build("nf4").eval()
    tw.accelerate(model)
    with model.disable_adapter():
        outcome(model)
    assert groups == []
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    names = ["default", "other"]
    with torch.no_grad():
        model(tiny.tokens(), adapter_names=names)
    assert groups == []
    model.set_adapter("other")
    outcome(model)
    assert groups == BOTH


@pytest.mark.parametrize("which", ["up_proj", "k_proj"])
def test_a_projection_with_a_forward_of_its_own_is_called(groups, which):
    model = build("nf4", targets=None)
    tw.accelerate(model)
    mine = projection(model, which)
    cls = type(mine)
    mine.__class__ = type("Mine", (cls,), {"forward": lambda self, x: cls.forward(self, x)})
    outcome(model)
    assert sorted(groups) == ([2, 3, 3] if which == "up_proj" else [2, 2, 3])


def test_recomputed_layers_have_the_same_gradients(groups):
    grads = []
    for recompute in (False, True):
        model = build("nf4", lora_dropout=0.3).train()
        tw.accelerate(model)
        if recompute:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        grads.append(outcome(model)[1])
    assert groups[:4] == BOTH and sorted(groups[4:]) == sorted(BOTH * 2)
    assert all(bitwise(g, grads[1][n]) for n, g in grads[0].items())


@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_a_compiled_layer_is_one_graph_of_separate_calls(clean_memory, groups, part):
    model = build("nf4").eval()
    tw.accelerate(model)
    layer, x = projection(model, part), torch.randn(1, 3, 32)
    options = {}
    if part == "self_attn":
        options = {"position_embeddings": (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))}
        options["attention_mask"] = None
    want = layer(x, **options)
    assert groups == [3 if options else 2]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(x, **options), want, strict=True):
        assert wanted is None or (got - wanted).abs().max() <= 2e-5
    assert groups == [3 if options else 2]
