"""Traces are written as a run goes, and read back; a damaged one is never read short or cut without a word."""

import io
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_eplb import EPLBCallback
from lightning_eplb.simulation.trace import TraceWriter, read_trace
from tests.fidelity import SEQUENCES, ShufflePolicy, trainer_for
from tests.models import SEQUENCE, LanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

STEPS = [np.array([[1, 2], [3, 4]]), np.array([[0, 2**33], [0, 0]]), np.array([[5, 6], [7, 8]])]


def written(path: Path, **arguments: int) -> Path:
    writer = TraceWriter(path, **arguments)
    for step in STEPS:
        writer.append(torch.from_numpy(step))
    return path  # not closed, as by a run that was killed


def test_trace_while_written_can_be_read(tmp_path: Path) -> None:
    steps = read_trace(written(tmp_path / "new" / "trace.npy"))
    assert steps.dtype == np.int64
    assert np.array_equal(steps, np.stack(STEPS))


def test_trace_with_keep_is_continued(tmp_path: Path) -> None:
    path = written(written(tmp_path / "trace.npy"))
    assert len(read_trace(path)) == 3
    assert len(read_trace(written(path, keep=3))) == 6
    assert np.array_equal(read_trace(written(path, keep=2)), np.stack(STEPS[:2] + STEPS))
    with pytest.warns(UserWarning, match="goes on behind 5 steps, and the run resumes behind 9: the steps between are"):
        written(path, keep=9)
    assert len(read_trace(path)) == 8


def test_trace_is_read_by_numpy(tmp_path: Path) -> None:
    with written(tmp_path / "trace.npy").open("rb") as file:
        arrays = [np.load(file, allow_pickle=False) for _ in STEPS]
        assert file.read() == b""
    assert [array.dtype.str for array in arrays] == ["<u4", "<u8", "<u4"]
    assert all(np.array_equal(array, step) for array, step in zip(arrays, STEPS, strict=True))


def by_numpy(path: Path, *arrays: Any) -> Path:
    """A file as ``numpy.save`` and earlier versions write it, without checksums."""
    with path.open("wb") as file:
        for array in arrays:
            np.save(file, array)
    return path


def test_trace_written_by_numpy_is_read(tmp_path: Path) -> None:
    path = by_numpy(tmp_path / "a.npy", *(np.asfortranarray(STEPS[0]).astype(kind) for kind in ("u1", "<i2", "<i8")))
    assert np.array_equal(read_trace(path), np.stack([STEPS[0]] * 3))


