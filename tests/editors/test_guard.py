"""The guard: what it measures, what it calls a collapse, and that a batch that is taken back leaves nothing behind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.adapters import DeltaAdapter, WeightChange
from errata.datasets.builtin import held_out_texts
from errata.edit import Edit
from errata.editors import guard as module
from errata.editors.base import Editor, EditorConfig, Written
from errata.editors.guard import Guard, GuardRecord, guard_summary, guard_words
from errata.editors.memoir import Memoir
from errata.errors import ConfigError, NumericsError
from errata.model import EditableModel
from errata.model.anatomy import weight_of
from errata.progress import Progress
from errata.testing import tiny_model

PROMPT = "The capital of France is"


@dataclass(frozen=True, kw_only=True)
class PushConfig(EditorConfig):
    """Settings of `Push`."""

    condition: float | None = None


class Push(Editor[PushConfig]):
    """Adds a random change of rank eight to the first MLP, as long as an edit's target says, in norms of the weight."""

    name = "push"
    summary = "a random change of the first MLP"
    paper = "none"
    Config = PushConfig
    writes_jointly = True

    @property
    def path(self) -> str:
        return self.model.anatomy.mlp_output[0]

    def _new_adapter(self) -> DeltaAdapter:
        return DeltaAdapter.for_layers(self.model, [self.path], self.name, self.config.to_record())

    def _write(self, edits: Sequence[Edit], progress: Progress) -> Written:
        assert isinstance(self.adapter, DeltaAdapter)
        self.adapter.notes.setdefault("given", []).extend(edit.id for edit in edits)
        weight = weight_of(self.model.module(self.path)).float()
        for edit in edits:
            if edit.target == "nothing":
                raise NumericsError("it cannot be written")
            generator = torch.Generator().manual_seed(len(edit.id))
            left, right = (torch.randn(size, 8, generator=generator) for size in weight.shape)
            left *= float(edit.target) * weight.norm() / (left @ right.T).norm()
            residue = 1e-3 * torch.randn(weight.shape, generator=generator)
            self.adapter.add([WeightChange(self.path, (edit.id,), left, right)], {self.path: residue})
        return Written((None,) * len(edits), condition=self.config.condition)


def edit(strength: float | str, edit_id: str = "a") -> Edit:
    return Edit(id=edit_id, prompt=f"{PROMPT} {edit_id}", target=str(strength))


@pytest.fixture(scope="module")
def _atlas() -> EditableModel:
    return EditableModel.load("atlas")


@pytest.fixture
def atlas(_atlas: EditableModel) -> Iterator[EditableModel]:
    """atlas, free of adapters before and after."""
    yield _atlas
    for adapter in list(_atlas.adapters.values()):
        adapter.detach()


def content(editor: Editor[Any]) -> tuple[dict[str, Tensor], str, list[Edit], int]:
    """All that an adapter holds, copied."""
    tensors, state = editor.adapter._state()
    copied = {name: tensor.clone() for name, tensor in tensors.items()}
    return copied, json.dumps(state), editor.adapter.edits(), editor.adapter.memory_version


def same(first: tuple[dict[str, Tensor], str, list[Edit], int], second: Any) -> bool:
    return (
        first[0].keys() == second[0].keys()
        and all(torch.equal(tensor, second[0][name]) for name, tensor in first[0].items())
        and first[1:] == second[1:]
    )


