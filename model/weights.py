"""The saved model: one safetensors file that carries its recipe as JSON. No pickle."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from society.errors import SocietyError
from society.model.files import write_atomically
from society.model.flops import shapes
from society.model.gpt import Weights
from society.model.recipe import Recipe
from society.model.train import Trained

RECIPE_KEY = "recipe"


class BadWeights(SocietyError):
    """A saved model cannot be used: unreadable, of other shapes, or not finite."""


def save(trained: Trained, path: Path) -> None:
    """Write the weights and the recipe to one file, whole or not at all."""
    weights = {name: weight.contiguous() for name, weight in trained.weights.items()}
    header = {RECIPE_KEY: trained.recipe.model_dump_json()}
    write_atomically(path, serialize(weights, metadata=header))


def load(path: Path) -> tuple[Recipe, Weights]:
    """Read a saved model and check it: exactly its recipe's parameters, fp32, all finite.

    Raises:
        BadWeights: It is not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            recipe = Recipe.model_validate_json((file.metadata() or {}).get(RECIPE_KEY, ""))
            weights = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, ValidationError, OSError) as error:
        raise BadWeights(f"{path} is not a saved model: {error}") from error
    _check(path, recipe, weights)
    return recipe, weights


def _check(path: Path, recipe: Recipe, weights: Weights) -> None:
    wanted = shapes(recipe)
    if set(weights) != set(wanted):
        odd = ", ".join(sorted(set(weights) ^ set(wanted)))
        raise BadWeights(f"{path} does not hold the parameters of its recipe; at odds: {odd}.")
    for name, weight in weights.items():
        if tuple(weight.shape) != wanted[name] or weight.dtype != torch.float32:
            raise BadWeights(
                f"{path}: {name} is {weight.dtype} of shape {tuple(weight.shape)}; expected "
                f"float32 of shape {wanted[name]}."
            )
        if not bool(torch.isfinite(weight).all()):
            raise BadWeights(f"{path}: {name} holds values that are not finite.")
