"""Which runs may be compared.

Invariant: runs are ranked only if they are equal in everything but the compared settings, the tuned settings, the seed,
and settings that change neither what is computed nor how fast.

The table "Equal except" lists every difference, with its part in the comparison:
  compared   its values make the groups (--by)
  tuned      its values are trials inside a group (--tuned-by)
  replicate  it is the seed
  no matter  it changes no result: where files go, when to save, ...; it is stated all the same
  matters    it forbids a ranking, unless --anyway was given
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean

from hvdllm.errors import UserError
from hvdllm.report.read import History

AXES = ("exchange", "wire")  # are compared if they differ and --by is not given
# These change neither the weights nor the speed between acts. Of `launch` only the settings of the network do.
NO_MATTER = (
    "name", "runs_dir", "data_dir", "resume", "keep", "trace_steps", "eval_every", "save_every", "sample_every",
    "audit_every", "log_every", "sample_prompt", "sample_tokens", "target_loss", "track", "launch", "hosts",
    "git.dirty",
)  # fmt: skip
NETWORK = ("launch.link", "launch.controller", "launch.interface", "launch.how")
SAME_DATA = ("text.path", "text.sources", "text.column", "text.validation")  # no matter with equal data hashes
ABSENT = "not recorded"
EMPTY = (ABSENT, "null", "false")  # a setting that one version lacks counts as one that was left empty


@dataclass(frozen=True)
class Difference:
    """A setting in which the runs differ. `values` maps each text of the setting to the names of the runs with it."""

    key: str
    part: str
    values: dict[str, list[str]]


@dataclass
class Trial:
    """One choice of the tuned settings, and its runs, one for each seed.

    `loss` is the mean of the last evaluations; it is inf if a run diverged, failed, or has no evaluation.
    """

    label: str
    runs: list[History]
    loss: float
    whole: bool  # all of its runs have met their budget


@dataclass
class Group:
    """One line of the result: runs that differ only in the seed, and before tuning in the tuned settings (trials)."""

    label: str
    key: dict[str, str]
    runs: list[History]  # those of the winning trial, if there are several trials
    trials: list[Trial] = field(default_factory=list)

    @property
    def seeds(self) -> list[str]:
        return list(dict.fromkeys(run.seed for run in self.runs))


@dataclass
class Comparison:
    """What is compared with what. `fair` is false if a difference that matters was overruled by --anyway."""

    groups: list[Group]
    by: list[str]
    tuned_by: list[str]
    differences: list[Difference]
    notes: list[str]
    fair: bool

    @property
    def against(self) -> list[Difference]:
        """The differences that speak against a ranking."""
        return [one for one in self.differences if one.part == "matters"]


def under(key: str, prefixes: Iterable[str]) -> bool:
    """Whether a setting belongs to one of these groups or settings: exchange.timed is under exchange."""
    return any(key == one or key.startswith(one + ".") for one in prefixes)


def compare(runs: list[History], by: list[str], tuned_by: list[str], anyway: bool) -> Comparison:
    """Sorts the runs into groups.

    Args:
        runs: at least one run.
        by: the settings or groups of settings that are compared; empty to compare exchange and wire, if they differ.
        tuned_by: the settings that were tuned for each group.
        anyway: whether runs are ranked although they differ in something that matters.

    Raises UserError if the runs cannot be ranked fairly, or if a setting is named that no run has.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    for flag, words in (("--by", by), ("--tuned-by", tuned_by)):
        for word in words:
            if not any(under(key, [word]) for key in keys):
                raise UserError(f"{flag} {word}: no run has a setting of that name; write it as in config.yaml")
            if under("seed", [word]):
                raise UserError(f"{flag} {word}: runs that differ in the seed are replicates of each other")
    differing = {key: values for key in keys if len(values := _values(runs, key)) > 1}
    tuned = {key for key in differing if under(key, tuned_by)}
    by = by or _inferred(differing, tuned)
    same_data = len(hashes := _values(runs, "data.hash")) == 1 and ABSENT not in hashes
    differences = []
    for key, values in differing.items():
        part = _part(key, by, tuned, same_data)
        if part == "compared" or not set(values) <= set(EMPTY):
            differences.append(Difference(key, part, values))
    order = ("matters", "compared", "tuned", "replicate", "no matter")
    differences.sort(key=lambda one: (order.index(one.part), one.key))
    against = [one for one in differences if one.part == "matters"]
    if against and not anyway:
        raise UserError(_refusal(against, by, tuned_by))
    groups = _groups(runs, by, tuned)
    notes = _tune(groups, tuned_by, tuned) if tuned_by else []
    return Comparison(groups, by, tuned_by, differences, notes + _seeds(groups), fair=not against)


