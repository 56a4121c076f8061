"""Documents: pieces that concatenate, the sides they are on, and what is said of files that cannot be read."""

import gzip
import io
import json
import os
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdllm.errors import UserError
from hvdllm.text import corpus
from hvdllm.text.corpus import Document, documents, sources
from hvdllm.text.parts import Files, Stdlib


def texts(found: list[Document]) -> list[str]:
    return [each.text for each in found]


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


# ------------------------------------------------------------------ pieces
characters = st.sampled_from(
    [b"a", b"b\n", b"\r\n", "é".encode(), "→".encode(), "😀".encode(), b"\xf0\x9f", b"\x80", b"\xff"]
)


@given(st.lists(characters, max_size=60).map(b"".join), st.integers(4, 20))
def test_pieces_concatenate_to_the_file(data: bytes, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", size)
        pieces = [piece.decode(errors="replace") for piece in corpus._cut(io.BytesIO(data))]
    assert "".join(pieces) == data.decode(errors="replace")
    assert all(pieces)
    assert all(len(piece.encode().replace("\ufffd".encode(), b"?")) <= size for piece in pieces)


def test_pieces_are_cut_after_lines_and_joined(tmp_path: Path) -> None:
    lines = "".join(f"line {n} é\n" for n in range(20_000))
    write(tmp_path, a=lines, b="short")
    found = list(documents(Files(path=str(tmp_path), validation_share=0.0)))
    assert len(found) > 3
    assert "".join(texts(found[:-1])) == lines
    assert all(each.text.endswith("\n") and len(each.text.encode()) <= 64 * 1024 for each in found[:-1])
    assert [each.joins for each in found] == [False] + [True] * (len(found) - 2) + [False]


def test_line_ends_and_byte_order_marks_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert texts(list(documents(Files(path=str(tmp_path))))) == ["\ufeffa\r\nb\rc\n"]


# ------------------------------------------------------------------ files
def test_endings_gz_and_order(tmp_path: Path) -> None:
    for name in ("z", "b", "y", "c", "x", "d"):  # walked in sorted order, whatever the file system's
        (tmp_path / name).mkdir()
        (tmp_path / name / "z.py").write_text(f"py {name}")
    (tmp_path / "a.txt").write_text("txt")
    (tmp_path / "c.MD").write_text("md")
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two"}) + "\n")
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"gz"))
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three", "id": 3}'))
    for skipped in ("g.pdf", ".hidden.txt", "h.gz", "empty.txt"):
        (tmp_path / skipped).write_bytes(b"" if skipped == "empty.txt" else b"no")
    expected = [f"py {name}" for name in ("b", "c", "d", "x", "y", "z")]
    assert texts(list(documents(Files(path=str(tmp_path), validation_share=0.0)))) == [
        "txt",
        "md",
        "one",
        "two",
        "gz",
        "three",
        *expected,
    ]


def test_lists_and_globs_without_repeats(tmp_path: Path) -> None:
    write(tmp_path, a="A", b="B", c="C")
    paths = [str(tmp_path / "c.txt"), str(tmp_path / "*.txt"), str(tmp_path)]
    assert texts(list(documents(Files(path=paths)))) == ["C", "A", "B"]


def test_column_and_half_a_surrogate_pair(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "a\\ud800b", "text": 1}\n')
    assert texts(list(documents(Files(path=str(tmp_path), column="body")))) == ["a\ufffdb"]


def test_stdlib_is_large_and_has_no_tests() -> None:
    files, validation = sources(Stdlib())
    root = Path(sysconfig.get_paths()["stdlib"])
    assert 300 < len(files) < 1500
    assert 5e6 < sum(file.stat().st_size for file in files) < 3e7
    assert not validation
    parts = {part for file in files for part in file.relative_to(root).parts}
    assert {"argparse.py", "json"} <= parts
    assert not parts & {"site-packages", "test", "tests", "idle_test"}


# ------------------------------------------------------------------ sides
def sides(folder: Path, share: float) -> dict[str, bool]:
    return {each.text: each.held_out for each in documents(Files(path=str(folder), validation_share=share))}


