"""Logs of one ``fit``: scalars of each step, rearrangements, and what is written at the end."""

import lightning.pytorch as pl

from lightning_eplb.balancer import ExpertLoadBalancer
from lightning_eplb.balancer.step_stats import RearrangementResult, StepStats
from lightning_eplb.logging.loggers import log_histogram, log_placement
from lightning_eplb.logging.rearrangement import report_rearrangement
from lightning_eplb.logging.scalars import prefix_of, scalars_of
from lightning_eplb.logging.summary import FitSummary, print_table


class FitLogger:
    """Logs what balancing does in one ``fit``. Every rank calls its methods.

    Args:
        balancer: Balancer of the fit. What it did before is not part of the summary.
        window_size: Maximum number of first and of last steps that the summary compares.
    """

    def __init__(self, balancer: ExpertLoadBalancer, window_size: int) -> None:
        self.balancer = balancer
        self._layer_names = {model.name: model.layer_names for model in balancer.placed_models}
        self._summary = FitSummary(window_size, balancer)

    def log_step(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stats: StepStats) -> None:
        """Log an optimizer step, in ``on_train_batch_end``."""
        self._summary.add(stats)
        if stats.rearrangement is not None:
            self.log_rearrangement(trainer, stats.rearrangement)
        # A value that is logged costs a third of a millisecond, also in the steps that no logger writes.
        if trainer.progress_bar_callback is not None:
            pl_module.log("balancedness", stats.balancedness, prog_bar=True, logger=False)  # a bar is narrow
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        # Under manual optimization Lightning counts batches, which `global_step` doesn't tell.
        if not pl_module.automatic_optimization or (every > 0 and trainer.global_step % every == 0):
            pl_module.log_dict(scalars_of(self.balancer, stats))
        if every > 0 and self.balancer.num_steps % every == 0:
            for name, part in stats.models.items():
                if part.has_tokens:
                    prefix = prefix_of(self.balancer, self.balancer.models[name])
                    log_histogram(trainer.loggers, trainer.global_step - 1, part.load, prefix)

    def log_rearrangement(self, trainer: "pl.Trainer", result: RearrangementResult) -> None:
        """Log a rearrangement, as a line and as heatmaps."""
        report_rearrangement(trainer, result, self._layer_names)

    def log_placement(self, trainer: "pl.Trainer") -> None:
        """Log the placement as a table, in ``on_train_end``."""
        if self._summary.total and self.balancer.groups.size > 1:
            for model in self.balancer.placed_models:
                load_YL, prefix = model.load.steps().sum(dim=0).cpu().numpy(), prefix_of(self.balancer, model)
                log_placement(trainer.loggers, trainer.global_step - 1, model.placement, load_YL, prefix)

    def print_summary(self, trainer: "pl.Trainer") -> None:
        """Print the summary table, in ``on_fit_end``. Skip it if the progress bar is disabled."""
        bar = trainer.progress_bar_callback
        if trainer.is_global_zero and bar is not None and self._summary.total:
            title = f"Expert load after {self.balancer.num_steps:,} optimizer steps"
            print_table(title, self._summary.rows(), bar)
