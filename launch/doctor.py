"""`braid doctor`: what a machine has for training, what is missing, what that costs, and what mends it."""

import json
import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from engine.config.parse import help_text, parse
from launch.disk import nearest

_USAGE = """usage: braid doctor [--flag value ...]

Looks at Python, libraries, GPUs, disk, memory, limits and network of this machine. Nothing is changed. Exit
code 0: training runs here, 1: something has to be mended first.
"""
_GIB = 2**30
_STYLES = {"ok": "green", "note": "yellow", "wrong": "red"}
# Shared memory in which NCCL's ranks of a node meet, files that a run opens, room for a checkpoint.
_LEAST_SHM = 1 * _GIB
_LEAST_FILES = 4096
_LEAST_DISK = 20 * _GIB


@dataclass(kw_only=True)
class DoctorOptions:
    """Flags of `braid doctor`."""

    output_dir: str = "."
    """Where runs will write: its disk is looked at."""

    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "note", "wrong"]
    """note: training runs without it; wrong: it does not run, or not as it should."""
    found: str
    cost: str = ""
    """What the state costs; empty where it is ok."""
    remedy: str = ""
    """The one command or setting that mends it."""


def doctor(argv: Sequence[str]) -> int:
    """The command `braid doctor`: 0 if nothing is wrong, 1 otherwise. Raises ConfigError for its flags.

    `--json` prints an object with `findings`, each with `name`, `state` (ok, note, wrong), `found`, `cost`
    and `remedy`.
    """
    if "--help" in argv or "-h" in argv:
        print(_USAGE + help_text(DoctorOptions))
        return 0
    options, _ = parse(DoctorOptions, argv)
    findings = list(examine(Path(options.output_dir)))
    if options.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        _print(findings)
    return int(any(finding.state == "wrong" for finding in findings))


def examine(output_dir: Path) -> Iterator[Finding]:
    """Look at everything."""
    yield _python()
    yield from _requirements()
    yield from _torch()
    yield from _optional()
    yield _disk(output_dir)
    yield _shared_memory()
    yield from _limits()
    yield from _network()


def _python() -> Finding:
    return Finding(name="python", state="ok", found=f"{platform.python_version()} on {platform.platform()}")


def _requirements() -> Iterator[Finding]:
    """What pyproject.toml asks for, as the installed package says it."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires("braid") or []]
    except PackageNotFoundError:
        yield Finding(
            name="braid",
            state="note",
            found="not installed; it runs from its source tree",
            cost="versions of its requirements are not checked",
            remedy="pip install -e .",
        )
        return
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(
                name=requirement.name,
                state="wrong",
                found="not installed",
                cost="Braid needs it",
                remedy=remedy,
            )
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        yield Finding(
            name=requirement.name,
            state="ok" if fits else "wrong",
            found=found,
            cost="" if fits else f"Braid is made for {requirement.specifier}",
            remedy="" if fits else remedy,
        )


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        return  # said among the requirements
    if not torch.cuda.is_available():
        yield _no_gpu(built_for=torch.version.cuda)
        return
    yield Finding(name="CUDA", state="ok", found=f"{torch.version.cuda} of torch, driver {_driver()}")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding(name="NCCL", state="ok", found=nccl)
    try:
        yield Finding(name="cuDNN", state="ok", found=str(torch.backends.cudnn.version()))
    except RuntimeError:
        yield Finding(
            name="cuDNN",
            state="note",
            found=f"not torch's own: LD_LIBRARY_PATH={os.environ.get('LD_LIBRARY_PATH')}",
            cost="what calls cuDNN through torch fails",
            remedy="take the other cuDNN out of LD_LIBRARY_PATH",
        )
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        old = card.major < 8
        yield Finding(
            name=f"GPU {index}",
            state="note" if old else "ok",
            found=f"{card.name}, {card.total_memory / _GIB:.0f} GiB, capability {card.major}.{card.minor}",
            cost="no bf16 arithmetic in hardware" if old else "",
            remedy="pass --torch_dtype float16" if old else "",
        )


def _no_gpu(built_for: str | None) -> Finding:
    cost = "runs take place on the CPU, in fp32: for trying things out"
    if not Path("/dev/nvidia0").exists():
        return Finding(name="GPU", state="note", found="none", cost=cost, remedy="a machine with NVIDIA GPUs")
    if built_for is None:
        return Finding(
            name="GPU",
            state="wrong",
            found="there is one, but torch is a build for CPUs",
            cost=cost,
            remedy="pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130",
        )
    return Finding(
        name="GPU",
        state="wrong",
        found=f"there is one, but torch for CUDA {built_for} cannot open it; driver {_driver()}",
        cost=cost,
        remedy="nvidia-smi, and a driver for that CUDA; CUDA_VISIBLE_DEVICES must not be empty",
    )


def _driver() -> str:
    """Version of the NVIDIA driver."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return "unknown"
    return next((word for word in line.split() if word[0].isdigit()), "unknown")


