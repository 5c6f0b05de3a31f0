"""What every stage shares: where things lie, one training loop with checkpoints, EMA and a clock.

A stage trains for a number of minutes, writes a checkpoint every ten and at least four in all, and goes on from the last one when it
is started again. The learning rate warms up,
stays, and falls linearly to a tenth over the last quarter of the minutes given, so that a run of any length ends tidily.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flux2_local.hardware import has_fast_bfloat16

MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}
"""A checkpoint's names for what an optimizer remembers of a parameter."""

INNER = re.compile(r"(blocks|layers)\.\d+\.|teller|^\d+\.")
"""Names of what lies inside a network. Embedders and modulations see few directions at a time, and steps that are made
orthogonal would follow the noise in all the others."""


@dataclass(frozen=True)
class Run:
    """Settings that every stage gets.

    Attributes:
        work: folder for data, checkpoints and samples.
        minutes: how long this call may train.
        device: "cpu" or "cuda".
        compile: use torch.compile for the training step.
        seed: of the autoencoder's crops; what other stages draw is always the same, or never twice.
        out: folder that the export stage writes.
        share: of the transformer's pictures and paths that the recipe draws; below 1 where time is short.
    """

    work: Path
    minutes: float
    device: str = "cpu"
    compile: bool = True
    seed: int = 0
    out: Path = Path("flux2_local/tiny")
    share: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return fast_dtype(self.device)

    def path(self, name: str) -> Path:
        self.work.mkdir(parents=True, exist_ok=True)
        return self.work / name

    def compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``function``, compiled if that is asked for: on a CPU for each shape that it gets, which is faster there, and on a card
        for any shape after the first, a few times in all, since it would compile for longer than it trains."""
        return torch.compile(function, dynamic=None if self.device == "cuda" else False) if self.compile else function


def fast_dtype(device: str) -> torch.dtype:
    """bf16, but for a CPU that has no instructions for it: there it takes nine times as long as float32."""
    return torch.bfloat16 if device == "cuda" or has_fast_bfloat16() else torch.float32


def mixed(device: str) -> torch.autocast:
    """Context manager: matrix products and convolutions compute in :func:`fast_dtype`."""
    return torch.autocast(device, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16)


def save_state(path: Path, state: dict[str, Tensor], facts: dict[str, float]) -> None:
    """Write tensors and a few numbers to a safetensors file, whole or not at all."""
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in state.items()}, part, {"facts": json.dumps(facts)})
    part.replace(path)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Read what :func:`save_state` wrote."""
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["facts"])  # noqa: SIM118


