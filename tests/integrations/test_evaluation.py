"""Validation, testing and prediction where ranks have unequal numbers of batches, against the unmodified model."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_eplb import EPLBCallback, ExpertParallelStrategy
from lightning_eplb.parallel.parallelize import expert_layers
from tests.fidelity import trainer_for
from tests.fsdp1 import DoublePrecision, fsdp1
from tests.models import LanguageModel, ShardedLanguageModel, hugging_face_model, language_loss, loader, token_batches
from tests.parallel.test_per_expert_state import Model
from tests.workers import Workers


class Shard(IterableDataset):
    """As many sequences as each rank is told, other ones on each."""

    def __init__(self, count_of_rank: tuple[int, ...], seed: int = 0) -> None:
        self.tokens = token_batches(count_of_rank[dist.get_rank()], seed=10 * seed + dist.get_rank())

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        return ((sequence,) for sequence in self.tokens)


def shard(*count_of_rank: int, seed: int = 0) -> DataLoader:
    """One sequence a batch."""
    return DataLoader(Shard(count_of_rank, seed), batch_size=1)


class Evaluated(LanguageModel):
    """Keeps what each batch gave: logits, or losses."""

    def __init__(self, calls_of: Callable[[int], int] = lambda batch_idx: 1, logs: bool = True) -> None:
        super().__init__(hugging_face_model("mixtral"), "adamw")
        self.calls_of, self.logs = calls_of, logs
        self.evaluated: list[tuple[Tensor, float]] = []

    def predict_step(self, batch: tuple[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        logits = [self.model(input_ids=batch[0], use_cache=False).logits for _ in range(self.calls_of(batch_idx))]
        return logits[-1]

    def validation_step(self, batch: tuple[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = language_loss(self.model, batch[0])
        self.evaluated.append((batch[0], loss.item()))
        if self.logs:
            self.log("val_loss", loss, sync_dist=True, batch_size=1)

    test_step = validation_step


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches, self.epoch = 0, 0

    def write_on_batch_end(self, *args: Any) -> None:
        self.batches += 1

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epoch = len(predictions)
        total = torch.tensor([len(predictions)])
        dist.all_reduce(total)  # as a writer that gathers
        assert total == 5


def predict(redundancy: Literal["window", "batch"], ep_size: int | None = None) -> tuple[float, int]:
    model, reference = Evaluated(), hugging_face_model("mixtral").eval()
    tokens = token_batches(9)
    writer = Writer()
    callbacks: list[pl.Callback] = [writer, EPLBCallback(2, ep_size, redundancy=redundancy, min_tokens_per_copy=None)]
    trainer = trainer_for(dist.get_world_size(), callbacks=callbacks)
    predictions = trainer.predict(model, DataLoader(TensorDataset(tokens), batch_size=2))
    assert predictions is not None
    assert writer.batches == writer.epoch == len(predictions)
    with torch.no_grad():
        expected = reference(input_ids=tokens[dist.get_rank() :: 2], use_cache=False).logits
    assert all(layer.join is None for layer, _ in expert_layers(model))
    return float((torch.cat(predictions) - expected).abs().max()), len(predictions)  # type: ignore[arg-type]


@pytest.mark.parametrize("redundancy", ["window", "batch"])
def test_predict_with_unequal_batches_equals_unmodified(redundancy: str, workers: Workers) -> None:
    """Lightning's sampler does not pad: of 9 sequences rank 0 gets 5, rank 1 gets 4."""
    (difference, batches), (their_difference, their_batches) = workers.run(2, predict, redundancy)
    assert (batches, their_batches) == (3, 2)
    assert max(difference, their_difference) < 1e-12


def evaluate(what: Literal["validate", "test"], *counts_of_loaders: tuple[int, ...]) -> tuple[float, int]:
    has_all = all(min(counts) > 0 for counts in counts_of_loaders)  # Lightning reduces what each rank has logged
    module, reference = Evaluated(logs=has_all), hugging_face_model("mixtral").eval()
    loaders = [shard(*counts, seed=seed) for seed, counts in enumerate(counts_of_loaders)]
    trainer = trainer_for(dist.get_world_size(), callbacks=[EPLBCallback(2)])
    getattr(trainer, what)(module, loaders, verbose=False)
    with torch.no_grad():
        differences = [abs(language_loss(reference, tokens).item() - loss) for tokens, loss in module.evaluated]
    return max(differences, default=0.0), len(module.evaluated)


