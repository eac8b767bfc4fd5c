"""Files that are either whole or absent: atomic writes, readable refusals, hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CheckpointError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is flushed to disk and renamed over it, on any exception removed.

    The parent directory is made if it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temp
        with open(temp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def check_own(directory: str | os.PathLike, marks: Sequence[str], what: str) -> None:
    """Raises CheckpointError if ``directory`` is a file, or holds files but none of the names in ``marks``, by which ``what`` we write there is known.

    What a killed ``atomic_path`` left behind counts for nothing.
    """
    path = Path(directory)
    if not path.is_dir():
        if os.path.lexists(path):
            raise CheckpointError(f"writing {what} to {path}", "it exists and is no directory", "choose another directory")
        return
    held = sorted(p.name for p in path.iterdir() if not (p.name.startswith(".") and p.suffix == ".part"))
    if held and not set(held) & set(marks):
        raise CheckpointError(f"writing {what} to {path}", f"the directory holds something else ({held[0]})", "choose another directory")


def check_file(path: str | os.PathLike) -> None:
    """Raises CheckpointError if no file can be written at ``path`` because a directory is there, or a file where a directory should be."""
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"writing {path}", "it is a directory", "name a file in it")
    if (above := next((p for p in path.parents if os.path.lexists(p)), None)) is not None and not above.is_dir():
        raise CheckpointError(f"writing {path}", f"{above} is no directory", "choose another path")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temp:
        temp.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, obj) -> None:
    """Writes ``obj`` as indented JSON, atomically."""
    write_text(path, json.dumps(obj, indent=1) + "\n")


def read_json(path: str | os.PathLike) -> dict:
    """Reads a JSON object. Raises CheckpointError if the file is missing, cut short or no object."""
    path = Path(path)
    try:
        obj = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"reading {path}", "there is no such file", "check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(f"reading {path}", f"it is not valid JSON ({e})", "the file was cut short or edited: make it again") from None
    if not isinstance(obj, dict):
        raise CheckpointError(f"reading {path}", f"a JSON object is expected, found {type(obj).__name__}", "make the file again")
    return obj


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def save_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically. Tensors are made contiguous; metadata is str -> str."""
    with atomic_path(path) as temp:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temp, metadata)


def load_tensors(path: str | os.PathLike, names: list[str] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (all, or those named) and metadata of a safetensors file. Raises CheckpointError with the reason."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"reading {path}", "there is no such file", "check the path")
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in (f.keys() if names is None else names)}, dict(f.metadata() or {})
    except SafetensorError as e:
        raise CheckpointError(f"reading {path}", f"it is no whole safetensors file ({e})", "the file was cut short or edited: make it again") from None