@dataclass(frozen=True, kw_only=True)
class _Extra:
    """A library that training does without."""

    package: str
    cost: str
    remedy: str
    hopper: bool = False
    """Of use on Hopper and Blackwell only."""


_EXTRAS = (
    _Extra(
        package="transformer-engine",
        cost="no fp8, no cp_comm_type p2p; Braid's own layers are as fast",
        remedy="pip install 'braid[te]'",
    ),
    _Extra(
        package="flash-attn-4",
        cost="attention runs on Braid's Triton kernels",
        remedy="pip install 'braid[fa4]'",
        hopper=True,
    ),
)


def _optional() -> Iterator[Finding]:
    """What makes runs on GPUs faster, where there are some."""
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    from engine.runtime.kernels import can_compile

    compiles = can_compile()
    yield Finding(
        name="Triton",
        state="ok" if compiles else "note",
        found="compiles kernels" if compiles else "cannot compile: it is missing, or a C compiler is",
        cost="" if compiles else "norms, rotary embedding, SwiGLU, attention and softmax take longer",
        remedy="" if compiles else "apt install gcc",
    )
    hopper = torch.cuda.get_device_capability()[0] in (9, 10)
    for extra in _EXTRAS:
        if extra.hopper and not hopper:
            continue
        try:
            yield Finding(name=extra.package, state="ok", found=version(extra.package))
        except PackageNotFoundError:
            yield Finding(
                name=extra.package,
                state="note",
                found="not installed",
                cost=extra.cost,
                remedy=extra.remedy,
            )


def _disk(output_dir: Path) -> Finding:
    there = nearest(output_dir)
    free = shutil.disk_usage(there).free
    found = f"{free / _GIB:,.0f} GiB free at {there}"
    if not os.access(there, os.W_OK):
        return Finding(
            name="disk",
            state="wrong",
            found=f"no permission to write at {there}",
            cost="runs cannot save anything",
            remedy="pass --output_dir DIR of your own",
        )
    if free >= _LEAST_DISK:
        return Finding(name="disk", state="ok", found=found)
    return Finding(
        name="disk",
        state="note",
        found=found,
        cost="a checkpoint of full training takes 14 bytes a parameter: 98 GB at 7 B",
        remedy="another --output_dir, or --save_total_limit 1",
    )


def _shared_memory() -> Finding:
    directory = Path("/dev/shm")
    if not directory.is_dir():
        return Finding(name="shared memory", state="note", found="no /dev/shm", cost="NCCL may need it")
    total = shutil.disk_usage(directory).total
    enough = total >= _LEAST_SHM
    return Finding(
        name="shared memory",
        state="ok" if enough else "note",
        found=f"{total / _GIB:.1f} GiB at /dev/shm",
        cost="" if enough else "NCCL between GPUs of this node fails or is slow",
        remedy="" if enough else "docker run --shm-size=16g, or --ipc=host",
    )


def _limits() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= files < _LEAST_FILES  # -1 stands for no limit
    yield Finding(
        name="open files",
        state="note" if few else "ok",
        found="unlimited" if files < 0 else str(files),
        cost="many processes on a node, or checkpoints of many files, can run out of them" if few else "",
        remedy="ulimit -n 65536" if few else "",
    )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    low = locked >= 0 and any(Path("/sys/class/infiniband").glob("*"))
    yield Finding(
        name="locked memory",
        state="note" if low else "ok",
        found="unlimited" if locked < 0 else f"{locked / 2**20:,.0f} MiB",
        cost="InfiniBand cannot register its buffers" if low else "",
        remedy="ulimit -l unlimited" if low else "",
    )


def _network() -> Iterator[Finding]:
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    others = sorted(up - {"lo"})
    yield Finding(
        name="network",
        state="ok" if others else "note",
        found=", ".join(others) or "loopback only",
        cost="" if others else "runs on several nodes are not possible",
    )
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "").lstrip("^=")
        missing = [name for name in wanted.split(",") if name and not any(i.startswith(name) for i in up)]
        if missing:
            yield Finding(
                name=variable,
                state="wrong",
                found=f"names {', '.join(missing)}, which is not up here",
                cost="ranks do not find each other",
                remedy=f"export {variable}={others[0] if others else 'lo'}",
            )
    host = socket.gethostname()
    try:
        socket.getaddrinfo(host, None)
        yield Finding(name="host name", state="ok", found=host)
    except OSError:
        yield Finding(
            name="host name",
            state="note",
            found=f"{host} has no address",
            cost="other nodes cannot reach this one by its name, and gloo may not start",
            remedy="MASTER_ADDR with a number, or a line in /etc/hosts",
        )


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "found", "what it costs", "what mends it")
    for finding in findings:
        name = Text(f"{finding.name}: {finding.state}", style=_STYLES[finding.state])
        table.add_row(name, Text(finding.found), Text(finding.cost), Text(finding.remedy))
    console = Console()
    console = Console(width=console.width if console.is_terminal else 180)
    console.print(table)
    wrong = sum(finding.state == "wrong" for finding in findings)
    console.print(f"{wrong} wrong: mend that first" if wrong else "training runs here")
