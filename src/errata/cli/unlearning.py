"""`errata unlearn`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.atlas.shipped import ATLAS_NAMES
from errata.cli.common import check_out, load_edits, load_model, load_texts
from errata.cli.editing import found_adapter, given_settings, write_into
from errata.cli.output import emit, log, plain
from errata.errors import ConfigError
from errata.progress import progress_bar

if TYPE_CHECKING:
    from errata.edit import Edit, Probe
    from errata.unlearning import ForgetEdit

__all__ = ["unlearn"]

_WORDS = {
    "forget_quality": "old answer no longer given",
    "forget_quality_forced": "old answer's tokens no longer preferred",
    "answer_probability": "probability of the old answer, per token",
    "answer_recall": "old answer's words still told",
    "truth_ratio": "TOFU's truth ratio, wrong answers to the old one",
    "tofu_forget_quality": "TOFU's forget quality, p",
    "refusal_rate": "refused",
    "subject_named": "reply names the subject",
    "paraphrase_forget_quality": "… in other wordings: not given",
    "paraphrase_refusal_rate": "… in other wordings: refused",
    "prefix_forget_quality": "… with a prefix in front: not given",
    "answer_prefix_forget_quality": "… with an answer begun: not given",
    "all_attacks_forget_quality": "not given in any of these",
    "retain_accuracy": "others answered right",
    "retain_unchanged": "others answered as before",
    "retain_forced": "others' tokens predicted as before",
    "retain_truth": "others' truth, 1 less TOFU's truth ratio",
    "retain_refused": "others refused",
    "reply_fluency": "fluency of the reply",
    "reply_perplexity": "perplexity of the reply, unedited model",
}
_OF_WRONG_ANSWERS = ("truth_ratio", "tofu_forget_quality", "retain_truth")  # shown where records carry any


def _names(text: str | None) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in (text or "").split(";") if part.strip()))
    if text is not None and not found:
        raise ConfigError(f"--subjects {text!r} names nobody; write names with semicolons between them")
    return found


def _templates(refusal: str | None, path: Path | None) -> Sequence[str]:
    """Raises ConfigError where both are given, or the file holds no refusals."""
    from errata.unlearning import TEMPLATES

    if refusal is not None and path is not None:
        raise ConfigError("--refusal and --refusals exclude each other; leave one of them out")
    if refusal is not None:
        return [refusal]
    if path is None:
        return TEMPLATES
    from errata.datasets import read_file
    from errata.unlearning import is_refusal

    found = read_file(path)
    for problem in found.problems:
        log(f"left out: {problem}")
    sentences = [text for text in found.others if isinstance(text, str)]
    usable = [text for text in sentences if is_refusal(text)]
    for text in sentences:
        if not is_refusal(text):
            log(f"left out: {text!r} is not recognised as a refusal")
    if not usable:
        raise ConfigError(f"--refusals {path} holds no sentence that declines to answer; give one a line")
    return usable


def _retained(path: Path | None, strict: bool) -> list[Probe]:
    """What a file says shall stay: its true answers."""
    if path is None:
        return []
    from errata.unlearning import facts_to_forget, to_keep

    facts, problems = facts_to_forget(load_edits(path, None, strict))
    for problem in problems:
        log(f"left out of --retain: {problem}")
    return [to_keep(fact, "retain") for fact in facts]


def _of_file(
    path: Path, subjects: Sequence[str], limit: int | None, strict: bool
) -> tuple[list[Edit], list[Probe], int]:
    """The facts of a file that are to be forgotten, what is kept beside them, and how many records were left out."""
    from errata.unlearning import about_subjects, facts_to_forget, to_keep

    found = load_edits(path, None if subjects else limit, strict)
    facts, problems = facts_to_forget(found)
    for problem in problems:
        log(f"left out: {problem}")
    if not facts:
        raise ConfigError(f"--edits {path} holds no old answer that could be forgotten; see errata data show {path}")
    retain: list[Probe] = []
    if subjects:
        facts, others = about_subjects(facts, subjects)
        facts = facts if limit is None else facts[:limit]
        retain = [to_keep(fact, "other_subject") for fact in others]
    return facts, retain, len(found.problems) + len(problems)


def unlearn(
    model_name: str,
    method: str,
    edits_path: Path | None,
    subjects_text: str | None,
    retain_path: Path | None,
    limit: int | None,
    merge: int,
    improve: bool,
    refusal: str | None,
    refusals_path: Path | None,
    batch_size: int | None,
    seed: int | None,
    out: Path,
    settings: list[str],
    text: Path | None,
    measure: bool,
    reference_name: str | None,
    max_new_tokens: int,
    force: bool,
    strict: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    given = given_settings(settings, batch_size, seed)
    subjects = _names(subjects_text)
    if edits_path is None and not subjects:
        raise ConfigError("nothing is named that shall be forgotten; give --edits FILE, or --subjects on atlas")
    if edits_path is None and model_name not in ATLAS_NAMES:
        raise ConfigError(f"only atlas knows by itself what its subjects are; give --edits FILE for {model_name}")
    if reference_name is not None and not measure:
        raise ConfigError("--reference is for what is measured; leave --no-measure out, or --reference")
    from errata.editors import editor_class

    cls = editor_class(method)
    check_out(out)
    templates = _templates(refusal, refusals_path)
    from errata.datasets.tofu import truth_question
    from errata.evaluation.unlearning import Reference, UnlearningExamination
    from errata.unlearning import forget_edits

    reference: Reference | None = None

    if edits_path is not None:
        facts, retain, left_out = _of_file(edits_path, subjects, limit, strict)
    else:
        from errata.atlas.edits import is_reserved, subject_facts

        facts, retain, left_out = subject_facts(subjects)[:limit], [], 0
        for name in dict.fromkeys(fact.subject or "" for fact in facts):
            if is_reserved(name):
                log(f"{name} is among the subjects on which routers are calibrated: what is measured of it flatters")
    retain += _retained(retain_path, strict)
    adapter = found_adapter(out, method)
    texts = load_texts(text) if measure else []
    if reference_name is not None:
        if not any(truth_question(fact) for fact in facts):
            raise ConfigError("--reference compares truth ratios, which need wrong answers; give 'perturbed_answer'")
        what = f"the same questions, asked of {reference_name}"
        reference = Reference.of(load_model(reference_name, device, dtype), facts, what)
    model = load_model(model_name, device, dtype)
    if measure and reference is None and edits_path is None:
        from errata.atlas.edits import stand_ins

        what = "the same questions about subjects that do not exist, asked of the unedited model"
        reference = Reference.of(model, stand_ins(facts), what)
    if merge > 1 and not cls.needs_subject:
        log(f"{method} does not look for subjects: of merged queries it learns the whole text, not each of them")

    def write(prompts: Sequence[str], tokens: int) -> list[str]:
        return model.generate(prompts, max_new_tokens=tokens)

    with progress_bar() as progress:
        planned = forget_edits(
            facts, merge=merge, templates=templates, write=write if improve else None, progress=progress
        )
        # Locality prompts as the edits have them: none about a subject that is forgotten.
        forgotten = {fact.prompt for fact in facts}
        retain += [p for one in planned for p in one.edit.locality]
        examination = None
        if measure:
            examination = UnlearningExamination(
                model,
                facts,
                [probe for probe in retain if probe.prompt not in forgotten],
                texts=texts,
                max_new_tokens=max_new_tokens,
                reference=reference,
            )
            before = examination.ask_unedited(progress)
        written = write_into(out, adapter, method, model, [one.edit for one in planned], given, force, progress)
        record = {
            **written.record,
            "facts": len(facts),
            "subjects": len({(fact.subject or fact.prompt).casefold() for fact in facts}),
            "merge": merge,
            "records_left_out": left_out,
            "refusals": _refusals(planned, improve),
            "unlearning": None,
        }
        if examination is not None:
            after = examination.ask(written.editor.adapter, progress)
            with written.editor.adapter.detached():
                judged = examination.judge(_refusal_of_each(planned, facts))
            record["unlearning"] = {
                "retain_prompts": len(examination.retain),
                "before": before.to_record(),
                "after": after.to_record(),
                "refusals_written": judged,
                "facts": [one.to_record() for one in after.facts],
                "retain": [one.to_record() for one in after.retain],
            }

    def words() -> None:
        written.words()
        _show(record)
        again = f"errata evaluate --model {model_name} --adapter {out} --edits {out / 'edits.jsonl'}"
        print(f"adapter in {out}; next: {again}")

    emit(record, as_json, words)


def _refusals(planned: Sequence[ForgetEdit], tried: bool) -> dict[str, Any]:
    """How the refusals came about, each with the edit that writes it."""
    return {
        "improvement_tried": tried,
        "improved": sum(one.refusal.origin == "improved" for one in planned),
        "template": sum(one.refusal.origin == "template" for one in planned),
        "edits": [
            {"id": one.edit.id, "queries": len(one.facts), "subject": one.edit.subject, **one.refusal.to_record()}
            for one in planned
        ],
    }


def _refusal_of_each(planned: Sequence[ForgetEdit], facts: Sequence[Edit]) -> list[str]:
    by_prompt = {fact.prompt: one.refusal.text for one in planned for fact in one.facts}
    return [by_prompt[fact.prompt] for fact in facts]


def _show(record: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    refusals = record["refusals"]
    if refusals["improvement_tried"]:
        print(f"{refusals['improved']} refusals rewritten by the model, {refusals['template']} as templates have them")
        reasons = dict.fromkeys(one["reason"] for one in refusals["edits"] if one["reason"])
        for reason in list(reasons)[:3]:
            print(f"  not rewritten: {reason}")
    measured = record["unlearning"]
    if measured is None:
        return
    table = Table(title=f"{record['facts']} facts about {record['subjects']} subjects, generated unless it says tokens")
    for column in ("", "before", "after", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    before, after = measured["before"]["measures"], measured["after"]["measures"]
    for name, what in _WORDS.items():
        if name in _OF_WRONG_ANSWERS and not before[name]["count"]:
            continue
        low, high = after[name]["interval"]
        between = "–" if low is None or high is None else f"{_number(low)} – {_number(high)}"
        table.add_row(*plain(what, _number(before[name]["value"]), _number(after[name]["value"]), between))
    Console().print(table)
    reference = measured["after"]["reference"]
    if reference is not None:
        print(f"never learned: {reference['what']}, {reference['count']} with a truth ratio of ", end="")
        print(f"{_number(reference['truth_ratio'])}; p below 0.05 tells the edited model from that")
    elif before["truth_ratio"]["count"]:
        print("TOFU's forget quality compares with a model that never learned these facts: give --reference MODEL")
    if not measured["retain_prompts"]:
        print("nothing was named that is to be kept: give --retain FILE, or edits with locality prompts")
    written = measured["refusals_written"]
    print(f"the refusals themselves: fluency {_number(written['reply_fluency'])}, ", end="")
    print(f"perplexity {_number(written['reply_perplexity'])} under the unedited model")
    both = measured["before"]["perplexity"], measured["after"]["perplexity"]
    print(f"perplexity of held-out text: {_number(both[0])} before, {_number(both[1])} after")
    known = before["forget_quality"]["value"]
    if known:
        print(
            f"the unedited model does not give {known:.0%} of these answers; that it gives them no longer shows nothing"
        )


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"
