"""text=chat: what counts, how conversations are written, prepared and dealt, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers, trainers

from hvdllm.config.check import check
from hvdllm.config.compose import compose
from hvdllm.errors import UserError
from hvdllm.models.gpt import GPT
from hvdllm.settings import Config
from hvdllm.task import causal_lm
from hvdllm.task.base import Prepared
from hvdllm.task.stream import Stream
from hvdllm.text.chat import BEGINS, COUNTS, Around, Ours, Theirs
from hvdllm.text.conversations import Conversations
from hvdllm.text.tokenize import BYTES, Tokenizer
from hvdllm.trainer.agree import check_data
from hvdllm.world.detect import Place

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "How much is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3?"},
    {"role": "assistant", "content": "5"},
]
TINY = ["text=chat", "model.layers=1", "model.width=16", "model.heads=2", "model.context=64", "micro_batch=2"]


def lines(count: int = 40) -> list[dict[str, Any]]:
    """Conversations of very different length, of both kinds."""
    out: list[dict[str, Any]] = []
    for i in range(count):
        question, answer = f"Say {i}", " ".join(str(i) for _ in range(1 + i % 7))
        pair = {"prompt": question, "completion": answer}
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        out.append(pair if i % 2 else {"messages": [*messages, *(TALK if i % 3 == 0 else [])]})
    return out


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def settings(tmp: Path, *more: str, rows: list[Any] | None = None) -> Config:
    path = write(tmp / "talk.jsonl", lines() if rows is None else rows)
    words = [*TINY, f"text.path={path}", f"data_dir={tmp / 'data'}", "text.tokenizer=bytes", "batch_tokens=64"]
    return compose([*words, "text.validation_share=0.2", *more])


def prepared(config: Config) -> Prepared:
    return causal_lm.prepare(config, say=lambda text: None, whole=True, wanted=None)


def bpe() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([row["content"] for row in TALK] * 3, trainer)
    return made


def folder(tmp: Path, template: str = CHATML) -> Path:
    """A tokenizer's folder of `transformers`."""
    tmp.mkdir(exist_ok=True)
    bpe().save(str(tmp / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp / "tokenizer.json"


def test_our_template_counts_answers_and_the_end_of_each() -> None:
    tokenizer = Tokenizer(BYTES)
    ((ids, counts),) = Ours().encode(tokenizer, [("x", TALK)])
    assert bytes(ids[ids < 256].tolist()).decode() == (
        "<|user|>\nHow much is 2 + 2?\n<|assistant|>\nIt is 4.<|user|>\nAnd 3?\n<|assistant|>\n5"
    )
    assert bytes(ids[counts & (ids < 256)].tolist()) == b"It is 4.5" and (ids[counts] == 256).sum() == 2
    asked = Ours().around().ids(tokenizer, "How much is 2 + 2?")
    assert asked == ids[: len(asked)].tolist() and counts[len(asked)] and not counts[: len(asked)].any()


def test_a_template_of_others_writes_as_transformers_does(tmp_path: Path) -> None:
    """The same ids as apply_chat_template; what counts is what each answer adds, with the token that ends it."""
    from transformers import AutoTokenizer

    path = folder(tmp_path / "t")
    tokenizer, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path.parent)
    template = Theirs(CHATML, {"eos_token": "<|im_end|>"}, path)
    ((ids, counts),) = template.encode(tokenizer, [("x", TALK)])
    assert ids.tolist() == theirs.apply_chat_template(TALK, return_dict=False)
    assert theirs.decode(ids[counts]) == "It is 4.<|im_end|>\n5<|im_end|>\n"
    around = template.around()
    asked = theirs.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=False)
    assert around.ids(tokenizer, TALK[0]["content"]) == asked
    assert around.ends(tokenizer) == theirs.convert_tokens_to_ids("<|im_end|>")
    sly = around.ids(tokenizer, "<|im_end|>")
    assert sly.count(around.ends(tokenizer)) == 2, "those of the template: a question cannot spell one"


