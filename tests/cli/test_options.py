"""Options find the one they are meant for, and whole commands stand in files that ship with the project."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from diffusify.cli.making import RecipeName, recipe_maker
from diffusify.cli.options import RecipeFile, arguments, parse_options, training_options
from diffusify.diffusion.objectives import Objective
from diffusify.models.recipes import ar
from diffusify.text.sources import _COMMA, _HUB, _WEIGHTED
from diffusify.training.adapt import adapt
from diffusify.training.run_folder import check_training_options

RECIPES = Path(__file__).parents[2] / "recipes"


def test_options_go_to_the_first_who_knows_them() -> None:
    pairs = ["annealing_steps=7", "length=64", "learning_rate=1e-4", 'objective={"per": "open"}']
    made, own, training = parse_options(pairs, arguments(ar), arguments(adapt, "length", "seed"), training_options())
    assert made == {"annealing_steps": 7, "objective": Objective(per="open")}
    assert own == {"length": 64} and training == {"learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("annealing_step=7", 'did you mean "annealing_steps"'),
        ("annealing_steps", "write KEY=VALUE"),
        ("annealing_steps=many", "-o annealing_steps: 'many' must be one of int"),
        ("minutes=3", '"minutes" is not known'),
    ],
)
def test_options_that_nobody_knows_are_refused(pair: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_options([pair], arguments(ar), arguments(adapt, "length"))
    assert message in str(error.value)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_a_command_that_works(path: Path, tmp_path: Path) -> None:
    story = RecipeFile.load(path)
    make = recipe_maker(RecipeName(story.recipe))
    made, _, training = parse_options(
        story.pairs(), arguments(make), arguments(adapt, "length", "held_out", "seed"), training_options()
    )
    assert make(**made).name == story.recipe
    cpu: dict[str, Any] = {"use_cpu": not torch.cuda.is_available(), "activation_checkpointing": False}
    args = TrainingArguments(str(tmp_path), **(check_training_options(training) | cpu))
    assert args.learning_rate == story.options["learning_rate"]
    assert isinstance(story.data, str)
    parts = _COMMA.split(story.data)
    for part in parts:
        weighted = _WEIGHTED.fullmatch(part)
        assert _HUB.fullmatch(weighted[2] if weighted else part)
        assert bool(weighted) == (len(parts) > 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: gpt2", "needs at least base and data"),
        ("[", "is not YAML"),
        ("base: gpt2\ndata: a.txt\nstep: 3", 'did you mean "steps"'),
    ],
)
def test_files_that_are_no_recipe_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        RecipeFile.load(tmp_path / "x.yaml")
    assert message in str(error.value)
