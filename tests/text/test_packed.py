"""Packed documents: each is learnt exactly once, apart from its neighbours, by any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import BATCH, losses, weights, words_of

from hvdllm.cli.main import main
from hvdllm.cli.train import run
from hvdllm.config.check import check
from hvdllm.config.compose import compose
from hvdllm.errors import UserError
from hvdllm.task import causal_lm
from hvdllm.text import packed as packing
from hvdllm.text.overlap import RUN
from hvdllm.text.packed import Packed, packed
from hvdllm.text.parts import Files, Stdlib
from hvdllm.text.parts import Packed as Settings
from hvdllm.text.shards import prepare
from hvdllm.text.tokenize import BYTES, Tokenizer
from hvdllm.world.detect import Place

END = 256


def text_of(documents: list[list[int]], last: bool = False) -> np.ndarray:
    """Documents with end tokens between them, and one at the end if `last`."""
    joined = np.array([token for document in documents for token in [*document, END]], np.uint16)
    return joined if last or not len(joined) else joined[:-1]


def learnt(items: Packed) -> list[list[int]]:
    """Each piece of each window: what is read, of which the first is the end token, and its targets, -1 for none."""
    inputs, targets, units = items.take(np.arange(len(items)), None)
    out = []
    for row, wanted, count in zip(inputs.tolist(), targets.tolist(), units.tolist(), strict=True):
        assert len(row) == items.context and count == sum(target >= 0 for target in wanted)
        assert row[0] == END
        begins = [k for k, token in enumerate(row) if token == END]
        for first, stop in zip(begins, [*begins[1:], items.context], strict=True):
            if stop - first > 1 or wanted[first] >= 0:
                out.append([row[first:stop], wanted[first:stop]])
    return out


documents_ = st.lists(st.lists(st.integers(0, 255), max_size=40), max_size=30)


@given(documents_, st.integers(2, 16), st.booleans(), st.integers(1, 50), st.integers(1, 5))
def test_each_token_of_each_document_is_a_target_exactly_once(
    documents: list[list[int]], context: int, last: bool, block: int, buffer: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SCAN", block)
        patch.setattr(packing, "BUFFER", buffer)
        items = Packed(text_of(documents, last), context, END)
    expected = []
    for document in documents:
        tokens, wanted = [END, *document], [*document, END]
        for at in [0, *range(context, len(wanted), context - 1)] if document else []:
            if at == 0:
                expected.append([tokens[:context], wanted[:context]])
            else:
                expected.append([[END, *tokens[at : at + context - 1]], [-1, *wanted[at : at + context - 1]]])
    assert sorted(learnt(items)) == sorted(expected)
    assert sum(items._counts) == sum(len(document) + 1 for document in documents if document)
    assert items.units == pytest.approx(np.mean(items._counts) if len(items) else 1.0)


def test_windows_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.RandomState(0)
    text = text_of([draw.randint(256, size=draw.randint(1, 60)).tolist() for _ in range(300)])
    whole = Packed(text, 32, END).take(np.arange(200), None)
    monkeypatch.setattr(packing, "SCAN", 77)
    again = Packed(text, 32, END).take(np.arange(200), None)
    assert all(torch.equal(a, b) for a, b in zip(whole[:2], again[:2], strict=True))


@given(st.lists(st.integers(1, 20), max_size=60))
def test_windows_are_never_too_full_and_nearly_as_few_as_possible(sizes: list[int]) -> None:
    places = np.array(sizes, np.int64)
    owner, windows = packed(places, 20)
    filled = np.bincount(owner, places, minlength=windows)
    assert len(filled) == windows and (filled <= 20).all() and (filled > 0).all()
    least = -(-sum(sizes) // 20)
    assert windows <= 11 / 9 * max(least, sum(size > 10 for size in sizes)) + 1 + len(sizes) * 0.1
    assert (filled <= 10).sum() <= 1, "two that are half empty would have shared a window"


# ------------------------------------------------------------------ the oracle
@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("longest", [20, 90])
def test_loss_and_gradients_are_those_of_the_documents_one_by_one(positions: str, longest: int) -> None:
    """In fp64; a document that does not fit is compared by its pieces."""
    draw = np.random.RandomState(3)
    documents = [draw.randint(256, size=draw.randint(1, longest)).tolist() for _ in range(25)]
    words = ["text=packed", "text.path=x", "text.tokenizer=bytes", "precision=fp64",
             "model.documents=true", "model.layers=2", "model.width=16", "model.heads=2", "model.context=24",
             f"model.positions={positions}"]  # fmt: skip
    config = compose(words)
    task = causal_lm.CausalLM(config, 257, Tokenizer(BYTES))
    items = Packed(text_of(documents), 24, END)
    inputs, targets, units = items.take(np.arange(len(items)), None)
    model = task.build()
    loss = task.loss(model, inputs, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    ours = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for document in documents:
        tokens, wanted = torch.tensor([[END, *document]]), torch.tensor([*document, END])
        for at in [0, *range(24, len(wanted), 23)]:
            if at == 0:
                read, known = tokens[:, :24], wanted[:24]
            else:
                read, known = torch.cat([torch.tensor([[END]]), tokens[:, at : at + 23]], 1), wanted[at : at + 23]
            logits = model(read)[0, -len(known) :]
            total = total + torch.nn.functional.cross_entropy(logits, known, reduction="sum")
            count += len(known)
    total.backward()  # type: ignore[no-untyped-call]
    theirs = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert units.sum() == count and loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert len(items) < len(documents) or longest > 24
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ runs
def packed_words(tmp: Path, name: str, steps: int, *more: str) -> list[str]:
    """Words of a tiny run on documents of very different length."""
    words = words_of(tmp, name, steps, "text=packed", "model.documents=true", "precision=fp64", *more)
    documents = tmp / "packed"
    if not documents.exists():
        documents.mkdir()
        read = (tmp / "text" / "train.txt").read_text()
        draw, at = np.random.RandomState(0), 0
        for k in range(400):
            size = int(draw.randint(3, 90))
            (documents / f"{k:03}.txt").write_text(read[at : at + size])
            at += size
    return [f"text.path={documents}" if word.startswith("text.path=") else word for word in words]


def test_one_rank_and_two_learn_the_same(tmp_path: Path) -> None:
    for name, more in (("one", ["world=single"]), ("two", ["world=virtual", "world.size=2"])):
        assert main(["train", *packed_words(tmp_path, name, 4, *more)]) == 0
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    assert losses(one) == pytest.approx(losses(two), rel=1e-10) and len(losses(one)) >= 3
    for name, weight in weights(one).items():
        torch.testing.assert_close(weight, weights(two)[name], rtol=1e-8, atol=1e-10)


def test_a_run_goes_on_and_is_evaluated(tmp_path: Path) -> None:
    words = packed_words(tmp_path, "run", 2)
    assert main(["train", *words]) == 0
    assert main(["train", *words, f"budget_tokens={4 * BATCH}"]) == 0
    assert main(["train", *packed_words(tmp_path, "whole", 4)]) == 0
    assert losses(tmp_path / "runs" / "run")[-1] == pytest.approx(losses(tmp_path / "runs" / "whole")[-1], rel=1e-10)
    assert main(["evaluate", str(tmp_path / "runs" / "run"), f"--data-dir={tmp_path}/data"]) == 0


def test_the_prepared_text_is_that_of_files_and_of_the_standard_library(tmp_path: Path) -> None:
    for n in range(30):
        (tmp_path / f"{n}.txt").write_text(f"document {n}\n" * (n + 1))
    silent = lambda line: None  # noqa: E731
    plain = prepare(Files(path=str(tmp_path), tokenizer="bytes"), tmp_path / "data", say=silent)
    said: list[str] = []
    found = prepare(Settings(path=str(tmp_path), tokenizer="bytes"), tmp_path / "data", say=said.append)
    assert found.folder == plain.folder and not said
    assert isinstance(Settings(tokenizer="bytes", vocab=300).plain, Stdlib)
    assert Settings(tokenizer="bytes", vocab=300).plain == Stdlib(tokenizer="bytes", vocab=300)


def test_how_much_is_padding_is_said(tmp_path: Path) -> None:
    documents = [[7] * 8] * 10 + [[9] * 15] * 5
    items = Packed(text_of(documents), 18, END)
    (note,) = items.notes()  # 9 + 9 places, and 16 of 18
    assert "10 windows of 18 tokens are packed with whole documents, 5.6% of them padding" in note
    assert "one document in a window would make it 37.0%" in note
    assert not Packed(text_of(documents), 18, END, validation=True).notes()


def test_repeated_windows_are_those_whose_documents_hold_a_run() -> None:
    documents = [[1] * (RUN + 30), [2] * 20, [3] * (RUN + 5), [4] * 25]
    text = text_of(documents)
    items = Packed(text, 110, END)
    inputs, _, _ = items.take(np.arange(len(items)), None)
    assert len(items) == 2
    for first, kind in ((0, 1), (RUN + 30 + 1 + 20 + 1, 3)):
        seen = np.zeros(len(text) - RUN + 1, bool)
        seen[first + 2] = True
        hit = [kind in row for row in inputs.tolist()]
        assert items.repeated(seen, 0) == sum(hit) / 2 == 0.5
        assert items.repeated(seen, 1) == float(hit[0])
    across = np.zeros(len(text) - RUN + 1, bool)
    across[RUN + 10] = True  # a run that begins in the first document and ends in the next
    assert items.repeated(across, 0) == 0 and items.repeated(None, 0) is None


@pytest.mark.parametrize(("words", "match"), [
    (["text=packed"], "needs model.documents=true"),
    (["text=packed", "model.documents=true", "model.context=1"], "windows of two tokens at least"),
    (["text=packed", "model.documents=true", "exchange=fedavg"], "documents of several clients"),
    (["text=packed", "task=masked_lm"], "task=masked_lm with text=packed"),
])  # fmt: skip
def test_what_cannot_be_packed_is_one_sentence(words: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        check(compose(words), Place())
    assert "\n" not in str(error.value)


def test_a_text_that_is_too_short_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_text("brief")
    words = ["text=packed", f"text.path={tmp_path}", "text.tokenizer=bytes", "model.documents=true"]
    with pytest.raises(UserError, match=r"fills 1 windows of model\.context=128 tokens, fewer than"):
        run([*words, f"data_dir={tmp_path}/data", f"runs_dir={tmp_path}/runs", "eval_every=0"])
