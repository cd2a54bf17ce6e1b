"""GRACE's router: a prompt belongs to the nearest stored key if it lies within that key's radius.

    query   x at the prompt's last token, the input of the edited layer          (GRACE, NeurIPS 2023, section 3)
    fire    n = argmin ‖q − k_i‖;  n answers if ‖q − k_n‖ ≤ ε_n

A new key (q, label y) meets the nearest ball n at the distance δ:

    nothing stored, or δ > ε_init + ε_n     it founds a ball of its own with the radius ε_init
    labels differ                           it founds one with δ/2, and ε_n becomes δ/2 − 10⁻⁵      (split)
    labels agree, δ ≤ ε_n                   it joins ball n
    labels agree, δ > ε_n                   it joins ball n, and ε_n grows to δ                     (expand)

Three things are different here, unless `compat="reference"`. Expanding is a choice (`expand`), and without it the last
case founds a ball too: one that has grown reaches farther from its key than any was meant to. A split is there to keep
two answers apart, and no ball grows by it: the new one gets at most ε_init, the old one keeps what it had if that is
less. And an edit that joined a ball is not lost when a split leaves its key outside, or when a new key is nearer to it:
it then founds its own.

All balls are a fold of these rules over the edits in their order, and the keys of all edits are kept, founders' and
others'. Taking an edit out therefore means: fold again over the edits that remain. What each key met, and how far
away, is kept too, so that this measures only what the missing edit can have changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from errata.errors import EditError
from errata.routing.base import Route, Router
from errata.routing.keys import KeyStore

__all__ = ["Compat", "DistanceRouter", "Label"]

Compat = Literal["fixed", "reference"]
Label = tuple[float, ...]

_GAP = 1e-5  # between two balls that were split
_NOBODY, _UNKNOWN = -1, -2  # what a key met: no ball there was; to be measured again


def _closeness(distance: Tensor) -> Tensor:
    """Larger is closer, 1 at the key itself."""
    return 1.0 / (1.0 + distance)


class DistanceRouter(Router):
    """Balls around the keys of edits; one entry per edit, in order.

    Args:
        width: D, numbers in a key.
        radius: ε_init, the radius of a ball at first.
        compat: "reference" lets balls grow when they are split and lose those that joined them, as published, and takes
            a ball's label from its place counted from the other end, as EasyEdit's code does, which stores keys behind
            the others and labels in front of them.
        expand: let a ball grow to reach a key of its own label outside; "reference" always does.

    Attributes:
        cells: per edit, the edit whose ball it belongs to: itself, if it founded one.
        labels: per edit, what decides whether two edits agree.
        origins: per edit, the latest in the ball that it joined when it came, and -1 if it founded one.
    """

    kind: ClassVar[str] = "distance"

    def __init__(self, width: int, radius: float, compat: Compat = "fixed", *, expand: bool = False) -> None:
        self.width, self.radius, self.compat = width, radius, compat
        self.expand = expand or compat == "reference"
        self.owners: list[str] = []
        self.store = KeyStore(width)
        self.labels: list[Label] = []
        self.cells: list[int] = []
        self.origins: list[int] = []
        self._met: list[int] = []
        self._distances: list[float] = []
        self._latest: Tensor | None = None  # per ball, by its founder's number, the latest edit in it

    # --- deciding -------------------------------------------------------------------------------------------------

    def gather(self, inputs: Tensor, prompt: Tensor, before: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """The input [rows, D] at each row's last prompt token so far, infinite where there was none."""
        rows, columns = prompt.shape
        prompt = prompt.to(inputs.device)  # the layer may stand on another device than the token ids
        last = columns - 1 - prompt.flip(1).long().argmax(dim=1)
        here = inputs[torch.arange(rows, device=inputs.device), last].float()
        if before is None:
            before = torch.full_like(here, torch.inf)
        return torch.where(prompt.any(dim=1, keepdim=True), here, before)

    def decide(self, gathered: Tensor) -> Route:
        """The ball that each query [rows, D] lies in. `nearest` is its founder; `entry` the latest edit that joined,
        whose content is what the ball answers with. Scores are 1/(1 + distance)."""
        rows = len(gathered)
        distances, numbers = self.store.nearest(gathered, count=2)
        missing = 2 - distances.shape[1]
        distances = torch.nn.functional.pad(distances, (0, missing), value=torch.inf)
        numbers = torch.nn.functional.pad(numbers, (0, missing), value=-1)
        nearest, distance = numbers[:, 0], distances[:, 0]
        if not len(self):
            limit, answers = torch.zeros(rows, dtype=torch.float64), nearest
        else:
            limit = self.store.radii[nearest]
            if self._latest is None:
                numbered = torch.arange(len(self))
                self._latest = numbered.scatter_reduce(0, torch.tensor(self.cells), numbered, "amax")
            answers = torch.where(distance <= limit, self._latest[nearest], -1)
        return Route(
            entry=answers,
            nearest=nearest,
            score=_closeness(distance),
            threshold=_closeness(limit),
            second=numbers[:, 1],
            second_score=_closeness(distances[:, 1]),
        )

    # --- entries --------------------------------------------------------------------------------------------------

    def joins(self, key: Tensor, label: Label) -> int | None:
        """The edit whose content a new key [D] would begin with: the latest in the ball it would join, or None."""
        met, distance = self._meet(key)
        joins = self._is_near(met, distance) and self._label(met) == tuple(label) and self._takes_in(met, distance)
        return self._latest_in(met) if joins else None

    def append(self, owner: str, key: Tensor, label: Label) -> str | None:
        """Store an edit's key [D] and let the balls follow.

        Returns:
            The edit whose ball is left without a place because the new key, of another label, is the very same point;
            nothing can reach it any more. None if there is none.
        """
        met, distance = self._meet(key)
        number = self.store.append(key, -1.0)
        self.owners.append(owner)
        self.labels.append(tuple(label))
        for entries, value in ((self.cells, number), (self.origins, -1), (self._met, met)):
            entries.append(value)
        self._distances.append(distance)
        self._place(number)
        return self.owners[met] if distance == 0.0 and self.cells[number] == number else None

    def remove(self, owner: str) -> list[int]:
        if owner not in self.owners:
            raise EditError(f"no key is stored for edit {owner!r}")
        gone = self.owners.index(owner)
        # Where nobody ever joined, who met another than the missing one still does. Otherwise any edit behind it may
        # find a ball where there was none.
        all_founded = all(origin < 0 for origin in self.origins)
        self.store.remove(gone)
        for entries in (self.owners, self.labels, self.cells, self.origins, self._met, self._distances):
            del entries[gone]
        self._met = [_UNKNOWN if met == gone else met - (met > gone) for met in self._met]
        self.store.sleep()
        self.cells = [_UNKNOWN] * len(self)
        for number, met in enumerate(self._met):
            if number >= gone and (not all_founded or met == _UNKNOWN or (met >= 0 and self.cells[met] != met)):
                self._met[number], self._distances[number] = self._meet(self.store.keys[number])
            self._place(number)
        return [gone]

    def _meet(self, key: Tensor) -> tuple[int, float]:
        """The nearest ball's founder and its distance."""
        distances, numbers = self.store.nearest(key[None])
        return (int(numbers[0, 0]), float(distances[0, 0])) if distances.shape[1] else (_NOBODY, torch.inf)

    def _is_near(self, met: int, distance: float) -> bool:
        return met != _NOBODY and distance <= self.radius + self.store.radius(met)

    def _takes_in(self, met: int, distance: float) -> bool:
        return self.expand or distance <= self.store.radius(met)

    def _label(self, founder: int) -> Label:
        if self.compat == "reference":
            founders = (self.store.radii >= 0).nonzero().squeeze(1).tolist()
            founder = founders[len(founders) - 1 - founders.index(founder)]
        return self.labels[founder]

    def _latest_in(self, founder: int) -> int:
        return max(number for number, cell in enumerate(self.cells) if cell == founder)

    def _place(self, number: int) -> None:
        """Apply the rules to an edit whose key sleeps so far, by what it met; those behind it are not placed yet."""
        met, distance, store = self._met[number], self._distances[number], self.store
        self._latest, self.cells[number], self.origins[number] = None, _UNKNOWN, -1
        is_near = self._is_near(met, distance)
        agrees = is_near and self._label(met) == self.labels[number]
        if agrees and self._takes_in(met, distance):
            self.origins[number] = self._latest_in(met)
            self.cells[number] = met
            store.set_radius(met, max(store.radius(met), distance))
            return
        self.cells[number] = number
        radius = self.radius
        if is_near and not agrees:
            left, radius = max(0.0, distance / 2 - _GAP), distance / 2
            if self.compat == "fixed":
                left, radius = min(left, store.radius(met)), min(radius, self.radius)
            store.set_radius(met, left)
        store.set_radius(number, radius)
        if self.compat == "fixed":
            self._release(number)

    def _release(self, founder: int) -> None:
        """Give balls of their own to edits that a new ball cuts off from the ball they joined."""
        joined = [number for number, cell in enumerate(self.cells) if cell not in (number, _UNKNOWN)]
        to_new = (self.store.keys[joined] - self.store.keys[founder]).norm(dim=1).tolist()
        for number, distance in zip(joined, to_new, strict=True):
            cell, own = self.cells[number], self._distances[number]
            if cell != number and (own > self.store.radius(cell) or distance <= own):
                self.store.set_radius(number, min(self.radius, distance / 2))
                self.cells[number] = number
                self._release(number)

    # --- saving ---------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            "keys": self.store.keys,
            "radii": self.store.radii,
            "cells": torch.tensor(self.cells, dtype=torch.long),
            "origins": torch.tensor(self.origins, dtype=torch.long),
            "met": torch.tensor(self._met, dtype=torch.long),
            "distances": torch.tensor(self._distances, dtype=torch.float64),
        }
        settings = {
            "width": self.width,
            "radius": self.radius,
            "compat": self.compat,
            "expand": self.expand,
            "owners": self.owners,
            "labels": self.labels,
        }
        return tensors, settings

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        router = cls(settings["width"], settings["radius"], settings["compat"], expand=settings["expand"])
        router.store.load(tensors["keys"], tensors["radii"])
        router.owners = list(settings["owners"])
        router.labels = [tuple(label) for label in settings["labels"]]
        router.cells, router.origins = tensors["cells"].tolist(), tensors["origins"].tolist()
        router._met, router._distances = tensors["met"].tolist(), tensors["distances"].tolist()
        return router

    def __repr__(self) -> str:
        return f"DistanceRouter({len(self)} keys of width {self.width}, first radius {self.radius:.4g})"
