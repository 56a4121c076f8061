"""`hvdllm doctor`: shows what this machine has, and which command installs or repairs the rest.

Whatever could be broken is loaded in a process of its own, so a build that crashes or hangs is a line in the table. The
exit code is 1 if the main job, two ranks under horovodrun, cannot run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from hvdllm import screen
from hvdllm.launch import network
from hvdllm.plain import Json

SECONDS = 60
"""How long a probe may take; a cold import of torch from a network disk can take half of it."""

SLURM_SECONDS = 15
"""How long a command of Slurm may take that needs no answer of its controller."""

REQUIRED = ("numpy", "hydra-core", "safetensors", "tokenizers", "rich")

LIBMPI = """
import json, os, re
try:
    maps = open("/proc/self/maps").read()
except OSError:  # no Linux
    maps = ""
libmpi = sorted({os.path.realpath(path) for path in re.findall(r"/\\S*/libmpi\\.so\\S*", maps)})
"""

TORCH = """
import json, torch
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None
print(json.dumps(dict(version=torch.__version__, cuda=torch.version.cuda, devices=devices, nccl=nccl)))
"""

HOROVOD = f"""
import horovod, horovod.torch as hvd
{LIBMPI}
built = [name for name in ("mpi", "gloo", "nccl") if getattr(hvd, name + "_built")()]
print(json.dumps(dict(version=horovod.__version__, built=built, libmpi=libmpi)))
"""

# Importing mpi4py.MPI would initialise MPI, which on some login nodes ends the process.
MPI4PY = f"""
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
{LIBMPI}
library = MPI.Get_library_version().strip(chr(0)).split(",")[0].splitlines()[0]
print(json.dumps(dict(version=mpi4py.__version__, library=library, libmpi=libmpi)))
"""

# It prints whether there is a key, but never the key.
WANDB = """
import json, wandb
try:
    key = wandb.login(prompt=False, verify=False)
except TypeError:  # before 0.31
    key = wandb.api.api_key
print(json.dumps(dict(version=wandb.__version__, key=bool(key))))
"""

RAY = """
import json, ray
from hvdllm.errors import UserError
from hvdllm.launch import ray_driver
try:
    ray_driver.connect("auto")
    nodes = ray_driver.nodes()
except UserError:
    nodes = []
cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
print(json.dumps(dict(version=ray.__version__, nodes=len(nodes), cpus=cpus, gpus=gpus)))
"""

TWO_RANKS = """
import horovod.torch as hvd, torch
hvd.init()
assert hvd.allreduce(torch.tensor([1.0 + hvd.rank()]), op=hvd.Sum).item() == 3
"""


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: what was looked for.
        found: what was found.
        mend: the command that repairs it; "": nothing is wrong.
    """

    name: str
    found: str
    mend: str = ""
    needed: bool = True
    """Whether the main job needs it."""

    @property
    def mark(self) -> str:
        """ok, lacking or broken."""
        return "ok" if not self.mend else "broken" if self.needed else "lacking"


