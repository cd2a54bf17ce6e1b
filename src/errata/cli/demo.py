"""`errata demo`: a hundred facts corrected one after the other, measured and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.common import parse_settings, quiet
from errata.cli.output import emit, log
from errata.errors import ConfigError
from errata.progress import progress_bar

if TYPE_CHECKING:
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
        self.rows: list[tuple[str, str, str, str]] = []
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
        """Called after every edit."""
        from rich.table import Table

        edit = self.edits[done - 1]
        took = bool(outcome.applied) and outcome.applied[-1].took
        self.took += took
        before = self.examination.base_answer(edit.prompt).strip()
        mark = "[green]took[/]" if took else "[red]refused[/]" if outcome.refused else "[yellow]not yet[/]"
        self.rows.append((str(done), edit.prompt, before, f"{edit.target} {mark}"))
        if self.live is None:
            if done % 10 == 0 or done == len(self.edits):
                log(f"edit {done}/{len(self.edits)}: {edit.prompt} {before} -> {edit.target}; {self.took} took so far")
            return
        table = Table(
            title=f"{done} of {len(self.edits)} edits, {self.took} took, {outcome.seconds_per_edit:.2f} s for the last"
        )
        for column in ("#", "prompt", "atlas said", "corrected to"):
            table.add_column(column, overflow="fold")
        for row in self.rows[-_SHOWN:]:
            table.add_row(*row)
        self.live.update(table)


def demo(
    method: str,
    count: int,
    seed: int,
    out: Path,
    settings: list[str],
    as_json: bool,
    command: str,
) -> None:
    if count < 1:
        raise ConfigError(f"--edits must be at least 1, not {count}")
    quiet()
    from errata.atlas.edits import world_edits
    from errata.atlas.shipped import shipped_provenance
    from errata.datasets.builtin import held_out_texts
    from errata.editors import editor_class
    from errata.evaluation import Examination, run_sequence
    from errata.evaluation.controls import no_op_control, random_control
    from errata.evaluation.report import RunReport, write_report
    from errata.model import EditableModel

    cls = editor_class(method)
    given = parse_settings(settings)
    try:
        edits = world_edits(count, seed=seed)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    texts = held_out_texts()
    log("loading atlas, the model that comes with errata")
    model = EditableModel.load("atlas")
    examination = Examination(model, edits)
    with progress_bar() as progress:
        examination.ask_base(progress=progress)
        before = examination.ask(progress=progress)
        perplexity_before = model.perplexity(texts)
        editor = cls(model, **given)
        editor.prepare(progress)
    checkpoints = sorted({c for c in (1, 10, 25, 50, 100, 200, 300, 500, 1000) if c < count} | {count})
    records: list[dict[str, Any]] = []
    with _LiveTable(edits, examination) as table:
        for checkpoint, _ in run_sequence(editor, examination, checkpoints, texts=texts, after_edit=table.show):
            records.append(checkpoint.to_record())
    last = checkpoint
    log("baselines: random content of the same norm, and edits that say nothing new")
    with progress_bar() as progress:
        controls = [random_control(editor.adapter, examination, texts, progress=progress)]
        out.mkdir(parents=True, exist_ok=True)
        editor.adapter.save_pretrained(out / "adapter")
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
            command=command,
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
        **last.to_record(),
        "perplexity": {"before": perplexity_before, "after": last.perplexity},
        "controls": [control.to_record() for control in controls],
        "report": str(report),
        "adapter": str(out / "adapter"),
    }

    def words() -> None:
        from rich.console import Console
        from rich.table import Table

        console = Console()
        table = Table(title="a few of them", show_lines=True)
        for column in ("asked", "before", "after"):
            table.add_column(column, overflow="fold")
        said_before = {a.edit.id: a.said for a in before.asked}
        for asked in last.result.asked[:: max(1, count // 3)][:3]:
            lines = [(asked.edit.prompt, "edited"), *((t, "another wording") for t in asked.edit.rephrases[:1])]
            lines += [(p.prompt, "must not change") for p in asked.edit.locality[:1]]
            for prompt, role in lines:
                table.add_row(
                    f"{prompt}\n[dim]{role}[/]", said_before[asked.edit.id][prompt].strip(), asked.said[prompt].strip()
                )
        console.print(table)
        scores = Table(title=f"{count} edits by {method}, all asked after the last one")
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
        print(f"{last.seconds_per_edit:.2f} s per edit, {last.prepare_seconds:.1f} s of preparation")
        print(f"report: {report}")

    emit(record, as_json, words)
