"""`hvdllm evaluate RUN --lm-eval TASK`: the harness's answers for a run are those for the folder that it exports."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from launch import words_of

from hvdllm.cli.main import main
from hvdllm.trainer.harness import continued, log_likelihoods, rolled
from hvdllm.trainer.restore import Language, language, restore

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
HAVE = importlib.util.find_spec("lm_eval") is not None
CHOICE = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""
ROLLING = """task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{q}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
UNTIL = """task: tiny_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["zz"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and tasks beside it."""
    tmp = tmp_path_factory.mktemp("harness")
    words = words_of(tmp, "run", 3, "model.norm=rmsnorm", "model.positions=rope", "model.bias=false")
    assert main(["train", *words]) == 0
    items = [
        {"q": "abc " * k, "choices": ["ad", "e f", "g" * k], "label": k % 3} for k in range(1, 13)
    ]  # some longer than the context of 32
    (tmp / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, text in (("choice", CHOICE), ("text", ROLLING), ("until", UNTIL)):
        (tmp / f"tiny_{name}.yaml").write_text(text.format(folder=tmp))
    return tmp


@pytest.fixture(scope="module")
def found(tmp: Path) -> Language:
    return language(restore(tmp / "runs" / "run", None, print))


def test_log_likelihoods_are_sums_over_the_ending_alone_in_batches_of_any_length(found: Language) -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = []
    for k in range(40):
        ids = torch.randint(256, (2 + k,), generator=draw).tolist()
        pairs.append((ids[: 1 + k // 2], ids[1 + k // 2 :]))
    for (context, ending), (total, likeliest) in zip(pairs, log_likelihoods(found, pairs), strict=True):
        ids = (context + ending)[-(found.config.model.context + 1) :]
        log_p = found.model(torch.tensor([ids[:-1]]))[0].log_softmax(-1).detach()
        count = min(len(ending), len(ids) - 1)
        expected = sum(float(log_p[-count:][k, id]) for k, id in enumerate(ids[-count:]))
        assert total == pytest.approx(expected, rel=1e-5)
        assert likeliest == (log_p[-count:].argmax(-1).tolist() == ids[-count:])


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31])
def test_each_token_of_a_text_is_predicted_once(length: int) -> None:
    windows = list(rolled(list(range(length)), 99, 8))
    assert [id for _, ending in windows for id in ending] == list(range(length))
    whole = [99, *range(length)]
    for context, ending in windows:
        assert context and len(context) + len(ending) <= 8 + 1
        at = whole.index(ending[0])
        assert whole[at - len(context) : at] == context
    assert all(len(context) + len(ending) == 9 for context, ending in windows[1:]), "as long a context as fits"


def test_a_continuation_ends_where_the_task_says(found: Language) -> None:
    whole = continued(found, "abc", {"max_gen_toks": 12})
    assert len(whole) > 2 and continued(found, "abc", {"max_gen_toks": 12}) == whole
    assert continued(found, "abc", {"until": whole[1], "max_gen_toks": 12}) == whole[: whole.index(whole[1])]
    assert continued(found, "", {"until": ["\x00"], "max_gen_toks": 2})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lm-eval", "{tmp}/nowhere.yaml"], "there is no such file" if HAVE else "pip install lm-eval"),
        (["--lm-eval", "no_such_task_of_any"], "the harness has no such task" if HAVE else "pip install lm-eval"),
    ],
)
def test_refused(words: list[str], said: str, tmp: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", f"{tmp}/runs/run", *(word.format(tmp=tmp) for word in words)]) == 2
    err = capfd.readouterr().err.rstrip("\n").split("\n")[-1]
    assert err.startswith("hvdllm: --lm-eval") and said in err


@pytest.mark.skipif(not HAVE, reason="lm-eval is not installed (pip install lm-eval): it is an extra")
@pytest.mark.filterwarnings("ignore")
def test_the_harness_says_the_same_of_the_run_and_of_what_it_exports(
    tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="the harness's own wrapper of transformers needs it")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = [f"{tmp}/tiny_{name}.yaml" for name in ("choice", "text", "until")]
    assert main(["export", f"{tmp}/runs/run", f"{tmp}/out"]) == 0
    capfd.readouterr()
    assert main(["evaluate", f"{tmp}/runs/run", "--json", "--lm-eval", *tasks]) == 0
    ours = json.loads(capfd.readouterr().out.rstrip("\n").split("\n")[-1])["tasks"]
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=f"{tmp}/out", device="cpu", batch_size=4, max_length=32),
        tasks=[*ours], task_manager=TaskManager(include_path=str(tmp)), bootstrap_iters=0,
    )["results"]  # fmt: skip
    assert ours.keys() == {"tiny_choice", "tiny_text", "tiny_until"}
    for task, metrics in ours.items():
        compared = [name for name in metrics if not name.endswith("_stderr") and name != "sample_len"]
        assert compared
        for name in compared:
            assert metrics[name] == pytest.approx(theirs[task][f"{name},none"], rel=1e-4), (task, name)
    assert main(["evaluate", f"{tmp}/runs/run", "--lm-eval", tasks[0], "--limit", "3"]) == 0
