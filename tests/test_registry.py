"""The registry: every part is described once, and what is described is there."""

import configparser
import dataclasses
from pathlib import Path

import conformance
import pytest

from hvdllm import registry
from hvdllm.config import composition
from hvdllm.errors import UserError
from hvdllm.registry import ExchangeFacts, WireFacts
from hvdllm.settings import Settings

ENTRIES = [
    pytest.param(part, id=f"{group}={part.name}")
    for group in (*registry.GROUPS, "transport")
    for part in registry.parts(group).values()
]


@pytest.mark.parametrize("part", ENTRIES)
def test_a_part_is_described_and_there(part: registry.Part) -> None:
    assert issubclass(part.settings, Settings) and dataclasses.is_dataclass(part.settings)
    assert len(part.settings.__doc__ or "") > 20, "what --help says of it"
    for field in dataclasses.fields(part.settings):
        assert len(field.metadata["doc"]) > 10
    if part.made is not None:
        registry.built(part)


@pytest.mark.parametrize("group", conformance.ALL)
def test_mypy_has_proven_all_of_them(group: str) -> None:
    made = [registry.built(part) for part in registry.parts(group).values() if part.made is not None]
    assert sorted(map(id, made)) == sorted(map(id, conformance.ALL[group])), "tests/conformance.py lists them all"


def of(group: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("part", registry.parts(group).values(), ids=lambda part: part.name)


@of("launch")
def test_a_launcher_is_ready_or_says_in_a_sentence_what_is_missing(part: registry.Part) -> None:
    try:
        registry.built(part).ready(part.settings())
    except UserError as error:
        assert "\n" not in str(error)


@of("text")
def test_a_source_of_text_names_files_or_says_in_a_sentence_what_is_missing(part: registry.Part) -> None:
    try:
        found = registry.built(part)(part.settings())
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert found and len(set(found)) == len(found) and all(path.is_file() for path in found)
    assert found == registry.built(part)(part.settings()), "the same on every rank"


@of("track")
def test_what_a_tracker_needs_can_be_installed_with_hvdllm(part: registry.Part) -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).resolve().parents[1] / "setup.cfg")
    extras = setup["options.extras_require"]
    assert not part.facts.package or part.facts.package in extras, "pip install hvdllm[NAME]"


def test_a_name_is_taken_once() -> None:
    class Other(Settings):
        pass

    with pytest.raises(UserError, match=r"exchange=acco, which hvdllm\.exchange\.parts has"):
        registry.part("exchange", "acco", "x:Y", ExchangeFacts())(Other)


def test_pairs_are_decided_by_facts_alone() -> None:
    """Of parts that nobody here knows."""
    foreign = registry.Part("exchange", "mine", Settings, "mine:Mine", ExchangeFacts(carries=registry.PIECES))
    sums = registry.Part("wire", "whole", Settings, "mine:Whole", WireFacts(frozenset({registry.SUMS})))
    both = registry.Part("wire", "cut", Settings, "mine:Cut", WireFacts(frozenset({registry.SUMS, registry.PIECES})))
    assert composition.unfit(foreign, both) is None
    assert "exchange=mine with wire=whole: " in str(composition.unfit(foreign, sums))
    for name in ("parameter_server", "ddp", "horovod"):
        assert composition.unfit(registry.parts("exchange")[name], both), "refused, not ignored"
    assert composition.unfit(registry.parts("exchange")["allreduce"], both) is None


def test_presets_of_a_part_need_no_file() -> None:
    """conf/ holds what is more than a part at its defaults."""
    conf = Path(__file__).resolve().parents[1] / "conf"
    for group in registry.GROUPS:
        stems = {file.stem for file in (conf / group).glob("*.yaml")}
        assert not stems & {*registry.parts(group)} or group in ("model", "world", "device"), group
