import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from paragraph_ocr.errors import UserError
from paragraph_ocr.search.space import Space, evaluate


def parse(params, arguments=(), when=None, constraints=()):
    return Space.parse(params, list(arguments), when=when or {}, constraints=list(constraints))


@pytest.mark.parametrize(
    ("written", "distribution"),
    [
        ("choice(a, b)", CategoricalDistribution(["a", "b"])),
        ("8,16,null", CategoricalDistribution([8, 16, None])),
        ("choice(true, false)", CategoricalDistribution([True, False])),
        ("choice('a b', c)", CategoricalDistribution(["a b", "c"])),
        ("range(1, 5)", IntDistribution(1, 4)),
        ("range(0, 50, step=20)", IntDistribution(0, 40, step=20)),
        ("range(0.0, 0.3, step=0.1)", CategoricalDistribution([0.0, 0.1, 0.2])),
        ("interval(0.0, 0.5)", FloatDistribution(0.0, 0.5)),
        ("int(interval(1, 64))", IntDistribution(1, 64)),
        ("tag(log, interval(1e-4, 1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("tag(log, int(interval(1, 64)))", IntDistribution(1, 64, log=True)),
    ],
)
def test_hydras_words_for_sweeps_become_distributions(written, distribution):
    assert parse({"key": written}).distributions == {"key": distribution}


def test_what_is_typed_beats_what_is_written_and_a_value_is_fixed():
    written = {"a": "choice(1, 2)", "b": "choice(1, 2)"}
    space = parse(written, ["a=7", "b=choice(3, 4)", "model=tiny"])
    assert space.fixed == ["a=7", "model=tiny"]
    assert space.distributions == {"b": CategoricalDistribution([3, 4])}


@pytest.mark.parametrize(
    ("params", "when", "said"),
    [
        ({"a": "range(5, 1, step=-1)"}, {}, "a search can draw from"),
        ({"a": "1"}, {}, "nothing to search"),
        ({"a": "choice(1, 2)"}, {"b": "a == 1"}, "no parameter of this search"),
    ],
)
def test_what_cannot_be_searched_is_said_in_one_line(params, when, said):
    with pytest.raises(UserError, match=said):
        parse(params, when=when)


def test_a_conditional_parameter_is_suggested_only_where_its_condition_holds():
    space = parse(
        {"model.norm": "choice(pre, post)", "warmup": "choice(10, 20)"},
        when={"warmup": "model.norm == 'post'"},
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = [space.suggest(study.ask(), {"model": {"norm": "pre"}}) for _ in range(20)]
    assert {params["model.norm"] for params in seen} == {"pre", "post"}
    assert all(("warmup" in params) == (params["model.norm"] == "post") for params in seen)


def test_constraints_see_the_config_and_the_groups_choices():
    space = parse({"a": "choice(1, 2)"}, constraints=["m.w % m.h == 0", "choices['model'] != 'x'"])
    assert space.broken({"m": {"w": 8, "h": 4}}, {"model": "tiny"}) is None
    assert space.broken({"m": {"w": 8, "h": 3}}, {"model": "tiny"}) == "m.w % m.h == 0"
    assert space.broken({"m": {"w": 8, "h": 4}}, {"model": "x"}) == "choices['model'] != 'x'"


@pytest.mark.parametrize(
    "expression", ["nowhere == 1", "1 +", "__import__('os')", "a.b.c", "1 / 0"]
)
def test_an_expression_that_cannot_be_computed_is_the_users_mistake(expression):
    with pytest.raises(UserError, match="cannot be computed"):
        evaluate(expression, {"a": {"b": 1}}, choices={})


def test_overrides_can_be_parsed_again_to_the_same_values():
    params = {"a": None, "b": True, "c": 1e-05, "d": "word", "e": 3}
    typed = Space({}).overrides(params)
    assert typed == ["a=null", "b=true", "c=1e-05", "d=word", "e=3"]


def test_size_counts_the_combinations_of_a_finite_space():
    assert parse({"a": "choice(1, 2, 3)", "b": "range(0, 10, step=5)"}).size() == 6
    assert parse({"a": "choice(1, 2)", "b": "interval(0.0, 1.0)"}).size() is None
