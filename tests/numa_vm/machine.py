#!/usr/bin/env python3
"""An emulated machine with four NUMA nodes: QEMU in software emulation, a 6.12 kernel of Debian, this machine's files.

machine.py setup                                  install QEMU if missing, fetch the kernel (Debian 12 or later, x86-64)
machine.py run [-t SECONDS] [-o FOLDER] CMD...    boot, run CMD as root from the current folder, exit with its status
machine.py check                                  exit 0 when it is set up, else say what is missing

Nodes 0 and 1 have one CPU each, nodes 2 and 3 have memory only, as CXL expanders do. Where pages land in there is real
(the kernel's own policy code, move_pages, numa_maps); how long anything takes there means nothing. The guest sees this
machine's file system, read-only under an overlay in RAM; only FOLDER (default .numa-vm) is written through, and has the
same path in there. A file in FOLDER must not be replaced while the guest reads it: that can hang (whole.py says why).
Exit status: the command's; 124 after a time-out; 125 when the machine itself fails.

LDFT_NUMA_VM_CACHE  where kernel and initial RAM disk are kept (default: ldft/numa-vm in the user's cache folder)
LDFT_NUMA_VM_NODES  the nodes and their MiB (default "cpu:1536 cpu:1536 mem:1024 mem:1024")
"""

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NODES = "cpu:1536 cpu:1536 mem:1024 mem:1024"
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "depmod": "kmod",
    "xz": "xz-utils",
    "numactl": "numactl",
}
MODULES = ["virtio_pci", "9pnet_virtio", "9p", "overlay"]
TIMED_OUT, BROKEN = 124, 125


class MachineError(Exception):
    """Says in one line what is missing or went wrong, and what to do."""


def cache() -> Path:
    if chosen := os.environ.get("LDFT_NUMA_VM_CACHE"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "ldft" / "numa-vm"


def find_tool(name: str) -> str | None:
    """Path of a program; users often have no sbin on their PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin:/bin")


def stamp() -> str:
    return hashlib.sha256((HERE / "init").read_bytes()).hexdigest()


def require_ready() -> None:
    """Raises MachineError, with the way to set it up, unless `run` can boot."""
    if platform.machine() != "x86_64":
        raise MachineError(f"the guest uses this machine's files and is x86-64; this machine is {platform.machine()}")
    if not find_tool("qemu-system-x86_64"):
        raise MachineError(
            "QEMU (qemu-system-x86_64) is not installed; set it up with `make numa-vm` (as root, Debian 12 or later)"
        )
    marker = cache() / "stamp"
    if not marker.exists():
        raise MachineError(f"no kernel in {cache()}; set it up with `make numa-vm` (Debian 12 or later)")
    if marker.read_text() != stamp():
        raise MachineError("tests/numa_vm/init changed since the set-up; run `make numa-vm` again")


def command(*args: str | Path, cwd: Path | None = None) -> str:
    """Runs a program of the set-up and returns its output; a failure shows the last lines of what it said."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    done = subprocess.run(
        [str(a) for a in args], cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise MachineError(f"`{Path(args[0]).name} {' '.join(map(str, args[1:]))[:120]}` failed: {said}")
    return done.stdout


def debian_release() -> int:
    """Major version of Debian here."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    name, version = release.get("ID", "an unknown system"), release.get("VERSION_ID", "")
    if name != "debian" or not shutil.which("apt-get"):
        raise MachineError(
            f"the set-up takes QEMU and a kernel from Debian's packages, this is {name}; use Debian 12 or later"
        )
    # testing and unstable have no VERSION_ID
    major = int(version.split(".")[0]) if version else 99
    if major < 12:
        raise MachineError(
            f"this is Debian {version}; weighted interleave needs a kernel of Debian 12's backports or later"
        )
    return major


def install_tools() -> None:
    missing = [package for tool, package in TOOLS.items() if not find_tool(tool)]
    if os.geteuid() == 0:  # fresh images come without package lists, and the kernel is looked up in them too
        command("apt-get", "update", "-qq")
    if not missing:
        return
    if os.geteuid() != 0:
        raise MachineError(
            f"not root, and packages are missing; first run, as root: apt-get install {' '.join(missing)}"
        )
    print(f"numa-vm: installing {' '.join(missing)}", flush=True)
    command("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing)


def mirror(codename: str) -> str:
    """Address of the Debian archive that this machine's own apt uses; backports are on the same mirror."""
    lines = command(
        "apt-get", "indextargets", "--format", "$(CODENAME) $(ORIGIN) $(REPO_URI)", "Created-By: Packages"
    ).splitlines()
    known = dict(reversed([(c, uri) for c, origin, uri in map(str.split, lines) if origin.startswith("Debian")]))
    for suite in (f"{codename}-backports", codename, f"{codename}-updates"):
        if suite in known:
            return known[suite]
    raise MachineError("apt has no Debian mirror; check /etc/apt/sources.list* and, as root, run `apt-get update`")


def apt_options(work: Path, release: int) -> list[str]:
    """Options for apt that find a kernel of 6.9 or later: Debian 12's own is 6.1, so its backports, in lists of our own."""
    if release > 12:
        return []
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    signed = f"[signed-by={keyring}] " if keyring.exists() else ""
    sources = work / "backports.list"
    sources.write_text(f"deb {signed}{mirror('bookworm')} bookworm-backports main\n")
    (work / "lists" / "partial").mkdir(parents=True)
    (work / "archives" / "partial").mkdir(parents=True)
    settings = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work,
        "Dir::Cache::archives": work / "archives",
    }
    options = [item for key, value in settings.items() for item in ("-o", f"{key}={value}")]
    command("apt-get", *options, "update", "-qq")
    return options


