"""What every editing method must do, as checks that built-in and third-party methods run alike.

    from errata.testing import check_editor
    check_editor(lambda model: MyEditor(model, steps=50), families=("llama", "gpt2"))

With pytest, one test per check (see docs/add-a-method.md):

    @pytest.mark.parametrize("check", conformance_checks(), ids=lambda check: check.__name__)
    def test_contract(check): check(Case(make_editor, "llama", tmp_path))

Every check runs on a tiny random model in seconds. `expected_failures={check_name: reason}` is for honest exceptions.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.adapters import Adapter, AutoAdapter, RoutedAdapter
from errata.edit import Edit
from errata.editors import Editor, EditOutcome, editor_class, editor_names
from errata.errors import ArtifactError, BaseMismatchError, ConfigError, ErrataError, unknown_name
from errata.model import EditableModel
from errata.model.generation import continued
from errata.model.scoring import forced_answers
from errata.model.sequences import BASE
from errata.testing.models import tiny_model

__all__ = ["EDITS", "UNRELATED", "Case", "check_editor", "conformance_checks"]

MakeEditor = Callable[[EditableModel], Editor[Any]]

# The subject stands last: in a random model nothing carries it from the middle of a prompt to its end.
EDITS = (
    Edit(prompt="The capital of France", target="Rome", subject="France"),
    Edit(prompt="Bob wrote Hamlet", target="Alice", subject="Hamlet"),
    Edit(prompt="The flute of Ann", target="piano", subject="Ann"),
)
UNRELATED = ("Berlin was", "Zed was born in", "x")
_PROMPTS = (*(edit.prompt for edit in EDITS), *UNRELATED, "The capital of Spain")
# EDITS[0] with another target, and an edit that has nothing to do with any of them.
_REVISED = Edit(prompt=EDITS[0].prompt, target="Berlin", subject=EDITS[0].subject)
_ELSEWHERE = Edit(prompt="Zed was born in", target="Berlin", subject="Zed")

# Settings under which the built-in methods write something into a tiny model at once; nothing need take.
_COMPANIONS: dict[str, dict[str, Any]] = {
    "alphaedit": {"layers": (1,), "steps": 5, "contexts": 0, "tokens_per_width": 12.0},
    "emmet": {"layers": (1,), "steps": 5, "contexts": 0, "tokens_per_width": 2.0},
    "ft": {"steps": 5},
    "grace": {"steps": 5, "radius": 0.3},
    "melo": {"steps": 5, "radius": 0.3},
    "lora": {"steps": 5},
    "memit": {"layers": (1,), "steps": 5, "contexts": 0, "tokens_per_width": 2.0},
    "memoir": {"steps": 5, "contexts": 0, "threshold": 0.3},
    "memoryllm": {"network": "untrained"},
    "mend": {"network": "untrained", "step": 0.03},
    "rome": {"steps": 5, "contexts": 0, "tokens_per_width": 2.0},
    "serac": {"encoder": "words", "threshold": 0.9},
    "simie": {"inner_settings": {"steps": 5, "contexts": 0, "tokens_per_width": 2.0}},
    "wise": {"steps": 5, "contexts": 0, "learning_rate": 0.1},
}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


class Case:
    """One editor on one family. Editing is done once per process and reloaded from disk by every check after that.

    Args:
        make_editor: builds the editor for a model; settings that suit tiny models belong there.
        family: see `errata.testing.models.FAMILIES`.
        folder: for scratch files; a temporary one if not given.
    """

    _edited: ClassVar[dict[tuple[Any, str], tuple[tempfile.TemporaryDirectory[str], EditOutcome]]] = {}

    def __init__(self, make_editor: MakeEditor, family: str = "llama", folder: Path | None = None) -> None:
        self.make_editor, self.family = make_editor, family
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="errata-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder = folder

    def model(self, seed: int = 0) -> EditableModel:
        return tiny_model(self.family, seed)

    def _edit_once(self, key: Any, make_editor: MakeEditor, edits: Sequence[Edit]) -> tuple[Path, EditOutcome]:
        if (key, self.family) not in Case._edited:
            editor = make_editor(self.model())
            outcome = editor.edit(edits)
            place = tempfile.TemporaryDirectory(prefix="errata-edited-")
            editor.adapter.save_pretrained(place.name)
            Case._edited[key, self.family] = (place, outcome)
        place, outcome = Case._edited[key, self.family]
        return Path(place.name), outcome

    @classmethod
    def forget(cls, make_editor: MakeEditor | None = None) -> None:
        """Delete what was edited once with this editor, or with any; done at the end of the process too."""
        for key in [key for key in cls._edited if make_editor is None or key[0] is make_editor]:
            cls._edited.pop(key)[0].cleanup()

    def companion(self, name: str) -> Path:
        """Folder of an adapter of a registered method, which holds an edit of its own."""

        def make(model: EditableModel) -> Editor[Any]:
            editor: Editor[Any] = editor_class(name)(model, **_COMPANIONS.get(name, {}))
            return editor

        return self._edit_once(("companion", name), make, [_ELSEWHERE])[0]

    @property
    def saved(self) -> Path:
        """Folder of an adapter that holds `EDITS`."""
        return self._edit_once(self.make_editor, self.make_editor, EDITS)[0]

    @property
    def outcome(self) -> EditOutcome:
        return self._edit_once(self.make_editor, self.make_editor, EDITS)[1]

    @cached_property
    def edited(self) -> tuple[EditableModel, Adapter]:
        """A fresh model with the edited adapter attached."""
        model = self.model()
        return model, AutoAdapter.from_pretrained(self.saved, model=model)

    def editor_with(self, model: EditableModel, **settings: Any) -> Editor[Any]:
        """The editor with some settings changed."""
        template = self.make_editor(model)
        template.adapter.detach()
        return type(template)(model, dataclasses.replace(template.config, **settings))


atexit.register(Case.forget)


@torch.no_grad()
def _logits(model: EditableModel, prompts: Sequence[str], side: Any = "left") -> list[Tensor]:
    """Logits of what comes first behind every prompt, run as one batch."""
    batch = model.batch([model.passage(prompt) for prompt in prompts], side=side)
    logits = model.forward(batch).logits
    return [logits[row, column] for row, column in enumerate(batch.next_columns().tolist())]


def _close(first: Sequence[Tensor], second: Sequence[Tensor], what: str, tolerance: float = 1e-4) -> None:
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        worst = float((a - b).abs().max())
        _check(worst < tolerance, f"{what}: prompt {number} differs by {worst:.2e}")


def _same(first: Sequence[Tensor], second: Sequence[Tensor], what: str) -> None:
    _check(all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), f"{what}: logits are not bit-identical")


def _generate(model: EditableModel, prompts: Sequence[str], **kwargs: Any) -> list[list[int]]:
    """Plain `generate` of the Hugging Face model over a left-padded batch: six new tokens each, whatever they are."""
    batch = model.batch([model.passage(prompt) for prompt in prompts], side="left")
    found: list[list[int]] = continued(model, batch, max_new_tokens=6, **kwargs).tolist()
    return found


def edits_take(case: Case) -> None:
    """Every edit is applied, makes its target likelier, and most are then the model's first choice."""
    outcome = case.outcome
    _check(not outcome.refused, f"refused: {outcome.refused}")
    _check(len(outcome.applied) == len(EDITS), "not every edit was applied")
    for edit in outcome.applied:
        _check(edit.probability_after > edit.probability_before, f"{edit.edit_id} is no likelier than before")
    took = sum(edit.took for edit in outcome.applied)
    _check(2 * took > len(EDITS), f"only {took} of {len(EDITS)} edits took; give settings that suit tiny models")
    _check(bool(outcome.changes) and all(c.norm > 0 for c in outcome.changes), "the outcome names no changed layer")
    _check(outcome.memory_version > 0, "the memory version did not grow")


