"""Nodes that are killed or preempted: ``torchrun`` starts the others again, from the newest checkpoint."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import distributed as dist

from tests.elastic import read_steps, reference
from tests.fidelity import TOLERANCE

REPOSITORY = Path(__file__).parents[1]
STEPS, EVERY, SECONDS_A_STEP = 40, 5, 0.1
SECONDS = 200


class Agents:
    """Four agents of ``torchrun`` with one worker each, as on four nodes, and a store that outlives each of them."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder = folder
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        command = f"""{sys.executable} -m torch.distributed.run --nnodes 2:4 --nproc-per-node 1 --max-restarts 3
            --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{self._store.port} --rdzv-id elastic
            --rdzv-conf is_host=0,last_call_timeout=1 --local-addr 127.0.0.1 --monitor-interval 0.1
            {REPOSITORY}/tests/elastic.py {kind} {folder} {STEPS} {EVERY} {SECONDS_A_STEP}"""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        self._processes = [
            subprocess.Popen(
                command.split(),
                env=environment,
                cwd=folder,
                stdout=(folder / f"agent{i}.log").open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for i in range(4)
        ]

    def worker_of(self, agent: int) -> int:
        """Process of an agent's present worker."""
        return int((self.folder / f"{self._processes[agent].pid}.pid").read_text())

    def kill(self, agent: int) -> None:
        """End a node as a power cut does."""
        for process in (self._processes[agent].pid, self.worker_of(agent)):
            os.kill(process, signal.SIGKILL)

    def preempt(self, agent: int) -> None:
        """End a node as a scheduler does: the agent passes SIGTERM on, and kills its worker after 30 seconds."""
        os.kill(self._processes[agent].pid, signal.SIGTERM)

    def wait_for(self, condition: Callable[[], bool], words: str) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, f"waited {SECONDS} s for {words}\n{self.logs()}"
            time.sleep(0.02)

    def wait(self) -> list[int]:
        """Wait for all agents, and return their exit codes."""
        self.wait_for(lambda: all(process.poll() is not None for process in self._processes), "the end")
        return [process.returncode for process in self._processes]

    def logs(self) -> str:
        return "\n".join(file.read_text()[-3000:] for file in sorted(self.folder.glob("agent*.log")))

    def stop(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for file in self.folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)


def check_node_that_ends(kind: str, ends_by: str, seed: int, folder: Path) -> str:
    """End a node at a random step, compare with one process, and return what was lost and how long it took."""
    chance = random.Random(f"{kind} {ends_by} {seed}")
    agent, step = chance.randrange(4), chance.randrange(6, 25)
    agents = Agents(kind, folder)
    try:
        agents.wait_for(lambda: any(line["step"] >= step for line in read_steps(folder)), f"step {step}")
        getattr(agents, ends_by)(agent)
        killed = time.time()
        agents.wait_for(lambda: any(line["ranks"] < 4 for line in read_steps(folder)), "the others")
        codes = agents.wait()
    finally:
        agents.stop()
    assert [code == 0 for code in codes] == [i != agent for i in range(4)], agents.logs()
    lines = read_steps(folder)
    before, after = ([line for line in lines if (line["ranks"] == 4) == is_before] for is_before in (True, False))
    assert {line["ranks"] for line in after} == {3}
    lost = before[-1]["step"] + 1 - after[0]["step"]
    assert 0 <= lost <= (EVERY if ends_by == "kill" else 0)
    assert [line["step"] for line in after] == list(range(after[0]["step"], STEPS))
    expected = reference(STEPS)
    assert max(abs(line["loss"] - expected[line["step"]]) for line in lines) < TOLERANCE
    seconds = after[0]["time"] - killed
    return f"{kind}, {ends_by} of node {agent} after step {before[-1]['step']}: {lost} lost, {seconds:.1f} s"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["ddp", "sharded"])
@pytest.mark.parametrize("ends_by", ["kill", "preempt"])
def test_node_that_ends_at_random_step_leaves_others_training_as_uninterrupted(
    ends_by: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = check_node_that_ends(kind, ends_by, 0, tmp_path)
    with capsys.disabled():
        print(f"\n{words}")
