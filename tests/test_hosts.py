"""Several processes on one machine train as one, and end as one."""

import contextlib
import functools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from test_experiment import CONFIG, log_of, losses, train
from test_experiment_elmo import tiny_experiment

from ctx_jax.data.plan import RowsConfig
from ctx_jax.errors import InputError
from ctx_jax.experiment import Evaluation, Experiment, pretrain
from ctx_jax.hosts import Hosts, Team, joined
from ctx_jax.hosts.relay import Relay
from ctx_jax.models.bert import BertConfig
from ctx_jax.objectives.mlm import MaskedLM
from ctx_jax.train.loop import LoopConfig
from ctx_jax.train.optimizer import Optimizer
from ctx_jax.train.schedules import Schedule

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 16
IMPORTS = "from ctx_jax.models.elmo import ElmoConfig\nfrom ctx_jax.objectives.bilm import BiLM\n"
# On a busy machine a process may sleep for seconds: where none is to die, the default is left as it is.
HEARTBEAT = ("--hosts.heartbeat-seconds", "10")
# The command, slowed down so that a signal meets it in the middle; at the end it tells which batches it assembled.
COMMAND = """
import os, sys, time
from ctx_jax import cli
from ctx_jax.data.loader import Loader
from ctx_jax.data.streams import Streams
from ctx_jax.experiment import run
from ctx_jax.train.log import Log

sizes = set()

def counting(assemble):
    def count(self, rows, *rest):
        sizes.add(len(rows))
        return assemble(self, rows, *rest)
    return count

def slow(write):
    def paused(self, step, *rest):
        write(self, step, *rest)
        time.sleep(float(os.environ.get("PAUSE", 0)))
        if step == int(os.environ.get("FAILS_AT", -1)):
            raise KeyError("the test's own")
    return paused

run.SHARED_SECONDS = float(os.environ.get("SHARED_SECONDS", run.SHARED_SECONDS))
Loader.assemble, Streams.assemble = counting(Loader.assemble), counting(Streams.assemble)
Log.__call__ = slow(Log.__call__)
code = cli.main(["pretrain", *sys.argv[1:]])
print("assembled", sorted(sizes))
raise SystemExit(code)
"""


class Job:
    """`ctx-jax pretrain` in several processes; their words are in files, for nobody reads pipes while they run."""

    def __init__(self, config, workdir, count, *overrides, devices=1, own=None, environment=None, pause=0.0):
        self.workdir = workdir
        self.outputs = [workdir.with_name(f"{workdir.name}.{time.monotonic_ns()}.{i}") for i in range(count)]
        workdir.parent.mkdir(exist_ok=True)
        flags = re.sub(r"(device_count)=8", rf"\1={devices}", os.environ["XLA_FLAGS"])
        address = f"127.0.0.1:{free_port()}"
        self.processes = []
        for i, output in enumerate(self.outputs):
            words = [str(config), "--workdir", str(workdir)]
            if count > 1 and "--hosts.auto" not in overrides:
                words += ["--hosts.coordinator", address, "--hosts.num-processes", str(count)]
                words += ["--hosts.process-id", str(i)]
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", COMMAND, *words, *overrides, *(own or {}).get(i, ())],
                        env=os.environ | {"XLA_FLAGS": flags, "PAUSE": str(pause)} | (environment or {}).get(i, {}),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def said(self, i):
        return self.outputs[i].read_text().replace("\r", "\n")

    def wait_for_step(self, step, seconds=600):
        until = time.monotonic() + seconds
        path = self.workdir / "log.jsonl"
        while not (path.exists() and f'"step": {step},' in path.read_text()):
            for i, process in enumerate(self.processes):
                assert process.poll() is None, f"process {i} ended before step {step}:\n{self.said(i)}"
            assert time.monotonic() < until, [self.said(i) for i in range(len(self.processes))]
            time.sleep(0.02)

    def codes(self, *but, seconds=600):
        """Exit codes of all the processes but some."""
        until = time.monotonic() + seconds
        found = []
        for i, process in enumerate(self.processes):
            if i not in but:
                try:
                    found.append(process.wait(max(until - time.monotonic(), 0.1)))
                except subprocess.TimeoutExpired:
                    raise AssertionError(f"process {i} still runs after {seconds} s:\n{self.said(i)}") from None
        return found

    def finish(self):
        assert self.codes() == [0] * len(self.processes), [self.said(i) for i in range(len(self.processes))]
        return self


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def mesh(data, fsdp, tensor):
    return ("--mesh.data", str(data), "--mesh.fsdp", str(fsdp), "--mesh.tensor", str(tensor))


