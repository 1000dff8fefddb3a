"""Weights from disk, of which each rank reads what it holds: the same as ``from_pretrained``, and no more bytes."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_eplb import (
    EPLBCallback,
    ExpertLoadBalancer,
    ExpertParallelStrategy,
    fully_shard_moe,
    load_weights,
    parallelize_experts,
)
from lightning_eplb.checkpoint import sources
from lightning_eplb.checkpoint.local_parts import local_parts
from tests.fidelity import SEQUENCES, TOLERANCE, Case, ShufflePolicy, reference, tokens_of, trainer_for, whole
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.test_resume import save_halfway
from tests.workers import Workers

NAMES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]
LAYOUTS = {"ddp of 2": (2, None), "ddp of 2 x 2": (4, None), "sharded 1 x 2": (2, (1, 2)), "sharded 2 x 2": (4, (2, 2))}
"""How many ranks, and the sizes of ``efsdp`` and ``ep``."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models as they are on Hugging Face's hub, each in several files."""
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        model = built(name)
        for buffer_name, buffer in model.named_buffers():
            if "correction_bias" in buffer_name:
                nn.init.normal_(buffer, std=0.1)
        model.save_pretrained(folder / name, max_shard_size="20KB")
        assert len(list((folder / name).glob("*.safetensors"))) > 3
    return {name: str(folder / name) for name in NAMES}


def built(name: str) -> nn.Module:
    """DeepSeek's router has its own data type unless it is this one; FSDP takes one a block."""
    model = hugging_face_model(name)
    return model.float() if name == "deepseek_v3" else model


def from_pretrained(path: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", attn_implementation="eager", experts_implementation="eager"
    )


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return built(name)


def parallelized(model: nn.Module, layout: str) -> nn.Module:
    ranks, sizes = LAYOUTS[layout]
    if sizes is not None:
        return fully_shard_moe(model, init_device_mesh("cpu", sizes, mesh_dim_names=("efsdp", "ep")))
    group = None if ranks == 2 else dist.new_subgroups(2)[0]
    assert group is None or isinstance(group, dist.ProcessGroup)
    return parallelize_experts(model, group, num_redundant_experts=2)


