"""--help: a screen, a group, a setting, everything."""

from __future__ import annotations

import pytest

from hvdllm import registry
from hvdllm.cli import prepare, train
from hvdllm.config import compose
from hvdllm.errors import UserError


def said(capsys: pytest.CaptureFixture[str], *words: str, run: object = train.run) -> str:
    assert run(list(words)) == 0  # type: ignore[operator]
    return capsys.readouterr().out


def test_without_a_topic_it_is_one_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = said(capsys, "--help")
    assert len(out.splitlines()) <= 40, "it fits a terminal"
    for group in (*registry.GROUPS, "experiment"):
        assert f"  {group}" in out
    for word in ("diloco", "budget_tokens=1200000", "[--help [GROUP]]", "75 stopped", "hvdllm train -m"):
        assert word in out
    assert len(said(capsys, "--help", run=prepare.run).splitlines()) < 20


@pytest.mark.parametrize("group", list(registry.GROUPS))
def test_a_group_has_all_its_settings_and_no_others(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--help", group)
    for key in compose.settings():
        assert key.partition(".")[0] != group or "." not in key or f"{key} " in out
    assert "sample_prompt" not in out and ("optim.lr " in out) == (group == "optim")
    assert all(f"{group}={name}" in out or name in out for name in registry.kinds(group))


def test_a_setting_and_what_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--help", "seed").startswith("seed=0\n  of weights, order of data")
    out = said(capsys, "exchange=diloco", "--help", "exchange.local_steps")
    assert "exchange.local_steps=50 (exchange=diloco)" in out and "exchange.local_steps=16 (exchange=local_sgd)" in out
    assert "at least 1" in out and "one of fp32, bf16, fp64" in said(capsys, "--help", "precision")
    assert "experiment=..., whole experiments" in said(capsys, "--help", "experiment")
    out = said(capsys, "--help", "settings")
    assert "budget_tokens" in out and "optim.lr" not in out
    assert len(said(capsys, "--help", "all").splitlines()) > 300


@pytest.mark.parametrize(
    ("topic", "hint"), [("exchang", "did you mean exchange"), ("optim.lrr", "optim.lr"), ("xyzzy", "groups are")]
)
def test_an_unknown_topic_gets_a_hint(topic: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        train.run(["--help", topic])


def test_a_flag_that_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"no flag --hlep here; .* did you mean --help"):
        train.run(["--hlep"])
