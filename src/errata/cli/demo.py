"""`errata demo`: a hundred facts corrected one after the other, measured and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.common import check_out, parse_settings, quiet, save_adapter, this_command
from errata.cli.output import emit, log, plain
from errata.errors import ConfigError
from errata.progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from errata.edit import Edit
    from errata.editors import EditOutcome
    from errata.evaluation import Examination

__all__ = ["demo"]

_SHOWN = 12


class _LiveTable:
    """The last edits as they happen, on standard error; lines instead when nobody is at a terminal."""

    def __init__(self, edits: list[Edit], examination: Examination) -> None:
        from rich.console import Console
        from rich.live import Live

        self.edits, self.examination = edits, examination
        self.console = Console(stderr=True)
        self.rows: list[tuple[str, Edit, str, str, str]] = []
        self.took = 0
        self.live = Live(console=self.console, refresh_per_second=8) if self.console.is_terminal else None

    def __enter__(self) -> _LiveTable:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, done: int, outcome: EditOutcome) -> None:
        """Called after every batch: `done` edits were made, the last of them with this outcome."""
        first = len(self.rows)
        applied = {a.edit_id: a for a in outcome.applied}
        self.took += sum(a.took for a in outcome.applied)
        for number, edit in enumerate(self.edits[first:done], start=first + 1):
            before = self.examination.base_answer(edit.prompt).strip()
            if edit.id in applied:
                mark, style = ("took", "green") if applied[edit.id].took else ("not yet", "yellow")
            else:
                mark, style = "refused", "red"
            self.rows.append((str(number), edit, before, mark, style))
        if self.live is not None:
            self.live.update(self.table(done, outcome))
        elif done // 10 > first // 10 or done == len(self.edits):
            edit, before = self.rows[-1][1:3]
            log(f"edit {done}/{len(self.edits)}: {edit.prompt} {before} -> {edit.target}; {self.took} took so far")

    def table(self, done: int, outcome: EditOutcome) -> Table:
        """The last edits; what prompts and answers hold is never read as markup."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=f"{done} of {len(self.edits)} edits, {self.took} took, {outcome.seconds_per_edit:.2f} s for the last"
        )
        for column in ("#", "prompt", "atlas said", "corrected to"):
            table.add_column(column, overflow="fold")
        for number, edit, before, mark, style in self.rows[-_SHOWN:]:
            corrected = Text.assemble(edit.target, " ", (mark, style))
            table.add_row(number, Text(edit.prompt), Text(before), corrected)
        return table