def _values(runs: list[History], key: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for run in runs:
        out.setdefault(run.settings.get(key, ABSENT), []).append(run.name)
    return out


def _part(key: str, by: list[str], tuned: set[str], same_data: bool) -> str:
    if key in tuned:
        return "tuned"
    if under(key, by):
        return "compared"
    if key == "seed":
        return "replicate"
    harmless = under(key, NO_MATTER) and not under(key, NETWORK)
    return "no matter" if harmless or (same_data and key in SAME_DATA) else "matters"


def _inferred(differing: dict[str, dict[str, list[str]]], tuned: set[str]) -> list[str]:
    """What to compare if --by is not given.

    These are the axes that differ. If none does, it is the one setting that differs. If there are several of those, it
    is the exchange, which makes a single group.
    """
    left = {key for key, values in differing.items() if key not in tuned and not set(values) <= set(EMPTY)}
    axes = [axis for axis in AXES if any(under(key, [axis]) for key in left)]
    if axes:
        return axes
    matters = [key for key in left if _part(key, [], tuned, same_data=False) == "matters"]
    return matters if len(matters) == 1 else ["exchange"]


def _refusal(against: list[Difference], by: list[str], tuned_by: list[str]) -> str:
    shown = "; ".join(f"{one.key} ({_some(one.values)})" for one in against[:4])
    more = f" and {len(against) - 4} more" if len(against) > 4 else ""
    rates = [one.key for one in against if under(one.key, ("optim", "schedule", *AXES))]
    tune = f", --tuned-by {rates[0]} where it was tuned for each" if rates and not tuned_by else ""
    return (
        f"no ranking: beside {', '.join(by)} the runs differ in {shown}{more}; give runs that are equal in it"
        f", --by with what is compared{tune}, or --anyway"
    )


def _some(values: dict[str, list[str]]) -> str:
    shown = [value if len(value) <= 24 else value[:23] + "…" for value in list(values)[:3]]
    return " | ".join(shown) + (" | …" if len(values) > 3 else "")


# ------------------------------------------------------------------ groups and trials
def _groups(runs: list[History], by: list[str], tuned: set[str]) -> list[Group]:
    """The groups, in the order in which their first runs were given."""
    keys = [key for key in dict.fromkeys(k for run in runs for k in run.settings) if under(key, by)]
    keys = sorted((key for key in keys if key not in tuned), key=lambda key: [not under(key, [one]) for one in by])
    found: dict[tuple[str, ...], Group] = {}
    for run in runs:
        key = {k: run.settings.get(k, ABSENT) for k in keys}
        # A setting that one version lacks and another has left empty is no difference.
        same = tuple(ABSENT if value in EMPTY else value for value in key.values())
        found.setdefault(same, Group("", key, [])).runs.append(run)
    groups = list(found.values())
    for group, label in zip(groups, labels([group.key for group in groups], by), strict=True):
        group.label = label
    return groups


def labels(keys: list[dict[str, str]], by: list[str]) -> list[str]:
    """Labels such as `acco`, `acco, int8` or `acco, timed=true`: the options, and what tells equal options apart."""
    names = [key for key in (keys[0] if keys else {}) if key.endswith(".name")]
    telling = [key for key in names if len({one[key] for one in keys}) > 1]
    if not telling:
        telling = [f"{axis}.name" for axis in by if f"{axis}.name" in names][:1]
    out = []
    for one in keys:
        alike = [other for other in keys if all(other[key] == one[key] for key in telling)]
        values = {key: {ABSENT if other[key] in EMPTY else other[key] for other in alike} for key in one}
        apart = [key for key in one if key not in telling and len(values[key]) > 1]
        parts = [one[key] for key in telling] + [f"{key.rpartition('.')[2]}={one[key]}" for key in apart]
        out.append(", ".join(parts) or "all runs")
    return out


def _tune(groups: list[Group], tuned_by: list[str], tuned: set[str]) -> list[str]:
    """Keeps only the runs of the best trial in each group, and returns notes about the choice.

    Raises UserError if the groups have unequal numbers of trials.
    """
    for group in groups:
        found: dict[tuple[tuple[str, str], ...], list[History]] = {}
        for run in group.runs:
            found.setdefault(tuple((key, run.settings.get(key, ABSENT)) for key in sorted(tuned)), []).append(run)
        varied = [k for k in sorted(tuned) if len({dict(key)[k] for key in found}) > 1]
        for key, runs in found.items():
            shown = [f"{k}={v}" for k, v in key if (k in varied or not varied) and v != ABSENT]
            group.trials.append(_trial(", ".join(shown) or "as configured", runs))
    counts = {group.label: len(group.trials) for group in groups}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{label} {count}" for label, count in counts.items())
        raise UserError(
            f"unequal tuning: trials of {', '.join(tuned_by)} are {said}; whoever has more tries wins more often, so "
            "give each as many"
        )
    notes = []
    for group in groups:
        able = [trial for trial in group.trials if trial.whole] or group.trials
        best = min(able, key=lambda trial: trial.loss)
        group.runs = best.runs
        if len(able) < len(group.trials):
            notes.append(f"{group.label}: {len(group.trials) - len(able)} of its trials did not finish and cannot win")
        counts_of_seeds = {len({run.seed for run in trial.runs}) for trial in group.trials}
        if len(counts_of_seeds) > 1:
            notes.append(f"{group.label}: its trials have unequal numbers of seeds")
    if not tuned:
        notes.append(f"--tuned-by {', '.join(tuned_by)}: all runs have the same, so one trial each")
    elif any(len(group.trials) > 1 for group in groups):
        notes.append("the winning trials are chosen and compared on the same runs, which favours all groups alike")
    return notes


def _trial(label: str, runs: list[History]) -> Trial:
    """A trial and its loss. A seed counts once, also if it was run twice."""
    last: dict[str, list[float]] = {}
    for run in runs:
        usable = run.evals and run.status != "failed"
        last.setdefault(run.seed, []).append(run.evals[-1].loss if usable else math.inf)
    whole = all(run.evals and run.evals[-1].tokens >= 0.99 * (run.budget or 0.0) for run in runs)
    return Trial(label, runs, fmean(fmean(values) for values in last.values()), whole)


def _seeds(groups: list[Group]) -> list[str]:
    notes = []
    for group in groups:
        twice = sorted({seed for seed in group.seeds if sum(run.seed == seed for run in group.runs) > 1})
        if twice:
            notes.append(f"{group.label}: several runs of seed {', '.join(twice[:8])}: their mean counts once")
    seeds = {frozenset(group.seeds) for group in groups}
    if len(seeds) > 1:
        said = "; ".join(f"{group.label} {', '.join(group.seeds[:8])}" for group in groups)
        notes.append(f"the groups have different seeds ({said}): only common ones are paired")
    return notes


def reference(groups: list[Group], name: str | None) -> Group:
    """The group that the others are compared with.

    It is the one that `name` names. Without a name it is `allreduce` (with the wire fp32, if there are several), or
    else the first group. Raises UserError if `name` is not the name of exactly one group.
    """
    if name is not None:
        exact = [group for group in groups if group.label.lower() == name.lower()]
        found = exact or [group for group in groups if name in group.key.values()]
        if len(found) != 1:
            known = "; ".join(group.label for group in groups[:20])
            which = "several groups have that" if found else "there is no such group"
            raise UserError(f"--reference {name}: {which}; the groups are {known}")
        return found[0]
    plain = [group for group in groups if group.key.get("exchange.name") == "allreduce"]
    return next((g for g in plain if g.key.get("wire.name", "fp32") == "fp32"), (plain or groups)[0])