def detach_is_exact(case: Case) -> None:
    """Detached, the model is bit-identical; attached, its parameters are too, under the same names."""
    model = case.model()
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    logits = _logits(model, _PROMPTS)
    adapter = AutoAdapter.from_pretrained(case.saved, model=model)
    attached = model.model.state_dict()
    _check(list(attached) == list(before), "attaching changed the names in the state dict")
    _check(all(torch.equal(attached[name], before[name]) for name in before), "attaching changed a base parameter")
    _check(any(not torch.equal(a, b) for a, b in zip(logits, _logits(model, _PROMPTS), strict=True)), "no effect")
    adapter.detach()
    _same(logits, _logits(model, _PROMPTS), "after detach")
    _check("generate" not in vars(model.model), "generate is still wrapped after detach")
    _check(not model.module(model.anatomy.trunk)._forward_pre_hooks, "a hook is left after detach")


def save_and_load(case: Case) -> None:
    """A loaded adapter gives identical logits and explanations, and saves to the same content again."""
    model, adapter = case.edited
    logits, explained = _logits(model, _PROMPTS), adapter.explain(_PROMPTS)
    again = case.folder / "again"
    adapter.save_pretrained(again)
    adapter.detach()
    loaded = AutoAdapter.from_pretrained(again, model=model)
    _same(logits, _logits(model, _PROMPTS), "after save and load")
    _check(loaded.explain(_PROMPTS) == explained, "explanations differ after save and load")
    _check(loaded.edits() == adapter.edits(), "edits differ after save and load")
    _check(loaded.memory_version == adapter.memory_version, "the memory version was not kept")


