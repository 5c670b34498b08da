"""Training by several processes, as TF_CONFIG describes them; they are killed, and it goes on."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import NET, SCRIPT, TASK, flags, main
from test_training import config_of, step_of

HALF = {**NET, "batch_size": 8}  # of each of two workers, so that together they make the batch of `trained`
JOBS = "ps", "chief", "worker"


def free_addresses(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


class Cluster:
    """A parameter server, a chief and a worker, each a process behind a command that may put it somewhere else."""

    def __init__(self, arguments, addresses=None, prefixes=((), (), ())):
        self.cluster = {job: [address] for job, address in zip(JOBS, addresses or free_addresses(3))}
        self.arguments, self.prefixes, self.tasks = arguments, dict(zip(JOBS, prefixes)), {}

    def start(self, *jobs, **settings):
        for job in jobs:
            self.tasks[job] = subprocess.Popen(
                [*self.prefixes[job], sys.executable, str(SCRIPT), *self.arguments, *flags(**settings)], text=True,
                stderr=subprocess.PIPE, env={**os.environ, "TF_CONFIG": json.dumps(
                    {"cluster": self.cluster, "task": {"type": job, "index": 0}})})

    def until(self, job, pattern):
        """Reads a task's messages up to the first line that matches."""
        said = []
        for line in self.tasks[job].stderr:
            said.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"{job} ended with {self.tasks[job].wait()} and never said {pattern}: {''.join(said)}")

    def kill(self, job):
        self.tasks[job].kill()
        self.tasks[job].communicate()

    def end(self):
        """Waits until all tasks have ended, as they should."""
        said = {job: task.communicate(timeout=300)[1] for job, task in self.tasks.items()}  # or they wait for ever
        assert [task.returncode for task in self.tasks.values()] == [0, 0, 0], said
        assert "Traceback" not in "".join(said.values()), said


@pytest.fixture
def cluster(dataset, tmp_path):
    made = []

    def make(*where, **settings):
        given = {**TASK, **HALF, **dict(dataset=dataset, model=tmp_path / "model"), **settings}
        made.append(Cluster(["train", *flags(**given)], *where))
        return made[-1]

    yield make
    for task in [task for each in made for task in each.tasks.values()]:
        task.kill()
        task.wait()
        task.stderr.close()


def test_two_workers_learn_what_one_process_does(cluster, trained, dataset, tmp_path):
    """Each has half of the images, and half of the batch."""
    tasks = cluster()
    tasks.start(*JOBS)
    tasks.end()
    config = config_of(tmp_path / "model")
    assert config["accuracy"] > config_of(trained)["accuracy"] - 0.1
    assert config["images"] == 2 * 359 and config["images_seen"] == config["step"] * 16
    assert main(["test", "--model", str(tmp_path / "model"), str(dataset)]) == 0


def test_whoever_is_killed_comes_back_and_nothing_that_was_saved_is_lost(cluster, tmp_path):
    tasks = cluster(epoch_max=12, save_epoch=0.2, val_num=16)  # few, so that every hundredth step is reported
    tasks.start(*JOBS)
    for job in JOBS:
        tasks.until("chief", "^epoch")
        saved = step_of(tmp_path / "model")
        tasks.kill(job)
        tasks.start(job)
        if job != "worker":
            assert int(tasks.until("chief", r"from step (\d+)")[1]) >= saved
    tasks.end()
    assert step_of(tmp_path / "model") == config_of(tmp_path / "model")["step"] == 12 * 44


def test_a_chief_whose_worker_is_missing_still_hears_that_it_shall_stop(cluster, tmp_path):
    tasks = cluster()
    tasks.start("ps", "chief")
    tasks.until("chief", "from step 0")
    tasks.tasks["chief"].terminate()
    _, messages = tasks.tasks["chief"].communicate()
    assert tasks.tasks["chief"].returncode == 128 + 15
    assert "stopped and saved at step 0" in messages and "Traceback" not in messages
    assert step_of(tmp_path / "model") == 0
    tasks.kill("ps")
    tasks.start(*JOBS)  # the same commands go on from there
    tasks.until("chief", "from step 0")
    tasks.until("chief", "^epoch")


def test_every_task_ends_when_it_is_told_to_whatever_it_waits_for(cluster, tmp_path):
    """The chief and the worker for a parameter server that was killed, and that one, back again, for all others."""
    tasks = cluster(save_epoch=0.2)
    tasks.start(*JOBS)
    tasks.until("chief", "^epoch")
    tasks.kill("ps")
    for job in ("chief", "worker"):
        tasks.tasks[job].terminate()
    _, messages = tasks.tasks["chief"].communicate()
    assert [tasks.tasks[job].wait() for job in ("chief", "worker")] == [128 + 15, -15]
    assert f"stopped and saved at step {step_of(tmp_path / 'model')} of" in messages and "Traceback" not in messages
    tasks.start("ps")
    tasks.until("ps", "holds weights")
    tasks.tasks["ps"].terminate()
    assert tasks.tasks["ps"].wait() == -15


def test_a_worker_with_other_settings_is_told_so(cluster):
    tasks = cluster()
    tasks.start("ps", "chief")
    tasks.start("worker", n_hidden=8)
    _, messages = tasks.tasks["worker"].communicate()
    assert tasks.tasks["worker"].returncode == 2
    assert "the chief trains with --n-hidden 48, not 8" in messages.splitlines()[-1] and "Traceback" not in messages


@pytest.fixture
def hosts():
    """Three network namespaces on one bridge: as good as hosts, with addresses of their own."""
    mine = f"l{os.getpid()}"
    names = [f"{mine}n{number}" for number in range(3)]
    if not shutil.which("ip") or subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here: that needs root, and iproute2")

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("link", "add", f"{mine}b", "type", "bridge")
        ip("link", "set", f"{mine}b", "up")
        for number, name in enumerate(names):
            if number:
                ip("netns", "add", name)
            ip("link", "add", f"{mine}v{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{mine}v{number}", "master", f"{mine}b", "up")
            ip("-n", name, "addr", "add", f"10.213.7.{number + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield [(f"10.213.7.{number + 1}:5051", ("ip", "netns", "exec", name)) for number, name in enumerate(names)]
    finally:
        for number, name in enumerate(names):
            subprocess.run(["ip", "link", "del", f"{mine}v{number}"], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{mine}b"], capture_output=True)


def test_hosts_with_addresses_of_their_own(cluster, hosts, tmp_path):
    tasks = cluster(*zip(*hosts), epoch_max=1, net="cnn_lstm")
    tasks.start(*JOBS)
    tasks.end()
    assert step_of(tmp_path / "model") == 44


@pytest.mark.parametrize("config, complaint", [
    ("{", "TF_CONFIG"),
    ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}', "a chief, a ps or several"),
    ('{"cluster": {"chief": ["a:1"], "ps": ["b:1"]}, "task": {"type": "evaluator", "index": 0}}', "one of them"),
    ('{"cluster": {"chief": ["a:1"], "ps": ["b:1"]}, "task": {"type": "ps", "index": 1}}', "one of them"),
    ('{"cluster": {}}', "one of them"),
])
def test_a_wrong_tf_config_is_one_line(dataset, tmp_path, monkeypatch, capfd, config, complaint):
    monkeypatch.setenv("TF_CONFIG", config)
    assert main(["train", *flags(dataset=dataset, model=tmp_path, **TASK)]) == 2
    message, = capfd.readouterr().err.splitlines()[-1:]
    assert message.startswith("lstm_ctc_ocr: TF_CONFIG") and complaint in message
