#!/usr/bin/env bash
# Sets up all that hvdllm needs, in .venv; run again it only looks whether everything is still in place.
#
#   jobs/setup.sh [--dev] [--cpu | --nccl] [--no-mpi]
#
#   --dev      also what the tests and checks need: pytest, ruff, mypy, transformers, and as root Slurm and iproute2
#   --cpu      CPU build of PyTorch and Horovod, even where there is a GPU
#   --nccl     CUDA build of PyTorch, Horovod with NCCL, even where there is no GPU (a login node)
#   --no-mpi   Horovod with Gloo alone: nothing has to be installed on the system, `horovodrun --gloo` starts ranks
#
# What was chosen once (device, MPI, torch) holds for later runs until it is chosen again.
#
#   HVDLLM_TORCH      the torch to install: an exact version, 2.13.0 (tested)
#   HVDLLM_PIP_ARGS   more arguments for the installation of torch, such as the index to take it from
#   HVDLLM_CACHE      where Horovod's wheel is kept, ~/.cache/hvdllm: built once per machine, not once per clone; its
#                     folder is its owner's alone (mode 700), and a sum from the build is compared before each installation
#
# It printed, on Debian 12 with two cores and Open MPI there (which takes another 20 s); the build dominates:
#
#   Setting up hvdllm
#     device    CPU (no NVIDIA GPU found)
#     MPI       mpirun (Open MPI) 4.1.4, /usr/bin/mpicc
#     torch     2.13.0+cpu (HVDLLM_TORCH chooses another)
#     Python    3.11.7, .venv
#     wheels    ~/.cache/hvdllm/wheels
#     virtual environment                     3 s
#     PyTorch 2.13.0+cpu                      18 s
#     NumPy and build tools                   3 s
#     Horovod 0.28.1: build for torch 2.13.0  162 s      (once per machine)
#     Horovod 0.28.1: installation            1 s
#     mpi4py                                  1 s
#     hvdllm and what it requires             7 s
#     two ranks add up                        3 s
#   Done in 198 s. Next: jobs/quickstart.sh, or . .venv/bin/activate && hvdllm --help
#
# and the second time, after the same choices: Everything is in place (2 s).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

horovod=0.28.1 horovod_sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
root=$PWD py=$PWD/.venv/bin/python
record=.venv/hvdllm-setup constraints=$PWD/.venv/constraints.txt
wheels=$(realpath -m "${HVDLLM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvdllm}/wheels")

say() { printf '%s\n' "$*"; }
refuse() { say "jobs/setup.sh: $*" >&2; exit 2; }
fail() { say "jobs/setup.sh: $*" >&2; exit 1; }
have() { command -v "$1" >/dev/null; }
remembered() { sed -n "s/^$1=//p" "$record" 2>/dev/null || true; }

# --- What is asked for ---------------------------------------------------------------------------------------

dev='' device='' mpi=''
for argument; do
  case $argument in
    --dev) dev=yes ;;
    --cpu | --nccl)
      [ "${device:-${argument#--}}" = "${argument#--}" ] || refuse "--cpu and --nccl exclude each other."
      device=${argument#--} why="asked for with $argument"
      ;;
    --no-mpi) mpi=none ;;
    *) refuse "unknown option $argument (known: --dev, --cpu, --nccl, --no-mpi)." ;;
  esac
done

# Debian's Slurm without a configuration is what --dev installs for the tests; anything else belongs to a cluster.
on_cluster() {
  have sbatch && { [ "$(command -v sbatch)" != /usr/bin/sbatch ] || [ -n "${SLURM_CONF:-}" ] ||
    [ -e /etc/slurm/slurm.conf ] || [ -e /run/slurm/conf/slurm.conf ]; }
}

# --- What is chosen ------------------------------------------------------------------------------------------

[ -n "$mpi" ] || [ -n "$device" ] || mpi=$(remembered mpi)
if [ -z "$device" ]; then
  device=$(remembered device)
  if [ -n "$device" ]; then
    why="as before; --cpu or --nccl changes it"
  elif [ -e /dev/nvidia0 ] || { have nvidia-smi && nvidia-smi -L >/dev/null 2>&1; }; then
    device=nccl why="an NVIDIA GPU is there"
  elif on_cluster; then
    refuse "this machine has Slurm but no GPU, so it is probably a login node: say --nccl (GPUs elsewhere) or --cpu."
  else
    device=cpu why="no NVIDIA GPU found"
  fi
fi

