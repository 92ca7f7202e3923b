"""The parsing of `-o KEY=VALUE`, and the recipe files that ship with the project."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from diffusify.cli.options import argument_types, parse_options, training_argument_types
from diffusify.cli.recipe_file import RecipeFile
from diffusify.cli.training_options import RecipeName, recipe_function
from diffusify.diffusion.objectives import Objective
from diffusify.models.recipes import ar
from diffusify.text.sources import _COMMA, _HUB, _WEIGHTED
from diffusify.training.adapt import adapt
from diffusify.training.run_folder import check_training_options

RECIPES = Path(__file__).parents[2] / "recipes"


def test_an_option_goes_to_the_first_dictionary_with_its_key() -> None:
    pairs = ["annealing_steps=7", "length=64", "learning_rate=1e-4", 'objective={"per": "open"}']
    recipe_options, adapt_options, training_options = parse_options(
        pairs, argument_types(ar), argument_types(adapt, "length", "seed"), training_argument_types()
    )
    assert recipe_options == {"annealing_steps": 7, "objective": Objective(per="open")}
    assert adapt_options == {"length": 64} and training_options == {"learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("annealing_step=7", 'did you mean "annealing_steps"'),
        ("annealing_steps", "write KEY=VALUE"),
        ("annealing_steps=many", "-o annealing_steps: 'many' must be one of int"),
        ("minutes=3", '"minutes" is not known'),
    ],
)
def test_unknown_keys_and_wrong_values_are_errors(pair: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_options([pair], argument_types(ar), argument_types(adapt, "length"))
    assert message in str(error.value)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_file_is_a_valid_command(path: Path, tmp_path: Path) -> None:
    file = RecipeFile.load(path)
    make_recipe = recipe_function(RecipeName(file.recipe))
    recipe_options, _, training_options = parse_options(
        file.pairs(),
        argument_types(make_recipe),
        argument_types(adapt, "length", "held_out", "seed"),
        training_argument_types(),
    )
    assert make_recipe(**recipe_options).name == file.recipe
    cpu: dict[str, Any] = {"use_cpu": not torch.cuda.is_available(), "activation_checkpointing": False}
    args = TrainingArguments(str(tmp_path), **(check_training_options(training_options) | cpu))
    assert args.learning_rate == file.options["learning_rate"]
    assert isinstance(file.data, str)
    sources = _COMMA.split(file.data)
    for source in sources:
        weighted = _WEIGHTED.fullmatch(source)
        assert _HUB.fullmatch(weighted[2] if weighted else source)
        assert bool(weighted) == (len(sources) > 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: gpt2", "needs at least base and data"),
        ("[", "is not YAML"),
        ("base: gpt2\ndata: a.txt\nstep: 3", 'did you mean "steps"'),
    ],
)
def test_invalid_recipe_files_are_errors(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        RecipeFile.load(tmp_path / "x.yaml")
    assert message in str(error.value)