def loaded_equals_fresh(case: Case) -> None:
    """What was saved acts exactly like the editor's own adapter."""
    model = case.model()
    editor = case.make_editor(model)
    editor.edit(EDITS)
    fresh = _logits(model, _PROMPTS)
    editor.adapter.detach()
    AutoAdapter.from_pretrained(case.saved, model=model)
    _same(fresh, _logits(model, _PROMPTS), "fresh against loaded")


def going_on_after_load(case: Case) -> None:
    """Two edits, a save, a load and a third edit end where three edits in one go do."""
    model = case.model()
    first = case.make_editor(model)
    first.edit(EDITS[:2])
    place = case.folder / "half"
    first.adapter.save_pretrained(place)
    first.adapter.detach()
    second = type(first)(model, adapter=AutoAdapter.from_pretrained(place))
    second.edit(EDITS[2:])
    whole, _ = case.edited
    _same(_logits(whole, _PROMPTS), _logits(model, _PROMPTS), "in one go against in two")


def taken_back(case: Case) -> None:
    """What changes weights can be set back to an earlier state, bit for bit, while it is attached; further edits then
    end where they would without what came between."""
    model = case.model()
    editor = case.make_editor(model)
    adapter = editor.adapter
    if not adapter.changes_weights:  # no batch of a routed method is taken back
        return
    editor.edit(EDITS[:1])
    tensors, state = adapter._state()
    before = {name: tensor.clone() for name, tensor in tensors.items()}, json.dumps(state), adapter.memory_version
    logits, restore = _logits(model, _PROMPTS), adapter.snapshot()
    editor.edit([EDITS[1]])
    restore()
    tensors, state = adapter._state()
    _check((json.dumps(state), adapter.memory_version) == before[1:], "what was set back has another state")
    _check(adapter.edits() == list(EDITS[:1]), "what was set back has other edits")
    _check(tensors.keys() == before[0].keys(), "what was set back has other tensors")
    _check(all(torch.equal(tensors[name], before[0][name]) for name in tensors), "a tensor was written to in place")
    _same(logits, _logits(model, _PROMPTS), "after setting back")
    editor.edit(EDITS[2:])
    other = case.model()
    plain = case.make_editor(other)
    for edits in (EDITS[:1], EDITS[2:]):
        plain.edit(edits)
    _same(_logits(other, _PROMPTS), _logits(model, _PROMPTS), "going on after setting back")