def load_ema(path: Path, model: nn.Module) -> dict[str, float]:
    """Load the averaged weights that a checkpoint holds into ``model``; returns the checkpoint's facts."""
    state, facts = load_state(path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f"ema.{name}" in state:
                p.copy_(state[f"ema.{name}"])
    return facts


def orthogonal(x: Tensor) -> Tensor:
    """Matrices [B, R, C] with about the same singular vectors, and singular values near one (five Newton-Schulz steps; they are taken
    on the small matrix of inner products, and their product is applied to ``x`` once)."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    inner = x @ x.mT
    one = torch.eye(x.shape[1], device=x.device)
    turn = one
    for _ in range(5):
        step = 3.4445 * one - 4.7750 * inner + 2.0315 * inner @ inner
        turn, inner = step @ turn, step @ inner @ step
    x = turn @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al., "Muon", 2024; steps scaled to AdamW's size after
    arXiv:2502.16982). As torch.optim.Muon, but for convolutions too, and with
    matrices of one shape handled together.

    Args:
        params: of two dimensions or more; the first one counts as rows, all others as columns.
        lr: learning rate, on AdamW's scale.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.flatten(1).shape, []).append(p)
            for (rows, columns), params in shapes.items():
                momenta = [self.state[p].setdefault("exp_avg", torch.zeros_like(p)) for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
                updates = orthogonal(torch.stack([u.flatten(1) for u in ahead])).mul_(0.2 * max(rows, columns) ** 0.5)
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).sub_(update.view_as(p), alpha=group["lr"])


class Trainer:
    """Trains the trainable parameters of ``model``, with an exponential moving average of the weights.

    Args:
        run: the run's settings.
        name: of the checkpoint file, ``<work>/<name>.safetensors``; found there, training goes on from it.
        model: its parameters with ``requires_grad`` are trained, averaged and saved.
        lr: peak learning rate of AdamW.
        muon: peak learning rate of :class:`Muon` for the matrices of blocks and layers; None: AdamW for all.
        ema: decay of the average per step, once warmed up.

    Raises:
        ValueError: the checkpoint that is there is of parameters of other shapes.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        model: nn.Module,
        lr: float,
        muon: float | None = None,
        ema: float = 0.9995,
        decay: float = 0.01,
    ) -> None:
        self.run, self.name, self.model, self.ema = run, name, model, ema
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone() for n, p in self.params.items()}
        inner = [p for n, p in self.params.items() if muon and INNER.search(n) and p.ndim > 1 and len(p) > 1]
        chosen = {id(p) for p in inner}
        outer = [p for p in self.params.values() if id(p) not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.99), weight_decay=decay)
        ]
        if muon:
            self.optimizers.append(Muon(inner, muon, decay=decay))
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.step = 0
        self.seen = 0
        self.path = run.path(f"{name}.safetensors")
        if self.path.exists():
            self.resume()
        self.start = self.saved = self.told = time.monotonic()

    def resume(self) -> None:
        state, facts = load_state(self.path)
        self.step, self.seen = int(facts["step"]), int(facts["seen"])
        for n, p in self.params.items():
            if (there := state.get(f"model.{n}", p).shape) != p.shape:
                raise ValueError(
                    f"{self.path}: {n} is {list(there)} and has become {list(p.shape)} since. Delete it to begin anew."
                )
        with torch.no_grad():
            for n, p in self.params.items():
                if f"model.{n}" not in state:  # added since
                    continue
                p.copy_(state[f"model.{n}"])
                self.average[n].copy_(state[f"ema.{n}"])
                for optimizer in self.optimizers:
                    if all(p is not q for q in optimizer.param_groups[0]["params"]) or f"m.{n}" not in state:
                        continue
                    if isinstance(optimizer, Muon):
                        optimizer.state[p] = {"exp_avg": state[f"m.{n}"].to(p.device)}
                    elif f"v.{n}" in state:
                        optimizer.state[p] = {
                            "step": torch.tensor(float(self.step)),
                            "exp_avg": state[f"m.{n}"].to(p.device),
                            "exp_avg_sq": state[f"v.{n}"].to(p.device),
                        }
        print(f"{self.name}: going on from step {self.step}", flush=True)

    def save(self) -> None:
        state = {f"model.{n}": p.detach() for n, p in self.params.items()}
        state |= {f"ema.{n}": p for n, p in self.average.items()}
        for n, p in self.params.items():
            for optimizer in self.optimizers:
                moments = optimizer.state.get(p, {})
                state |= {f"{k}.{n}": moments[v] for k, v in MOMENTS.items() if v in moments}
        save_state(self.path, state, {"step": self.step, "seen": self.seen})
        self.saved = time.monotonic()

    def progress(self) -> float:
        """The share of the minutes given that has passed."""
        return (time.monotonic() - self.start) / (self.run.minutes * 60)

    def fit(
        self,
        batches: Iterator[tuple[Tensor, ...]],
        loss_of: Callable[..., Tensor],
        every: Callable[[int], None] | None = None,
    ) -> None:
        """Train until the minutes are over.

        Args:
            batches: endless; each item's tensors are the arguments of ``loss_of``, the first one's length is counted.
            loss_of: batch -> scalar loss.
            every: called after each checkpoint with the step's number (to print figures or write samples).
        """
        step_loss = self.run.compiled(loss_of)
        first, running = self.step, None
        rate_seen, rate_time = self.seen, time.monotonic()
        while (share := self.progress()) < 1:
            batch = next(batches)
            warm = min(1.0, (self.step + 1) / 100, (self.step - first + 1) / 50)
            scale = warm * min(1.0, max(0.1, (1 - share) * 4))
            for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * scale
            loss = step_loss(*batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if self.step == first:  # compiling is not training
                self.start = self.saved = self.told = time.monotonic()
            self.step += 1
            self.seen += len(batch[0])
            self.update_average()
            value = loss.detach()  # read only where it is told: reading waits for the card
            running = value if running is None else running.lerp(value, 0.02)
            now = time.monotonic()
            if now - self.told > 30:
                rate = (self.seen - rate_seen) / (now - rate_time)
                print(
                    f"{self.name}: step {self.step} seen {self.seen} loss {running:.5f} lr x{scale:.2f} {rate:.1f}/s {share:.0%}",
                    flush=True,
                )
                self.told, rate_seen, rate_time = now, self.seen, now
            if now - self.saved > min(600, 15 * self.run.minutes):
                self.save()
                if every:
                    every(self.step)
        self.save()
        if every:
            every(self.step)

    @torch.no_grad()
    def update_average(self) -> None:
        beta = min(self.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.params.values()], 1 - beta)


class averaged:
    """Context manager: the model's weights are the averaged ones inside."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *_: object) -> None:
        self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for n, p in self.trainer.params.items():
            kept = p.detach().clone()
            p.copy_(self.trainer.average[n])
            self.trainer.average[n].copy_(kept)
