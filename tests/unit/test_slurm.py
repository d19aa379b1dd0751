"""The Slurm script, with stand-ins for Slurm's commands; bash and its signals are real."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "slurm" / "train.sbatch"
TORCHRUN = """#!/usr/bin/env bash
echo "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE $*" > arguments
trap 'echo saved > saved; [[ -e end ]]; exit' TERM
echo $$ > agent
for _ in $(seq 300); do sleep 0.02; [[ -e end ]] && exit 0; done
"""
COMMANDS = {
    "srun": '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=0 exec "$@"\n',
    "scancel": '#!/usr/bin/env bash\necho "$*" > scancel\nkill -TERM "$(cat agent)"\n',
    "scontrol": '#!/usr/bin/env bash\n[[ $1 == show ]] && echo "node7" || echo "$*" > requeued\n',
}


@pytest.fixture
def job(request, tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for path, text in {".venv/bin/torchrun": TORCHRUN, **COMMANDS}.items():
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    world = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "32", "DATASET": "my data",
    }  # fmt: skip
    world |= getattr(request, "param", {})
    process = subprocess.Popen(["bash", str(SCRIPT)], env=world)
    deadline = time.monotonic() + 20
    while not (tmp_path / "agent").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process, tmp_path
    process.kill()


def test_before_the_time_limit_the_run_is_saved_and_requeued(job):
    process, folder = job
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 1
    assert (folder / "scancel").read_text() == "--signal=TERM 12.0\n"
    assert (folder / "saved").exists()
    assert (folder / "requeued").read_text() == "requeue 12\n"


def test_a_run_that_finishes_at_the_time_limit_is_not_requeued(job):
    process, folder = job
    (folder / "end").touch()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    assert not (folder / "requeued").exists()


def test_on_preemption_the_script_waits_for_the_agents_and_slurm_requeues(job):
    process, folder = job
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    os.kill(int((folder / "agent").read_text()), signal.SIGTERM)  # as Slurm sends it to every task
    assert process.wait(20) == 1
    assert (folder / "saved").exists()
    assert not (folder / "requeued").exists()


def test_a_finished_run_is_not_requeued(job):
    process, folder = job
    (folder / "end").touch()
    assert process.wait(20) == 0
    assert not (folder / "requeued").exists()
    assert (folder / "arguments").read_text().split(" ", 3)[:3] == ["1", "--nnodes", "2"]
    assert "--rdzv-endpoint node7:29400 --rdzv-conf is_host=1" in (folder / "arguments").read_text()
    assert (folder / "arguments").read_text().endswith("--dataset my data\n")


@pytest.mark.parametrize("job", [{"SLURM_RESTART_COUNT": "1"}], indirect=True)
def test_a_requeued_job_resumes_whatever_the_run_file_sets(job):
    _, folder = job
    assert (folder / "arguments").read_text().endswith("--dataset my data --resume auto\n")
