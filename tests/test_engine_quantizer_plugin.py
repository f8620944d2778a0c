"""transformers' quantizer plug-in: quantize while loading, save, load again, train an adapter."""

import copy
import json
import subprocess
import sys

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import tilewright as tw
from tilewright.quantized import QuantizedLinear

CONFIGS = {
    "nf4": {"format": "nf4", "group_size": 16},
    "nf4, nested": {"format": "nf4", "group_size": 16, "double_quant": True},
    "fp4": {"format": "fp4", "group_size": 32},
    "int4": {"format": "int4", "group_size": 16},
    "int4 with offsets": {"format": "int4", "group_size": 16, "symmetric": False},
    "int8": {"format": "int8"},
    "fp8 by blocks": {"format": "fp8", "scaling": "block"},
    "mxfp4": {"format": "mxfp4"},
}


def load(folder, **options):
    return hf.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture
def folder(tmp_path):
    tiny.seeded(tiny.DECODERS["llama"]).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("config", CONFIGS)
def test_loading_packs_what_quantize_packs_and_saving_keeps_it(config, folder, tmp_path):
    ids, config = tiny.tokens(), tw.QuantConfig(**CONFIGS[config])
    in_place = load(folder)
    tw.quantize(in_place, config.record)
    model, found = load(folder, quantization_config=config, output_loading_info=True)
    assert not any(found.values()), found
    assert len([m for m in model.modules() if type(m) is QuantizedLinear]) == 14
    want = in_place(ids).logits
    assert torch.equal(model(ids).logits, want)
    for saved, name in ((model, "loaded"), (in_place, "in place")):
        saved.save_pretrained(tmp_path / name)
        again, found = load(tmp_path / name, output_loading_info=True)
        assert not any(found.values()), found
        assert torch.equal(again(ids).logits, want)
        state, packed = again.state_dict(), saved.state_dict()
        assert list(state) == list(packed)
        assert all(torch.equal(state[n], packed[n]) for n in state)
        assert {n: t.dtype for n, t in state.items()} == {n: t.dtype for n, t in packed.items()}


def test_another_dtype_and_shards(folder, tmp_path):
    config = tw.QuantConfig("int4", group_size=16, symmetric=False)
    model = load(folder, quantization_config=config, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.dtype == model.lm_head.weight.dtype == torch.bfloat16
    # transformers casts a weight before it hands it over
    dense = load(folder, dtype=torch.bfloat16)
    want = tw.quantize_weight(dense.model.layers[0].mlp.up_proj.weight, config.record)
    assert torch.equal(layer.codes, want.codes) and torch.equal(layer.scales, want.scales)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = load(tmp_path / "shards")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(tiny.tokens()).logits, model(tiny.tokens()).logits)


PREFIX = "model.layers.1"


