"""Measure what EPLBCallback costs where there is nothing to balance.

A Mixtral-like model trains under Lightning's DDP on two gloo processes of one thread each, in three lanes: ``alone``
(``parallelize_experts`` in ``configure_model``, its experts kept out of DDP, no callback), ``control`` (the same once
more) and ``callback`` (the same with ``EPLBCallback``). The routers are exactly even, so no decision moves an expert.

The lanes are interleaved by single steps. Each is one real, uninterrupted ``Trainer.fit``, and a callback in front of
all others holds it at the start of every batch until it is its turn: one step of one lane, then one of the next, in an
order that changes from round to round. A fit is a call that can't be left and entered again without losing the
optimizer's state and paying for its start, so each lane has a thread of its own; but threads are only how a lane is
held. Exactly one of them runs at any time, as coroutines do, on both ranks the same one.

A step is timed from the start of its batch to the start of the next one, so all that Lightning and the callbacks do
for it is in it, and starting the fit is not. Both ranks start it behind a barrier, and it takes as long as the slower
rank does. Steps of one round make a pair, and what disturbs the machine for longer than a step is in both. The median
of the pairs' ratios is sure to half the width of its confidence interval; ``control`` shows what the machine and the
method do to a ratio that is 1. A lane may be lucky in where its tensors lie for as long as its fit lasts (3 % were
seen before the allocator was told to keep its pages), so the full run starts all lanes anew several times.

Decisions fall due five times as often as by default, so that there are many to measure. A median of steps does not
see them. What they take is timed inside the callback and spread over the default interval; the figure held against the
bar is the sum of both: ``median(callback / alone) + decision / (100 * alone)``.
"""

import logging
import os
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eplb import EPLBCallback, parallelize_experts
from lightning_eplb.parallel.parallelize import expert_layers
from tests.benchmarks.held_fit import HeldFit
from tests.benchmarks.report import Bar, finish, parse_arguments, print_table
from tests.fidelity import trainer_for
from tests.workers import Workers

RANKS = 2
LANES = ("alone", "control", "callback")
FITS, ROUNDS = 5, 80
QUICK_FITS, QUICK_ROUNDS = 1, 50
WARM_UP_ROUNDS = 6
STEP_INTERVAL, DEFAULT_STEP_INTERVAL = 20, 100
SEQUENCES, SEQUENCE, VOCABULARY = 4, 64, 256
MOST_SECONDS = 1  # of a step on a busy machine; a run that is slower than this is taken for a deadlock
BAR = 1.02
# One heap for the threads of all lanes, and no page goes back to the system: faults would make steps uneven.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}


class EvenRouter(nn.Module):
    """Scores experts as the router it wraps, and sends the tokens to all of them in turn."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TL, weights_TK, index_TK = self.router(hidden)
        index_TK = (torch.arange(index_TK.numel()) % logits_TL.shape[-1]).view_as(index_TK)
        weights_TK = logits_TL.float().softmax(dim=-1).gather(1, index_TK)
        return logits_TL, weights_TK / weights_TK.sum(dim=-1, keepdim=True), index_TK


class LanguageModel(pl.LightningModule):
    """Made in ``configure_model``, as a model that is too large for one rank would be."""

    def __init__(self, ignores_experts: bool) -> None:
        super().__init__()
        self.ignores_experts = ignores_experts
        self.model: nn.Module | None = None

    def configure_model(self) -> None:
        from transformers import MixtralConfig, MixtralForCausalLM

        if self.model is not None:
            return
        config = MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=SEQUENCE,
            num_local_experts=16,
            num_experts_per_tok=2,
        )
        torch.manual_seed(0)
        self.model = MixtralForCausalLM(config).train()
        for block in [module for module in self.model.modules() if hasattr(module, "gate")]:
            block.gate = EvenRouter(block.gate)
        parallelize_experts(self)
        if self.ignores_experts:
            experts = {id(p) for _, module in expert_layers(self) for p in module.parameters(recurse=False)}
            names = [name for name, parameter in self.named_parameters() if id(parameter) in experts]
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert self.model is not None
        loss = self.model(input_ids=batch[0], labels=batch[0], use_cache=False).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Stopwatch:
    """Time inside methods, in each step; a method's time is without that of watched methods which it calls."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def watch(self, owner: Any, method: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                self._seconds[part] += seconds - self._inner.pop()
                self._inner[-1] += seconds

        setattr(owner, method, timed)

    def close_step(self) -> None:
        self.steps.append(dict(self._seconds))
        self._seconds.clear()


