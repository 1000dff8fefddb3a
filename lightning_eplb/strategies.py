"""Lightning strategies: fully sharded data parallelism with expert parallelism inside."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from typing_extensions import override

from lightning_eplb import _compat
from lightning_eplb._validation import check_switches, check_whole_numbers
from lightning_eplb.checkpoint.consolidate import WEIGHTS
from lightning_eplb.checkpoint.distributed import load_distributed_checkpoint, load_file, save_folder
from lightning_eplb.parallel.dtensor import EFSDP, EP, REPLICATE
from lightning_eplb.parallel.groups import check_nodes
from lightning_eplb.parallel.materialize import materialize
from lightning_eplb.parallel.parallelize import expert_layers


class ExpertParallelStrategy(ModelParallelStrategy):
    r"""Fully sharded data parallelism (FSDP2) in which ranks share the experts of Mixture-of-Experts layers.

    Makes a device mesh with the dimensions ``efsdp``, ``ep`` and ``tensor_parallel`` (of size 1), and ``replicate``
    before them for hybrid sharding. ``ep`` ranks share the experts of a layer, ``efsdp`` ranks share each expert. All
    other parameters are sharded over both, which together are ``data_parallel``: every rank gets its own batches. The
    model is parallelized in ``configure_model``, in one call:

    Example::

        class MyModel(LightningModule):
            def configure_model(self):
                if self.model is None:
                    self.model = fully_shard_moe(build_my_model(), self.device_mesh, num_redundant_experts=8)

        strategy = ExpertParallelStrategy(ep_size=8)
        trainer = Trainer(strategy=strategy, devices=8, num_nodes=4, callbacks=[EPLBCallback(num_redundant_experts=8)])

    A model that ``configure_model`` builds under ``torch.device("meta")`` gets memory and random weights after it was
    sharded. :func:`~lightning_eplb.load_weights` in ``configure_model`` loads a checkpoint instead, and
    ``Trainer.fit(ckpt_path=...)`` resumes a run.

    Args:
        ep_size: Ranks that share the experts of a layer. Defaults to all ranks divided by ``replicate_size``.
        replicate_size: Ranks that hold the same shards of everything. Defaults to 1, no hybrid sharding.
        save_distributed_checkpoint: Save each rank's shards into one folder. Otherwise rank 0 gathers them into one
            file. Both are in the order of the unmodified model. Defaults to ``True``.
        process_group_backend: Backend of the default process group. Defaults to that of the accelerator.
        timeout: Timeout of its collectives. Defaults to torch's.

    Raises:
        ValueError: In ``__init__``, or before any communication, if the sizes don't fit the number of ranks.
    """

    def __init__(
        self,
        ep_size: int | None = None,
        replicate_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        check_whole_numbers(replicate_size=replicate_size)
        check_switches(save_distributed_checkpoint=save_distributed_checkpoint)
        if ep_size is not None:
            check_whole_numbers(ep_size=ep_size)
        if ep_size is not None and ep_size < 1:
            raise ValueError(f"ep_size={ep_size} must be at least 1; None takes all ranks that are not replicas")
        if replicate_size < 1:
            raise ValueError(f"replicate_size={replicate_size} must be at least 1, which is no replica")
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._ep_size = ep_size
        self.before_loading: Callable[[], None] | None = None
        """Function that all ranks call before a checkpoint is loaded into the model. Set by ``EPLBCallback``."""
        self.replicate_size = replicate_size

    @property
    def ep_size(self) -> int:
        """Ranks that share the experts of a layer."""
        ranks = self.num_nodes * self.num_processes
        return self._ep_size if self._ep_size is not None else max(1, ranks // self.replicate_size)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @override
    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        inner = self.ep_size * self.replicate_size
        if ranks % inner:
            raise ValueError(
                f"ep_size={self.ep_size} times replicate_size={self.replicate_size} must divide the {ranks} ranks"
                f" (num_nodes={self.num_nodes}, devices={self.num_processes})"
            )
        check_nodes(self.ep_size, self.num_processes)
        self._data_parallel_size = ranks
        self._setup_distributed()
        names, shape = (EFSDP, EP, "tensor_parallel"), (ranks // inner, self.ep_size, 1)
        if self.replicate_size > 1:
            names, shape = (REPLICATE, *names), (self.replicate_size, *shape)
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        _compat.flatten_mesh(self._device_mesh[names[:-1]], "data_parallel")
        assert self.lightning_module is not None
        _compat.set_device_mesh(self.lightning_module, self._device_mesh)

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        assert self.model is not None
        materialize(self.model, self.root_device)
        super().setup(trainer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if not self._save_distributed_checkpoint or storage_options is not None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        save_folder(self, checkpoint, filepath, WEIGHTS)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.model is not None
        assert self.lightning_module is not None
        if self.before_loading is not None:
            self.before_loading()
        path = self.broadcast(checkpoint_path)
        if Path(path).is_dir():
            strict = self.lightning_module.strict_loading
            return load_distributed_checkpoint(path, self.model, self.optimizers, strict, weights_only)
        self.model.zero_grad()  # torch initializes an optimizer's state only if no gradient is left
        if any(layer.num_phantoms for layer, _ in expert_layers(self.model)):
            return load_file(path, self.model, self.optimizers, self.lightning_module.strict_loading, weights_only)
        return super().load_checkpoint(path, weights_only)
