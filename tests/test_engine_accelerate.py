"""accelerate and restore: what they touch, what they leave alone, what they refuse."""

import copy
import json
import pickle
import warnings

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Trainer,
    TrainingArguments,
    masking_utils,
)

import tilewright as tw

CLOSE = 2e-5  # float32, on outputs of size 1 to 10


def llama(**more):
    return tiny.seeded(tiny.DECODERS["llama"], **more)


def attributes(model):
    """Everything on every module that is not a weight, by identity."""
    return {
        (name, key): id(value)
        for name, module in model.named_modules()
        for key, value in [*vars(module).items(), ("__class__", type(module))]
        if not key.startswith("_")
    } | {
        (name, "keys of vars"): tuple(sorted(vars(module)))
        for name, module in model.named_modules()
    }


# the report


def test_report_names_every_layer():
    report = tw.accelerate(llama())
    attention, _ = tiny.of_kind(report)
    assert [r.name for r in attention] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert {(r.kind, r.was, r.now) for r in report.replaced} == {
        ("attention", "LlamaAttention", "flash_attention"),
        ("rope", "LlamaAttention", "rope"),
        ("norm", "LlamaRMSNorm", "rms_norm"),
        ("mlp", "LlamaMLP", "swiglu"),
        ("loss", "LlamaForCausalLM", "linear_cross_entropy"),
    }
    assert report.skipped == ()
    assert str(report) == (
        "LlamaForCausalLM: 12 replaced, 0 skipped\n"
        "  attention  model.layers.{0-1}.self_attn                 LlamaAttention -> "
        "flash_attention\n"
        "  rope       model.layers.{0-1}.self_attn                 LlamaAttention -> rope\n"
        "  norm       model.layers.{0-1}.input_layernorm           LlamaRMSNorm -> rms_norm\n"
        "  norm       model.layers.{0-1}.post_attention_layernorm  LlamaRMSNorm -> rms_norm\n"
        "  norm       model.norm                                   LlamaRMSNorm -> rms_norm\n"
        "  mlp        model.layers.{0-1}.mlp                       LlamaMLP -> swiglu\n"
        "  loss       (the model)                                  LlamaForCausalLM -> "
        "linear_cross_entropy (in training, with labels)"
    )


def test_layers_of_two_kinds_in_one_configuration():
    """Chunked layers stay stock beside full ones that are replaced; the output is that of eager."""
    config = Llama4TextConfig(
        hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=tiny.VOCABULARY,
        num_local_experts=2, attention_chunk_size=4, pad_token_id=0, initializer_range=0.25,
        layer_types=["chunked_attention", "full_attention"], attn_implementation="eager",
    )  # fmt: skip
    model = tiny.seeded(lambda: Llama4ForCausalLM(config))
    ids, mask = tiny.tokens(), tiny.padding("right")
    with torch.no_grad(), warnings.catch_warnings():
        want = model(ids, attention_mask=mask).logits
        report = tw.accelerate(model)
        warnings.simplefilter("error")  # the report has said it, no call need repeat it
        got = model(ids, attention_mask=mask).logits
    replaced, skipped = tiny.of_kind(report)
    assert [r.name for r in replaced] == ["model.layers.1.self_attn"]
    assert [(s.name, s.reason) for s in skipped] == [
        ("model.layers.0.self_attn", "its layer type is chunked_attention")
    ]
    assert "Llama4TextAttention stays: its layer type is chunked_attention" in str(report)
    assert (got - want)[mask.bool()].abs().max() <= CLOSE


def test_windows_to_both_sides_stay_stock():
    config = ModernBertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=tiny.VOCABULARY, local_attention=4, pad_token_id=0, initializer_range=0.25,
        layer_types=["full_attention", "sliding_attention"], attn_implementation="eager",
    )  # fmt: skip
    model = tiny.seeded(lambda: ModernBertModel(config))
    ids, mask = tiny.tokens(), tiny.padding("left")
    with torch.no_grad():
        want = model(ids, attention_mask=mask).last_hidden_state
        report = tw.accelerate(model)
        with pytest.warns(UserWarning, match="the attention mask is 4-D"):
            got = model(ids, attention_mask=mask).last_hidden_state
    assert [r.note for r in tiny.of_kind(report)[0]] == [
        "",
        "its own where a window to both sides hides a key",
    ]
    assert (got - want)[mask.bool()].abs().max() <= CLOSE


def test_long_runs_of_layers_are_one_line():
    from tilewright.adapt import Replaced, Report

    names = [f"blocks.{i}.attn" for i in (0, 1, 2, 5, 10, 11)]
    report = Report("M", tuple(Replaced("attention", n, "A", "flash_attention") for n in names))
    assert "blocks.{0-2,5,10-11}.attn" in str(report)


# what does not fit


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY, "pad_token_id": 0,
}  # fmt: skip


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)


