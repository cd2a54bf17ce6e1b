"""The command line. Commands are thin: they read options, call the library and show what it returns.

Nothing heavy is imported here: `errata --help` must answer at once. Each command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from errata import __version__
from errata.cli.output import error_object, guarded

__all__ = ["app", "main"]

app = typer.Typer(
    name="errata",
    help="Correct what a language model believes, measure what that did, and take it back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
atlas_app = typer.Typer(help="atlas, the small model that comes with errata.", no_args_is_help=True)
app.add_typer(atlas_app, name="atlas")
data_app = typer.Typer(
    help="Files of edits: what is known, what is in them, what a model gets wrong.", no_args_is_help=True
)
app.add_typer(data_app, name="data")

AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"errata {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@atlas_app.command("train")
@guarded(kept="the last saved state is kept, and the same command goes on from it")
def atlas_train(
    size: Annotated[str, typer.Option(help="small, base (the shipped one) or large.")] = "base",
    minutes: Annotated[
        float | None, typer.Option(help="Train for about this long instead of the size's own number of steps.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Train for exactly this many steps.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the order of documents.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run, errata-atlas or errata-atlas-instruct if not given; a run found there is resumed."
        ),
    ] = None,
    instruct: Annotated[
        bool, typer.Option("--instruct", help="Train the instruction-tuned variant on top of the shipped base instead.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train an atlas: deterministic, resumable after a kill, with a learning curve."""
    from errata.cli.atlas import train

    train(size, minutes, steps, seed, out, instruct, as_json)


