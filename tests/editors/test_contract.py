"""The contract suite: every registered editor, several families, every check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.editors import Editor, editor_class, editor_names
from errata.model import EditableModel
from errata.testing import Case, conformance_checks

# Llama; transposed weights and absolute positions; norms behind the MLP and capped logits; tokens flattened inside;
# attention and MLP side by side, with biases; one head of keys and values for all.
FAMILIES = ("llama", "gpt2", "gemma2", "opt", "gptj", "falcon")

# Methods for which these are no models.
FAMILIES_OF = {"memoryllm": ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")}

# Checks of which a part is the hold that an edit has, where that comes with training and not with writing: a random
# model does not come to know what it reads. The rest of each is asked in the method's own tests.
NEEDS_TRAINING = {
    "memoryllm": {
        "edits_take",
        "revert_one",
        "same_prompt_again",
        "there_and_back",
        "conflict_in_a_batch",
        "unrelated_prompts_are_apart",
        "half_precision",
    }
}

# Settings under which random models of width 32 can be taught at all.
_LOCATED = {
    "layers": (1,),
    "learning_rate": 0.4,
    "steps": 60,
    "clamp": 200.0,
    "contexts": 0,
    "kl_factor": 0.0,
    "weight_decay": 0.0,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "alphaedit": {**_LOCATED, "tokens_per_width": 12.0, "threshold": 0.3, "ridge": 1e-4},
    "emmet": {**_LOCATED, "tokens_per_width": 4.0},
    "memit": {**_LOCATED, "tokens_per_width": 4.0, "preservation": 1.0},
    "grace": {"layer": 1, "radius": 0.3, "learning_rate": 0.3, "steps": 80},
    "ft": {"learning_rate": 5e-3, "steps": 100},
    "rome": {
        "tokens_per_width": 4.0,
        "learning_rate": 0.5,
        "steps": 40,
        "clamp": 200.0,
        "contexts": 0,
        "kl_factor": 0.0,
        "weight_decay": 0.0,
    },
    "lora": {"targets": "attention", "layers": (2,), "learning_rate": 5e-3, "steps": 40},
    "simie": {
        "inner": "rome",
        "inner_settings": {**{k: v for k, v in _LOCATED.items() if k != "layers"}, "layer": 1, "tokens_per_width": 4.0},
        "ridge": 1e-3,
    },
    "ultraedit": {"layers": (1,), "learning_rate": 2e-2, "steps": 30, "batch_size": 1},
    "serac": {"encoder": "words", "threshold": 0.9},
    "melo": {"layer": 1, "radius": 0.3, "learning_rate": 0.1, "steps": 80},
    "memoir": {"layer": 1, "steps": 50, "learning_rate": 5.0, "contexts": 2},
    "memoryllm": {"network": "untrained"},
    "mend": {"network": "untrained", "step": 0.03},
    "wise": {
        "layer": 1,
        "steps": 60,
        "learning_rate": 0.3,
        "contexts": 0,
        "irrelevant": 100,
        "mask_density": 1.0,
        "margin_scale": 2.0,
    },
}


def make(name: str) -> Callable[[EditableModel], Editor[Any]]:
    def make_editor(model: EditableModel) -> Editor[Any]:
        editor: Editor[Any] = editor_class(name)(model, **SETTINGS.get(name, {}))
        return editor

    return make_editor


MAKERS = {name: make(name) for name in editor_names()}


@pytest.mark.parametrize("check", conformance_checks(), ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name in sorted(MAKERS) for family in FAMILIES_OF.get(name, FAMILIES)]
)
def test_contract(name: str, family: str, check: Callable[[Case], None], tmp_path: Path) -> None:
    if check.__name__ in NEEDS_TRAINING.get(name, ()):
        pytest.skip(f"{name} learns by reading only where the model was trained to")
    check(Case(MAKERS[name], family, tmp_path))


@pytest.mark.parametrize("check", conformance_checks(), ids=lambda check: check.__name__)
@pytest.mark.parametrize("family", ["t5", "llava"])
def test_contract_of_memoir_on_other_kinds_of_models(
    family: str, check: Callable[[Case], None], tmp_path: Path
) -> None:
    check(Case(MAKERS["memoir"], family, tmp_path))
