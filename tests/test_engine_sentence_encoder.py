"""A real trained encoder, all-MiniLM-L6-v2, on real sentences: the same embeddings as stock."""

import pytest
import torch

import tilewright as tw
from tilewright.bench import bench_encoder

N_SENTENCES = 1000
BATCH = 50


@pytest.fixture(scope="module")
def folder():
    why_not = bench_encoder.why_not()
    if why_not is not None:
        pytest.skip(why_not)
    return bench_encoder.folder()


def embeddings(model, batches):
    """Mean of the last hidden states over live tokens, (N, 384) float32, as this model is used."""
    means = []
    with torch.no_grad():
        for batch in batches:
            hidden = model(**batch).last_hidden_state.float()
            live = batch["attention_mask"][:, :, None].float()
            means.append((hidden * live).sum(1) / live.sum(1))
    return torch.cat(means)


@pytest.mark.slow
def test_embeddings_of_real_sentences(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    sentences = bench_encoder.sentences(N_SENTENCES)
    # unsorted, so that most rows of a batch are padded
    batches = [
        tokenizer(
            sentences[i : i + BATCH], padding=True, truncation=True, max_length=32,
            return_tensors="pt",
        )
        for i in range(0, N_SENTENCES, BATCH)
    ]  # fmt: skip
    stock = embeddings(model, batches)
    # the embeddings tell sentences apart, so that agreement is not a matter of course
    apart = torch.nn.functional.cosine_similarity(stock[0::2], stock[1::2])
    assert apart.mean() < 0.7

    report = tw.accelerate(model)
    kinds = [r.kind for r in report.replaced]
    assert kinds.count("attention") == 6 and kinds.count("norm") == 13 and not report.skipped
    ours = embeddings(model, batches)
    assert torch.nn.functional.cosine_similarity(ours, stock).min() >= 0.99999
    assert (ours - stock).abs().max() <= 1e-4 * stock.abs().max()

    model.to(torch.bfloat16)
    ours = embeddings(model, batches)
    tw.restore(model)
    stock = embeddings(model, batches)
    assert torch.nn.functional.cosine_similarity(ours, stock).min() >= 0.999
