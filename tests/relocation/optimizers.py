"""Optimizers as people write them, in miniature: some mix experts, some hold other optimizers, some keep copies."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

Closure = Callable[[], Any] | None


class StableAdamW(Optimizer):
    """Lowers the step by the root mean square of gradient over its expected size: one number for all experts."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), step=0)
                state["step"] += 1
                share = 0.05 / (1 - 0.95 ** state["step"])
                state["m"].lerp_(p.grad, 0.1)
                state["v"].lerp_(p.grad.square(), share)
                rms = (p.grad.square() / state["v"].clamp_min(1e-16)).mean().sqrt()
                p.addcdiv_(state["m"], state["v"].sqrt() + 1e-8, value=-group["lr"] / max(1.0, float(rms)))
        return loss


class CAME(StableAdamW):
    """Divides the update by its own root mean square over all experts before it is averaged."""

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(m=torch.zeros_like(p), row=torch.zeros_like(p).mean(-1, keepdim=True))
                state["row"].lerp_(p.grad.square().mean(-1, keepdim=True), 0.1)
                update = p.grad * state["row"].clamp_min(1e-30).rsqrt()
                update /= update.square().mean().sqrt().clamp_min(1.0)
                state["m"].lerp_(update, 0.1)
                p.sub_(state["m"], alpha=group["lr"])
        return loss


class SwitchesLater(SGD):
    """Keeps an estimate over all experts, and steps by it only from its 100th step on, as SWATS does."""

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for p, state in self.state.items():
            norm = p.grad.norm() if p.grad is not None else torch.zeros(())
            state["estimate"] = state.get("estimate", torch.zeros(()).double()).lerp(norm.double(), 0.1)
        return loss


class Composite(Optimizer):
    """One class for two optimizers: matrices by one, all else by the other; its own state stays empty."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-2) -> None:
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.inner = {
            "matrices": [AdamW([p for p in params if p.ndim > 1], lr=lr)],
            "rest": [SGD([p for p in params if p.ndim < 2], lr=lr, momentum=0.9)],
        }

    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for optimizers in self.inner.values():
            optimizers[0].step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizers[0].state_dict() for name, optimizers in self.inner.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, optimizers in self.inner.items():
            optimizers[0].load_state_dict(state_dict[name])


class Lookahead(Optimizer):
    """Slow weights in its own state, in a state dict of its own form, around another optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups
        for p in self.parameters():
            self.state[p]["slow"] = p.detach().clone()
        self.count = 0

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        loss = self.optimizer.step(closure)  # type: ignore[arg-type]
        self.count += 1
        if self.count % 3 == 0:
            for p in self.parameters():
                self.state[p]["slow"].lerp_(p, 0.5)
                p.copy_(self.state[p]["slow"])
        return loss

    def state_dict(self) -> dict[str, Any]:
        slow = {str(i): self.state[p]["slow"] for i, p in enumerate(self.parameters())}
        return {"slow": slow, "count": self.count, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups = self.optimizer.param_groups
        self.count = state_dict["count"]
        for i, p in enumerate(self.parameters()):
            self.state[p]["slow"] = state_dict["slow"][str(i)].clone()


class AggregatedMomentum(Optimizer):
    """Several momenta in a dictionary, and the latest gradients in a list."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momenta = state.setdefault("momenta", {})
                for beta in (0.5, 0.9):
                    buffer = momenta.setdefault(beta, torch.zeros_like(p))
                    buffer.mul_(beta).add_(p.grad)
                    p.sub_(buffer, alpha=group["lr"] / 3)
                state["latest"] = [*state.get("latest", []), p.grad.clone()][-2:]
                p.sub_(state["latest"][0], alpha=group["lr"] / 3)
        return loss


class AveragesWeights(Optimizer):
    """As NeMo's EMAOptimizer: around another optimizer, with a tuple of averages that are made in the first step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.averages: tuple[Tensor, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not self.averages:
            self.averages = tuple(p.detach().clone() for p in parameters)
        loss = self.optimizer.step(closure)  # type: ignore[arg-type]
        for average, p in zip(self.averages, parameters, strict=True):
            average.lerp_(p.detach(), 0.1)
        return loss


class FlatMomentum(Optimizer):
    """Momentum of all parameters in one vector: its state is empty."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})
        self.momentum: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradient = torch.cat([p.grad.flatten() for p in parameters])
        self.momentum = gradient if self.momentum is None else 0.9 * self.momentum + gradient
        for p, part in zip(parameters, self.momentum.split([p.numel() for p in parameters]), strict=True):
            p.sub_(part.view_as(p), alpha=self.defaults["lr"])
        return loss


class UpdatesCopies(Optimizer):
    """Updates copies in float32 and writes them back, as optimizers for half precision did."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.defaults, self.state = optimizer.defaults, optimizer.state
        self.originals = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            group["params"] = [nn.Parameter(p.detach().clone().float()) for p in group["params"]]
        self.param_groups = optimizer.param_groups


class NormalizedByMatrix(Optimizer):
    """As Muon, for each expert's matrix by itself, and in bfloat16."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                x = p.grad.bfloat16()
                if p.ndim > 1:
                    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                    for _ in range(5):
                        a = x @ x.mT
                        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                p.add_(x.to(p.dtype), alpha=-group["lr"])
        return loss
