"""text=mix: several texts in shares, none of which trains on what another holds out, each with a loss of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvdllm import runs
from hvdllm.cli.main import main
from hvdllm.config.check import check
from hvdllm.config.compose import compose
from hvdllm.errors import UserError
from hvdllm.settings import Config
from hvdllm.task import causal_lm, masked_lm
from hvdllm.task.base import Prepared
from hvdllm.task.joined import Joined
from hvdllm.task.stream import Stream
from hvdllm.world.detect import Place

ARITHMETIC = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(12) for b in range(12)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """code/ and prose/ share 20 of their 40 documents; talk.jsonl has conversations."""
    for name in ("code", "prose"):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(40):
            shared = number < 20
            (folder / f"{number}.txt").write_text(f"{'both' if shared else name} write document {number} " * 4)
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, ARITHMETIC)))
    return tmp_path


def words(texts: Path, sources: str, *more: str) -> list[str]:
    named = [f"text.sources={{{sources.format(at=texts)}}}"] * ("text.sources" not in " ".join(more))
    usual = ["model.context=48", "model.layers=1", "model.width=16", "model.heads=2", f"data_dir={texts / 'data'}"]
    least = ["text=mix", "text.tokenizer=bytes", "text.validation_share=0.3", "device=cpu", "batch_tokens=384"]
    return [*least, *named, *usual, *more]


def opened(texts: Path, sources: str, *more: str) -> tuple[Config, Prepared]:
    config = compose(words(texts, sources, *more))
    check(config, Place())
    kind = masked_lm if "task=masked_lm" in more else causal_lm
    return config, kind.prepare(config, say=lambda said: None, whole=True, wanted=None)


def trained(texts: Path, sources: str, *more: str, name: str = "a") -> list[dict[str, Any]]:
    usual = [f"name={name}", f"runs_dir={texts / 'runs'}", "budget_tokens=3072", "log_every=1", "eval_every=1536"]
    given = words(texts, sources, *usual, "save_every=1536", "sample_every=0", "device.threads=1", *more)
    assert main(["train", *given]) == 0
    return list(runs.records(texts / "runs" / name))


TWO = "code: {at}/code, prose: {at}/prose"
TALK = "code: {at}/code, talk: {{text: chat, path: {at}/talk.jsonl}}"


@pytest.mark.parametrize("more", [(), ("text.tokenizer=bpe", "text.vocab=300")])
def test_nothing_that_one_source_holds_out_is_trained_on_in_another(texts: Path, more: tuple[str, ...]) -> None:
    """Seen to catch: sources that are prepared without the hashes of what the others hold out."""
    held = "prose: {{path: {at}/prose, validation: {at}/prose/1*.txt}}"
    _, data = opened(texts, "code: {at}/code, " + held, *more)
    assert isinstance(data.train, Joined)
    task = data.task
    assert isinstance(task, causal_lm.CausalLM)

    def documents(items: Joined, of: int) -> set[str]:
        tokens = items.parts[of].tokens  # type: ignore[attr-defined]
        return {task.words.decode(some).strip() for some in np.split(tokens, np.flatnonzero(tokens == task.words.end))}

    assert isinstance(data.validation, Joined)
    held_out = documents(data.validation, 0) | documents(data.validation, 1)
    for number in (0, 1):
        assert documents(data.train, number) and not documents(data.train, number) & held_out
    assert any(name.startswith("both write document 1") for name in held_out)


def test_shares_are_of_the_tokens_that_count(texts: Path) -> None:
    """An item of `talk` counts some four tokens, and one of `code` 48. Seen to catch: shares of items."""
    _, data = opened(texts, TALK, "text.mix={code: 3, talk: 1}")
    stream = Stream(data.train, batch=40, micro_batch=8, seed=0, rank=0, size=1, device=torch.device("cpu"))
    counted = {"code": 0, "talk": 0}
    for round in range(100):
        for batch in stream.share(round):
            lengths = (batch.targets >= 0).sum(1)
            counted["code"] += int(lengths[lengths == 48].sum())
            counted["talk"] += int(lengths[lengths < 48].sum())
    stream.close()
    assert counted["code"] / sum(counted.values()) == pytest.approx(0.75, abs=0.01)
    assert data.train.units == pytest.approx(sum(counted.values()) / 4000, rel=0.02)


def test_without_shares_each_item_is_visited_once_an_epoch(texts: Path) -> None:
    _, data = opened(texts, TWO)
    assert isinstance(data.train, Joined) and data.train.order(0) is None
    assert len(data.train) == sum(len(part) for part in data.train.parts)


def test_each_source_has_a_loss_and_the_whole_is_their_weighted_mean(texts: Path) -> None:
    records = trained(texts, TALK, "text.mix={code: 0.25, talk: 0.75}")
    (end,), evals = ([r for r in records if r["kind"] == kind] for kind in ("end", "eval"))
    assert len(evals) == 2
    for record in (*evals, {**end, "loss": end["eval_loss"]}):
        for metric in ("loss", "bits_per_byte"):
            apart = [record[f"{metric}/{name}"] for name in ("code", "talk")]
            assert record[metric] == pytest.approx(0.25 * apart[0] + 0.75 * apart[1], rel=1e-12)
    assert evals[0]["loss/code"] != evals[1]["loss/code"]


def test_the_loss_of_a_source_is_that_of_its_held_out_text_alone(texts: Path) -> None:
    """Seen to catch: losses under each other's names, and a prefix of the whole that is called a source."""
    found = trained(texts, TWO, "save_every=0", "eval_tokens=0")[-1]
    for name in ("code", "prose"):
        other = {"code": "prose", "prose": "code"}[name]
        alone = trained(
            texts, f"{name}: {{at}}/{name}, {other}: {{{{path: {{at}}/{other}, validation_share: 0}}}}",
            "save_every=0", "eval_tokens=0", "budget_tokens=384", "optim.lr=1e-12", name=f"{name}-alone",
        )[-1]  # fmt: skip
        assert alone["eval_loss"] == alone[f"loss/{name}"] and f"loss/{other}" not in alone
    assert found["loss/code"] != found["loss/prose"]


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_any_number_of_ranks_learns_the_same_and_a_resumed_run_goes_on(texts: Path, task: str) -> None:
    batch = {"causal_lm": 384, "masked_lm": 56}[task]
    more = [f"task={task}", "text.mix={code: 0.6, prose: 0.4}", "precision=fp64", f"batch_tokens={batch}"]
    more += [f"{every}={4 * batch}" for every in ("eval_every", "save_every")]

    def losses(name: str, batches: int, *words: str) -> list[float]:
        given = [*more, f"budget_tokens={batches * batch}", f"schedule.horizon={8 * batch}", *words]
        found = trained(texts, TWO, *given, name=name)
        return [record["loss"] for record in found if record["kind"] in ("commit", "eval")]

    one = losses("one", 8)
    assert len(one) == 10 and losses("three", 8, "world=virtual", "world.size=3") == pytest.approx(one, rel=1e-9)
    assert losses("two", 4) == one[:5] and losses("two", 8) == one


