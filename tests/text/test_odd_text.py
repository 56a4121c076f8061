"""Text that is not as it seems: other encodings, links, pipes, tokenizers that lose letters; each is said."""

from __future__ import annotations

import gzip
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from hvdllm.errors import UserError
from hvdllm.text import corpus, shards
from hvdllm.text.corpus import encoding_note, sources
from hvdllm.text.parts import Files
from hvdllm.text.shards import find, prepare

PLAIN = "red green blue seven eight nine river stone\n" * 200


def files(folder: Path, **more: Any) -> Files:
    return Files(path=str(folder), **{"tokenizer": "bytes", "validation_share": 0.0, **more})


# ------------------------------------------------------------------ encodings
@pytest.mark.parametrize(("letters", "bad"), [("größe über\n", 3), ("abc\n", 0), ("é\n", 1)])
@pytest.mark.parametrize("times", [1, 200_000])  # more than a block
def test_latin_1_is_said_with_its_share(tmp_path: Path, letters: str, bad: int, times: int) -> None:
    (tmp_path / "a.txt").write_text("plain ü漢😀\n" * times)
    (tmp_path / "l.txt").write_bytes(letters.encode("latin-1") * times)
    note = encoding_note(files(tmp_path))
    if not bad:
        assert note is None
        return
    total = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert (
        note is not None and note.startswith(f"{bad * times:,} of {total:,} bytes") and str(tmp_path / "l.txt") in note
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_utf_16_is_refused(tmp_path: Path, encoding: str) -> None:
    mark = b"\xfe\xff" if encoding.endswith("be") else b""
    (tmp_path / "u.txt").write_bytes(mark + PLAIN.encode(encoding))
    with pytest.raises(UserError, match=r"u\.txt is UTF-16 or UTF-32: convert it"):
        prepare(files(tmp_path), tmp_path / "data", say=lambda text: None)
    assert not list((tmp_path / "data").glob("*/"))


def test_the_note_is_said_whenever_the_text_is_opened(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "l.txt").write_bytes("größe\n".encode("latin-1") * 100)
    for _ in range(2):
        found = prepare(files(tmp_path / "t"), tmp_path / "data", say=lambda text: None)
        assert sum("no UTF-8" in note for note in found.notes) == 1


@pytest.mark.parametrize("content", ["", "[", "{}", '["a", 1]', "[" * 10_000])
def test_notes_that_are_none_are_left_out(tmp_path: Path, content: str) -> None:
    (tmp_path / shards.NOTES).write_text(content)
    assert shards._notes(tmp_path / shards.NOTES) in ([], ["a"])


# ------------------------------------------------------------------ what lies in a folder
def test_linked_folders_are_followed_once_and_circles_end(tmp_path: Path) -> None:
    for name in ("d", "store"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(PLAIN)
    (tmp_path / "d" / "more").symlink_to("../store")
    (tmp_path / "d" / "again").symlink_to("../store")
    (tmp_path / "d" / "up").symlink_to(".")
    (tmp_path / "store" / "back").symlink_to("../d")
    assert [path.name for path in sources(files(tmp_path / "d"))[0]] == ["d.txt", "store.txt"]


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    for name in ("pipe", "loop", "gone", "deep", "gz"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(PLAIN)
    os.mkfifo(tmp_path / "pipe" / "x.txt")
    (tmp_path / "loop" / "x.txt").symlink_to("x.txt")
    (tmp_path / "gone" / "x.txt").symlink_to("nowhere")
    (tmp_path / "deep" / "x.jsonl").write_text('{"text": "x", "more": ' + "[" * 100_000 + "]" * 100_000 + "}")
    (tmp_path / "gz" / "x.txt.gz").touch()
    for name, says in {
        "pipe": "x.txt is no regular file", "loop": "x.txt", "gone": "x.txt cannot be read",
        "deep": r"x\.jsonl:1 is nested too deeply", "gz": r"x\.txt\.gz is a damaged \.gz file \(it has no content",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=says) as error:
            prepare(files(tmp_path / name), tmp_path / "data", say=lambda text: None)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is no regular file"):
        sources(files(tmp_path / "pipe" / "x.txt"))


def test_a_gz_that_holds_nothing_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PLAIN)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b""))
    assert [each.name for each in corpus.documents(files(tmp_path))] == [str(tmp_path / "a.txt")]


