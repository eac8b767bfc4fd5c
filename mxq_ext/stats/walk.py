"""Walking a decoder-only transformer block by block, forwards and backwards.

Nothing here knows an architecture. Three observations of the model's own forward are enough:

- *calls*: with which extra arguments it calls each block (masks, rotary tables); they depend on the window length only, so one
  window shows them (``capture_calls``);
- *chain*: the output of a block is the input of the next (checked by ``capture_calls``, otherwise the model is refused);
- *tail*: what follows the last block (final norm, head, soft caps) is the model's forward with all blocks replaced by stubs
  (``tail``). It acts on each position alone, so long windows can be cut into slices.

All walks run one window per block call: 512 positions fill the matrix multiplies, and memory stays at one window's activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import ModelError, ShapeError
from ..progress import SILENT, Progress
from ..structure import decoder_blocks, find_units

#: Positions whose logits are held at a time: 128 x 49152 float32 are 25 MB.
SLICE = 128


@dataclass
class Calls:
    """How a model calls its blocks on windows of ``length`` tokens.

    Attributes:
        args: per block, the positional arguments after the hidden states.
        kwargs: per block, the keyword arguments.
        tuples: whether blocks return tuples whose first item is the hidden states (older architectures).
        length: window length that the arguments were made for.
    """

    args: list[tuple] = field(default_factory=list)
    kwargs: list[dict] = field(default_factory=list)
    tuples: bool = False
    length: int = 0


@dataclass
class BlockInputs:
    """What enters each block: ``hidden[i]`` is [W, T, H], the input of block i; ``hidden[-1]`` is the output of the last block."""

    hidden: list[torch.Tensor]
    kwargs: Calls


class _Stop(Exception):
    """Leaves a model's forward as soon as what was wanted has been seen."""


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode and with no parameter requiring a gradient (backward walks then pay for input gradients only)."""
    modes = [(m, m.training) for m in model.modules()]
    grads = [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield model
    finally:
        for m, training in modes:
            m.training = training
        for p, requires_grad in grads:
            p.requires_grad_(requires_grad)


@contextlib.contextmanager
def hooked(handles: list) -> Iterator[None]:
    """Removes the given hook handles at the end, whatever happens."""
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def check_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Returns ``tokens`` if it is a non-empty integer [W, T] tensor with T >= 2, else raises ShapeError."""
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32) or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ShapeError(f"tokens {list(tokens.shape)} {tokens.dtype}", "windows must be integers [W, T] with W >= 1 and T >= 2",
                         "cut the text with mxq_ext.text.windows()")
    return tokens


def _first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _hidden_of(args: tuple, kwargs: dict) -> tuple[torch.Tensor, tuple, dict]:
    """(hidden states, other positional arguments, other keyword arguments) of a block call."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _same(a, b) -> bool:
    """Whether two recorded arguments are equal, tensors by value, in nested tuples, lists and dicts."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or type(a) is type(b) and not callable(a) and (a == b) is True