@pytest.mark.parametrize("with_checksum", [True, False])
@pytest.mark.parametrize("step", [0, 10, 19])
def test_trace_with_flipped_bit_raises(with_checksum: bool, step: int, tmp_path: Path) -> None:
    """All bits of a header, and with a checksum also those of the counts."""
    path = tmp_path / "trace.npy"
    steps = [(np.arange(12).reshape(3, 4) + i).astype("<u4") for i in range(20)]
    if with_checksum:
        writer = TraceWriter(path)
        for load_YL in steps:
            writer.append(load_YL)
    else:
        by_numpy(path, *steps)
    whole = path.read_bytes()
    size = len(whole) // 20
    assert size == 128 + 48
    outcomes = Counter()
    for bit in range(8 * (size if with_checksum else 128)):
        damaged = bytearray(whole)
        damaged[step * size + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read_trace(path)
        except ValueError as error:
            # A flipped bit in the shape of the first step can be a step that is whole, and the next one is missed.
            at = (0, 1) if step == 0 and not with_checksum else (step,)
            outcomes[any(f"damaged at step {each}, byte " in str(error) for each in at)] += 1
        else:
            outcomes["read"] += 1
    assert outcomes == {True: 8 * (size if with_checksum else 128)}


def test_trace_with_damage_needs_allow_damaged(tmp_path: Path) -> None:
    path = written(written(tmp_path / "trace.npy"), keep=3)
    damaged = bytearray(path.read_bytes())
    damaged[3 * 128 + 16 + 32 + 16 + 130] ^= 1  # a count of the fourth step
    path.write_bytes(damaged)
    message = (
        r"trace\.npy is damaged at step 3, byte 448: its counts differ from their checksum; the 3 steps before it are"
        r" whole"
    )
    with pytest.raises(ValueError, match=message + r"; read_trace\(\.\.\., allow_damaged=True\), or --allow-damaged"):
        read_trace(path)
    with pytest.warns(UserWarning, match=message + ", and no others are read"):
        assert np.array_equal(read_trace(path, allow_damaged=True), np.stack(STEPS))


@pytest.mark.parametrize("name", ["trace.npy", "trace"])
@pytest.mark.parametrize(("keep", "kept"), [(9, 2), (2, 2), (1, 1)])
def test_trace_writer_on_damaged_trace_sets_it_aside(keep: int, kept: int, name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name)
    torn = path.read_bytes()[:-1]
    path.write_bytes(torn)
    with pytest.warns(UserWarning, match=rf"was damaged at step 2, byte 304: .* begins with {kept} whole steps of it"):
        written(path, keep=keep)
    assert np.array_equal(read_trace(path), np.stack(STEPS[:kept] + STEPS))
    aside = path.with_name(name.replace("trace", "trace.damaged-1"))
    assert aside.read_bytes() == torn
    path.write_bytes(torn)
    with pytest.warns(UserWarning, match="damaged-2"):
        written(path, keep=keep)
    assert aside.read_bytes() == torn


def test_trace_writer_on_link_sets_target_aside(tmp_path: Path) -> None:
    path = written(tmp_path / "trace.npy")
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "link").mkdir()
    (tmp_path / "link/trace.npy").symlink_to(path)
    with pytest.warns(UserWarning, match=r"now '.*/trace\.damaged-1\.npy'"):
        written(tmp_path / "link/trace.npy", keep=2)
    assert len(read_trace(path)) == 5
    assert (tmp_path / "trace.damaged-1.npy").exists()


@pytest.mark.parametrize("keep", [0, 2])
def test_trace_writer_on_other_file_raises(keep: int, tmp_path: Path) -> None:
    weights = by_numpy(tmp_path / "weights.npy", np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"weights\.npy' is a file that holds something else; name another"):
        TraceWriter(weights, keep=keep)
    assert np.load(weights).shape == (2, 3)
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(ValueError, match=r"notes\.txt' is a file that holds something else; name another"):
        TraceWriter(path, keep=keep)
    assert path.read_text() == "precious"
    with pytest.raises(ValueError, match=r"trace='.*notes\.txt/trace\.npy' can't be written"):
        TraceWriter(path / "trace.npy")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_trace_writer_on_full_disk_warns() -> None:
    writer = TraceWriter("/dev/full")
    with pytest.warns(UserWarning, match="trace='/dev/full' ends here, it can't be written: No space left on device"):
        writer.append(STEPS[0])
    writer.append(STEPS[1])
    writer.close()


