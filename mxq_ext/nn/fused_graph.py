"""Launches that are the same from call to call, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import env

#: Calls in a row that launch the kernels themselves before they are captured. To capture takes longer than a few tokens save, and waits for the device: a
#: search over beams, which moves the cache at each token, is never captured.
STEADY = 8


class Repeated:
    """Calls of a function that only launches kernels, the same ones until :meth:`moved` is called: after :data:`STEADY` calls one graph of all launches takes
    its place. What the kernels read and write must live as long as this object; ``MXQ_CUDA_GRAPH=0`` keeps to launches.

    Attributes:
        graph: what is replayed, or None.
    """

    def __init__(self):
        self._calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def moved(self) -> None:
        """The next call launches something else."""
        self.graph, self._calls = None, 0

    def __call__(self, launch: Callable[[int], None], stream: int) -> None:
        """``launch(stream)`` once, on the current stream of the current device, whose address is ``stream``."""
        if self.graph is None and (self._calls < STEADY or env.get("MXQ_CUDA_GRAPH") == "0"):
            launch(stream)
            self._calls += 1
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            # A stream of this device: torch's own is one of the first device that captured. What other threads do meanwhile is none of its business.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                launch(torch.cuda.current_stream().cuda_stream)
            self.graph = graph
        self.graph.replay()
