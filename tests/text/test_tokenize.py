"""Tokenizers: text comes back, bytes are counted exactly, training is deterministic, files round-trip."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from hvdllm.errors import UserError
from hvdllm.text.tokenize import BYTES, END, Tokenizer, train_bpe

SAMPLE = [f"def function_{n}(x):\n    return x + {n}  # größer\n" for n in range(300)]
bytes_ = Tokenizer(BYTES)
bpe = train_bpe(iter(SAMPLE), 400)


@pytest.mark.parametrize("tokenizer", [bytes_, bpe], ids=["bytes", "bpe"])
@given(st.text())
@example(f"a{END}b")
@example(" leading, \u00a0trailing \r\n\t\x00 ")
@example("<|endoftext|></s>")
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.end not in ids
    assert ids.dtype == tokenizer.dtype
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert ids.max(initial=0) < tokenizer.vocab


def test_vocabularies() -> None:
    assert (bytes_.vocab, bytes_.end, bytes_.dtype) == (257, 256, np.uint16)
    assert (bpe.vocab, bpe.end, bpe.dtype) == (400, 0, np.uint16)
    assert bpe.encode(SAMPLE)[0].size < bytes_.encode(SAMPLE)[0].size / 2
    assert bpe.token_bytes.shape == (400,) and bpe.token_bytes[bpe.end] == 0
    assert train_bpe(iter(["aaa"]), 10_000).vocab < 300


def test_batches_equal_single_texts() -> None:
    for tokenizer in (bytes_, bpe):
        for text, ids in zip(SAMPLE, tokenizer.encode(SAMPLE), strict=True):
            assert np.array_equal(tokenizer.encode([text])[0], ids)


def test_ends_padding_and_broken_characters_decode() -> None:
    for tokenizer in (bytes_, bpe):
        ids = list(tokenizer.encode(["é!"])[0])
        assert tokenizer.decode([tokenizer.end, *ids, tokenizer.end, tokenizer.vocab + 5]) == "é!"
    assert bytes_.decode([0xC3]) == "\ufffd"


def test_training_is_deterministic_over_processes_and_threads() -> None:
    code = (
        "from hvdllm.text.tokenize import train_bpe\n"
        "sample = [f'def function_{n}(x):\\n    return x + {n}  # größer\\n' for n in range(300)]\n"
        "print(train_bpe(iter(sample), 400).hash)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for threads in ("1", "2", "3")
    }
    assert hashes == {bpe.hash}
    assert train_bpe(iter(SAMPLE[:30]), 400).hash != bpe.hash


@pytest.mark.parametrize("tokenizer", [bytes_, bpe], ids=["bytes", "bpe"])
def test_a_run_folder_holds_its_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (again.hash, again.vocab, again.end) == (tokenizer.hash, tokenizer.vocab, tokenizer.end)
    assert np.array_equal(again.encode(SAMPLE[:1])[0], tokenizer.encode(SAMPLE[:1])[0])
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


# ------------------------------------------------------------------ the user's own
def users(path: Path, model: object, *, end: str | None, byte_level: bool = False) -> Path:
    tokenizer = tokenizers.Tokenizer(model)  # type: ignore[arg-type]
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    if end:
        tokenizer.add_special_tokens([end])
        id = tokenizer.token_to_id(end)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, id)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=3)
    tokenizer.save(str(path))
    return path


def test_a_users_tokenizer_neither_cuts_nor_pads_nor_adds(tmp_path: Path) -> None:
    alphabet = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for end in ("<|endoftext|>", "<|end_of_text|>", "</s>"):
        path = users(tmp_path / "t.json", models.BPE(alphabet, []), end=end, byte_level=True)
        tokenizer = Tokenizer.load(path)
        (ids,) = tokenizer.encode([f"héllo {end}"])
        assert len(ids) == len(f"héllo {end}".encode())
        assert tokenizer.decode(ids) == f"héllo {end}"
        assert (tokenizer.vocab, tokenizer.end) == (257, 256)
        assert tokenizer.token_bytes.sum() == 256


def test_token_bytes_of_a_tokenizer_that_is_not_byte_level(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "▁the": 1, "<0x0A>": 2, "é": 3, "##ing": 4, "▁": 5}
    path = users(tmp_path / "t.json", models.WordLevel(vocab, unk_token="<unk>"), end="</s>")
    assert list(Tokenizer.load(path).token_bytes) == [5, 4, 1, 2, 3, 1, 0]


def test_more_than_65536_tokens_take_uint32_and_ids_may_have_gaps(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "▁a": 70_000}
    tokenizer = Tokenizer.load(users(tmp_path / "t.json", models.WordLevel(vocab, unk_token="<unk>"), end="</s>"))
    assert tokenizer.vocab == 70_001
    assert tokenizer.encode(["a"])[0].tolist() == [70_000]
    assert tokenizer.encode(["a"])[0].dtype == np.uint32


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    path = users(tmp_path / "t.json", models.WordLevel({"<unk>": 0}, unk_token="<unk>"), end=None)
    with pytest.raises(UserError, match=r"t\.json: the tokenizer has no token for the end of a document"):
        Tokenizer.load(path)
    for damage in ("{", "[]", json.dumps({"model": 3}), json.dumps({"hvdllm": "other"})):
        path.write_text(damage)
        with pytest.raises(UserError, match=r"t\.json describes no tokenizer"):
            Tokenizer.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"t\.json describes no tokenizer"):
        Tokenizer.load(path)
    with pytest.raises(UserError, match=r"nowhere cannot be read \(No such file"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize(("vocab", "dtype"), [(2**15 + 1, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_a_token_takes_two_bytes_where_they_are_enough(vocab: int, dtype: type) -> None:
    names = {END: 0, **{f"w{n}": n for n in range(1, vocab)}}
    assert Tokenizer(tokenizers.Tokenizer(models.WordLevel(names, unk_token=END)).to_str()).dtype is dtype
