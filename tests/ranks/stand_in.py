"""Stands where a launcher wants a rank: `python -S stand_in.py PYTHON -m hvdllm ...`. The rank itself is a fork of the
server in ranks/pool.py, with the environment and the output that the launcher gives; signals and its end are passed on.

It imports as little as it can, for that is its use.
"""

import json
import os
import signal
import socket
import sys

job = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
job.connect("\0" + os.environ["HVDLLM_TEST_POOL"])
ask = {"words": sys.argv[2:], "envs": [dict(os.environ)], "alone": True, "cwd": os.getcwd()}
socket.send_fds(job, [json.dumps(ask).encode()], [0, 1, 2])
(pid,) = json.loads(job.recv(1 << 16))
rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("RANK")
if rank is not None:
    with open(os.environ["HVDLLM_TEST_PIDS"], "a") as file:
        file.write(f"{rank} {pid}\n")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
said = job.recv(1 << 16)
code = json.loads(said) if said else -signal.SIGKILL
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
os._exit(code)