@pytest.mark.parametrize("what", ["validate", "test"])
@pytest.mark.parametrize("counts", [[(1, 4)], [(3, 0)], [(0, 2)], [(1, 3), (2, 2), (4, 1)]])
def test_evaluation_of_unequal_iterables_equals_unmodified(
    what: str, counts: list[tuple[int, int]], workers: Workers
) -> None:
    """Metrics are reduced over the ranks behind each dataloader."""
    results = workers.run(2, evaluate, what, *counts)
    assert [batches for _, batches in results] == [sum(count[rank] for count in counts) for rank in range(2)]
    assert max(difference for difference, _ in results) < 1e-12


def predict_with_calls(*counts: int) -> float:
    """Each rank and batch calls the model another number of times, as ``generate`` does."""
    rank = dist.get_rank()
    module, reference = Evaluated(lambda batch_idx: 1 + (3 * rank + 2 * batch_idx) % 5), hugging_face_model("mixtral")
    trainer = trainer_for(dist.get_world_size(), callbacks=[EPLBCallback(2)])
    predictions = trainer.predict(module, shard(*counts)) or []
    tokens = token_batches(counts[rank], seed=rank)
    with torch.no_grad():
        expected = reference.eval()(input_ids=tokens, use_cache=False).logits
    return float((torch.cat(predictions) - expected).abs().max())  # type: ignore[arg-type]


def test_predict_with_unequal_calls_equals_unmodified(workers: Workers) -> None:
    assert max(workers.run(2, predict_with_calls, 3, 4)) < 1e-12


