"""Files of tokens that others have made are read where they are, exactly, and with care."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from hvdllm.cli.main import main
from hvdllm.config.check import check
from hvdllm.config.compose import compose
from hvdllm.errors import UserError
from hvdllm.task import causal_lm
from hvdllm.task.base import Prepared
from hvdllm.task.joined import Joined
from hvdllm.text import tokens
from hvdllm.text.tokenize import BYTES, Tokenizer
from hvdllm.text.windows import Windows
from hvdllm.world.detect import Place

IDS = np.random.RandomState(0).randint(257, size=1000)


def llm_c(path: Path, ids: np.ndarray, magic: int = 20240520) -> Path:
    head = np.zeros(256, "<i4")
    head[:3] = magic, 1, len(ids)
    path.write_bytes(head.tobytes() + ids.astype(tokens.LLM_C[magic]).tobytes())
    return path


def megatron(path: Path, ids: np.ndarray, kind: int = 4, entries: Sequence[int] = ()) -> Path:
    path.write_bytes(ids.astype(tokens.MEGATRON_TYPES[kind]).tobytes())
    size = path.stat().st_size // max(len(ids), 1)
    head = tokens.MEGATRON + (1).to_bytes(8, "little") + bytes([kind]) + np.array([len(entries), 1], "<i8").tobytes()
    pointers = np.cumsum([0, *entries])[: len(entries)] * size
    index = head + np.array(entries, "<i4").tobytes() + pointers.astype("<i8").tobytes() + bytes(8)
    path.with_suffix(".idx").write_bytes(index)
    return path


def numpy(path: Path, ids: np.ndarray, kind: str = "uint16") -> Path:
    np.save(path, ids.astype(kind))
    return path


def words(tmp_path: Path, *paths: Path, **more: str) -> list[str]:
    given = {"text": "tokens", "text.tokenizer": "bytes", "data_dir": f"{tmp_path}/data", "model.context": "16"}
    given |= {"text.path": f"[{','.join(map(str, paths))}]"} | {k.replace("__", "."): v for k, v in more.items()}
    return [f"{key}={value}" for key, value in given.items()]


def prepared(tmp_path: Path, *paths: Path, **more: str) -> Prepared:
    config = compose(words(tmp_path, *paths, **{"batch_tokens": "32", **more}))
    check(config, Place())
    return causal_lm.prepare(config, say=lambda text: None, whole=True, wanted=None)


@pytest.mark.parametrize("make", [
    lambda path: numpy(path / "a.npy", IDS), lambda path: numpy(path / "a.npy", IDS, "int64"),
    lambda path: llm_c(path / "a.bin", IDS), lambda path: llm_c(path / "a.bin", IDS, 20240801),
    lambda path: megatron(path / "a.bin", IDS), lambda path: megatron(path / "a.bin", IDS, 8),
], ids=["npy", "npy int64", "llm.c gpt2", "llm.c llama3", "megatron int32", "megatron uint16"])  # fmt: skip
def test_each_format_gives_its_tokens(tmp_path: Path, make: object) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    assert np.array_equal(tokens.opened(path), IDS) and isinstance(tokens.opened(path), np.memmap)
    data = prepared(tmp_path, path, text__validation_share="0.1")
    inputs, targets, units = data.train.take(np.arange(len(data.train)), None)
    assert torch.equal(inputs.flatten(), torch.from_numpy(IDS[: 16 * len(data.train)]))
    assert torch.equal(targets.flatten(), torch.from_numpy(IDS[1 : 16 * len(data.train) + 1])) and (units == 16).all()
    held, _, _ = data.validation.take(np.arange(1), None)
    assert held[0].tolist() == IDS[900:916].tolist() and len(data.train) == 899 // 16


def test_windows_of_several_files_do_not_reach_over_their_ends(tmp_path: Path) -> None:
    parts = [IDS[:100], IDS[100:110], IDS[110:300]]
    both = Joined([Windows(part, 16, 256) for part in parts], 256)
    alone = [Windows(part, 16, 256) for part in parts]
    assert len(both) == sum(map(len, alone)) == 6 + 0 + 11
    rows = np.array([16, 0, 5, 6, 3])
    found = both.take(rows, None)
    for k, row in enumerate(rows):
        owner, own = (0, row) if row < 6 else (2, row - 6)
        assert torch.equal(found[0][k], alone[owner].take(np.array([own]), None)[0][0])
    documents = both.documents()
    assert documents[5] < documents[6] and len(documents) == len(both)


def test_the_hash_is_of_the_content_and_kept_where_the_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = numpy(tmp_path / "a.npy", IDS), numpy(tmp_path / "b.npy", IDS)
    one = prepared(tmp_path, a)
    assert prepared(tmp_path, b).data_hash == one.data_hash != prepared(tmp_path, a, b).data_hash
    monkeypatch.setattr(tokens.np, "ascontiguousarray", lambda x: pytest.fail("read again"))
    assert prepared(tmp_path, a).data_hash == one.data_hash
    monkeypatch.undo()
    numpy(a, IDS[::-1])
    os.utime(a, (1, 1))
    assert prepared(tmp_path, a).data_hash != one.data_hash, "a file that has changed is read again"


def test_a_validation_file_is_held_out_whole(tmp_path: Path) -> None:
    a, v = numpy(tmp_path / "a.npy", IDS), numpy(tmp_path / "v.npy", IDS[::-1][:200])
    data = prepared(tmp_path, a, v, text__validation=str(v))
    assert len(data.train) == 999 // 16 and len(data.validation) == 199 // 16


# ------------------------------------------------------------------ documents of both sides
def written(*documents: Sequence[int]) -> np.ndarray:
    """Documents, with an end token after each."""
    return np.concatenate([[*document, 256] for document in documents])


def own(count: int, length: int = 40, seed: int = 1) -> list[list[int]]:
    return np.random.RandomState(seed).randint(256, size=(count, length)).tolist()  # type: ignore[no-any-return]


def windows(data: Prepared) -> list[list[int]]:
    """Each training window, with its last target."""
    inputs, targets, units = data.train.take(np.arange(len(data.train)), None)
    assert (units == 16).all() and len(units) == len(data.train)
    return [[*row.tolist(), int(last)] for row, last in zip(inputs, targets[:, -1], strict=True)]


def threes(ids: list[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[k : k + 3]) for k in range(len(ids) - 2)}


def holds(first: int, document: list[int], at: int) -> bool:
    """Whether the window that begins at `first` holds a token of a document that begins at `at`."""
    return first < at + len(document) and first + 17 > at


@pytest.mark.parametrize(("kind", "block"), [("numpy", 2**24), ("llm_c", 100), ("megatron", 2**24)])
def test_a_document_of_both_sides_is_in_no_training_window(
    tmp_path: Path, kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BLOCK", block)
    documents = own(20)
    ids, held = written(*documents[:6], documents[18], *documents[6:16]), written(*documents[16:])
    v = numpy(tmp_path / "v.npy", held, "int64")
    if kind == "numpy":
        a = numpy(tmp_path / "a.npy", ids)
    else:
        a = (llm_c if kind == "llm_c" else megatron)(tmp_path / "a.bin", ids)
    data = prepared(tmp_path, a, text__validation=str(v))
    alone = [ids[k : k + 17].tolist() for k in range(0, len(ids) - 16, 16)]
    places = [16 * k for k in range(len(alone)) if not holds(16 * k, documents[18], 6 * 41)]
    assert windows(data) == [alone[place // 16] for place in places] and len(alone) - len(places) == 3
    assert all(not threes(each) & threes(documents[18]) for each in windows(data))
    assert "1 documents of the training text are held out too, so the 3 of its 43 windows" in data.notes[0]
    assert data.train.documents().tolist() == np.searchsorted(np.flatnonzero(ids == 256), places).tolist()


def test_entries_of_an_index_are_documents(tmp_path: Path) -> None:
    documents = own(8)
    ids = np.concatenate(documents[:6])
    a = megatron(tmp_path / "a.bin", ids, entries=[40] * 6)
    v = megatron(tmp_path / "v.bin", np.concatenate([documents[2], documents[7]]), 8, entries=[40, 40])
    data = prepared(tmp_path, a, text__validation=str(v))
    alone = [ids[k : k + 17].tolist() for k in range(0, len(ids) - 16, 16)]
    assert windows(data) == [each for k, each in enumerate(alone) if not holds(16 * k, documents[2], 80)]
    index = a.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:60])
    with pytest.raises(UserError, match=r"a\.idx promises 6 entries and ends before"):
        prepared(tmp_path, a, text__validation=str(v))


@pytest.mark.parametrize("block", [7, 64, 2**24])
def test_documents_are_found_wherever_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    draw = np.random.RandomState(0)
    ids = np.where(draw.rand(300) < 0.2, 256, draw.randint(256, size=300))
    path = numpy(tmp_path / "a.npy", ids)
    monkeypatch.setattr(tokens, "BLOCK", block)
    found = [tuple(span) for spans in tokens._Part(path, ids, 270).documents(False, 256) for span in spans.tolist()]
    text = "".join("|" if each == 256 else "x" for each in ids[:270])
    expected, at = [], 0
    for document in text.split("|"):
        expected += [(at, at + len(document))] * bool(document)
        at += len(document) + 1
    assert found == expected
    held = [tuple(span) for spans in tokens._Part(path, ids, 270).documents(True, 256) for span in spans.tolist()]
    assert held[0][0] in (0, 1) and sum(b - a for a, b in held) == (ids[270:] != 256).sum()


def test_held_out_begins_at_the_border_of_a_document(tmp_path: Path) -> None:
    ids = written(*own(50))  # documents of 41 tokens, of which the last 184 would be held out
    data = prepared(tmp_path, numpy(tmp_path / "a.npy", ids), text__validation_share="0.09")
    held, _, _ = data.validation.take(np.arange(1), None)
    assert held[0].tolist() == ids[46 * 41 : 46 * 41 + 16].tolist(), "1,866 is in the middle of a document"
    far = numpy(tmp_path / "b.npy", IDS % 256)
    assert len(prepared(tmp_path, far, text__validation_share="0.1").train) == 899 // 16, "there is none"


def old_hash(path: Path, ids: np.ndarray, share: float) -> str:
    """As it was before documents were compared."""
    sha = hashlib.sha256(b"uint16" + ids.astype(np.uint16).tobytes()).hexdigest()
    digest = hashlib.sha256(f"tokens {share} 0 {sha}".encode()).hexdigest()
    return hashlib.sha256(f"{digest} {Tokenizer(BYTES).hash}".encode()).hexdigest()


def test_runs_that_were_begun_before_go_on_with_what_they_had(tmp_path: Path) -> None:
    documents = own(20)
    ids = written(*documents, documents[3])
    a = numpy(tmp_path / "a.npy", ids)
    new = prepared(tmp_path, a)
    old = old_hash(a, ids, 0.05)
    config = compose([*words(tmp_path, a), "batch_tokens=32"])
    before = causal_lm.prepare(config, say=lambda text: None, whole=True, wanted=old)
    assert before.data_hash == old != new.data_hash and not before.notes
    assert len(before.train) == (round(0.95 * len(ids)) - 1) // 16 > len(new.train)
    again = causal_lm.prepare(config, say=lambda text: None, whole=True, wanted=new.data_hash)
    assert again.data_hash == new.data_hash and windows(again) == windows(new)
    plain = numpy(tmp_path / "b.npy", IDS % 256)
    assert prepared(tmp_path, plain).data_hash == old_hash(plain, IDS % 256, 0.05), "nothing is left out, or moved"


def test_what_was_compared_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = own(30, 70)
    ids = written(*documents, documents[3])
    a = numpy(tmp_path / "a.npy", ids)
    first = prepared(tmp_path, a, eval_every="1000")
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_hashed", lambda *_: pytest.fail("compared again"))
        again = prepared(tmp_path, a, eval_every="1000")
    assert (again.data_hash, again.notes, again.record) == (first.data_hash, first.notes, first.record)
    for kept in (tmp_path / "data" / "tokens").iterdir():
        kept.write_bytes(b"\xff" * 48)
    assert prepared(tmp_path, a, eval_every="1000").notes == first.notes, "what is damaged is found out again"


def test_repeated_windows_are_told_without_the_documents_that_were_left_out(tmp_path: Path) -> None:
    documents = own(30, 120)
    shared = [*documents[0][:100], *documents[29]]  # another document with a long passage of the first
    ids = written(*documents, documents[5])
    a, v = (
        numpy(tmp_path / "a.npy", ids),
        numpy(tmp_path / "v.npy", written(documents[5], shared, *own(3, 120, seed=2))),
    )
    data = prepared(tmp_path, a, text__validation=str(v), model__context="64", eval_tokens="0", batch_tokens="64")
    held = np.load(v)
    share = data.record["validation_repeated"]
    lots = {tuple(ids[k : k + 50]) for k in range(len(ids) - 49) if k + 50 <= 5 * 121 or 6 * 121 <= k <= 30 * 121 - 50}
    hits = [any(tuple(held[k + j : k + j + 50]) in lots for j in range(16)) for k in range(0, len(held) - 64, 64)]
    assert share == sum(hits) / len(hits) > 0
    assert len(hits) == len(data.validation)


def test_what_is_no_file_of_tokens_is_one_sentence(tmp_path: Path) -> None:
    def refused(match: str, path: Path, **more: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            prepared(tmp_path, path, **more)
        assert "\n" not in str(error.value)

    bad = tmp_path / "x.bin"
    bad.write_bytes(b"no tokens at all" * 100)
    refused("x.bin holds no tokens", bad)
    bad.with_suffix(".idx").write_bytes(b"MMIDIDX\x00\x00" + (2).to_bytes(8, "little") + bytes([4]))
    refused("x.idx is no index of Megatron-LM, version 1", bad)
    bad.with_suffix(".idx").unlink()
    llm_c(bad, IDS)
    bad.write_bytes(bad.read_bytes()[:-2])
    refused("x.bin has 999 tokens and its head says 1,000", bad)
    refused("has the token 300, and the tokenizer has 257", numpy(tmp_path / "big.npy", np.array([300] * 90)))
    refused("holds the number -1", numpy(tmp_path / "neg.npy", np.array([-1] * 90), "int32"))
    refused("holds float64 of shape", numpy(tmp_path / "f.npy", np.ones(9), "float64"))
    refused("holds uint16 of shape", numpy(tmp_path / "m.npy", np.ones((3, 3))))
    (tmp_path / "o.npy").write_bytes(b"\x93NUMPY garbage")
    refused("o.npy cannot be read", tmp_path / "o.npy")
    np.save(tmp_path / "p.npy", np.array([{}], dtype=object), allow_pickle=True)
    refused("p.npy cannot be read", tmp_path / "p.npy")
    (tmp_path / "pipe.npy").symlink_to("/dev/zero")
    refused("pipe.npy is no regular file", tmp_path / "pipe.npy")
    good = numpy(tmp_path / "g.npy", IDS)
    refused("text=tokens needs text.tokenizer", good, text__tokenizer="bpe")
    with pytest.raises(UserError, match=r"text=tokens needs text\.path"):
        check(compose(["text=tokens", "text.tokenizer=bytes"]), Place())


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_a_run_trains_on_tokens_and_goes_on(tmp_path: Path, task: str) -> None:
    a, b = numpy(tmp_path / "a.npy", IDS), llm_c(tmp_path / "b.bin", IDS)
    model = ["model.layers=1", "model.width=16", "model.heads=2"] + ["model.kv_heads=2"] * (task == "causal_lm")
    more = [f"task={task}", *words(tmp_path, a, b), *model, "device.threads=1", "save_every=32", "eval_tokens=64",
            "batch_tokens=32", f"runs_dir={tmp_path}", "name=a", "audit_every=0", "sample_every=0"]  # fmt: skip
    assert main(["train", *more, "budget_tokens=96"]) == 0
    assert main(["train", *more, "budget_tokens=160"]) == 0
    assert main(["evaluate", str(tmp_path / "a"), f"text.path=[{a},{b}]", f"--data-dir={tmp_path}/data"]) == 0