def attention_without_source():
    """A layer whose forward was made from a string: nothing tells what it hands over."""
    names = {"interface": masking_utils.ALL_MASK_ATTENTION_FUNCTIONS}
    exec("def forward(self, x):\n    return interface.get_interface('eager', None)(x)", names)
    cls = type("StringAttention", (nn.Module,), {"forward": names["forward"]})
    model = llama()
    model.model.layers = nn.ModuleList([cls()])
    model.model.layers[0].config = model.config
    return model


def output_attentions_configured():
    model = llama(attn_implementation="eager")
    model.config.output_attentions = True
    return model


def without_experts(model):
    """Attention alone: the experts would be replaced."""
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    return model


UNFIT = {
    "no attention": (lambda: nn.Linear(4, 4), "nothing in the model can be replaced"),
    "own attention": (
        lambda: nn.Sequential(OwnAttention()),
        "OwnAttention stays: its class does not ask transformers' AttentionInterface",
    ),
    "torch's attention": (
        lambda: nn.MultiheadAttention(8, 2),
        "MultiheadAttention stays: its class does not ask transformers' AttentionInterface",
    ),
    "an attention layer alone": (
        lambda: llama().model.layers[0].self_attn,
        "there is no PreTrainedModel with a configuration around it",
    ),
    "no source": (
        attention_without_source,
        "StringAttention stays: the source of its forward method cannot be read",
    ),
    "weights wanted": (
        output_attentions_configured,
        "its configuration asks for output_attentions",
    ),
    "wide heads": (
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL, head_dim=260)),
        "head_dim is 260, need at most 256",
    ),
    "a window in the mask alone": (
        lambda: without_experts(
            Qwen2MoeForCausalLM(
                Qwen2MoeConfig(**SMALL, **MOE, use_sliding_window=True, max_window_layers=1)
            )
        ),
        "its mask has a sliding window that it does not hand over",
    ),
    "a window in the arguments alone": (
        lambda: without_experts(OlmoeForCausalLM(OlmoeConfig(**SMALL, **MOE))),
        "it hands over a sliding window that its mask does not have",
    ),
}


ALONE = ("no attention", "own attention", "torch's attention", "an attention layer alone")


@pytest.mark.parametrize("case", [case for case in UNFIT if case not in ALONE])
def test_attention_that_does_not_fit(case):
    """It stays stock, with the reason, beside norms and others that are replaced."""
    build, message = UNFIT[case]
    model = build()
    before, was = attributes(model), model.config._attn_implementation
    report = tw.accelerate(model)
    replaced, skipped = tiny.of_kind(report)
    assert not replaced and skipped and message in str(report)
    assert {r.kind for r in report.replaced} >= {"norm"}
    assert model.config._attn_implementation == was
    tw.restore(model)
    assert attributes(model) == before


@pytest.mark.parametrize("case", ALONE)
def test_nothing_fits(case):
    build, message = UNFIT[case]
    model = build()
    before = attributes(model)
    with pytest.raises(ValueError, match="accelerate: nothing in the model can be replaced") as e:
        tw.accelerate(model)
    assert message in str(e.value)
    assert attributes(model) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "sparse"}, 'no attention "sparse". Known: dense, shifted'),
        ({"attention": "shifted"}, 'attention "shifted" needs group_size, a number of tokens'),
        ({"group_size": 8}, 'group_size belongs to attention="shifted"'),
        ({"attention": "shifted", "group_size": 0}, "group_size is 0, need a whole number"),
        ({"attention": "shifted", "group_size": 2.5}, "group_size is 2.5, need a whole number"),
        ({"attention": "shifted", "group_size": True}, "group_size is True, need a whole number"),
        ({"rope_target_length": -4}, "rope_target_length is -4, need a whole number"),
        ({"train": "embed"}, "train is 'embed', need a list of parts of parameter names"),
        ({"train": []}, "train is empty, need at least one part"),
        ({"train": ["embed", "nrom"]}, 'train names "nrom", which no parameter name holds'),
    ],
)
def test_refused_arguments_leave_the_model_stock(arguments, message):
    model = llama()
    before = attributes(model)
    with pytest.raises(ValueError) as e:
        tw.accelerate(model, **arguments)
    assert str(e.value).startswith("accelerate: ") and message in str(e.value)
    assert attributes(model) == before


def test_refused_models():
    with pytest.raises(ValueError, match=r"accelerate: model is a str, need a torch\.nn\.Module"):
        tw.accelerate("meta-llama/Llama-3.2-1B")
    with pytest.raises(ValueError, match=r"restore: model is a dict, need a torch\.nn\.Module"):
        tw.restore({})
    with pytest.raises(ValueError, match="restore: this LlamaForCausalLM is not accelerated"):
        tw.restore(llama())


# nothing else is touched


