"""Zero-shot tasks: what the built-in ones hold, and lm-eval's accuracy against plain sums of log probabilities."""

import importlib.util
import json
import random
import re
import sys

import pytest
import torch
from conftest import make_sharp_model, make_tokenizer

from mxq_ext import text as texts
from mxq_ext import verbs
from mxq_ext.compare import compare
from mxq_ext.errors import ModelError, MxqError
from mxq_ext.nn import quantized_modules, replace_linear
from mxq_ext.plan import Plan
from mxq_ext.tasks import BUILT_IN, builtin, run_tasks
from mxq_ext.tasks.builtin import PAIRS, RULES, pairs, passages

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'mxq_ext[tasks]'")

# ------------------------------------------------------------------------------------------------------------- what they hold


def test_pairs_differ_in_one_word_and_are_the_same_each_time():
    found = pairs()
    assert found == pairs() and len({p["good"] for p in found}) == PAIRS and found[:60] == pairs(60)
    for p in found:
        good, bad = p["good"].split(), p["bad"].split()
        assert len(good) == len(bad) and sum(a != b for a, b in zip(good, bad, strict=True)) == 1, p


@pytest.mark.parametrize("rule, wrong", list(zip(RULES, (
    r"^The \w+s (near|behind|beside|next to|in front of) the \w+ (is|was) |^The (?!.*s (near|behind|beside|next to|in front of) )\w+ \w.*? (are|were) ",
    r"\b(boys|men|kings|uncles|fathers|brothers|princes|girls|women|queens|aunts|mothers|sisters|princesses) \w+ (him|her)self"
    r"|\b(boy|man|king|uncle|father|brother|prince) \w+ herself|\b(girl|woman|queen|aunt|mother|sister|princess) \w+ himself",
    r"^(Some|This|The) \w+ has ever ", r"(this|that) \w+ \w+s\.|(these|those) \w+ \w+(?<!s)\.", r"There (is (many|several|two)|are a) ",
    r"has (already |just )?(ate|took|wrote|broke|stole|gave|forgot|hid|threw|drew) "), strict=True)), ids=lambda v: getattr(v, "__name__", ""))
def test_each_rule_makes_the_mistake_that_it_is_about(rule, wrong):
    r = random.Random(3)
    for _ in range(200):
        good, bad = rule(r)
        assert re.search(wrong, bad) and not re.search(wrong, good), (good, bad)


def test_passages_end_in_a_word_that_was_there_before():
    text = "One two three four house. " + "Word " * 30 + "is here. And six more words lead to the house. Another house."
    assert passages(text, (30, 90)) == [{"text": " ".join(text.split()[:-3]), "word": "house"}]  # what follows is too short
    assert passages(text, (30, 40)) == [] and passages("", (1, 9)) == []
    for kind in ("technical", "literary"):
        found = passages(texts.heldout_text(kind))
        assert len(found) > 50
        for p in found:
            words = p["text"].split()
            assert 39 <= len(words) < 90 and p["word"].lower() in [re.sub(r"\W+$", "", w).lower() for w in words]


# ------------------------------------------------------------------------------------------------------------------ accuracy


def log_probabilities(model, ids):
    return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)


@torch.inference_mode()
def right_of_pairs(model, tokenizer, count):
    start, right = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id, 0
    for p in pairs(count):
        sums = []
        for sentence in (p["good"], p["bad"]):
            ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
            sums.append(log_probabilities(model, [start, *ids])[:-1].gather(1, torch.tensor(ids)[:, None]).sum())
        right += int(sums[0] > sums[1])
    return right


@torch.inference_mode()
def right_of_passages(model, tokenizer, count):
    right = 0
    for p in passages(texts.heldout_text())[:count]:
        whole, context = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (f"{p['text']} {p['word']}", p["text"]))
        assert whole[:len(context)] == context
        likeliest = log_probabilities(model, whole[:-1]).argmax(-1)[len(context) - 1:]
        right += int(likeliest.tolist() == whole[len(context):])
    return right