def test_held_out_by_content_alone(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write(tmp_path / "one", **{f"a{n}": f"text {n}" for n in range(200)})
    write(tmp_path / "two", **{f"z{n}": f"text {n}" for n in reversed(range(100))})
    one, two = sides(tmp_path / "one", 0.3), sides(tmp_path / "two", 0.3)
    assert two.items() <= one.items()  # names, order and neighbours do not matter
    assert 40 <= sum(one.values()) <= 80  # 60 expected, standard deviation 6.5
    more = sides(tmp_path / "one", 0.6)
    assert all(more[text] for text, held_out in one.items() if held_out)


def test_the_smallest_hash_is_held_out_where_none_qualifies(tmp_path: Path) -> None:
    write(tmp_path, **{f"a{n}": f"text {n}" for n in range(5)})
    smallest = min((corpus.hash_of(f"text {n}"), f"text {n}") for n in range(5))[1]
    assert [text for text, held_out in sides(tmp_path, 1e-12).items() if held_out] == [smallest]


@pytest.mark.parametrize(("share", "count"), [(0.0, 5), (1e-12, 1)])
def test_nothing_is_held_out_of_one_document_or_at_share_0(tmp_path: Path, share: float, count: int) -> None:
    write(tmp_path, **{f"a{n}": f"text {n}" for n in range(count)})
    assert not any(sides(tmp_path, share).values())


def test_a_piece_after_one_of_the_other_side_does_not_join(tmp_path: Path) -> None:
    write(tmp_path, a="".join(f"line {n}\n" for n in range(100_000)))
    found = list(documents(Files(path=str(tmp_path), validation_share=0.4)))
    assert len({each.held_out for each in found}) == 2
    assert not found[0].joins
    for before, after in pairwise(found):
        assert after.joins == (before.held_out == after.held_out)


def test_text_validation_replaces_the_choice_by_hash(tmp_path: Path) -> None:
    write(tmp_path, **{f"a{n}": f"text {n}" for n in range(20)})
    settings = Files(path=str(tmp_path), validation=str(tmp_path / "a1*.txt"), validation_share=0.9)
    found = list(documents(settings))
    held_out = [each.text for each in found if each.held_out]
    assert held_out == [f"text {n}" for n in (1, *range(10, 20))]
    assert len(found) == 20  # a file of both is not trained on


def test_pieces_of_text_validation_join_too(tmp_path: Path) -> None:
    write(tmp_path, a="training", b="".join(f"line {n}\n" for n in range(30_000)))
    found = list(documents(Files(path=str(tmp_path / "a.txt"), validation=str(tmp_path / "b.txt"))))
    assert [each.held_out for each in found] == [False] + [True] * (len(found) - 1)
    assert [each.joins for each in found[1:]] == [False] + [True] * (len(found) - 2)
    assert len(found) > 3


# ------------------------------------------------------------------ what cannot be read
def refused(match: str, path: object, **settings: object) -> None:
    with pytest.raises(UserError, match=match) as caught:
        list(documents(Files(path=path, **settings)))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")


def test_missing_and_wrong_paths(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("no")
    (tmp_path / "b.txt").write_text("yes")
    refused(r"text\.path", None)
    refused(r"no file or folder .*nowhere: correct", str(tmp_path / "nowhere"))
    refused(r"a\.pdf is none of \.txt", str(tmp_path / "a.pdf"))
    refused(r"holds no file of", str(tmp_path / "*.md"))
    refused(r"empty list", [])
    refused(r"no path", 3)
    refused(r"text\.validation: there is no file", str(tmp_path / "b.txt"), validation=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    refused(r"empty holds no file", str(tmp_path / "empty"))


def test_damaged_gz(tmp_path: Path) -> None:
    good = gzip.compress(os.urandom(5000))
    for name, data in [
        ("cut", good[:-2000]),  # EOFError
        ("bent", good[:-8] + b"\x00" * 8),  # gzip's checksum
        ("broken", good[:10] + b"\xff" * 50),  # zlib's own error
        ("plain", b"no gzip"),
    ]:
        (tmp_path / f"{name}.txt.gz").write_bytes(data)
        refused(rf"{name}\.txt\.gz is a damaged \.gz", str(tmp_path / f"{name}.txt.gz"))


def test_bad_lines_of_jsonl_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    for line, match in [
        (b'{"text": "cut', r"a\.jsonl:2 is not JSON"),
        (b'{"text": "\xff"}', r"a\.jsonl:2 is not JSON"),
        (b'{"body": "x", "id": 1}', r"a\.jsonl:2 has no field 'text' \(it has body, id\).*text\.column"),
        (b'["text"]', r"a\.jsonl:2 has no field 'text' \(it is no object\)"),
        (b'{"text": null}', r"a\.jsonl:2: the field 'text' is no text"),
    ]:
        path.write_bytes(good + line + b"\n" + good)
        refused(match, str(path))


def test_a_folder_that_cannot_be_listed_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a="A")
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def denied(path: str) -> object:  # root may list everything, so permissions would not do
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    refused(r"secret cannot be read \(Permission denied\)", str(tmp_path))