def test_restore_gives_back_the_stock_model():
    model = llama(attn_implementation="eager")
    before = attributes(model)
    keys = list(model.state_dict())
    tw.accelerate(model)
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == "tilewright"
    tw.restore(model)
    assert attributes(model) == before
    assert model.config._attn_implementation == "eager"


def test_everything_is_undone_at_once():
    model = llama()
    before = attributes(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    frequencies = model.model.rotary_emb.inv_freq.clone()
    tw.accelerate(model, attention="shifted", group_size=4, rope_target_length=256, train=["norm"])
    assert attributes(model) != before
    assert not model.lm_head.weight.requires_grad
    tw.restore(model)
    assert attributes(model) == before
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_two_models_of_one_configuration():
    config = LlamaConfig(**SMALL, attn_implementation="eager")
    ours, stock = LlamaForCausalLM(config), LlamaForCausalLM(config)
    assert ours.config is stock.config
    tw.accelerate(ours)
    assert config._attn_implementation == "eager"
    out = stock(tiny.tokens(), output_attentions=True)
    assert out.attentions[0].shape == (2, 4, tiny.LENGTH, tiny.LENGTH)
    tw.restore(ours)
    assert ours.config is config


def test_accelerating_again_starts_from_the_stock_model():
    model = llama()
    before = attributes(model)
    tw.accelerate(model, attention="shifted", group_size=4, train=["norm"])
    tw.accelerate(model)
    assert all(p.requires_grad for p in model.parameters())
    tw.restore(model)
    assert attributes(model) == before


def test_saved_files_are_those_of_the_stock_model(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "stock")
    tw.accelerate(model)
    model.save_pretrained(tmp_path / "ours")
    for file in ("config.json", "generation_config.json"):
        ours = (tmp_path / "ours" / file).read_text()
        assert ours == (tmp_path / "stock" / file).read_text()
        assert "tilewright" not in ours
    assert json.loads((tmp_path / "ours/config.json").read_text())["model_type"] == "llama"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert loaded.config._attn_implementation == "sdpa"
    ids = tiny.tokens()
    assert (loaded(ids).logits - model(ids).logits).abs().max() <= CLOSE


def test_changes_to_the_configuration_outlive_restore():
    model = llama()
    tw.accelerate(model)
    model.resize_token_embeddings(tiny.VOCABULARY + 3)
    model.config.use_cache = False
    tw.restore(model)
    assert model.config.vocab_size == tiny.VOCABULARY + 3
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "sdpa"


def test_a_copy_is_accelerated_and_restored_on_its_own():
    model = llama()
    tw.accelerate(model)
    other = copy.deepcopy(model)
    tw.restore(model)
    assert other.config._attn_implementation == "tilewright"
    ids = tiny.tokens()
    assert (other(ids).logits - model(ids).logits).abs().max() <= CLOSE
    tw.restore(other)
    assert other.config._attn_implementation == "sdpa"
    assert other.config is not model.config


def test_an_accelerated_model_can_be_pickled():
    model = llama()
    tw.accelerate(model)
    other = pickle.loads(pickle.dumps(model))
    tw.restore(other)
    assert other.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "tilewright"


def test_restore_follows_the_model_to_another_dtype():
    model = llama()
    tw.accelerate(model, rope_target_length=256)
    model.to(torch.bfloat16)
    tw.restore(model)
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert model(tiny.tokens()).logits.dtype == torch.bfloat16


# calls that stay stock


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_output_attentions_gives_the_weights(name):
    model = tiny.seeded(tiny.DECODERS[name], attn_implementation="eager")
    ids, mask = tiny.tokens(), tiny.padding("left")
    live = mask.bool()
    with torch.no_grad():
        want = model(ids, attention_mask=mask, output_attentions=True)
        tw.accelerate(model)
        with pytest.warns(UserWarning, match="output_attentions=True needs the attention weights"):
            got = model(ids, attention_mask=mask, output_attentions=True)
    assert (got.logits - want.logits)[live].abs().max() <= CLOSE
    for ours, eager in zip(got.attentions, want.attentions, strict=True):
        ours, eager = ours.transpose(1, 2)[live], eager.transpose(1, 2)[live]
        assert (ours - eager).abs().max() <= CLOSE


def dense_masks():
    """A tree of tokens: each sees itself and, at random, any before it."""
    torch.manual_seed(3)
    seen = (torch.rand(2, 1, tiny.LENGTH, tiny.LENGTH) < 0.5).tril() | torch.eye(
        tiny.LENGTH, dtype=torch.bool
    )
    lowest = torch.finfo(torch.float32).min
    return {"bool": seen, "additive": torch.zeros(seen.shape).masked_fill(~seen, lowest)}


@pytest.mark.parametrize("form", ["bool", "additive"])
@pytest.mark.parametrize(
    ("name", "stock"),
    [
        ("llama", "eager"),
        ("llama", "sdpa"),
        ("gemma3, windows", "eager"),
        ("gemma3, windows", "sdpa"),
        ("gemma2, softcap and windows", "eager"),
        ("gpt_oss, sinks and windows", "eager"),  # these two have no sdpa attention
    ],
)
def test_a_dense_mask_goes_to_stock_attention(name, form, stock):
    model = tiny.seeded(tiny.DECODERS[name], attn_implementation=stock)
    ids, masks = tiny.tokens(), dense_masks()
    additive = {"full_attention": masks["additive"], "sliding_attention": masks["additive"]}
    mask = masks[form]
    if name != "llama":
        mask = {"full_attention": mask, "sliding_attention": mask}
    else:
        additive = masks["additive"]
    with torch.no_grad():
        want = model(ids, attention_mask=additive).logits
        causal = model(ids).logits
        tw.accelerate(model)
        with pytest.warns(UserWarning, match="the attention mask is 4-D") as told:
            got = model(ids, attention_mask=mask).logits
        assert len(told) == 1  # for both layers
    assert (causal - want).abs().max() > 0.01
    assert (got - want).abs().max() <= CLOSE


def test_a_second_call_does_not_warn_again():
    model = llama()
    tw.accelerate(model)
    mask = dense_masks()["bool"]
    with pytest.warns(UserWarning, match="the attention mask is 4-D"):
        model(tiny.tokens(), attention_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tiny.tokens(), attention_mask=mask)


def test_a_paged_cache_is_refused():
    from tilewright.adapt.interface import tilewright_attention

    model = llama()
    tw.accelerate(model)
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match=r"paged cache.*tilewright\.restore\(model\)"):
        tilewright_attention(model.model.layers[0].self_attn, q, q, q, None, cache=object())