def logits(model: EditableModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.forward(model.batch([model.passage(PROMPT), model.passage("Once there was")])).logits
    return found


def test_a_harmless_batch_is_ok_and_its_record_says_what_was_measured(atlas: EditableModel) -> None:
    editor = Push(atlas)
    outcome = editor.edit([edit(0.3)])
    (record,) = outcome.guard
    assert (record.verdict, record.kept, record.reasons, record.edit_ids) == ("ok", True, (), ("a",))
    assert record.relative_norms == {c.module: c.relative_norm for c in outcome.changes}
    assert record.relative_norms[editor.path] == pytest.approx(0.3, rel=0.05)
    text = held_out_texts(301)[300]
    assert record.perplexity == atlas.perplexity([text])
    with atlas.bare():
        assert record.base_perplexity == atlas.perplexity([text])
    assert "guard: of 1 batches 1 ok" in outcome.summary()


def test_a_collapse_is_taken_back_bit_for_bit_and_editing_goes_on(atlas: EditableModel) -> None:
    editor = Push(atlas)
    editor.edit([edit(0.2), edit(0.1, "bb")])
    before, said = content(editor), logits(atlas)
    outcome = editor.edit([edit(4.0, "ccc")])
    (record,) = outcome.guard
    assert (record.verdict, record.kept) == ("collapse", False)
    assert record.perplexity is not None
    assert record.base_perplexity is not None
    assert record.perplexity > 1.5 * record.base_perplexity
    assert not outcome.applied
    (refused,) = outcome.refused
    assert refused.edit_id == "ccc"
    assert "nothing was changed: the perplexity of plain prose is" in refused.reason
    assert "--force" in refused.reason
    assert same(before, content(editor))
    assert torch.equal(said, logits(atlas))

    later = editor.edit([edit(0.2, "dddd")])
    assert [one.edit_id for one in later.applied] == ["dddd"]
    went_on = content(editor), logits(atlas)
    editor.adapter.detach()
    other = Push(atlas)
    other.edit([edit(0.2), edit(0.1, "bb"), edit(0.2, "dddd")])
    assert same(went_on[0], content(other))
    assert torch.equal(went_on[1], logits(atlas))


def test_a_whole_batch_is_taken_back_together(atlas: EditableModel) -> None:
    editor = Push(atlas, batch_size=2)
    base = logits(atlas)
    outcome = editor.edit([edit(0.1), edit(4.0, "bb"), edit(0.1, "ccc")])
    assert [one.edit_id for one in outcome.refused] == ["a", "bb"]
    assert [one.id for one in editor.adapter.edits()] == ["ccc"]
    assert [record.edit_ids for record in outcome.guard] == [("a", "bb"), ("ccc",)]
    editor.adapter.revert("ccc")
    assert torch.equal(base, logits(atlas))


def test_a_batch_that_takes_an_older_edits_place_leaves_it_there_when_it_is_taken_back(atlas: EditableModel) -> None:
    editor = Push(atlas)
    editor.edit([edit(0.1)])
    outcome = editor.edit([edit(4.0)])
    assert not outcome.superseded
    assert [one.target for one in editor.adapter.edits()] == ["0.1"]


@pytest.mark.parametrize(("settings", "force"), [({}, True), ({"guard": "warn"}, False)])
def test_a_collapse_is_kept_where_that_is_wanted(atlas: EditableModel, settings: dict[str, Any], force: bool) -> None:
    editor = Push(atlas, **settings)
    outcome = editor.edit([edit(4.0)], force=force)
    assert [one.edit_id for one in outcome.applied] == ["a"]
    assert [(record.verdict, record.kept) for record in outcome.guard] == [("collapse", True)]
    assert "1 collapse" in outcome.summary()
    assert "taken back" not in outcome.summary()


def test_between_ok_and_collapse_there_is_a_warning(atlas: EditableModel) -> None:
    (record,) = Push(atlas).edit([edit(1.55)]).guard
    assert (record.verdict, record.kept) == ("warn", True)
    assert any("perplexity" in reason for reason in record.reasons)
    assert any("became longer by 1.5" in reason for reason in record.reasons)


def test_the_growth_of_one_batch_counts_not_that_of_all(atlas: EditableModel) -> None:
    editor = Push(atlas, guard="warn")
    outcome = editor.edit([edit(0.8, "a" * n) for n in range(1, 4)])
    assert outcome.changes[0].relative_norm > 1.2
    assert not any("became longer" in reason for record in outcome.guard for reason in record.reasons)


def test_off_means_that_nothing_is_measured(atlas: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Push(atlas, guard="off")
    monkeypatch.setattr(EditableModel, "perplexity", None)
    outcome = editor.edit([edit(4.0)])
    assert outcome.applied
    assert not outcome.guard
    assert "guard" not in outcome.summary()
    with pytest.raises(ConfigError, match="setting guard is 'maybe'; expected 'refuse' or 'warn' or 'off'"):
        Push(atlas, guard="maybe")


@pytest.mark.parametrize(
    ("condition", "verdict"),
    [(1e7, "ok"), (1e9, "warn"), (1e17, "collapse"), (math.inf, "collapse"), (math.nan, "collapse")],
)
def test_what_a_solve_says_of_itself_is_heard(condition: float, verdict: str) -> None:
    editor = Push(tiny_model("llama"), condition=condition)
    (record,) = editor.edit([edit(0.1)]).guard
    assert record.verdict == verdict
    assert json.dumps(record.to_record(), allow_nan=False)


def test_where_nothing_was_learnt_perplexity_only_has_to_be_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model finds prose less likely than chance: that it does so even more is no collapse."""
    model = tiny_model("llama")
    found: Iterator[float] = iter([500.0, 500.0, 5000.0, math.inf])  # twice the base, with one text and with all
    monkeypatch.setattr(EditableModel, "perplexity", lambda *_, **__: next(found))
    editor = Push(model)
    first, second = (editor.edit([edit(0.1, name)]).guard[0] for name in ("a", "bb"))
    assert (first.verdict, second.verdict) == ("ok", "collapse")
    assert second.reasons == ("the perplexity of plain prose is no finite number any more",)
    assert second.perplexity is None


def test_weights_that_overflow_are_a_collapse() -> None:
    model = tiny_model("llama")
    outcome = Push(model).edit([edit(1e30)])
    assert outcome.guard[0].verdict == "collapse"
    assert "is not finite" in outcome.guard[0].reasons[0]
    assert outcome.guard[0].to_record()["relative_norms"] == {model.anatomy.mlp_output[0]: None}


def test_all_texts_are_read_only_where_the_first_gives_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    answers = {"base": 100.0, "first": 104.0, "all": 130.0}

    def perplexity(model: EditableModel, texts: Sequence[str], max_length: int) -> float:
        if model.sequences.is_suspended:
            return answers["base"]
        read.append(len(texts))
        return answers["first" if len(texts) == 1 else "all"]

    monkeypatch.setattr(EditableModel, "perplexity", perplexity)
    editor = Push(tiny_model("llama"))
    assert editor.edit([edit(0.1)]).guard[0].verdict == "ok"
    assert read == [1]
    answers["first"] = 106.0
    assert editor.edit([edit(0.1, "bb")]).guard[0].verdict == "warn"
    assert read == [1, 1, 12]


def test_a_batch_that_cannot_be_written_leaves_no_record(atlas: EditableModel) -> None:
    outcome = Push(atlas).edit([edit("nothing"), edit(0.1, "bb")])
    assert [one.edit_id for one in outcome.refused] == ["a"]
    assert [record.edit_ids for record in outcome.guard] == [("bb",)]


def test_other_adapters_do_not_count(atlas: EditableModel) -> None:
    """The damage that one adapter did is not held against the next."""
    Push(atlas, guard="off").edit([edit(4.0)])
    beside = Push(atlas)
    assert beside.edit([edit(0.1, "bb")]).guard[0].verdict == "ok"


def test_adapters_with_a_router_are_not_guarded() -> None:
    editor = Memoir(tiny_model("llama"), layer=1, steps=5, contexts=0, threshold=0.6)
    assert not editor.adapter.changes_weights
    assert Push(tiny_model("llama")).adapter.changes_weights
    assert not editor.edit([Edit(prompt=PROMPT, target="Rome")]).guard


def test_many_batches_in_one_line() -> None:
    def record(verdict: Any, kept: bool = True, **reasons: Any) -> GuardRecord:
        return GuardRecord(("a",), verdict, kept, tuple(reasons), {}, 2.0, 1.0, None)

    records = [record("ok"), record("warn", first=1), record("warn", second=1), record("ok")]
    assert guard_summary([]) is None
    found = guard_summary(records)
    assert found is not None
    assert (found["batches"], found["ok"], found["warn"], found["collapse"]) == (4, 2, 2, 0)
    assert (found["verdict"], found["reasons"]) == ("warn", ("second",))
    assert guard_words(records) == "guard: of 4 batches 2 ok, 2 warn; second"
    assert guard_words([record("collapse", False, boom=1)]) == "guard: of 1 batches 1 collapse, 1 taken back; boom"


def test_the_guard_reads_other_texts_than_evaluation_does(atlas: EditableModel) -> None:
    editor = Push(atlas)
    texts = Guard(atlas, editor.adapter)._texts
    assert len(texts) == module._TEXTS
    assert not set(texts) & set(held_out_texts())