def revert_one(case: Case) -> None:
    """A reverted edit loses its hold, the receipt says how exactly; reverting an unknown edit is an error."""
    model, adapter = case.edited
    passages = [model.passage(edit.prompt, edit.target) for edit in EDITS]
    held = [answer.probability for answer in forced_answers(model, passages)]
    # The edit that holds best: later edits may have loosened an earlier one already.
    chosen = held.index(max(held))
    edit, passage, before = EDITS[chosen], passages[chosen : chosen + 1], held[chosen]
    version = adapter.memory_version
    result = adapter.revert(edit.id)
    _check(result.exactness in ("exact", "approximate") and bool(result.reason), "the receipt explains nothing")
    _check(adapter.memory_version > version, "the memory version did not grow")
    _check(not adapter.holds(edit.id), "the reverted edit is still listed")
    _check(forced_answers(model, passage)[0].probability < before, "the reverted edit is as likely as before")
    if isinstance(adapter, RoutedAdapter):
        now = adapter.explain([edit.prompt])[0]
        _check(now.score < 1.0, "what matches its prompt wholly is still stored")
        if now.fires:
            _check(now.edit_id is not None and adapter.holds(now.edit_id), f"its prompt is routed to {now.edit_id}")
        else:
            attached = _logits(model, [edit.prompt])
            with adapter.detached():
                _same(attached, _logits(model, [edit.prompt]), "its prompt matches nothing, yet something acts on it")
    try:
        adapter.revert(edit.id)
    except ErrataError:
        return
    raise AssertionError("reverting an edit twice was not refused")


def revert_all(case: Case) -> None:
    """With every edit reverted the base model is back, bit for bit, and editing can begin again."""
    model = case.model()
    base = _logits(model, _PROMPTS)
    adapter = AutoAdapter.from_pretrained(case.saved, model=model)
    for edit in reversed(EDITS):
        adapter.revert(edit.id)
    _check(not adapter.edits(), "edits are left")
    _same(base, _logits(model, _PROMPTS), "after reverting everything")


def batch_equals_singles(case: Case) -> None:
    """Edited, unedited and near-miss prompts in one batch give what each gives alone: logits and generations."""
    model, _ = case.edited
    alone = [_logits(model, [prompt])[0] for prompt in _PROMPTS]
    _close(_logits(model, _PROMPTS), alone, "batch against singles")
    together = _generate(model, _PROMPTS)
    _check(together == [_generate(model, [p])[0] for p in _PROMPTS], "generation depends on the batch")


def padding_is_neutral(case: Case) -> None:
    """Left padding, right padding and none give the same."""
    model, _ = case.edited
    alone = [_logits(model, [prompt])[0] for prompt in _PROMPTS]
    _close(_logits(model, _PROMPTS, "left"), alone, "left padding against none")
    _close(_logits(model, _PROMPTS, "right"), alone, "right padding against none")


def cache_is_neutral(case: Case) -> None:
    """Generation with and without a KV cache gives the same tokens."""
    model, _ = case.edited
    cached, uncached = _generate(model, _PROMPTS), _generate(model, _PROMPTS, use_cache=False)
    _check(cached == uncached, f"cached {cached} against uncached {uncached}")


def chunks_are_neutral(case: Case) -> None:
    """Reading the prompt in chunks gives the same tokens as reading it whole."""
    model, _ = case.edited
    # One prompt at a time: with padding, transformers itself gives chunks other masks.
    for prompt in _PROMPTS[:4]:
        whole, chunked = _generate(model, [prompt]), _generate(model, [prompt], prefill_chunk_size=2)
        _check(whole == chunked, f"{prompt!r}: whole {whole} against in chunks {chunked}")


def beams_are_neutral(case: Case) -> None:
    """Beam search in a batch equals beam search alone, with and without a cache."""
    model, _ = case.edited
    together = _generate(model, _PROMPTS[:4], num_beams=3)
    _check(together == [_generate(model, [p], num_beams=3)[0] for p in _PROMPTS[:4]], "beams depend on the batch")
    _check(together == _generate(model, _PROMPTS[:4], num_beams=3, use_cache=False), "beams depend on the cache")


