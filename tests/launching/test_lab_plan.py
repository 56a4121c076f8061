"""What a network lab would do: commands as values, names, rates, the stand-in for ssh. Nothing is built here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hvdllm.config.pace import bits_per_second
from hvdllm.errors import UserError
from hvdllm.launch import lab


@pytest.mark.parametrize(("link", "bits"), [("200mbit", 2e8), ("1gbit", 1e9), ("2.5gbit", 2.5e9), ("512kbit", 512e3)])
def test_rates(link: str, bits: float) -> None:
    assert bits_per_second(link) == bits


@pytest.mark.parametrize("link", ["fast", "200", "200mbps", "0mbit", "-1mbit", "1gbit; reboot", ""])
def test_what_is_no_rate(link: str) -> None:
    with pytest.raises(UserError, match="give a rate such as 200mbit"):
        bits_per_second(link)


def test_every_command_stays_inside_namespaces_of_this_prefix() -> None:
    plan = lab.build_plan("hvdllm-7", 3, "200mbit")
    added = [command[3] for command in plan if command[:3] == ["ip", "netns", "add"]]
    assert added == ["hvdllm-7-sw", "hvdllm-7-h1", "hvdllm-7-h2", "hvdllm-7-h3"]
    for command in plan:
        inside = command[2] if command[1] == "-n" else None
        if command[:3] == ["ip", "link", "add"]:  # a pair of interfaces, each made where it belongs
            assert [command[i + 1] for i, word in enumerate(command) if word == "netns"] == [
                inside_of(command),
                added[0],
            ]
        elif command[:3] != ["ip", "netns", "add"]:
            assert inside in added, command


def inside_of(command: list[str]) -> str:
    return command[command.index("netns") + 1]


def test_every_host_has_an_address_and_shapes_what_it_sends() -> None:
    plan = lab.build_plan("p", 8, "1gbit")
    addresses = [command[5] for command in plan if command[3:5] == ["addr", "add"]]
    shaped = [(command[2], command[command.index("rate") + 1]) for command in plan if command[0] == "tc"]
    assert addresses == [f"10.77.0.{k}/24" for k in range(1, 9)]
    assert shaped == [(f"p-h{k}", "1gbit") for k in range(1, 9)]


@pytest.mark.parametrize(("link", "burst"), [("200mbit", 262144), ("20gbit", 10_000_000)])
def test_a_fast_link_has_a_larger_bucket(link: str, burst: int) -> None:
    (shape, _) = [command for command in lab.build_plan("p", 2, link) if command[0] == "tc"]
    assert shape[shape.index("burst") + 1] == str(burst)


@pytest.mark.parametrize("hosts", [1, 9])
def test_two_to_eight_hosts(hosts: int) -> None:
    with pytest.raises(UserError, match="2 to 8 hosts"):
        lab.Lab(hosts, "200mbit")


def test_leftovers_are_those_of_dead_labs_alone() -> None:
    found = ["eth", "hvdllm-5-h1", "hvdllm-5-sw", "hvdllm-6-h1", "hvdllm-5-h9", "hvdllm-5-h1-mine", "my-hvdllm-5-h1"]
    assert lab.leftovers(found, {5: False, 6: True}) == ["hvdllm-5-h1", "hvdllm-5-sw"]
    assert lab.leftovers([f"hvdllm-{os.getpid()}-h1"]) == []


def test_the_stand_in_for_ssh(tmp_path: Path) -> None:
    """As horovodrun calls it: options before and after the host's name, the command as one word or several."""
    (tmp_path / "ssh").write_text(lab.stand_in(lab.hosts_of("p", 2)))
    (tmp_path / "ip").write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    for name in ("ssh", "ip"):
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def ssh(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ssh", *words], env=env, capture_output=True, text=True)

    said = ssh("-o", "PasswordAuthentication=no", "-q", "10.77.0.2", "-p", "22", "cd /x; A='b c' run -np 2").stdout
    assert said == "netns|exec|p-h2|bash|-c|cd /x; A='b c' run -np 2|"
    assert ssh("10.77.0.1", "echo", "a", "-o", "b").stdout == "netns|exec|p-h1|bash|-c|echo a -o b|"
    assert ssh("10.77.0.3", "true").returncode == 255


@pytest.mark.parametrize(
    ("user", "path", "says"), [(1000, None, "need root"), (0, "/nowhere", "ip and tc and bash not")]
)
def test_why_there_is_no_lab(user: int, path: str | None, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    if path:
        monkeypatch.setenv("PATH", path)
    assert says in str(lab.missing())