class Lane(HeldFit):
    """A fit that stands before each step. The last call of :meth:`advance` ends it."""

    def __init__(self, name: str, steps: int, folder: str) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.stopwatch = Stopwatch()
        self.eplb = EPLBCallback(step_interval=STEP_INTERVAL) if name == "callback" else None
        self._fit_arguments = name, steps, folder
        self._started: tuple[float, float] | None = None
        super().__init__()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.eplb is None:
            return
        balancer = self.eplb.balancer
        assert balancer is not None
        for layer, _ in expert_layers(pl_module):
            self.stopwatch.watch(layer, "record", "counting, all layers")
        self.stopwatch.watch(balancer, "record", "balancer.record")
        self.stopwatch.watch(balancer, "step", "balancer.step")
        self.stopwatch.watch(balancer, "_plan", "balancer.plan")
        self.stopwatch.watch(self.eplb, "on_train_batch_start", "logging, and the callback's rest")
        self.stopwatch.watch(self.eplb, "on_train_batch_end", "logging, and the callback's rest")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter(), time.thread_time()
        if self._started is not None:
            self.seconds.append(now[0] - self._started[0])
            self.cpu_seconds.append(now[1] - self._started[1])
            self.stopwatch.close_step()
        self.stand()
        dist.barrier()
        self._started = time.perf_counter(), time.thread_time()

    def fit(self) -> None:
        name, steps, folder = self._fit_arguments
        callbacks = [self] if self.eplb is None else [self, self.eplb]
        logger = CSVLogger(folder, name=name, version="")
        trainer = trainer_for(RANKS, max_steps=steps, logger=logger, callbacks=callbacks)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(VOCABULARY, (steps * SEQUENCES * RANKS, SEQUENCE), generator=generator)
        trainer.fit(LanguageModel(name != "callback"), DataLoader(TensorDataset(tokens), batch_size=SEQUENCES))


def measure(rounds: int, folder: str) -> dict[str, Any]:
    """On every rank: all lanes in turn. Seconds of each step by lane, and the parts of the callback's steps."""
    warnings.filterwarnings("ignore", module="lightning")
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    steps = WARM_UP_ROUNDS + rounds
    lanes = {name: Lane(name, steps + 1, folder) for name in LANES}  # the last step ends the fit and is not timed
    for lane in lanes.values():
        lane.advance()
    orders = list(permutations(LANES))
    for i in range(steps + 1):
        for name in orders[i % len(orders)]:
            lanes[name].advance()
    eplb = lanes["callback"].eplb
    assert eplb is not None
    assert eplb.balancer is not None
    assert eplb.balancer.num_rearrangements == 0, "there was something to balance"
    return {
        "seconds": {name: lane.seconds[WARM_UP_ROUNDS:] for name, lane in lanes.items()},
        "cpu_seconds": {name: lane.cpu_seconds[WARM_UP_ROUNDS:] for name, lane in lanes.items()},
        "parts": lanes["callback"].stopwatch.steps[WARM_UP_ROUNDS:],
    }


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """A 95 % confidence interval of the median, from order statistics."""
    ordered, half = np.sort(values), 0.98 * len(values) ** 0.5
    low, high = int(len(values) / 2 - half), int(np.ceil(len(values) / 2 + half))
    return float(ordered[max(low, 0)]), float(ordered[min(high, len(values) - 1)])


def describe_ratios(ratios_of_fit: list[np.ndarray]) -> dict[str, Any]:
    ratios = np.concatenate(ratios_of_fit)
    p10, p90 = np.percentile(ratios, [10, 90]).tolist()
    return {
        "median": float(np.median(ratios)),
        "interval": median_interval(ratios),
        "p10": p10,
        "p90": p90,
        "median_of_fit": [float(np.median(fit)) for fit in ratios_of_fit],
        "ratios": ratios.tolist(),
    }