def test_trace_writer_on_full_disk_leaves_whole_steps(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "trace.npy")
    writer.append(STEPS[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.warns(UserWarning, match=r"trace\.npy' ends here, it can't be written: File too large"):
            writer.append(STEPS[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert np.array_equal(read_trace(tmp_path / "trace.npy"), np.stack(STEPS[:1]))


@pytest.mark.parametrize("load_YL", [[[-1, 2]], [[0.5, 1.0]], [1, 2], [[True, False]], [[]]])
def test_trace_writer_with_invalid_load_raises(load_YL: list, tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "trace.npy")
    with pytest.raises(ValueError, match=r"load_YL has shape .*; it must be \[layers, experts\], whole numbers"):
        writer.append(np.array(load_YL))
    assert (tmp_path / "trace.npy").read_bytes() == b""


def test_trace_writer_with_other_shape_warns_and_ends(tmp_path: Path) -> None:
    path = written(tmp_path / "trace.npy")
    writer = TraceWriter(path, keep=3)
    with pytest.warns(UserWarning, match=r"ends here: its steps have shape \[2, 2\], and this one has \[3, 2\]"):
        writer.append(np.ones((3, 2), dtype=int))
    assert len(read_trace(path)) == 3


@pytest.mark.parametrize("lost", [1, 20, 31, 32, 100, 136, 142])
def test_trace_with_last_step_cut_off_raises(lost: int, tmp_path: Path) -> None:
    path = written(tmp_path / "trace.npy")
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(ValueError, match=rf"step 2, byte 304: the file ends {144 - lost} bytes behind the beginning"):
        read_trace(path)
    with pytest.warns(UserWarning, match="the 2 steps before it are whole"):
        assert np.array_equal(read_trace(path, allow_damaged=True), np.stack(STEPS[:2]))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


HUGE = npy(np.ones((3, 4), dtype="<u4")).replace(b"(3, 4), }" + 15 * b" ", b"(3000000000, 4000000), }")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "other is empty: it has no step of a trace"),
        (b"step,load\n1,2\n", r"other is not a trace, .* it begins with b'step,loa', and an array with b'"),
        (b"\x93NUMPY", "other is not a trace, .* the file ends 6 bytes behind the beginning of the step"),
        (npy(np.ones((3, 4))), "other is not a trace, .* its header is .*<f8"),
        (npy(np.ones(3, dtype=int)), "other is not a trace, .* its header is .*shape"),
        (npy(np.ones((3, 4), dtype=">u4")), "other is not a trace, .* its header is .*>u4"),
        (npy(np.full((3, 4), -5)), "other is not a trace, .* it has -5 tokens for an expert; zero is the least"),
        (npy(np.full((3, 4), 2**64 - 1, dtype=np.uint64)), "other is not a trace, .* more than int64 counts"),
        (npy(np.full((3, 4), 2**62)), "other has more tokens in all than int64 counts"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b" " * 70_000, "other is not a trace, .* its header is "),
        (HUGE, "other is not a trace, .* which has 48000000000000128 bytes"),
        (npy(np.ones((3, 4), dtype=int)) + npy(np.ones((3, 5), dtype=int)), r"step 1, byte 224: it has shape \[3, 5\]"),
    ],
)
def test_read_trace_of_other_file_raises(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    for allow_damaged in (False, True)[: 1 + ("is not" in message)]:
        with pytest.raises(ValueError, match=message):
            read_trace(path, allow_damaged=allow_damaged)


def test_read_trace_of_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file, as a trace is"):
        read_trace(tmp_path)


def train(folder: str) -> np.ndarray:
    callback = EPLBCallback(2, policy=ShufflePolicy(), step_interval=1, trace=Path(folder, "trace.npy"))
    trainer = trainer_for(2, max_steps=4, accumulate_grad_batches=2, callbacks=[callback])
    trainer.fit(LanguageModel(hugging_face_model("mixtral"), "adamw"), loader(token_batches(50), SEQUENCES))
    assert callback.balancer is not None
    return callback.balancer.load.steps().numpy()


def fails(path: str) -> str:
    callback = EPLBCallback(2, trace=path)
    module = LanguageModel(hugging_face_model("mixtral"), "adamw")
    with pytest.raises(ValueError, match="trace=") as raised:
        trainer_for(2, max_steps=1, callbacks=[callback]).fit(module, loader(token_batches(50), SEQUENCES))
    return str(raised.value)


def test_trace_that_rank_zero_cannot_write_raises_on_all_ranks(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    messages = workers.run(2, fails, str(tmp_path / "notes.txt"))
    assert messages == [f"trace={str(tmp_path / 'notes.txt')!r} is a file that holds something else; name another"] * 2


def test_trace_of_training_has_every_step(workers: Workers, tmp_path: Path) -> None:
    window, _ = workers.run(2, train, str(tmp_path))
    trace = read_trace(tmp_path / "trace.npy")
    assert np.array_equal(trace, window)
    assert trace.sum(axis=2).tolist() == [[2 * 2 * SEQUENCES * SEQUENCE * 2] * 2] * 4  # micro-batches, ranks, top-2
