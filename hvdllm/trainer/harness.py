"""Runs lm-evaluation-harness on the model of a run. The package `lm-eval` is an optional extra.

The harness asks for log-likelihoods of continuations, and for continuations. Its answers for a run are those that its
own wrapper of transformers gives for the folder that `hvdllm export` writes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hvdllm.errors import UserError
from hvdllm.models.generate import generate
from hvdllm.plain import Json
from hvdllm.trainer.restore import Language

TOGETHER = 16  # sequences of a forward pass
MOST_NEW = 256  # tokens of a continuation where the task does not say


def evaluate_tasks(found: Language, tasks: Sequence[str], limit: int | None) -> Json:
    """What the harness measures on each task, by its name: its metrics and their standard errors.

    Args:
        found: the model, with its tokenizer.
        tasks: names of tasks of the harness, or paths of .yaml files that describe one.
        limit: how many examples of each task are taken, or None for all.

    Raises UserError if the package is not installed, or if there is no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval: the package is not installed: pip install lm-eval")
    import lm_eval
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    if missing := next((file for file in files if not file.is_file()), None):
        raise UserError(f"--lm-eval {missing}: there is no such file; give the name of a task, or its .yaml")
    manager = TaskManager(include_path=[str(path) for path in {file.absolute().parent for file in files}] or None)
    names = [_name(Path(task)) if Path(task) in files else task for task in tasks]
    if unknown := next((name for name in names if name not in manager.all_tasks), None):
        raise UserError(f"--lm-eval {unknown}: the harness has no such task; `lm_eval ls tasks` lists them")
    done = lm_eval.simple_evaluate(harnessed(found), tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)
    return {name: _metrics(values) for name, values in done["results"].items()}


def _name(file: Path) -> str:
    """The name that the description of a task gives it."""
    import re

    named = re.search(r"^task:\s*[\"']?([\w.-]+)", file.read_text(encoding="utf-8", errors="replace"), re.M)
    return named[1] if named else file.stem


def _metrics(values: Json) -> Json:
    """The numbers among the results of a task, by the name of the metric without the harness's filter."""
    return {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def harnessed(found: Language) -> Any:
    """The model as the harness asks it."""
    from lm_eval.api.model import TemplateLM

    class Harnessed(TemplateLM):  # type: ignore[misc]  # it has no types
        @property
        def eot_token_id(self) -> int:
            return int(found.tokenizer.end)

        @property
        def max_length(self) -> int:
            return int(found.config.model.context)

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return [int(id) for id in found.tokenizer.encode([string])[0]]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return log_likelihoods(found, [(context, ending) for _, context, ending in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            out = []
            for request in requests:
                windows = rolled(self.tok_encode(request.args[0]), self.eot_token_id, self.max_length)
                out.append(sum(log_p for log_p, _ in log_likelihoods(found, list(windows))))
            return out

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [continued(found, *request.args) for request in requests]

    return Harnessed()


def rolled(ids: list[int], end: int, most: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cuts a text into contexts of at least one token and what follows, so that each token is predicted once.

    The first token follows `end`. The last window reaches back, so that what it predicts has as long a context as fits.
    """
    for start in range(0, len(ids), most):
        stop = min(start + most, len(ids))
        whole = [end, *ids]
        yield whole[max(0, stop - most) : start + 1], ids[start:stop]


@torch.no_grad()
def log_likelihoods(found: Language, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """ln p(ending | context) of each pair of lists of tokens, and whether each token of the ending is the likeliest.

    Of a pair that is too long for the model, the first tokens are left out.
    """
    model, device, most = found.model.eval(), found.device, found.config.model.context
    order = sorted(range(len(pairs)), key=lambda k: -sum(map(len, pairs[k])))
    out: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for at in range(0, len(order), TOGETHER):
        some = order[at : at + TOGETHER]
        rows = [(pairs[k][0] + pairs[k][1])[-(most + 1) :] for k in some]
        ids_BT = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
        for row, ids in zip(ids_BT, rows, strict=True):
            row[: len(ids) - 1] = torch.tensor(ids[:-1])  # what is right of it no token of it sees
        logits_BTV = model(ids_BT.to(device)).float().cpu()
        for k, ids, logits_TV in zip(some, rows, logits_BTV, strict=True):
            count = min(len(pairs[k][1]), len(ids) - 1)
            log_p_TV = logits_TV[len(ids) - 1 - count : len(ids) - 1].log_softmax(-1)
            target_T = torch.tensor(ids[len(ids) - count :], dtype=torch.int64)
            chosen = log_p_TV.gather(1, target_T[:, None])
            out[k] = float(chosen.double().sum()), bool((log_p_TV.argmax(-1) == target_T).all())
    return out


def continued(found: Language, text: str, how: Json) -> str:
    """The greedy continuation of a text, up to the first of the strings `until` in what the task says."""
    until = how.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    ids = [int(id) for id in found.tokenizer.encode([text])[0]] or [found.tokenizer.end]
    temperature = float(how.get("temperature") or 0.0) if how.get("do_sample") else 0.0
    new = generate(
        found.model, ids, tokens=int(how.get("max_gen_toks", MOST_NEW)), vocab=found.tokenizer.vocab,
        generator=torch.Generator().manual_seed(0), temperature=temperature, stop=found.tokenizer.end,
    )  # fmt: skip
    said = found.tokenizer.decode(new)
    return said[: min((place for stop in until if stop and (place := said.find(stop)) >= 0), default=len(said))]