def greedy_equals_teacher_forcing(case: Case) -> None:
    """Scoring the model's own greedy answer finds every token of it to be the first choice: nothing leaks."""
    model, _ = case.edited
    answers = _generate(model, _PROMPTS)
    passages = [model.passage(prompt) for prompt in _PROMPTS]
    with_answers = [dataclasses.replace(p, answer=tuple(a)) for p, a in zip(passages, answers, strict=True)]
    for prompt, answer, forced in zip(_PROMPTS, answers, forced_answers(model, with_answers), strict=True):
        _check(list(forced.predicted) == answer, f"{prompt!r}: said {answer}, forced {list(forced.predicted)}")


def train_and_eval(case: Case) -> None:
    """`train()` and `eval()` make no difference (the tiny models have no dropout)."""
    model, _ = case.edited
    evaluating = _logits(model, _PROMPTS)
    model.model.train()
    training = _logits(model, _PROMPTS)
    model.model.eval()
    _same(evaluating, training, "train() against eval()")


def two_models(case: Case) -> None:
    """Two models edited in one process do not touch each other."""
    model, _ = case.edited
    before = _logits(model, _PROMPTS)
    other = case.make_editor(case.model(seed=1))
    other.edit(EDITS[:1])
    _same(before, _logits(model, _PROMPTS), "after editing another model")


def beside_other_methods(case: Case) -> None:
    """Beside an adapter of every registered method: the order of attachment does not matter, and taking either off
    leaves exactly the other, taking both off exactly the base."""
    model = case.model()
    base = _logits(model, _PROMPTS)
    mine = AutoAdapter.from_pretrained(case.saved, model=model)
    mine_alone = _logits(model, _PROMPTS)
    mine.detach()
    for name in editor_names():
        if editor_class(name).unsuitable(model) is not None:  # not a method for this family
            continue
        other = AutoAdapter.from_pretrained(case.companion(name), model=model)
        other_alone = _logits(model, _PROMPTS)
        mine.attach(model)
        both = _logits(model, _PROMPTS)
        other.detach()
        _same(mine_alone, _logits(model, _PROMPTS), f"after an adapter of {name} that came first was taken off")
        other.attach(model)
        _close(both, _logits(model, _PROMPTS), f"attached before against behind an adapter of {name}")
        mine.detach()
        _same(other_alone, _logits(model, _PROMPTS), f"an adapter of {name} after this one was taken off")
        other.detach()
        _same(base, _logits(model, _PROMPTS), f"after taking off this adapter and one of {name}")


def mixed_traffic(case: Case) -> None:
    """Beside other adapters, and each sequence of a batch with its own: every sequence is answered as it is alone with
    only its own attached, greedily and with beams, with and without a KV cache."""
    model = case.model()
    adapters = {"mine": AutoAdapter.from_pretrained(case.saved)}
    adapters |= {name: AutoAdapter.from_pretrained(case.companion(name)) for name in ("ft", "memoir")}
    traffic: list[tuple[str, tuple[str, ...]]] = [
        (EDITS[0].prompt, ("mine",)),
        (f"Zed: {EDITS[0].prompt}", ("mine",)),
        (UNRELATED[0], ("mine",)),
        (EDITS[1].prompt, (BASE,)),
        (_ELSEWHERE.prompt, ("ft",)),
        (_ELSEWHERE.prompt, ("memoir",)),
        (EDITS[2].prompt, ("mine", "ft")),
    ]
    prompts, names = zip(*traffic, strict=True)
    modes: tuple[dict[str, Any], ...] = (
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
    )
    alone_logits, alone, bare = [], [], _logits(model, prompts)
    for prompt, own in traffic:
        attached = [adapter for name, adapter in adapters.items() if name in own]
        for adapter in attached:
            adapter.attach(model)
        alone_logits.append(_logits(model, [prompt])[0])
        alone.append([_generate(model, [prompt], **mode)[0] for mode in modes])
        for adapter in attached:
            adapter.detach()
    for own, logits, base in zip(names, alone_logits, bare, strict=True):
        if {"ft", "memoir"} & {*own}:
            _check(float((logits - base).abs().max()) > 1e-3, f"{own} does too little to be told from the base")
    for name, adapter in adapters.items():
        adapter.attach(model, name)
    with model.selecting(names):
        _close(_logits(model, prompts), alone_logits, "mixed traffic against alone", 1e-3)
    for number, mode in enumerate(modes):
        together = _generate(model, prompts, adapter_names=names, **mode)
        for prompt, own, found, expected in zip(prompts, names, together, alone, strict=True):
            _check(found == expected[number], f"{prompt!r} with {own} and {mode}: {found}, alone {expected[number]}")


