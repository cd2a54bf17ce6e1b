"""`errata study NAME`: the experiments of the papers, each one function that gives a table, a figure and a sentence.

Knows what each study asks and how long it takes. What a study does is in its module, imported when it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errata.errors import ConfigError, unknown_name
from errata.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from errata.model import EditableModel
    from errata.studies.result import StudyResult
    from errata.studies.workbench import StudyOptions, Workbench

__all__ = ["Study", "studies", "study"]


@dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
        question: what it asks, in one sentence.
        size: what it does by default, and about how long that takes on atlas on two CPU cores.
        target: "module:function"; the function takes a `Workbench`.
    """

    name: str
    question: str
    size: str
    target: str

    def run(self, model: EditableModel, options: StudyOptions, progress: Progress = NO_PROGRESS) -> StudyResult:
        """Do the study, or what is still missing of it, and write its files to the options' folder.

        Args:
            model: the base model; nothing may be attached to it.

        Raises:
            ConfigError: an option that does not fit this study.
        """
        from errata.studies.workbench import Workbench

        module, _, name = self.target.partition(":")
        make: Callable[[Workbench], StudyResult] = getattr(importlib.import_module(module), name)
        bench = Workbench(self, model, options, progress)
        return make(bench).save(options.folder)


_STUDIES = (
    Study(
        "wise-triangle",
        "Can an editor be reliable, general and local at once, and for how many edits?",
        "five methods, 300 edits each, asked at 1, 10, 100 and 300; 25 minutes",
        "errata.studies.wise:triangle",
    ),
    Study(
        "wise-masks",
        "How dense should WISE's random masks be, and into how many shards should edits be divided?",
        "nine settings, 60 edits each; 12 minutes",
        "errata.studies.wise:masks",
    ),
    Study(
        "wise-merging",
        "Which rule merges WISE's shards with the least loss?",
        "seven rules, 100 edits each; 15 minutes",
        "errata.studies.wise:merging",
    ),
    Study(
        "wise-margins",
        "Does WISE's router need its margin loss?",
        "with and without, 100 edits each, asked at 10 and 100; 5 minutes",
        "errata.studies.wise:margins",
    ),
    Study(
        "memoir-sanity",
        "Which stored edit does each prompt around ten edits reach, and by how much?",
        "10 edits; 1 minute",
        "errata.studies.memoir:sanity",
    ),
    Study(
        "memoir-k-sweep",
        "How many columns should one edit of MEMOIR write?",
        "four values of k, 100 edits each; 2 minutes",
        "errata.studies.memoir:k_sweep",
    ),
    Study(
        "memoir-collisions",
        "Is an edit lost because later edits overwrite its columns?",
        "1,000 edits; 5 minutes",
        "errata.studies.memoir:collisions",
    ),
    Study(
        "memoir-threshold",
        "What does MEMOIR's threshold trade, generalization against locality?",
        "100 edits, asked at a dozen thresholds; 3 minutes",
        "errata.studies.memoir:threshold",
    ),
    Study(
        "memoir-density",
        "Is it the number of edits or the number of prompts that fills MEMOIR's memory?",
        "100 edits of 100 prompts, 100 edits of 10 prompts; 2 minutes",
        "errata.studies.memoir:density",
    ),
    Study(
        "memoir-ablation",
        "Which parts of MEMOIR carry it?",
        "the whole method and twelve variants of it, 100 edits each; 6 minutes",
        "errata.studies.memoir:ablation",
    ),
    Study(
        "memoir-long",
        "How many edits does MEMOIR's memory hold before old ones are lost?",
        "1,500 edits, asked five times on the way; 8 minutes (--edits 3000, twice the key width, 20)",
        "errata.studies.memoir:long",
    ),
    Study(
        "memoir-layers",
        "Do more layers hold more edits?",
        "one layer and two, in two ways, 300 edits each; 4 minutes (--edits 3000, twice the key width, 50)",
        "errata.studies.memoir:layers",
    ),
    Study(
        "memoir-routing",
        "Which signal knows other wordings of a question, and does not take another question for it?",
        "seven signals, 700 edits stored, none trained; 2 minutes",
        "errata.studies.signals:routing",
    ),
    Study(
        "single-edits",
        "What does each weight editor do with one edit, before any two of them meet?",
        "nine methods, 100 edits each, every one made alone and taken back; 20 minutes",
        "errata.studies.weights:singles",
    ),
    Study(
        "dual-facets",
        "What does a sequence of edits do to everything else the model can do, and why?",
        "eight runs of 100 edits, examined six times, and what mitigates; about 70 minutes of one core",
        "errata.studies.dual_facets:dual_facets",
    ),
    Study(
        "mirage",
        "By how much does teacher forcing flatter what a model answers by itself?",
        "all methods, 50 edits each; 13 minutes",
        "errata.studies.mirage:mirage",
    ),
    Study(
        "grace-radius",
        "Can a wider radius make GRACE general without costing it locality?",
        "six radii, 100 edits each; 8 minutes",
        "errata.studies.grace:radius",
    ),
    Study(
        "revert",
        "Is an edit that is taken out really gone, and what does that cost the others?",
        "two methods, 200 edits each, 20 of them reverted; 3 minutes (--edits 500, 7)",
        "errata.studies.reverting:revert",
    ),
    Study(
        "unlearn",
        "Can editors make a model refuse all it knows about some subjects, and does that hold under attack?",
        "five methods, about 40 facts, with queries merged where the method looks for subjects; 8 minutes",
        "errata.studies.unlearning:unlearn",
    ),
    Study(
        "hallucination",
        "Does the true sentence become likely where a model made one up? (needs --data FILE)",
        "four methods, 10 edits each of at most 40 words; 12 minutes",
        "errata.studies.texts:hallucination",
    ),
    Study(
        "temporal",
        "Does one text about a new entity make other texts about it likely? (needs --data FILE)",
        "four methods, 10 edits each of at most 40 words; 10 minutes",
        "errata.studies.texts:temporal",
    ),
    Study(
        "halluedit",
        "Do edits of what this model gets wrong hold in five dimensions, also when the answer is doubted?",
        "six methods, 50 edits each; 7 minutes",
        "errata.studies.halluedit:halluedit",
    ),
    Study(
        "evoke",
        "Does an edited model say the new answer where it does not belong?",
        "five methods, 50 edits each, every one made alone; 3 minutes",
        "errata.studies.evoke:evoke",
    ),
    Study(
        "should-we-edit",
        "How many edits do a model's general abilities survive?",
        "five methods, 100 edits each, six capabilities asked at 20, 50 and 100; 9 minutes",
        "errata.studies.abilities:abilities",
    ),
    Study(
        "memoryllm-retention",
        "For how long does a memory answer for a text while it reads others?",
        "128 documents, each asked about after up to 60 others; 4 minutes",
        "errata.studies.memory:retention",
    ),
    Study(
        "memoryllm-long",
        "Does a memory that keeps what it drops, and retrieves it by the question, remember for longer?",
        "128 documents, each asked about after up to five times N/K others, in two ways; 15 minutes",
        "errata.studies.memory_store:long_term",
    ),
    Study(
        "memoryllm-capacity",
        "How much does a memory hold, in pools of several sizes and of texts of more and more facts?",
        "64 documents in ten settings, asked after 0, 10 and 20 others; 12 minutes",
        "errata.studies.memory:capacity",
    ),
    Study(
        "memoryllm-integrity",
        "Does a memory that is rewritten a million times get worse at it?",
        "1,000,000 updates, 25,000 questions on the way; 70 minutes with --dtype bfloat16 (--edits 50000, 4 minutes)",
        "errata.studies.memory_long:integrity",
    ),
    Study(
        "memoryllm-edits",
        "Is a memory that reads edits an editor, beside those that write weights?",
        "five methods and the prompt itself, 50 edits made alone, then 20 in sequence; 12 minutes",
        "errata.studies.memory_edits:edits",
    ),
    Study(
        "memoryllm-context",
        "Does a memory answer out of a text that is longer than the model's window?",
        "60 contexts of each of five lengths, 128 to 2,048 tokens; 15 minutes",
        "errata.studies.memory_context:context",
    ),
)


def studies() -> tuple[Study, ...]:
    """All studies, those of one paper together."""
    return _STUDIES


def study(name: str) -> Study:
    """Raises ConfigError, with the nearest names, for a study that does not exist."""
    for one in _STUDIES:
        if one.name == name:
            return one
    raise ConfigError(unknown_name("study", name, [one.name for one in _STUDIES]))
