"""Loads of other programs are read whole, and what is no load is told in a sentence with the file's name."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_eplb.cli import main
from lightning_eplb.simulation.trace import TraceWriter
from lightning_eplb.simulation.trace_formats import read_load

LOAD = np.array([[[3, 0, 1, 4], [2, 2, 0, 4]], [[1, 5, 1, 1], [0, 0, 8, 0]], [[2, 2, 2, 2], [7, 1, 0, 0]]])
"""3 steps of 2 layers with 4 experts, 8 token-expert pairs each."""


def write_trace(path: Path, load_WYL: np.ndarray) -> Path:
    writer = TraceWriter(path)
    for load_YL in load_WYL:
        writer.append(load_YL)
    writer.close()
    return path


def write_npy(path: Path, load_WYL: np.ndarray) -> Path:
    np.save(path, load_WYL)
    return path


def write_npz(path: Path, load_WYL: np.ndarray) -> Path:
    np.savez_compressed(path, tokens=load_WYL)
    return path


def write_wide_table(path: Path, load_WYL: np.ndarray) -> Path:
    lines = [",".join(["step", "layer", *(f"expert {i}" for i in range(load_WYL.shape[2]))])]
    for step, layer in np.ndindex(load_WYL.shape[:2]):
        lines.append(",".join(map(str, [10 * step, layer + 3, *load_WYL[step, layer]])))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_long_table(path: Path, load_WYL: np.ndarray) -> Path:
    lines = ["Step, Layer, Expert, Tokens"]
    lines += [f"{step},{layer},{x},{load_WYL[step, layer, x]}" for step, layer, x in np.ndindex(load_WYL.shape)]
    path.write_text("\r\n".join(lines), encoding="utf-8-sig")
    return path


def write_megatron(path: Path, load_WYL: np.ndarray) -> Path:
    """Two ranks; rank 0 has two micro-batches a step, and rank 1 what is left. Source: Megatron's router_trace.py."""
    path.mkdir()
    for rank in range(2):
        with (path / f"router_trace_rank{rank}.jsonl").open("w") as file:
            for step, layer in np.ndindex(load_WYL.shape[:2]):
                chosen = np.repeat(np.arange(load_WYL.shape[2]), load_WYL[step, layer])
                third = len(chosen) // 3
                for part in (chosen[:third], chosen[third : 2 * third]) if rank == 0 else (chosen[2 * third :],):
                    record = {"step": step + 5, "stage": "pre_dispatch", "block": "decoder", "layer": layer + 1}
                    record |= {"rank": rank, "num_tokens": len(part), "topk": 1, "top_indices": part[:, None].tolist()}
                    file.write(json.dumps(record) + "\n")
    return path


def write_ultra_ep(path: Path, load_WYL: np.ndarray, records: int = 3, trace: str = "epg0_gr0_r0_17") -> Path:
    """Chunks of three records, layers of a micro-batch one after the other. Source: UltraEP's profiling.py."""
    path.mkdir(exist_ok=True)
    places = list(np.ndindex(load_WYL.shape[:2]))
    for chunk, start in enumerate(range(0, len(places), records)):
        part = places[start : start + records]
        np.savez(
            path / f"{trace}.chunk{chunk:06d}.npz",
            metadata=np.asarray(json.dumps({"schema": "ultra_ep_trace_v1", "trace_id": trace})),
            layers=np.array([layer + 3 for _, layer in part], dtype=np.int32),
            virtual_layers=np.array([layer for _, layer in part], dtype=np.int32),
            microbatches=np.array([4 * step for step, _ in part], dtype=np.int64),
            pre_logical_loads=np.array([load_WYL[place] for place in part], dtype=np.int32),
            post_physical_loads=np.zeros((len(part), 6), dtype=np.int32),
        )
    return path


