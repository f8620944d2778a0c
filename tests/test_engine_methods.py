"""Every method of `tilewright.adapt` by one table: what trains, where it begins, files, merging."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import nn

import tilewright as tw
from tilewright.adapt.methods import Half

IDS = tiny.tokens(3)
RANK, TOKENS, DENSITY = 4, 3, 0.1


def llama(**more):
    return tiny.seeded(tiny.DECODERS["llama"], **more)


def bert():
    return tiny.seeded(tiny.ENCODERS["bert"])


def linears(model, *names):
    """(outputs, inputs) of the linear layers of these names; of all but the head without names."""
    return [
        (m.out_features, m.in_features)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n != "lm_head"
        and (not names or n.rsplit(".", 1)[-1] in names)
    ]  # fmt: skip


def low_rank(model):
    return sum(RANK * (o + i) for o, i in linears(model))


def dora(model):
    return low_rank(model) + sum(o for o, _ in linears(model))


def ia3(model):
    return sum(o for o, _ in linears(model, "k_proj", "v_proj")) + sum(
        i for _, i in linears(model, "down_proj")
    )


def prefix(model):
    c = model.config
    return TOKENS * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim


def blocks(model):
    return RANK * 2 * model.config.hidden_size * model.config.num_hidden_layers


def biases(model):
    return sum(o for o, _ in linears(model))


def kept(model):
    return sum(int(DENSITY * o * i) for o, i in linears(model))


def kept_over_all(model):
    return int(DENSITY * sum(o * i for o, i in linears(model)))


def half(model):
    """4 of 8 attention matrices, 3 of 6 of the MLPs by draw, so counted by the plan itself."""
    plan = tw.HalfPlan(model, seed=0)
    drawn = sum(unit.numel() for unit in plan.draw(0))
    units = {p for unit in plan.units for p in unit.parameters}
    return drawn + sum(p.numel() for p in model.parameters() if p not in units)


@dataclass
class Case:
    """One line of the table.

    methods   what `adapt` gets
    count     from the stock model, how many values train
    starts    the first logits are the base's
    merges    or the message that refuses it
    lr        of the 30 steps
    options   of `adapt`
    """

    methods: tuple
    count: Callable[[nn.Module], int]
    merges: str = ""
    starts: bool = True
    lr: float = 1e-2
    build: Callable[..., nn.Module] = llama
    options: dict[str, Any] = field(default_factory=dict)


NO_MERGE = "between its matrices, so no weight says the same"
PLAIN = "there is nothing to merge"
CASES = {
    "lora": Case((tw.LoRA(rank=RANK),), low_rank),
    "dora": Case((tw.DoRA(rank=RANK),), dora),
    "ia3": Case((tw.IA3(),), ia3, lr=5e-2),
    "prefix": Case((tw.Prefix(TOKENS),), prefix, "keys and values", starts=False, lr=1e-1),
    "parallel": Case((tw.Parallel(RANK),), low_rank, NO_MERGE),
    "parallel, identity": Case((tw.Parallel(RANK, activation="none"),), low_rank),
    "parallel, ffn": Case((tw.Parallel(RANK, at="ffn"),), blocks, NO_MERGE),
    "parallel, attention, identity": Case(
        (tw.Parallel(RANK, at="attention", activation="none"),), blocks, "whose adapter no weight"
    ),
    "sequential": Case((tw.Sequential(RANK),), lambda m: 2 * blocks(m), NO_MERGE),
    "sequential, identity": Case(
        (tw.Sequential(RANK, activation="none", at="linear"),),
        lambda m: sum(2 * RANK * o for o, _ in linears(m)),
    ),
    "bitfit, added": Case((tw.BitFit(add=True),), biases, PLAIN),
    "bitfit": Case(
        (tw.BitFit(),), lambda m: sum(o for o, _ in linears(m, "q_proj", "k_proj", "v_proj")),
        PLAIN, build=tiny.DECODERS["qwen2, window in one layer"], lr=5e-2,
    ),
    "mask, random": Case((tw.Mask(DENSITY),), kept, PLAIN),
    "mask, fisher": Case(
        (tw.Mask(DENSITY, by="fisher"),), kept_over_all, PLAIN,
        options={"batches": [{"input_ids": IDS, "labels": IDS}]},
    ),
    "mask, magnitude": Case((tw.Mask(DENSITY, by="magnitude"),), kept, PLAIN, starts=False),
    "half": Case((Half(),), half, PLAIN),
    "sparse": Case((tw.SparseDelta(density=DENSITY),), kept),
    "prefix and parallel, as MAM": Case(
        (tw.Parallel(RANK, at="ffn"), tw.Prefix(TOKENS)), lambda m: blocks(m) + prefix(m),
        NO_MERGE, starts=False,
    ),
    "lora and sparse": Case(
        (tw.LoRA(rank=RANK), tw.SparseDelta(density=DENSITY)), lambda m: low_rank(m) + kept(m)
    ),
}  # fmt: skip
FREE = ("half", "bitfit", "mask")  # what they train is the model's own


def adapted(case):
    model = tiny.seeded(case.build)
    return model, tw.adapt(model, *case.methods, **case.options)


def bits(t):
    return t.detach().clone().contiguous().view(torch.uint8)


def train(tuner, lr, steps=30):
    """Losses before each step, and the one after the last."""
    optimizer = tuner.optimizer(lr=lr)
    model, losses = tuner.model.train(), []
    for step in range(steps + 1):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        if step < steps:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tuner.after_step(optimizer)
    model.eval()
    return losses


@pytest.mark.parametrize("name", CASES)
def test_a_method_of_the_table(name, tmp_path):
    case = CASES[name]
    stock = tiny.seeded(case.build)
    base = stock(IDS).logits
    model, tuner = adapted(case)
    own = dict(model.named_parameters(remove_duplicate=False))
    before = {n: bits(p) for n, p in stock.named_parameters(remove_duplicate=False)}

    only = tuner.only()
    masks = {id(p): mask for p, mask in only.items()}
    count = sum(int(masks[id(p)].sum()) if id(p) in masks else p.numel()
                for p in tuner.parameters())  # fmt: skip
    assert count == case.count(stock)
    assert f"{count} values train" in str(tuner) or len(case.methods) > 1
    assert {id(p) for p in tuner.model.parameters() if p.requires_grad} == {
        id(p) for p in tuner.parameters()
    }
    assert torch.equal(tuner.model(IDS).logits, base) == case.starts

    if name == "mask, magnitude":  # what stands still is zero from here on
        before = {n: bits(p) for n, p in model.named_parameters(remove_duplicate=False)}
    losses = train(tuner, case.lr)
    assert losses[-1] < 0.95 * losses[0], losses

    trained = {id(p) for p in tuner.parameters()}
    compared = 0
    by_identity = {id(p): p for p in own.values()}
    for n, p in stock.named_parameters(remove_duplicate=False):
        mine = own.get(n, own.get(n.replace("weight", "base_layer.weight")))
        assert mine is not None and id(mine) in by_identity, n
        if id(mine) in masks:
            still = ~masks[id(mine)]
            was = before[n].view(p.dtype).view(p.shape)
            assert torch.equal(mine.detach()[still], was[still]), n
        elif id(mine) not in trained:
            assert torch.equal(bits(mine), before[n]), n
            compared += 1
    assert compared or name in FREE

    after = tuner.model(IDS).logits
    path = tmp_path / "saved"
    tuner.save(path)
    fresh = tiny.seeded(case.build)
    loaded = tw.load_adapted(fresh, path)
    assert torch.equal(loaded.model.eval()(IDS).logits, after)
    assert str(loaded).split("\n")[0] == str(tuner).split("\n")[0]

    if case.merges:
        with pytest.raises(ValueError, match=case.merges):
            tuner.merge()
        return
    tuner.merge()
    merged = tuner.model(IDS).logits
    assert not torch.equal(merged, base)
    assert (merged - after).abs().max() <= 1e-5 * after.abs().max()
    tuner.unmerge()
    assert torch.equal(tuner.model(IDS).logits, after)
    for n, _ in stock.named_parameters():
        mine = own.get(n, own.get(n.replace("weight", "base_layer.weight")))
        assert torch.equal(bits(mine), before[n]), n


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("half", "mask, magnitude")])
def test_removed_the_model_is_what_it_was(name):
    case = CASES[name]
    model, tuner = adapted(case)
    train(tuner, case.lr, steps=2)
    tuner.remove()
    stock = tiny.seeded(case.build)
    assert torch.equal(model.eval()(IDS).logits, stock(IDS).logits)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert all(p.requires_grad for p in model.parameters())
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def test_a_name_with_options_is_the_method():
    model = llama()
    tuner = tw.adapt(model, "parallel", rank=2, scale=1.0, targets=["up_proj", "down_proj"])
    assert tuner.method == tw.Parallel(2, scale=1.0, targets=("up_proj", "down_proj"))
    assert set(tuner.layers) == {
        f"model.layers.{n}.mlp.{part}" for n in range(2) for part in ("up_proj", "down_proj")
    }
    assert tw.adapt(llama(), "lora", rank=2).method == tw.LoRA(rank=2)
    assert tw.adapt(llama(), "half", round=1).plan.report().round == 1
    assert tw.adapt(llama(), "sparse", density=0.02).method == tw.SparseDelta(density=0.02)


def test_encoders_whose_parts_have_other_names():
    model, ids = bert(), IDS
    before = model(ids).last_hidden_state
    targets = ["attention.output.dense", "output.dense"]
    tuner = tw.adapt(model, tw.Sequential(RANK, at="linear", targets=targets))
    assert len(tuner.layers) == 4
    assert torch.equal(model(ids).last_hidden_state, before)
    tuner.remove()
    assert torch.equal(tw.adapt(model, "bitfit").model(ids).last_hidden_state, before)
    with pytest.raises(ValueError, match=r"encoder.layer.0 has no part that we know as its ffn"):
        tw.adapt(bert(), "sequential")


OTHERS = {
    "phi3, window": (tw.Sequential(RANK), "", 4),
    "mixtral, window": (tw.DoRA(rank=RANK), "", 8),
    "gpt_oss, sinks and windows": (tw.IA3(), "Please specify.*; pass targets, and feedforward", 0),
    "qwen3_moe": (tw.Parallel(RANK, at="ffn"), "", 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name):
    method, message, n_layers = OTHERS[name]
    model = tiny.seeded(tiny.DECODERS[name])
    if message:
        with pytest.raises(ValueError, match=message):
            tw.adapt(model, method)
        return
    base = model(IDS).logits
    tuner = tw.adapt(model, method)
    assert torch.equal(tuner.model(IDS).logits, base)
    names = [n for n, _ in tuner.model.named_parameters() if ".adapter_up" in n or "lora_B." in n]
    assert len(names) == n_layers
    losses = train(tuner, 1e-2, steps=4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["parallel, ffn", "sequential", "parallel", "lora and sparse"])
def test_a_copy_and_a_pickled_model_say_the_same(name):
    _, tuner = adapted(CASES[name])
    train(tuner, 1e-2, steps=2)
    want = tuner.model(IDS).logits
    for other in (copy.deepcopy(tuner.model), pickle.loads(pickle.dumps(tuner.model))):
        assert torch.equal(other(IDS).logits, want)


def test_any_optimizer_sees_a_masked_gradient():
    model = llama()
    tuner = tw.adapt(model, tw.Mask(DENSITY))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam(tuner.parameters(), lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    for n, mask in tuner.masks.items():
        now = model.get_parameter(n)
        assert torch.equal(now[~mask], before[n][~mask])
        assert (now[mask] != before[n][mask]).float().mean() > 0.9


def test_fisher_takes_the_largest_squared_gradients():
    model, stock = llama(), llama()
    batches = [{"input_ids": ids, "labels": ids} for ids in (IDS[:1], IDS[1:])]
    tuner = tw.adapt(model, tw.Mask(DENSITY, by="fisher"), batches=batches)
    squares = dict.fromkeys(tuner.masks, 0)
    for batch in batches:
        stock.zero_grad()
        stock(**batch).loss.backward()
        squares = {n: s + stock.get_parameter(n).grad.square() for n, s in squares.items()}
    least = min(s[tuner.masks[n]].min() for n, s in squares.items() if tuner.masks[n].any())
    most = max(s[~tuner.masks[n]].max() for n, s in squares.items())
    assert least >= most * (1 - 1e-6)


def test_refusals(tmp_path):
    def refused(message, *methods, model=None, **options):
        with pytest.raises(ValueError, match=message):
            tw.adapt(llama() if model is None else model, *methods, **options)

    refused("no method 'adapter'. Known: lora, dora, ia3, prefix, parallel", "adapter")
    refused("method 'ia3' has no option 'rank'. Known: targets, feedforward", "ia3", rank=3)
    refused("no method given. Known: lora", *())
    refused("method is a dict, need one of lora", {})
    refused("option 'rank' belongs to one method", tw.LoRA(), rank=3)
    refused("LoRA and DoRA cannot be combined", tw.LoRA(), tw.DoRA())
    refused("BitFit cannot be combined", tw.LoRA(), tw.BitFit())
    refused("Parallel and Sequential cannot be combined", tw.Parallel(), tw.Sequential())
    refused("model is a str, need a torch.nn.Module", "lora", model="llama")
    refused("LlamaForCausalLM has no bias to train; pass add=True to give its 14", "bitfit")
    refused("mask by 'fisher' needs batches", "mask", by="fisher")
    refused("mask by 'random' takes no batches", "mask", batches=[{}])
    refused('batches are for "mask" by "fisher"', "lora", batches=[{}])
    refused("got no batches, need at least one", "mask", by="fisher", batches=[])
    refused("target 'nowhere' is no linear layer that fits", "parallel", targets=["nowhere"])
    refused("PEFT refuses LoRA for this LlamaForCausalLM: Target modules", "lora",
            targets=["nowhere"])  # fmt: skip
    refused("prefix needs a causal or an encoder-decoder language model, not a BertModel", "prefix",
            model=bert())  # fmt: skip
    refused("PEFT refuses IA3", "ia3", model=nn.Sequential(nn.Linear(3, 3)))
    for options, message in (
        ({"rank": 0}, "rank is 0, need a whole number of at least 1"),
        ({"scale": float("nan")}, "scale is nan, need a finite number"),
        ({"activation": "gelu"}, "no activation 'gelu'. Known: relu, none"),
        ({"at": "head"}, "at is 'head', need some of linear, attention, ffn"),
        ({"at": "ffn", "targets": ["up_proj"]}, '.*need "linear" in it'),
        ({"targets": "up_proj"}, "targets is 'up_proj', need a list of names"),
        ({"targets": []}, r"targets is \[\], need a list of names"),
    ):
        refused(f"Parallel: {message}", "parallel", **options)
    refused(r"Mask: density is 0.0, need 0 < density <= 1", "mask", density=0.0)
    refused(r"Mask: no by 'luck'. Known: fisher, random, magnitude", "mask", by="luck")
    refused("LoRA: dropout is 1.0, need 0 <= dropout < 1", "lora", dropout=1.0)
    refused("IA3: feedforward is", "ia3", targets=["k_proj"], feedforward=["down_proj"])

    model = llama()
    tw.accelerate(model)
    refused("the model is accelerated; call tilewright.restore", "parallel", model=model)
    model = llama()
    tuner = tw.adapt(model, "parallel")
    refused("the model has adapters already", "sequential", model=model)
    tuner.save(tmp_path / "a.safetensors")
    wider = tiny.seeded(tiny.DECODERS["llama"], intermediate_size=64)
    with pytest.raises(ValueError, match=r"_proj\.adapter_\w+ in .* is of shape"):
        tw.load_adapted(wider, tmp_path / "a.safetensors")
    assert not any("adapter" in n for n, _ in wider.named_parameters())  # as it was
    with pytest.raises(ValueError, match=r"has neither adapter_config\.json nor adapters\.json"):
        tw.load_adapted(llama(), tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        tw.load_adapted(llama(), tmp_path / "b.safetensors")
    tw.save_packed(tmp_path / "c.safetensors", {})
    with pytest.raises(ValueError, match="its header names no method"):
        tw.load_adapted(llama(), tmp_path / "c.safetensors")
    tuner = tw.adapt(llama(), tw.LoRA(), tw.SparseDelta(rule="gradient", last_step=3))
    with pytest.raises(ValueError, match=r"need an optimizer for each of \.tuners"):
        tuner.optimizer()
    for how, message in (("half", "plan.end"), (tw.Mask(by="magnitude"), "load the model again")):
        with pytest.raises(ValueError, match=message):
            tw.adapt(llama(), how).remove()