def assert_the_same_run(workdir, whole):
    """Every record once, and its numbers those of one process."""
    mine, theirs = log_of(workdir), log_of(whole)
    assert [(r["kind"], r["step"]) for r in mine] == [(r["kind"], r["step"]) for r in theirs]
    for record, expected in zip(mine, theirs, strict=True):
        assert record.keys() == expected.keys()
        for name in ("loss", "mlm_loss", "perplexity", "tokens", "learning_rate", "predictions"):
            if name in expected:
                np.testing.assert_allclose(record[name], expected[name], rtol=1e-5, err_msg=f"{expected}")


@pytest.fixture(scope="module")
def bert(topics_corpus):
    """Next-sentence and masked-LM training with dropout."""
    return Experiment(
        data=str(topics_corpus),
        model=BertConfig(
            vocab_size=600,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        ),
        rows=RowsConfig(length=64, kind="pairs"),
        objective=MaskedLM(next_sentence=True),
        optimizer=Optimizer(kind="bert_adamw", schedule=Schedule("linear", 1e-3, warmup_steps=5, total_steps=40)),
        steps=STEPS,
        batch_size=8,
        loop=LoopConfig(log_every=1, evaluate_every=8, checkpoint_every=4),
        evaluation=Evaluation(rows=32, batch_size=16),
    )


@pytest.fixture(scope="module")
def elmo(words_corpus):
    return tiny_experiment(words_corpus)


@pytest.fixture(scope="module")
def run_of(request, tmp_path_factory):
    """Of a name: the experiment, its config file, and its run by one process on one device."""

    @functools.cache
    def make(name):
        folder, experiment = tmp_path_factory.mktemp("hosts"), request.getfixturevalue(name)
        (folder / "config.py").write_text(IMPORTS + CONFIG.format(experiment=experiment))
        assert train(experiment, folder / "whole").finished
        return experiment, folder / "config.py", folder / "whole"

    return make


# Together.


def test_two_processes_stopped_then_one_killed_then_gone_on_with_by_one(run_of, tmp_path):
    """SIGTERM to one stops both at one step; the death of one ends the other; what was begun by two, one finishes."""
    experiment, config, whole = run_of("bert")
    workdir = tmp_path / "run"
    with Job(config, workdir, 2, *mesh(1, 1, 2), *HEARTBEAT, pause=0.5) as job:
        job.wait_for_step(2)
        job.processes[1].send_signal(signal.SIGTERM)
        job.finish()
        step = len(losses(workdir))
        assert 2 < step < STEPS
        assert re.search(rf"SIGTERM of process 1 of 2 \(.*\): saved step {step};", job.said(0))
        assert (workdir / "checkpoints" / str(step)).exists()
        assert not (workdir / "weights").exists()
        # Both hold a part of the model for all rows. Evaluation, of 16 rows, was not yet.
        assert all("assembled [8]" in job.said(i) for i in range(2))
    with Job(config, workdir, 2, *HEARTBEAT, pause=0.3) as job:
        job.wait_for_step(step + 2)
        victim = job.processes[1]
        victim.kill()
        assert job.codes(1, seconds=60) == [1]
        assert f"resuming from step {step}" in job.said(0)
        assert_told_of(job, 0, gone=1, pid=victim.pid)
    assert train(experiment, workdir).finished
    assert_the_same_run(workdir, whole)