def test_validation_text_that_is_all_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PLAIN)
    (tmp_path / "link.txt").symlink_to("a.txt")
    for validation in ("a.txt", "link.txt"):
        with pytest.raises(UserError, match=r"text\.path names nothing but the text of text\.validation"):
            prepare(
                files(tmp_path / "a.txt", validation=str(tmp_path / validation)), tmp_path / "data",
                say=lambda text: None,
            )  # fmt: skip


# ------------------------------------------------------------------ tokenizers of others
def tokenizer(folder: Path, alphabet: bool = False, normalizer: str | None = None) -> Path:
    """A byte-level BPE, trained on PLAIN."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer:
        made.normalizer = getattr(normalizers, normalizer)()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False, initial_alphabet=letters
    )
    made.train_from_iterator([PLAIN], trainer)
    made.save(str(folder / "t.json"))
    return folder / "t.json"


@pytest.mark.parametrize(
    ("text", "how", "says"),
    [
        (PLAIN + "é ç 漢字\n" * 20, {}, r"its tokens stand for 9\d\.\d% of the bytes"),
        (
            PLAIN + "Red GREEN\n",
            {"alphabet": True, "normalizer": "Lowercase"},
            r"loses or changes text: \S+ does not come",
        ),
        (PLAIN + "e\u0301\n" * 3, {"alphabet": True, "normalizer": "NFC"}, "loses or changes text"),
        (PLAIN + "é ç 漢字\n" * 20, {"alphabet": True}, None),
        (PLAIN, {}, None),
    ],
)
def test_a_tokenizer_that_loses_text_is_said(tmp_path: Path, text: str, how: dict[str, Any], says: str | None) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_text(text)
    path = tokenizer(tmp_path, **how)
    found = prepare(files(tmp_path / "t", tokenizer=str(path)), tmp_path / "data", say=lambda text: None)
    notes = " ".join(note for note in found.notes if "tokenizer" in note)
    assert (notes == "") if says is None else re.search(says, notes), found.notes


def test_bits_per_byte_are_of_the_texts_own_bytes(tmp_path: Path) -> None:
    """Over the whole validation text the bytes of its tokens are those of the text, whatever the tokenizer lost."""
    from hvdllm.config.compose import compose
    from hvdllm.task.causal_lm import CausalLM, opened

    (tmp_path / "a.txt").write_text(PLAIN)
    (tmp_path / "v.txt").write_text("red é green 漢字 blue\n" * 50)
    for name in (str(tokenizer(tmp_path)), "bytes", "bpe"):
        text = files(tmp_path / "a.txt", tokenizer=name, vocab=300, validation=str(tmp_path / "v.txt"))
        found = prepare(text, tmp_path / "data", say=lambda text: None)
        task = opened(compose([]), text, found).task
        assert isinstance(task, CausalLM)
        spelled = task.words.token_bytes[found.validation].sum() * task.scale
        assert spelled == pytest.approx((tmp_path / "v.txt").stat().st_size, rel=1e-12)


# ------------------------------------------------------------------ shards that came along
def test_prepared_text_is_found_by_its_hash_alone(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_text(PLAIN)
    text = files(tmp_path / "t")
    found = prepare(text, tmp_path / "data", say=lambda text: None)
    (tmp_path / "t" / "a.txt").write_text(PLAIN + "more\n")
    other = prepare(text, tmp_path / "data", say=lambda text: None)
    shutil.rmtree(tmp_path / "t")
    (tmp_path / "data" / "stray").mkdir()
    (tmp_path / "data" / "stray" / "train.bin").write_bytes(b"x" * 2000)
    assert found.data_hash != other.data_hash
    for one in (found, other):
        assert find(tmp_path / "data", one.data_hash) == one.folder
    assert find(tmp_path / "data", "0" * 64) is None and find(tmp_path / "none", "0" * 64) is None
