#!/usr/bin/env python3
"""A real Slurm of two nodes on one machine: install, up, down, status. Called by make sandbox, .ci/run and tests/slurm.

Standard library only, because it runs before any environment exists; Linux only; docs/sandbox.md says what it is for."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from string import Template

TEMPLATES = Path(__file__).resolve().parent
DEFAULT_FOLDER = "/run/medgen-sandbox"
PACKAGES = ("slurm-wlm", "slurmdbd", "munge", "mariadb-server")
COMMANDS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo")
ACCOUNTING_COMMANDS = ("slurmdbd", "sacctmgr", "sacct", "mariadbd", "mariadb-install-db", "mariadb-admin")
NODES = ("n1", "n2")
GPUS_PER_NODE = 4
GPU_MAJOR = 195  # what NVIDIA's devices have
BASIC_DAEMONS = ("munged", "slurmctld", *(f"slurmd-{node}" for node in NODES))
ACCOUNTING_DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", *(f"slurmd-{node}" for node in NODES))
PORTS_PER_SANDBOX = 4
FIRST_PORTS = range(7400, 7800, PORTS_PER_SANDBOX)  # below the ephemeral range, and below 10000 where medgen's ranks meet
DATABASE_OPTIONS = (  # reached through its socket only; small, as /run is memory; slurmdbd asks for the long lock wait
    "--skip-networking", "--skip-log-bin", "--performance-schema=OFF", "--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M",
    "--innodb-autoextend-increment=1", "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0", "--innodb-use-native-aio=OFF",
)  # fmt: skip
HOSTS = Path("/etc/hosts")
HOSTS_LINE = re.compile(r"127\.0\.0\.1 n1 n2  # medgen sandbox (\S+), ports (\d+)-\d+")
MARK = "MEDGEN_SANDBOX_DAEMON"  # in the environment of everything started here: the folder
LONGEST_FOLDER = 55  # Slurm adds up to 50 characters for its sockets, and a socket's path may have 107
START_SECONDS = 30
PROBE_SECONDS = 5
STOP_SECONDS = 10
POLL_SECONDS = 0.1
NOT_READY_STATES = ("unk", "down", "fail", "boot")


class SandboxError(Exception):
    """What went wrong and what to do, in words for the user."""


@dataclass(frozen=True)
class Settings:
    """What a sandbox was brought up with: its sandbox.json. `complete` is written last."""

    accounting: bool
    min_job_age_seconds: int
    first_port: int
    complete: bool


@dataclass(frozen=True)
class Daemon:
    """`complaint` is empty once the daemon can be used; until then it says what is wrong."""

    name: str
    command: list[str]
    complaint: Callable[[], str]


class Sandbox:
    """One folder, everything in it, and the processes started from it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings_file = folder / "sandbox.json"
        self.conf = folder / "slurm.conf"
        self.database_socket = folder / "mariadb.socket"

    def settings(self) -> Settings | None:
        """None if nothing was ever brought up here, or its beginning was cut short."""
        try:
            return Settings(**json.loads(self.settings_file.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write_settings(self, settings: Settings) -> None:
        temporary = self.settings_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(settings)) + "\n")
        temporary.replace(self.settings_file)

    def daemon_names(self) -> tuple[str, ...]:
        settings = self.settings()
        return ACCOUNTING_DAEMONS if settings is None or settings.accounting else BASIC_DAEMONS

    def environment(self) -> dict[str, str]:
        """For daemons and Slurm's commands: nothing of the caller's, who may work on another cluster."""
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
        return {"PATH": path, "HOME": "/root", "LC_ALL": "C.UTF-8", "SLURM_CONF": str(self.conf), "MYSQL_UNIX_PORT": str(self.database_socket)}

    def call(self, *command: str, stdin: str | None = None, timeout_seconds: float = START_SECONDS) -> subprocess.CompletedProcess[str]:
        """Raises SandboxError if the command does not end in time."""
        try:
            return subprocess.run(command, input=stdin, capture_output=True, text=True, env=self.environment(), timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            raise SandboxError(f"{' '.join(command)}: no answer within {timeout_seconds:.0f} s; the logs are in {self.folder}/log") from None

    def complaint_of(self, *command: str) -> str:
        """Empty if the command succeeds."""
        try:
            done = self.call(*command, timeout_seconds=PROBE_SECONDS)
        except SandboxError as error:
            return str(error)
        said = (done.stderr or done.stdout).strip().splitlines()
        return "" if done.returncode == 0 else said[0] if said else f"{command[0]}: exit code {done.returncode}"

    def log(self, daemon: str) -> Path:
        """Its own log, or what it said before it could open one."""
        own, early = self.folder / "log" / f"{daemon}.log", self.folder / "log" / f"{daemon}.out"
        return own if own.exists() and (not early.exists() or own.stat().st_mtime_ns >= early.stat().st_mtime_ns - 10**9) else early

    def log_in_words(self, daemon: str) -> str:
        path = self.log(daemon)
        lines = path.read_text(errors="replace").splitlines()[-15:] if path.exists() else []
        return f"its log is {path}" + ("; its last lines:\n" + "\n".join(f"    {line}" for line in lines) if lines else ", and it is empty")


# ---- processes -----------------------------------------------------------------------------------------------------------


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When a process started, in ticks since boot: with pid and boot it names one process for good. None: no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def remember(sandbox: Sandbox, daemon: str, pid: int) -> None:
    (sandbox.folder / "pid" / daemon).write_text(f"{pid} {start_ticks(pid)} {boot_id()}\n")


def running(sandbox: Sandbox, daemon: str) -> int | None:
    """The daemon's pid, if it is the very process that was started here."""
    try:
        pid, ticks, boot = (sandbox.folder / "pid" / daemon).read_text().split()
    except (OSError, ValueError):
        return None
    return int(pid) if boot == boot_id() and str(start_ticks(int(pid))) == ticks else None


def has_stopped(sandbox: Sandbox, daemon: str) -> bool:
    return running(sandbox, daemon) is None


def belongs(sandbox: Sandbox, process: Path) -> bool:
    """Is this /proc/<pid> a daemon of the sandbox, one of its step daemons or a process of one of its jobs? Not: a user's shell or srun."""
    try:
        environment = (process / "environ").read_bytes().split(b"\0")
        if f"{MARK}={sandbox.folder}".encode() in environment:
            return True
        if f"SLURM_CONF={sandbox.conf}".encode() in environment:
            return {b"SLURM_JOB_ID", b"SLURMD_NODENAME"} <= {entry.partition(b"=")[0] for entry in environment}
        # a step daemon writes its title over its environment, but works where its slurmd does
        return (process / "comm").read_text().startswith("slurmstepd") and (process / "cwd").readlink() == sandbox.folder
    except OSError:  # it has ended
        return False


def leftovers(sandbox: Sandbox) -> set[int]:
    """What belongs to the sandbox, with all descendants; never this process."""
    parents: dict[int, int] = {}
    found: set[int] = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and start_ticks(int(process.name)) is not None:
            with suppress(OSError):
                parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if belongs(sandbox, process):
                found.add(int(process.name))
    while children := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= children
    return found - {os.getpid()}


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_until(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def stop_everything(sandbox: Sandbox) -> None:
    """Daemons in reverse order, then whatever their jobs left. Raises SandboxError if something survives SIGKILL."""
    for daemon in reversed(ACCOUNTING_DAEMONS):
        pid = running(sandbox, daemon)
        if pid is not None:
            send(pid, signal.SIGTERM)
            wait_until(partial(has_stopped, sandbox, daemon), STOP_SECONDS)

    def nothing_left() -> bool:
        remaining = leftovers(sandbox)
        for pid in remaining:
            send(pid, signal.SIGKILL)
        return not remaining

    if not wait_until(nothing_left, STOP_SECONDS):
        raise SandboxError(f"these processes of {sandbox.folder} do not end: {sorted(leftovers(sandbox))}")


# ---- what all sandboxes of a machine share: /etc/hosts ----------------------------------------------------------------------


@contextmanager
def hosts_lines() -> Iterator[list[str]]:
    """The lines of /etc/hosts, to be changed under a lock. Written in place: containers mount the file, so nothing can be renamed onto it."""
    try:
        with HOSTS.open("r+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            before = handle.read()
            lines = before.splitlines()
            yield lines
            after = "".join(f"{line}\n" for line in lines)
            if after != before:
                handle.seek(0)
                handle.write(after)
                handle.truncate()
    except OSError as error:
        raise SandboxError(f"{HOSTS} must be writable, so that the node names can be resolved: {error}") from None


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the daemons do: an old connection does not count
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def claim_names_and_ports(sandbox: Sandbox) -> int:
    """Make the node names resolve and return the first of the sandbox's ports. The line in /etc/hosts is the claim to them."""
    with hosts_lines() as lines:
        forget(lines, sandbox)
        taken = {int(match[2]) for line in lines if (match := HOSTS_LINE.fullmatch(line))}
        for first in FIRST_PORTS:
            last = first + PORTS_PER_SANDBOX - 1
            if first not in taken and all(is_free(port) for port in range(first, last + 1)):
                lines.append(f"127.0.0.1 n1 n2  # medgen sandbox {sandbox.folder}, ports {first}-{last}")
                break
        else:
            raise SandboxError(f"no {PORTS_PER_SANDBOX} free ports in a row in {FIRST_PORTS.start}-{FIRST_PORTS.stop - 1}")
    for node in NODES:
        address = socket.gethostbyname(node)
        if not address.startswith("127."):
            raise SandboxError(f"{node} resolves to {address}, so jobs would look for their nodes there; remove that name from {HOSTS}")
    return first


def forget(lines: list[str], sandbox: Sandbox) -> None:
    """Drop the lines of this sandbox and of those whose folder is gone."""
    lines[:] = [
        line for line in lines
        if not (match := HOSTS_LINE.fullmatch(line)) or (match[1] != str(sandbox.folder) and Sandbox(Path(match[1])).settings_file.exists())
    ]  # fmt: skip


# ---- up ---------------------------------------------------------------------------------------------------------------------


def write_configuration(sandbox: Sandbox, settings: Settings) -> None:
    """Everything that must be there before the first daemon starts. Raises SandboxError."""
    for name in ("log", "pid", "munge", "gpu", "state", "mariadb", *(f"spool/{node}" for node in NODES)):
        (sandbox.folder / name).mkdir(parents=True, exist_ok=True)
    values = {
        "host": socket.gethostname().partition(".")[0], "folder": str(sandbox.folder), "memory_mebibytes": str(memory_mebibytes()),
        "min_job_age_seconds": str(settings.min_job_age_seconds), "slurmctld_port": str(settings.first_port), "n1_port": str(settings.first_port + 1),
        "n2_port": str(settings.first_port + 2), "slurmdbd_port": str(settings.first_port + 3), "users": ",".join(sorted(users())),
    }  # fmt: skip
    values["accounting"] = render("accounting.conf", values) if settings.accounting else "AccountingStorageType=accounting_storage/none"
    write_private(sandbox.folder / "munge" / "key", os.urandom(128))
    write_private(sandbox.folder / "slurmdbd.conf", render("slurmdbd.conf", values).encode())  # slurmdbd insists on 0600
    for name in ("slurm.conf", "gres.conf", "accounts.sacctmgr"):
        (sandbox.folder / name).write_text(render(name, values))
    (sandbox.folder / "cgroup.conf").write_text(f"CgroupPlugin={cgroup_plugin(sandbox)}\n")
    make_gpus(sandbox)
    if settings.accounting:
        make_database(sandbox)


def render(template: str, values: dict[str, str]) -> str:
    return Template((TEMPLATES / template).read_text()).substitute(values)


def write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def memory_mebibytes() -> int:
    match = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)
    assert match, "/proc/meminfo has no MemTotal"
    return int(match[1]) // 1024


def users() -> set[str]:
    """Who may use the account: root, and whoever became root through sudo."""
    return {pwd.getpwuid(os.getuid()).pw_name, os.environ.get("SUDO_USER", "root"), "root"}


def cgroup_plugin(sandbox: Sandbox) -> str:
    """slurmd loads one even when it needs none, and v2 fails to load in most containers. `disabled` is known since Slurm 24.05."""
    version = re.search(r"(\d+)\.(\d+)", sandbox.call("slurmctld", "-V").stdout)
    return "disabled" if version and (int(version[1]), int(version[2])) >= (24, 5) else "cgroup/v1"


def make_gpus(sandbox: Sandbox) -> None:
    try:
        for node in NODES:
            for number in range(GPUS_PER_NODE):
                os.mknod(sandbox.folder / "gpu" / f"{node}-gpu{number}", stat.S_IFCHR | 0o600, os.makedev(GPU_MAJOR, number))
    except PermissionError:
        raise SandboxError("this machine lets nobody make device files, which stand for the GPUs; a container needs the capability MKNOD") from None


def make_database(sandbox: Sandbox) -> None:
    done = sandbox.call(
        "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={sandbox.folder}/mariadb", "--skip-test-db",
        "--auth-root-authentication-method=socket", "--auth-root-socket-user=root",
    )  # fmt: skip
    (sandbox.folder / "log" / "mariadb-install-db.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise SandboxError(f"mariadb-install-db failed; {sandbox.log_in_words('mariadb-install-db')}")


def daemons(sandbox: Sandbox, settings: Settings) -> list[Daemon]:
    """In the order in which they need each other."""
    folder = sandbox.folder
    munged = Daemon(
        "munged",
        ["munged", "--foreground", f"--key-file={folder}/munge/key", f"--socket={folder}/munge/socket", f"--pid-file={folder}/munge/pid",
         f"--seed-file={folder}/munge/seed", f"--log-file={folder}/log/munged.log", "--origin=127.0.0.1", "--num-threads=2"],
        partial(sandbox.complaint_of, "munge", f"--socket={folder}/munge/socket", "--no-input"),
    )  # fmt: skip
    mariadbd = Daemon(
        "mariadbd",
        ["mariadbd", "--no-defaults", "--user=root", f"--datadir={folder}/mariadb", f"--socket={sandbox.database_socket}",
         f"--pid-file={folder}/mariadb.pid", *DATABASE_OPTIONS],
        partial(sandbox.complaint_of, "mariadb-admin", "--no-defaults", f"--socket={sandbox.database_socket}", "ping"),
    )  # fmt: skip
    slurmdbd = Daemon("slurmdbd", ["slurmdbd", "-D"], partial(sandbox.complaint_of, "sacctmgr", "--noheader", "show", "cluster"))
    slurmctld = Daemon("slurmctld", ["slurmctld", "-D"], partial(sandbox.complaint_of, "scontrol", "ping"))
    slurmds = [Daemon(f"slurmd-{node}", ["slurmd", "-D", "-N", node], partial(complaint_of_node, sandbox, node)) for node in NODES]
    return [munged, *([mariadbd, slurmdbd] if settings.accounting else []), slurmctld, *slurmds]


def last_complaint(complaint: Callable[[], str]) -> str:
    """Ask until it is empty, or START_SECONDS have passed."""
    deadline = time.monotonic() + START_SECONDS
    while (said := complaint()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return said


def start(sandbox: Sandbox, daemon: Daemon) -> None:
    """Raises SandboxError with the end of its log if it does not answer."""
    environment = {**sandbox.environment(), MARK: str(sandbox.folder)}
    with (sandbox.folder / "log" / f"{daemon.name}.out").open("ab") as output:
        process = subprocess.Popen(
            daemon.command, cwd=sandbox.folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    remember(sandbox, daemon.name, process.pid)
    complaint = last_complaint(lambda: "" if process.poll() is not None else daemon.complaint())
    if process.poll() is not None:
        raise SandboxError(f"{daemon.name} ended with exit code {process.returncode}; {sandbox.log_in_words(daemon.name)}")
    if complaint:
        raise SandboxError(f"{daemon.name} cannot be used after {START_SECONDS} s: {complaint}; {sandbox.log_in_words(daemon.name)}")
    print(f"  {daemon.name} answers", flush=True)


def add_accounts(sandbox: Sandbox) -> None:
    done = sandbox.call("sacctmgr", "--immediate", stdin=(sandbox.folder / "accounts.sacctmgr").read_text() + "quit\n")
    if done.returncode:
        raise SandboxError(f"sacctmgr refused the accounts: {done.stderr.strip()}; {sandbox.log_in_words('slurmdbd')}")


def node_states(sandbox: Sandbox) -> dict[str, str]:
    """Slurm's short words, by node; empty if slurmctld does not answer."""
    try:
        done = sandbox.call("sinfo", "--noheader", "--Node", "--partition=CPUQ", "--format=%N %t", timeout_seconds=PROBE_SECONDS)
    except SandboxError:
        return {}
    return dict(line.split() for line in done.stdout.splitlines())


def complaint_of_node(sandbox: Sandbox, node: str) -> str:
    state = node_states(sandbox).get(node)
    return "" if is_ready(state) else f"slurmctld says that node {node} is {state or 'unknown'}"


def is_ready(state: str | None) -> bool:
    return state is not None and not state.endswith("*") and not state.startswith(NOT_READY_STATES)


def check_machine(accounting: bool) -> None:
    """Raises SandboxError if no sandbox can be brought up here."""
    if sys.platform != "linux":
        raise SandboxError("the sandbox needs Linux; in a container it needs root and the capability MKNOD")
    missing = missing_commands(COMMANDS + (ACCOUNTING_COMMANDS if accounting else ()))
    if missing:
        raise SandboxError(f"{', '.join(missing)} not found; install Debian's packages with: python3 {sys.argv[0]} install")
    if os.geteuid() != 0:
        raise SandboxError(f"slurmd must be root to start jobs as their users; try: sudo python3 {' '.join(sys.argv)}")


def missing_commands(names: Sequence[str]) -> list[str]:
    path = Sandbox(Path(DEFAULT_FOLDER)).environment()["PATH"]
    return [name for name in names if shutil.which(name, path=path) is None]


@contextmanager
def locked(sandbox: Sandbox) -> Iterator[None]:
    """One up or down at a time in a folder; the folder itself is the lock, so that down can remove everything."""
    while True:
        sandbox.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(sandbox.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if sandbox.folder.exists() and sandbox.folder.stat().st_ino == os.fstat(descriptor).st_ino:  # else a down removed it meanwhile
                yield
                return
        finally:
            os.close(descriptor)


def refuse_foreign(sandbox: Sandbox) -> None:
    if not sandbox.settings_file.exists() and any(sandbox.folder.iterdir()):
        raise SandboxError(f"{sandbox.folder} holds files but no sandbox; choose another folder")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def begin(sandbox: Sandbox, accounting: bool, min_job_age_seconds: int) -> Settings:
    """A fresh sandbox in its folder, its daemons not yet started."""
    stop_everything(sandbox)
    empty(sandbox.folder)
    settings = Settings(accounting, min_job_age_seconds, 0, complete=False)
    sandbox.write_settings(settings)  # first: from here on the folder is known to be ours
    settings = replace(settings, first_port=claim_names_and_ports(sandbox))
    write_configuration(sandbox, settings)
    return settings


def up(sandbox: Sandbox, accounting: bool, min_job_age_seconds: int) -> None:
    """Bring up what is missing. Daemons that died come back with their state; what never was complete is begun anew."""
    check_machine(accounting)
    with locked(sandbox):
        refuse_foreign(sandbox)
        settings = sandbox.settings()
        alive = [name for name in sandbox.daemon_names() if running(sandbox, name)]
        if settings is not None and (settings.accounting, settings.min_job_age_seconds) != (accounting, min_job_age_seconds):
            if alive:
                raise SandboxError(f"{sandbox.folder} is up {in_words(settings)}; take it down first, or use another --folder")
            settings = None
        try:
            if settings is None or not settings.complete:
                settings = begin(sandbox, accounting, min_job_age_seconds)
            started = start_missing(sandbox, settings)
            if started:
                wait_for_nodes(sandbox)
            sandbox.write_settings(replace(settings, complete=True))
        except BaseException:
            if settings is None or not settings.complete:
                stop_everything(sandbox)  # the logs stay
            raise
    print(f"{sandbox.folder} {'is up' if started else 'is already up'}, {in_words(settings)}", flush=True)
    print(sandbox.call("sinfo").stdout + usage(sandbox))


def start_missing(sandbox: Sandbox, settings: Settings) -> list[str]:
    started = []
    for daemon in daemons(sandbox, settings):
        if running(sandbox, daemon.name) is None:
            start(sandbox, daemon)
            started.append(daemon.name)
        if daemon.name == "slurmdbd" and not settings.complete:
            add_accounts(sandbox)
    return started


def wait_for_nodes(sandbox: Sandbox) -> None:
    """A slurmctld that was restarted hears of its nodes again; raises SandboxError if it does not."""
    for node in NODES:
        if complaint := last_complaint(partial(complaint_of_node, sandbox, node)):
            raise SandboxError(f"{complaint} after {START_SECONDS} s; {sandbox.log_in_words(f'slurmd-{node}')}")


def in_words(settings: Settings) -> str:
    return f"{'with' if settings.accounting else 'without'} accounting, ended jobs forgotten after {settings.min_job_age_seconds} s"


def usage(sandbox: Sandbox) -> str:
    here = "" if str(sandbox.folder) == DEFAULT_FOLDER else f" --folder {sandbox.folder}"
    return f"\n{export_line(sandbox)}   # then sbatch, squeue and medgen use it\npython3 {sys.argv[0]} down{here}   # stops it"


def export_line(sandbox: Sandbox) -> str:
    return f"export SLURM_CONF={sandbox.conf}"


# ---- down, status, install ---------------------------------------------------------------------------------------------------


def down(sandbox: Sandbox) -> None:
    """Stop what this folder started, jobs included, and remove the folder."""
    if not sandbox.folder.exists():
        print(f"{sandbox.folder} is not up")
        return
    if os.geteuid() != 0:
        raise SandboxError(f"its daemons belong to root; try: sudo python3 {' '.join(sys.argv)}")
    with locked(sandbox):
        refuse_foreign(sandbox)
        stop_everything(sandbox)
        empty(sandbox.folder)
        with hosts_lines() as lines:
            forget(lines, sandbox)
        with suppress(OSError):  # a mount point stays
            sandbox.folder.rmdir()
    print(f"{sandbox.folder} is down, nothing is left of it")


def status(sandbox: Sandbox) -> bool:
    """Print the daemons and nodes; True if all of them work."""
    settings = sandbox.settings()
    if settings is None:
        print(f"{sandbox.folder}: down")
        return False
    pids = {name: running(sandbox, name) for name in sandbox.daemon_names()}
    states = node_states(sandbox) if pids["slurmctld"] else {}
    is_up = all(pids.values()) and all(is_ready(states.get(node)) for node in NODES)
    print(f"{sandbox.folder}: {'up' if is_up else 'partly up' if any(pids.values()) else 'down'}, {in_words(settings)}\n")
    print(f"{'daemon':<12}{'pid':>8}  log")
    for name, pid in pids.items():
        print(f"{name:<12}{pid or 'stopped':>8}  {sandbox.log(name)}")
    print("\nnode  state")
    for node in NODES:
        print(f"{node:<4}  {states.get(node, 'unknown')}")
    return is_up


def export(sandbox: Sandbox) -> None:
    if not all(running(sandbox, name) for name in sandbox.daemon_names()):
        raise SandboxError(f"{sandbox.folder} is not up; see: python3 {sys.argv[0]} status --folder {sandbox.folder}")
    print(export_line(sandbox))


def install() -> None:
    """Debian's packages, if a command is missing. Raises SandboxError if they cannot be had."""
    if not missing_commands(COMMANDS + ACCOUNTING_COMMANDS):
        print("Slurm, munge and MariaDB are installed")
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SandboxError(f"as root, on Debian or Ubuntu: apt-get install --no-install-recommends {' '.join(PACKAGES)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        if subprocess.run(command, env=environment).returncode:
            raise SandboxError(f"failed: {' '.join(command)}")
    if missing := missing_commands(COMMANDS + ACCOUNTING_COMMANDS):
        raise SandboxError(f"installed {' '.join(PACKAGES)}, and still there is no {', '.join(missing)}")


def sandbox_folder(given: str) -> Sandbox:
    folder = Path(given).resolve()
    if not re.fullmatch(r"[A-Za-z0-9._/-]+", str(folder)) or len(str(folder)) > LONGEST_FOLDER or folder == Path("/"):
        raise SandboxError(f"{folder}: a sandbox's folder has at most {LONGEST_FOLDER} characters (sockets lie in it), of A-Z a-z 0-9 . _ - /")
    return Sandbox(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A real Slurm of two nodes on this machine, to try medgen on; needs root. See docs/sandbox.md.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="up|down|status|install")
    verbs.add_parser("install", help="install Debian's Slurm, munge and MariaDB if they are missing")
    up_parser = verbs.add_parser("up", help="bring it up; does nothing if it is up")
    down_parser = verbs.add_parser("down", help="stop it and its jobs, and remove its folder")
    status_parser = verbs.add_parser("status", help="daemons and nodes; exit code 0 only if all of them work")
    for verb in (up_parser, down_parser, status_parser):
        verb.add_argument("--folder", default=os.environ.get("MEDGEN_SANDBOX", DEFAULT_FOLDER), help="default: $MEDGEN_SANDBOX or %(default)s")
    up_parser.add_argument("--without-accounting", action="store_true", help="no slurmdbd: sacct fails, accounts and limits are not enforced")
    up_parser.add_argument("--min-job-age", type=int, default=300, metavar="SECONDS", help="when squeue forgets ended jobs; default: %(default)s")
    status_parser.add_argument("--export", action="store_true", help='only the line to use it: eval "$(... status --export)"')
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    if arguments.verb == "install":
        install()
        return 0
    sandbox = sandbox_folder(arguments.folder)
    if arguments.verb == "up":
        up(sandbox, not arguments.without_accounting, arguments.min_job_age)
    elif arguments.verb == "down":
        down(sandbox)
    elif arguments.export:
        export(sandbox)
    else:
        return 0 if status(sandbox) else 1
    return 0


def main() -> int:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `status | head` ends quietly
    os.umask(0o022)  # every user's commands read slurm.conf and talk to munge
    arguments = parse_arguments()
    try:
        return run(arguments)
    except SandboxError as error:
        print(f"sandbox: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("sandbox: interrupted", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
