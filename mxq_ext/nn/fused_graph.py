"""Launches that are the same from call to call, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import env

#: Calls in a row that launch the kernels themselves before they are captured. To capture takes longer than a few tokens save, and waits for the device: a
#: search over beams, which moves the cache at each token, is never captured.
STEADY = 8


class Repeated:
    """A function ``launch(stream)`` that only launches kernels, and says the same at each call until :meth:`moved` is called: after :data:`STEADY` calls one
    graph of all its launches takes its place. What the kernels read and write must live as long as this object; ``MXQ_CUDA_GRAPH=0`` keeps to launches.

    Attributes:
        graph: what is replayed, or None.
    """

    def __init__(self, launch: Callable[[int], None]):
        self._launch, self._calls = launch, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def moved(self) -> None:
        """The next call launches something else."""
        self.graph, self._calls = None, 0

    def __call__(self, stream: int) -> None:
        """Once, on the current stream, whose address is ``stream``."""
        if self.graph is None and (self._calls < STEADY or env.get("MXQ_CUDA_GRAPH") == "0"):
            self._launch(stream)
            self._calls += 1
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # what other threads do meanwhile is none of its business
                self._launch(torch.cuda.current_stream().cuda_stream)
            self.graph = graph
        self.graph.replay()