def demo(
    method: str,
    count: int,
    seed: int,
    out: Path,
    settings: list[str],
    as_json: bool,
) -> None:
    if count < 1:
        raise ConfigError(f"--edits must be at least 1, not {count}")
    quiet()
    from errata.atlas.edits import world_edits
    from errata.atlas.shipped import shipped_provenance
    from errata.datasets.builtin import held_out_texts
    from errata.editors import editor_class
    from errata.evaluation import Examination, run_provenance, run_sequence
    from errata.evaluation.controls import no_op_control, random_control
    from errata.evaluation.metrics import finite_or_none
    from errata.evaluation.report import RunReport, write_report
    from errata.model import EditableModel

    cls = editor_class(method)
    given = parse_settings(settings)
    check_out(out)
    edits = world_edits(count, seed=seed)
    texts = held_out_texts()
    log("loading atlas, the model that comes with errata")
    model = EditableModel.load("atlas")
    examination = Examination(model, edits)
    with progress_bar() as progress:
        before = examination.ask_unedited(progress)
        perplexity_before = model.perplexity(texts)
        editor = cls(model, **given)
        prepared = editor.prepare(progress)
    checkpoints = sorted({c for c in (1, 10, 25, 50, 100, 200, 300, 500, 1000) if c < count} | {count})
    records: list[dict[str, Any]] = []
    with _LiveTable(edits, examination) as table:
        for checkpoint, _ in run_sequence(editor, examination, checkpoints, texts=texts, after_edit=table.show):
            records.append(checkpoint.to_record() | {"prepare_seconds": checkpoint.prepare_seconds + prepared})
    last = checkpoint
    log("baselines: random content of the same norm, and edits that say nothing new")
    with progress_bar() as progress:
        controls = [random_control(editor.adapter, examination, texts, progress=progress)]
        out.mkdir(parents=True, exist_ok=True)
        save_adapter(editor.adapter, out / "adapter")
        editor.adapter.detach()
        controls.append(no_op_control(cls(model, editor.config), examination, texts, progress))
    provenance = shipped_provenance()
    protocol = [
        ("protocol", last.result.protocol),
        ("model", f"atlas ({provenance['plan']['size']}), weights {model.fingerprint[:12]}"),
        ("method", f"{method}: {cls.paper}"),
        ("settings", ", ".join(f"{k}={v}" for k, v in editor.config.to_record().items())),
        (
            "edits",
            f"{count}, one after the other without reset, batch size {editor.config.batch_size}, order seed {seed}",
        ),
        ("locality prompts", "4 per edit, half of them other subjects of the same relation"),
        ("generation", f"greedy, at most {examination.max_new_tokens} tokens for every prompt"),
        ("perplexity", f"{len(texts)} held-out stories"),
        ("dtype and device", f"{model.dtype}, {model.device}".removeprefix("torch.")),
    ]
    report = write_report(
        out / "report.html",
        RunReport(
            title=f"{count} facts corrected in a language model, one after the other",
            lead=f"Method: {cls.name}. Model: atlas, which knows {provenance['facts']:,} real facts.",
            command=this_command(),
            rows=records,
            result=last.result,
            before=before,
            perplexity_before=perplexity_before,
            perplexity_after=last.perplexity,
            controls=controls,
            protocol=protocol,
        ),
    )
    record = {
        "method": method,
        **records[-1],
        "perplexity": {"before": finite_or_none(perplexity_before), "after": finite_or_none(last.perplexity)},
        "controls": [control.to_record() for control in controls],
        "report": str(report),
        "adapter": str(out / "adapter"),
        "provenance": run_provenance(model, editor.config),
    }

    def words() -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        table = Table(title="a few of them", show_lines=True)
        for column in ("asked", "before", "after"):
            table.add_column(column, overflow="fold")
        said_before = {a.edit.id: a.said for a in before.asked}
        for asked in last.result.asked[:: max(1, count // 3)][:3]:
            lines = [(asked.edit.prompt, "edited"), *((t, "another wording") for t in asked.edit.rephrases[:1])]
            lines += [(p.prompt, "must not change") for p in asked.edit.locality[:1]]
            for prompt, role in lines:
                said = plain(said_before[asked.edit.id][prompt].strip(), asked.said[prompt].strip())
                table.add_row(Text.assemble(prompt, "\n", (role, "dim")), *said)
        console.print(table)
        scores = Table(title=Text(f"{count} edits by {method}, all asked after the last one"))
        for column in ("", "generated", "teacher-forced", "unedited"):
            scores.add_column(column, justify="left" if not column else "right")
        for name in ("reliability", "generalization", "locality", "portability"):
            now, base = last.result.score(name).to_record(), before.score(name).to_record()
            if now["generated"] is not None:
                scores.add_row(
                    name, *(f"{v:.3f}" for v in (now["generated"], now["teacher_forced"], base["generated"]))
                )
        console.print(scores)
        change = last.perplexity / perplexity_before - 1
        print(f"perplexity of held-out prose {perplexity_before:.3f} -> {last.perplexity:.3f} ({change:+.2%})")
        print(f"{last.seconds_per_edit:.2f} s per edit, {record['prepare_seconds']:.1f} s of preparation")
        print(f"report: {report}")

    emit(record, as_json, words)