def test_generation_tags_and_loop_controls_are_known(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% if m.role == 'assistant' %}{% generation %}A: {{ m.content }}\n{% endgeneration %}"
        "{% else %}U: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    text, spans = Theirs(source, {}, tmp_path).spans("x", [{"role": "system", "content": "no"}, *TALK])
    assert [text[a:b] for a, b in spans] == ["It is 4.\n", "5\n"] and text.startswith("U: How")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{{ cycler.__init__.__globals__.os.getcwd() }}", "cannot write x"),
        ("{{ messages.append(1) }}", "cannot write x"),
        ("{% include '/etc/passwd' %}", "cannot write x"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{% for m in messages %}{{ 'a' * 70000000 }}{% endfor %}", "more than 16,777,216 characters"),
        ("{% for m in messages[-1:] %}{{ m.content }}{% endfor %}", "in another way once it goes on"),
    ],
)
def test_a_template_that_reaches_out_or_cannot_write_is_refused(source: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        Theirs(source, {}, tmp_path).spans("x", TALK)


def test_the_template_beside_a_tokenizer_is_taken_unless_ours_is_asked_for(tmp_path: Path) -> None:
    path = folder(tmp_path / "t")
    found = {}
    for choice in ("auto", "tokenizer", "ours"):
        config = settings(tmp_path, f"text.tokenizer={path}", f"text.template={choice}")
        data = prepared(config)
        found[choice] = data.data_hash
        assert isinstance(data.task, causal_lm.CausalLM) and data.task.around is not None
        assert ("im_start" in data.task.around.before) == (choice != "ours")
    assert found["auto"] == found["tokenizer"] != found["ours"]
    with pytest.raises(UserError, match=r"text\.template=tokenizer: there is no chat_template"):
        prepared(settings(tmp_path, "text.template=tokenizer"))
    with pytest.raises(UserError, match="is not Jinja"):
        prepared(settings(tmp_path, f"text.tokenizer={folder(tmp_path / 'u', '{% if %}')}"))


def flagged(*talks: list[tuple[int, bool]]) -> np.ndarray:
    out = []
    for talk in talks:
        out += [
            id | (int(COUNTS) if counts else 0) | (0 if at else int(BEGINS)) for at, (id, counts) in enumerate(talk)
        ]
    return np.array(out, np.uint32)


def test_items_are_padded_cut_and_counted() -> None:
    a = [(1, True), (2, False), (3, True), (4, True)]  # its first token is no target
    b = [(5, False), (6, True)]
    c = [(7, False)] * 6 + [(8, True)]  # nothing that counts is left of it
    items = Conversations(flagged(a, c, b), 4, end=9)
    inputs, targets, units = items.take(np.array([1, 0]), None)
    assert inputs.tolist() == [[5, 9, 9], [1, 2, 3]]
    assert targets.tolist() == [[6, -1, -1], [-1, 3, 4]]
    assert units.tolist() == [1, 2] and items.units == 1.5 and len(items) == 2
    assert items.notes() == [
        "1 training conversations are longer than model.context=4 and are cut, 1 of them left out since nothing that "
        "counts remains"
    ]
    short = Conversations(flagged(a), 2, end=9)
    assert short.take(np.array([0]), None)[1].tolist() == [[-1, 3]] and short.cut == 1


def test_counts_do_not_depend_on_how_tokens_are_scanned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokens = np.array(prepared(settings(tmp_path)).train.tokens)  # type: ignore[attr-defined]
    whole = Conversations(tokens, 40, 256)
    for step in (1, 7, 64):
        monkeypatch.setattr("hvdllm.text.conversations.SCAN", step)
        parts = Conversations(tokens, 40, 256)
        rows = np.arange(len(whole))
        assert len(parts) == len(whole) and parts.cut == whole.cut > 0
        assert np.array_equal(parts.take(rows, None)[2], whole.take(rows, None)[2])
    assert np.array_equal((whole.take(rows, None)[1] >= 0).sum(1).numpy(), whole.take(rows, None)[2])


def test_prepared_conversations_are_those_of_the_file(tmp_path: Path) -> None:
    """Each on one side, once; packed files are read too; the hash is of the content; units are the measured mean."""
    rows = [*lines(), lines()[3]]
    data = prepared(settings(tmp_path, rows=rows))
    found = []
    for side in (data.train, data.validation):
        for k in range(len(side)):
            inputs, targets, units = side.take(np.array([k]), None)
            assert int((targets >= 0).sum()) == units[0] > 0
            found.append(bytes(inputs[0][inputs[0] < 256].tolist()).decode())
    whole = [
        Ours().encode(Tokenizer(BYTES), [("x", row["messages"])])[0] if "messages" in row else None for row in rows
    ]
    assert len(found) == len(rows) and len(data.validation) > 1
    assert {text[:40] for text in found} >= {bytes(x[0][x[0] < 256].tolist())[:40].decode() for x in whole if x}
    assert data.train.units == pytest.approx(data.train.take(np.arange(len(data.train)), None)[2].mean())
    assert settings(tmp_path).task.units(settings(tmp_path)) is None
    packed = settings(tmp_path)
    packed.text.path = str(write(tmp_path / "same.jsonl.gz", rows))
    assert prepared(packed).data_hash == data.data_hash
    changed = [dict(row) for row in rows]
    changed[1] = {"messages": [{"role": "assistant", "content": "Say 1"}, {"role": "user", "content": "1 1"}]}
    assert prepared(settings(tmp_path, rows=changed)).data_hash != data.data_hash


def test_the_loss_counts_answers_alone(tmp_path: Path) -> None:
    data = prepared(settings(tmp_path))
    model = data.task.build()
    assert isinstance(model, GPT)
    inputs, targets, units = data.train.take(np.arange(6), None)
    plain = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    torch.testing.assert_close(data.task.loss(model, inputs, targets), plain)
    alone = [data.task.loss(model, *data.train.take(np.array([k]), None)[:2]) for k in range(6)]
    torch.testing.assert_close(torch.stack(alone).sum(), plain)  # padding changes nothing
    sums = data.task.measure(model, inputs, targets).tolist()
    said = int((targets[targets >= 0] < 256).sum())  # bytes of the answers, which end tokens do not stand for
    assert sums == pytest.approx([plain.item(), units.sum(), said])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_ranks_sees_the_same_conversations(size: int, tmp_path: Path) -> None:
    """Micro-batches are padded by themselves, and their counts are those of their targets."""
    items = prepared(settings(tmp_path)).train
    streams = [
        Stream(items, batch=7, micro_batch=2, seed=3, rank=rank, size=size, device=torch.device("cpu"))
        for rank in range(size)
    ]
    seen = []
    for round in range(8):  # into the second epoch
        for stream in streams:
            for batch in stream.share(round):
                assert batch.tokens == int((batch.targets >= 0).sum())
                real = (batch.inputs[:, -1] != 256) | (batch.targets[:, -1] >= 0)
                assert bool(real.any()), "no micro-batch is wider than its longest conversation"
                seen += [x[y >= 0].tolist() for x, y in zip(batch.targets, batch.targets, strict=True)]
    alone = Stream(items, batch=7, micro_batch=64, seed=3, rank=0, size=1, device=torch.device("cpu"))
    whole = [t[t >= 0].tolist() for round in range(8) for b in alone.share(round) for t in b.targets]
    assert seen == whole


def line_refused(tmp: Path, row: object) -> str:
    config = settings(tmp, rows=[*lines(), row])
    with pytest.raises(UserError) as caught:
        prepared(config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": "x"}, "is no conversation: text=chat needs `messages`, or `prompt` and `completion`"),
        ([1], "is no conversation"),
        ({"messages": []}, "must be a list of at least one message"),
        ({"messages": [{"role": "user"}]}, "message 1 needs a `role` and a `content`"),
        (
            {"messages": [{"role": "owl", "content": "x"}]},
            "message 1 has the role 'owl', which is none of system, user",
        ),
        ({"messages": TALK[:1]}, "has no message of the assistant"),
        ({"prompt": "x", "completion": ""}, "has no message of the assistant"),
        ({"prompt": "x", "completion": 3}, "message 2 needs a `role` and a `content`"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(row: object, what: str, tmp_path: Path) -> None:
    said = line_refused(tmp_path, row)
    assert f"talk.jsonl:{len(lines()) + 1}" in said and what in said


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for words, match in (
        (["task=masked_lm"], "masked_lm with text=chat"),
        (["model.documents=true"], r"model\.documents=true with text=chat"),
    ):
        with pytest.raises(UserError, match=match):
            base = [word for word in TINY if words[0] != "task=masked_lm" or not word.startswith("model")]
            check(compose([*base, "text.path=x", *words]), Place())
    check(compose([*TINY, "text.path=x", "batch_tokens=63"]), Place())  # no multiple of the context
    with pytest.raises(UserError, match=r"text=chat needs text\.path"):
        check(compose(TINY), Place())
    config = settings(tmp_path, "batch_tokens=20")
    with pytest.raises(UserError, match=r"batch_tokens=20 is \d+ sequences of [\d.]+ tokens, fewer than the 9 ranks"):
        check_data(config, prepared(config), 9)
    kind = settings(tmp_path)
    hash = prepared(kind).data_hash
    with pytest.raises(UserError, match="is not of this kind: give text=chat"):
        prepared(compose(["text=files", f"text.prepared={hash}", f"data_dir={tmp_path / 'data'}"]))
    with pytest.raises(UserError, match=r"holds no file of \.jsonl"):
        (tmp_path / "empty").mkdir()
        prepared(settings(tmp_path, f"text.path={tmp_path / 'empty'}"))


def test_a_run_keeps_how_it_is_asked_and_never_the_template(tmp_path: Path) -> None:
    from hvdllm.cli.main import main

    config = settings(tmp_path, f"text.tokenizer={folder(tmp_path / 't')}")
    words = [*TINY, f"text.path={config.text.path}", f"data_dir={tmp_path / 'data'}", f"runs_dir={tmp_path / 'runs'}"]
    words += [f"text.tokenizer={config.text.tokenizer}", "name=a", "budget_tokens=300", "batch_tokens=100"]
    words += ["text.validation_share=0.2", "device=cpu", "world=single", "eval_every=100", "save_every=100"]
    assert main(["train", *words]) == 0
    run = tmp_path / "runs" / "a"
    assert not any("{%" in path.read_text(errors="replace") for path in run.glob("*.*"))
    assert Around.load(run / "chat.json").before.startswith("<|im_start|>system\nHelp.")
    assert main(["sample", str(run), "How?", "--tokens", "3"]) == 0
    assert main(["evaluate", str(run), "--data-dir", str(tmp_path / "data")]) == 0
    assert main(["train", f"resume={run}", f"data_dir={tmp_path / 'data'}", "budget_tokens=500"]) == 0
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["reason"] for record in kept if record["kind"] == "end"] == ["budget"]
    assert kept[-1]["tokens"] >= 500
    (run / "chat.json").write_text('["a", "b", "", false]')
    assert main(["sample", str(run), "How?"]) == 2
