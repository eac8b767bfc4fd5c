"""llama.cpp's quants of a model, beside ours: a GGUF file of the float model, its quants, and their quality by llama.cpp's own logits.

Needs the packages gguf and llama-cpp-python. A file written here has no vocabulary: it is for measuring, on token ids.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .errors import ModelError, MxqError, QuantizationError
from .evaluate import Evaluation, Reference, evaluate_logits
from .fileio import atomic_path
from .progress import SILENT, Progress
from .stats import Stats

#: From the widest to the narrowest; those below 3 bits refuse to be made without an importance matrix.
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q3_K_M", "IQ3_M", "Q3_K_S", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XS")
_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
          "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
          "post_attention_layernorm": "ffn_norm"}


def need(package: str):
    """The module, or an MxqError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        pip = {"llama_cpp": "llama-cpp-python"}.get(package, package)
        raise MxqError("llama.cpp's quants", f"the package {pip} cannot be imported ({e})", f"pip install {pip}") from None


def gguf_name(name: str) -> str | None:
    """llama.cpp's name of a weight, ``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``; None for one that it does not store."""
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in outer:
        return outer[name]
    head, _, rest = name.removeprefix("model.layers.").partition(".")
    inner = _NAMES.get(rest.removesuffix(".weight"))
    return None if inner is None or not head.isdigit() else f"blk.{head}.{inner}.weight"


def write_gguf(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes a Llama model in float32 as GGUF, without a vocabulary. Raises ModelError for another architecture, or one with biases or scaled positions."""
    gguf, config = need("gguf"), model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type != "llama" or rope.get("rope_type", "default") != "default":
        raise ModelError(f"a GGUF of {config.model_type}", "only Llama models with plain rotary positions are written", "leave out --llama-cpp")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    with atomic_path(path) as temporary:
        w = gguf.GGUFWriter(str(temporary), "llama")
        w.add_context_length(config.max_position_embeddings)
        w.add_embedding_length(config.hidden_size)
        w.add_block_count(config.num_hidden_layers)
        w.add_feed_forward_length(config.intermediate_size)
        w.add_head_count(heads)
        w.add_head_count_kv(kv_heads)
        w.add_key_length(dim)
        w.add_value_length(dim)
        w.add_rope_dimension_count(dim)
        w.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))))
        w.add_layer_norm_rms_eps(config.rms_norm_eps)
        w.add_vocab_size(config.vocab_size)
        w.add_tokenizer_model("none")
        w.add_file_type(gguf.LlamaFileType.ALL_F32)
        for name, p in model.named_parameters():
            stored = gguf_name(name)
            if stored is None:
                raise ModelError(f"a GGUF of {type(model).__name__}", f"llama.cpp's Llama has no {name}", "leave out --llama-cpp")
            weight = p.detach().float()
            if name.endswith(("q_proj.weight", "k_proj.weight")):  # its rotary embedding pairs neighbours, transformers' the two halves of a head
                weight = weight.view(-1, 2, dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            w.add_tensor(stored, weight.contiguous().numpy())
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()


def importance(model: nn.Module, stats: Stats) -> dict[str, np.ndarray]:
    """llama.cpp's importance matrix: GGUF name -> mean square float32 [K] of each input channel, from the plain second moments of ``stats``."""
    out = {}
    for name, module in model.named_modules():
        stored = gguf_name(f"{name}.weight")
        if isinstance(module, nn.Linear) and stored is not None and name in stats:
            moment = stats.hessian(name, "none")
            out[stored] = np.ascontiguousarray(moment.diagonal().float().numpy())
    return out


def quantize_gguf(source: str | os.PathLike, target: str | os.PathLike, type_name: str, matrix: Mapping[str, np.ndarray] | None = None) -> None:
    """Quantizes a float GGUF to one of llama.cpp's mixes by its own quantizer, with an importance matrix if one is given.

    Raises MxqError for an unknown type, QuantizationError where llama.cpp refuses (narrow types without an importance matrix).
    """
    lib = need("llama_cpp").llama_cpp
    ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{type_name}", None)
    if ftype is None:
        raise MxqError(f"llama.cpp's type {type_name}", "this llama-cpp-python does not know it", f"choose among {', '.join(TYPES)}")
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, torch.get_num_threads()
    if matrix is not None:
        entries = (lib.llama_model_imatrix_data * (len(matrix) + 1))()  # the last one stays empty and ends it
        for entry, (name, values) in zip(entries, matrix.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    with atomic_path(target) as temporary:
        with _told() as said:
            code = lib.llama_model_quantize(os.fsencode(source), os.fsencode(temporary), ctypes.byref(params))
        if code != 0:
            reason = next((line for line in reversed(said) if "warning" not in line), "no reason given")
            raise QuantizationError(f"llama.cpp's {type_name}", f"it refused with code {code}: {reason}", "leave this type out")


def sizes(path: str | os.PathLike) -> dict[str, float]:
    """``stored_bits`` of all matrices of a GGUF and ``linear_bits`` of those in its blocks, its ``bytes`` and ``checkpoint_bytes``, and the ``formats``."""
    matrices = [t for t in need("gguf").GGUFReader(str(path)).tensors if len(t.shape) == 2]

    def bits(tensors) -> float:
        return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)

    return {"stored_bits": bits(matrices), "linear_bits": bits([t for t in matrices if t.name.startswith("blk.")]),
            "bytes": sum(int(t.n_bytes) for t in matrices), "checkpoint_bytes": Path(path).stat().st_size,
            "formats": dict(Counter(t.tensor_type.name for t in matrices).most_common())}


def evaluate_gguf(path: str | os.PathLike, reference: Reference, tokens: torch.Tensor, progress: Progress = SILENT) -> Evaluation:
    """``evaluate.evaluate`` of a GGUF, by llama.cpp's logits, each window [T] in one batch."""
    llama_cpp, length = need("llama_cpp"), tokens.shape[1]
    with _told():
        model = llama_cpp.Llama(str(path), n_ctx=length, n_batch=length, n_ubatch=length, logits_all=True, verbose=False, n_threads=torch.get_num_threads(),
                                n_threads_batch=torch.get_num_threads())

    def logits(window: torch.Tensor) -> torch.Tensor:
        model.reset()
        model.eval(window.tolist())
        return torch.from_numpy(model.scores[:length])

    try:
        return evaluate_logits(logits, reference, tokens, progress=progress)
    finally:
        model.close()


@contextlib.contextmanager
def _told() -> Iterator[list[str]]:
    """What native code writes to stderr meanwhile goes to a list of lines, which is filled at the end."""
    lines: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
