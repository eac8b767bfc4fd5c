"""What a quantized KV cache costs and saves on the demo's model: perplexity, KL, bytes, and the time of a decoding step.

    python bench/kv.py -o bench/results/kv-quality.json [--part quality|speed] [--only NAME;NAME] [--length 1024] [--windows 4]

Weights stay in float. Each window is read through the cache, 64 tokens at a time, which for all caches here is what decoding token by token gives (they
keep at least 64 new tokens exact before they quantize any). Beside ours stand the quantized caches of transformers (``QuantizedCache``, with
optimum-quanto and hqq) at the same bits, groups of 64 and 64 exact tokens, with their default axes and with the axes that came out best.
Rows that the file has already are kept, so that a run can be cut short and go on; differences to no cache are paired by window.

``speed`` decodes with the weights at 4 bits and caches of 1024 and 4096 tokens: single steps of the whole model, in turns.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout wins over an installed package

from mxq_ext import text as texts  # noqa: E402
from mxq_ext.decoding import Decoder  # noqa: E402
from mxq_ext.errors import MxqError  # noqa: E402
from mxq_ext.evaluate import Evaluation, Reference, evaluate, paired  # noqa: E402
from mxq_ext.fileio import read_json, write_json  # noqa: E402
from mxq_ext.formats import PAGE  # noqa: E402
from mxq_ext.hf import demo_model_path, load_model, permute_model  # noqa: E402
from mxq_ext.kv.attention import replace_attention  # noqa: E402
from mxq_ext.kv.cache import MxqCache, page_formats  # noqa: E402
from mxq_ext.kv_planning import plan_kv  # noqa: E402
from mxq_ext.nn import replace_linear  # noqa: E402
from mxq_ext.pipeline import kv_tokens  # noqa: E402
from mxq_ext.plan import KVPlan, KVSpec, Plan  # noqa: E402
from mxq_ext.plan.presets import KV_POLICIES, find_kv  # noqa: E402
from mxq_ext.progress import Progress  # noqa: E402
from mxq_ext.testing.timing import in_turns, machine  # noqa: E402

KINDS = ("technical", "literary")
#: Ours: with the default window of 64 exact tokens, without one, and as the literature has them.
OURS = ("k16v16", "k8v8", "k4v4", "k4v4g32", "k3v3", "k4v2", "k2v2", "k2v2g32", "k8v8_r0", "k4v4_r0", "k3v3_r0", "k4v2_r0", "k2v2_r0", "k4v4g32_r0",
        "k2v2g32_r0", "k4v4_s4", "k2v2_s4")
#: Policies of the literature (``--only literature``), each beside the same bits on plain pages; what KVQuant's keys, levels and outliers do by themselves.
LITERATURE = ("kivi4", "kivi2", "layerwise 3 bits", "kvtuner 3 bits", "pm_kvq 3 bits",
              "k4v4_r0_s4", "k4v4_r0_s4_pre_normal", "kvquant4", "kvquant_dense 4 bits", "kvquant 4 bits",
              "k3v3_r0_s4", "k3v3_r0_s4_pre_normal", "kvquant3", "kvquant_dense 3 bits", "kvquant 3 bits",
              "k2v2_r0_s4", "k2v2_r0_s4_pre", "k2v2_r0_s4_normal", "k2v2_r0_s4_o0.01", "k2v2_r0_s4_pre_normal", "kvquant2", "kvquant_dense 2 bits",
              "kvquant 2 bits", "zipcache", "mikv")
#: transformers' own: name -> (backend, bits, axis of keys, axis of values). The first of a backend's bits has its default axes.
PEERS = {f"{backend} {bits} bits, axes {key}/{value}": (backend, bits, key, value)
         for backend, bits, key, value in (("quanto", 4, 0, 0), ("quanto", 4, -1, 0), ("quanto", 2, 0, 0), ("quanto", 2, -1, 0),
                                           ("hqq", 8, 0, 0), ("hqq", 8, 1, 1), ("hqq", 4, 0, 0), ("hqq", 4, 1, 1), ("hqq", 3, 0, 0),
                                           ("hqq", 2, 0, 0), ("hqq", 2, 0, 1))}
GROUP = RESIDUAL = 64
NONE = "no quantization"


def peer_cache(config, name: str):
    """A QuantizedCache of transformers. Raises MxqError where its back end is not installed."""
    from transformers import QuantizedCache

    backend, bits, key, value = PEERS[name]
    try:
        return QuantizedCache(backend, config, nbits=bits, axis_key=key, axis_value=value, q_group_size=GROUP, residual_length=RESIDUAL)
    except ImportError as e:
        raise MxqError(f"the cache {name!r}", f"transformers needs a package that is not installed ({e})", "pip install optimum-quanto hqq") from None


def peer_nbytes(cache) -> int:
    """Bytes of what a QuantizedCache keeps: quantized states with their scales and zeros, and the exact tokens."""
    def tensors(x) -> Iterator[torch.Tensor]:
        if isinstance(x, torch.Tensor) and hasattr(x, "_data"):  # quanto: codes, scale and shift behind a tensor's face
            yield from (x._data._data if hasattr(x._data, "_data") else x._data, x._scale, x._shift)
        elif isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, tuple | list):
            for part in x:
                yield from tensors(part)
        elif isinstance(x, dict):
            yield from tensors(list(x.values()))

    return sum(t.nbytes for layer in cache.layers for t in tensors((layer._quantized_keys, layer._quantized_values, layer.keys, layer.values)))


class Bench:
    """The model, the held-out windows, the references, and the file of rows."""

    def __init__(self, out: Path, length: int, windows: int, progress: Progress):
        self.out, self.progress = out, progress
        self.model, self.tokenizer = load_model(demo_model_path())
        permute_model(self.model)
        self.tokens = {k: texts.spread(texts.windows(self.tokenizer, texts.heldout_text(k), length), windows) for k in KINDS}
        self.record = read_json(out) if out.exists() else {"rows": [], "speed": []}
        setup = {"length": length, "windows": windows, "group": GROUP, "residual": RESIDUAL, "texts": texts.describe()}
        if self.record.get("setup", setup) != setup:
            raise MxqError(f"results {out}", "they are of other texts, windows or lengths", "name another file, or remove this one")
        self.record["setup"], self.here = setup, machine()
        self.record.setdefault("machine", self.here)  # that of the first rows; rows from elsewhere have their own

    def row(self, name: str) -> dict | None:
        return next((r for r in self.record["rows"] if r["name"] == name), None)

    def quality(self, wanted: list[str]) -> None:
        """Measures the rows that are wanted and not there yet."""
        wanted = [n for n in [NONE, *wanted] if self.row(n) is None]
        if not wanted:
            return
        references = {k: Reference.of(self.model, t, progress=self.progress) for k, t in self.tokens.items()}
        for name in wanted:
            made: list = []
            kv = None if name == NONE or name in PEERS else self.kv_of(name)
            replace_attention(self.model, kv)
            cache = (lambda name=name, made=made: made.append(peer_cache(self.model.config, name)) or made[-1]) if name in PEERS else None
            try:
                measured = {k: evaluate(self.model, references[k], t, cache=cache, progress=self.progress) for k, t in self.tokens.items()}
            except MxqError:
                raise
            except Exception as e:  # a back end that fails for these shapes is a row too
                self.add({"name": name, "ours": False, "failed": f"{type(e).__name__}: {e}"[:200]})
                continue
            nbytes = peer_nbytes(made[-1]) if made else measured[KINDS[0]].kv_nbytes
            bits = 32.0 if name == NONE else self.page_bits(kv) if kv is not None else 32 * nbytes / self.float_nbytes()
            self.add({"name": name, "ours": name not in PEERS, "kv": None if kv is None else kv.to_json(), "bits": bits,
                      "nbytes": nbytes or self.float_nbytes(), **{k: e.to_dict() for k, e in measured.items()}})

    def kv_of(self, name: str) -> KVPlan:
        """The KV section of a name for ``--kv``, or of ``<policy> <bits> bits``, whose policy is run on calibration text."""
        policy, *rest = name.split()
        if policy not in KV_POLICIES or not rest:
            return find_kv(name)
        replace_attention(self.model, None)
        return plan_kv(self.model, kv_tokens(self.model, self.tokenizer)[::2], policy, bits=float(rest[0]), progress=self.progress)

    def float_nbytes(self) -> int:
        """Bytes of keys and values in the model's float32."""
        c = self.model.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4 * self.record["setup"]["length"]

    def page_bits(self, kv) -> float:
        """Stored bits of a number in a page, all layers together, scales and zeros included."""
        c = self.model.config
        specs = kv.resolve(c.num_hidden_layers)
        return sum(32.0 if s is None else self.spec_bits(s, c.head_dim) for s in specs) / len(specs)

    def spec_bits(self, spec: KVSpec, dim: int) -> float:
        """The same of one layer."""
        bits = sum(f.page_bytes for f in page_formats(spec, dim, "layer")) * 8 / (2 * PAGE * dim)
        share = 0 if spec.mixed is None else spec.mixed.low / spec.mixed.pages
        return bits if not share else (1 - share) * bits + share * self.spec_bits(spec.low, dim)

    def add(self, row: dict) -> None:
        base = self.row(NONE)
        if base is not None and "failed" not in row:
            for k in KINDS:
                row[k] |= {f"paired_{n}": v for n, v in paired(Evaluation.from_dict(row[k]), Evaluation.from_dict(base[k])).items()}
        self.record["rows"].append(row | self.elsewhere())
        write_json(self.out, self.record)
        cells = row.get("failed") or "  ".join(f"{k}: ppl {row[k]['perplexity']:.3f} KL {row[k]['kl']:.5f}" for k in KINDS) + f"  {row['nbytes'] / 1e6:.2f} MB"
        self.progress.note(f"{row['name']:32} {cells}")

    def elsewhere(self) -> dict:
        """The machine, for a row that the file's own did not make."""
        return {"machine": self.here} if any(self.here[n] != self.record["machine"][n] for n in ("cpu", "system", "torch")) else {}

    def speed(self, wanted: list[str], contexts: list[int], rounds: int, seconds: float) -> None:
        """Milliseconds of one step of the whole model, in turns."""
        replace_attention(self.model, None)
        plan = Plan(default="w4g64", quantizer={"name": "rtn"})
        plain = replace_linear(self.model, plan, progress=self.progress)
        packed = replace_attention(copy.deepcopy(plain), find_kv("k4v4"))
        vocabulary = plain.config.vocab_size
        self.record["speed"] = [r for r in self.record["speed"] if r["context"] not in contexts]
        for n in contexts:
            prompt = torch.randint(0, vocabulary, (1, n), generator=torch.Generator().manual_seed(n))
            calls = {}
            for name in [NONE, *wanted]:
                if name in PEERS and (self.row(name) or {}).get("failed"):
                    continue
                calls[name] = self.step(packed if name not in PEERS and name != NONE else plain, name, prompt)
            times = in_turns(calls, rounds, seconds)
            base = times[NONE]
            self.record["speed"] += [{"name": name, "ours": name not in PEERS, "context": n, "threads": torch.get_num_threads(), "ms": t.minimum * 1e3,
                                      "ms_median": t.median * 1e3, "more_ms": (t.minimum - base.minimum) * 1e3} | self.elsewhere() for name, t in times.items()]
            write_json(self.out, self.record)
            for name, t in times.items():
                self.progress.note(f"{n:6} tokens  {name:32} {t.minimum * 1e3:.2f} ms ({t.median * 1e3:.2f})")

    @staticmethod
    def step(model, name: str, prompt: torch.Tensor) -> Callable[[int], object]:
        """Reads the prompt in pieces of 64, the last token excepted, and returns what reads one token more."""
        decoder = Decoder(model)
        if name in PEERS:
            decoder.cache = peer_cache(model.config, name)
        elif name != NONE:
            decoder.cache = MxqCache(model.config, find_kv(name))
        for piece in prompt[:, :-1].split(64, dim=1):
            decoder.step(piece)
        return lambda i: decoder.step(prompt[:, -1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", default="bench/results/kv-quality.json")
    parser.add_argument("--part", choices=["quality", "speed"], default="quality")
    parser.add_argument("--only", help="rows to measure, separated by ';': ours, literature, peers, specs, presets, plans' files, or names of peers")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--contexts", default="1024,4096", help="of speed")
    parser.add_argument("--threads", type=int, help="of speed; torch's default without it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.1)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sets = {"ours": OURS, "literature": LITERATURE, "peers": tuple(PEERS)}
    wanted = list(dict.fromkeys(name for asked in (options.only.split(";") if options.only else sets) for name in sets.get(asked, (asked,))))
    with Progress() as progress, torch.no_grad():  # and not inference mode: policies differentiate the model
        bench = Bench(Path(options.out), options.length, options.windows, progress)
        bench.record["peers"] = {n: version(n) for n in ("transformers", "optimum-quanto", "hqq")} if any(w in PEERS for w in wanted) \
            else bench.record.get("peers", {})
        if options.part == "quality":
            bench.quality(wanted)
        else:
            with torch.inference_mode():
                bench.speed(wanted, [int(n) for n in options.contexts.split(",")], options.rounds, options.seconds)


if __name__ == "__main__":
    try:
        main()
    except MxqError as error:
        raise SystemExit(f"bench: {error}") from None
