"""Two nodes: network namespaces of this machine, joined by a virtual cable, with a torchrun agent in each."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megasft import job
from megasft.config.schema import load_config
from tests.faults.test_ends import BIN, MISBEHAVE, ROOT, steps, wait_until
from tests.parallel.resume import lines
from tests.support.world import make_world

ADDRESSES = ("10.77.0.1", "10.77.0.2")
STEPS = 40


class Node:
    """A node: a network namespace with one interface, `cable`, and a torchrun agent."""

    def __init__(self, number: int, logs: Path, variables: dict[str, str]) -> None:
        self.address, self.namespace = ADDRESSES[number], f"megasft-{os.getpid()}-{number}"
        self._number, self._logs, self._environment = number, logs, variables
        self.agents: list[subprocess.Popen] = []

    @property
    def agent(self) -> subprocess.Popen:
        return self.agents[-1]

    def run(self, *command: str) -> list[str]:
        """The command, to be run on this node."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def begin(self, run_file: Path, *settings: str) -> None:
        """Start the agent, as a user would on each node."""
        overrides = [argument for setting in settings for argument in ("--set", setting)]
        command = self.run(
            str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--local-addr", self.address,
            "--rdzv-conf", f"is_host={int(self._number == 0)}",
            *MISBEHAVE, "--config", str(run_file), *overrides,
        )  # fmt: skip
        with open(self._logs / f"node{self._number}-{len(self.agents)}", "wb") as log:
            own = {"GLOO_SOCKET_IFNAME": "cable", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            self.agents.append(subprocess.Popen(
                command, cwd=ROOT, env=self._environment | own, stdout=log, stderr=log, start_new_session=True
            ))  # fmt: skip

    def processes(self) -> list[int]:
        """The ids of all processes on this node."""
        answer = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        return [int(line) for line in answer.stdout.split()]

    def power_off(self) -> None:
        """Kill all processes on the node."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.agent.wait()

    def said(self) -> str:
        """Everything that its agents and ranks have written."""
        return "".join(path.read_text() for path in sorted(self._logs.glob(f"node{self._number}-*")))


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes(tmp_path, environment) -> Iterator[tuple[Node, Node]]:
    if shutil.which("ip") is None:
        pytest.skip("two nodes are made of network namespaces, which need the command ip of iproute2")
    logs = tmp_path / "logs"
    logs.mkdir()
    pair = (Node(0, logs, environment), Node(1, logs, environment))
    try:
        try:
            ends = [f"m{os.getpid()}-{number}" for number in range(2)]
            for node in pair:
                ip("netns", "add", node.namespace)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for node, end in zip(pair, ends, strict=True):
                ip("link", "set", end, "netns", node.namespace, "name", "cable")
                ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", "cable")
                for link in ("lo", "cable"):
                    ip("-n", node.namespace, "link", "set", link, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"two nodes are made of network namespaces, which cannot be made here: {error.stderr.strip()}")
        yield pair
    finally:
        for node in pair:
            if node.agents:
                for pid in node.processes():
                    os.kill(pid, signal.SIGKILL)
            for agent in node.agents:
                agent.wait()
            subprocess.run(["ip", "netns", "delete", node.namespace], capture_output=True)


def run(run_file: Path, output_dir: str) -> None:
    job.run(load_config(run_file, [f"job.output_dir={output_dir}", "tags.fault=''"]))


@pytest.fixture(scope="module")
def one_node(tmp_path_factory, ranks) -> Path:
    """A folder with a job for two data-parallel ranks and, in `alone`, its run on one node."""
    folder = tmp_path_factory.mktemp("nodes")
    run_file = make_world(folder, data=2, steps=STEPS)
    ranks(2, run, run_file, str(folder / "alone"))
    return folder


def finish(pair: tuple[Node, Node], back: Callable[[], None]) -> None:
    """Wait for the end of the job. Call `back` when an agent of the second node has failed."""
    deadline = time.monotonic() + 180
    while any(node.agent.poll() is None for node in pair):
        if pair[1].agent.poll() not in (None, 0) and pair[0].agent.poll() is None:
            back()
        assert time.monotonic() < deadline, said(pair)
        time.sleep(0.2)
    assert [node.agent.returncode for node in pair] == [0, 0], said(pair)


def said(pair: tuple[Node, Node]) -> str:
    return "\n".join(f"--- node {node.address}\n{node.said()[-6000:]}" for node in pair)


def assert_as_on_one_node(folder: Path, pair: tuple[Node, Node]) -> None:
    """Assert the same metrics, without gaps or duplicates, and a bitwise equal adapter."""
    alone, run_dir = folder / "alone", folder / "run"
    assert lines(run_dir) == lines(alone), said(pair)
    wanted, got = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (alone, run_dir))
    assert wanted.keys() == got.keys()
    assert all(value.equal(got[name]) for name, value in wanted.items())


def begun(pair: tuple[Node, Node], folder: Path, *settings: str) -> None:
    """Start the job and wait for its first steps."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    for node in pair:
        node.begin(folder / "job.toml", "tags.fault=dawdle", "job.timeout_minutes=0.25", *settings)
    wait_until(lambda: steps(folder) > 4 or any(node.agent.poll() is not None for node in pair))
    assert steps(folder) > 4, said(pair)


@pytest.mark.slow
def test_a_run_survives_a_node_that_reboots(one_node, nodes):
    begun(nodes, one_node)
    nodes[1].power_off()
    nodes[1].begin(one_node / "job.toml")
    finish(nodes, back=lambda: pytest.fail(said(nodes)))
    assert "resuming from" in nodes[0].said()
    assert_as_on_one_node(one_node, nodes)


@pytest.mark.slow
def test_a_run_survives_a_temporary_network_failure(one_node, nodes):
    begun(nodes, one_node)
    ip("-n", nodes[1].namespace, "link", "set", "cable", "down")
    wait_until(lambda: "no progress" in nodes[0].said() and "no answer" in nodes[1].said(), 90)
    ip("-n", nodes[1].namespace, "link", "set", "cable", "up")
    finish(nodes, back=lambda: nodes[1].begin(one_node / "job.toml"))
    assert "resuming from" in nodes[0].said()
    assert_as_on_one_node(one_node, nodes)
