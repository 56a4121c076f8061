"""Names, words and refusals of a sweep: nothing is started."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from hvdllm.cli import train
from hvdllm.config import compose
from hvdllm.config.composition import refusal, setup_of
from hvdllm.errors import UserError
from hvdllm.exchange import parts as exchanges
from hvdllm.launch import horovodrun, lab, local, sweep, watched
from hvdllm.launch import parts as launchers
from hvdllm.launch.sweep import Sweep, point_of, safe
from hvdllm.world.detect import Place

ALONE = ("HOROVOD_RANK", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMIX_RANK", sweep.LAUNCHED)


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ALONE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "run", lambda *given: pytest.fail("something was started"))


def refused(*words: str) -> str:
    """What `hvdllm train` says, and that it left nothing."""
    with pytest.raises(UserError) as error:
        train.run(list(words))
    assert not Path("runs").exists()
    said = str(error.value)
    assert "\n" not in said and len(said) < 300
    return said


def points(*words: str) -> dict[str, Any]:
    """name: point, as a sweep would run them."""
    from hvdllm.launch import hydra

    found: dict[str, Any] = {}

    def make(trials: int | None) -> hydra.Task:
        swept = Sweep(list(words), trials, lambda text: None)

        def task(jobs: Any) -> list[float | None]:
            for job in jobs:
                made = swept.task(job)
                found[made.point.name] = made
            return [None for _ in jobs]

        return task

    hydra.drive(words, make)
    return found


# ------------------------------------------------------------------ names
def test_a_point_is_named_by_what_differs_and_gets_its_words() -> None:
    found = points("launch=horovodrun", "launch.np=3", "exchange=allreduce,delayed", "seed=0,1", "optim.lr=1e-2")
    assert list(found) == [f"exchange={e},seed={s}" for e in ("allreduce", "delayed") for s in (0, 1)]
    task = found["exchange=delayed,seed=1"]
    folder = Path(task.point.runs_dir)
    assert folder.parent == Path("runs") and task.point.folder == folder / "exchange=delayed,seed=1"
    assert not any(word.startswith("launch") and not word.startswith("launch.sweep=") for word in task.point.words)
    rank = compose.compose(task.point.words)  # as its ranks will
    assert (rank.name, rank.runs_dir, rank.seed, rank.optim.lr) == (task.point.name, str(folder), 1, 0.01)
    assert isinstance(rank.exchange, exchanges.Delayed)
    assert isinstance(rank.launch, launchers.Local) and rank.launch.sweep == folder.name
    assert isinstance(task.config.launch, launchers.Horovodrun) and task.config.launch.np == 3


@pytest.mark.parametrize(
    "text",
    ["text.path=a/b", "text.path=a_b", ".hidden", "../up", "optim.lr=1e-3", "seed=1," * 90, "seed=1," * 91, 'x="a b"',
     "x=${oc.env:HOME}", "x=grüße", "x='a b'", "x=[a, b]"],
)  # fmt: skip
def test_a_safe_name_is_a_folder_and_a_word_of_hydra(text: str) -> None:
    name = safe(text)
    assert len(name) <= sweep.LONGEST and name[0] not in ".-" and "/" not in name
    assert Path(name).name == name
    assert OverridesParser.create().parse_override(f"name={json.dumps(name)}").value() == name


def test_names_that_were_changed_do_not_meet() -> None:
    texts = ["text.path=a/b", "text.path=a_b", "text.path=a b", "seed=1," * 90, "seed=1," * 91, "x=a_b"]
    assert len({safe(text) for text in texts}) == len(texts)
    assert safe("exchange=delayed,seed=1") == "exchange=delayed,seed=1"


def folder(*words: str) -> str:
    """Name of the sweep that these words make."""
    return Sweep(list(words), None, print).name([word for word in words if sweep.is_sweep(word)])


def test_the_same_sweep_has_the_same_folder_and_another_has_another() -> None:
    base = ("seed=0,1", "exchange=allreduce,delayed", "optim.lr=1e-2", "budget_tokens=1e6")
    first = folder(*base)
    assert first.startswith("sweep-") and len(first) == len("sweep-") + 6
    same = [
        ("exchange=allreduce,delayed", "seed=0,1,2", "budget_tokens=1000000", "optim.lr=1e-2"),  # a further seed
        (*base, "launch.parallel=2", "track=wandb", "data_dir=d", "launch.partition=long", "track.project=p"),
        (*base, "hydra.sweeper.n_trials=3", "--config-dir=/x", "runs_dir=there"),
    ]
    assert {folder(*words) for words in same} == {first}
    others = [
        (*base[:2], "optim.lr=1e-3", base[3]),
        (*base, "micro_batch=8"),
        ("seed=0,1", "optim.lr=1e-2", "budget_tokens=1e6"),
        ("launch=horovodrun", *base),
        ("launch=horovodrun", "launch.np=4", *base),
        ("launch=horovodrun", "launch.link=1gbit", *base),
    ]
    found = [folder(*words) for words in others]
    assert len({first, *found}) == len(others) + 1
    assert folder("experiment=laptop", "seed=0,1").startswith("laptop-")
    assert folder("experiment=laptop,race", "seed=0,1").startswith("sweep-")
    (task,) = points("launch.sweep=mine", "runs_dir=there", "seed=range(0,1)").values()
    assert (task.point.runs_dir, task.point.name) == ("there/mine", "seed=0")


def test_an_experiment_file_may_say_what_varies(tmp_path: Path) -> None:
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    text = "# @package _global_\nhydra: {sweeper: {params: {exchange: 'allreduce,acco', seed: '0,1', "
    (own / "grid.yaml").write_text(text + "budget_tokens: '1e6,2e6'}}}\nmicro_batch: 5\n")
    found = points(compose.config_folder(str(own.parent)), "experiment=grid", "seed=7")
    assert list(found) == [f"exchange={e},budget_tokens={b}" for e in ("allreduce", "acco") for b in (10**6, 2 * 10**6)]
    config = compose.compose(found["exchange=acco,budget_tokens=2000000"].point.words)
    assert (config.seed, config.micro_batch, config.budget_tokens) == (7, 5, 2_000_000)
    # One run of the same file: what Hydra's sweeper is told is no setting of a run.
    assert compose.compose([compose.config_folder(str(own.parent)), "experiment=grid"]).micro_batch == 5


# ------------------------------------------------------------------ a folder of the user's own
def test_a_site_file_is_selected_from_the_users_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, first in (("site", "/schema/launch/slurm@_here_"), ("queue", "slurm")):
        file = tmp_path / "my folder, (grüße)" / "launch" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"defaults: [{first}, _self_]\npartition: {name}\nmodules: [cuda, mpi]\n")
        where = compose.config_folder("my folder, (grüße)")
        launch = compose.compose([where, f"launch={name}", "launch.nodes=3"]).launch
        assert isinstance(launch, launchers.Slurm)
        assert (launch.partition, launch.nodes, launch.modules) == (name, 3, ["cuda", "mpi"])
        (point,) = {task.point.words for task in points(where, f"launch={name}", "seed=range(4,5)").values()}
        assert point[0] == f"--config-dir={tmp_path}/my folder, (grüße)"  # wherever a rank stands
    for flag in (["--config-dir", "my folder, (grüße)"], ["--config-dir=my folder, (grüße)"]):
        assert train.run([*flag, "launch=site", "--cfg", "job"]) == 0
        assert "partition: site" in capsys.readouterr().out
    assert "choose one of horovodrun, local, queue, ray, site, slurm" in refused(*flag, "launch=sight")
    assert train.run(["--help"]) == 0
    assert "--config-dir" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--config-dir", "nowhere"], ["--config-dir=nowhere"], ["--config-dir"]])
def test_a_missing_folder_is_a_sentence(words: list[str]) -> None:
    assert "there is no such folder" in refused(*words)


# ------------------------------------------------------------------ refusals
SWEEP = ("-m", "seed=0,1")
HOROVODRUN = ("launch=horovodrun",)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed=0,1"], "`seed=0,1` gives several values: `hvdllm train -m`"),
        (["optim.lr=interval(0,1)"], "gives several values"),
        (["hydra/sweeper=optuna"], "with `hvdllm train -m`"),
        (["-m", "seed=1"], "nothing to sweep"),
        ([*SWEEP, "name=x"], "leave name out"),
        ([*SWEEP, "resume=runs/x"], "resume=RUN is for one run"),
        ([*SWEEP, "hydra.run.dir=x"], "`hydra.run.dir=x` would change nothing"),
        ([*SWEEP, "hydra/launcher=basic"], "`hydra/launcher=basic` would change nothing"),
        ([*SWEEP, "hydra.sweeper.bogus=1"], "there is no setting `hydra.sweeper.bogus`"),
        ([*SWEEP, "hydra/sweeper=bogus"], "there is no hydra/sweeper=bogus: choose one of basic"),
        ([*SWEEP, "launch.parallel=1,2"], "launch.parallel is the same for all points"),
        ([*SWEEP, "runs_dir=a,b"], "runs_dir is the same for all points"),
        ([*SWEEP, "launch.sweep=.x"], "launch.sweep='.x' is not the name of a folder"),
        (["-m", "optim.lr=interval(0,1)"], "intervals are for hydra/sweeper=optuna"),
        (["-m", "exchange=allreduce,aco"], "there is no exchange=aco"),
        (["-m", "optim.beta1=0.9,1.5"], "optim.beta1=1.5: optim.beta1=1.5 must be smaller than 1"),
        (["-m", *HOROVODRUN, "exchange=delayed,acco", "wire=fp32,powersgd"], "exchange=acco wire=powersgd: "),
        (["-m", *HOROVODRUN, "launch.np=64", "batch_tokens=4096,8192"], "fewer than the 64 ranks"),
        (["-m", "launch=slurm", "launch.nodes=16", "launch.ranks_per_node=2", "seed=0,1"], "fewer than the 32 ranks"),
        (["-m", "hydra/sweeper=optuna", "optim.lr=interval(0,1)", "eval_every=0"], "give eval_every above 0"),
        (["-m", *HOROVODRUN, "launch.link=1gbit", "launch.parallel=2", "seed=0,1"], "one network lab"),
        ([*HOROVODRUN, "launch.hosts='a:1,b:2'"], "has 3 slots and launch.np=2"),
        ([*HOROVODRUN, "launch.hosts=a"], "give host:slots"),
        ([*HOROVODRUN, "launch.link=1gbit", "launch.controller=mpi"], "leave launch.hosts and launch.interface"),
        ([*HOROVODRUN, "launch.link=fast"], "launch.link=fast: give a rate such as 200mbit"),
        ([*HOROVODRUN, "launch.link=1gbit", "launch.np=9"], "a lab has 2 to 8 hosts, not 9"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_work_is_one_sentence(words: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "missing", lambda: None)
    assert says in refused(*words)


def test_a_lab_needs_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "missing", lambda: "network namespaces need root")
    assert "launch.link=1gbit: network namespaces need root" in refused(*HOROVODRUN, "launch.link=1gbit")


def test_without_horovod_or_optuna_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if "optuna" in name:
            raise ImportError(name)
        return whole(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    assert "pip install hvdllm[optuna]" in refused("-m", "hydra/sweeper=optuna", "optim.lr=interval(0,1)")
    monkeypatch.setattr(horovodrun.shutil, "which", lambda name: None)
    monkeypatch.setattr(horovodrun.sys, "executable", "/nowhere/python")
    assert "jobs/setup.sh" in refused(*HOROVODRUN)


def test_a_rank_starts_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_SIZE", "2")):
        monkeypatch.setenv(f"HOROVOD_{name}", value)
    assert "launch=slurm under horovodrun" in refused("launch=slurm")
    assert "train -m under horovodrun" in refused("-m", "seed=0,1")


# ------------------------------------------------------------------ what a launcher makes of a point
@pytest.mark.parametrize(
    ("words", "place"),
    [
        ([], Place()),
        (["launch=horovodrun", "launch.np=3"], Place("horovodrun", 0, 3, 0, 3)),
        (["launch=horovodrun", "launch.np=3", "launch.hosts='a:2,b:1'"], Place("horovodrun", 0, 3, 0, 2)),
        (["launch=horovodrun", "launch.controller=mpi", "launch.np=3"], Place("mpirun", 0, 3, 0, 3)),
        (["launch=horovodrun", "launch.link=1gbit"], Place("horovodrun", 0, 2, 0, 1)),
        (["launch=slurm", "launch.nodes=2", "launch.ranks_per_node=4"], Place("srun", 0, 8, 0, 4)),
        (["launch=slurm", "launch.how=gloo", "launch.nodes=2"], Place("horovodrun", 0, 2, 0, 1)),
        (["launch=slurm"], Place()),
    ],
)
def test_points_are_checked_for_where_they_will_run(words: list[str], place: Place) -> None:
    assert compose.compose(words).launch.place() == place


@pytest.mark.parametrize(("controller", "runs"), [("mpi", True), ("gloo", False)])
def test_a_parameter_server_s_points_run_under_mpi_alone(controller: str, runs: bool) -> None:
    words = ["launch=horovodrun", "exchange=parameter_server", f"launch.controller={controller}"]
    config = compose.compose(words)
    why = refusal(setup_of(config, config.launch.place()))
    assert why is None if runs else why is not None and "letters" in why


def test_the_words_of_horovodrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horovodrun, "program", lambda: "horovodrun")
    monkeypatch.setattr(horovodrun.shutil, "which", lambda name: None)
    monkeypatch.delenv("OMPI_MCA_plm", raising=False)
    monkeypatch.setenv("OMPI_MCA_mpi_yield_when_idle", "0")  # the user's own stays

    def of(*more: str) -> tuple[str, dict[str, str]]:
        settings = compose.compose(["launch=horovodrun", *more]).launch
        return " ".join(horovodrun.launcher(settings, None)), horovodrun.environment(settings, None)

    words, env = of()
    assert words == f"{' '.join(horovodrun.starter('gloo'))} --gloo -np 2 --disable-cache"
    assert "OMPI_MCA_plm" not in env
    words, env = of("launch.controller=mpi", "launch.np=4")
    assert words == "horovodrun --mpi -np 4 --disable-cache"
    assert (env["OMPI_MCA_plm"], env["OMPI_ALLOW_RUN_AS_ROOT"], env["OMPI_MCA_mpi_yield_when_idle"]) == (
        "isolated", "1", "0",
    )  # fmt: skip
    words, env = of("launch.hosts='a:1,b:1'", "launch.interface=ib0", "launch.controller=mpi")
    assert words.endswith("-H a:1,b:1 --network-interfaces ib0")
    assert env["GLOO_SOCKET_IFNAME"] == "ib0" and "OMPI_MCA_plm" not in env


def test_points_at_once_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdllm.device.usable_cores", lambda: 16)

    def threads(*words: str) -> list[str]:
        return sweep.share_of_cores(compose.compose(words))

    assert threads() == []
    assert threads("launch.parallel=4") == ["device.threads=4"]
    assert threads("launch=horovodrun", "launch.parallel=4") == ["device.threads=2"]
    assert threads("launch=horovodrun", "launch.np=4", "launch.link=1gbit") == ["device.threads=4"], "each host is all"
    assert threads("launch=horovodrun", "launch.np=4") == [], "the ranks see each other"
    assert threads("launch.parallel=4", "device.threads=3") == []
    assert threads("launch=slurm", "launch.parallel=4") == []
    words = next(iter(points("launch.parallel=4", "seed=0,1").values())).point.words
    assert "device.threads=4" in words


def test_what_was_started_here_has_obeyed_its_launch() -> None:
    config = compose.compose(["launch=horovodrun", "launch.sweep=s"])
    assert sweep.obeyed(config).launch == launchers.Local(sweep="s")
    point = point_of(config := compose.compose(["name=a"]), ["name=b", "runs_dir=c", "+launch.sweep=x", "seed=3"])
    assert point.words == ("seed=3", "runs_dir='runs'", "name='a'")


# ------------------------------------------------------------------ what a failed run said
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]<stderr>:hvdllm: rank 1: the disk is full\n[0]<stdout>:x\nTraceback\nRuntimeError: Horovod\n",
         "rank 1: the disk is full"),
        ("a\nhvdllm: first\nhvdllm: second\nb\n", "second"),
        ("[0]<stderr>:Killed\nTraceback of the launcher\n", "[0]<stderr>:Killed"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_last_sentence_is_quoted(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "launch.log").write_text("hvdllm: of an earlier life\n" + text)
    assert sweep.last_sentence(tmp_path / "launch.log", len("hvdllm: of an earlier life\n")) == says
    assert sweep.last_sentence(tmp_path / "nothing", 0) == ""


def test_progress_reads_what_is_new_and_a_file_that_was_cut(tmp_path: Path) -> None:
    seen, path = watched.Watched(tmp_path), tmp_path / "metrics.jsonl"
    seen.look()
    assert seen.tokens == 0
    lines = [json.dumps({"kind": "commit", "tokens": k, "loss": 9.0 - k}) + "\n" for k in (1, 2, 3)]
    path.write_text("".join(lines) + '{"kind": "commit", "tokens": 4')
    seen.look()
    assert (seen.tokens, seen.loss) == (3, 6.0)
    path.write_text(lines[0])
    seen.look()
    assert seen.tokens == 1
    path.write_text(lines[0] + "not json\n[]\n" + lines[1])
    seen.look()
    assert seen.tokens == 2
