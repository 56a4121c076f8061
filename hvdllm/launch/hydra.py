"""Drives Hydra's own sweepers, basic and optuna, with a launcher that passes batches of points to one function.

Hydra takes plugins only from the package hydra_plugins, and looks classes up by name. The launcher is therefore
registered by hand under such a name, since a folder hydra_plugins/ would be a second top-level package. What Hydra
writes (multirun.yaml) goes to a temporary folder.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hvdllm.config import compose
from hvdllm.config.words import typed
from hvdllm.errors import RunError, UserError

Task = Callable[[Sequence[Sequence[str]]], list[float | None]]
OURS = ("hydra/sweeper", "hydra.sweeper.")  # the settings of Hydra itself that a sweep reads
NO_OPTUNA = "hydra/sweeper=optuna needs the optuna sweeper of Hydra: pip install hvdllm[optuna]"


class SweepEnded(Exception):
    """A task raises it to get no further points."""


@dataclass
class Returned:
    """The result of a point, in the form of Hydra's JobReturn.

    Attributes:
        value: the validation loss, or None.
        must: whether the sweeper needs a value, because it is an optimizer.
    """

    value: float | None
    must: bool

    @property
    def return_value(self) -> float | None:
        if self.must and self.value is None:
            raise RunError("too many points of the sweep failed (hydra.sweeper.max_failure_rate)")
        return self.value


def drive(words: Sequence[str], make_task: Callable[[int | None], Task]) -> None:
    """Runs the sweeper that the words choose.

    Args:
        words: of `train -m`.
        make_task: is given the number of an optimizer's trials, or None if all points are known from the start. It
          returns the task, which takes a batch of points, each as words, and returns their validation losses (None if
          a point has none). The task raises SweepEnded to get no further points.

    Raises UserError for words that cannot work.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    if bad := next((w for w in words if (k := w.lstrip("+~")).startswith("hydra") and not k.startswith(OURS)), None):
        raise UserError(f"`{bad}` would change nothing: of Hydra's own a sweep reads hydra/sweeper and hydra.sweeper.*")
    began = False

    with tempfile.TemporaryDirectory() as scratch, compose.hydra_over(words, sweep=True) as overrides:
        try:
            with warnings.catch_warnings():
                # Hydra's sweeper calls functions that optuna and its storage have deprecated.
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                _check_optuna(words)
                _register()
                hydra = GlobalHydra.instance().hydra
                assert hydra is not None
                node = hydra.compose_config(
                    "train", [*overrides, "hydra/launcher=hvdllm", f"hydra.sweep.dir={scratch}"], RunMode.MULTIRUN
                )
                trials = _prepare(node, words)
                task = make_task(trials)

                def counted(batch: Sequence[Sequence[str]]) -> list[Returned]:
                    nonlocal began
                    began = True
                    return [Returned(value, must=trials is not None) for value in task(batch)]

                context = HydraContext(config_loader=hydra.config_loader, callbacks=_no_callbacks())
                sweeper = Plugins.instance().instantiate_sweeper(
                    config=node, hydra_context=context, task_function=counted
                )
                # The task composes and checks all points itself, and takes words that Hydra does not know.
                vars(sweeper)["validate_batch_is_legal"] = lambda batch: None
                sweeper.sweep(arguments=list(node.hydra.overrides.task))
        except (SweepEnded, UserError, RunError):
            raise
        except Exception as error:
            if began and "No trials are completed" in str(error):  # optuna found no trial to call the best
                return
            if began:
                raise
            raise UserError(_sentence(error, words)) from None


# ------------------------------------------------------------------ inside
def _register() -> None:
    """Registers the launcher under the name that Hydra will look for."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from hydra.plugins.launcher import Launcher

    class Points(Launcher):
        """Passes each batch to the task."""

        def setup(self, *, hydra_context: object, task_function: Any, config: object) -> None:
            self.task = task_function

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
            return self.task(job_overrides)

    try:
        parent = importlib.import_module("hydra_plugins")
    except ImportError:  # no plugin is installed
        parent = types.ModuleType("hydra_plugins")
        parent.__path__ = []
        sys.modules["hydra_plugins"] = parent
    module = types.ModuleType("hydra_plugins.hvdllm")
    Points.__module__ = module.__name__
    Points.__qualname__ = "Points"
    module.Points = Points  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    parent.hvdllm = module  # type: ignore[attr-defined]
    Plugins.instance().register(Points)
    ConfigStore.instance().store(
        group="hydra/launcher", name="hvdllm", node={"_target_": "hydra_plugins.hvdllm.Points"}, provider="hvdllm"
    )


def _prepare(node: Any, words: Sequence[str]) -> int | None:
    """Sets the sweeper's defaults. Returns how many trials an optimizer has, or None for a sweeper that is none."""
    from omegaconf import OmegaConf, flag_override

    sweeper = node.hydra.sweeper
    with flag_override(sweeper, ["struct", "readonly"], [False, False]):
        for key, value in (sweeper.get("params") or {}).items():
            sweeper.params[key] = typed(f"{key}={value}", sweep=True).partition("=")[2]
        if "n_trials" not in sweeper:
            sweeper.max_batch_size = None  # one batch, so that every point is checked before the first begins
            return None
        if OmegaConf.select(sweeper, "sampler.seed", default=0) is None:
            sweeper.sampler.seed = 0  # the same command gets the same trials, and runs only those that are missing
        if not any(word.lstrip("+").startswith("hydra.sweeper.max_failure_rate=") for word in words):
            sweeper.max_failure_rate = 1.0  # a failed point does not stop the others
        if not any(word.lstrip("+").startswith("hydra.sweeper.n_jobs=") for word in words):
            sweeper.n_jobs = node.launch.parallel or 1  # trials of one batch do not learn from each other
    return int(sweeper.n_trials)


def _check_optuna(words: Sequence[str]) -> None:
    """Raises UserError if a word asks for optuna and it cannot be imported. Otherwise its messages are switched off."""
    import logging

    if not any(word.lstrip("+") == "hydra/sweeper=optuna" for word in words):
        return
    try:
        importlib.import_module("hydra_plugins.hydra_optuna_sweeper._impl")
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise UserError(NO_OPTUNA) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # The sweep lists failed points itself.
    logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.CRITICAL)


def _sentence(error: Exception, words: Sequence[str]) -> str:
    text = f"{error}\n{error.__cause__ or ''}"
    if "hydra/sweeper/optuna" in text:
        return NO_OPTUNA
    if "does not support sweep type" in text:
        return "intervals are for hydra/sweeper=optuna: without it give the values, a,b,c or range(1,4)"
    return compose.sentence(error, [word for word in words if not word.lstrip("+~").startswith("hydra")], sweep=True)


def _no_callbacks() -> Any:
    from hydra._internal.callbacks import Callbacks

    return Callbacks()
