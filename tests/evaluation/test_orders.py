"""The same edits in several orders, and rows of several folders in one table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from errata.edit import Edit
from errata.editors.ft import FineTune
from errata.errors import ArtifactError, ConfigError
from errata.evaluation import Comparison
from errata.evaluation.joining import join_comparisons
from errata.evaluation.orders import OrderedComparisons, in_order
from errata.evaluation.provenance import tokenizer_settings
from errata.model import EditableModel
from errata.testing import tiny_model

FT: dict[str, Any] = {"learning_rate": 1e-2, "steps": 60}
EDITS = [
    Edit(
        prompt=f"The capital of {place}",
        target=target,
        rephrases=(f"{place} has",),
        locality=({"prompt": f"Who was {place}", "kind": "same_subject"},),
    )
    for place, target in (("France", "Rome"), ("Spain", "Paris"), ("Ann", "London"), ("Bob", "Alice"))
]


def ordered(folder: Path, seeds: list[int], **more: Any) -> OrderedComparisons:
    given = {"settings": {"ft": FT, "ft@still": {**FT, "steps": 1}}, "controls": False, "max_new_tokens": 3}
    return OrderedComparisons(
        tiny_model("llama"), ["ft", "ft@still"], EDITS, [2, 4], folder, seeds, texts=["Ann wrote Emma"], **given | more
    )


def test_an_order_follows_from_its_seed_and_keeps_cases_together() -> None:
    cases = [
        Edit.from_record({"id": f"{c}-{n}", "prompt": "p", "target": "t", "case_id": c})
        for c in range(9)
        for n in (0, 1)
    ]
    first, other = in_order(cases, 0), in_order(cases, 1)
    assert first == in_order(cases, 0)
    assert [e.id for e in first] != [e.id for e in other]
    for found in (first, other):
        assert sorted(e.id for e in found) == sorted(e.id for e in cases)
        assert all(b.id == f"{a.id[0]}-1" for a, b in zip(found[::2], found[1::2], strict=True))
    assert {e.id for e in in_order(EDITS, 3)} == {e.id for e in EDITS}


def test_every_order_has_rows_of_its_own_and_the_mean_has_a_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparisons = ordered(tmp_path, [0, 1, 2])
    rows = list(comparisons.run())
    assert [(r["method"], r["edits"], r["made"]["order_seed"]) for r in comparisons.chosen(rows)][:6] == [
        ("unedited", 2, 0),
        ("unedited", 4, 0),
        ("ft", 2, 0),
        ("ft", 4, 0),
        ("ft@still", 2, 0),
        ("ft@still", 4, 0),
    ]
    assert len(rows) == 18
    means = comparisons.means(rows)
    assert [(r["method"], r["edits"]) for r in means] == [
        (method, edits) for method in ("unedited", "ft", "ft@still") for edits in (2, 4)
    ]
    for mean in means:
        own = [r for r in rows if (r["method"], r["edits"]) == (mean["method"], mean["edits"])]
        values = [r["generalization"]["teacher_forced"] for r in own]
        assert mean["generalization"]["teacher_forced"] == pytest.approx(sum(values) / 3)
        values = [r["locality"]["generated"] for r in own]
        assert mean["locality"]["generated_interval"] == [min(values), max(values)]
        assert mean["locality"]["spread"] == pytest.approx(statistics.stdev(values))
        assert mean["perplexity"] == pytest.approx(sum(r["perplexity"] for r in own) / 3)
        assert mean["order_seeds"] == [0, 1, 2]
        assert mean["portability"] == {
            **dict.fromkeys(("generated", "teacher_forced", "contains", "f1", "spread")),
            "generated_interval": [None, None],
            "edits": 0,
        }
    forced = {r["generalization"]["teacher_forced"] for r in rows if r["method"] == "ft" and r["edits"] == 2}
    assert len(forced) > 1, "the first two edits are others in each order"
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    found = comparisons.differences()
    (pair,) = found["locality"]
    last = {
        name: [r["locality"]["generated"] for r in rows if r["method"] == name and r["edits"] == 4]
        for name in ("ft", "ft@still")
    }
    assert pair["difference"] == pytest.approx(abs(sum(last["ft"]) - sum(last["ft@still"])) / 3, abs=1e-6)

    def edited(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(FineTune, "edit", edited)
    monkeypatch.setattr(EditableModel, "generate", edited)
    assert list(ordered(tmp_path, [0, 1, 2]).run()) == rows
    assert ordered(tmp_path, [1]).means(rows)[2]["locality"]["spread"] is None


def test_the_unedited_model_is_asked_once_for_all_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.evaluation import protocol

    asked: list[str] = []
    write = protocol.write

    def spy(model: EditableModel, prompts: list[str], **settings: Any) -> Any:
        asked.extend(prompts)
        return write(model, prompts, **settings)

    monkeypatch.setattr(protocol, "write", spy)
    comparisons = ordered(tmp_path, [0, 1])
    rows = [next(iter(comparisons.comparisons[0].run()))]
    count = len(asked)
    second = comparisons.comparisons[1]
    second.examination.share_base(comparisons.first.examination)
    rows.append(next(iter(second.run())))
    assert len(asked) == count == 3 * len(EDITS)
    assert [row["method"] for row in rows] == ["unedited", "unedited"]


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_order_seeds_must_differ(tmp_path: Path, seeds: list[int]) -> None:
    with pytest.raises(ConfigError, match="different numbers"):
        ordered(tmp_path, seeds)


# --- one table ------------------------------------------------------------------------------------------------------


def made(folder: Path, **more: Any) -> Path:
    given: dict[str, Any] = {"methods": ["ft"], "model": tiny_model("llama"), "edits": EDITS, "settings": {"ft": FT}}
    given |= {"controls": False, "max_new_tokens": 3, "checkpoints": [1, 2], **more}
    list(Comparison(folder=folder, **given).run())
    return folder


def test_rows_say_how_they_were_made(tmp_path: Path) -> None:
    model = tiny_model("llama")
    made(tmp_path / "a", settings={"ft": {**FT, "seed": 7}})
    unedited, *_, last = map(json.loads, (tmp_path / "a" / "rows.jsonl").read_text("utf-8").splitlines())
    assert last["made"].keys() == {
        "errata", "protocol", "fingerprint", "tokenizer", "dtype", "device", "max_new_tokens", "texts", "seed", "order_seed"
    }  # fmt: skip
    assert last["made"]["fingerprint"] == model.fingerprint
    assert last["made"]["tokenizer"] == tokenizer_settings(model)
    assert (last["made"]["seed"], last["made"]["order_seed"], unedited["made"]["seed"]) == (7, None, None)


def test_tokenizer_settings_see_what_is_put_around_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    plain = tokenizer_settings(model)
    assert plain["begins_with"] == [model.tokenizer.bos_token_id]
    assert (plain["ends_with"], plain["chat_template"]) == ([], None)
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ messages }}")
    assert isinstance(tokenizer_settings(model)["chat_template"], str)
    other = "right" if plain["padding_side"] == "left" else "left"
    monkeypatch.setattr(model.tokenizer, "padding_side", other)
    assert tokenizer_settings(model)["padding_side"] != plain["padding_side"]


def test_rows_made_alike_share_a_table(tmp_path: Path) -> None:
    one = made(tmp_path / "one")
    other = made(
        tmp_path / "other", methods=["ft", "ft@still"], settings={"ft": {**FT, "seed": 1}, "ft@still": {"steps": 1}}
    )
    joined = join_comparisons([one, other])
    assert [(row["method"], row["edits"]) for row in joined.rows] == [
        ("unedited", 1),
        ("unedited", 2),
        ("ft (one)", 1),
        ("ft (one)", 2),
        ("ft (other)", 1),
        ("ft (other)", 2),
        ("ft@still", 1),
        ("ft@still", 2),
    ]
    assert joined.differs == {}
    assert joined.seeds == {"seed": {str(one): [0], str(other): [0, 1]}}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"max_new_tokens": 4}, r"max_new_tokens is 3 in .*one and 4 in .*other"),
        ({"model": tiny_model("llama", seed=1)}, "fingerprint is"),
        ({"texts": ["Ann"]}, "texts is"),
        ({"edits": EDITS[::-1]}, "order of the edits is"),
        ({"edits": [*EDITS[1:], Edit(prompt="x", target="y")]}, "edits is"),
    ],
)
def test_rows_made_otherwise_refuse_to_share_a_table(tmp_path: Path, more: dict[str, Any], named: str) -> None:
    one = made(tmp_path / "one", checkpoints=[4])
    other = made(tmp_path / "other", checkpoints=[4], **more)
    with pytest.raises(ConfigError, match=f"not made alike: .*{named}.*--allow-mixed"):
        join_comparisons([one, other])
    joined = join_comparisons([one, other], allow_mixed=True)
    assert len(joined.differs) == 1
    assert {row["method"] for row in joined.rows} == {"unedited (one)", "unedited (other)", "ft (one)", "ft (other)"}


def test_another_chat_template_is_another_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, model = made(tmp_path / "one"), tiny_model("llama")
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ messages }}")
    other = made(tmp_path / "other", model=model)
    with pytest.raises(ConfigError, match="tokenizer is"):
        join_comparisons([one, other])
    with pytest.raises(ConfigError, match="tokenizer"):
        made(one, model=model)


def test_folders_that_hold_no_rows_are_named(tmp_path: Path) -> None:
    one = made(tmp_path / "one")
    with pytest.raises(ConfigError, match="each of them once"):
        join_comparisons([one, one])
    with pytest.raises(ArtifactError, match="nowhere holds no rows"):
        join_comparisons([one, tmp_path / "nowhere"])
    (tmp_path / "several" / "order-0").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="it has order-0: name these"):
        join_comparisons([tmp_path / "several"])
    rows = [json.loads(line) for line in (one / "rows.jsonl").read_text("utf-8").splitlines()]
    (one / "rows.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in r.items() if k != "made"}) + "\n" for r in rows)
    )
    with pytest.raises(ArtifactError, match="do not say how they were made"):
        join_comparisons([one])
