"""Which runs a sweep consists of."""

from pathlib import Path

import pytest

from como_jax.errors import ConfigError
from como_jax.evaluation.sweeps.cells import expand_recipes, load_recipe, make_cells, parse_swept

RECIPE = '''
"""A recipe."""
from ml_collections import ConfigDict

VARIANTS = ("plain", "wide")


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise ValueError(f"Unknown variant {variant!r}.")
    config = ConfigDict({"seed": 0, "model": {"num_queries": 8, "latent_dim": 4, "rate": 1.0, "on": True}})
    if variant == "wide":
        config.model.latent_dim = 64
    config.data = ConfigDict({"mixture": ""})
    return config.lock()
'''


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return str(path)


def test_cells_are_every_combination_with_seeds_next_to_each_other(recipe: str):
    swept = parse_swept(["model.latent_dim=16,32", "model.on=True,False"])
    cells = make_cells("out", [recipe, f"{recipe}:wide"], swept, ["model.rate=3e-3"], [0, 7])
    found = [(cell.label, cell.config.model.latent_dim, cell.config.model.on, cell.config.seed) for cell in cells]
    wanted = [
        (label, size, on, seed)
        for label in ("recipe", "recipe:wide")
        for size in (16, 32)
        for on in (True, False)
        for seed in (0, 7)
    ]
    assert found == wanted
    assert {cell.config.model.rate for cell in cells} == {0.003}
    assert cells[0].latent_size == 128
    assert cells[-1].workdir.parts == ("out", "recipe-wide_model.latent_dim=32_model.on=False", "seed7")


def test_overrides_describe_the_whole_cell(recipe: str):
    (cell,) = make_cells("out", [recipe], {"data.mixture": ["a=1,b=2"]}, ["model.on=False"], [3])
    assert cell.config == load_recipe(recipe, cell.overrides)
    assert cell.config.data.mixture == "a=1,b=2" and cell.config.seed == 3 and not cell.config.model.on


def test_a_fixed_field_is_set_where_a_recipe_has_it(recipe: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    other = tmp_path / "other.py"
    other.write_text(RECIPE.replace('"rate": 1.0', '"speed": 1.0'))
    first, second = make_cells("out", [recipe, str(other)], {}, ["model.rate=5.0"])
    assert first.config.model.rate == 5.0 and "rate" not in second.config.model
    assert f"model.rate=5.0 is left out of recipes without such a field: {other}" in caplog.text
    with pytest.raises(ConfigError, match="no field 'model.rat'; did you mean 'model.rate'"):
        make_cells("out", [recipe, str(other)], {}, ["model.rat=5.0"])


def test_values_with_commas_are_separated_by_semicolons():
    assert parse_swept(["data.mixture=a,b;c", "x=1,2"]) == {"data.mixture": ["a,b", "c"], "x": ["1", "2"]}


def test_all_variants_are_those_that_the_file_lists(recipe: str):
    assert expand_recipes([recipe], ["all"]) == [f"{recipe}:plain", f"{recipe}:wide"]
    assert expand_recipes([recipe, "other.py:tiny"], ["wide"]) == [f"{recipe}:wide", "other.py:tiny"]
    assert expand_recipes([recipe], []) == [recipe]


def test_a_file_without_variants_asks_for_their_names(tmp_path: Path):
    (tmp_path / "bare.py").write_text("")
    with pytest.raises(ConfigError, match=r"bare.py has no tuple VARIANTS; name its variants"):
        expand_recipes([str(tmp_path / "bare.py")], ["all"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.latent_dmi=3", "no field 'model.latent_dmi'; did you mean 'model.latent_dim'?"),
        ("latent_dim=3", "no field 'latent_dim'; did you mean 'model.latent_dim'?"),
        ("zzz=3", r"no field 'zzz'; config has data, model, seed\.$"),
        ("model.latent_dim=many", "--config.model.latent_dim=many: invalid literal for int"),
        ("model.on=perhaps", "Non-boolean argument"),
    ],
)
def test_a_wrong_field_or_value_is_one_line(recipe: str, override: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe, [override])
    assert "\n" not in str(caught.value)


def test_a_wrong_variant_or_file_is_one_line(recipe: str):
    with pytest.raises(ConfigError, match=r"recipe.py:x: Unknown variant 'x'.$"):
        load_recipe(f"{recipe}:x")
    with pytest.raises(ConfigError, match=r"nowhere.py: there is no such Python file"):
        load_recipe("nowhere.py")


@pytest.mark.parametrize(
    ("recipes", "swept", "fixed", "seeds", "message"),
    [
        (1, {"model.rate": ["1.0"]}, ["model.rate=2.0"], [0], "model.rate is set twice"),
        (1, {"seed": ["1"]}, [], [0], "seed is set twice"),
        (1, {"model.rate": ["1.0", "1.0"]}, [], [0], "Two cells would share"),
        (1, {}, [], [0, 0], "Two cells would share"),
        (2, {}, [], [0], "Two cells would share"),
    ],
)
def test_cells_that_would_be_the_same_are_refused(recipe: str, recipes: int, swept, fixed, seeds, message: str):
    with pytest.raises(ConfigError, match=message):
        make_cells("out", [recipe] * recipes, swept, fixed, seeds)


@pytest.mark.parametrize("text", ["model.rate", "model.rate=", "=3"])
def test_a_sweep_without_field_or_value_is_refused(text: str):
    with pytest.raises(ConfigError, match="is not FIELD=VALUE,VALUE"):
        parse_swept([text])
