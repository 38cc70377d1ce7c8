"""The saved model: one safetensors file that carries its recipe as JSON. No pickle.

A model that changed code has trained may hold other parameters than its recipe's, and its file is a
stranger's: `load_changed` takes nothing from it but tensors, and not more of them than agreed.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize

from society.errors import SocietyError
from society.model.files import write_atomically
from society.model.flops import parameter_count, shapes
from society.model.gpt import Weights
from society.model.recipe import Recipe
from society.model.train import Trained

RECIPE_KEY = "recipe"
MAX_GROWTH = 4
"""A changed model may have this many times the parameters of its recipe, and `MAX_MORE` more."""
MAX_MORE = 1_000_000
MAX_HEADER = 1 << 20
"""Bytes of the JSON that describes the tensors; a parameter takes about 80."""
MAX_TENSORS = 4_096


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


def load_changed(path: Path, recipe: Recipe) -> Weights:
    """Read what changed code has saved for a recipe: any fp32 parameters, within limits.

    The recipe in the file is ignored. The file is opened once, must be a plain one, and its size
    and that of its header are compared with the limits before they are read.

    Raises:
        BadWeights: It is no such file, too large, or holds anything but finite fp32 tensors; or
            `head`, which the scorer uses, is not there in its shape.
    """
    most = MAX_GROWTH * parameter_count(recipe) + MAX_MORE
    try:
        weights = deserialize(_bounded(path, most))
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise BadWeights(f"{path.name} is not a saved model: {error}") from error
    _check_changed(path, recipe, weights, most)
    return dict(sorted(weights.items()))


def _bounded(path: Path, most: int) -> bytes:
    """The bytes of a safetensors file with at most so many parameters."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise BadWeights(f"{path.name} is not a plain file.")
        if found.st_size > 8 + MAX_HEADER + 4 * most:
            raise BadWeights(
                f"{path.name} has {found.st_size} bytes; a model of this recipe may have "
                f"{most} parameters."
            )
        start = file.read(8)
        header = int.from_bytes(start, "little")
        if len(start) < 8 or header > MAX_HEADER:
            raise BadWeights(f"{path.name} is not a saved model: its header is malformed.")
        return start + file.read(found.st_size - 8)


def _check_changed(path: Path, recipe: Recipe, weights: Weights, most: int) -> None:
    count = sum(weight.numel() for weight in weights.values())
    if count > most or len(weights) > MAX_TENSORS:
        raise BadWeights(
            f"{path.name} holds {count} parameters in {len(weights)} tensors; a model of this "
            f"recipe may have {most} in {MAX_TENSORS}."
        )
    wanted = shapes(recipe)["head"]
    head = weights.get("head")
    if head is None or tuple(head.shape) != wanted:
        raise BadWeights(f"{path.name} must hold `head` of shape {wanted}; the scorer uses it.")
    for name, weight in weights.items():
        if weight.dtype != torch.float32 or not bool(torch.isfinite(weight).all()):
            raise BadWeights(f"{path.name}: {name[:80]!r} is not finite float32 throughout.")
