"""Weights from disk on several devices: the same as ``from_pretrained``, and what a rank reads and holds for it.

One process a rank, as ``torchrun`` starts them, or any launcher that sets the same variables::

    torchrun --nproc-per-node 2 tests/gpu/weights.py

Writes a model of Mixtral's kind as it would be on Hugging Face's hub, one tensor for each expert and in several files.
Then each rank builds it on the meta device, parallelized under DDP and sharded, and fills it: by ``load_weights``, or
with random numbers by ``materialize``. Ends with status 1 if a weight or an output differs from ``from_pretrained``, if
two experts are alike, or if replicas are not.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_eplb import fully_shard_moe, load_weights, materialize, parallelize_experts
from lightning_eplb.checkpoint import sources
from lightning_eplb.checkpoint.local_parts import local_parts
from tests.fidelity import whole


def build(arguments: argparse.Namespace) -> nn.Module:
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=arguments.width,
        intermediate_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        num_local_experts=arguments.experts,
        num_experts_per_tok=2,
    )
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def parallelized(arguments: argparse.Namespace, layout: str, device: torch.device) -> nn.Module:
    with torch.device("meta"):
        model = build(arguments)
    if layout == "ddp":
        return parallelize_experts(model)
    sizes = (dist.get_world_size(), 1) if layout == "sharded by efsdp" else (1, dist.get_world_size())
    return fully_shard_moe(model, init_device_mesh(device.type, sizes, mesh_dim_names=("efsdp", "ep")))


def load(arguments: argparse.Namespace, layout: str, device: torch.device, folder: str, expected: nn.Module) -> bool:
    model = parallelized(arguments, layout, device)
    read, counted = sources._SafetensorsSource.read, []

    def reading(source: sources._SafetensorsSource, box: sources.Box) -> Tensor:
        tensor = read(source, box)
        counted.append(tensor.numel() * tensor.element_size())
        return tensor

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    dist.barrier()
    start = time.perf_counter()
    with mock.patch.object(sources._SafetensorsSource, "read", reading):
        load_weights(model, folder, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    held = sum(holding.local.numel() * holding.local.element_size() for holding in local_parts(model).values())
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    is_equal = True
    state = expected.state_dict()
    for name, tensor in model.state_dict().items():
        is_equal &= torch.equal(whole(tensor).to(device), state[name])
    tokens = torch.arange(64, device=device).view(2, 32)
    with torch.no_grad():
        ours, theirs = (m(input_ids=tokens, use_cache=False).logits.float() for m in (model, expected))
    difference = float((ours - theirs).abs().max())
    if dist.get_rank() == 0:
        print(
            f"{layout:>18}: {seconds:5.1f} s, read {sum(counted) / 2**20:7.0f} MiB, holds {held / 2**20:7.0f} MiB,"
            f" at most {peak / 2**20:7.0f} MiB of the device; weights equal: {is_equal};"
            f" largest difference of logits {difference:.1e}"
        )
    return is_equal and difference <= arguments.tolerance * float(theirs.abs().max())


def draw(arguments: argparse.Namespace, layout: str, device: torch.device) -> bool:
    torch.manual_seed(0)
    model = materialize(parallelized(arguments, layout, device), device)
    is_good = True
    for name, tensor in model.state_dict().items():
        full = whole(tensor).to(device)
        agreed = full.clone()
        dist.broadcast(agreed, 0)
        is_good &= torch.equal(agreed, full)
        if "experts" in name:
            is_good &= len(full.flatten(1)[:, :64].unique(dim=0)) == len(full)
            is_good &= 0.015 < float(full.float().std()) < 0.025
    if dist.get_rank() == 0:
        print(f"{layout:>18}: random weights are an initialization's, the same on all ranks: {is_good}")
    return is_good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of logits, relative to the largest")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [""]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        torch.manual_seed(1)
        build(arguments).save_pretrained(folder[0], max_shard_size="500MB")
    dist.barrier()
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    expected = AutoModelForCausalLM.from_pretrained(
        folder[0], dtype="auto", attn_implementation="eager", experts_implementation="eager"
    ).to(device)
    if dist.get_rank() == 0:
        total = sum(parameter.numel() * parameter.element_size() for parameter in expected.parameters())
        print(f"   from_pretrained: {time.perf_counter() - start:5.1f} s, {total / 2**20:.0f} MiB")
    layouts = ("ddp", "sharded", "sharded by efsdp")
    good = [load(arguments, layout, device, folder[0], expected) for layout in layouts]
    good += [draw(arguments, layout, device) for layout in layouts]
    dist.barrier()
    dist.destroy_process_group()
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
