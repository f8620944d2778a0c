"""A whole model on a GPU: accelerated against stock, in training, decoding and compiled."""

import pytest
import tiny_models as tiny
import torch
from yardstick import assert_errs_at_most_twice_stock

import tilewright as tw

pytestmark = pytest.mark.gpu

PROMPT, NEW_TOKENS = 300, 20  # several tiles of queries, and a cache that grows
WIDTHS = {
    "hidden_size": 256, "intermediate_size": 320, "head_dim": 64, "max_position_embeddings": 1024,
}  # fmt: skip


def llama(attention, dtype=torch.float32):
    """The same random weights, rounded to dtype, whatever computes the attention."""
    model = tiny.seeded(tiny.DECODERS["llama"], attn_implementation=attention, **WIDTHS)
    return model.to("cuda", dtype)


def loss_and_gradients(model, ids):
    loss = model(ids, labels=ids).loss
    names, weights = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bf16"))
def test_loss_and_gradients_err_at_most_twice_stock(dtype):
    ids = tiny.tokens(batch=2, length=PROMPT).cuda()
    ours, stock, truth = (llama(name, dtype) for name in ("sdpa", "sdpa", "eager"))
    report = tw.accelerate(ours)
    replaced, skipped = tiny.of_kind(report)
    assert len(replaced) == 2 and not skipped
    # the same rounded weights in float64 throughout: what both are compared with
    _, exact = loss_and_gradients(truth.double(), ids)
    loss, gradients = loss_and_gradients(ours, ids)
    stock_loss, stock_gradients = loss_and_gradients(stock, ids)
    assert loss.isfinite() and abs(loss - stock_loss) <= 4 * torch.finfo(dtype).eps * stock_loss
    for name, gradient in gradients.items():
        if "self_attn" in name:  # what attention itself has a part in
            assert_errs_at_most_twice_stock(name, gradient, stock_gradients[name], exact[name])


def test_it_decodes_the_same_tokens_as_stock():
    ids = tiny.tokens(batch=2, length=PROMPT).cuda()
    mask = tiny.padding("left", batch=2, length=PROMPT).cuda()
    options = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    model = llama("sdpa")
    with torch.no_grad():
        want = model.generate(ids, **options)
        tw.accelerate(model)
        assert torch.equal(model.generate(ids, **options), want)
        tw.restore(model)
        assert torch.equal(model.generate(ids, **options), want)


def test_it_compiles_without_a_break(clean_memory):
    ids = tiny.tokens(batch=2, length=PROMPT).cuda()
    ours, stock, truth = (llama(name, torch.bfloat16) for name in ("sdpa", "sdpa", "eager"))
    tw.accelerate(ours)
    with torch.no_grad():
        exact = truth.double()(ids).logits
        got = torch.compile(ours, fullgraph=True)(ids).logits
        assert_errs_at_most_twice_stock("logits", got, stock(ids).logits, exact)