WRITERS = {
    "trace.npy": write_trace,
    "load.npy": write_npy,
    "load.npz": write_npz,
    "wide.csv": write_wide_table,
    "long.csv": write_long_table,
    "megatron": write_megatron,
    "ultra_ep": write_ultra_ep,
}


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(load_WYL=arrays(np.int64, st.tuples(*[st.integers(1, 4)] * 3), elements=st.integers(0, 30)))
def test_read_load_of_each_format_returns_what_was_written(
    name: str, load_WYL: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> None:
    load_WYL[0, 0, -1] = 1  # the last expert is named somewhere, and some token is routed
    read_WYL = read_load(WRITERS[name](tmp_path_factory.mktemp("load") / name, load_WYL))
    assert read_WYL.dtype == np.int64
    assert np.array_equal(read_WYL, load_WYL)


@pytest.mark.parametrize("word", ["simulate", "report"])
@pytest.mark.parametrize("name", WRITERS)
def test_simulate_with_each_format_succeeds(name: str, word: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / name, LOAD)
    words = [word, str(path), "--ep-size", "2", "--step-interval", "2", "--policy", "static"]
    assert main([*words, *(["-o", str(tmp_path / "report.html")] if word == "report" else [])]) == 0


def test_read_load_of_whole_floats_returns_counts(tmp_path: Path) -> None:
    assert np.array_equal(read_load(write_npz(tmp_path / "a.npz", LOAD.astype(np.float32))), LOAD)


def test_read_load_with_num_experts_has_idle_experts(tmp_path: Path) -> None:
    without = np.where(np.arange(4) == 3, 0, LOAD)
    path = write_megatron(tmp_path / "traces", without)
    assert read_load(path).shape == (3, 2, 3)
    assert np.array_equal(read_load(path, num_experts=4), without)
    with pytest.raises(ValueError, match=r"rank0\.jsonl, line 7: it routes to experts 2 to 2, and ids are 0 to 1;"):
        read_load(path, num_experts=2)


def test_read_load_of_one_megatron_rank_has_its_tokens(tmp_path: Path) -> None:
    path = write_megatron(tmp_path / "traces", LOAD)
    first, second = (read_load(path / f"router_trace_rank{rank}.jsonl", num_experts=4) for rank in range(2))
    assert np.array_equal(first + second, LOAD)


def test_read_load_of_megatron_tells_layers_apart_by_block(tmp_path: Path) -> None:
    records = [
        {"step": 0, "block": "mtp", "mtp_idx": 0, "layer": 1, "top_indices": [[0, 1]]},
        {"step": 0, "block": "decoder", "layer": 1, "top_indices": [[1, 2], [1, 0], [-1, -1]]},
    ]
    path = tmp_path / "router_trace_rank0.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    assert read_load(path).tolist() == [[[1, 2, 1], [1, 1, 0]]]


@pytest.mark.parametrize("name", ["megatron", "ultra_ep"])
def test_read_load_with_missing_layer_warns_and_leaves_step_out(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / name, LOAD)
    if name == "megatron":
        file = path / "router_trace_rank1.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    else:
        for chunk in path.iterdir():
            arrays = dict(np.load(chunk))
            keep = (arrays["layers"] != 4) | (arrays["microbatches"] != 8)
            is_metadata = {"metadata"}
            np.savez(chunk, **{k: v if k in is_metadata else v[keep] for k, v in arrays.items()})
    with pytest.warns(UserWarning, match="1 of 3 steps lack layers"):
        assert np.array_equal(read_load(path), LOAD[:2])


def test_read_load_of_one_chunk_reads_whole_trace(tmp_path: Path) -> None:
    write_ultra_ep(tmp_path, LOAD)
    write_ultra_ep(tmp_path, 2 * LOAD, trace="epg1_gr0_r8_17[0]")
    assert np.array_equal(read_load(tmp_path / "epg0_gr0_r0_17.chunk000001.npz"), LOAD)
    assert np.array_equal(read_load(tmp_path / "epg1_gr0_r8_17[0].chunk000000.npz"), 2 * LOAD)
    with pytest.raises(ValueError, match=r"traces of 2 EP groups; name a chunk of one, such as .*epg0.*chunk000000"):
        read_load(tmp_path)


def test_read_load_of_cut_off_megatron_line_raises(tmp_path: Path) -> None:
    file = write_megatron(tmp_path / "traces", LOAD) / "router_trace_rank1.jsonl"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match=r"router_trace_rank1\.jsonl is damaged at line 6: .*--allow-damaged"):
        read_load(file.parent)
    with pytest.warns(UserWarning, match="damaged at line 6"), pytest.warns(UserWarning, match="1 of 3 steps lack"):
        assert np.array_equal(read_load(file.parent, allow_damaged=True), LOAD[:2])


