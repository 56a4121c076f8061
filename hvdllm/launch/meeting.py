"""The key-value server by which Horovod's ranks meet over Gloo, on one interface and protected by a secret.

Horovod's own server listens on all interfaces and takes writes from anybody. Another user's PUT before the ranks have
met ends the job, or makes a rank connect to that user. Horovod's clients know no passwords, but they build the server's
address from the host and port in their environment. The secret is therefore the beginning of every path:

    HOROVOD_GLOO_RENDEZVOUS_ADDR=10.0.0.1:4242/SECRET  HOROVOD_GLOO_RENDEZVOUS_PORT=0
    GET http://10.0.0.1:4242/SECRET:0/global/rank_0

launch/inside.py opens such a server under srun. As a program, this module is horovodrun with such a server instead of
its own: `python -P hvdllm/launch/meeting.py --gloo -np 2 …`. If all ranks are on this machine, the server listens on
the loopback, and neither the secret nor the environment is part of a command line. Otherwise both are part of ssh's
command line, as in horovodrun itself, where other users of the same hosts can read them.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from hvdllm.errors import UserError
from hvdllm.plain import Json


class MeetingPoint:
    """The server, and the variables by which ranks find it.

    Args:
        address: where it listens, "" for all interfaces.
        plan: Horovod's assignment of ranks to hosts, if it is known already.
    """

    def __init__(self, address: str, plan: Sequence[object] = ()) -> None:
        from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

        self.secret = secrets.token_hex(16)
        within = f"/{self.secret}:0/"

        class Handler(RendezvousHandler):  # type: ignore[misc]  # it has no types
            path: str

            def parse_request(self) -> bool:
                if not super().parse_request():
                    return False
                if not hmac.compare_digest(self.path[: len(within)].encode(), within.encode()):
                    self.send_error(403)
                    return False
                self.path = f"/{self.path[len(within) :]}"
                return True

        self.server = RendezvousHTTPServer((address, 0), Handler, False)
        self.server.daemon_threads = True
        self.port = int(self.server.server_address[1])
        if plan:
            self.server.init(plan)
        threading.Thread(target=self.server.serve_forever, name="hvdllm-meeting-point", daemon=True).start()

    def variables(self, address: str) -> dict[str, str]:
        """The variables for a rank that reaches this host at `address`."""
        return variables(address, self.port, self.secret)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def variables(address: str, port: int, secret: str) -> dict[str, str]:
    """Horovod's variables, from which it builds the address `http://ADDR:PORT/scope/key`."""
    return {
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": f"{address}:{port}/{secret}",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": "0",
    }


def plan(ranks: Sequence[int]) -> list[object]:
    """Horovod's assignment of ranks to nodes, in order. ranks: how many each node has.

    Raises UserError if Horovod is missing.
    """
    try:
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    except ImportError as error:
        raise UserError(f"Horovod cannot be imported ({error}): run jobs/setup.sh from a clone of hvdllm") from None
    hosts = ",".join(f"node{node}:{count}" for node, count in enumerate(ranks))
    return list(get_host_assignments(parse_hosts(hosts), sum(ranks)))


def places(plan: Sequence[object]) -> list[dict[str, str]]:
    """The variables by which each rank of a plan knows its place, in the order of ranks."""
    from horovod.runner.gloo_run import create_slot_env_vars

    gloo = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}
    return [{**gloo, **create_slot_env_vars(slot)} for slot in plan]


# ------------------------------------------------------------------ horovodrun
class Rendezvous:
    """Replaces horovodrun's own server."""

    address = ""  # of the current launch
    point: MeetingPoint

    def __init__(self, verbose: int = 0) -> None:
        pass

    def start(self, handler_cls: object = None) -> int:
        type(self).point = MeetingPoint(self.address)
        return self.point.port

    def init(self, host_alloc_plan: object) -> None:
        self.point.server.init(host_alloc_plan)

    def stop(self) -> None:
        self.point.close()


def guard(gloo_run: Any) -> None:
    """Replaces the server in the module horovod.runner.gloo_run."""
    launch, variables_of = gloo_run.launch_gloo, gloo_run.create_run_env_vars

    def launch_gloo(
        command: object, exec_command: object, settings: Any, nics: object, env: dict[str, str], server_ip: str
    ) -> None:
        hosts = [part.partition(":")[0] for part in settings.hosts.split(",")]
        here = all(_is_here(host, gloo_run.network) for host in hosts)
        Rendezvous.address = server_ip
        if here:  # ranks inherit the environment, so it need not be part of a command line
            os.environ |= env
            gloo_run.env_util.is_exportable = lambda name: name == "PYTHONUNBUFFERED"
        gloo_run.create_run_env_vars = _variables(variables_of, here)
        launch(command, exec_command, settings, nics, env, server_ip)

    gloo_run.RendezvousServer, gloo_run.launch_gloo = Rendezvous, launch_gloo


def _variables(original: Callable[..., Json], here: bool) -> Callable[..., Json]:
    def create_run_env_vars(server_ip: str, nics: object, port: int, elastic: bool = False) -> Json:
        ours = Rendezvous.point.variables(server_ip)
        rest = {name: value for name, value in original(server_ip, nics, port, elastic).items() if name not in ours}
        if here:
            os.environ |= ours
            return rest
        return rest | ours

    return create_run_env_vars


def _is_here(host: str, network: Any) -> bool:
    try:
        return network.resolve_host_address(host) in network.get_local_host_addresses()
    except (OSError, socket.gaierror):
        return False


def main() -> Any:
    """Runs horovodrun with the replaced server."""
    from horovod.runner import gloo_run, launch

    guard(gloo_run)
    launch.gloo_built = lambda verbose=False: True  # the real check imports torch, which takes a second
    return launch.run_commandline()


if __name__ == "__main__":
    sys.exit(main())
