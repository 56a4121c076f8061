"""Folders of transformers with a BERT: in, out, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_kit import randomize, transformers
from launch import BATCH, records, words_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Any_
from tokenizers import models, pre_tokenizers
from torch import Tensor, nn

from hvdllm.cli.main import main
from hvdllm.config.compose import compose
from hvdllm.errors import UserError
from hvdllm.models.bert import Bert
from hvdllm.runs import read_config
from hvdllm.text.tokenize import BYTES, Tokenizer
from hvdllm.trainer.restore import restore

ROWS, POSITIONS = 331, 40  # neither padded nor the tokenizer's
SHAPE = dict(
    vocab_size=ROWS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=POSITIONS, layer_norm_eps=1e-6,
)  # fmt: skip
OURS = ("model.layers", "model.width", "model.heads", "model.kv_heads", "text.tokenizer", "batch_tokens")
Change = Callable[[Path], object]


def word_pieces() -> str:
    """A tokenizer of WordPiece as BERT has them: characters, the special tokens, no end of a document."""
    letters = [chr(k) for k in range(33, 127)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {token: k for k, token in enumerate([*special, *letters, *(f"##{letter}" for letter in letters)])}
    made = Any_(models.WordPiece(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(special)
    return str(made.to_str())


def write(folder: Path, kind: str = "BertForMaskedLM", dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**SHAPE | more))
    randomize(model)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(word_pieces())
    return folder


def load(folder: Path) -> nn.Module:
    model: nn.Module = transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def of(tmp: Path, name: str, folder: Path, *more: str) -> list[str]:
    """Words of a run of one step at rate 0 that begins with a folder."""
    words = [word for word in words_of(tmp, name, 1, "optim.lr=0") if word.partition("=")[0] not in OURS]
    words += ["task=masked_lm", f"init_from={folder}", "batch_tokens=110", "budget_tokens=110"]
    return list({word.partition("=")[0]: word for word in (*words, *more)}.values())


def same(mine: Tensor, theirs: Tensor) -> None:
    error = float(((mine - theirs).abs().max() / theirs.abs().max()).detach())
    assert mine.shape == theirs.shape and error < 1e-5


# ------------------------------------------------------------------ in
@pytest.mark.parametrize(
    ("kind", "dtype", "more", "note"),
    [
        ("BertForMaskedLM", torch.float32, {}, "positions"),
        ("BertForMaskedLM", torch.bfloat16, {"type_vocab_size": 1}, "positions"),
        (
            "BertForPreTraining",
            torch.float32,
            {},
            "positions, its pooler is left out, its seq_relationship is left out",
        ),
    ],
)
def test_a_folder_gives_the_logits_that_transformers_has(
    kind: str, dtype: torch.dtype, more: dict[str, Any], note: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "theirs", kind, dtype, **more)
    assert main(["train", *of(tmp_path, "run", folder)]) == 0
    found = restore(tmp_path / "runs" / "run", None, print)
    assert isinstance(found.model, Bert)
    ids_BT = torch.arange(3 * 32).view(3, 32)
    same(found.model.eval()(ids_BT), load(folder)(ids_BT).logits)
    settings = read_config(tmp_path / "runs" / "run").model
    assert (settings.vocab, settings.mlp_width, settings.norm_eps, settings.context) == (ROWS, 48, 1e-6, 32)
    (first,) = records(tmp_path / "runs" / "run", "run")
    assert first["trunk"]["note"] == f"its first segment is added to its {note}"
    assert found.task.mask == 4 and found.task.words.end == 3, "[MASK] and [SEP] of the tokenizer"


def test_gradients_of_a_folder_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert main(["train", *of(tmp_path, "run", folder)]) == 0
    mine, theirs = restore(tmp_path / "runs" / "run", None, print).model, load(folder)
    ids_BT = torch.arange(64).view(2, 32)
    mine(ids_BT).square().sum().backward()
    theirs(ids_BT).logits.square().sum().backward()
    table = theirs.bert.embeddings
    same(mine.positions.weight.grad, table.position_embeddings.weight.grad[:32])
    same(mine.embed.weight.grad[1:], table.word_embeddings.weight.grad[1:])  # the first is that of padding there
    same(mine.head_bias.grad, theirs.cls.predictions.bias.grad)


def test_names_of_older_files_are_taken(tmp_path: Path) -> None:
    """gamma and beta of norms, the output layer under its own name, and the numbers of positions."""
    folder = write(tmp_path / "theirs")
    theirs, file = load(folder), folder / "model.safetensors"
    found = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for key, x in load_file(file).items()
    }
    found["cls.predictions.decoder.weight"] = found["bert.embeddings.word_embeddings.weight"].clone()
    found["cls.predictions.decoder.bias"] = found["cls.predictions.bias"].clone()
    found["bert.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    save_file(found, file)
    assert main(["train", *of(tmp_path, "run", folder)]) == 0
    ids_BT = torch.arange(32)[None]
    same(restore(tmp_path / "runs" / "run", None, print).model(ids_BT), theirs(ids_BT).logits)


def config(**more: Any) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | more))

    return change


def tensors(edit: Callable[[dict[str, Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        edit(found)
        save_file(found, folder / "model.safetensors")

    return change


def tokenizer(text: str) -> Change:
    return lambda folder: (folder / "tokenizer.json").write_text(text)


SEGMENT, BIAS = "bert.embeddings.token_type_embeddings.weight", "cls.predictions.bias"
HEAD = {"cls.predictions.decoder.weight": torch.zeros(ROWS, 32)}
BAD: list[tuple[str, Change | None, list[str], str]] = [
    ("missing", tensors(lambda x: x.pop(SEGMENT)), [], f"no tensor `{SEGMENT}`"),
    ("more", tensors(lambda x: x.update(more=torch.zeros(1))), [], "it has a tensor `bert.more`"),
    ("shape", tensors(lambda x: x.update({SEGMENT: torch.zeros(3, 32)})), [], f"`{SEGMENT}` is 3 x 32, and"),
    ("infinite", tensors(lambda x: x[SEGMENT].fill_(torch.inf)), [], "numbers that are not finite"),
    ("head", tensors(lambda x: x.update(HEAD)), [], "differs from its embedding"),
    ("two", tensors(lambda x: x.update({"cls.predictions.decoder.bias": x[BIAS] + 1})), [], "differ and should be one"),
    ("no head", lambda f: (shutil.rmtree(f), write(f, "BertModel")), [], "the head that guesses tokens"),
    ("relative", config(position_embedding_type="relative_key"), [], "position_embedding_type=relative_key"),
    ("relu", config(hidden_act="relu"), [], "hidden_act=relu"),
    ("gelu_new", config(hidden_act="gelu_new"), [], "hidden_act=gelu_new: hvdllm has gelu"),
    ("decoder", config(is_decoder=True), [], "is_decoder=true"),
    ("cross", config(add_cross_attention=True), [], "add_cross_attention=true"),
    ("untied", config(tie_word_embeddings=False), [], "tie_word_embeddings=false"),
    ("heads", config(num_attention_heads=5), [], "no multiple of model.heads=5"),
    ("vocab", None, ["model.vocab=193"], "model.vocab=193 is not what"),
    ("no end", tokenizer(word_pieces().replace("[SEP]", "[STOP]")), [], "no token for the end of a document"),
    ("task", None, ["task=causal_lm", f"batch_tokens={BATCH}"], "which task=masked_lm trains"),
    ("context", None, ["model.context=64"], "more than the 40 tokens"),
    ("width", None, ["model.width=64"], "model.width=64 is not what the config.json"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "more", "said"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_ends_in_one_sentence(
    change: Change | None, more: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "theirs")
    if change is not None:
        change(folder)
    capfd.readouterr()
    assert main(["train", *of(tmp_path, "run", folder, *more)]) == 2
    err = capfd.readouterr().err
    assert said in err and err.count("hvdllm: ") == 1, err
    assert not (tmp_path / "runs" / "run").exists()


def test_a_tokenizer_without_a_mask_needs_a_row_for_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokens = len(json.loads(word_pieces())["model"]["vocab"])
    for rows, code in ((tokens, 2), (tokens + 1, 0)):
        folder = write(tmp_path / f"theirs{rows}", vocab_size=rows)
        tokenizer(word_pieces().replace("[MASK]", "[HIDE]"))(folder)
        assert main(["train", *of(tmp_path, f"run{rows}", folder)]) == code
    assert "the tokenizer has no mask token" in capfd.readouterr().err


def test_a_folder_of_another_task_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import hugging_kit

    folder = hugging_kit.write(tmp_path / "gpt")
    assert main(["train", *of(tmp_path, "run", folder)]) == 2
    assert "a llama, which task=causal_lm trains" in capfd.readouterr().err


# ------------------------------------------------------------------ out
@pytest.mark.parametrize("spelled", ["bytes", "own mask"])
def test_an_exported_run_has_its_logits_and_comes_back(
    spelled: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Our mask token has the same number there, whoever made it."""
    (tmp_path / "tokenizer.json").write_text(word_pieces())
    own = f"text.tokenizer={tmp_path}/tokenizer.json" if spelled == "own mask" else "text.tokenizer=bytes"
    words = [word for word in of(tmp_path, "run", tmp_path, own, "optim.lr=0.1", "model.layers=2", "model.heads=2")]
    assert main(["train", *(word for word in words if not word.startswith("init_from="))]) == 0
    run, out = tmp_path / "runs" / "run", tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    assert "BertForMaskedLM" in capfd.readouterr().out
    found, theirs = restore(run, None, print), load(out)
    ids_BT = torch.arange(64).view(2, 32)
    same(found.model.eval()(ids_BT), theirs(ids_BT).logits)
    spells = transformers.AutoTokenizer.from_pretrained(out)
    assert spells.mask_token_id == found.task.mask == (4 if spelled == "own mask" else 257)
    assert main(["train", *of(tmp_path, "again", out)]) == 0
    again = restore(tmp_path / "runs" / "again", None, print)
    assert again.task.mask == found.task.mask
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), found.model.parameters(), strict=True))


def test_norms_first_have_no_class_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [word for word in of(tmp_path, "run", tmp_path, "text.tokenizer=bytes", "model.norm_first=true")]
    words += ["model.width=32", "model.layers=1"]
    assert main(["train", *(word for word in words if not word.startswith("init_from="))]) == 0
    assert main(["export", f"{tmp_path}/runs/run", f"{tmp_path}/out"]) == 2
    assert "model.norm_first=true" in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_a_mask_gets_the_next_id() -> None:
    text, spelled = Tokenizer(BYTES).with_mask()
    assert spelled == "[MASK]" and Tokenizer(text).mask == 257 and Tokenizer(text).end == 256
    assert Tokenizer(word_pieces()).with_mask() == (Tokenizer(word_pieces()).json, "[MASK]")


def test_ids_with_gaps_have_no_place_for_a_mask() -> None:
    gap = json.loads(word_pieces().replace("[MASK]", "[HIDE]"))
    gap["model"]["vocab"]["~~"] = 500
    with pytest.raises(UserError, match="have gaps"):
        Tokenizer(json.dumps(gap)).with_mask()


def test_rows_of_our_own_models_are_padded_still() -> None:
    assert compose(["task=masked_lm"]).model.vocab is None