def test_a_folder_goes_on_with_the_sources_that_were_prepared_here(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(texts, TALK, "text.mix={code: 0.5, talk: 0.5}")
    data_dir, folder = f"data_dir={texts / 'data'}", texts / "runs" / "a"
    assert main(["train", f"resume={folder}", data_dir, "budget_tokens=3840"]) == 0
    assert main(["evaluate", str(folder), "--data-dir", str(texts / "data")]) == 0
    assert "code" in capsys.readouterr().out
    assert main(["train", f"resume={folder}", f"data_dir={texts / 'none'}", "budget_tokens=4608"]) == 2
    assert "give text.sources=" in capsys.readouterr().err
    (texts / "code" / "30.txt").write_text("another text")
    given = words(texts, TALK, "name=a", f"runs_dir={texts / 'runs'}", "text.mix={code: 0.5, talk: 0.5}")
    assert main(["train", *given, "budget_tokens=4608", "sample_every=0"]) == 2


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["text.sources=null"], "text=mix needs text.sources"),
        (["text.sources=[a]"], "is no dict"),
        (["text.sources={a b: x}"], "the name 'a b' is none"),
        (["text.sources={a: nowhere}"], "text.sources.a: text.path: there is no file or folder nowhere"),
        (["text.sources={a: {text: mix}}"], "text.sources.a.text=mix: choose one of stdlib, files, packed"),
        (["text.sources={a: {path: x, vocab: 300}}"], "text.sources.a.vocab: all sources share it, give text.vocab"),
        (["text.sources={a: {path: x, colum: y}}"], "there is no setting text.sources.a.colum, did you mean column"),
        (["text.sources={a: {path: x, validation_share: 2}}"], "text.sources.a.validation_share=2.0 must lie between"),
        (["text.sources={a: {text: chat, path: [1]}}"], r"text.sources.a.path=\[1\] is neither a path nor"),
        (["text.mix={code: 1}"], r"name different sources \(prose\)"),
        (["text.mix={code: 1, prose: 0}"], "text.mix.prose=0: give a number above 0"),
        (["text.mix={code: 1, prose: 1e-5}"], "text.mix.prose is less than 0.001 of all"),
        (["text.mix=3"], "text.mix=3 is no dict"),
        (["text.validation=x"], "give it to a source"),
        (["text.mix={code: 1, prose: 1}", "exchange=fedavg", "exchange.clients=2"], "leave text.mix at null"),
    ],
)
def test_what_is_no_mixture_is_one_sentence(texts: Path, given: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        opened(texts, TWO, *given)


def test_an_empty_source_is_named(texts: Path) -> None:
    (texts / "tiny").mkdir()
    (texts / "tiny" / "a.txt").write_text("ab")
    with pytest.raises(UserError, match=r"text.sources.tiny: .*windows of model.context=48"):
        opened(texts, TWO + ", tiny: {{path: {at}/tiny, validation_share: 0}}")


def test_tokens_of_others_are_a_source_too(texts: Path) -> None:
    np.save(texts / "ids.npy", np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint16))
    records = trained(texts, "code: {at}/code, ids: {{text: tokens, path: {at}/ids.npy}}", "text.mix={code: 1, ids: 1}")
    assert records[-1]["loss/ids"] > 0 and records[-1]["loss/code"] > 0


def test_a_later_word_replaces_the_sources() -> None:
    config = compose(["text=mix", "text.sources={a: x}", "text.sources={b: {path: y}}", "text.mix={a: 1, b: 2}"])
    assert config.text.sources == {"b": {"path": "y"}}
    assert compose(["text=mix", "text.mix={a: 1}", "text.mix={b: 2}"]).text.mix == {"b": 2}


def test_packed_documents_are_a_source_too(texts: Path) -> None:
    both = "code: {at}/code, prose: {{text: packed, path: {at}/prose}}"
    records = trained(texts, both, "text.mix={code: 1, prose: 1}", "model.documents=true", "precision=fp64")
    three = trained(
        texts, both, "text.mix={code: 1, prose: 1}", "model.documents=true", "precision=fp64", "world=virtual",
        "world.size=3", name="b",
    )  # fmt: skip
    assert [r["loss"] for r in three if r["kind"] == "eval"] == pytest.approx(
        [r["loss"] for r in records if r["kind"] == "eval"], rel=1e-9
    )
    assert records[-1]["loss/prose"] != records[-1]["loss/code"]
