"""Turns a task of srun into a rank of Horovod over Gloo, with the environment that horovodrun would give it.

    HVDLLM_MEETING="ADDRESS PORT SECRET" srun … python -m hvdllm.launch.task -- hvdllm train …

launch/inside.py starts it, and runs the key-value server. ADDRESS is that of the server's host, or - for the host where
srun was called, as Slurm knows it. The rank replaces this process, so a signal to the task is a signal to the rank.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from hvdllm.launch import meeting, network

MEETING = "HVDLLM_MEETING"


def rank(env: Mapping[str, str], address: str, port: int, secret: str) -> dict[str, str]:
    """Horovod's variables, made from Slurm's. Nodes have equal numbers of tasks, which are numbered node by node.

    Args:
        env: the environment of the task.
        address, port, secret: of the key-value server.
    """
    size, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_STEP_NUM_NODES"])
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        **meeting.variables(address, port, secret),
        "HOROVOD_HOSTNAME": f"node{env['SLURM_NODEID']}",
        "HOROVOD_RANK": env["SLURM_PROCID"],
        "HOROVOD_SIZE": str(size),
        "HOROVOD_LOCAL_RANK": env["SLURM_LOCALID"],
        "HOROVOD_LOCAL_SIZE": str(size // nodes),
        "HOROVOD_CROSS_RANK": env["SLURM_NODEID"],
        "HOROVOD_CROSS_SIZE": str(nodes),
    }


def main(words: list[str]) -> None:
    """Becomes the command after `--`."""
    _, *command = words
    env = dict(os.environ)
    address, port, secret = env.pop(MEETING).split()
    address = env["SLURM_LAUNCH_NODE_IPADDR"] if address == "-" else address
    env |= rank(env, address, int(port), secret)
    env |= network.for_gloo(env, address)
    os.execvpe(command[0], command, env)


if __name__ == "__main__":
    main(sys.argv[1:])