torch=${HVDLLM_TORCH:-$(remembered torch)}
torch=${torch:-2.13.0}
[[ $torch =~ ^[0-9]+\.[0-9]+[0-9A-Za-z.]*(\+[0-9A-Za-z.]+)?$ ]] ||
  refuse "HVDLLM_TORCH must be one exact version such as 2.13.0, not '$torch'."
read -ra pip_args <<<"${HVDLLM_PIP_ARGS:-}"

# A .venv without a working pip was left half-made: it is made anew, by the python3 on PATH.
if "$py" -m pip --version >/dev/null 2>&1; then python=$py; else python=$(command -v python3 || true); fi
[ -n "$python" ] || fail "there is no python3 on PATH: install Python 3.11 or newer."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "Python 3.11 or newer is needed and $python is older: put a newer python3 first on PATH and remove .venv."

if [ "$(id -u)" = 0 ]; then as_root=(env); else as_root=(sudo -n env); fi
can_install() { have apt-get && "${as_root[@]}" true >/dev/null 2>&1; }

packages=() missing=()
need() { missing+=("$1"); packages+=("${@:2}"); } # need WHAT PACKAGE...
have "${CXX:-g++}" || need "a C++ compiler" g++
have make || need make make
have cmake || need cmake cmake
if [ "$mpi" != none ]; then
  mpi=found
  { have mpicc && have mpirun; } || { mpi=install && need "an MPI (mpicc, mpirun)" openmpi-bin libopenmpi-dev; }
fi
"$python" -c 'import ensurepip, pathlib, sysconfig
assert (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists()' 2>/dev/null || {
  need "the venv module or the headers of $python"
  # Only Debian's own python gets them from Debian.
  [ "$("$python" -c 'import sys; print(sys.base_prefix)')" != /usr ] || packages+=(python3-venv python3-dev)
}
if ((${#missing[@]})) && { ((${#packages[@]} == 0)) || ! can_install; }; then
  list=$(printf ', %s' "${missing[@]}")
  fail "this machine lacks ${list:2}: load a module that has it, ask an administrator for" \
    "${packages[*]:-a complete Python}$([ "$mpi" != install ] || echo ", or do without MPI by --no-mpi (Gloo alone)")."
fi
if [ -n "$dev" ] && can_install; then
  for package in slurm-wlm munge slurmctld slurmd slurm-client iproute2; do
    dpkg -s "$package" >/dev/null 2>&1 || packages+=("$package")
  done
elif [ -n "$dev" ]; then
  skipped="Without root Slurm and iproute2 are left alone: tests that need them are skipped where they are missing."
fi

if [ "$device" = nccl ]; then
  nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
  nvcc=${nvcc:-$(command -v nvcc || true)}
  [ -x "$nvcc" ] || fail "Horovod with NCCL needs CUDA's compiler: load a CUDA module or set CUDA_HOME, or say --cpu."
  # The nvcc on PATH may be a wrapper: it knows itself where its toolkit is.
  CUDA_HOME=${CUDA_HOME:-$(realpath "$("$nvcc" --dryrun -c -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')")}
fi

case $device in cpu) device_text="CPU" ;; nccl) device_text="CUDA with NCCL, $nvcc" ;; esac
mpi_version() { mpirun --version 2>&1 | sed -n '/[0-9]\.[0-9]/{p;q}'; }
case $mpi in
  none) mpi_text="none, Gloo alone" ;;
  found) mpi_text="$(mpi_version), $(command -v mpicc)" ;;
  install) mpi_text="Debian's Open MPI, to be installed" ;;
esac
say "Setting up hvdllm"
say "  device    $device_text ($why)"
say "  MPI       $mpi_text"
say "  torch     $torch$([[ $device = nccl || $torch = *+* ]] || echo +cpu) (HVDLLM_TORCH chooses another)"
say "  Python    $("$python" -c 'import platform; print(platform.python_version())'), .venv"
say "  wheels    $wheels"
[ -z "${skipped:-}" ] || say "$skipped"

# --- What each part is made of -------------------------------------------------------------------------------

installed() { "$py" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2>/dev/null || true; }
torch_fits() { # an exact version, or that version of any build but the CPU's where CUDA is wanted
  case $(installed torch) in
    "$torch") true ;;
    "$torch+cpu") [ "$device" = cpu ] ;;
    "$torch+"*) true ;;
    *) false ;;
  esac
}