def check_equal(model: nn.Module, path: str) -> None:
    """Every weight, and what a forward pass gives, for which buffers that no checkpoint has must be right, too."""
    expected = from_pretrained(path)
    state = expected.state_dict()
    ours = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    assert list(ours) == list(state)
    for name, tensor in ours.items():
        assert torch.equal(tensor, state[name]), name
    tokens = token_batches(2, seed=dist.get_rank())
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens, use_cache=False).logits
        difference = logits - expected.eval()(input_ids=tokens, use_cache=False).logits
    assert float(difference.abs().max()) < (TOLERANCE if logits.dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_load_weights_on_meta_equals_from_pretrained(
    name: str, layout: str, folders: dict[str, str], workers: Workers
) -> None:
    workers.run(LAYOUTS[layout][0], load_on_meta, name, layout, folders[name])


def load_on_meta(name: str, layout: str, path: str) -> None:
    model = parallelized(on_meta(name), layout)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert load_weights(model, path) is model
    check_equal(model, path)


@pytest.mark.parametrize("layout", ["ddp of 2", "sharded 2 x 2"])
def test_load_weights_after_moves_equals_from_pretrained(
    layout: str, folders: dict[str, str], workers: Workers
) -> None:
    for name in ("mixtral", "gpt_oss"):
        workers.run(LAYOUTS[layout][0], load_after_moves, name, layout, folders[name])


def load_after_moves(name: str, layout: str, path: str) -> None:
    model = parallelized(hugging_face_model(name), layout)
    balancer = ExpertLoadBalancer(model, policy=ShufflePolicy())
    balancer.rearrange()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    pointers = [holding.local.data_ptr() for holding in local_parts(model).values()]
    load_weights(model, path)
    assert pointers == [holding.local.data_ptr() for holding in local_parts(model).values()]
    check_equal(model, path)


def count_bytes(load: Callable[[], Any]) -> int:
    """Of the tensors that any kind of source gives meanwhile."""
    counted: list[int] = []

    def counting(read: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        def reading(source: Any, box: Any) -> Tensor:
            tensor = read(source, box)
            counted.append(tensor.numel() * tensor.element_size())
            return tensor

        return reading

    with contextlib.ExitStack() as patches:
        for kind in (sources._SafetensorsSource, sources._MappedSource, sources._DistributedSource):
            patches.enter_context(mock.patch.object(kind, "read", counting(kind.read)))
        load()
    return sum(counted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_load_weights_on_each_rank_reads_its_own_bytes(
    name: str, layout: str, folders: dict[str, str], workers: Workers
) -> None:
    ranks, sizes = LAYOUTS[layout]
    tensors: dict[str, Tensor] = {}
    for file in Path(folders[name]).glob("*.safetensors"):
        tensors |= load_file(file)
    experts = sum(tensor.nbytes for key, tensor in tensors.items() if ".experts." in key)
    dense = sum(tensor.nbytes for tensor in tensors.values()) - experts
    assert experts > dense / 2
    read = workers.run(ranks, bytes_read, name, layout, folders[name])
    if sizes is None:
        assert read == [dense + experts // 2] * ranks
    else:
        buffers = sum(tensor.nbytes for key, tensor in tensors.items() if key.endswith("correction_bias"))  # not cut
        assert sum(read) == dense + (ranks - 1) * buffers + experts  # everything once
        assert max(read) < (dense + experts) / ranks * 1.2


def bytes_read(name: str, layout: str, path: str) -> int:
    model = parallelized(on_meta(name), layout)
    return count_bytes(lambda: load_weights(model, path))


def test_load_weights_of_tied_model_keeps_them_tied(workers: Workers, tmp_path: Path) -> None:
    tied_model().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    workers.run(2, load_tied, str(tmp_path), "ddp of 2")
    workers.run(4, load_tied, str(tmp_path), "sharded 2 x 2")


def tied_model() -> nn.Module:
    from transformers import MixtralForCausalLM

    config = hugging_face_model("mixtral").config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return MixtralForCausalLM(config).double()


def load_tied(path: str, layout: str) -> None:
    with torch.device("meta"):
        model = tied_model()
    model = parallelized(model, layout)
    load_weights(model, path)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    check_equal(model, path)
    language = model.train()(input_ids=token_batches(2), use_cache=False).logits.square().mean()
    language.backward()
    assert model.lm_head.weight.grad is not None  # type: ignore[union-attr]


class Reads(LanguageModel):
    """Built on the meta device and read from disk, in ``configure_model``."""

    def __init__(self, case: Case, path: str) -> None:
        super().__init__(nn.Identity(), case.optimizer)
        self.case, self.path = case, path

    def configure_model(self) -> None:
        if isinstance(self.model, nn.Identity):
            model, redundant = on_meta(self.case.model), self.case.redundant * self.case.ranks
            if self.case.replicas is None:
                parallelize_experts(model, num_redundant_experts=redundant)
            else:
                assert self.device_mesh is not None
                fully_shard_moe(model, self.device_mesh, num_redundant_experts=redundant)
            self.model = load_weights(model, self.path)


CASES = [
    Case(ranks=2, redundant=1),
    Case(ranks=4, model="gpt_oss", redundant=1),
    Case(ranks=4, ep_size=2, replicas=1, model="qwen3_moe", redundant=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_model_after_load_weights_trains_as_unmodified(case: Case, folders: dict[str, str], workers: Workers) -> None:
    expected = reference(case).losses[:4]
    losses = workers.run(case.ranks, train, case, folders[case.model])
    mean = torch.tensor(losses, dtype=torch.float64).mean(dim=0)
    assert float((mean - torch.tensor(expected, dtype=torch.float64)).abs().max()) < TOLERANCE


def train(case: Case, path: str) -> list[float]:
    module = Reads(case, path)
    callback = EPLBCallback(case.redundant * case.ranks, case.ep_size, ShufflePolicy(), step_interval=1)
    strategy = None if case.replicas is None else ExpertParallelStrategy(case.ep_size, case.replicas)
    trainer = trainer_for(case.ranks, strategy, max_steps=4, callbacks=[callback])
    trainer.fit(module, loader(tokens_of(case), SEQUENCES))
    return module.losses


@pytest.mark.parametrize("kind", ["ddp", "sharded", "sharded into one file", "fsdp1"])
def test_load_weights_of_lightning_checkpoint_equals_its_weights(kind: str, workers: Workers, tmp_path: Path) -> None:
    """Whole modules and modules within, from a run whose experts had been shuffled."""
    from_kind, _, file = kind.partition(" ")
    workers.run(2, save_halfway, from_kind, 2, 1, str(tmp_path), not file, seconds=200)
    path = tmp_path / "half.ckpt"
    assert path.is_dir() == (kind in ("sharded", "fsdp1"))
    for layout in ("ddp of 2", "sharded 2 x 2"):
        for inner in (True, False):
            ranks = LAYOUTS[layout][0]
            first, *others = workers.run(ranks, load_from_lightning, str(path), layout, inner)
            expected = one_file(path)
            for state in (first, *others):
                assert state.keys() == expected.keys()
                assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def one_file(path: Path) -> dict[str, Tensor]:
    from lightning_eplb.checkpoint.consolidate import read_distributed_checkpoint

    read = read_distributed_checkpoint(path) if path.is_dir() else torch.load(path, weights_only=True)
    return read["state_dict"]


def load_from_lightning(path: str, layout: str, inner: bool) -> dict[str, Tensor]:
    module = LanguageModel(on_meta("mixtral"), "adamw")
    parallelized(module.model, layout)
    read = count_bytes(lambda: load_weights(module.model if inner else module, path))
    held = [holding.local for holding in local_parts(module).values()]
    assert read == sum(tensor.numel() * tensor.element_size() for tensor in held)
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


def test_load_weights_of_ambiguous_module_raises(tmp_path: Path) -> None:
    """Only the whole can be loaded: nobody knows which one is meant."""
    module = nn.ModuleDict({"teacher": Own(), "student": Own()})
    torch.save({"state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    with torch.device("meta"):
        model, whole_module = Own(), nn.ModuleDict({"teacher": Own(), "student": Own()})
    with pytest.raises(
        ValueError, match=r"several modules like this one: teacher\., student\.\. Load the LightningModule"
    ):
        load_weights(model, tmp_path / "last.ckpt")
    load_weights(whole_module, tmp_path / "last.ckpt")
    expected = module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in whole_module.state_dict().items())


@pytest.mark.parametrize("inner", [True, False])
def test_load_weights_of_other_shape_raises(inner: bool, tmp_path: Path) -> None:
    module = nn.ModuleDict({"model": Own()})
    torch.save({"state_dict": module.state_dict() | {"model.experts.up": torch.zeros(5, 3, 5)}}, tmp_path / "last.ckpt")
    name = "experts.up" if inner else "model.experts.up"
    with pytest.raises(ValueError, match=rf"^{name} has shape \[4, 3, 5\] in the model and \[5, 3, 5\] in the check"):
        load_weights(module["model"] if inner else module, tmp_path / "last.ckpt")


class Own(nn.Module):
    """Experts of the protocol in a model that is not of transformers, with a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.experts = OwnExperts()


class OwnExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.up = nn.Parameter(torch.empty(4, 3, 5))
        self.register_buffer("scale", torch.empty(2), persistent=False)
        self.register_buffer("count", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.up)
        self.get_buffer("scale").fill_(3.0)
        self.get_buffer("count").fill_(1)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return hidden * weights.sum(dim=1, keepdim=True)


def test_load_weights_of_own_model_equals_file(workers: Workers, tmp_path: Path) -> None:
    model = Own()
    model.get_buffer("experts.count").fill_(5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    expected = load_file(tmp_path / "model.safetensors")
    for state, scale in workers.run(2, load_own, str(tmp_path)):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        assert scale.tolist() == [3.0, 3.0]


def load_own(path: str) -> tuple[dict[str, Tensor], Tensor]:
    with torch.device("meta"):
        model = Own()
    load_weights(parallelize_experts(model), path)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.get_buffer("experts.scale")


Change = Literal["no folder", "a file less", "a tensor less", "one more", "other shape", "fewer experts", "quantized"]
REFUSED: dict[Change, str] = {
    "no folder": "is not a checkpoint. Use a folder with model.safetensors or model.safetensors.index.json",
    "a file less": "lacks model-00001-of-00008.safetensors, which its model.safetensors.index.json names",
    "a tensor less": " lacks model.norm.weight. Use a model of the saved class and settings.",
    "one more": " has, and the model has not, model.extra. Use a model of the saved class",
    "other shape": "model.norm.weight has shape [16] in the model and [17] in the checkpoint (model.norm.weight)",
    "fewer experts": "model.layers.0.mlp.experts.down_proj has shape [8, 16, 24] in the model and [7, 16, 24] in the",
    "quantized": "is quantized (fp8), which is not supported. Load it with from_pretrained()",
}


@pytest.mark.parametrize("change", REFUSED)
def test_load_weights_of_unfit_folder_raises_on_all_ranks(
    change: Change, folders: dict[str, str], workers: Workers, tmp_path: Path
) -> None:
    if change == "a file less":
        for file in Path(folders["mixtral"]).iterdir():
            if not file.name.startswith("model-00001"):
                (tmp_path / file.name).write_bytes(file.read_bytes())
    elif change != "no folder":
        tensors = {}
        for file in Path(folders["mixtral"]).glob("*.safetensors"):
            tensors |= load_file(file)
        if change == "a tensor less":
            del tensors["model.norm.weight"]
        elif change == "one more":
            tensors["model.extra"] = torch.zeros(1)
        elif change == "other shape":
            tensors["model.norm.weight"] = torch.zeros(17)
        elif change == "fewer experts":
            tensors = {key: tensor for key, tensor in tensors.items() if ".0.block_sparse_moe.experts.7.w2" not in key}
        save_file(tensors, tmp_path / "model.safetensors")
        config = json.loads((Path(folders["mixtral"]) / "config.json").read_text())
        if change == "quantized":
            config["quantization_config"] = {"quant_method": "fp8"}
        (tmp_path / "config.json").write_text(json.dumps(config))
    for message in workers.run(2, refused, str(tmp_path)):
        assert REFUSED[change] in message


def refused(path: str) -> str:
    """Each rank by itself: the other one is somewhere else meanwhile."""
    model = parallelized(on_meta("mixtral"), "ddp of 2")
    with (
        mock.patch("torch.distributed.broadcast", side_effect=AssertionError("a collective")),
        pytest.raises(ValueError, match=r"\w") as raised,
    ):
        load_weights(model, path)
    assert all(parameter.is_meta for parameter in model.parameters())
    return str(raised.value)


def test_load_weights_into_outer_module_raises_and_names_inner(folders: dict[str, str]) -> None:
    module = LanguageModel(on_meta("mixtral"), "adamw")
    with pytest.raises(ValueError, match=r"is to be loaded into the model of transformers that is model here"):
        load_weights(module, folders["mixtral"])


def test_load_weights_with_layers_to_ignore_ignores_them(folders: dict[str, str], tmp_path: Path) -> None:
    """DeepSeek's checkpoints have one more layer, which transformers knows to leave alone."""
    tensors = {}
    for file in Path(folders["deepseek_v3"]).glob("*.safetensors"):
        tensors |= load_file(file)
    tensors["model.layers.61.mlp.experts.0.gate_proj.weight"] = torch.zeros(12, 16)
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_weights(parallelize_experts(on_meta("deepseek_v3")), tmp_path)
    expected = from_pretrained(folders["deepseek_v3"]).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_load_weights_under_meta_device_raises(folders: dict[str, str]) -> None:
    model = parallelize_experts(on_meta("mixtral"))
    with pytest.raises(ValueError, match=r"device='meta' has no memory"), torch.device("meta"):
        load_weights(model, folders["mixtral"])
