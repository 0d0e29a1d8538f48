"""Fast, plain training: float32 masters of bf16 weights, Muon for matrices, one CUDA graph a step.

At toy size a step is a few thousand tiny kernels, so eager Python costs more than the arithmetic. A captured step
replays without Python. Muon (an orthogonalized momentum step) moves matrices and convolutions about twice as far a step
as AdamW does here. Vectors, embeddings and the first and last layers stay with AdamW.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

Round = Callable[[Tensor], Tensor]
QUICK = 20


class Masters:
    """bf16 `parameters` with their float32 masters. Call `step` after a backward pass, captured or not.

    `rate` 0..1 scales all learning rates and is a tensor, so that a captured step sees it change. `vectors` take
    AdamW's steps, `quick` ones of them `QUICK` times as far. `rounded` (NF4 weights) go through `rounding` on their
    way into the model: straight-through quantization-aware training.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, muon_lr: float, vectors: Iterable[nn.Parameter] = (),
        quick: Iterable[nn.Parameter] = (), rounded: Iterable[nn.Parameter] = (), rounding: Round | None = None,
    ) -> None:  # fmt: skip
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.average = [m.clone() for m in self.masters]
        device = self.masters[0].device
        self.rate = torch.zeros((), device=device)
        self.lr, self.muon_lr = lr, muon_lr
        plain = {id(p) for p in vectors}
        shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, p in enumerate(self.parameters):
            if p.ndim > 1 and id(p) not in plain:
                shapes[p.shape[0], p.numel() // p.shape[0]].append(i)
        self.groups = list(shapes.values())
        self.momenta = [torch.zeros_like(self._stack(g, self.masters)) for g in self.groups]
        chosen = {i for g in self.groups for i in g}
        self.rest = [i for i in range(len(self.masters)) if i not in chosen]
        self.adam_lrs = [torch.zeros((), device=device) for _ in range(2)]
        for i in self.rest:
            self.masters[i].grad = torch.zeros_like(self.masters[i])
        on_gpu = device.type == "cuda"
        swift = {id(p) for p in quick}
        kinds = [
            [self.masters[i] for i in self.rest if (id(self.parameters[i]) in swift) == kind] for kind in (False, True)
        ]
        self.adamw = torch.optim.AdamW(
            [{"params": some, "lr": lr} for some, lr in zip(kinds, self.adam_lrs, strict=True) if some],
            betas=(0.9, 0.99),
            weight_decay=0.0,
            capturable=on_gpu,
            foreach=on_gpu,
        )
        nf4 = {id(p) for p in rounded}
        self.rounded = [i for i, p in enumerate(self.parameters) if id(p) in nf4]
        self.rounding = rounding
        self.show()

    @staticmethod
    def _stack(indices: list[int], tensors: list[Tensor]) -> Tensor:
        return torch.stack([tensors[i].flatten(1) for i in indices])

    def forget(self) -> None:
        """Drop gradients. Call it before each backward pass."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Make one step at the current `rate`, and copy the new weights into the model."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for indices, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = self._stack(indices, gradients).float()
            momentum.lerp_(gradient, 0.05)
            update = orthogonal(torch.lerp(gradient, momentum, 0.95))
            rows, columns = update.shape[1:]
            update = update * (self.rate * self.muon_lr * max(1.0, rows / columns) ** 0.5)
            for i, u in zip(indices, update, strict=True):
                self.masters[i].sub_(u.view_as(self.masters[i]))
        torch._foreach_copy_([self.masters[i].grad for i in self.rest], [gradients[i] for i in self.rest])
        for adam_lr, times in zip(self.adam_lrs, (1, QUICK), strict=True):
            adam_lr.copy_(self.rate * self.lr * times)
        self.adamw.step()
        torch._foreach_lerp_(self.average, self.masters, 0.005)
        self.show()

    @torch.no_grad()
    def show(self, average: bool = False, rounded: bool = True) -> None:
        """Put the masters (or their average) into the model, rounded as served or not."""
        source = list(self.average if average else self.masters)
        if self.rounded and rounded and self.rounding is not None:
            flat = self.rounding(torch.cat([source[i].flatten() for i in self.rounded]))
            pieces = flat.split([source[i].numel() for i in self.rounded])
            for i, piece in zip(self.rounded, pieces, strict=True):
                source[i] = piece.view_as(source[i])
        torch._foreach_copy_(self.parameters, source)

    def schedule(self, progress: float, step: int) -> None:
        """Warm up over 100 steps, hold, and fall to zero over the last six tenths."""
        self.rate.fill_(min(1.0, (step + 1) / 100) * min(1.0, max(0.0, 1 - progress) / 0.6))


def orthogonal(g: Tensor) -> Tensor:
    """The orthogonal matrix nearest to each `g` [n, rows, columns], about: Newton and Schulz, five times in bf16."""
    x = g.to(torch.bfloat16)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


class Captured:
    """`work()` -> loss, replayed from a CUDA graph after three eager runs. Eager on the CPU, or where capture fails."""

    def __init__(self, work: Callable[[], Tensor], name: str) -> None:
        self.work, self.name, self.runs = work, name, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager = not torch.cuda.is_available()

    def __call__(self) -> Tensor:
        if self.graph is not None:
            self.graph.replay()
            return self.loss
        self.runs += 1
        if self.eager:
            return self.work()
        if self.runs <= 3:
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                loss = self.work()
            torch.cuda.synchronize()
            return loss
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.loss = self.work()
        except RuntimeError as error:
            print(f"{self.name}: not captured, eager from here ({str(error).splitlines()[0]})", flush=True)
            torch.cuda.synchronize()
            self.eager = True
            return self.work()
        self.graph = graph
        graph.replay()
        return self.loss


def ticks(name: str, seconds: float, limit: int | None) -> Iterator[tuple[int, float, Callable[[Tensor], None]]]:
    """Steps until the time (or the step limit) is up, with progress in 0..1 and a reporter of the loss."""
    start = shown = time.monotonic()
    shown_step = step = 0
    losses: list[Tensor] = []
    while True:
        if step % 10 == 0 and losses:
            losses[-1].cpu()  # wait: else the clock would not see work that is still queued
        now = time.monotonic()
        progress = (now - start) / seconds if limit is None else step / limit
        if now - shown > 10 or progress >= 1:
            loss = " ".join(f"{v:.4f}" for v in torch.stack(losses).mean(0).flatten().tolist()) if losses else "none"
            rate = (step - shown_step) / max(now - shown, 1e-9)
            left = max(0.0, seconds - now + start)
            print(f"{name:8s} step {step:6d}  loss {loss}  {rate:.1f} steps/s  ETA {left:.0f} s", flush=True)
            shown, shown_step = now, step
            losses.clear()
        if progress >= 1:
            return
        yield step, progress, lambda loss: losses.append(loss.detach().float().clone())
        step += 1