@torch.no_grad()
def capture_calls(model: nn.Module, tokens: torch.Tensor) -> Calls:
    """Watches one forward over the first window of ``tokens`` [W, T] and returns the ``Calls`` for windows of that length.

    Raises ModelError if blocks do not form a chain, or if their arguments depend on the text (per-token side inputs): such a
    model cannot be walked block by block with these tools.
    """
    check_tokens(tokens)
    _, blocks = decoder_blocks(model)
    seen = Calls(length=tokens.shape[1])
    chained: list[torch.Tensor] = []

    def before(block, args, kwargs):
        hidden, args, kwargs = _hidden_of(args, kwargs)
        if len(chained) == len(seen.args) and chained and chained[-1] is not hidden and not torch.equal(chained[-1], hidden):
            raise ModelError(f"model {type(model).__name__}", f"block {len(seen.args)} does not take the output of the one before",
                             "only models whose blocks form a chain can be walked")
        seen.args.append(args)
        seen.kwargs.append(kwargs)

    def after(block, args, output):
        seen.tuples = isinstance(output, tuple)
        chained[:] = [_first(output)]

    def compare(block, args, kwargs):
        _, args, kwargs = _hidden_of(args, kwargs)
        if not _same((args, kwargs), (seen.args[0], seen.kwargs[0])):
            raise ModelError(f"model {type(model).__name__}", "its blocks take side inputs that depend on the text",
                             "only models whose blocks see the text through the hidden states can be walked")
        raise _Stop

    with frozen(model):
        handles = [h for b in blocks for h in (b.register_forward_pre_hook(before, with_kwargs=True), b.register_forward_hook(after))]
        with hooked(handles):
            model(tokens[:1], use_cache=False)
        if len(seen.args) != len(blocks):
            raise ModelError(f"model {type(model).__name__}", f"its forward called {len(seen.args)} of {len(blocks)} blocks",
                             "only models that call every block once can be walked")
        # A second, different window must lead to the same arguments.
        with hooked([blocks[0].register_forward_pre_hook(compare, with_kwargs=True)]), contextlib.suppress(_Stop):
            model(tokens[:1].roll(1, dims=1).flip(1), use_cache=False)
    return seen


def run_block(block: nn.Module, index: int, hidden: torch.Tensor, calls: Calls) -> torch.Tensor:
    """Output [1, T, H] of block ``index`` on one window [1, T, H]. Differentiable; the caller freezes the model if it should be."""
    return _first(block(hidden, *calls.args[index], **calls.kwargs[index]))


