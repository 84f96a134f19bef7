"""What a study may choose from: Hydra's words for sweeps as Optuna's distributions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    QuotedString,
    RangeSweep,
    Transformer,
)
from optuna import Trial
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from simpleeval import EvalWithCompoundTypes, InvalidExpression

from paragraph_ocr.errors import UserError


@dataclass(frozen=True)
class Space:
    """Parameters with their distributions, and what else every trial is given.

    Args:
        fixed: overrides that all trials share.
        when: parameter to the expression under which it is suggested at all.
        constraints: expressions over the composed config that must hold.
    """

    distributions: dict[str, BaseDistribution]
    fixed: list[str] = field(default_factory=list)
    when: dict[str, str] = field(default_factory=dict)
    constraints: list[str] = field(default_factory=list)

    @classmethod
    def parse(
        cls,
        params: Mapping[str, Any],
        arguments: list[str],
        *,
        when: Mapping[str, str],
        constraints: list[str],
    ) -> "Space":
        """Return the space of a config's `params` under what was typed, which wins.

        Raises:
            UserError: a parameter that is no sweep Optuna can draw from, or a condition for none.
        """
        parser = OverridesParser.create()
        written = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
        typed = parser.parse_overrides(arguments)
        overrides = {override.get_key_element(): override for override in [*written, *typed]}
        # a fixed value goes first, so that what is swept below a group comes after the group
        distributions, fixed = {}, []
        for key, override in overrides.items():
            if override.is_sweep_override():
                distributions[key] = _distribution(override)
            else:
                assert override.input_line is not None
                fixed.append(override.input_line)
        for key in when:
            if key not in distributions:
                raise UserError(
                    f"hydra.sweeper.when has a condition for {key}, which is no parameter of this "
                    f"search ({', '.join(distributions)}). Pass +hydra.sweeper.params.{key}=..."
                )
        if not distributions:
            raise UserError(
                "There is nothing to search. Pass a choice of search=, or a sweep such as "
                "'optimizer.lr=tag(log, interval(1e-4, 1e-2))'."
            )
        return cls(distributions, fixed, dict(when), list(constraints))

    def suggest(self, trial: Trial, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a value for each parameter whose condition holds; conditions see `config` as it
        would be with the parameters that have none."""
        chosen: dict[str, Any] = {}
        for key, distribution in self.distributions.items():
            if key not in self.when:
                chosen[key] = _suggest(trial, key, distribution)
        for key, condition in self.when.items():
            if evaluate(condition, _overlay(config, chosen), choices=chosen):
                chosen[key] = _suggest(trial, key, self.distributions[key])
        return chosen

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """Return what to type for these parameters."""
        return [f"{key}={_typed(value)}" for key, value in params.items()]

    def broken(self, config: Mapping[str, Any], choices: Mapping[str, Any]) -> str | None:
        """Return the first constraint that the config does not meet, or None."""
        for constraint in self.constraints:
            if not evaluate(constraint, config, choices=choices):
                return constraint
        return None

    def size(self) -> int | None:
        """Return the number of combinations, or None where it is unlimited or conditional."""
        total = 1
        for distribution in self.distributions.values():
            match distribution:
                case CategoricalDistribution(choices=choices):
                    total *= len(choices)
                case IntDistribution(low=low, high=high, step=step):
                    total *= (high - low) // step + 1
                case FloatDistribution(low=low, high=high, step=float(step)):
                    total *= round((high - low) / step) + 1
                case _:
                    return None
        return None if self.when else total

    def require_finite(self) -> None:
        """Check that every combination can be tried.

        Raises:
            UserError: a parameter has any number of values.
        """
        for key, distribution in self.distributions.items():
            if isinstance(distribution, FloatDistribution) and distribution.step is None:
                raise UserError(
                    f"hydra/sweeper/sampler=grid tries every value, and {key} has any number of them. "
                    f"Pass {key}=<value>,<value>,... or another sampler."
                )

    def describe(self) -> dict[str, str]:
        """Return what makes the space, in words that can be compared between two searches."""
        told = {key: str(value) for key, value in self.distributions.items()}
        told |= {f"when.{key}": value for key, value in self.when.items()}
        if self.constraints:
            told["constraints"] = " and ".join(self.constraints)
        return told


def evaluate(expression: str, config: Mapping[str, Any], *, choices: Mapping[str, Any]) -> Any:
    """Return the value of an expression over the config's keys; `choices` holds the groups' choices.

    Raises:
        UserError: it cannot be computed.
    """
    evaluator = EvalWithCompoundTypes(names={**config, "choices": dict(choices)})
    try:
        return evaluator.eval(expression)
    except (InvalidExpression, SyntaxError, TypeError, KeyError, ArithmeticError) as error:
        raise UserError(
            f"{expression!r} in hydra.sweeper.when or constraints cannot be computed: {error}. "
            "Write it over the config's keys, like model.decoder.width % 4 == 0."
        ) from error


def _distribution(override: Override) -> BaseDistribution:
    key, value = override.get_key_element(), override.value()
    match value:
        case ChoiceSweep() | RangeSweep(start=float()) | RangeSweep(step=float()):
            values = override.sweep_iterator(Transformer.identity)
            return CategoricalDistribution([_plain(element) for element in values])
        case RangeSweep(start=int(start), stop=int(stop), step=int(step)) if step > 0:
            last = (
                start + (stop - 1 - start) // step * step
            )  # like Python's range, without the stop
            return IntDistribution(start, last, step=step)
        case IntervalSweep(start=start, end=end, tags=tags):
            assert start is not None and end is not None
            if isinstance(start, int) and isinstance(end, int):
                return IntDistribution(start, end, log="log" in tags)
            return FloatDistribution(float(start), float(end), log="log" in tags)
    raise UserError(
        f"{override.input_line}: a search can draw from choice(a, b), range(1, 5), interval(0.0, 1.0) "
        f"and tag(log, interval(1e-4, 1e-2)). Pass {key}= one of these."
    )


def _plain(element: Any) -> Any:
    if isinstance(element, QuotedString):
        return element.text
    return element


def _typed(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def _suggest(trial: Trial, key: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(key, choices)
        case IntDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_int(key, low, high, step=step, log=log)
        case FloatDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_float(key, low, high, step=step, log=log)
    raise ValueError(distribution)


def _overlay(config: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with dotted keys set; a group's choice is no key and stays away."""
    tree = {key: _overlay(v, {}) if isinstance(v, Mapping) else v for key, v in config.items()}
    for key, value in params.items():
        *parents, last = key.lstrip("+").split(".")
        node: Any = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if "/" not in key and not isinstance(node.get(last), dict):
            node[last] = value
    return tree
