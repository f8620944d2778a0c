"""accelerate on models with an output head: losses, logits that are read, what stays stock."""

import copy
import pickle

import numpy
import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from memory_probes import allocations
from peft import LoraConfig, get_peft_model
from torch import nn

import tilewright as tw
from tilewright.adapt import deferred

LENGTH = 500  # tokens of two rows; with the tiny vocabulary more than is left to torch
DECODERS = [n for n in tiny.DECODERS if "gpt_oss" not in n]  # which the test of experts has


def build(name, **more):
    return tiny.seeded(tiny.DECODERS[name], max_position_embeddings=LENGTH, **more).train()


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of our operator."""
    seen = []

    def spying(*args, **kwargs):
        seen.append(kwargs)
        return tw.linear_cross_entropy(*args, **kwargs)

    monkeypatch.setattr(deferred, "linear_cross_entropy", spying)
    return seen


def batch():
    ids = tiny.tokens(length=LENGTH)
    labels = ids.clone()
    labels[0, :40] = labels[1, 7] = -100
    return ids, labels


def step(model, **more):
    model.zero_grad()
    ids, labels = batch()
    out = model(ids, labels=labels, **more)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def expect_close(got, want):
    (out, grads), (stock, stock_grads) = got, want
    torch.testing.assert_close(out.loss, stock.loss, rtol=1e-5, atol=1e-5)
    assert grads.keys() == stock_grads.keys()
    most = max(g.abs().max() for g in stock_grads.values())
    for name, g in stock_grads.items():
        assert (grads[name] - g).abs().max() <= 1e-4 * most, name


def accelerated(model):
    """The report, in which the model's loss is replaced."""
    report = tw.accelerate(model)
    replaced, skipped = tiny.of_kind(report, "loss")
    assert len(replaced) == 1 and not skipped
    return report


@pytest.mark.parametrize("name", DECODERS)
def test_losses_and_gradients_of_families(name, calls):
    model = build(name)
    want = step(model)
    accelerated(model)
    got = step(model)
    assert len(calls) == 1
    expect_close(got, want)
    if "gemma2" in name:
        assert calls[0]["softcap"] == model.config.final_logit_softcapping
    tw.restore(model)
    assert type(model.lm_head) is nn.Linear
    step(model)
    assert len(calls) == 1


def test_num_items_in_batch_divides_the_sum(calls):
    model = build("llama")
    for n_items in (torch.tensor(1234), 1234):
        want = step(model, num_items_in_batch=n_items)
        tw.accelerate(model)
        expect_close(step(model, num_items_in_batch=n_items), want)
        tw.restore(model)
    assert [c["reduction"] for c in calls] == ["sum", "sum"]


def test_logits_are_never_in_memory():
    model = build("llama", vocab_size=5000)
    n_logits = 2 * LENGTH * 5000

    def largest():
        return max(allocations(lambda: step(model))) // 4

    assert largest() >= n_logits
    tw.accelerate(model)
    assert largest() < 0.6 * n_logits


READS = {
    "argmax": lambda x: x.argmax(-1),
    "index": lambda x: x[:, -1, :],
    "one row": lambda x: x[1],
    "mask": lambda x: x[x > 0],
    "float": lambda x: x.float().log_softmax(-1),
    "function": lambda x: torch.softmax(x, -1),
    "arithmetic": lambda x: 1 - 2 * x / 3 + x**2,
    "tanh": lambda x: 5 * torch.tanh(x / 5),
    "comparison": lambda x: (x > 0.5) | (x == 0),
    "gather": lambda x: torch.gather(x, 2, torch.zeros(2, LENGTH, 1, dtype=torch.long)),
    "shifted": lambda x: x[..., :-1, :].contiguous().view(-1, x.size(-1)).max(-1).values,
    "list": lambda x: torch.stack(list(x)),
    "cat": lambda x: torch.cat([x, x]),
    "array": lambda x: torch.from_numpy(numpy.asarray(x.detach())),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "copy": lambda x: copy.deepcopy(x.detach()),
}


@pytest.mark.parametrize("name", READS)
def test_logits_that_are_read_are_those_of_the_head(name):
    model = build("llama")
    ids, labels = batch()
    want = READS[name](model(ids, labels=labels).logits)
    tw.accelerate(model)
    out = model(ids, labels=labels)
    assert isinstance(out.logits, deferred.DeferredLogits) and "not read" in repr(out.logits)
    assert out.logits.shape == (2, LENGTH, tiny.VOCABULARY) and out.logits.requires_grad
    got = READS[name](out["logits"])
    got = got.tensor() if isinstance(got, deferred.DeferredLogits) else got
    assert got.dtype == want.dtype
    if want.is_floating_point():
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    else:
        assert (got != want).float().mean() < 0.01
    assert out.to_tuple()[1] is out.logits