def assert_told_of(job, i, gone, pid):
    """One line names the dead one, and no traceback or C++ stack lies on it."""
    count = len(job.processes)
    line = rf"ctx-jax: process {gone} of {count} \({re.escape(socket.gethostname())}, pid {pid}\) is gone: .*"
    (found,) = re.findall(rf"^{line}$", job.said(i), re.MULTILINE)
    assert re.search(r"; (the last checkpoint is step \d+|no checkpoint was saved yet)$", found)
    assert "Traceback" not in job.said(i)
    assert "Check failure" not in job.said(i)


BREAKS = """
import time

from ctx_jax.hosts import service, team


class Store:
    \"""One that answers, and in which process 1 never shows a sign of life.\"""

    values = {"name/1": "there, pid 1"}
    barrier = staticmethod(lambda name, seconds: None)
    read = classmethod(lambda cls: dict(cls.values))
    set = set_first = classmethod(lambda cls, key, value: cls.values.update({key: value}))


class Relay:
    broken = None


service.Store = Store
members = team.Members(0, 2, 2.0, Relay)
members.describe = lambda: time.sleep(8)  # a folder that is slow to answer
try:
    raise RuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
except RuntimeError as error:
    members.fail(error)
    raise
"""


def test_who_has_said_that_another_is_gone_says_nothing_else():
    """However long it takes to say so: what broke here because of it is the same news, with a traceback."""
    done = subprocess.run([sys.executable, "-c", BREAKS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(
        r"^ctx-jax: process 1 of 2 \(there, pid 1\) is gone: no sign of life for \d s$", done.stderr, re.MULTILINE
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "elmo"])
@pytest.mark.parametrize(
    ("count", "devices", "axes", "rows"),
    [
        (2, 1, (2, 1, 1), 4),
        (2, 1, (1, 2, 1), 4),
        (2, 1, (1, 1, 2), 8),  # tensor over both: the same rows twice
        (4, 1, (4, 1, 1), 2),
        (4, 1, (2, 1, 2), 4),  # tensor over pairs
        (4, 1, (1, 2, 2), 4),
        (4, 2, (2, 2, 2), 2),
        (4, 2, (1, 2, 4), 4),
    ],
)
def test_the_losses_of_one_process(run_of, tmp_path, name, count, devices, axes, rows):
    _, config, whole = run_of(name)
    with Job(config, tmp_path / "run", count, *mesh(*axes), devices=devices) as job:
        job.finish()
        sizes = [rows] if name == "elmo" else [rows, 2 * rows]
        for i in range(count):
            assert f"assembled {sizes}" in job.said(i)
            assert ("the run is in" in job.said(i)) == (i == 0)
    assert_the_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
@pytest.mark.parametrize(("count", "gone"), [(2, 0), (2, 1), (4, 0), (4, 2)])
def test_the_death_of_one_ends_all_with_its_name(run_of, tmp_path, count, gone, number):
    _, config, whole = run_of("bert")
    with Job(config, tmp_path / "run", count, *HEARTBEAT, pause=0.3) as job:
        job.wait_for_step(6)
        job.processes[gone].send_signal(number)
        assert job.codes(gone, seconds=60) == [1] * (count - 1)
        for i in range(count):
            if i != gone:
                assert_told_of(job, i, gone, job.processes[gone].pid)
    with Job(config, tmp_path / "run", count) as job:
        job.finish()
    assert_the_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_the_default_heartbeat_is_within_a_minute(run_of, tmp_path):
    _, config, _ = run_of("bert")
    with Job(config, tmp_path / "run", 2, pause=0.3) as job:
        job.wait_for_step(3)
        job.processes[1].kill()
        assert job.codes(1, seconds=60) == [1]
        assert_told_of(job, 0, 1, job.processes[1].pid)


@pytest.mark.slow
@pytest.mark.parametrize("to", [(0,), (0, 1, 2, 3)], ids=["to one", "to all"])
def test_sigterm_stops_all_at_one_step(run_of, tmp_path, to):
    _, config, whole = run_of("bert")
    with Job(config, tmp_path / "run", 4, *HEARTBEAT, pause=0.5) as job:
        job.wait_for_step(3)
        for i in to:
            job.processes[i].send_signal(signal.SIGTERM)
        job.finish()
        step = len(losses(tmp_path / "run"))
        assert 3 < step < STEPS
        assert f"saved step {step};" in job.said(0)
    with Job(config, tmp_path / "run", 4) as job:
        job.finish()
        assert f"resuming from step {step}" in job.said(0)
    assert_the_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_begun_by_one_process_and_finished_by_two(run_of, tmp_path):
    _, config, whole = run_of("bert")
    with Job(config, tmp_path / "run", 1, pause=0.3) as job:
        job.wait_for_step(5)
        job.processes[0].send_signal(signal.SIGTERM)
        job.finish()
    with Job(config, tmp_path / "run", 2) as job:
        job.finish()
        assert re.search(r"resuming from step \d+", job.said(0))
    assert_the_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_auto_under_slurm(run_of, tmp_path):
    """Slurm as far as its variables go: two tasks of one step on this machine."""
    _, config, whole = run_of("bert")
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    environment = {i: step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)}
    with Job(config, tmp_path / "run", 2, "--hosts.auto", environment=environment) as job:
        job.finish()
        assert "2 cpu device(s)" in job.said(0)
    assert_the_same_run(tmp_path / "run", whole)