# training


def train(model, folder, **more):
    rows = [{"input_ids": row, "labels": row} for row in tiny.tokens(batch=8)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, seed=5, **more,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_sees_the_same_losses(tmp_path):
    model = llama()
    want = train(copy.deepcopy(model), tmp_path)
    tw.accelerate(model)
    got = train(model, tmp_path)
    assert got == pytest.approx(want, abs=2e-4)  # the Trainer logs four digits
    assert want[0] - want[-1] > 0.1


def test_gradient_checkpointing(tmp_path):
    model = llama()
    want = train(copy.deepcopy(model), tmp_path)
    tw.accelerate(model)
    got = train(model, tmp_path, gradient_checkpointing=True)
    assert got == pytest.approx(want, abs=2e-4)


def lora(model):
    torch.manual_seed(4)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("first", ["accelerate", "peft"])
def test_peft_before_and_after(first, tmp_path):
    want = train(lora(llama()), tmp_path)
    model = llama()
    stock_config = model.config
    if first == "accelerate":
        tw.accelerate(model)
        model = lora(model)
    else:
        model = lora(model)
        kinds = [r.kind for r in tw.accelerate(model).replaced]
        assert kinds[:6] == ["attention"] * 2 + ["lora"] * 4
        assert sorted(kinds[6:]) == ["loss"] + ["mlp"] * 2 + ["norm"] * 5 + ["rope"] * 2
    assert train(model, tmp_path) == pytest.approx(want, abs=2e-4)
    model.save_pretrained(tmp_path / "adapter")
    assert "tilewright" not in (tmp_path / "adapter/adapter_config.json").read_text()

    stock = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    ids = tiny.tokens()
    assert (model.eval()(ids).logits - stock(ids).logits).abs().max() <= CLOSE
    tw.restore(model)
    assert model.get_base_model().config is stock_config
    assert model.config is stock_config
    assert stock_config._attn_implementation == "sdpa"
    assert (model(ids).logits - stock(ids).logits).abs().max() <= CLOSE


def test_attention_dropout_is_drawn_from_the_seed():
    model = llama(attention_dropout=0.5).train()
    tw.accelerate(model)
    ids = tiny.tokens()

    def run(seed):
        torch.manual_seed(seed)
        return model(ids).logits

    assert torch.equal(run(1), run(1))
    assert (run(1) - run(2)).abs().max() > 0.01
    model.eval()
    assert torch.equal(run(1), run(2))


@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_bfloat16_is_as_close_to_float32_as_stock(mode):
    model = llama()
    ids, mask = tiny.tokens(batch=8), tiny.padding("left", batch=8)
    live = mask.bool()

    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            return model(ids, attention_mask=mask).logits[live].float()

    with torch.no_grad():
        exact = model(ids, attention_mask=mask).logits[live]
    if mode == "weights":
        model.to(torch.bfloat16)
    stock_error = (run() - exact).square().mean().sqrt()
    tw.accelerate(model)
    error = (run() - exact).square().mean().sqrt()
    assert error <= 1.05 * stock_error