@atlas_app.command("info")
@guarded()
def atlas_info(
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder written by atlas train; the shipped checkpoint if not given.")
    ] = None,
    recorded: Annotated[
        bool,
        typer.Option("--recorded", help="Print what was measured when the checkpoint was made, without measuring."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what the shipped checkpoint knows: facts, capabilities, prose."""
    from errata.cli.atlas import info

    info(checkpoint, recorded, as_json)


ModelName = Annotated[str, typer.Option("--model", help="A folder, a Hugging Face hub id, or atlas.")]
Device = Annotated[str | None, typer.Option(help="Where to load the model: cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; float32 on a CPU if not given.")]
EditsFile = Annotated[
    Path, typer.Option("--edits", help="errata JSONL, or a benchmark's file; .gz too. See errata data list.")
]
Limit = Annotated[int | None, typer.Option(help="Use only the first N edits.", min=1)]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first record that does not fit.")]
Setting = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the method, name=value; see errata methods.")
]
MaxNewTokens = Annotated[
    int, typer.Option(help="Longest answer that is generated, the same for every question.", min=1)
]
Method = Annotated[str, typer.Option(help="The editing method; see errata methods.")]
BatchSize = Annotated[int | None, typer.Option(help="Edits written together.", min=1)]
MethodSeed = Annotated[int | None, typer.Option(help="Seed of the method's random choices.")]
AdapterOut = Annotated[Path, typer.Option(help="Folder of the adapter; one found there is gone on with.")]
Force = Annotated[bool, typer.Option("--force", help="Keep what the guard calls a collapse, try what seems too large.")]
Text = Annotated[Path | None, typer.Option(help="Held-out text for perplexity; errata's own prose if not given.")]


@data_app.command("list")
@guarded()
def data_list(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Files or folders; without any, the forms that are known.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Which forms of files are known; or per file its form, records, edits, problems and contradictions."""
    from errata.cli.data import list_files, list_forms

    if paths:
        list_files(paths, as_json)
    else:
        list_forms(as_json)


@data_app.command("show")
@guarded()
def data_show(
    file: Annotated[Path, typer.Argument(help="A file of a form that errata data list names.")],
    limit: Annotated[int, typer.Option(help="How many edits are shown.", min=0)] = 3,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """What is in a file: form, counts, kinds of probes, what is left out, contradictions, the first edits."""
    from errata.cli.data import show

    show(file, limit, strict, as_json)


@data_app.command("convert")
@guarded()
def data_convert(
    file: Annotated[Path, typer.Argument(help="A file of edits of any known form.")],
    out: Annotated[Path, typer.Argument(help="Where to write errata JSONL.")],
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Write a file's edits as errata JSONL; what is left out is reported."""
    from errata.cli.data import convert

    convert(file, out, strict, as_json)


@data_app.command("wrong-facts")
@guarded(kept="the answers so far are kept, and the same command goes on with the rest")
def data_wrong_facts(
    facts: Annotated[Path, typer.Option(help="File of facts, of any form that errata data list names.")],
    out: Annotated[Path, typer.Option(help="Where to write the edits; answers are kept beside it, in OUT.asked.")],
    model: ModelName = "atlas",
    limit: Annotated[int | None, typer.Option(help="Ask only about the first N facts.", min=1)] = None,
    max_new_tokens: MaxNewTokens = 32,
    strict: Strict = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model about facts, and write those it gets wrong as edits. Resumable after a kill."""
    from errata.cli.data import wrong_facts

    wrong_facts(model, facts, out, limit, max_new_tokens, strict, device, dtype, as_json)


@app.command()
@guarded(kept="a demo begins anew the next time")
def demo(
    method: Method = "memoir",
    edits: Annotated[int, typer.Option(help="How many facts to correct.")] = 100,
    seed: Annotated[int, typer.Option(help="Which facts, and in which order.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the report and the adapter.")] = Path("errata-demo"),
    settings: Setting = None,
    as_json: AsJson = False,
) -> None:
    """Watch facts being corrected in a real language model one after the other, and get a report."""
    from errata.cli.demo import demo as run

    run(method, edits, seed, out, settings or [], as_json)


@app.command()
@guarded(kept="what was saved, every 100 edits, is kept, and the same command goes on with the rest")
def edit(
    edits: EditsFile,
    model: ModelName = "atlas",
    method: Method = "memoir",
    limit: Limit = None,
    batch_size: BatchSize = None,
    seed: MethodSeed = None,
    out: AdapterOut = Path("errata-adapter"),
    settings: Setting = None,
    force: Force = False,
    strict: Strict = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Write edits into an adapter. Interrupted or repeated, it goes on with what is missing."""
    from errata.cli.editing import edit as run

    run(model, method, edits, limit, batch_size, seed, out, settings or [], force, strict, device, dtype, as_json)


@app.command()
@guarded(kept="nothing was written: a pool is saved when all texts are in it")
def inject(
    text: Annotated[
        Path, typer.Option(help="File of texts: paragraphs between blank lines, or lines where there are none.")
    ],
    model: ModelName = "atlas",
    seed: Annotated[int | None, typer.Option(help="Seed of the slots that are dropped.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the adapter; a pool found there is gone on with.")] = Path(
        "errata-adapter"
    ),
    settings: Setting = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Let a model read texts into a pool of memory tokens (memoryllm). Given again, they are read again."""
    from errata.cli.editing import inject as run

    run(model, text, seed, out, settings or [], device, dtype, as_json)


@app.command()
@guarded(kept="what was saved, every 100 edits, is kept, and the same command goes on with the rest")
def unlearn(
    edits: Annotated[
        Path | None,
        typer.Option("--edits", help="File of edits of any known form, TOFU's too: their old answers are forgotten."),
    ] = None,
    subjects: Annotated[
        str | None,
        typer.Option(help="Forget all about these, with semicolons between them: of the file, or of atlas's world."),
    ] = None,
    retain: Annotated[
        Path | None, typer.Option(help="File of facts that must stay, of any known form; locality prompts stay anyway.")
    ] = None,
    model: ModelName = "atlas",
    method: Method = "memoir",
    limit: Annotated[int | None, typer.Option(help="Forget only the first N facts.", min=1)] = None,
    merge: Annotated[
        int, typer.Option(help="Write up to N queries about one subject as one edit; for methods with subjects.", min=1)
    ] = 1,
    improve: Annotated[
        bool, typer.Option(help="Let the model rewrite refusals so that they name the subject, where it can.")
    ] = True,
    refusal: Annotated[
        str | None, typer.Option(help="What to say instead, one sentence; {subject} in it is filled in.")
    ] = None,
    refusals: Annotated[
        Path | None, typer.Option(help="File of such sentences, one a line, as TOFU's; each subject gets one of them.")
    ] = None,
    batch_size: BatchSize = None,
    seed: MethodSeed = None,
    out: AdapterOut = Path("errata-adapter"),
    settings: Setting = None,
    text: Text = None,
    measure: Annotated[bool, typer.Option(help="Ask before and after, and attack what shall be forgotten.")] = True,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A model that never learned the facts, for TOFU's forget quality; where atlas's own facts are "
            "forgotten, subjects that do not exist stand in.",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 48,
    force: Force = False,
    strict: Strict = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Make a model refuse what it knew: edits to refusals, into an adapter, and how well that holds under attack."""
    from errata.cli.unlearning import unlearn as run

    run(
        model, method, edits, subjects, retain, limit, merge, improve, refusal, refusals, batch_size, seed, out,
        settings or [], text, measure, reference, max_new_tokens, force, strict, device, dtype, as_json,
    )  # fmt: skip


@app.command()
@guarded()
def evaluate(
    edits: EditsFile,
    model: ModelName = "atlas",
    adapter: Annotated[Path | None, typer.Option(help="Folder of an adapter; the unedited model if not given.")] = None,
    limit: Limit = None,
    text: Text = None,
    controls: Annotated[
        bool, typer.Option(help="Also measure random content and no-op edits; these are written, which takes a while.")
    ] = True,
    rankings: Annotated[
        bool,
        typer.Option(
            "--rankings",
            help="Also ask which answer is likelier, the new or the old: CounterFact's efficacy, paraphrase and "
            "neighbourhood scores.",
        ),
    ] = False,
    kl: Annotated[
        bool,
        typer.Option(
            "--kl",
            help="Also measure how far next-token distributions moved, at locality prompts and on held-out text.",
        ),
    ] = False,
    fluency: Annotated[
        bool,
        typer.Option("--fluency", help="Also let the model write 100 tokens about each edit: does it repeat itself?"),
    ] = False,
    references: Annotated[
        Path | None,
        typer.Option(help="For --fluency: texts to compare with, a record of {object, text} for each target."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Also have a model judge the answers: the address of a server of OpenAI's chat protocol. Its key "
            "is taken from ERRATA_JUDGE_KEY."
        ),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="For --judge: the model's name on that server.")] = None,
    judge_log: Annotated[
        Path, typer.Option(help="For --judge: every reply as it came, JSONL; what is judged there is not asked again.")
    ] = Path("errata-judge.jsonl"),
    max_new_tokens: MaxNewTokens = 32,
    strict: Strict = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Measure reliability, generalization, locality and portability of an adapter, and perplexity."""
    from errata.cli.measuring import evaluate as run

    run(
        model, adapter, edits, limit, text, controls, rankings, kl, fluency, references, judge, judge_model, judge_log,
        max_new_tokens, strict, device, dtype, as_json,
    )  # fmt: skip


@app.command()
@guarded()
def damage(
    adapter: Annotated[Path, typer.Option(help="Folder of an adapter.")],
    model: ModelName = "atlas",
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks of lm-evaluation-harness with commas between them; atlas stands for its six, local for all "
            "whose files are in --data, none for no task."
        ),
    ] = "",
    include: Annotated[Path | None, typer.Option(help="Folder of task files (YAML) of your own.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the files that local_… tasks read.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N items of each task.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in front of every question, instead of the task's own number.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Held-out text, NAME=FILE or FILE, once per domain; errata's own prose if not given."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers that a task generates side by side.")] = 16,
    report: Annotated[
        Path | None, typer.Option(help="Also write one page about it: a file that ends in .html.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """What edits damaged: capabilities, language modelling, and how far weights have moved."""
    from errata.cli.damage import damage as run

    run(adapter, model, tasks, include, data, limit, shots, text or [], batch_size, report, device, dtype, as_json)


@app.command()
@guarded(kept="finished rows are kept, and the same command goes on with the others")
def compare(
    methods: Annotated[str, typer.Option(help="Methods with commas between them; METHOD@LABEL for a second run.")] = (
        "ft,rome,memoir"
    ),
    edits: Annotated[Path | None, typer.Option(help="File of edits; on atlas, its own world if not given.")] = None,
    model: ModelName = "atlas",
    checkpoints: Annotated[str, typer.Option(help="Numbers of edits at which everything is asked.")] = "1,10,100",
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Which of atlas's facts, and in which order.")] = 0,
    order_seeds: Annotated[
        str | None,
        typer.Option(help="Run the same edits in several orders, one per seed: 0,1,2; shows mean and spread."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the comparison; one found there is gone on with.")] = Path(
        "errata-compare"
    ),
    text: Text = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of one run: rome.steps=50, rome@original.variant=original."),
    ] = None,
    controls: Annotated[bool, typer.Option(help="Also run no-op edits and random content.")] = True,
    stop_below: Annotated[
        float, typer.Option(min=0, max=1, help="Go on with no method whose reliability has fallen below this share.")
    ] = 0.0,
    max_new_tokens: MaxNewTokens = 32,
    strict: Strict = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Run several methods on the same edits in the same order; a table and a figure. Resumable after a kill.

    One method runs under several settings as METHOD@LABEL: --methods rome,rome@original --set
    rome@original.variant=original.
    """
    from errata.cli.measuring import compare as run

    run(
        model, methods, edits, checkpoints, limit, out, text, settings or [], seed, order_seeds, controls, stop_below,
        max_new_tokens, strict, device, dtype, as_json,
    )  # fmt: skip


@app.command()
@guarded()
def table(
    folders: Annotated[list[Path], typer.Argument(help="Folders that errata compare has written.")],
    allow_mixed: Annotated[
        bool,
        typer.Option(
            "--allow-mixed", help="Also where protocol, model, tokenizer, precision, version or edits differ."
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the table: a file that ends in .md (Markdown) or .tex (LaTeX).")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the rows too: a file that ends in .png or .svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put rows of several comparisons into one table; refuses rows that were not made alike."""
    from errata.cli.measuring import table as run

    run(folders, allow_mixed, out, figure, as_json)


@app.command()
@guarded()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    model: ModelName = "atlas",
    adapter: Annotated[Path | None, typer.Option(help="Folder of an adapter.")] = None,
    max_new_tokens: MaxNewTokens = 20,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """What the model answers, before and after an adapter."""
    from errata.cli.editing import generate as run

    run(model, adapter, prompts, max_new_tokens, device, dtype, as_json)


@app.command()
@guarded(kept="the adapter on disk is as it was")
def revert(
    edits: Annotated[list[str], typer.Argument(help="Ids of the edits to take out.")],
    adapter: Annotated[Path, typer.Option(help="Folder of an adapter; it is written anew.")],
    exact: Annotated[
        bool, typer.Option("--exact", help="Write the other edits anew, as if these had never been made; takes longer.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="With --exact, the base; the one the adapter names if not given.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Take edits out of an adapter; says whether that is exact or approximate, and why."""
    from errata.cli.editing import revert as run

    run(model, adapter, edits, exact, device, dtype, as_json)


@app.command()
@guarded()
def explain(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    adapter: Annotated[Path, typer.Option(help="Folder of an adapter.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The base model; the one the adapter names if not given.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Which edit fires for a prompt, and with what score."""
    from errata.cli.editing import explain as run

    run(model, adapter, prompts, device, dtype, as_json)


@app.command()
@guarded(kept="what was written to --out is not whole; delete it")
def export(
    adapter: Annotated[Path, typer.Option(help="Folder of an adapter.")],
    form: Annotated[
        str, typer.Option("--format", help="merged (a checkpoint), lora (for peft and vLLM) or patch (the changes).")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; empty, or not there yet.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The base model; the one the adapter names if not given.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="For lora: the largest rank; what the change needs, or 64, if not given.", min=1)
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter that changes weights as files that other programs load."""
    from errata.cli.exporting import export as run

    run(adapter, form, out, model, rank, device, dtype, as_json)


@app.command()
@guarded()
def methods(as_json: AsJson = False) -> None:
    """The editing methods and their settings."""
    from errata.cli.looking import methods as run

    run(as_json)


@app.command()
@guarded()
def bench(
    name: Annotated[
        str, typer.Argument(help="The benchmark: batch, memory, methods, overhead, routing, scoring, tail or weights.")
    ],
    figure: Annotated[Path | None, typer.Option(help="Where its figure goes, .png or .svg, if it has one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run one benchmark: ratios against a baseline measured in the same run."""
    from errata.cli.measuring import bench as run

    run(name, figure, as_json)


@app.command()
@guarded(kept="finished rows are kept, and the same command goes on with the others")
def study(
    name: Annotated[str | None, typer.Argument(help="The study; without one, or with --list, what there is.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="What each study asks, and how long it takes.")] = False,
    model: ModelName = "atlas",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the study, errata-study-NAME if not given; one found there is gone on with."),
    ] = None,
    edits: Annotated[
        int | None, typer.Option(help="How many edits, in place of the study's own number.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Which of atlas's facts, and in which order.")] = 0,
    methods: Annotated[
        str | None, typer.Option(help="For studies that compare methods: which, with commas between them.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of one method: method.name=value.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="File of edits; needed on any model but atlas, and by hallucination and temporal."),
    ] = None,
    words: Annotated[
        int,
        typer.Option(help="hallucination and temporal: cut texts behind prompts to N words; 0 cuts nothing.", min=0),
    ] = 40,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="dual-facets: a model of another size, to see what size does; repeatable."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A handful of edits, to see that all of it runs.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Run one of the papers' experiments: a table, a figure, and what was found. Resumable after a kill."""
    from errata.cli.studying import catalogue
    from errata.cli.studying import study as run

    if listing or name is None:
        catalogue(as_json)
    else:
        run(
            name, model, out, edits, seed, methods, settings or [], data, words, beside or [], quick, device, dtype,
            as_json,
        )  # fmt: skip


@app.command("train")
@guarded(kept="the last saved state is kept, and the same command goes on from it")
def train_method(
    method: Annotated[str, typer.Argument(help="A method that must be trained once per base model, such as mend.")],
    model: ModelName = "atlas",
    edits: Annotated[
        Path | None,
        typer.Option(help="File of edits with rephrases and locality prompts; edits of atlas's world if not given."),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="For memoryllm: a text file of ten paragraphs or more; atlas's invented texts if not given."),
    ] = None,
    limit: Limit = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run and of what comes of it, errata-METHOD if not given; resumed if found."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after about this long, all calls together; another call goes on.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the initial network and of the order of edits.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of the training, name=value.")] = None,
    strict: Strict = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Train what a method needs once per base model: resumable after a kill, with a learning curve."""
    from errata.cli.training import train as run

    run(method, model, edits, texts, limit, out, minutes, seed, settings or [], strict, device, dtype, as_json)


@app.command()
@guarded()
def doctor(
    model: Annotated[str, typer.Argument(help="A folder, a Hugging Face hub id, or atlas.")],
    trace: Annotated[
        bool, typer.Option("--trace", help="Trace in which layers facts are looked up, and which to edit. Minutes.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="For --trace: a file of edits whose ground truths are asked; atlas's facts if not given."),
    ] = None,
    facts: Annotated[int, typer.Option(help="For --trace: how many facts are asked.", min=1)] = 100,
    figure: Annotated[Path | None, typer.Option(help="For --trace: where its figure goes, .png or .svg.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """What errata understands of a model, which methods it can take, and why not the others."""
    from errata.cli.looking import doctor as run

    run(model, trace, data, facts, figure, device, dtype, as_json)


# Click's class for what is wrong with a command line, or Typer's own copy of it, whichever this Typer is made with.
_UsageError: Any = typer.BadParameter.__bases__[0]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `errata` command; `arguments` are those of the command line if not given.

    A command line that is not understood leaves with status 2; with --json it too is answered with a JSON object.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(given, prog_name="errata", standalone_mode=False)
    except _UsageError as error:
        from typer.rich_utils import rich_format_error

        rich_format_error(error)
        if "--json" in given[: given.index("--") if "--" in given else None]:
            error_object("UsageError", error.format_message())
        status = 2
    except typer.Abort:
        typer.echo("aborted", err=True)
        status = 1
    sys.exit(status)
