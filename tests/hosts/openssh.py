"""OpenSSH for the pretend hosts: this machine's, or Debian's packages unpacked beside the checkout, never installed.

Knows: where sshd is, how it is configured, keys. Must not know: hosts' namespaces, or what runs over ssh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGES = ("openssh-server", "openssh-client")
PROGRAMS = ("sshd", "ssh", "ssh-keygen")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class NoOpenSSH(Exception):
    """There is no sshd on this machine, and none can be fetched; says why."""


@dataclass(frozen=True, slots=True)
class OpenSSH:
    """Where OpenSSH is: ``usr`` is a folder to be laid over the hosts' /usr, or None where all of it is installed."""

    usr: Path | None

    def make_key(self, comment: str) -> Key:
        """A new ed25519 key without a passphrase."""
        program = shutil.which("ssh-keygen", path=SYSTEM_PATH) or str(self._usr_path("bin/ssh-keygen"))
        env = {"PATH": SYSTEM_PATH, "LD_LIBRARY_PATH": ":".join(map(str, self._libraries()))}
        with TemporaryDirectory(prefix="mpgpt-key-") as folder:
            path = Path(folder, "key")
            command = [program, "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
            subprocess.run(command, env=env, stdin=subprocess.DEVNULL, check=True)
            return Key(path.read_text(), path.with_suffix(".pub").read_text())

    def _usr_path(self, path: str) -> Path:
        assert self.usr
        return self.usr / path

    def _libraries(self) -> list[Path]:
        return sorted((self.usr / "lib").glob("*-linux-gnu*")) if self.usr else []


@dataclass(frozen=True, slots=True)
class Key:
    """A key pair as OpenSSH writes it."""

    private: str
    public: str


def find_openssh(folder: Path) -> OpenSSH:
    """This machine's OpenSSH where it is complete; else Debian's, unpacked in ``folder`` once."""
    if all(shutil.which(program, path=SYSTEM_PATH) for program in PROGRAMS):
        return OpenSSH(None)
    if not (folder / "usr/sbin/sshd").exists():
        _unpack(folder)
    return OpenSSH(folder / "usr")


def _unpack(folder: Path) -> None:
    """Fetch the packages and whatever they need that is not here, and unpack them; nothing is installed or started."""
    if not shutil.which("apt-get"):
        raise NoOpenSSH("there is no sshd, and no apt-get to fetch Debian's")
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    archives = part / "archives"
    (archives / "partial").mkdir(parents=True)
    try:
        fetch = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", "--download-only"]
        _run([*fetch, "-o", f"Dir::Cache::archives={archives}/", *PACKAGES])
        root = part / "root"
        for package in sorted(archives.glob("*.deb")):
            _run(["dpkg", "-x", str(package), str(root)])
        for name in ("bin", "sbin", "lib"):  # what the packages of a machine with a merged /usr still put beside it
            if (root / name).is_dir():
                shutil.copytree(root / name, root / "usr" / name, symlinks=True, dirs_exist_ok=True)
        if not (root / "usr/sbin/sshd").exists():
            raise NoOpenSSH("there is no sshd, and apt-get fetched none")
        try:
            root.replace(folder)
        except OSError:  # another process was quicker
            if not (folder / "usr/sbin/sshd").exists():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _run(command: list[str]) -> None:
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    ended = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
        hint = " (perhaps after `apt-get update`)" if command[0] == "apt-get" else ""
        raise NoOpenSSH(f"there is no sshd, and {command[0]} cannot give Debian's{hint}: {said[0] if said else '?'}")


def sshd_config(host_key: str, pid_file: str) -> str:
    """The configuration of a host's sshd: keys only, no question, no dependence on the machine's accounts."""
    return f"""\
Port 22
HostKey {host_key}
PidFile {pid_file}
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 100
UseDNS no
Subsystem sftp internal-sftp
"""