flags=(HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1)
[ "$mpi" = none ] && flags+=(HOROVOD_WITHOUT_MPI=1) || flags+=(HOROVOD_WITH_MPI=1)
[ "$device" = cpu ] || flags+=(HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED
  CUDA_HOME="$CUDA_HOME" HOROVOD_CUDA_HOME="$CUDA_HOME" CUDACXX="$nvcc")

mend() { # what Horovod 0.28.1 lacks today: torch's C++, Gloo's interface in process sets, a build for CPU where CUDA is
  local standard=17
  "$py" -c 'import re, sys, torch; sys.exit([*map(int, re.findall(r"\d+", torch.__version__)[:2])] < [2, 14])' && standard=20
  replace 'CMAKE_CXX_STANDARD 14' "CMAKE_CXX_STANDARD $standard" CMakeLists.txt horovod/torch/CMakeLists.txt
  replace 'assert(global_context.IsEnabled());' '&\n  gloo_iface_ = global_context.gloo_iface_;' \
    horovod/common/gloo/gloo_context.cc
  [ "$device" = nccl ] || replace 'torch.version.cuda is not None' False cmake/Modules/FindPytorch.cmake
}
mend_cuda() { # what it allocates for gathers and all-to-alls waits for the default stream: the next round's compute
  local file=horovod/torch/adapter_v2.cc
  replace '#include <c10/cuda/CUDAStream.h>' '&\n#include <c10/cuda/CUDAGuard.h>\n#include <map>' $file
  replace 'with_device device_context(output_devices_.at(output_index));' "&\n\
#if HAVE_GPU\n\
  // On a stream of its own, which holds nothing to wait for; whoever uses an output records it (hvdllm/world/hvd.py).\n\
  c10::cuda::OptionalCUDAStreamGuard aside;\n\
  if (output_devices_.at(output_index) != CPU_DEVICE_ID) {\n\
    static std::map<int, c10::cuda::CUDAStream> streams;\n\
    auto device = output_devices_.at(output_index);\n\
    aside.reset_stream(streams.try_emplace(device, c10::cuda::getStreamFromPool(false, device)).first->second);\n\
  }\n\
#endif" $file
}
replace() { # replace OLD NEW FILE...
  local file
  for file in "${@:3}"; do
    grep -qF "$1" "$file" || { say "error: $file holds no '$1' to mend"; return 1; }
    sed -i "s|$1|$2|" "$file"
  done
}

horovod_recipe() { # all that shapes the wheel; its hash is the wheel's name in the cache
  say "horovod $horovod $horovod_sha256, torch $(installed torch)"
  "$py" -c 'import sysconfig as s; print(s.get_python_version(), s.get_config_var("SOABI"), s.get_platform())'
  printf '%s\n' "${flags[@]}"
  [ "$mpi" = none ] || { mpi_version && mpicc -show; }
  [ "$device" = cpu ] || { "$nvcc" --version && "$py" -m pip list 2>/dev/null | grep -i nvidia-nccl; } || true
  "${CXX:-g++}" --version | head -1
  grep -owE 'avx|f16c|fma' /proc/cpuinfo | sort -u | tr '\n' ' ' || true # Horovod compiles for these where they are
  env | grep -E '^(CC|CXX|CFLAGS|CXXFLAGS|LDFLAGS|HOROVOD_BUILD_[A-Z_]*)=' | sort || true
  declare -f mend
  [ "$device" = cpu ] || declare -f mend_cuda
}
horovod_key() { horovod_recipe | sha256sum | cut -c1-16; }

extras=horovod,wandb,report
[ "$mpi" = none ] || extras+=,mpi
{ [ -z "$dev" ] && [[ $(remembered extras) != *dev* ]]; } || extras+=,dev
package_key() { { say "$root $extras" && cat setup.py setup.cfg; } | sha256sum | cut -c1-16; }