def test_layers_that_are_left_out_stay_dense_when_loaded_again(folder, tmp_path):
    config = tw.QuantConfig("nf4", group_size=16, modules_to_not_convert=["down_proj", PREFIX])
    model = load(folder, quantization_config=config)
    kinds = {n: type(m) for n, m in model.named_modules() if n.endswith("proj")}
    packed = {n for n, kind in kinds.items() if kind is QuantizedLinear}
    assert packed == {n for n in kinds if "down_proj" not in n and "layers.1" not in n}
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert {n: type(m) for n, m in again.named_modules() if n.endswith("proj")} == kinds
    assert torch.equal(again(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_two_formats_in_one_model_and_tied_embeddings(tmp_path):
    model = tiny.seeded(tiny.DECODERS["llama"], tie_word_embeddings=True)
    report = tw.quantize(model, tw.Int8(), lambda name, linear: "mlp" in name)
    tw.quantize(model, tw.NF4(group_size=16))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert {
        again.model.layers[0].mlp.up_proj.format,
        again.model.layers[0].self_attn.q_proj.format,
    } == {
        "int8",
        "nf4",
    }
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert len(report.replaced) == 6
    assert torch.equal(again(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_a_bias_is_loaded_beside_the_packed_weight(tmp_path):
    torch.manual_seed(1)
    dense = tiny.DECODERS["qwen2, window in one layer"]()
    for layer in dense.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.bias)
    dense.save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=tw.QuantConfig("int8"))
    for ours, stock in zip(model.model.layers, dense.model.layers, strict=True):
        assert torch.equal(ours.self_attn.q_proj.bias, stock.self_attn.q_proj.bias)


def test_dequantize_through_transformers(folder, tmp_path):
    model = load(folder, quantization_config=tw.QuantConfig("nf4", group_size=16))
    want = model(tiny.tokens()).logits
    model = model.dequantize()
    assert (model(tiny.tokens()).logits - want).abs().max() <= 1e-4
    assert not any(type(m) is QuantizedLinear for m in model.modules())
    model.save_pretrained(tmp_path / "dense again")
    assert "quantization_config" not in json.loads(
        (tmp_path / "dense again/config.json").read_text()
    )
    assert torch.equal(
        load(tmp_path / "dense again")(tiny.tokens()).logits, model(tiny.tokens()).logits
    )


# training


def trainer(model, folder):
    args = hf.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", seed=1,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tiny.tokens(8)]
    return hf.Trainer(model, args, train_dataset=data)


def test_the_trainer_takes_adapters_and_refuses_packed_weights_alone(folder, tmp_path):
    config = tw.QuantConfig("nf4", group_size=16)
    with pytest.raises(ValueError, match="fine-tuning on purely quantized models"):
        trainer(load(folder, quantization_config=config), tmp_path)
    losses = {}
    for name in ("stock", "ours"):
        torch.manual_seed(3)
        model = load(folder, quantization_config=config)
        packed = {n: b.clone() for n, b in model.named_buffers()}
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        if name == "ours":
            tw.accelerate(model)
        run = trainer(model, tmp_path)
        run.train()
        losses[name] = [e["loss"] for e in run.state.log_history if "loss" in e]
        assert all(torch.equal(b, packed[_plain(n)]) for n, b in model.named_buffers())
    assert losses["ours"] == pytest.approx(losses["stock"], rel=1e-4)
    assert losses["ours"][-1] < losses["ours"][0]

    model.save_pretrained(tmp_path / "adapter")
    base = load(folder, quantization_config=config)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = tiny.tokens()
    assert (again(ids).logits - model.eval()(ids).logits).abs().max() <= 2e-5


def _plain(name):
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def test_a_copy_is_quantized_on_its_own(folder):
    model = load(folder, quantization_config=tw.QuantConfig("nf4", group_size=16))
    other = copy.deepcopy(model)
    tw.dequantize(other)
    assert not hasattr(other.config, "quantization_config")
    assert model.config.quantization_config.format == "nf4"
    assert type(model.model.layers[0].mlp.up_proj) is QuantizedLinear


# registration


@pytest.mark.parametrize(
    "order",
    [
        "import tilewright; from transformers import AutoModelForCausalLM as M",
        "from transformers import AutoModelForCausalLM as M; import tilewright",
        "import transformers.modeling_utils, tilewright; M = transformers.AutoModelForCausalLM",
        "import tilewright, transformers.quantizers; M = transformers.AutoModelForCausalLM",
    ],
)
def test_a_saved_model_loads_whatever_is_imported_first(order, folder, tmp_path):
    model = load(folder, quantization_config=tw.QuantConfig("int8"))
    model.save_pretrained(tmp_path / "packed")
    code = (
        f"{order}\nimport sys\nmodel = M.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "packed")], capture_output=True, text=True
    )
    assert done.stdout.strip() == "QuantizedLinear", done.stderr


def test_importing_tilewright_does_not_import_transformers():
    code = "import sys, tilewright; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# memory

MEASURE = """
import sys, threading, time
import torch, transformers
import tilewright as tw
from tilewright.quantized import n_bytes
from transformers import AutoModelForCausalLM

def anonymous():  # bytes that are the process's own; pages of the file can be dropped at any time
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

config = tw.QuantConfig("nf4")
tw.quantize_weight(torch.randn(64, 64), config.record)  # what is loaded and cached at first use
folder, peak, done = sys.argv[1], 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
done = True
thread.join()
print(peak - before, n_bytes(model))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
def test_loading_needs_about_the_packed_bytes(tmp_path):
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=1024, intermediate_size=2048, num_hidden_layers=10, vocab_size=256,
            num_attention_heads=8,
        )
    )  # fmt: skip
    dense_bytes = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True
    )
    peak, packed_bytes = map(int, done.stdout.split())
    # beyond the packed bytes: one weight of 8 MiB as it was read, quantize_weight's working memory
    # (tens of MiB as it says), and transformers' bookkeeping
    assert peak <= packed_bytes + 100 * 2**20, done.stderr
    assert packed_bytes + 100 * 2**20 < dense_bytes / 2  # so that the line above says something


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "int3"},
            "QuantConfig: no format 'int3'. Known: nf4, fp4, int4, int8",
        ),
        (
            {"format": "int8", "double_quant": True},
            "'int8' has no option 'double_quant', it",
        ),
        ({"format": "mxfp4", "group_size": 32}, "'group_size', it takes no options"),
        ({"format": "nf4", "group_size": 7}, "NF4: group_size is 7, need a positive multiple of 8"),
        (
            {"modules_to_not_convert": "mlp"},
            "modules_to_not_convert is 'mlp', need a list",
        ),
    ],
)
def test_configurations_that_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        tw.QuantConfig(**options)
    assert message in str(error.value)


def damaged(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def test_a_damaged_description_is_refused(folder, tmp_path):
    model = load(folder, quantization_config=tw.QuantConfig("nf4", group_size=16))
    for change, message in (
        (lambda c: c["layouts"].clear(), "layouts says nothing of use about model.layers.0"),
        (
            lambda c: c["layouts"][""].update(format="fp4"),
            "packed with format nf4, .*config.json",
        ),
        (lambda c: c["layouts"][""].update(shape=3), "layouts says nothing of use about"),
        (lambda c: c.update(format="nf3"), "QuantConfig: no format 'nf3'"),
    ):
        model.save_pretrained(tmp_path / "packed")
        damaged(tmp_path / "packed", change)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "packed")


def test_a_model_without_a_linear_layer_to_pack_is_refused(folder):
    config = tw.QuantConfig("nf4", modules_to_not_convert=["proj"])
    with pytest.raises(ValueError, match="LlamaForCausalLM has no linear layer to pack outside of"):
        load(folder, quantization_config=config)
    with pytest.raises(ValueError, match="device_map sends layers to the disk"):
        load(
            folder, quantization_config=tw.QuantConfig("nf4"),
            device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=str(folder / "offload"),
        )  # fmt: skip
