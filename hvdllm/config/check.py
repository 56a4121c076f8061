"""What involves two settings, or the world: checked before anything is built, said in one sentence."""

from __future__ import annotations

from hvdllm.config.schema import Config, Cosine, Files, WarmupStableDecay
from hvdllm.errors import UserError
from hvdllm.models.size import check_model
from hvdllm.world.detect import Place


def check(config: Config, place: Place) -> None:
    """Raises UserError for the first combination that cannot work."""
    context = config.model.context
    check_model(config.model)
    if config.batch_tokens % context:
        near = max(1, round(config.batch_tokens / context)) * context
        raise UserError(
            f"batch_tokens={config.batch_tokens} is no multiple of model.context={context}: {near} would be the nearest"
        )
    sequences = config.batch_tokens // context
    if sequences < place.size:
        raise UserError(
            f"batch_tokens={config.batch_tokens} is {sequences} sequences of {context} tokens, fewer than the "
            f"{place.size} ranks: at least {place.size * context}, or start fewer ranks"
        )
    if isinstance(config.text, Files) and config.text.path is None:
        raise UserError("text=files needs text.path: a file, a folder, a glob or a list of them")
    for key in ("path", "validation"):
        value = getattr(config.text, key, None)
        if value is not None and not (
            isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, str) for v in value))
        ):
            raise UserError(f"text.{key}={value} is neither a path nor a list of paths")
    if not 0 <= config.text.validation_share < 1:
        raise UserError(f"text.validation_share={config.text.validation_share} must lie between 0 and 1")
    if config.model.dropout >= 1:
        raise UserError(f"model.dropout={config.model.dropout} must lie between 0 and 1")
    for name in ("beta1", "beta2", "momentum"):
        if getattr(config.optim, name, 0) >= 1:
            raise UserError(f"optim.{name}={getattr(config.optim, name)} must be smaller than 1")
    if getattr(config.optim, "nesterov", False) and not config.optim.momentum:
        raise UserError("optim.nesterov=true needs optim.momentum above 0")
    schedule = config.schedule
    if schedule.warmup > 1 or (isinstance(schedule, WarmupStableDecay) and schedule.warmup + schedule.decay > 1):
        raise UserError("the shares of the schedule (warmup, decay) add up to more than its horizon: lower one of them")
    if isinstance(schedule, (Cosine, WarmupStableDecay)) and schedule.floor > 1:
        raise UserError(f"schedule.floor={schedule.floor} is above the peak: give a share between 0 and 1")
    if config.name is not None and (
        config.name in ("", ".", "..") or "/" in config.name or config.name.startswith(".")
    ):
        raise UserError(
            f"name={config.name!r} is not the name of a folder: no slashes and no leading dot; see runs_dir"
        )
    if config.world.kind == "horovod" and place.launcher == "none":
        raise UserError("world=horovod needs ranks that a launcher started: horovodrun -np 2 hvdllm train …")
    if config.world.kind == "single" and place.size > 1:
        raise UserError(
            f"world=single under a launcher would train {place.size} times the same run: leave world at auto, "
            "or start one process"
        )
    if config.precision == "fp64" and config.device.kind == "cuda":
        raise UserError("precision=fp64 is for oracles on the CPU: give device=cpu, or precision=fp32 or bf16")
