"""jobs/setup.sh: what it refuses, what it says when a step fails, and that a second run needs no network."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORD = ROOT / ".venv" / "hvdllm-setup"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """As much of a clone as setup.sh reads before it installs hvdllm itself."""
    for name in ("jobs/setup.sh", "setup.py", "setup.cfg"):
        target = tmp_path / "clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    (tmp_path / "tmp").mkdir()
    return tmp_path / "clone"


def setup(clone: Path, *options: str, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs it as a stranger would: no settings of ours, no index to install from."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HVDLLM_", "PIP_", "CUDA_HOME"))}
    nothing_to_install_from = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    base = {"HVDLLM_CACHE": f"{clone}/cache", "TMPDIR": f"{clone.parent}/tmp"}
    if path:
        base["PATH"] = path
    return subprocess.run(
        ["bash", str(clone / "jobs" / "setup.sh"), *options],
        env=inherited | nothing_to_install_from | base | environment,
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )


def executable(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


def tools_without(folder: Path, *names: str) -> str:
    """A PATH that has what this machine has, except some commands."""
    folder.mkdir()
    for directory in reversed(os.environ["PATH"].split(os.pathsep)):
        for tool in Path(directory).glob("*"):
            link = folder / tool.name
            link.unlink(missing_ok=True)
            if tool.name not in names:
                link.symlink_to(tool)
    return str(folder)


no_gpu = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        (["--dve"], {}, "unknown option --dve"),
        (["cpu"], {}, "unknown option cpu"),
        (["--cpu", "--nccl"], {}, "exclude each other"),
        (["--cpu"], {"HVDLLM_TORCH": ">=2.13"}, "one exact version"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    clone: Path, options: list[str], environment: dict[str, str], words: str
) -> None:
    done = setup(clone, *options, **environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (clone / ".venv").exists()


@no_gpu
def test_a_login_node_is_asked(clone: Path, tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "sbatch", "exit 0")
    cluster = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = setup(clone, path=cluster)
    assert done.returncode == 2
    assert re.search("--nccl.*--cpu", done.stderr)
    assert done.stderr.count("\n") == 1

    # An answer given before holds, so jobs/quickstart.sh runs there afterwards; the odd version ends it soon.
    (clone / ".venv").mkdir()
    (clone / ".venv" / "hvdllm-setup").write_text("device=cpu\n")
    done = setup(clone, path=cluster, HVDLLM_TORCH="odd")
    assert "HVDLLM_TORCH" in done.stderr
    assert "login" not in done.stderr


@no_gpu
def test_slurm_installed_for_the_tests_makes_no_login_node(clone: Path) -> None:
    if shutil.which("sbatch") != "/usr/bin/sbatch" or Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("needs Slurm as --dev installs it")
    done = setup(clone, HVDLLM_TORCH="odd", SLURM_CONF="")
    assert "HVDLLM_TORCH" in done.stderr
    done = setup(clone, HVDLLM_TORCH="odd", SLURM_CONF="/anywhere/slurm.conf")
    assert "login node" in done.stderr


def test_without_mpi_and_without_a_way_to_install_it(clone: Path, tmp_path: Path) -> None:
    path = tools_without(tmp_path / "bin", "mpicc", "mpirun", "apt-get")
    done = setup(clone, "--cpu", path=path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    for words in ("an MPI (mpicc, mpirun)", "module", "libopenmpi-dev", "--no-mpi"):
        assert words in done.stderr


def test_nccl_needs_the_compiler_of_cuda(clone: Path, tmp_path: Path) -> None:
    done = setup(clone, "--nccl", "--no-mpi", path=tools_without(tmp_path / "bin", "nvcc"))
    assert done.returncode == 1
    assert "CUDA_HOME" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)])
def test_an_interrupted_run_leaves_nothing_that_breaks_the_next(
    clone: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    """A python3 whose -m venv hangs half-way stands in for a slow machine."""
    # Files by builtins: a shell that the signal meets while it waits for a child that ends well goes on after it.
    half_made = 'mkdir -p .venv/bin && : >.venv/bin/python && : >"$REACHED" && exec sleep 60'
    executable(tmp_path / "bin" / "python3", f'[ "$2" != venv ] || {{ {half_made}; }}\nexec {sys.executable} "$@"')
    reached = tmp_path / "reached"
    process = subprocess.Popen(
        ["bash", str(clone / "jobs" / "setup.sh"), "--cpu", "--no-mpi"],
        env=os.environ
        | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": f"{tmp_path}/tmp", "REACHED": str(reached)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background has them ignore SIGINT, which children would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not reached.exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, stop)
        process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 128 + stop
    assert not list((tmp_path / "tmp").iterdir())
    assert not (clone / ".venv" / "hvdllm-setup").exists()

    # The next run throws the half-made folder away and comes as far as an empty index lets it.
    done = setup(clone, "--cpu", "--no-mpi", HVDLLM_TORCH="2.13.1")
    assert re.search(r"virtual environment +\d+ s", done.stdout)
    assert "PyTorch" in done.stderr
    assert_a_failing_step_names_its_log(done)


def assert_a_failing_step_names_its_log(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1
    # Choices first; then, as there is no CPU build here, the ordinary one is tried and the size announced.
    assert done.stdout.index("CPU") < done.stdout.index("2.13.1+cpu") < done.stdout.index("several GB")
    assert "https" not in done.stdout
    assert done.stderr.count("\n") == 1
    log = re.search(r"the log is (\S+);", done.stderr)
    assert log and "No matching distribution" in Path(log[1]).read_text()
    assert "HVDLLM_PIP_ARGS" in done.stderr


def test_the_mend_fails_where_there_is_nothing_to_mend(tmp_path: Path) -> None:
    replace = re.search(r"^replace\(\).*?^}", (ROOT / "jobs" / "setup.sh").read_text(), re.M | re.S)
    assert replace
    (tmp_path / "CMakeLists.txt").write_text("set(CMAKE_CXX_STANDARD 14)\n")

    def run() -> subprocess.CompletedProcess[str]:
        call = "replace 'CMAKE_CXX_STANDARD 14' 'CMAKE_CXX_STANDARD 17' CMakeLists.txt"
        script = f"say() {{ echo $*; }}\n{replace[0]}\n{call}"
        return subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True)

    assert run().returncode == 0
    assert (tmp_path / "CMakeLists.txt").read_text() == "set(CMAKE_CXX_STANDARD 17)\n"
    again = run()
    assert again.returncode == 1
    assert "error: CMakeLists.txt" in again.stdout


def test_only_a_wheel_of_ours_with_its_sum_is_installed(tmp_path: Path) -> None:
    text = (ROOT / "jobs" / "setup.sh").read_text()
    found = [re.search(rf"^{name}\(\).*?^}}", text, re.M | re.S) for name in ("own_wheels", "sound_wheel")]
    functions = "\n".join(one[0] for one in found if one)
    folder = tmp_path / "cache" / "wheels" / "k"
    wheel = folder / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"

    def run(call: str) -> subprocess.CompletedProcess[str]:
        head = f'say() {{ echo "$*"; }}; fail() {{ say "$*" >&2; exit 1; }}; wheels={folder.parent} key=k'
        return subprocess.run(["bash", "-euc", f"{head}\n{functions}\n{call}"], capture_output=True, text=True)

    assert run("own_wheels").returncode == 0 and folder.parent.stat().st_mode & 0o777 == 0o700
    folder.parent.chmod(0o777)
    assert run("own_wheels").returncode == 0 and folder.parent.stat().st_mode & 0o777 == 0o700
    folder.mkdir()
    wheel.write_bytes(b"built here")
    assert run("sound_wheel").returncode  # as an older set-up left it, or anybody: no sum
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(b'built here').hexdigest()}  {wheel.name}\n")
    assert run("sound_wheel").stdout.strip() == str(wheel)
    wheel.write_bytes(b"built there")
    assert run("sound_wheel").returncode
    wheel.write_bytes(b"built here")
    (tmp_path / "elsewhere.whl").write_bytes(b"built here")
    wheel.unlink()
    wheel.symlink_to(tmp_path / "elsewhere.whl")
    assert run("sound_wheel").returncode
    if os.geteuid() == 0:
        os.chown(folder.parent, 65534, 65534)
        done = run("own_wheels")
        assert done.returncode == 1 and "belongs to another user" in done.stderr


def test_with_cuda_horovod_allocates_aside(tmp_path: Path) -> None:
    """The whole file was compiled once with it, against CUDA 12.9's headers (-fsyntax-only). Not yet run on a GPU."""
    script = (ROOT / "jobs" / "setup.sh").read_text()
    parts = [re.search(rf"^{name}\(\).*?^}}", script, re.M | re.S) for name in ("replace", "mend_cuda")]
    file = tmp_path / "horovod" / "torch" / "adapter_v2.cc"
    file.parent.mkdir(parents=True)
    file.write_text(
        "#include <c10/cuda/CUDAStream.h>\n{\n  with_device device_context(output_devices_.at(output_index));\n"
        "  outputs_.at(output_index).resize_(shape_vector);\n}\n"
    )
    words = "\n".join(["say() { echo $*; }", *(part[0] for part in parts if part), "mend_cuda"])
    subprocess.run(["bash", "-euc", words], cwd=tmp_path, check=True)
    lines = [line.strip() for line in file.read_text().splitlines()]
    order = ["with_device device_context(output_devices_.at(output_index));", "#if HAVE_GPU"]
    order += ["c10::cuda::OptionalCUDAStreamGuard aside;", "#endif", "outputs_.at(output_index).resize_(shape_vector);"]
    assert [line for line in lines if line in order] == order
    assert "#include <c10/cuda/CUDAGuard.h>" in lines


@pytest.mark.skipif(not RECORD.exists(), reason="this environment was not made by jobs/setup.sh")
def test_a_second_run_needs_no_network() -> None:
    before = RECORD.stat()
    done = setup(ROOT, TMPDIR="/nowhere")  # no log is opened either
    assert done.returncode == 0, done.stderr
    assert "Everything is in place" in done.stdout
    assert RECORD.stat() == before or RECORD.stat().st_mtime_ns == before.st_mtime_ns
