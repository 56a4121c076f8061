"""Settings compose, and whatever is wrong with them is one sentence that names it."""

import dataclasses

import pytest

from hvdllm import registry, settings
from hvdllm.cli.flags import settings_only
from hvdllm.config import compose
from hvdllm.config.check import check
from hvdllm.config.help import ALL, print_help
from hvdllm.errors import UserError
from hvdllm.world.detect import Place

GROUPS = [(group, option) for group in [*registry.GROUPS, "experiment"] for option in compose.options(group)]


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_option_composes_and_survives_its_yaml(group: str, option: str) -> None:
    import yaml

    config = compose.compose([f"{group}={option}"])
    assert compose.from_dict(yaml.safe_load(compose.to_yaml(config))) == config


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["exchange=aco"],
            "no exchange=aco: choose one of acco, acco_timed, allreduce, ddp, delayed, diloco, fedavg, horovod, "
            "local_sgd, local_sgd_by_speed, parameter_server, sharded, streaming_diloco",
        ),
        (["exchange.bogus=1"], "`exchange.bogus`"),
        (["lr=3"], "did you mean optim.lr"),
        (["+x=1"], "`x`"),
        (["++exchange.bogus=1"], "`exchange.bogus`"),
        (["+exchange._target_=os.system"], "`exchange._target_`"),
        (["++exchange={a: 1}"], "`exchange.a`"),
        (["~exchange"], "exchange has no settings"),
        (["~exchange.bucket_mb"], "`exchange.bucket_mb`"),
        (["seed=abc"], "seed=abc: not a value of type integer"),
        (["micro_batch=null"], "micro_batch cannot be null"),
        (["precision=fp31"], "choose one of fp32, bf16, fp64"),
        (["seed=-1"], "seed=-1 is too small"),
        (["optim.lr=nan"], "optim.lr=nan"),
        (["optim.lr=inf"], "optim.lr=inf is not a finite number"),
        (["budget_tokens=1.5"], "budget_tokens=1.5"),
        (["hydra.verbose=true"], "hydra.verbose"),
        (["seed"], "`seed` cannot be read"),
        (["optim.lr=[a"], "`optim.lr=[a` cannot be read"),
    ],
)
def test_what_is_wrong_is_one_sentence(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        compose.compose(words)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["batch_tokens=1000"], "no multiple of model.context=128: 1024"),
        (["batch_tokens=256"], "fewer than the 3 ranks"),
        (["text=files"], "needs text.path"),
        (["model.heads=3"], "model.heads"),
        (["model.dropout=1"], "model.dropout"),
        (["optim.beta1=1"], "optim.beta1"),
        (["optim=sgd", "optim.momentum=0", "optim.nesterov=true"], "nesterov"),
        (["schedule=wsd", "schedule.decay=0.99"], "horizon"),
        (["schedule.floor=2"], "schedule.floor"),
        (["name=a/b"], "name="),
        (["world=single"], "3 times"),
        (["precision=fp64", "device=cuda"], "fp64"),
        (["text.validation_share=1"], "validation_share"),
    ],
)
def test_what_cannot_work_together_is_one_sentence(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        check(compose.compose(words), Place("horovodrun", 0, 3, 0, 3))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_launcher_is_needed_for_world_horovod() -> None:
    with pytest.raises(UserError, match="horovodrun"):
        check(compose.compose(["world=horovod"]), Place())
    check(compose.compose(["world=horovod"]), Place("horovodrun", 0, 1, 0, 1))


def test_whole_floats_are_tokens() -> None:
    config = compose.compose(["budget_tokens=1e6", "schedule.horizon=2.5e6"])
    assert (config.budget_tokens, config.schedule.horizon) == (1_000_000, 2_500_000)


@pytest.mark.parametrize(
    "words",
    [
        [
            "exchange=diloco",
            "exchange.local_steps=7",
            "seed=1",
            "seed=2",
            "sample_prompt='a,b'",
            "world.slow=[1:4,3:2]",
        ],
        [
            "optim.momentum=0.5",
            "optim=sgd",
            "text=files",
            "text.path=[a, 'b c']",
            "budget_tokens=1.5M",
            "name=${seed}x",
        ],
        ["experiment=race", "seed=1", "++seed=2"],
        ["optim.momentum=0.5"],
        ["seed=1,2"],
        ["seed=abc", "optim=nope"],
        ["seed=1", "~seed"],
        ["text.path=null", "micro_batch=null"],
    ],
)
def test_what_is_kept_of_the_options_changes_nothing(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def composed() -> settings.Config | str:
        try:
            return compose.compose(words)
        except UserError as error:
            return str(error)

    def nothing_kept(*given: object) -> None:
        raise ValueError

    found = composed(), composed()
    monkeypatch.setattr(compose, "_chosen", nothing_kept)
    assert found == (composed(),) * 2


def test_what_one_call_sets_another_does_not_see() -> None:
    before = compose.compose([])
    changed = compose.compose(["seed=3", "optim.lr=0.5"])
    assert (changed.seed, changed.optim.lr) == (3, 0.5)
    assert compose.compose([]) == before


def test_the_last_word_counts_when_a_run_goes_on() -> None:
    assert compose.merged(["seed=1", "optim=sgd"], ["optim=adamw", "keep=3"]) == ["seed=1", "optim=adamw", "keep=3"]


def test_every_setting_is_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_help("usage", compose.compose([]), ALL)
    said = capsys.readouterr().out
    for f in dataclasses.fields(settings.Config):
        assert len(f.metadata["doc"]) > 15 or f.name in registry.GROUPS
        assert f.name in said
    for group, kinds in registry.all_kinds().items():
        for kind in kinds.values():
            assert kind.__doc__
            for f in dataclasses.fields(kind):
                assert len(f.metadata["doc"]) > 10
                assert f"{group}.{f.name}" in said


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings_only(["seed=1"], "", compose.compose) == ["seed=1"]
    assert settings_only(["--cfg", "job", "seed=7"], "", compose.compose) is None
    assert "seed: 7" in capsys.readouterr().out
    with pytest.raises(UserError, match="--bogus"):
        settings_only(["--bogus"], "", compose.compose)


def test_a_task_brings_its_model() -> None:
    """Also in a sweep. A model that was chosen is left alone, and refused if it is another one."""
    assert type(compose.compose(["task=images"]).model).__name__ == "ResNet"
    assert type(compose.compose(["model=resnet", "task=images", "model.width=8"]).model).__name__ == "ResNet"
    assert type(compose.compose(["task=images", "model=tiny"]).model).__name__ == "Model"
    assert compose.compose(["task=images"]).batch_tokens == 64 and compose.compose([]).batch_tokens == 2048
    assert compose.compose(["task=images", "batch_tokens=128"]).batch_tokens == 128
    assert compose.compose(["task=ratings"]).micro_batch == 2048, "16 clicks at a time would take minutes"
    beneath = compose.compose(["task=images", "batch_tokens=32"])
    assert compose.compose(["task=images"], beneath).batch_tokens == 32, "a run keeps its own"
    with compose.hydra_over(["task=masked_lm", "seed=0,1"], sweep=True) as overrides:
        assert overrides[-1] == "model=bert"