def run(argv: list[str]) -> int:
    """Runs the command, and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="hvdllm doctor", description="What this machine has, and how to mend the rest."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    as_json: bool = parser.parse_args(argv).json

    rows = examine()
    able = not any(row.mark == "broken" for row in rows)
    if as_json:
        print(json.dumps({"main_job": able, "rows": [{**asdict(row), "mark": row.mark} for row in rows]}, indent=1))
    else:
        show(rows, able)
    return 0 if able else 1


def examine() -> list[Row]:
    """Looks at everything, and returns the lines of the table."""
    with ThreadPoolExecutor() as pool:
        torch, horovod, mpi4py, wandb, ray = pool.map(probe, (TORCH, HOROVOD, MPI4PY, WANDB, RAY))
    rows = [
        Row("Python", f"{platform.python_version()}, {sys.executable}"),
        Row("cores", f"{usable_cores()} usable"),
        *torch_rows(torch),
        *library_rows(),
        *horovod_rows(horovod),
        *mpi_rows(horovod, mpi4py),
        *gpu_rows(torch, horovod),
        interface_row(),
        *slurm_rows(),
        ray_row(ray),
        wandb_row(wandb),
    ]
    if all(row.mark != "broken" for row in rows):
        rows.append(two_ranks(horovod))
    return rows


def show(rows: list[Row], able: bool) -> None:
    """Prints the table, and whether the main job can run."""
    from rich.table import Table
    from rich.text import Text

    style = {"ok": "green", "lacking": "yellow", "broken": "red"}
    table = Table(box=None, pad_edge=False)
    for title in ("", "found", "mended by"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(Text(row.name, style[row.mark]), Text(row.found), Text(row.mend))
    console = screen.console()
    console.print(table)
    verdict = "The main job can run" if able else "The main job cannot run"
    console.print(f"{verdict}: horovodrun --gloo -np 2 hvdllm train", style="green" if able else "red", highlight=False)


def torch_rows(torch: Json) -> list[Row]:
    """The line for torch."""
    gpu = Path("/dev/nvidia0").exists()
    if "error" in torch:
        return [Row("torch", why(torch, "torch"), setup())]
    if torch["devices"]:
        names = ", ".join(f"{torch['devices'].count(name)} x {name}" for name in sorted(set(torch["devices"])))
        return [Row("torch", f"{torch['version']} on {names}")]
    if gpu:
        return [Row("torch", f"{torch['version']} does not see this machine's GPU", setup("--nccl"), needed=False)]
    return [Row("torch", f"{torch['version']} on CPU")]


def library_rows() -> list[Row]:
    """The line for the other packages that hvdllm needs."""
    versions = {name: version(name) for name in REQUIRED}
    missing = [name for name, found in versions.items() if not found]
    found = ", ".join(f"{name} {found or 'missing'}" for name, found in versions.items())
    return [Row("libraries", found, f"pip install {' '.join(missing)}" if missing else "")]


def horovod_rows(horovod: Json) -> list[Row]:
    """The line for Horovod."""
    if "error" in horovod:
        return [Row("Horovod", why(horovod, "horovod"), setup())]
    found = f"{horovod['version']} with {', '.join(horovod['built'])}"
    if not launcher():
        return [Row("Horovod", f"{found}, but no horovodrun", setup())]
    return [Row("Horovod", found)]


def mpi_rows(horovod: Json, mpi4py: Json) -> list[Row]:
    """The lines for MPI, ssh and mpi4py, which must use the same MPI library as Horovod."""
    if "mpi" not in horovod.get("built", ["mpi"]):
        mend = setup("--nccl" if "nccl" in horovod["built"] else "--cpu")
        return [Row("MPI", "not built into Horovod: horovodrun --gloo only", mend, needed=False)]
    rows = []
    mpirun = shutil.which("mpirun")
    if mpirun:
        lines = output([mpirun, "--version"]).splitlines()
        rows.append(Row("MPI", f"{next((line for line in lines if line.strip()), 'unknown')}, {mpirun}"))
        if "Open MPI" in rows[0].found and not shutil.which("ssh"):
            rows.append(Row("ssh", "missing: Open MPI would not start", "export OMPI_MCA_plm=isolated", needed=False))
    else:
        rows.append(Row("MPI", "no mpirun on PATH", "load your MPI module, or as root " + setup(), needed=False))
    if "error" in mpi4py:
        rows.append(Row("mpi4py", why(mpi4py, "mpi4py"), "pip install mpi4py", needed=False))
    elif horovod.get("libmpi") and horovod["libmpi"] != mpi4py["libmpi"]:
        found = f"{mpi4py['version']} on {' '.join(mpi4py['libmpi'])}, Horovod on {' '.join(horovod['libmpi'])}"
        mend = (
            "MPICC=$(command -v mpicc) pip install --force-reinstall --no-deps --no-cache-dir --no-binary mpi4py mpi4py"
        )
        rows.append(Row("mpi4py", found, mend, needed=False))
    else:
        shared = ", the same library as Horovod's" if horovod.get("libmpi") else ""
        rows.append(Row("mpi4py", f"{mpi4py['version']} on {mpi4py['library']}{shared}"))
    return rows


def gpu_rows(torch: Json, horovod: Json) -> list[Row]:
    """The lines for CUDA and NCCL. Whether torch and Horovod load at all is told by their own lines."""
    built = "nccl" in horovod.get("built", [])
    parts = [f"torch built for {torch['cuda']}"] if torch.get("cuda") else []
    nvcc = shutil.which("nvcc", path=path_of_nvcc())
    parts += [f"compiler {nvcc}"] if nvcc else []
    if not torch.get("devices"):
        found = "; ".join(["no GPU that torch can use", *parts])
        return [Row("CUDA", found), Row("NCCL", "built into Horovod" if built else "for GPUs alone")]
    cuda = Row("CUDA", "; ".join([f"{len(torch['devices'])} GPUs", *parts]))
    if built:
        return [cuda, Row("NCCL", f"built into Horovod, with torch's {torch['nccl']}")]
    first = "" if nvcc else "load a module with nvcc or export CUDA_HOME=..., then "
    return [cuda, Row("NCCL", "Horovod is without it for these GPUs", first + setup("--nccl"), needed=False)]


def interface_row() -> Row:
    """The line with the interfaces that are up and their IPv4 addresses. Their names are what launch.interface and
    horovodrun --network-interfaces take."""
    up = network.addresses()
    found = ", ".join(f"{name} {address}" for name, address in up.items()) or "none is up"
    return Row("interfaces", found, "" if "lo" in up else "as root: ip link set lo up", needed=False)


def slurm_rows() -> list[Row]:
    """The lines for Slurm, and for PMIx in its srun."""
    if not shutil.which("sbatch"):
        mend = "on a cluster's login node: module load slurm"
        return [Row("Slurm", "no sbatch on PATH, which launch=slurm needs", mend, needed=False)]
    version = output(["sbatch", "--version"], SLURM_SECONDS).strip()
    if not re.match(r"slurm\S* \d", version):
        mend = "export SLURM_CONF=/path/to/slurm.conf"
        return [Row("Slurm", f"does not answer: {last_line(version) or 'no configuration'}", mend, needed=False)]
    job = os.environ.get("SLURM_JOB_ID")
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    rows = [Row("Slurm", f"{version}, {f'inside job {job}, nodes: {nodes}' if job else 'inside no job'}")]
    kinds = [line.split()[-1] for line in output(["srun", "--mpi=list"], SLURM_SECONDS).splitlines() if line.strip()]
    if any(kind.startswith("pmix") for kind in kinds):
        return [*rows, Row("PMIx", "known to srun")]
    return [*rows, Row("PMIx", "unknown to srun", "hvdllm train launch=slurm launch.how=gloo", needed=False)]


def ray_row(ray: Json) -> Row:
    """The line for Ray, and for the cluster that this machine is in."""
    if "error" in ray:
        return Row("Ray", f"{why(ray, 'ray')}, which launch=ray needs", "pip install 'hvdllm[ray]'", needed=False)
    if not ray["nodes"]:
        found = f"{ray['version']}, this machine is in no cluster, which launch=ray needs"
        return Row("Ray", found, "ray start --address=HEAD:6379, on the first node ray start --head", needed=False)
    return Row("Ray", f"{ray['version']}, cluster of {ray['nodes']} nodes, {ray['cpus']} CPUs, {ray['gpus']} GPUs")


def wandb_row(wandb: Json) -> Row:
    """The line for W&B."""
    if "error" in wandb:
        return Row("W&B", why(wandb, "wandb"), "pip install wandb", needed=False)
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in ("online", "run"):
        return Row("W&B", f"{wandb['version']}, offline by WANDB_MODE={mode}")
    if wandb["key"]:
        return Row("W&B", f"{wandb['version']}, with a key")
    return Row("W&B", f"{wandb['version']}, without a key: runs stay offline", "wandb login", needed=False)


def two_ranks(horovod: Json) -> Row:
    """Runs two ranks under horovodrun, and returns the line for them."""
    controller = "gloo" if "gloo" in horovod["built"] else "mpi"
    command = [launcher(), f"--{controller}", "-np", "2", sys.executable, "-P", "-c", TWO_RANKS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        found = f"no answer within {SECONDS} s under horovodrun --{controller}"
    else:
        if done.returncode == 0:
            return Row("two ranks", f"add up under horovodrun --{controller}")
        found = f"fail under horovodrun --{controller}: {last_line(done.stderr) or 'no message'}"
    return Row("two ranks", found, "horovodrun --network-interfaces lo --gloo -np 2 hvdllm train")


def probe(code: str) -> Json:
    """Runs `code` in a process of its own. Returns what it prints as JSON, or {"error": why it printed nothing}."""
    try:
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {SECONDS} s"}
    if done.returncode == 0:
        facts: Json = json.loads(last_line(done.stdout))
        return facts
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}"}
    return {"error": last_line(done.stderr) or f"exit code {done.returncode}"}


def why(facts: Json, module: str) -> str:
    """Why a probe of a module failed, in words."""
    missing = facts["error"].endswith(f"No module named '{module}'")
    return "missing" if missing else f"does not load: {facts['error']}"


def output(command: list[str], seconds: float = SECONDS) -> str:
    """What a command prints to standard output and then to standard error, or why it could not be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
        return done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def last_line(text: str) -> str:
    """The last line that is not empty, or ""."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def version(name: str) -> str:
    """The version of an installed package, or ""."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def launcher() -> str:
    """The path of horovodrun, or "". The one beside this Python need not be on PATH."""
    beside = Path(sys.executable).with_name("horovodrun")
    return str(beside) if beside.exists() else shutil.which("horovodrun") or ""


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def path_of_nvcc() -> str:
    """The folders in which jobs/setup.sh looks for nvcc."""
    home = os.environ.get("CUDA_HOME")
    return f"{home}/bin" if home else os.environ.get("PATH", "")


def setup(option: str = "") -> str:
    """The command line of jobs/setup.sh."""
    clone = Path(__file__).parents[2] / "jobs" / "setup.sh"
    return f"{'' if clone.exists() else 'from a clone of hvdllm: '}jobs/setup.sh {option}".rstrip()
