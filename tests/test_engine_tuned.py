"""`finetune` with every adapter that `tilewright.adapt` makes: training, folders, resuming."""

import signal

import pytest
import torch
import transformers as hf

import tilewright as tw
from tilewright import cli, pretrained
from tilewright.config import OVER_PACKED, TUNED
from tilewright.files import InputError
from tilewright.progress import Silent
from tilewright.train import Interrupted

TEXTS = [
    f"document {n}: " + "the quick brown fox jumps over the lazy dog, " * (n % 3) + "end"
    for n in range(12)
]
RUN = {"steps": 10, "context": 32, "rows": 2, "seed": 3, "learning_rate": 1e-2, "warmup": 0}
EXTRA = {
    "dora": {"adapter_rank": 2}, "ia3": {}, "prefix": {"prefix_tokens": 4},
    "parallel": {"adapter_rank": 2, "adapter_scale": 2.0, "adapter_at": "ffn"},
    "sequential": {"adapter_rank": 2, "adapter_activation": "none"},
    "bitfit": {"add_biases": True}, "mask": {"density": 0.2, "mask_by": "fisher"},
    "sparse": {"density": 0.2},
}  # fmt: skip
VARIANTS = {
    **{name: {"adapter": name, **more} for name, more in EXTRA.items()},
    "parallel, linear": {"adapter": "parallel", "adapter_targets": "up_proj,q_proj"},
    "mask, magnitude": {"adapter": "mask", "mask_by": "magnitude", "density": 0.5},
    "sparse, extremes": {"adapter": "sparse", "density": 0.2, "sparse_rule": "extremes"},
    "sparse, 16 in places": {"adapter": "sparse", "density": 0.2, "sparse_rule": "none"},
}


