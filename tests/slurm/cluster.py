"""A SLURM of two hosts on this machine: each a network, host name, IPC, mount and PID namespace with its own slurmd."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "unshare")
BRIDGE, NET, HOSTS = "nmslurm0", "10.78.0", ("n1", "n2")
SETTINGS = """ClusterName=test
SlurmctldHost=ctl({net}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=3
KillWait=5
MinJobAge=3600
NodeName=DEFAULT CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=64000 State=UNKNOWN
NodeName=n1 NodeAddr={net}.11
NodeName=n2 NodeAddr={net}.12
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no SLURM can be started here; None if it can."""
    os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if os.geteuid() != 0:
        return "needs root"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}"
    namespaces = ["unshare", "--net", "--uts", "--ipc", "--pid", "--fork", "--mount", "true"]
    if subprocess.run(namespaces, capture_output=True, check=False).returncode:
        return "no namespaces"
    return None


class Cluster:
    """A running controller and two hosts; everything lives in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}

    def call(self, *words: str | Path, timeout: float = 30.0) -> str:
        """Run a command outside of the hosts; returns what it prints."""
        return subprocess.run(
            [str(word) for word in words],
            env=self.environment, capture_output=True, text=True, timeout=timeout, check=True,
        ).stdout.strip()  # fmt: skip

    def start(self) -> None:
        """Controller and hosts; returns when both hosts are idle."""
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(SETTINGS.format(folder=self.folder, net=NET))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # slurmd looks for it
        names = [f"{NET}.1 ctl", f"{NET}.11 n1", f"{NET}.12 n2", "127.0.0.1 localhost"]
        (self.folder / "hosts").write_text("\n".join(names) + "\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "seed", "log")}
        files["socket"] = self.folder / "munge.sock"
        self.call("munged", "--force", f"--key-file={key}", f"--socket={files['socket']}", f"--pid-file={files['pid']}",
                  f"--seed-file={files['seed']}", f"--log-file={files['log']}")  # fmt: skip
        remove_networks()  # of a cluster that was killed
        self.call("ip", "link", "add", BRIDGE, "type", "bridge")
        self.call("ip", "addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        self.call("ip", "link", "set", BRIDGE, "up")
        controller = f"hostname ctl; mount --bind {self.folder}/hosts /etc/hosts; exec slurmctld -c"
        self.call("unshare", "--uts", "--mount", "bash", "-c", controller)
        for host in HOSTS:
            self._connect(host)
            self.boot(host)
        self.wait(lambda: self.call("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * len(HOSTS), 30)

    def _connect(self, host: str) -> None:
        space = f"nm-{host}"
        self.call("ip", "netns", "add", space)
        self.call("ip", "link", "add", f"nm{host}", "type", "veth", "peer", "name", "eth0", "netns", space)
        self.call("ip", "link", "set", f"nm{host}", "master", BRIDGE, "up")
        self.call("ip", "-n", space, "addr", "add", f"{NET}.1{host[1:]}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            self.call("ip", "-n", space, "link", "set", device, "up")
        files = Path("/etc/netns") / space  # `ip netns exec` lays these over /etc
        files.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / "hosts", files / "hosts")
        (files / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # no wait for reverse DNS
        (files / "resolv.conf").write_text("")

    def boot(self, host: str) -> None:
        """Power on."""
        script = f"hostname {host}; mount -t tmpfs tmpfs /dev/shm; slurmd -D -N {host} & wait"
        with (self.folder / f"{host}.log").open("ab") as log:
            self._hosts[host] = subprocess.Popen(
                ["ip", "netns", "exec", f"nm-{host}", "unshare", "--uts", "--ipc", "--pid", "--fork", "--kill-child",
                 "--mount-proc", "bash", "-c", script],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def cut_power(self, host: str) -> None:
        """Every process of the host dies at once."""
        self._hosts[host].kill()
        self._hosts[host].wait()

    def state(self, job: str) -> str:
        """SLURM's word for the job's state: COMPLETED, FAILED, ..."""
        return self.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def finish(self, *jobs: str, timeout: float = 300.0) -> list[str]:
        """The jobs' last states."""
        self.wait(lambda: not self.call("squeue", "-h", "-o", "%i"), timeout)
        return [self.state(job) for job in jobs]

    def wait(self, ready: Callable[[], object], timeout: float) -> None:
        """Until `ready()`; AssertionError with the controller's last lines after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not ready():
            log = self.folder / "slurmctld.log"
            assert time.monotonic() < deadline, "\n".join(log.read_text().splitlines()[-20:])
            time.sleep(0.2)

    def stop(self) -> None:
        """End all processes and networks of this cluster."""
        for host in self._hosts:
            self.cut_power(host)
        for name in ("slurmctld.pid", "munge.pid"):
            if (self.folder / name).exists():
                os.kill(int((self.folder / name).read_text()), signal.SIGTERM)
        remove_networks()


def remove_networks() -> None:
    """Namespaces and devices of the hosts, whether they are there or not."""
    for host in HOSTS:
        for words in (["netns", "del", f"nm-{host}"], ["link", "del", f"nm{host}"]):
            subprocess.run(["ip", *words], capture_output=True, check=False)
        shutil.rmtree(f"/etc/netns/nm-{host}", ignore_errors=True)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)
