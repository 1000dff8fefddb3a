"""Traces are written as a run goes, and read back also from a run that was killed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_eplb import EPLBCallback
from lightning_eplb.trace import TraceWriter, read_trace
from tests.fidelity import SEQUENCES, ShufflePolicy, trainer_for
from tests.models import SEQUENCE, LanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

STEPS = [np.array([[1, 2], [3, 4]]), np.array([[0, 2**33], [0, 0]]), np.array([[5, 6], [7, 8]])]


def written(path: Path, **arguments: int) -> Path:
    writer = TraceWriter(path, **arguments)
    for step in STEPS:
        writer.append(torch.from_numpy(step))
    return path  # not closed, as by a run that was killed


def test_read_back_while_it_is_written(tmp_path: Path) -> None:
    steps = read_trace(written(tmp_path / "new" / "trace.npy"))
    assert steps.dtype == np.int64
    assert np.array_equal(steps, np.stack(STEPS))


def test_replaced_or_continued(tmp_path: Path) -> None:
    path = written(written(tmp_path / "trace.npy"))
    assert len(read_trace(path)) == 3
    assert len(read_trace(written(path, keep=9))) == 6
    assert np.array_equal(read_trace(written(path, keep=2)), np.stack(STEPS[:2] + STEPS))
    path.write_bytes(path.read_bytes()[:-1])
    assert len(read_trace(written(path, keep=9))) == 7, "a step that was cut off is written over"


@pytest.mark.parametrize("keep", [0, 2])
def test_what_is_no_trace_is_not_written_over(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(ValueError, match=r"notes\.txt' is a file that holds something else; name another"):
        TraceWriter(path, keep=keep)
    assert path.read_text() == "precious"
    with pytest.raises(ValueError, match=r"trace='.*notes\.txt/trace\.npy' can't be written"):
        TraceWriter(path / "trace.npy")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_ends_the_trace_and_not_the_training() -> None:
    writer = TraceWriter("/dev/full")
    with pytest.warns(UserWarning, match="trace='/dev/full' ends here, it can't be written: No space left on device"):
        writer.append(STEPS[0])
    writer.append(STEPS[1])
    writer.close()


@pytest.mark.parametrize("lost", [1, 20, 31, 32, 100, 140])
def test_a_last_step_that_was_cut_off_is_left_out(lost: int, tmp_path: Path) -> None:
    path = written(tmp_path / "trace.npy")
    path.write_bytes(path.read_bytes()[:-lost])
    assert np.array_equal(read_trace(path), np.stack(STEPS[:2]))


@pytest.mark.parametrize("content", [b"", b"step,load\n1,2\n", b"\x93NUMPY"])
def test_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="other is not a trace"):
        read_trace(path)


def train(folder: str) -> np.ndarray:
    callback = EPLBCallback(2, policy=ShufflePolicy(), step_interval=1, trace=Path(folder, "trace.npy"))
    trainer = trainer_for(2, max_steps=4, accumulate_grad_batches=2, callbacks=[callback])
    trainer.fit(LanguageModel(hugging_face_model("mixtral"), "adamw"), loader(token_batches(50), SEQUENCES))
    assert callback.balancer is not None
    return callback.balancer.load.steps().numpy()


def test_a_run_records_every_step(workers: Workers, tmp_path: Path) -> None:
    window, _ = workers.run(2, train, str(tmp_path))
    trace = read_trace(tmp_path / "trace.npy")
    assert np.array_equal(trace, window)
    assert trace.sum(axis=2).tolist() == [[2 * 2 * SEQUENCES * SEQUENCE * 2] * 2] * 4  # micro-batches, ranks, top-2