in_place() {
  [ "$python" = "$py" ] && ((${#packages[@]} == 0)) && torch_fits &&
    [ "$(remembered horovod)" = "$(horovod_key)" ] && [ "$(remembered package)" = "$(package_key)" ] &&
    [ -x .venv/bin/hvdllm ] && "$py" -c 'import horovod.torch' 2>/dev/null
}
if in_place; then
  say "Everything is in place ($SECONDS s)."
  exit
fi

# --- The steps: one line each on the terminal, their output in a log -----------------------------------------

tmp=$(mktemp -d "${TMPDIR:-/tmp}/hvdllm-setup.XXXXXX")
tidy() { # the logs stay if something failed
  local status=$?
  if ((status == 0 || status > 128)); then rm -rf "$tmp"; else rm -rf "${tmp:?}"/*/; fi
}
trap tidy EXIT
trap 'echo; say "Interrupted: run it again, it goes on from here."; exit 130' INT
trap 'exit 143' TERM HUP

try() { # try NAME COMMAND...: sets status; not called as a condition, which would switch off errexit inside
  local start=$SECONDS
  log=$tmp/${1//[^A-Za-z0-9]/-}.log
  printf '  %-40s' "$1"
  set +e
  (set -e && "${@:2}") >"$log" 2>&1 </dev/null
  status=$?
  set -e
  if ((status)); then echo failed; else echo "$((SECONDS - start)) s"; fi
}
reason() { # what the log says of the failure, in a line
  { grep -E -m1 '^ *CMake Error|: (fatal )?error:|^(ERROR|error|E):|Error:' "$log" || tail -1 "$log"; } |
    sed 's/^ *//' | cut -c1-200
}
step() { # step NAME WHAT-TO-DO COMMAND...
  try "$1" "${@:3}"
  ((status == 0)) ||
    fail "$1 failed ($(reason)); the log is $log; $2"
}
pip() { "$py" -m pip --disable-pip-version-check --no-input "$@"; }
pip_install() { pip install -c "$constraints" "$@"; } # -c adds to constraints the user has set already

install_packages() {
  "${as_root[@]}" dpkg --configure -a # finishes what an earlier interruption left
  "${as_root[@]}" apt-get -q update
  "${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends \
    -o DPkg::Lock::Timeout=120 "${packages[@]}"
}

# What lies in the cache is installed, so it must be ours alone, and what we built.
own_wheels() { # makes the folder, for its owner alone; fails where it is somebody else's
  (umask 077 && mkdir -p "$wheels") 2>/dev/null || return 0 # build_horovod says that nothing can be written there
  [ -O "$wheels" ] || fail "$wheels belongs to another user, whose wheels are not installed:" \
    "HVDLLM_CACHE may name a folder of your own."
  chmod 700 "$wheels"
}
sound_wheel() { # its file, if it is ours and has the sum that was written when it was built
  local folder=$wheels/$key file
  [ -O "$folder" ] && [ ! -L "$folder" ] && [ -O "$folder/SHA256SUMS" ] || return 1
  file=$(sed -nE 's/^[0-9a-f]{64}  (horovod-[A-Za-z0-9_.+-]+\.whl)$/\1/p;2q' "$folder/SHA256SUMS")
  [ -n "$file" ] && [ -O "$folder/$file" ] && [ ! -L "$folder/$file" ] &&
    (cd "$folder" && sha256sum --status --strict --check SHA256SUMS 2>/dev/null) && say "$folder/$file"
}

build_horovod() {
  local cores memory
  mkdir -p "$wheels" && [ -w "$wheels" ] || { say "error: no file can be written in $wheels"; return 1; }
  cd "$tmp"
  say "horovod==$horovod --hash=sha256:$horovod_sha256" >source.txt # pip looks at the hash before it runs a line of it
  pip download --no-deps --no-binary :all: --no-build-isolation -r source.txt
  mkdir build
  tar xzf "horovod-$horovod.tar.gz" -C build --strip-components 1
  cd build
  mend
  if [ "$device" = nccl ]; then # torch's own NCCL, which has no libnccl.so to link with
    local nccl
    nccl=$("$py" -c 'import nvidia.nccl; print(*nvidia.nccl.__path__)') ||
      { say "error: this torch brought no NCCL wheel"; return 1; }
    mkdir -p nccl/lib
    ln -s "$nccl/include" nccl/include
    ln -s "$nccl/lib/libnccl.so.2" nccl/lib/libnccl.so
    export HOROVOD_NCCL_HOME=$PWD/nccl
    mend_cuda
  fi
  cores=$(nproc) memory=$(awk '/^MemAvailable/ { print int($2 / 2000000) }' /proc/meminfo) # 2 GB a compiler
  ((memory > 0)) || memory=1
  # CMAKE_POLICY_...: CMake 4 refuses Gloo's old minimum. --no-cache-dir: else pip would keep it as the released 0.28.1.
  env "${flags[@]}" MAKEFLAGS="-j$((cores < memory ? cores : memory))" CMAKE_POLICY_VERSION_MINIMUM=3.5 \
    "$py" -m pip wheel --no-deps --no-build-isolation --no-cache-dir --no-input -w "$tmp/wheel" .
  mkdir "$wheels/.$key.$$"
  cp "$tmp"/wheel/*.whl "$wheels/.$key.$$"
  (cd "$wheels/.$key.$$" && sha256sum horovod-*.whl >SHA256SUMS)
  horovod_recipe >"$wheels/.$key.$$/recipe.txt"
  sound_wheel >/dev/null || rm -rf "${wheels:?}/${key:?}" # of an older set-up without a sum, or damaged
  mv -T "$wheels/.$key.$$" "$wheels/$key" || rm -r "$wheels/.$key.$$" # another clone was first
}

install_mpi4py() {
  local number
  number=$(mpi_version | grep -oE '[0-9]+(\.[0-9]+)+' | head -1)
  same_mpi() {
    "$py" -c 'import mpi4py; mpi4py.rc.initialize = False
from mpi4py import MPI; print(MPI.Get_library_version())' | grep -F "$number"
  }
  pip_install 'mpi4py>=4.0'
  # The wheel takes the libmpi it finds; where that is not the one of mpirun, only a build of one's own is right.
  same_mpi || { MPICC=$(command -v mpicc) pip_install --force-reinstall --no-deps --no-cache-dir --no-binary mpi4py \
    'mpi4py>=4.0' && same_mpi; }
}

two_ranks() {
  PATH=$root/.venv/bin:$PATH horovodrun --gloo -np 2 "$py" -c '
import horovod.torch as hvd, torch
hvd.init()
assert hvd.allreduce(torch.tensor([1.0 + hvd.rank()]), op=hvd.Sum).item() == 3'
}

((${#packages[@]} == 0)) || step "Debian packages" "look whether 'apt-get update' works." install_packages
[ "$python" = "$py" ] || step "virtual environment" "look whether 'python3 -m venv' works." "$python" -m venv --clear .venv

advice="HVDLLM_TORCH chooses the version, HVDLLM_PIP_ARGS the index; remove .venv if an installation was cut off."
if ! torch_fits; then
  requirement="torch==$torch"
  if [[ $torch != *+* && $device = nccl ]]; then
    requirement+=",!=$torch+cpu"
  elif [[ $torch != *+* ]]; then
    try "PyTorch $torch+cpu" pip install "${pip_args[@]}" "torch==$torch+cpu"
    # The second is how pip puts the first where the user's constraints name torch.
    if ((status)) && ! grep -qE 'No matching distribution|ResolutionImpossible' "$log"; then
      fail "PyTorch failed ($(reason)); the log is $log; $advice"
    elif ((status)); then
      say "  Your package indexes have no CPU build of torch $torch, so the ordinary one comes, several GB with CUDA's" \
        "libraries; the CPU index named on PyTorch's install page may go into HVDLLM_PIP_ARGS."
    fi
  fi
  torch_fits || step "PyTorch $torch" "$advice" pip install "${pip_args[@]}" "$requirement"
  torch_fits || fail "PyTorch $(installed torch) came, not the CUDA build that --nccl needs; $advice"
fi
say "torch==$(installed torch)" >"$constraints"
# numpy belongs to torch, the others to Horovod's build.
step "NumPy and build tools" "look whether pip reaches its index." \
  pip_install numpy setuptools wheel cloudpickle psutil packaging pyyaml cffi

key=$(horovod_key)
own_wheels
if ! sound_wheel >/dev/null; then
  step "Horovod $horovod: build for torch $torch" \
    "a compiler killed for memory needs more of it; HVDLLM_CACHE may name another folder for the wheel." build_horovod
fi
if [ "$(remembered horovod)" != "$key" ] || ! "$py" -c 'import horovod.torch' 2>/dev/null; then
  step "Horovod $horovod: installation" "remove $wheels/$key and run this again." \
    pip install --no-deps --force-reinstall "$(sound_wheel)"
fi
if [ "$mpi" != none ]; then step "mpi4py" "look whether mpicc compiles a program, or say --no-mpi." install_mpi4py; fi
step "hvdllm and what it requires" "look whether pip reaches its index." pip_install --no-build-isolation -e ".[$extras]"
step "two ranks add up" "hvdllm doctor shows what is broken." two_ranks

cat >"$record.new" <<END
device=$device
mpi=$([ "$mpi" = none ] && echo none || true)
torch=$torch
extras=$extras
horovod=$key
package=$(package_key)
END
mv "$record.new" "$record"
say "Done in $SECONDS s. Next: jobs/quickstart.sh, or . .venv/bin/activate && hvdllm --help"