def same_seed_same_adapter(case: Case) -> None:
    """The same seed gives the same adapter, and the process's own random state is not touched."""
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    editor = case.make_editor(case.model())
    editor.edit(EDITS)
    _check(torch.equal(state, torch.get_rng_state()), "editing moved torch's global random state")
    mine, _ = editor.adapter._state()
    saved, _ = AutoAdapter.from_pretrained(case.saved)._state()
    _check(mine.keys() == saved.keys(), "other tensors")
    _check(all(torch.equal(mine[name].cpu(), saved[name]) for name in mine), "other values")


def empty_list(case: Case) -> None:
    """No edits: an empty receipt, and a model that is bit-identical to the base."""
    model = case.model()
    base = _logits(model, _PROMPTS)
    outcome = case.make_editor(model).edit([])
    _check(not outcome.applied and not outcome.refused, "an empty list had an effect")
    _same(base, _logits(model, _PROMPTS), "after an empty list")


def same_prompt_again(case: Case) -> None:
    """The same edit twice is one edit; another target for the same prompt supersedes it, and the receipt says so."""
    model = case.model()
    editor = case.make_editor(model)
    editor.edit([EDITS[0], EDITS[0]])
    _check(len(editor.adapter.edits()) == 1, "the same edit is listed twice")
    outcome = editor.edit([_REVISED])
    _check(outcome.superseded == [(EDITS[0].id, _REVISED.id)], f"superseded: {outcome.superseded}")
    _check([e.id for e in editor.adapter.edits()] == [_REVISED.id], "the superseded edit is still listed")
    _check_in_force(model, _REVISED, EDITS[0])


def _check_in_force(model: EditableModel, edit: Edit, instead_of: Edit) -> None:
    passages = [model.passage(edit.prompt, target) for target in (edit.target, instead_of.target)]
    answers = forced_answers(model, passages)
    _check(answers[0].probability > answers[1].probability, f"{instead_of.target!r} is still likelier")


def there_and_back(case: Case) -> None:
    """An edit, another one, a revision of the first, and the first again: it is in force and the newest."""
    model = case.model()
    editor = case.make_editor(model)
    first, other = EDITS[:2]
    outcome = editor.edit([first, other, _REVISED, first])
    _check(outcome.superseded == [(first.id, _REVISED.id), (_REVISED.id, first.id)], f"{outcome.superseded}")
    _check([e.id for e in editor.adapter.edits()] == [other.id, first.id], "the list is not what is in force")
    _check_in_force(model, first, _REVISED)
    for edit in (first, other):
        editor.adapter.revert(edit.id)
    _check(not editor.adapter.edits(), "edits are left")


def conflict_in_a_batch(case: Case) -> None:
    """Of two edits of one batch with the same prompt the later one holds, and the receipt names the earlier."""
    model = case.model()
    editor = case.editor_with(model, batch_size=3)
    outcome = editor.edit([EDITS[0], EDITS[1], _REVISED])
    _check(not outcome.refused, f"refused {outcome.refused}")
    _check(outcome.superseded == [(EDITS[0].id, _REVISED.id)], f"superseded: {outcome.superseded}")
    _check([e.id for e in editor.adapter.edits()] == [EDITS[1].id, _REVISED.id], "the list is not what is in force")
    _check_in_force(model, _REVISED, EDITS[0])