@torch.no_grad()
def embed(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states [W, T, H] at the input of the first block."""
    _, blocks = decoder_blocks(model)
    found = []

    def stop(block, args, kwargs):
        found.append(_hidden_of(args, kwargs)[0])
        raise _Stop

    with frozen(model), hooked([blocks[0].register_forward_pre_hook(stop, with_kwargs=True)]), contextlib.suppress(_Stop):
        model(check_tokens(tokens), use_cache=False)
    return found[0]


@torch.no_grad()
def final_hidden(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Output [W, T, H] of the last block, before the final norm; the model's own forward, stopped there."""
    _, blocks = decoder_blocks(model)
    found = []

    def stop(block, args, output):
        found.append(_first(output))
        raise _Stop

    with frozen(model), hooked([blocks[-1].register_forward_hook(stop)]), contextlib.suppress(_Stop):
        model(check_tokens(tokens), use_cache=False)
    return found[0]


def tail(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [B, t, V] from the last block's output ``hidden`` [B, t, H]: final norm, head, and whatever else the model does there.

    Any slice of positions may be given. Differentiable in ``hidden``.
    """
    _, blocks = decoder_blocks(model)

    tuples = _returns_tuples(model, blocks)

    def stub(replacement: torch.Tensor | None):
        def forward(*args, **kwargs):
            value = _hidden_of(args, kwargs)[0] if replacement is None else replacement
            return (value,) if tuples else value

        return forward

    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    saved = [b.__dict__.get("forward") for b in blocks]
    try:
        for b in blocks:
            b.forward = stub(hidden if b is blocks[-1] else None)
        return model(ids, use_cache=False).logits
    finally:
        for b, old in zip(blocks, saved, strict=True):
            if old is None:
                del b.forward
            else:
                b.forward = old


def _returns_tuples(model: nn.Module, blocks: nn.ModuleList) -> bool:
    """Whether the blocks return tuples; asked of the model once by running its first block on two tokens, then remembered."""
    known = model.__dict__.get("_mxq_block_tuples")
    if known is None:
        found = []

        def stop(block, args, output):
            found.append(isinstance(output, tuple))
            raise _Stop

        with torch.no_grad(), hooked([blocks[0].register_forward_hook(stop)]), contextlib.suppress(_Stop):
            model(torch.zeros(1, 2, dtype=torch.int64, device=next(blocks.parameters(), torch.empty(0)).device), use_cache=False)
        known = model.__dict__["_mxq_block_tuples"] = found[0]
    return known


@torch.no_grad()
def capture_block_inputs(model: nn.Module, tokens: torch.Tensor) -> BlockInputs:
    """Hidden states at the input of every block (and after the last) for windows ``tokens`` [W, T].

    Memory: (blocks + 1) * W * T * H floats. Raises ModelError as ``capture_calls`` does.
    """
    calls = capture_calls(model, tokens)
    _, blocks = decoder_blocks(model)
    hidden = [torch.cat([embed(model, t[None]) for t in tokens])]
    with frozen(model):
        for i, block in enumerate(blocks):
            hidden.append(torch.cat([run_block(block, i, h[None], calls) for h in hidden[-1]]))
    return BlockInputs(hidden, calls)


@torch.no_grad()
def run_from(model: nn.Module, block_index: int, hidden: torch.Tensor, kwargs: Calls, logits: bool = True) -> torch.Tensor:
    """Runs blocks ``block_index`` and later on ``hidden`` [W, T, H], one window at a time.

    Args:
        block_index: 0 .. number of blocks; the latter runs the tail alone.
        kwargs: the ``BlockInputs.kwargs`` of windows of the same length.
        logits: return logits [W, T, V] (W * T * V floats!), else the last block's output [W, T, H]; hand that to ``tail`` by slices.
    """
    _, blocks = decoder_blocks(model)
    if not 0 <= block_index <= len(blocks):
        raise ShapeError(f"run_from block {block_index}", f"the model has {len(blocks)} blocks", f"use 0 .. {len(blocks)}")
    if hidden.dim() != 3 or hidden.shape[1] != kwargs.length:
        raise ShapeError(f"hidden states {list(hidden.shape)}", f"the block arguments were captured for [W, {kwargs.length}, H]",
                         "capture them again for windows of this length")
    out = []
    with frozen(model):
        for h in hidden.split(1):
            for i in range(block_index, len(blocks)):
                h = run_block(blocks[i], i, h, kwargs)
            out.append(torch.cat([tail(model, s) for s in h.split(SLICE, dim=1)], dim=1) if logits else h)
    return torch.cat(out)


# Backwards ------------------------------------------------------------------------------------------------------------------------


def linears_of(model: nn.Module) -> tuple[list[dict[str, nn.Linear]], str, nn.Linear]:
    """(per block: unit name -> linear; the head's unit name; the head).

    A tied head goes by its embedding's name. Raises ModelError if a unit inside a block is already quantized, or if there is no head.
    """
    _, blocks = decoder_blocks(model)
    modules = dict(model.named_modules())
    per_block: list[dict[str, nn.Linear]] = [{} for _ in blocks]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_name = None
    for unit in find_units(model):
        if unit.layer >= 0 and unit.kind == "linear":
            if not isinstance(modules[unit.name], nn.Linear):
                raise ModelError(f"unit {unit.name}", "it is already quantized", "calibrate the floating-point model")
            per_block[unit.layer][unit.name] = modules[unit.name]
        if head is not None and any(modules[n] is head for n in (unit.name, *unit.tied)):
            head_name = unit.name
    if head_name is None or not isinstance(head, nn.Linear):
        raise ModelError(f"model {type(model).__name__}", "it has no linear output head",
                         "load it as a causal language model (AutoModelForCausalLM)")
    return per_block, head_name, head


class Recorder:
    """Forward hooks that keep the input and the output of each named linear for one block call.

    >>> with Recorder(linears) as seen:
    ...     run_block(...)
    >>> x, y = seen["model.layers.0.mlp.up_proj"]      # [T, K] and the output as the model made it
    """

    def __init__(self, linears: dict[str, nn.Linear]):
        self.linears = linears
        self.seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __enter__(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        self.seen = {}
        self._handles = [m.register_forward_hook(self._hook(name)) for name, m in self.linears.items()]
        return self.seen

    def __exit__(self, *exc) -> None:
        for h in self._handles:
            h.remove()

    def _hook(self, name: str):
        def hook(module, args, output):
            if name in self.seen:
                raise ModelError(f"unit {name}", "it is called twice in one forward", "units that are used twice are not supported")
            self.seen[name] = (args[0], output)

        return hook


def sample_labels(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One label per position from softmax(``logits`` [t, V]) by inverting the cumulative distribution at ``uniform`` [t] in [0, 1)."""
    cumulative = torch.softmax(logits.float(), dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def window_uniform(seed: int, window: int, length: int) -> torch.Tensor:
    """The uniform numbers [T] that draw the labels of one window; independent of how the walk is cut or resumed."""
    return torch.rand(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + window))


def head_backward(model: nn.Module, head: nn.Linear, hidden: torch.Tensor,
                  uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of L = sum_t CE(logits_t, y_t), y_t drawn from the model itself, at the last block's output ``hidden`` [1, T, H].

    Returns (dL/dhidden [1, T, H], head inputs x [T, K], dL/d(head output) g [T, V]). Holds T * V floats for g and SLICE * V at a time else.
    """
    grads, xs, gs = [], [], None
    for start in range(0, hidden.shape[1], SLICE):
        piece = hidden[:, start:start + SLICE].detach().requires_grad_()
        with torch.enable_grad(), Recorder({"head": head}) as seen:
            logits = tail(model, piece)[0].float()
            labels = sample_labels(logits.detach(), uniform[start:start + SLICE].to(logits.device))
            loss = F.cross_entropy(logits, labels, reduction="sum")
            x, y = seen["head"]
            grad, g = torch.autograd.grad(loss, [piece, y])
        gs = g.new_empty(hidden.shape[1], g.shape[-1]) if gs is None else gs
        gs[start:start + SLICE] = g[0]
        grads.append(grad)
        xs.append(x.detach()[0])
    return torch.cat(grads, dim=1), torch.cat(xs), gs


def block_backward(block: nn.Module, index: int, hidden: torch.Tensor, grad: torch.Tensor, calls: Calls,
                   linears: dict[str, nn.Linear]) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Recomputes one block on one window and carries dL/doutput [1, T, H] back.

    Returns (dL/dinput [1, T, H], unit -> (x [t, K], g = dL/dy [t, N])). Units that the window did not reach are absent.
    """
    entry = hidden.detach().requires_grad_()
    with torch.enable_grad(), Recorder(linears) as seen:
        out = run_block(block, index, entry, calls)
        ys = [y for _, y in seen.values()]
        grad_in, *gs = torch.autograd.grad(out, [entry, *ys], grad, materialize_grads=True)
    return grad_in, {name: (x.detach().flatten(0, -2), g.flatten(0, -2)) for (name, (x, _)), g in zip(seen.items(), gs, strict=True)}


def backward_walk(model: nn.Module, tokens: torch.Tensor, callback: Callable[[str, torch.Tensor, torch.Tensor], None], *, seed: int = 0,
                  calls: Calls | None = None, progress: Progress = SILENT) -> None:
    """Shows the gradient of L = sum_t CE(logits_t, y_t), y_t ~ the model, at every linear, for each window of ``tokens`` [W, T].

    ``callback(unit, x [T, K], g [T, N])`` is called once per window and unit, head first, then the blocks from last to first;
    ``g`` is dL/dy of that linear's output. g^T x is the gradient of its weight for this window.
    Memory: the block inputs of one window, one block's graph, and T * V floats for the head's g.
    """
    per_block, head_name, head = linears_of(model)
    _, blocks = decoder_blocks(model)
    calls = calls or capture_calls(model, tokens)
    with frozen(model):
        for w in progress.track(range(tokens.shape[0]), "backward walk"):
            with torch.no_grad():
                hidden = [embed(model, tokens[w:w + 1])]
                for i, block in enumerate(blocks):
                    hidden.append(run_block(block, i, hidden[-1], calls))
            grad, x, g = head_backward(model, head, hidden.pop(), window_uniform(seed, w, tokens.shape[1]))
            callback(head_name, x, g)
            del x, g
            for i in range(len(blocks) - 1, -1, -1):
                grad, seen = block_backward(blocks[i], i, hidden.pop(), grad, calls, per_block[i])
                for name, (x, g) in seen.items():
                    callback(name, x, g)
