"""``--op decode``: a whole model, tokens per second: writing greedily with a short context, and reading a prompt.

    python bench/run.py --op decode --threads 1
    python bench/run.py --op decode --model DIRECTORY --plan w4g64 --gguf model-IQ4_NL.gguf --rounds 5

Candidates take turns, round after round, in one process: transformers in bfloat16, torch's dynamic int8, this package module by module and layers at
once (a16 and a8), and llama.cpp where ``llama_cpp`` can be imported: on the files given with ``--gguf``, and for the demo's model on its own GGUF and
what llama.cpp makes of it. Each has three numbers, the best and the median of the rounds: ``generate`` is ``model.generate`` as people call it, ``step``
a bare loop of forward and argmax (``mxq generate`` is one), ``prefill`` the prompt. llama.cpp has the last two. Weights are quantized to nearest: only
their bytes matter here.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import mxq_ext as mxq
from mxq_ext.decoding import Decoder, greedy
from mxq_ext.hf import demo_model_path, load_model
from mxq_ext.nn import fuse_layers, quantized_modules, set_compute
from mxq_ext.stats.walk import frozen

REPLACES = True  #: each table has all rounds so far, and takes the place of the one before
#: What llama.cpp makes of the demo's GGUF: its name for a file type -> the number of it.
LLAMA_TYPES = {"IQ4_NL": 25, "Q4_0": 2}


@dataclass
class Candidate:
    """One way to run the model. ``use`` prepares it; the others return seconds for ``new`` tokens, or for the whole prompt."""

    name: str
    nbytes: int
    use: Callable[[], None]
    steps: Callable[[torch.Tensor, int], float]
    prefill: Callable[[torch.Tensor], float]
    generate: Callable[[torch.Tensor, int], float] | None = None
    seen: dict[str, list[float]] = field(default_factory=lambda: {"generate": [], "step": [], "prefill": []})


def arguments(parser) -> None:
    """Options of this op."""
    parser.add_argument("--model", help="a model directory or GGUF file; the demo's model without it")
    parser.add_argument("--plan", default="w4g64", help="a format or a plan file")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of this package's activations")
    parser.add_argument("--gguf", action="append", default=[], help="a file for llama.cpp; may be given several times")
    parser.add_argument("--prompt", type=int, default=8, help="tokens before those that are written")
    parser.add_argument("--new", type=int, default=64, help="tokens written")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt that is read")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)


class Clock:
    """A streamer for ``model.generate`` that notes when the prompt and each token are handed over."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def of_model(name: str, nbytes: int, model: nn.Module, use: Callable[[], None] = lambda: None) -> Candidate:
    """A candidate that is a model of transformers."""

    def timed(f: Callable[[], object]) -> float:
        with frozen(model), torch.inference_mode():
            start = time.perf_counter()
            f()
            return time.perf_counter() - start

    def steps(ids: torch.Tensor, new: int) -> float:
        tokens = greedy(model, ids)
        with frozen(model), torch.inference_mode():
            next(tokens)  # reads the prompt
        return timed(lambda: [next(tokens) for _ in range(new)])

    def generate(ids: torch.Tensor, new: int) -> float:
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        clock = Clock()
        with frozen(model), torch.inference_mode():
            model.generate(ids, max_new_tokens=new + 1, min_new_tokens=new + 1, streamer=clock, **options)
        return clock.times[-1] - clock.times[1]  # from the first token on: the prompt, which is handed over first, is another number

    return Candidate(name, nbytes, use, steps, lambda ids: timed(lambda: Decoder(model).step(ids)), generate)


