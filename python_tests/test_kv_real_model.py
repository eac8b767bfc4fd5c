"""The packed cache on the real model: at 16 bits the same text as with transformers' own cache, whatever way it is written."""

import copy

import pytest
import torch
from conftest import load_real_model
from transformers import DynamicCache

from mxq_ext.decoding import cache_name
from mxq_ext.kv.attention import replace_attention
from mxq_ext.kv.cache import MxqCache
from mxq_ext.plan import KVPlan, KVSpec

pytestmark = pytest.mark.slow
EXACT = KVPlan(KVSpec(16, 16))
PROMPTS = ["The three most important things to know about the sea are", "In the beginning of the year the farmer", "Python is a language that"]


@pytest.fixture(scope="module")
def real():
    """(model, the same with packed pages of 16 bits, tokenizer)."""
    model, tokenizer = load_real_model()
    return model, replace_attention(copy.deepcopy(model), EXACT), tokenizer


def test_two_hundred_greedy_tokens(real):
    model, packed, tokenizer = real
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    want = model.generate(**ids, max_new_tokens=200, min_new_tokens=200, do_sample=False)
    assert torch.equal(packed.generate(**ids, max_new_tokens=200, min_new_tokens=200, do_sample=False), want)
    assert len(set(want[0].tolist())) > 40


def test_beams_and_a_left_padded_batch(real):
    model, packed, tokenizer = real
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer([PROMPTS[0] * 6, PROMPTS[1], PROMPTS[2]], return_tensors="pt", padding=True)
    assert (batch["attention_mask"].sum(1) < batch["attention_mask"].shape[1]).sum() == 2
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        want = model.generate(**batch, max_new_tokens=48, **options)
        assert torch.equal(packed.generate(**batch, max_new_tokens=48, **options), want)


def test_going_on_from_a_crop(real):
    model, packed, tokenizer = real
    name = cache_name(type(model).forward)
    ids = tokenizer(" ".join(PROMPTS * 8), return_tensors="pt")["input_ids"]
    caches = DynamicCache(config=model.config), MxqCache(packed.config, EXACT)
    texts = []
    with torch.inference_mode():
        for m, cache in zip((model, packed), caches, strict=True):
            m(ids, **{name: cache})
            cache.crop(100 - cache.get_seq_length())
            token, written = ids[:, 100:101], []
            for _ in range(60):
                token = m(token, **{name: cache}).logits[:, -1:].argmax(-1)
                written.append(int(token))
            texts.append(written)
    assert texts[0] == texts[1] and len(set(texts[0])) > 10