# What fails by itself.


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_bad_input_of_one_process_ends_the_others_with_its_words(run_of, tmp_path, failing):
    _, config, _ = run_of("bert")
    with Job(config, tmp_path / "run", 2, own={failing: ("--data", "nowhere")}) as job:
        codes = job.codes()
        assert codes[failing] == 2, job.said(failing)
        assert codes[1 - failing] == 1, job.said(1 - failing)
        assert "ctx-jax: nowhere" in job.said(failing)
        assert re.search(rf"^ctx-jax: process {failing} of 2 \(.*\) failed: nowhere", job.said(1 - failing), re.M)
        assert "Traceback" not in job.said(0) + job.said(1)


@pytest.mark.slow
def test_processes_that_were_not_given_the_same_do_not_begin(run_of, tmp_path):
    _, config, _ = run_of("bert")
    environment = {i: {"SHARED_SECONDS": "2"} for i in range(2)}
    with Job(config, tmp_path / "run", 2, own={1: ("--seed", "7")}, environment=environment) as job:
        assert job.codes() == [1, 2]
        said = r"config.json: process 0 was given config.json.experiment.seed = 0, not 7, as process 1"
        assert said in job.said(1)
        assert said in job.said(0)
        assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_bug_in_one_process_ends_the_others_with_its_words(run_of, tmp_path, failing):
    _, config, _ = run_of("bert")
    with Job(config, tmp_path / "run", 2, environment={failing: {"FAILS_AT": "6"}}, pause=0.1) as job:
        assert job.codes() == [1, 1]
        assert "Traceback" in job.said(failing)
        line = rf"^ctx-jax: process {failing} of 2 \(.*\) failed: KeyError: .the test's own.*checkpoint"
        assert re.search(line, job.said(1 - failing), re.M), job.said(1 - failing)
        assert "Traceback" not in job.said(1 - failing)


# Before they meet.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "--hosts.num-processes and --hosts.process-id: not given"),
        ({"num_processes": 2, "process_id": 0}, "--hosts.coordinator: not given"),
        ({"auto": True, "process_id": 0}, "--hosts.auto finds"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id is 2, expected 0 to 1"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": -1}, "process_id is -1, expected 0 to 1"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "num_processes is 0, expected at least 1"),
        *(
            ({"coordinator": address, "num_processes": 2, "process_id": 0}, f"coordinator is '{address}', expected")
            for address in ("a", "a:", ":1", "a:b", "a:0", "a:65536")
        ),
        ({"heartbeat_seconds": 1}, "heartbeat_seconds is 1, expected at least 2"),
        ({"connect_seconds": float("nan")}, "connect_seconds is nan, expected at least 1"),
    ],
)
def test_half_given_or_wrong_arguments_are_refused(given, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Hosts(**given)


def test_nobody_answers():
    hosts = Hosts(f"127.0.0.1:{free_port()}", 2, 1, connect_seconds=1)
    begin = time.monotonic()
    with pytest.raises(InputError, match=rf"nobody answers at {hosts.coordinator} within 1 s"), joined(hosts):
        pass
    assert time.monotonic() - begin < 5


def test_a_taken_port_is_refused():
    with socket.create_server(("", 0)) as server:
        hosts = Hosts(f"127.0.0.1:{server.getsockname()[1]}", 2, 0)
        with pytest.raises(InputError, match=r"port \d+ of this machine cannot be had"), joined(hosts):
            pass


def test_nothing_around_to_ask(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "TPU_")):
            monkeypatch.delenv(name)
    with pytest.raises(InputError, match=r"--hosts\.auto: found no Cloud TPU, Slurm"), joined(Hosts(auto=True)):
        pass


