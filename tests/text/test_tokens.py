"""Files of tokens that others have made are read where they are, exactly, and with care."""

from __future__ import annotations

import os
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
from hvdllm.text.windows import Windows
from hvdllm.world.detect import Place

IDS = np.random.RandomState(0).randint(257, size=1000)


def llm_c(path: Path, ids: np.ndarray, magic: int = 20240520) -> Path:
    head = np.zeros(256, "<i4")
    head[:3] = magic, 1, len(ids)
    path.write_bytes(head.tobytes() + ids.astype(tokens.LLM_C[magic]).tobytes())
    return path


def megatron(path: Path, ids: np.ndarray, kind: int = 4) -> Path:
    path.write_bytes(ids.astype(tokens.MEGATRON_TYPES[kind]).tobytes())
    path.with_suffix(".idx").write_bytes(tokens.MEGATRON + (1).to_bytes(8, "little") + bytes([kind]) + bytes(16))
    return path


def numpy(path: Path, ids: np.ndarray, kind: str = "uint16") -> Path:
    np.save(path, ids.astype(kind))
    return path


def words(tmp_path: Path, *paths: Path, **more: str) -> list[str]:
    given = {"text": "tokens", "text.tokenizer": "bytes", "data_dir": f"{tmp_path}/data", "model.context": "16"}
    given |= {"text.path": f"[{','.join(map(str, paths))}]"} | {k.replace("__", "."): v for k, v in more.items()}
    return [f"{key}={value}" for key, value in given.items()]


def prepared(tmp_path: Path, *paths: Path, **more: str) -> Prepared:
    config = compose([*words(tmp_path, *paths, **more), "batch_tokens=32"])
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
    a, v = numpy(tmp_path / "a.npy", IDS), numpy(tmp_path / "v.npy", IDS[:200])
    data = prepared(tmp_path, a, v, text__validation=str(v))
    assert len(data.train) == 999 // 16 and len(data.validation) == 199 // 16


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