def fetch_kernel(work: Path, release: int) -> Path:
    """Unpacks Debian's kernel for cloud and bare machines; returns the folder that holds boot/ and lib/modules/."""
    options = apt_options(work, release)
    depends = command("apt-cache", *options, "depends", "linux-image-amd64").splitlines()
    names = [line.split()[-1] for line in depends if "Depends: linux-image-" in line]
    if not names:
        raise MachineError("apt has no linux-image-amd64; run `apt-get update` as root and try again")
    print(f"numa-vm: fetching {names[0]}", flush=True)
    # apt drops its privileges for a download when its own user may write there, and warns otherwise; as root is fine.
    command("apt-get", *options, "-o", "APT::Sandbox::User=root", "download", "-qq", names[0], cwd=work)
    root = work / "kernel"
    command("dpkg-deb", "-x", next(work.glob(f"{names[0]}_*.deb")), root)
    if not (root / "lib").exists():  # Debian 13 ships /usr/lib/modules
        (root / "lib").symlink_to("usr/lib")
    return root


def make_ramdisk(work: Path, kernel: Path) -> None:
    """Initial RAM disk: busybox, our init, and the modules of 9p and overlay in the order in which they load."""
    version = next((kernel / "lib/modules").iterdir()).name
    modules = kernel / "lib/modules" / version
    command(find_tool("depmod") or "depmod", "-b", kernel, version)
    depends = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(":")
        depends[Path(path).name.split(".")[0].replace("-", "_")] = [path, *needs.split()]
    order: list[str] = []
    for name in MODULES:  # one that is missing is built into the kernel; if it is not, mounting says so
        order += [path for path in reversed(depends.get(name, [])) if path not in order]
    ramdisk = work / "ramdisk"
    for folder in ("bin", "proc", "sys", "dev", "modules", "host", "rw", "new"):
        (ramdisk / folder).mkdir(parents=True)
    for path in order:
        target = ramdisk / "modules" / Path(path).name
        shutil.copy(modules / path, target)
        if target.suffix == ".xz":
            command("xz", "-d", target)
    names = [Path(path).name.removesuffix(".xz") for path in order]
    (ramdisk / "modules" / "order").write_text("\n".join(names) + "\n")
    shutil.copy(find_tool("busybox") or "", ramdisk / "bin" / "busybox")
    shutil.copy(HERE / "init", ramdisk / "init")
    (ramdisk / "init").chmod(0o755)
    command("sh", "-c", "find . | cpio --quiet -o -H newc | gzip -1 > ../initrd.gz", cwd=ramdisk)


def setup() -> None:
    if platform.machine() != "x86_64":
        raise MachineError(f"the guest uses this machine's files and is x86-64; this machine is {platform.machine()}")
    try:
        require_ready()
        print(f"numa-vm: already set up in {cache()}")
        return
    except MachineError:
        pass
    release = debian_release()
    install_tools()
    work = cache() / "new"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    kernel = fetch_kernel(work, release)
    make_ramdisk(work, kernel)
    (cache() / "stamp").unlink(missing_ok=True)
    (work / "initrd.gz").replace(cache() / "initrd.gz")
    next((kernel / "boot").glob("vmlinuz-*")).replace(cache() / "vmlinuz")
    shutil.rmtree(work)
    (cache() / "stamp").write_text(stamp())
    print(f"numa-vm: ready in {cache()}; try: tests/numa_vm/machine.py run numactl -H")


