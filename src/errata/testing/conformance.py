"""What every editing method must do, as checks that built-in and third-party methods run alike.

    from errata.testing import check_editor
    check_editor(lambda model: MyEditor(model, steps=50), families=("llama", "gpt2"))

With pytest, one test per check (see docs/add-a-method.md):

    @pytest.mark.parametrize("check", conformance_checks(), ids=lambda check: check.__name__)
    def test_contract(check): check(Case(make_editor, "llama", tmp_path))

Every check runs on a tiny random model in seconds. `expected_failures={check_name: reason}` is for honest exceptions.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.adapters import Adapter, AutoAdapter, RoutedAdapter
from errata.edit import Edit
from errata.editors import Editor, EditOutcome
from errata.errors import ArtifactError, BaseMismatchError, ErrataError
from errata.model import EditableModel
from errata.model.scoring import forced_answers
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

    _edited: ClassVar[dict[tuple[Any, str], tuple[Path, EditOutcome]]] = {}

    def __init__(self, make_editor: MakeEditor, family: str = "llama", folder: Path | None = None) -> None:
        self.make_editor, self.family = make_editor, family
        self.folder = folder or Path(tempfile.mkdtemp(prefix="errata-"))

    def model(self, seed: int = 0) -> EditableModel:
        return tiny_model(self.family, seed)

    def _edit_once(self) -> tuple[Path, EditOutcome]:
        key = (self.make_editor, self.family)
        if key not in Case._edited:
            editor = self.make_editor(self.model())
            outcome = editor.edit(EDITS)
            place = Path(tempfile.mkdtemp(prefix="errata-edited-"))
            editor.adapter.save_pretrained(place)
            Case._edited[key] = (place, outcome)
        return Case._edited[key]

    @property
    def saved(self) -> Path:
        """Folder of an adapter that holds `EDITS`."""
        return self._edit_once()[0]

    @property
    def outcome(self) -> EditOutcome:
        return self._edit_once()[1]

    @cached_property
    def edited(self) -> tuple[EditableModel, Adapter]:
        """A fresh model with the edited adapter attached."""
        model = self.model()
        return model, AutoAdapter.from_pretrained(self.saved, model=model)


@torch.no_grad()
def _logits(model: EditableModel, prompts: Sequence[str], side: Any = "left") -> list[Tensor]:
    """Logits behind the last token of every prompt, run as one batch."""
    batch = model.batch([model.passage(prompt) for prompt in prompts], side=side)
    logits = model.forward(batch).logits
    ends = batch.starts + batch.mask.sum(1) - 1
    return [logits[row, end] for row, end in enumerate(ends.tolist())]


def _close(first: Sequence[Tensor], second: Sequence[Tensor], what: str, tolerance: float = 1e-4) -> None:
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        worst = float((a - b).abs().max())
        _check(worst < tolerance, f"{what}: prompt {number} differs by {worst:.2e}")


def _same(first: Sequence[Tensor], second: Sequence[Tensor], what: str) -> None:
    _check(all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), f"{what}: logits are not bit-identical")


def _generate(model: EditableModel, prompts: Sequence[str], **kwargs: Any) -> list[list[int]]:
    """Plain `generate` of the Hugging Face model over a left-padded batch: new tokens only."""
    batch = model.batch([model.passage(prompt) for prompt in prompts], side="left")
    output = model.model.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=model.tokenizer.pad_token_id,
        **kwargs,
    )
    found: list[list[int]] = output[:, batch.ids.shape[1] :].tolist()
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
        _check(adapter.explain([edit.prompt])[0].edit_id != edit.id, "its prompt is still routed to it")
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


def two_adapters(case: Case) -> None:
    """Two adapters on one model, taken off in either order, leave the base; each alone is as it was."""
    model = case.model()
    base = _logits(model, _PROMPTS)
    other_editor = case.make_editor(model)
    other_editor.edit([Edit(prompt="Zed was born in", target="Berlin", subject="Zed")])
    other = other_editor.adapter
    other_alone = _logits(model, _PROMPTS)
    first = AutoAdapter.from_pretrained(case.saved, model=model)
    other.detach()
    first_alone = _logits(model, _PROMPTS)
    other.attach(model)
    first.detach()
    _same(other_alone, _logits(model, _PROMPTS), "the second adapter alone")
    other.detach()
    _same(base, _logits(model, _PROMPTS), "after taking both off")
    first.attach(model)
    _same(first_alone, _logits(model, _PROMPTS), "the first adapter alone")


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
    changed = Edit(prompt=EDITS[0].prompt, target="Berlin", subject=EDITS[0].subject)
    outcome = editor.edit([changed])
    _check(outcome.superseded == [(EDITS[0].id, changed.id)], f"superseded: {outcome.superseded}")
    _check([e.id for e in editor.adapter.edits()] == [changed.id], "the superseded edit is still listed")
    new, old = (model.passage(changed.prompt, target) for target in (changed.target, EDITS[0].target))
    answers = forced_answers(model, [new, old])
    _check(answers[0].probability > answers[1].probability, "the old target is still the likelier one")


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
    template = case.make_editor(case.model())
    config = template.config
    fields = {f.name for f in dataclasses.fields(config)}
    if "full_forward" not in fields:
        return
    # A few steps: over hundreds, an optimiser that divides by the gradient's size amplifies rounding without bound.
    few = {"steps": min(10, config.steps)} if "steps" in fields else {}
    found = []
    for full in (False, True):
        model = case.model()
        editor = type(template)(model, dataclasses.replace(config, full_forward=full, **few))
        editor.edit(EDITS[:1])
        found.append(_logits(model, _PROMPTS))
    _close(found[0], found[1], "tail against full forward", 1e-3)


_CHECKS: tuple[Callable[[Case], None], ...] = (
    edits_take,
    detach_is_exact,
    save_and_load,
    loaded_equals_fresh,
    going_on_after_load,
    calls_equal_one_call,
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
    two_adapters,
    same_seed_same_adapter,
    empty_list,
    same_prompt_again,
    unusual_targets,
    prompt_without_subject,
    wrong_base_is_refused,
    damaged_file_is_refused,
    tail_equals_full,
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
    """
    expected = dict(expected_failures or {})
    problems = []
    for family in families:
        for check in _CHECKS:
            try:
                check(Case(make_editor, family))
            except AssertionError as error:
                if check.__name__ not in expected:
                    problems.append(f"{check.__name__} on {family}: {error}")
            else:
                if check.__name__ in expected:
                    problems.append(f"{check.__name__} on {family} was expected to fail and passed")
    if problems:
        raise AssertionError("\n".join(problems))