def summarize(fits: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """All figures, from what each rank measured in each fit. A step takes as long as it does on the slower rank."""
    seconds_of_fit = [
        {name: np.max([rank["seconds"][name] for rank in ranks], axis=0) for name in LANES} for ranks in fits
    ]
    cpu_of_fit = [
        {name: np.mean([rank["cpu_seconds"][name] for rank in ranks], axis=0) for name in LANES} for ranks in fits
    ]
    steps = [step for ranks in fits for rank in ranks for step in rank["parts"]]
    names = sorted({part for step in steps for part in step})
    parts = {name: np.array([step.get(name, 0.0) for step in steps]) for name in names}
    decides = parts.pop("balancer.plan") > 0
    assert decides.sum() > RANKS, "too few decisions were due"
    in_callback = np.array([sum(step.values()) for step in steps])
    usual = float(np.median(in_callback[~decides]))
    decisions = in_callback[decides] - usual
    step_seconds = {name: float(np.median([fit[name] for fit in seconds_of_fit])) for name in LANES}
    ratios = {
        "callback / alone": describe_ratios([fit["callback"] / fit["alone"] for fit in seconds_of_fit]),
        "control / alone": describe_ratios([fit["control"] / fit["alone"] for fit in seconds_of_fit]),
        "callback / alone, CPU time": describe_ratios([fit["callback"] / fit["alone"] for fit in cpu_of_fit]),
        "control / alone, CPU time": describe_ratios([fit["control"] / fit["alone"] for fit in cpu_of_fit]),
    }
    share = float(np.median(decisions)) / DEFAULT_STEP_INTERVAL / step_seconds["alone"]
    return {
        "step_seconds": step_seconds,
        "ratios": ratios,
        "part_seconds": {name: float(np.median(values[~decides])) for name, values in parts.items()},
        "callback_seconds": usual,
        "decisions": int(decides.sum()) // RANKS,
        "decision_seconds": float(np.median(decisions)),
        "slowest_decision_seconds": float(decisions.max()),
        "decision_share": share,
        "overhead": ratios["callback / alone"]["median"] + share,
    }


def print_figures(figures: dict[str, Any]) -> None:
    print_table(
        ["ratio of step times", "median", "95 % interval", "10th - 90th percentile", "medians of the fits"],
        [
            [
                name,
                f"{r['median']:.4f}",
                "{:.4f} - {:.4f}".format(*r["interval"]),
                f"{r['p10']:.3f} - {r['p90']:.3f}",
                f"{min(r['median_of_fit']):.4f} - {max(r['median_of_fit']):.4f}",
            ]
            for name, r in figures["ratios"].items()
        ],
    )
    step = figures["step_seconds"]["alone"]

    def row(name: str, seconds: float) -> list[str]:
        return [name, f"{1e3 * seconds:.3f}", f"{100 * seconds / step:.3f} %"]

    print_table(
        ["inside the callback", "ms", "of a step alone"],
        [
            row("step alone", step),
            *(row(name, seconds) for name, seconds in figures["part_seconds"].items()),
            row("all of these in an ordinary step", figures["callback_seconds"]),
            row(f"a decision besides, median of {figures['decisions']}", figures["decision_seconds"]),
            row("a decision besides, slowest", figures["slowest_decision_seconds"]),
            row(f"a decision / {DEFAULT_STEP_INTERVAL} steps", figures["decision_share"] * step),
        ],
    )


def main() -> int:
    arguments = parse_arguments(__doc__)
    fits, rounds = (QUICK_FITS, QUICK_ROUNDS) if arguments.quick else (FITS, ROUNDS)
    os.environ |= ALLOCATOR
    workers = Workers(RANKS)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seconds = 60 + len(LANES) * rounds * MOST_SECONDS
        measured = [workers.run(RANKS, measure, rounds, f"{folder}/{fit}", seconds=seconds) for fit in range(fits)]
    workers.stop()
    figures = {"quick": arguments.quick, "seconds": time.perf_counter() - start, **summarize(measured)}
    print(f"{RANKS} ranks, {fits} x {rounds} pairs of steps, {figures['seconds']:.0f} s\n")
    print_figures(figures)
    return finish([Bar("overhead of EPLBCallback", figures["overhead"], BAR)], figures, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