def test_one_process_is_alone():
    for hosts in (Hosts(), Hosts("127.0.0.1:1", 1, 0), Hosts(heartbeat_seconds=5)):
        with joined(hosts) as team:
            assert (team.process, team.count) == (0, 1)
            assert not team.stop_at(3, "")
            assert team.stop_at(4, "SIGTERM")
            assert team.stopped == "SIGTERM"


def test_too_few_come(tmp_path):
    """Process 0 waits for a second one that does not come; so does a process whose coordinator is something else."""
    code = "import sys; from ctx_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    words = ["pretrain", "--workdir", str(tmp_path / "run"), "--hosts.num-processes", "2"]
    words += ["--hosts.connect-seconds", "3", "configs/quickstart.py"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        addresses = [f"127.0.0.1:{free_port()}", f"127.0.0.1:{server.getsockname()[1]}"]
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, *words, "--hosts.coordinator", address, "--hosts.process-id", str(i)],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i, address in enumerate(addresses)
        ]
        for i, process in enumerate(started):
            _, said = process.communicate(timeout=100)
            assert process.returncode == 2, said
            assert f"process {i} of 2: not all of the 2 processes came to {addresses[i]} within 3 s" in said
    assert not (tmp_path / "run").exists()


def test_several_processes_need_a_team(bert, tmp_path):
    with pytest.raises(InputError, match="without a team"):
        pretrain(bert, tmp_path, team=Team(0, 2))


def test_a_relay_keeps_its_side_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay("127.0.0.1", server.getsockname()[1])
        host, port = relay.address.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as near:
            far, _ = server.accept()
            near.sendall(b"there")
            assert far.recv(100) == b"there"
            far.sendall(b"back")
            assert near.recv(100) == b"back"
            assert relay.broken is None
            far.close()
            until = time.monotonic() + 10
            while relay.broken is None and time.monotonic() < until:
                time.sleep(0.01)
            assert relay.broken is not None
            near.settimeout(0.2)
            with pytest.raises(TimeoutError):
                near.recv(100)
    relay.close()


def test_a_bucket_is_no_run_directory(bert):
    for given in ("gs://bucket/run", pathlib.Path("gs://bucket/run")):
        with pytest.raises(InputError, match="expected a local or mounted folder"):
            pretrain(bert, given)


# What is written of it.


@pytest.mark.parametrize("name", ["docs/pods.md", "scripts/pretrain_tpu_pod.sh"])
def test_the_options_that_are_written_of_exist(name):
    text = (ROOT / name).read_text().replace("\\\n", " ")
    commands = re.findall(r"ctx-jax pretrain (.*)", text)
    written = {flag for command in commands for flag in re.findall(r"--[\w.-]+", command)}
    written |= set(re.findall(r"--(?:hosts|loop|mesh|evaluation)\.[\w-]+", text))
    assert len(written) >= 4
    words = [sys.executable, "-m", "ctx_jax.cli", "pretrain", "configs/bert_base.py", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    known = set(re.findall(r"--[\w.-]+", done.stdout))
    assert written <= known, written - known


def test_the_pod_script_is_a_script_and_says_how_it_is_used():
    script = ROOT / "scripts" / "pretrain_tpu_pod.sh"
    subprocess.run(["bash", "-n", script], check=True)
    named = {"PROJECT": "p", "ZONE": "z", "NAME": "n"}
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=os.environ | named)
    assert done.returncode == 2
    assert "pretrain_tpu_pod.sh run [FIELDS]" in done.stderr
