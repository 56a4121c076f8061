"""What a word means: text stays as it was typed, numbers may be abbreviated, an option brings settings of its own.
Seen to catch: a hash that is read as a number, a path that is cut at a comma, backslashes that come or go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdllm.config.compose import compose, merged
from hvdllm.config.words import expand, of, plain, quoted, split, typed, unquoted, value_of
from hvdllm.errors import UserError
from hvdllm.exchange import parts as exchanges
from hvdllm.launch import sweep
from hvdllm.launch.base import command
from hvdllm.runs import Folder
from hvdllm.trainer.resume import asked

LOOKS = [
    "84e1573", "3e8840", "1e5", "2024_05_01", "1.10", "true", "0x1F", "007", "inf", "-", "~x", "a=b", "a,b",
    "optim.lr=0.001,seed=1", "f(x)", "choice(a,b)", "[a]b", "{a: 1}", "a b", "ü漢", "it's", 'say "x"', "a\\b", "\\",
    "a:b:c", "#", "$HOME", "*", "null?", "a\nb", "'", '"', "a'", " a ",
]  # fmt: skip


@pytest.mark.parametrize("text", LOOKS)
@pytest.mark.parametrize(
    "key", ["name", "sample_prompt", "track.project", "text.column", "runs_dir", "resume", "init_from"]
)
def test_text_stays_as_it_is_typed(text: str, key: str) -> None:
    group, _, name = key.rpartition(".")
    more = {"track": ["track=wandb"], "text": ["text=files"]}.get(group, [])
    config = compose([*more, f"{key}={text}"])
    assert getattr(getattr(config, group) if group else config, name) == text


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=12))
def test_quotes_and_what_they_enclose_are_each_others_inverse(text: str) -> None:
    assert unquoted(quoted(text)) == text


@given(st.text("ab'\"\\ ,=()[]", max_size=8))
def test_hydra_reads_what_was_quoted(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert str(OverridesParser.create().parse_override(f"k={quoted(text)}").value()) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [("'a=b,c'", "a=b,c"), ('"a=b"', "a=b"), ("a\\=b\\,c", "a=b,c"), (json.dumps("a b"), "a b"), ("'it\\'s'", "it's")],
)
def test_hydras_own_spellings_mean_what_they_mean_there(value: str, text: str) -> None:
    assert compose([f"name={value}"]).name == text == value_of(f"resume={value}")


def test_null_is_no_text_where_there_may_be_none() -> None:
    config = compose(["name=null", "sample_prompt=null", "data_dir=null"])
    assert (config.name, config.data_dir, config.sample_prompt) == (None, None, "null")
    assert compose(["sample_prompt="]).sample_prompt == ""


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("a,b", "a,b"), ("[a,b]", ["a", "b"]), ("['a,b', 2024_05]", ["a,b", "2024_05"]), ("[]", []), ("null", None),
        ("1:4", "1:4"), ("runs/s/lr=1", "runs/s/lr=1"), ("[1:4,3:2]", ["1:4", "3:2"]), ("{a: 1}", "{a: 1}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["text.path", "world.slow", "track.tags", "launch.options"])
def test_one_or_several_texts(key: str, value: str, read: object) -> None:
    group, name = key.split(".")
    option = {"text": "files", "world": "virtual", "track": "wandb", "launch": "slurm"}[group]
    assert getattr(getattr(compose([f"{group}={option}", f"{key}={value}"]), group), name) == read


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1M", 10**6),
        ("64k", 64_000),
        ("1.5M", 1_500_000),
        ("2B", 2 * 10**9),
        ("1e6", 10**6),
        ("2.5e6", 2_500_000),
        ("1_000", 1000),
    ],
)
def test_whole_numbers_as_people_write_them(text: str, number: int) -> None:
    assert compose([f"budget_tokens={text}", f"batch_tokens={text}", f"seed={text}"]).budget_tokens == number
    assert typed(f"seed={text},choice({text},3)", sweep=True) == f"seed={number},choice({number},3)"


@pytest.mark.parametrize("text", ["1.5", "1e-3", "k", "1kk", "1e99999999999", "0.0001k", "1x", "--1"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(UserError) as error:
        compose([f"budget_tokens={text}"])
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ options with settings of their own
def test_an_option_brings_settings_of_its_own() -> None:
    words = ["exchange=diloco+exchange.local_steps=10+exchange.outer_lr=0.5"]
    config = compose(words)
    assert isinstance(config.exchange, exchanges.DiLoCo)
    assert (config.exchange.local_steps, config.exchange.outer_lr) == (10, 0.5)
    assert expand("optim.lr=1e+3") == ["optim.lr=1e+3"] and expand("name=a+b=c") == ["name=a+b=c"]
    with pytest.raises(UserError, match=r"exchange\.local_steps. belongs to exchange=.*diloco.* alone"):
        compose(["exchange.local_steps=10"])


def points(tmp_path: Path, *words: str) -> dict[str, sweep.Task]:
    from hvdllm.launch.hydra import drive

    found: dict[str, sweep.Task] = {}

    def make(trials: int | None) -> object:
        one = sweep.Sweep([*words, of("runs_dir", f"{tmp_path}/r=1,2")], trials, lambda text: None)

        def batch(jobs: list[list[str]]) -> list[None]:
            found.update({(task := one.task(job)).point.name: task for job in jobs})
            return [None] * len(jobs)

        return batch

    drive([*words, of("runs_dir", f"{tmp_path}/r=1,2")], make)  # type: ignore[arg-type]
    return found


def test_a_sweep_takes_the_grammar_of_bench_exchange(tmp_path: Path) -> None:
    """`train -m exchange=allreduce,diloco+exchange.local_steps=10 seed=0,1`."""
    found = points(tmp_path, "exchange=allreduce,diloco+exchange.local_steps=10", "seed=0,1", "launch.sweep=1e5")
    names = [f"exchange={e},seed={s}" for e in ("allreduce", "diloco,exchange.local_steps=10") for s in (0, 1)]
    assert list(found) == names
    task = found[names[2]]
    assert task.config.exchange.local_steps == 10 and task.point.runs_dir == f"{tmp_path}/r=1,2/1e5"
    several = "exchange=allreduce,diloco+exchange.local_steps=10"
    once = ["exchange=diloco", "exchange.local_steps=10"]
    assert sweep.each_once([several, "seed=0", "seed=1"]) == [several, "seed=1"]
    assert sweep.each_once(["exchange=diloco+exchange.local_steps=5", once[1]]) == once
    again = compose(command(task.point)[command(task.point).index("train") + 1 :])
    assert (again.name, again.runs_dir, again.exchange) == (names[2], task.point.runs_dir, task.config.exchange)


def test_a_sweep_over_texts(tmp_path: Path) -> None:
    found = points(tmp_path, "sample_prompt='a,b',1e5,c d", "budget_tokens=1M,2M")
    assert {(t.config.sample_prompt, t.config.budget_tokens) for t in found.values()} == {
        (prompt, tokens) for prompt in ("a,b", "1e5", "c d") for tokens in (10**6, 2 * 10**6)
    }
    assert any(name == "sample_prompt=1e5,budget_tokens=1000000" for name in found), list(found)


def test_a_text_that_names_what_exists_is_one_value_of_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "a=1,b=2").mkdir()
    assert not sweep.is_sweep(f"init_from={tmp_path}/a=1,b=2") and sweep.is_sweep("init_from=a,b")


def test_a_points_folder_pastes_into_resume(tmp_path: Path) -> None:
    folder = tmp_path / "s" / "optim.lr=0.001,seed=1 (ü)"
    folder.mkdir(parents=True)
    Folder(folder).create(compose(["optim.lr=0.001", "text.tokenizer=bytes"]))
    spelled = [str(folder), quoted(str(folder)), json.dumps(str(folder), ensure_ascii=False)]
    for text in spelled:
        config, _ = asked([f"resume={text}"])
        assert (config.name, config.runs_dir, config.optim.lr) == (folder.name, str(folder.parent), 0.001)


def test_what_was_said_of_another_option_is_left_behind() -> None:
    old = ["track=wandb", "track.mode=offline", "track.tags=[x]", "optim.lr=1e-3"]
    assert merged(old, ["track=none"]) == ["optim.lr=1e-3", "track=none"]
    assert merged(old, ["track=wandb", "seed=1"]) == [*old, "seed=1"]
    assert merged(["launch.sweep=s"], ["launch=horovodrun"]) == ["launch.sweep=s", "launch=horovodrun"]


@pytest.mark.parametrize(
    ("value", "parts"),
    [("a,b", ["a", "b"]), ("'a,b',c", ["'a,b'", "c"]), ("[a,b],c", ["[a,b]", "c"]), ("a\\,b", ["a\\,b"]), ("", [""])],
)
def test_commas(value: str, parts: list[str]) -> None:
    assert split(value) == parts


def test_names_of_folders_have_no_quotes() -> None:
    assert plain("text.tokenizer='bytes'") == "text.tokenizer=bytes" and plain("seed=1") == "seed=1"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("exchange=aco", "acco"),
        ("model=tinny", "tiny"),
        ("precision=fp23", "fp32"),
        ("optim=adam", "adamw"),
        ("batch_token=1", "batch_tokens"),
    ],
)
def test_near_names_get_a_hint(word: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"did you mean.* {hint}"):
        compose([word])
