"""Every setting, one by one: what alone is wrong with it is a sentence that names it."""

import dataclasses
from functools import cache
from typing import Any

import pytest

from hvdllm import registry
from hvdllm.cli.flags import settings_only
from hvdllm.config import compose
from hvdllm.config.check import check
from hvdllm.errors import UserError
from hvdllm.settings import Config
from hvdllm.world.detect import Place

Field = dataclasses.Field[Any]


@cache
def option(group: str, kind: type) -> str:
    """A name that chooses this class of settings."""
    return next(o for o in compose.options(group) if type(getattr(compose.compose([f"{group}={o}"]), group)) is kind)


def settings() -> list[tuple[str, type, Field]]:
    """(group or "", class, field) of all that is no group itself."""
    found = [("", Config, f) for f in dataclasses.fields(Config) if f.name not in registry.GROUPS]
    for group, kinds in registry.all_kinds().items():
        found += [(group, kind, f) for kind in kinds.values() for f in dataclasses.fields(kind)]
    return found


SETTINGS = settings()
IDS = [f"{kind.__name__}.{f.name}" for _, kind, f in SETTINGS]


def refused(words: list[str]) -> str:
    with pytest.raises(UserError) as error:
        compose.compose(words)
    said = str(error.value)
    assert "\n" not in said and len(said) < 250
    return said


CHECKED = [s for s in SETTINGS if s[2].metadata["choices"] or s[2].metadata["least"] is not None]


@pytest.mark.parametrize(("group", "kind", "f"), CHECKED, ids=[f"{kind.__name__}.{f.name}" for _, kind, f in CHECKED])
def test_what_alone_is_wrong_names_the_setting(group: str, kind: type, f: Field) -> None:
    first = [f"{group}={option(group, kind)}"] if group else []
    key = f"{group}.{f.name}" if group else f.name
    wrong = []
    if f.metadata["choices"]:
        wrong.append("bogus")
    if f.metadata["least"] is not None:
        wrong.append(str(f.metadata["least"] - 1))
    for value in wrong:
        assert f"{key}={value.removesuffix('.0')}" in (said := refused([*first, f"{key}={value}"])), said


@pytest.mark.parametrize(("group", "kind", "f"), SETTINGS, ids=IDS)
def test_the_doc_says_something(group: str, kind: type, f: Field) -> None:
    doc = f.metadata["doc"]
    assert len(doc.split()) >= 3 and doc[0].islower() | doc[0].isupper() and doc.strip() == doc


@pytest.mark.parametrize("key", [key for key in compose.settings() if key.endswith(("_tokens", "_every", "horizon"))])
def test_tokens_may_be_whole_floats_and_nothing_else(key: str) -> None:
    group, _, name = key.rpartition(".")
    option = {"exchange": ["exchange=delayed"], "wire": ["wire=sign"]}.get(group, [])  # all have the setting
    config = compose.compose([*option, f"{key}=1.5e4"])
    assert getattr(getattr(config, group) if group else config, name) == 15_000
    assert f"{key}=1.5" in refused([*option, f"{key}=1.5"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed=1", "model=null"], "`model=null`"),
        (["model=tiny", "optim=null"], "`optim=null`"),
        (["seed=1", "=1"], "`=1`"),
        (["@x=1"], "`@x=1`"),
        (["optim=sgd", "optim.beta1=0.5"], "`optim.beta1` belongs to optim=adamw|nadam alone"),
        (["+optim.lr=1"], "`optim.lr`"),
        (["~seed"], "seed"),
        (["+hydra.x=1"], "hydra.x"),
        (["experiment=nope"], "no experiment=nope: choose one of acco_finetune, acco_paper, bert"),
        (["seed=${nope}"], "seed"),
        (["model.layers=1,2"], "model.layers"),
        (["seed=1.5e0"], "seed="),
        (["optim.lr=fast"], "optim.lr=fast: not a value of type float"),
        (["model.bias=maybe"], "`model.bias=maybe`"),
        (["model.layers=two"], "model.layers=two: not a value of type integer"),
        (["optim.clip=null"], "optim.clip cannot be null"),
    ],
)
def test_words_that_mean_nothing(words: list[str], says: str) -> None:
    assert says in refused(words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.kv_heads=3"], "model.kv_heads=3"),
        (["model.width=12", "model.kv_heads=4"], "positions=rope"),
        (["model.mlp_width=0"], "model.mlp_width=0"),
        (["model.dropout=1.5"], "model.dropout=1.5"),
        (["optim.beta2=1"], "optim.beta2"),
        (["optim=sgd", "optim.momentum=1"], "optim.momentum"),
        (["schedule=constant", "schedule.warmup=1.1"], "warmup"),
        (["schedule=wsd", "schedule.floor=1.5"], "schedule.floor"),
        (["text=files", "text.path=[]"], "text.path"),
        (["name=.."], "name="),
        (["name=.hidden"], "name="),
        (["batch_tokens=128"], "fewer than the 2 ranks: at least 256"),
    ],
)
def test_what_cannot_work_together(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        check(compose.compose(words), Place("mpirun", 0, 2, 0, 2))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_least_that_works() -> None:
    place = Place("mpirun", 0, 2, 0, 2)
    check(compose.compose(["batch_tokens=256", "schedule=wsd", "schedule.decay=0.95"]), place)
    check(compose.compose(["precision=fp64", "device=cpu", "text=files", "text.path=[a, b]"]), place)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("exchange"), "unknown exchange: 'None'"),
        (lambda d: d["exchange"].update(name="aco"), "unknown exchange"),
        (lambda d: d.update(optim=None), "unknown optim"),
        (lambda d: d["model"].update(bogus=1), "does not fit this version"),
    ],
)
def test_a_run_of_another_version(change: Any, says: str) -> None:
    values = compose.to_dict(compose.compose([]))
    change(values)
    with pytest.raises(UserError, match=says) as error:
        compose.from_dict(values)
    assert "\n" not in str(error.value)


def test_flags_that_print(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--cfg=job", "seed=7"], ["seed=7", "--cfg", "job"]):
        assert settings_only(words, "", compose.compose) is None
        assert "\nseed: 7\n" in capsys.readouterr().out
    for flag in ("-h", "--help"):
        assert settings_only([flag, "optim", "optim.lr=0.125", "name=job"], "the usage", compose.compose) is None
        said = capsys.readouterr().out
        assert "0.125" in said and "seed" not in said
        assert settings_only([flag, "name=job"], "all of it", compose.compose, "in short") is None
        said = capsys.readouterr().out
        assert said.startswith("in short") and "name=job" in said
    with pytest.raises(UserError, match="no flag -x here"):
        settings_only(["seed=1", "-x"], "", compose.compose)
