"""scripts/slurm/: a job that is asked to stop saves, and queues itself again before its time limit alone."""

import os
import signal
import subprocess
import time

import pytest

from tests import ROOT

STUBS = {
    # Of several nodes the tasks run one after another here: each notes what it was given.
    "srun": """#!/bin/bash
echo "$*" >> "$NOTED.srun"
while [ "${1:0:2}" = -- ]; do shift; done
[ "$SLURM_NNODES" = 1 ] || SLURM_NODEID=1 "$@"
SLURM_NODEID=0 exec "$@"
""",
    "scontrol": """#!/bin/bash
[ "$1" = show ] && { echo node-a; echo node-b; exit; }
echo "scontrol $*" >> "$NOTED"
""",
}
LAUNCHER = """
echo "rank $NODE_RANK of $NUM_NODES at ${MAIN_ADDRESS:-} ${MAIN_PORT:-} with ${ACCELERATE_CONFIG:-none}: $*" >> "$NOTED"
trap 'echo told >> "$NOTED"; told=yes' TERM
[ "$1" = trains ] && touch "$NOTED.up"
while [ "$1" = trains ] && [ -z "$told" ]; do sleep 0.1; done
[ -z "$told" ] || { sleep 1; echo saved >> "$NOTED"; }
exit "${2:-0}"
"""


@pytest.fixture
def job(tmp_path):
    for name, content in STUBS.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "launcher.sh").write_text(LAUNCHER)
    noted = tmp_path / "noted"

    def start(name: str, *words: str, nodes: int = 1, send: list[int] | None = None, to_all: bool = False, **more: str):
        """Returns the exit code, and the lines that were noted."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTED": str(noted), "SLURM_NNODES": str(nodes)}
        environment |= {"SLURM_JOB_ID": "30007", "SLURM_JOB_NODELIST": "node-[a-b]", "DMDR": str(ROOT)} | more
        command = ["bash", str(ROOT / "scripts" / "slurm" / name), str(tmp_path / "launcher.sh"), *words]
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True)
        deadline = time.monotonic() + 60
        while send and not noted.with_suffix(".up").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        for number in send or ():
            (os.killpg if to_all else os.kill)(process.pid, number)
            time.sleep(0.3)
        return process.wait(timeout=60), noted.read_text().splitlines()

    return start


def test_before_the_time_limit_it_saves_and_is_queued_again(job):
    code, noted = job("one_node.sbatch", "trains", send=[signal.SIGUSR1])
    assert code == 0 and noted[1:] == ["told", "saved", "scontrol requeue 30007"]
    assert noted[0] == "rank 0 of 1 at   with none: trains"


def test_sigterm_to_the_whole_job_is_one_request_and_no_new_job(job):
    """The launcher's processes are told by Slurm, and by the job's script."""
    code, noted = job("one_node.sbatch", "trains", send=[signal.SIGTERM, signal.SIGTERM], to_all=True)
    assert code == 0 and noted.count("saved") == 1  # a late signal may be noted after it
    assert not any("requeue" in line for line in noted)


@pytest.mark.parametrize("name,nodes", [("one_node.sbatch", 1), ("nodes.sbatch", 2)])
def test_the_cores_of_the_job_are_named_to_srun(job, tmp_path, name, nodes):
    """Slurm 22.05 to 23.02 does not hand them on by itself; a site that gives cores per GPU sets no such variable."""
    job(name, "ends", nodes=nodes, SLURM_CPUS_PER_TASK="64")
    job(name, "ends", nodes=nodes, SLURM_CPUS_PER_TASK="")
    first, second = (tmp_path / "noted.srun").read_text().splitlines()
    assert " --cpus-per-task=64 " in first and "--cpus-per-task" not in second


@pytest.mark.parametrize("words,send,code", [(["ends"], [], 0), (["trains", "5"], [signal.SIGUSR1], 5)], ids=str)
def test_a_run_that_ends_by_itself_or_cannot_save_is_not_queued_again(job, words, send, code):
    ended, noted = job("one_node.sbatch", *words, send=send)
    assert ended == code and not any("requeue" in line for line in noted)


def test_nodes_meet_at_the_first(job):
    where = "of 2 at node-a 30007 with scripts/accelerate/nodes_fsdp2.yaml: ends"
    assert job("nodes.sbatch", "ends", nodes=2) == (0, [f"rank 1 {where}", f"rank 0 {where}"])


def test_a_launcher_that_is_not_there_is_refused():
    command = ["bash", "scripts/slurm/one_node.sbatch", "nowhere.sh"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere.sh does not exist" in done.stderr