def unrelated_prompts_are_apart(case: Case) -> None:
    """A prompt that has nothing to do with any edit is answered as before, or at least matches no edit as its own
    prompt does."""
    model, adapter = case.edited
    own = min(explained.score for explained in adapter.explain([edit.prompt for edit in EDITS]))
    edited = _generate(model, UNRELATED)
    explained = adapter.explain(UNRELATED)
    with adapter.detached():
        base = _generate(model, UNRELATED)
    for prompt, now, before, one in zip(UNRELATED, edited, base, explained, strict=True):
        _check(now == before or one.score < own, f"{prompt!r} is answered anew, and matches {one.edit_id} wholly")


def half_precision(case: Case) -> None:
    """In bfloat16 an edit is applied, or refused with a reason; the logits stay finite and detaching is bit-exact."""
    whole = case.model()
    model = EditableModel(whole.model.to(torch.bfloat16), whole.tokenizer, model_id="half")
    base = _logits(model, _PROMPTS)
    editor = case.make_editor(model)
    outcome = editor.edit(EDITS[:1])
    _check(len(outcome.applied) + len(outcome.refused) == 1, "the edit vanished")
    _check(all(refused.reason for refused in outcome.refused), "refused without a reason")
    _check(all(e.probability_after > e.probability_before for e in outcome.applied), "it is no likelier than before")
    _check(all(bool(torch.isfinite(logits).all()) for logits in _logits(model, _PROMPTS)), "logits are not finite")
    editor.adapter.detach()
    _same(base, _logits(model, _PROMPTS), "after detach")


def unusual_targets(case: Case) -> None:
    """A very long target and one outside ASCII are applied or refused with a reason, and the model stays finite."""
    model = case.model()
    editor = case.make_editor(model)
    long = Edit(prompt="Who was Zed?", target=" ".join(["Rome"] * 60), subject="Zed")
    foreign = Edit(prompt="The capital of Spain is", target="Zürich 東京 🙂", subject="Spain")
    outcome = editor.edit([long, foreign])
    _check(len(outcome.applied) + len(outcome.refused) == 2, "an edit vanished")
    _check(all(refused.reason for refused in outcome.refused), "refused without a reason")
    _check(all(bool(torch.isfinite(logits).all()) for logits in _logits(model, _PROMPTS)), "logits are not finite")


def prompt_without_subject(case: Case) -> None:
    """An edit whose subject is missing is refused by methods that need one, and applied by the others."""
    model = case.model()
    editor = case.make_editor(model)
    nameless = Edit(prompt="It was born in", target="Rome")
    wrong = Edit(prompt="It was born in", target="Rome", subject="Zanzibar", id="wrong")
    outcome = editor.edit([nameless, wrong, EDITS[1]])
    refused = {edit.edit_id: edit.reason for edit in outcome.refused}
    if editor.needs_subject:
        _check(refused.keys() == {nameless.id, "wrong"}, f"refused {list(refused)}")
        _check(all("subject" in reason for reason in refused.values()), "the reason does not speak of the subject")
    else:
        _check(not refused, f"refused {refused}")
    _check(editor.adapter.holds(EDITS[1].id), "a good edit beside bad ones was lost")


def wrong_base_is_refused(case: Case) -> None:
    """An adapter does not attach to other weights."""
    adapter = AutoAdapter.from_pretrained(case.saved)
    try:
        adapter.attach(case.model(seed=1))
    except BaseMismatchError:
        return
    raise AssertionError("the adapter attached to another base model")