def numa_arguments() -> list[str]:
    """QEMU's options for the nodes."""
    arguments: list[str] = []
    total = cpus = 0
    for node, text in enumerate(os.environ.get("LDFT_NUMA_VM_NODES", NODES).split()):
        kind, _, size = text.partition(":")
        if kind not in ("cpu", "mem") or not size.isdigit():
            raise MachineError(f"LDFT_NUMA_VM_NODES: {text!r} is not cpu:MIB or mem:MIB, for instance {NODES!r}")
        arguments += ["-object", f"memory-backend-ram,id=ram{node},size={size}M"]
        arguments += ["-numa", f"node,nodeid={node},memdev=ram{node}" + (f",cpus={cpus}" if kind == "cpu" else "")]
        total, cpus = total + int(size), cpus + (kind == "cpu")
    return ["-smp", str(cpus), "-m", f"{total}M", *arguments]


def start_script(words: list[str], control: Path) -> str:
    """What the guest's first process runs after the mounts. The console is the kernel's, the second port the command's."""
    status = shlex.quote(str(control / "status"))
    exports = {name: os.environ[name] for name in ("HOME", "PATH", "LANG", "TERM") if name in os.environ}
    return "\n".join(
        [
            *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
            "stty -F /dev/ttyS1 -opost 2>/dev/null",
            f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
            # Through a pipe: a program that sees a terminal would draw progress lines on it.
            f"{{ {shlex.join(words)}; echo $? > {status}.new; }} </dev/null 2>&1 | cat > /dev/ttyS1",
            f"mv {status}.new {status}; sync",
            "echo o > /proc/sysrq-trigger; sleep 60",
            "",
        ]
    )


def run(words: list[str], folder: Path, limit_s: float) -> int:
    """Boots, runs `words`, returns its status; raises MachineError if the machine did not shut down on its own."""
    require_ready()
    folder = folder.absolute()
    control = folder / ".machine" / str(os.getpid())  # two machines may share a folder
    control.mkdir(parents=True, exist_ok=True)
    if "," in str(folder):
        raise MachineError(f"{folder}: QEMU takes no comma in the path of the written-through folder")
    status, console = control / "status", control / "console.log"
    status.unlink(missing_ok=True)
    console.write_text("")
    (control / "start.sh").write_text(start_script(words, control))
    # The last two save emulated instructions: no defences against speculation, which there is none of, and a library at the
    # same address in every process, so that the emulator can use its translation again.
    quiet = "console=ttyS0 quiet panic=-1 mitigations=off norandmaps"
    own = f"numa_vm_out={os.fsencode(folder).hex()} numa_vm_run={os.getpid()}"
    share = "security_model=none,multidevs=remap"
    arguments = [
        # Nothing is left running when this process is killed.
        *("setpriv", "--pdeathsig", "KILL", "--", find_tool("qemu-system-x86_64") or ""),
        # With page tables of four levels, not five: the emulator walks them for each page that it has not seen lately.
        *("-accel", "tcg,thread=multi", "-cpu", "max,la57=off", *numa_arguments()),
        *("-kernel", str(cache() / "vmlinuz"), "-initrd", str(cache() / "initrd.gz"), "-append", f"{quiet} {own}"),
        *("-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot"),
        *("-serial", f"file:{console}", "-serial", "stdio"),
        *("-virtfs", f"local,path=/,mount_tag=hostroot,readonly=on,{share}"),
        *("-virtfs", f"local,path={folder},mount_tag=out,{share}"),
    ]
    began = time.monotonic()
    try:
        done = subprocess.run(arguments, stdin=subprocess.DEVNULL, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"time-out: the guest was still running after {limit_s:.0f} s") from None
    if status.exists():
        code = int(status.read_text())
        shutil.rmtree(control)
        return code
    said = [line for line in console.read_text(errors="replace").splitlines() if line.strip()]
    panic = next((line for line in said if "Kernel panic" in line), "")
    last = (
        panic or next((line for line in said if line.startswith("numa-vm:")), "") or (said[-1] if said else "nothing")
    )
    raise MachineError(
        f"the guest ended without a status after {time.monotonic() - began:.0f} s (QEMU's exit status {done.returncode}); "
        f"its console, {console}, says: {last.strip()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup")
    commands.add_parser("check")
    runner = commands.add_parser("run")
    runner.add_argument("-t", type=float, default=600, metavar="SECONDS", dest="limit_s")
    runner.add_argument("-o", type=Path, default=Path(".numa-vm"), metavar="FOLDER", dest="folder")
    runner.add_argument("words", nargs=argparse.REMAINDER, metavar="CMD")
    given = parser.parse_args()
    try:
        if given.command == "setup":
            setup()
        elif given.command == "check":
            require_ready()
        elif not given.words:
            raise MachineError("run needs a command")
        else:
            return run(given.words, given.folder, given.limit_s)
    except TimeoutError as error:
        print(f"numa-vm: {error}", file=sys.stderr)
        return TIMED_OUT
    except (MachineError, OSError) as error:
        print(f"numa-vm: {error}", file=sys.stderr)
        return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