HEAD = "step,layer,expert,tokens\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "",
            r"a\.csv begins with the line ''; its columns must be step, layer, expert, tokens, or step, layer",
        ),
        ("a.csv", "layer,expert\n0,1\n", r"a\.csv begins with the line 'layer,expert'; its columns must be"),
        ("a.csv", HEAD, r"a\.csv has no line behind its first"),
        ("a.csv", HEAD + "0,0,0\n", r"a\.csv, line 2: it has 3 columns, and the first line names 4"),
        ("a.csv", HEAD + "0,0,0,many\n", r"a\.csv, line 2: .*'many'; steps, layers, experts and tokens are whole"),
        ("a.csv", HEAD + "0,0,0,1.5\n", r"a\.csv, line 2: .*'1.5'"),
        ("a.csv", HEAD + f"0,0,0,{2**63}\n", r"a\.csv, line 2: it has a number that int64 does not hold"),
        ("a.csv", HEAD + "0,0,0,-1\n", r"a\.csv has -1 tokens for an expert; zero is the least"),
        ("a.csv", HEAD + "0,0,-1,1\n", r"a\.csv names experts -1 to -1; ids are 0 to"),
        ("a.csv", HEAD + "0,0,99999,1\n", r"a\.csv names experts 99999 to 99999; ids are 0 to 65535"),
        ("a.csv", HEAD + "0,0,1,1\n0,0,1,2\n", r"a\.csv has 2 lines for step 0, layer 0, expert 1; there must be one"),
        ("a.csv", HEAD + "0,0,1,1\n0,1,1,2\n1,1,0,2\n", r"a\.csv has no lines for step 1, layer 0; there must be one"),
        ("a.csv", "step,layer,a\n0,0,1\n0,0,2\n", r"a\.csv has 2 lines for step 0, layer 0"),
        ("a.csv", "step,layer,a\n0,0,1\n1,1,2\n", r"a\.csv has no lines for step 0, layer 1; there must be one"),
        ("a.csv", 'step,layer,a\n0,0,"\0' + "1" * 200_000, r"a\.csv, line \d: "),
        ("a.jsonl", "", r"a\.jsonl holds no record of a routed token"),
        ("a.jsonl", "step,layer\n", r"a\.jsonl is damaged at line 1: "),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1: .*; Megatron's tracer writes step, layer and top_indices"),
        ("a.jsonl", '{"step": 1, "layer": 2}\n', r"a\.jsonl, line 1: it lacks 'top_indices'; Megatron's tracer writes"),
        (
            "a.jsonl",
            '{"step": 1, "layer": 2, "top_indices": [1, 2]}\n',
            r"line 1: top_indices has shape \[2\] and dtype",
        ),
        ("a.jsonl", '{"step": 1, "layer": 2, "top_indices": [[0.5]]}\n', r"line 1: top_indices has shape \[1, 1\] and"),
        ("a.jsonl", '{"step": 1, "layer": 2, "top_indices": [[1], [2, 3]]}\n', r"line 1: .*; Megatron's tracer writes"),
        (
            "a.jsonl",
            '{"step": 1, "layer": 2, "top_indices": [[-2]]}\n',
            r"line 1: it routes to experts -2 to -2, and ids",
        ),
        ("a.jsonl", '{"step": "x", "layer": 2, "top_indices": [[1]]}\n', r"a\.jsonl, line 1: "),
        (
            "a.jsonl",
            '{"step": 0, "layer": 1, "top_indices": [[0]]}\n{"step": 1, "layer": 2, "top_indices": [[0]]}\n',
            r"a\.jsonl has no step with all layers or ranks that it names; no step can be replayed",
        ),
        ("a.npz", "no zip", r"a\.npz is no \.npz file: it begins with b'no'"),
        ("a.npz", "PK\3\4 cut off", r"a\.npz is damaged, or no file of NumPy's"),
        ("a.txt", "hello", r"a\.txt is not a trace, as EPLBCallback\(trace=\.\.\.\) writes one"),
    ],
)
def test_read_load_of_invalid_text_raises(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_load(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, r"a\.npz holds 0 arrays \(none\); one array \[steps, layers, experts\] is wanted"),
        ({"a": LOAD, "b": LOAD}, r"a\.npz holds 2 arrays \(a, b\); one array \[steps, layers, experts\] is wanted"),
        ({"a": LOAD[0]}, r"a\.npz, array 'a', has shape \[2, 4\]; \[steps, layers, experts\] is wanted"),
        ({"a": LOAD[:0]}, r"a\.npz, array 'a', has shape \[0, 2, 4\]"),
        ({"a": LOAD + 0.5}, r"array 'a', holds other things than whole numbers \(dtype float64\); tokens are counted"),
        ({"a": LOAD > 0}, r"array 'a', holds other things than whole numbers \(dtype bool\)"),
        ({"a": np.full((1, 1, 1), np.nan)}, r"array 'a', holds other things than whole numbers"),
        ({"a": -LOAD}, r"array 'a', has -8 tokens for an expert; zero is the least"),
        ({"a": np.full((1, 1, 4), 2**62)}, r"array 'a', has more tokens in all than int64 counts"),
        ({"a": np.array([[[None]]])}, r"a\.npz is damaged, or holds something else than plain arrays"),
        ({"pre_logical_loads": LOAD[0]}, r"a\.npz lacks metadata, layers, microbatches, which chunks of UltraEP's"),
    ],
)
def test_read_load_of_invalid_archive_raises(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_load(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"layers": np.arange(2)},
            r"has 3 records of loads, and layers of shape \[2\] and microbatches of shape \[3\];",
        ),
        ({"microbatches": np.zeros(3)}, r"there must be a whole number of each for every record"),
        ({"pre_logical_loads": np.ones((3, 5), dtype=int)}, r"chunk000001\.npz has 5 experts, and the chunks before 4"),
        ({"pre_logical_loads": np.ones(3, dtype=int)}, r"pre_logical_loads, has shape \[1, 3\]"),
    ],
)
def test_read_load_of_unfit_chunk_raises(changed: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    chunk = write_ultra_ep(tmp_path, LOAD) / "epg0_gr0_r0_17.chunk000001.npz"
    np.savez(chunk, **(dict(np.load(chunk)) | changed))
    with pytest.raises(ValueError, match=message):
        read_load(tmp_path)


def test_read_load_of_cut_off_array_raises(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "load.npy", LOAD)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"load\.npy is damaged, or no file of NumPy's"):
        read_load(path)


@pytest.mark.parametrize("change", [lambda b: b.replace(b"}", b"("), lambda b: b.replace(b"(3, 2", b"(3000000000, 2")])
def test_read_load_of_damaged_header_raises(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = write_npy(tmp_path / "load.npy", LOAD)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"load\.npy is damaged, or no file of NumPy's"):
        read_load(path)


def test_read_load_of_other_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither router_trace_rank\*\.jsonl, as Megatron writes them, nor"):
        read_load(tmp_path)


def test_read_load_too_large_for_memory_raises(tmp_path: Path) -> None:
    lines = [f"{step},0,{65_535 * (step == 0)},1" for step in range(9_000)]
    (tmp_path / "a.csv").write_text(HEAD + "\n".join(lines))
    with pytest.raises(
        ValueError, match="9000 steps of 1 layers with 65536 experts: 589,824,000 counts, and 536,870,912"
    ):
        read_load(tmp_path / "a.csv")