def test_the_table_has_every_adapter():
    assert set(EXTRA) == set(TUNED)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model of random weights, spread wide so that attention matters."""
    folder = tmp_path_factory.mktemp("base")
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=258, max_position_embeddings=64, initializer_range=0.25,
        bos_token_id=None, eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class StopAfterFive(Silent):
    """In the middle of a window of the sparse methods that look for new places."""

    def show(self, step, text):
        if step == 5:
            signal.raise_signal(signal.SIGINT)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40, 60)[None]).logits


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_learns_is_resumed_and_its_folder_loads(name, base, tmp_path):
    options = {**RUN, **VARIANTS[name]}
    whole = tw.finetune(base, TEXTS, out=tmp_path / "a", **options)
    assert min(whole.losses[-3:]) < whole.losses[0]
    assert whole.tuner.model is whole.model
    assert whole.model.training is False

    with pytest.raises(Interrupted, match="stopped after step 5 of 10"):
        tw.finetune(base, TEXTS, out=tmp_path / "b", progress=StopAfterFive(), **options)
    torch.manual_seed(12345)  # what the process did in between must not matter
    again = tw.finetune(base, TEXTS, out=tmp_path / "b", resume=True, **options)
    assert again.losses == whole.losses
    want = logits(whole.model)
    assert torch.equal(logits(again.model), want)
    finished = tw.finetune(base, TEXTS, out=tmp_path / "b", resume=True, **options)
    assert finished.losses == whole.losses and torch.equal(logits(finished.model), want)

    loaded = pretrained.load(tmp_path / "a", needs_weights=True)
    assert torch.equal(logits(loaded.model), want)
    assert not list((tmp_path / "a").glob("*.partial"))
    with pytest.raises(InputError, match="is an adapter, need the model"):
        tw.finetune(tmp_path / "a", TEXTS, **RUN)


def test_behind_a_prefix_documents_have_rows_of_their_own_and_generation_sees_it(base, tmp_path):
    options = {**RUN, **VARIANTS["prefix"]}
    result = tw.finetune(base, TEXTS, out=tmp_path / "a", **options)
    pieces = sum(-(-len(text.encode()) // 32) for text in TEXTS)  # an end token is never alone
    first = tw.finetune(base, TEXTS, **{**options, "steps": None, "rows": 1})
    assert len(first.losses) in (pieces, pieces + 1, pieces + 2, pieces + 3)
    prompts = [list(range(40, 47)), [50, 51]]
    model = pretrained.load(tmp_path / "a").model.eval()
    for accelerated in (False, True):
        if accelerated:
            tw.accelerate(model)
        for prompt, done in zip(
            prompts, tw.generate(model, prompts, max_new_tokens=6), strict=True
        ):
            ids = torch.tensor([prompt])
            with torch.no_grad():  # each token from the beginning, by PEFT's own forward
                for _ in range(6):
                    following = result.model(input_ids=ids).logits[:, -1].argmax(-1)
                    ids = torch.cat([ids, following[:, None]], 1)
            assert done.tokens == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", [n for n in OVER_PACKED if n != "lora"])
def test_over_a_packed_base(name, base, tmp_path):
    options = {**RUN, "adapter": name, **EXTRA[name], "base": "nf4", "steps": 4}
    result = tw.finetune(base, TEXTS, out=tmp_path / "a", **options)
    assert any(isinstance(m, tw.QuantizedLinear) for m in result.model.modules())
    loaded = pretrained.load(tmp_path / "a")
    assert torch.equal(logits(loaded.model), logits(result.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "adapters"}, "adapter is 'adapters', need none or lora or half or dora"),
        ({"adapter": "ia3", "adapter_rank": 4}, "adapter_rank belongs to adapter 'dora' or 'par"),
        ({"density": 0.1}, "density belongs to adapter 'mask' or 'sparse', which was not asked"),
        ({"adapter": "parallel", "lora_rank": 4}, "'parallel' and lora_rank 4: need one of them"),
        ({"adapter": "dora", "train": "norm"}, "adapter 'dora' decides what trains"),
        ({"adapter": "mask", "stock": True}, "'mask' needs tilewright's operators: leave out st"),
        ({"adapter": "mask", "base": "nf4"}, "base 'nf4' is packed and cannot train by itself"),
        ({"adapter": "sparse", "state_bits": 8}, "moves its optimizer's state about"),
        ({"adapter": "prefix", "recompute": True}, "which recompute True cannot take"),
        ({"adapter": "prefix", "attention": "shifted"}, "which attention 'shifted' cannot take"),
        ({"adapter": "prefix", "context": 64}, "context is 64 with 30 of the prefix, but the mod"),
        ({"adapter": "prefix", "prefix_tokens": 0}, "prefix_tokens is 0, need a whole number"),
        ({"adapter": "mask", "mask_by": "luck"}, "mask_by is 'luck', need random, fisher or mag"),
        ({"adapter": "mask", "density": 1.5}, "density is 1.5, need a number with 0 < density <"),
        ({"adapter": "bitfit"}, "adapter 'bitfit': adapt: LlamaForCausalLM has no bias to train"),
        ({"adapter": "parallel", "adapter_at": "head"}, "at is .'head',., need some of linear"),
        ({"adapter": "parallel", "adapter_targets": "q"}, "target 'q' is no linear layer that fi"),
    ],
)
def test_what_does_not_go_together(options, message, base):
    with pytest.raises(InputError, match=message):
        tw.finetune(base, TEXTS, **{"steps": 1, "context": 32, **options})


def test_another_base_than_the_files_is_refused(base, tmp_path):
    tw.finetune(base, TEXTS, out=tmp_path / "a", **{**RUN, "steps": 1}, adapter="parallel")
    (tmp_path / "a" / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"adapter\.safetensors"):
        pretrained.load(tmp_path / "a")
    (tmp_path / "a" / "tilewright_adapter.json").write_text('{"base_model_name_or_path": "gone"}')
    with pytest.raises(InputError, match="belongs to the model gone, which is not here"):
        pretrained.load(tmp_path / "a")


def test_the_command_line(base, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    out = str(tmp_path / "out")
    done = cli.main(
        ["finetune", "--model", str(base), "--data", str(text), "--out", out, "--adapter",
         "parallel", "--adapter-rank", "4", "--adapter-at", "ffn,attention", "--steps", "2",
         "--context", "32"]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert done == 0, printed.err
    assert "parallel, 1024 values train" in printed.out
    assert cli.main(["generate", "--model", out, "--prompt", "The", "--max-new-tokens", "3"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    shown = capsys.readouterr().out
    for name in (*TUNED, "--adapter-rank", "--prefix-tokens", "--mask-by", "--sparse-rule"):
        assert name in shown