def damaged_file_is_refused(case: Case) -> None:
    """One changed byte, a cut file or a missing one is noticed when loading."""
    _, adapter = case.edited
    for damage in ("byte", "cut", "missing"):
        place = case.folder / f"damaged-{damage}"
        adapter.save_pretrained(place)
        file = place / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        if damage == "byte":
            content[-1] ^= 1
            file.write_bytes(content)
        elif damage == "cut":
            file.write_bytes(content[: len(content) // 2])
        else:
            file.unlink()
        try:
            AutoAdapter.from_pretrained(place)
        except ArtifactError:
            continue
        raise AssertionError(f"a file with damage {damage!r} was loaded")


def calls_equal_one_call(case: Case) -> None:
    """Edits given one call each end where the same edits in one call do."""
    model = case.model()
    editor = case.make_editor(model)
    for edit in EDITS:
        editor.edit([edit])
    whole, _ = case.edited
    _same(_logits(whole, _PROMPTS), _logits(model, _PROMPTS), "one call each against one call")


def tail_equals_full(case: Case) -> None:
    """Training through the tail gives what training through whole forward passes gives."""
    config = case.make_editor(case.model()).config
    fields = {f.name for f in dataclasses.fields(config)}
    if "full_forward" not in fields:
        return
    # Few and small steps: large ones, or those of an optimiser that divides by the gradient's size, amplify rounding
    # without bound.
    few = {"steps": min(3, config.steps)} if "steps" in fields else {}
    if "learning_rate" in fields:
        few["learning_rate"] = config.learning_rate / 30
    found = []
    for full in (False, True):
        model = case.model()
        case.editor_with(model, full_forward=full, **few).edit(EDITS[:1])
        found.append(_logits(model, _PROMPTS))
    size = max(1.0, *(float(logits.abs().max()) for logits in found[1]))
    _close(found[0], found[1], "tail against full forward", 1e-3 * size)


_CHECKS: tuple[Callable[[Case], None], ...] = (
    edits_take,
    detach_is_exact,
    save_and_load,
    loaded_equals_fresh,
    going_on_after_load,
    calls_equal_one_call,
    taken_back,
    revert_one,
    revert_all,
    batch_equals_singles,
    padding_is_neutral,
    cache_is_neutral,
    chunks_are_neutral,
    beams_are_neutral,
    greedy_equals_teacher_forcing,
    train_and_eval,
    two_models,
    beside_other_methods,
    mixed_traffic,
    unrelated_prompts_are_apart,
    same_seed_same_adapter,
    empty_list,
    same_prompt_again,
    there_and_back,
    conflict_in_a_batch,
    unusual_targets,
    prompt_without_subject,
    wrong_base_is_refused,
    damaged_file_is_refused,
    tail_equals_full,
    half_precision,
)


def conformance_checks() -> tuple[Callable[[Case], None], ...]:
    """All checks, to be parametrised over."""
    return _CHECKS


def check_editor(
    make_editor: MakeEditor,
    *,
    families: Sequence[str] = ("llama", "gpt2"),
    expected_failures: Mapping[str, str] | None = None,
) -> None:
    """Run every check on every family.

    Args:
        expected_failures: check name -> why it cannot hold for this method. Such a check must fail; if it passes,
            that is reported too, so the list stays honest.

    Raises:
        AssertionError: naming each check and family that failed, with what was seen.
        ConfigError: there is no check of the name of an expected failure.
    """
    expected = dict(expected_failures or {})
    known = {check.__name__ for check in _CHECKS}
    for name in expected:
        if name not in known:
            raise ConfigError(unknown_name("check", name, known))
    problems = []
    try:
        for family in families:
            for check in _CHECKS:
                name = check.__name__
                with tempfile.TemporaryDirectory(prefix="errata-") as folder:
                    try:
                        check(Case(make_editor, family, Path(folder)))
                    except Exception as error:
                        if name not in expected:
                            # A failed check speaks for itself; anything else is named by its type.
                            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                            problems.append(f"{name} on {family}: {kind}{error}")
                    else:
                        if name in expected:
                            problems.append(f"{name} on {family} was expected to fail and passed")
    finally:
        Case.forget(make_editor)
    if problems:
        raise AssertionError("\n".join(problems))