@needs_lm_eval
def test_accuracy_equals_plain_sums_of_log_probabilities():
    model, tokenizer = make_sharp_model(), make_tokenizer()
    found = run_tasks(model, tokenizer, ["pairs", "cloze"], limit=16)
    assert found["pairs"]["acc"] == right_of_pairs(model, tokenizer, 16) / 16 and found["pairs"]["documents"] == 16
    assert found["cloze"]["acc"] == right_of_passages(model, tokenizer, 16) / 16 and found["cloze"]["documents"] == 16
    share = found["pairs"]["acc"]
    assert found["pairs"]["acc_se"] == pytest.approx((share * (1 - share) / 15) ** 0.5)


@needs_lm_eval
def test_tasks_of_a_folder_on_a_quantized_model(tmp_path):
    model, tokenizer = make_sharp_model(), make_tokenizer()
    replace_linear(model, Plan.uniform("w4g64"))
    assert quantized_modules(model)
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs(3)))
    (tmp_path / "three.yaml").write_text(f"""task: three
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / 'three.jsonl'}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[good, bad]}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
""")
    found = run_tasks(model, tokenizer, ["three"], include=tmp_path)
    assert found["three"]["acc"] == right_of_pairs(model, tokenizer, 3) / 3 and found["three"]["documents"] == 3


@needs_lm_eval
def test_unknown_tasks_are_named():
    with pytest.raises(ModelError, match=r"task 'no_such_task'.*lm-eval does not know it.*pairs, cloze"):
        run_tasks(make_sharp_model(), make_tokenizer(), ["pairs", "no_such_task"])
    with pytest.raises(ModelError, match="running no tasks"):
        run_tasks(make_sharp_model(), make_tokenizer(), [])


def test_without_lm_eval_an_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for call in (lambda: run_tasks(None, None, ["pairs"]), lambda: verbs.evaluate_checkpoint(tmp_path, tasks=["pairs"]),
                 lambda: compare(tmp_path, tmp_path / "out", bits=[4], presets=["rtn"], tasks=["pairs"])):
        with pytest.raises(MxqError, match=r"lm-eval is not installed.*mxq_ext\[tasks\]"):
            call()


# --------------------------------------------------------------------------------------------------------- eval and compare


@needs_lm_eval
def test_eval_and_compare_have_the_same_accuracy(tmp_path, monkeypatch):
    make_sharp_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "held.txt").write_text(texts.heldout_text()[:4_000])
    monkeypatch.setattr(builtin, "passages", lambda text: passages(text)[:6])
    arguments = dict(bits=[4.6], presets=["rtn"], tasks=["cloze"], timed=False, windows=4, eval_windows=2, length=64, text=tmp_path / "held.txt",
                     held_out=[tmp_path / "held.txt"])
    rows = compare(tmp_path / "model", tmp_path / "out", **arguments)["rows"]
    for row, path in zip(rows, (tmp_path / "model", tmp_path / "out" / "checkpoints" / "rtn-4.6"), strict=True):
        one = verbs.evaluate_checkpoint(path, text=tmp_path / "held.txt", windows=2, length=64, tasks=["cloze"])
        assert one["tasks"] == row["tasks"] and set(row["tasks"]) == {"cloze"}
    assert " cloze |" in (tmp_path / "out" / "compare.md").read_text()
    asked = []
    monkeypatch.setattr("mxq_ext.compare.run_tasks", lambda model, tokenizer, names: asked.append(names) or dict.fromkeys(names, {"acc": 0.25}))
    again = compare(tmp_path / "model", tmp_path / "out", **arguments | {"tasks": ["cloze", "pairs"]})["rows"]
    assert asked == [["pairs"]] * 2  # what a row has is not measured again
    assert [r["tasks"] for r in again] == [r["tasks"] | {"pairs": {"acc": 0.25}} for r in rows]


def test_built_in_tasks_have_their_names():
    assert all(task["task"] == name for name, task in BUILT_IN.items())