def of_llama(name: str, path: Path, threads: int, context: int) -> Candidate:
    """A candidate that is a GGUF file in llama.cpp: its C functions, with a synchronisation and an argmax after each token as the others have."""
    import llama_cpp as c
    import numpy as np

    model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
    options = c.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_threads, options.n_threads_batch = context, context, 512, threads, threads
    state = c.llama_init_from_model(model, options)
    if not model or not state:
        raise SystemExit(f"bench: llama.cpp cannot load {path}")
    vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))

    def feed(ids: list[int]) -> int:
        tokens = (c.llama_token * len(ids))(*ids)
        if c.llama_decode(state, c.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit(f"bench: llama.cpp could not decode {len(ids)} tokens with {path}")
        c.llama_synchronize(state)
        return int(np.ctypeslib.as_array(c.llama_get_logits_ith(state, -1), (vocabulary,)).argmax())

    def steps(ids: torch.Tensor, new: int) -> float:
        c.llama_memory_clear(c.llama_get_memory(state), True)
        token = feed(ids[0].tolist())
        start = time.perf_counter()
        for _ in range(new):
            token = feed([token])
        return time.perf_counter() - start

    def prefill(ids: torch.Tensor) -> float:
        c.llama_memory_clear(c.llama_get_memory(state), True)
        tokens, start = ids[0].tolist(), time.perf_counter()
        feed(tokens)
        return time.perf_counter() - start

    return Candidate(f"llama.cpp {name}", path.stat().st_size, lambda: None, steps, prefill)


def _silence(c) -> None:
    global _silent
    _silent = c.llama_log_callback(lambda *_: None)  # kept: C holds only its address
    c.llama_log_set(_silent, ctypes.c_void_p())


def llama_files(options, folder: Path) -> dict[str, Path]:
    """Name -> GGUF file: those asked for; for the demo's model its own and what llama.cpp makes of it in ``folder``."""
    files = {Path(p).stem: Path(p) for p in options.gguf}
    if importlib.util.find_spec("llama_cpp") is None:
        if files:
            raise SystemExit("bench: --gguf needs the package llama-cpp-python")
        return {}
    import llama_cpp as c

    _silence(c)
    if options.model is None and not files:
        source = demo_model_path()
        files[source.stem.rpartition(".")[2]] = source
        for name, number in LLAMA_TYPES.items():
            how = c.llama_model_quantize_default_params()
            how.ftype, how.allow_requantize = number, True
            files[name] = folder / f"{name}.gguf"
            if c.llama_model_quantize(str(source).encode(), str(files[name]).encode(), how):
                raise SystemExit(f"bench: llama.cpp could not make {name} of {source.name}")
    return files


def candidates(options, folder: Path) -> tuple[list[Candidate], int]:
    """All of them, in the order of the table, and the size of their vocabulary."""
    model, _ = load_model(options.model or demo_model_path())
    vocabulary = model.config.vocab_size
    half = copy.deepcopy(model).to(torch.bfloat16)
    out = [of_model("transformers bf16", sum(p.nbytes for p in half.parameters()), half)]
    eight = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    head = model.get_input_embeddings().weight.numel()
    out.append(of_model("torch int8 dynamic", sum(p.numel() for p in model.parameters()) + 4 * head, eight))
    mxq.replace_linear(model, options.plan)
    model.to(getattr(torch, options.dtype))
    nbytes = sum({id(m.held): m.held.nbytes for m in quantized_modules(model).values()}.values())

    def use(fuse: str | None, compute: str) -> Callable[[], None]:
        return lambda: (fuse_layers(model, fuse), set_compute(model, compute))

    for fuse in (None, "layer"):
        for compute in ("a16", "a8"):
            name = f"mxq {options.plan} {'layers' if fuse else 'modules'} {compute}"
            out.append(of_model(name, nbytes, model, use(fuse, compute)))
    context = max(options.prefill, options.prompt + options.new + 2)
    out += [of_llama(name, path, options.threads, context) for name, path in llama_files(options, folder).items()]
    return out, vocabulary


def run(options) -> Iterator[tuple[dict, str]]:
    """Yields (results, Markdown) after each round."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ways, vocabulary = candidates(options, Path(folder))
            for round_ in range(-1, options.rounds):  # the first one warms up
                new = options.new if round_ >= 0 else 4
                short, long = (torch.randint(1, vocabulary, (1, n), generator=generator) for n in (options.prompt, options.prefill))
                turn = max(round_, 0) % len(ways)
                for way in ways[turn:] + ways[:turn]:
                    way.use()
                    took = {"step": new / way.steps(short, new), "prefill": options.prefill / way.prefill(long)}
                    if way.generate is not None:
                        took["generate"] = new / way.generate(short, new)
                    if round_ >= 0:
                        for name, speed in took.items():
                            way.seen[name].append(speed)
                if round_ >= 0:
                    yield result(options, ways), table(options, ways)
    finally:
        torch.set_num_threads(before)


def result(options, ways: list[Candidate]) -> dict:
    """The JSON of what has been measured."""
    rows = [{"name": w.name, "nbytes": w.nbytes} | {f"{n}_tokens_per_s": {"best": max(v), "median": statistics.median(v), "rounds": len(v)}
                                                   for n, v in w.seen.items() if v} for w in ways]
    return {"threads": options.threads, "prompt": options.prompt, "new": options.new, "prefill": options.prefill, "rows": rows, "refused": []}


def table(options, ways: list[Candidate]) -> str:
    """Markdown: best (median) of the rounds so far."""
    base = max(ways[0].seen["generate"])

    def cell(speeds: list[float]) -> str:
        return f"{max(speeds):.0f} ({statistics.median(speeds):.0f})" if speeds else "-"

    rounds = len(ways[0].seen["step"])
    setting = f"{options.threads} thread(s), best (median) of {rounds}: {options.new} written after {options.prompt}, {options.prefill} read"
    lines = [f"\n### Tokens per second, {setting}\n", "| model | MB | generate | x bf16 | step | prefill |", "|---" * 6 + "|"]
    for w in ways:
        times = f"{max(w.seen['generate']) / base:.2f}" if w.seen["generate"] else "-"
        lines.append(f"| {w.name} | {w.nbytes / 1e6:.1f} | {cell(w.seen['generate'])} | {times} | {cell(w.seen['step'])} | {cell(w.seen['prefill'])} |")
    return "\n".join(lines)