def generate() -> bool:
    """Each rank generates another number of tokens, each the model's own choice, without ``synced_gpus``."""

    class Generates(Evaluated):
        def predict_step(self, batch: tuple[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            return generated(self.model, batch[0])

    def generated(model: Any, tokens: Tensor) -> Tensor:
        return model.generate(tokens, max_new_tokens=2 + 3 * dist.get_rank(), do_sample=False, pad_token_id=0)

    module, reference = Generates(), hugging_face_model("mixtral").eval()
    predictions = trainer_for(2, callbacks=[EPLBCallback()]).predict(module, shard(3, 2)) or []
    expected = [generated(reference, tokens[None]) for tokens in token_batches(len(predictions), seed=dist.get_rank())]
    return all(torch.equal(ours, theirs) for ours, theirs in zip(predictions, expected, strict=True))  # type: ignore[arg-type]


def test_generate_of_unequal_lengths_equals_unmodified(workers: Workers) -> None:
    assert workers.run(2, generate) == [True, True]


class TwoModels(Evaluated):
    """Calls one of two models, the other one on the other rank."""

    def __init__(self) -> None:
        super().__init__()
        self.second = hugging_face_model("mixtral", top_k=3)

    def predict_step(self, batch: tuple[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        model = self.model if (batch_idx + dist.get_rank()) % 2 else self.second
        return model(input_ids=batch[0], use_cache=False).logits


def predict_by_two() -> float:
    module, reference = TwoModels(), TwoModels().eval()
    predictions = trainer_for(2, callbacks=[EPLBCallback()]).predict(module, shard(4, 3)) or []
    differences = []
    for index, tokens in enumerate(token_batches(len(predictions), seed=dist.get_rank())):
        with torch.no_grad():
            expected = reference.predict_step((tokens[None],), index)
        differences.append(float((predictions[index] - expected).abs().max()))  # type: ignore[operator]
    return max(differences)


def test_predict_by_different_models_on_ranks_equals_unmodified(workers: Workers) -> None:
    assert max(workers.run(2, predict_by_two)) < 1e-12


def predict_in_groups() -> int:
    module = Evaluated()
    trainer = trainer_for(4, callbacks=[EPLBCallback(2, ep_size=2)])
    return len(trainer.predict(module, shard(1, 3, 2, 0)) or [])


def test_predict_in_two_ep_groups_with_unequal_batches_ends(workers: Workers) -> None:
    assert workers.run(4, predict_in_groups) == [1, 3, 2, 0]


class Counts(Evaluated):
    """Counts the tokens of each expert in a buffer of the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model("Saved").model  # type: ignore[assignment]

    def predict_step(self, batch: tuple[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.model(batch[0])


def predict_with_counters() -> list[int]:
    module = Counts()
    trainer_for(4, callbacks=[EPLBCallback(2, ep_size=2)]).predict(module, shard(1, 3, 2, 0))
    return [int(experts.tokens.sum()) for experts in module.model.experts]  # type: ignore[union-attr]


def test_counters_with_unequal_calls_in_ep_groups_count_all_tokens(workers: Workers) -> None:
    """Six sequences of eight tokens, each with two experts."""
    assert workers.run(4, predict_with_counters) == [[96, 96]] * 4


def predict_in_bfloat16() -> float:
    module, reference = Evaluated(), hugging_face_model("mixtral").float().eval()
    module.model.float()
    trainer = trainer_for(2, callbacks=[EPLBCallback(2)], precision="bf16-mixed")
    predictions = trainer.predict(module, shard(2, 4)) or []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = token_batches(len(predictions), seed=dist.get_rank())
        expected = reference(input_ids=tokens, use_cache=False).logits
    return float((torch.cat(predictions) - expected).abs().max())  # type: ignore[arg-type]


def test_predict_under_autocast_with_unequal_batches_equals_unmodified(workers: Workers) -> None:
    assert max(workers.run(2, predict_in_bfloat16)) < 2e-2


def fit(*count_of_rank: int) -> tuple[list[float], int]:
    module = Evaluated(logs=min(count_of_rank) > 0)
    trainer = trainer_for(2, max_steps=6, val_check_interval=2, callbacks=[EPLBCallback(2, step_interval=2)])
    trainer.fit(module, loader(token_batches(24), 2), shard(*count_of_rank))
    return module.losses, len(module.evaluated)


@pytest.mark.parametrize("counts", [(2, 5), (0, 3), (3, 0)])
def test_training_after_unequal_validation_equals_that_after_equal(counts: tuple[int, int], workers: Workers) -> None:
    """Under DDP, whose first forward pass of an evaluation broadcasts the buffers of rank 0."""
    equal = workers.run(2, fit, 2, 2)
    unequal = workers.run(2, fit, *counts)
    for rank, ((losses, batches), (their_losses, _)) in enumerate(zip(unequal, equal, strict=True)):
        assert losses == pytest.approx(their_losses, abs=1e-12)
        assert batches == 3 * counts[rank] + min(2, counts[rank])  # with the sanity check


class TrainsInValidation(Evaluated):
    def validation_step(self, batch: tuple[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        with torch.enable_grad():
            language_loss(self.model, batch[0]).backward()
        self.evaluated.append((batch[0], 0.0))


def validate_with_gradients(*count_of_rank: int) -> tuple[str, int]:
    module, trainer = TrainsInValidation(), trainer_for(2, callbacks=[EPLBCallback(2)])
    try:
        trainer.validate(module, shard(*count_of_rank), verbose=False)
    except RuntimeError as error:
        assert all(layer.join is None for layer, _ in expert_layers(module))
        return str(error), len(module.evaluated)
    return "", len(module.evaluated)


def test_backward_in_evaluation_with_unequal_batches_raises(workers: Workers) -> None:
    assert workers.run(2, validate_with_gradients, 2, 2) == [("", 2), ("", 2)]
    for message, batches in workers.run(2, validate_with_gradients, 2, 3):
        assert message.startswith(
            "model.model.layers.0.mlp.experts was called with gradients enabled while EP ranks [0] did not call it"
        )
        assert batches == 2


class Sharded(ShardedLanguageModel):
    def predict_step(self, batch: tuple[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.model(input_ids=batch[0], use_cache=False).logits

    test_step = predict_step


def refused(strategy: Literal["FSDP1", "FSDP2"], what: str, *count_of_rank: int) -> str:
    model: nn.Module = hugging_face_model("mixtral")
    if strategy == "FSDP1":
        module, plugins, parallel = Evaluated(), [DoublePrecision()], fsdp1()
    else:
        module, plugins, parallel = Sharded(model, "adamw"), [], ExpertParallelStrategy()
    trainer = trainer_for(2, parallel, plugins=plugins, callbacks=[EPLBCallback()])
    try:
        getattr(trainer, what)(module, shard(*count_of_rank))
    except ValueError as error:
        dist.barrier()
        return str(error)
    return ""


@pytest.mark.parametrize("strategy", ["FSDP1", "FSDP2"])
@pytest.mark.parametrize(("what", "name"), [("predict", "predict"), ("validate", "val"), ("test", "test")])
def test_fsdp_with_unequal_batches_raises_on_all_ranks(strategy: str, what: str, name: str, workers: Workers) -> None:
    full_name = "CPUFSDPStrategy" if strategy == "FSDP1" else "ExpertParallelStrategy"
    assert workers.run(2, refused, strategy, what, 2, 2) == ["", ""]
    for message in workers.run(2, refused, strategy, what, 4, 2):
        assert message == (
            f"{name}_dataloader has unequal numbers of batches: ranks [1] have none left after [2], and {full_name}"
            " gathers parameters on all ranks for each batch. Use a sampler that gives all ranks the same number of"
            f" batches, such as DistributedSampler, or Trainer(limit_{name}_batches=2)."
        )