def test_a_loss_of_ones_own_over_the_logits(calls):
    """With torch's cross_entropy it goes to our operator, and so do its gradients."""
    model = build("llama")
    ids, labels = batch()

    def own(model):
        model.zero_grad()
        x = model(ids, labels=labels).logits[:, :-1].float()
        loss = F.cross_entropy(
            x.reshape(-1, x.shape[-1]), labels[:, 1:].reshape(-1), label_smoothing=0.1,
            reduction="sum",
        )  # fmt: skip
        loss.backward()
        return loss.detach(), model.lm_head.weight.grad.clone()

    want = own(model)
    tw.accelerate(model)
    got = own(model)
    assert len(calls) == 2 and calls[1]["label_smoothing"] == 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_a_loss_that_is_another_one_reads_them(calls):
    model = build("llama")
    ids, labels = batch()
    tw.accelerate(model)
    x = model(ids, labels=labels).logits
    targets = torch.softmax(torch.randn(2 * LENGTH, tiny.VOCABULARY), -1)
    want = F.cross_entropy(x.tensor().view(-1, tiny.VOCABULARY), targets)
    x = model(ids, labels=labels).logits
    got = F.cross_entropy(x.view(-1, tiny.VOCABULARY), targets)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2  # of the two forwards alone


def test_logits_after_the_step_are_refused():
    model = build("llama")
    tw.accelerate(model)
    ids, labels = batch()
    out, later = model(ids, labels=labels), model(ids, labels=labels)
    read = out.logits.argmax(-1)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert torch.equal(out.logits.argmax(-1), read)  # which were made before
    with pytest.raises(RuntimeError, match="the weight of the output head has changed since"):
        later.logits.argmax(-1)


STOCK = {
    "in eval": lambda model: model.eval(),
    "with hooks": lambda model: model.lm_head.register_forward_hook(lambda *_: None),
    "another head": lambda model: setattr(model, "lm_head", nn.Linear(32, tiny.VOCABULARY)),
}


@pytest.mark.parametrize("name", STOCK)
def test_what_stays_stock(name, calls):
    model = build("llama")
    tw.accelerate(model)
    STOCK[name](model)
    out, _ = step(model)
    assert type(out.logits) is torch.Tensor and not calls


def test_calls_that_stay_stock(calls):
    model = build("llama")
    tw.accelerate(model)
    ids, labels = batch()
    assert type(model(ids).logits) is torch.Tensor
    with torch.no_grad():
        assert type(model(ids, labels=labels).logits) is torch.Tensor
    assert type(model(ids[:, :9], labels=labels[:, :9]).logits) is torch.Tensor  # short
    assert not calls
    loss, logits = model(ids, labels=labels, return_dict=False)[:2]
    assert len(calls) == 1 and loss.dim() == 0 and logits[0].shape == (LENGTH, tiny.VOCABULARY)


def test_a_head_that_cannot_be_replaced_is_told():
    model = build("llama")
    model.lm_head = nn.Sequential(nn.Linear(32, tiny.VOCABULARY))
    _, (skipped,) = tiny.of_kind(tw.accelerate(model), "loss")
    assert skipped.reason == "its output head is a Sequential, not a plain linear layer"


def test_autocast(calls):
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        want = step(model)
        tw.accelerate(model)
        ids, labels = batch()
        logits = model(ids, labels=labels).logits
        got = step(model)
    assert logits.dtype == torch.bfloat16 and got[0].loss.dtype == torch.float32
    assert abs(got[0].loss - want[0].loss) < 0.02
    assert logits.tensor().dtype == torch.bfloat16 and len(calls) == 2


def test_lora_over_a_frozen_head(calls):
    model = build("llama")
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft_model = get_peft_model(model, config)
    want = step(peft_model)
    report = tw.accelerate(peft_model)
    assert len(tiny.of_kind(report, "loss")[0]) == 1
    got = step(peft_model)
    expect_close(got, want)
    assert len(calls) == 1 and model.lm_head.weight.grad is None


def test_a_tied_head_and_a_masked_one(calls):
    """The embedding's gradient is the sum of both; BERT's head has a bias, its loss no shift."""
    model = build("llama", tie_word_embeddings=True)
    want = step(model)
    tw.accelerate(model)
    expect_close(step(model), want)
    import transformers as hf

    bert = tiny.seeded(lambda: hf.BertForMaskedLM(hf.BertConfig(**tiny._ENCODER))).train()
    ids = tiny.tokens(length=60).repeat(10, 1)

    def loss(model):
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        return out.loss.detach(), model.cls.predictions.bias.grad.clone()

    want = loss(bert)
    accelerated(bert)
    torch.testing.assert_close(loss(bert), want, rtol=1e-5, atol=1e-6)
    assert len(calls) == 2


def test_the_trainer_divides_by_the_items_of_all_steps(tmp_path, calls):
    """transformers' Trainer, two accumulated batches with unequal numbers of labels."""
    import transformers as hf

    rows = []
    for seed in range(18):
        ids = torch.randint(3, 97, (300,), generator=torch.Generator().manual_seed(seed))
        labels = ids.clone()
        labels[: 15 * seed] = -100
        rows.append({"input_ids": ids, "labels": labels})

    def train(accelerates):
        model = build("llama")
        if accelerates:
            tw.accelerate(model)
        arguments = hf.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2,
            max_steps=3, learning_rate=1e-3, logging_steps=1, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = hf.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    want = train(False)
    assert not calls
    got = train(True)
    assert len(calls) == 6 and all(c["reduction"] == "sum" for c in calls)
    assert got == pytest.approx(want, abs=2e-3)
