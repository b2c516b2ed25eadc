"""The verbs, in the order of ``peftlab --help``. A verb's file is imported when the verb is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        function: ``FILE:FUNCTION`` under ``peftlab/cli``. help: one line. example: a command that can be typed.
        more: extra text for the verb's help. ranks: whether it also runs as the processes of a launch.
    """

    function: str
    help: str
    example: str
    more: str = ""
    ranks: bool = False


@dataclass(frozen=True)
class Group:
    """A verb with subcommands.

    Attributes:
        default: the subcommand to use if the first word is not one of them; None: no default.
        alone: the subcommand to run without arguments; None: show the help.
    """

    help: str
    example: str
    verbs: Mapping[str, Verb] = field(default_factory=dict)
    default: str | None = None
    alone: str | None = None


VERBS: dict[str, Verb | Group] = {
    "check": Verb(
        "check:check",
        "Show what a recipe would train, token by token, without training.",
        "peftlab check quickstart --show 3",
    ),
    "plan": Verb(
        "plan:plan",
        "Plan memory, disk and time of a training, without weights.",
        "peftlab plan quickstart --gpu 24GiB",
    ),
    "train": Verb(
        "train:train",
        "Train what a recipe describes and write a run folder.",
        "peftlab train quickstart train.lr=5e-4 run.dir=runs/first",
        ranks=True,
    ),
    "teach": Verb("teach:teach", "Cache the teacher's outputs for distillation.", "peftlab teach film-student --plan"),
    "distill": Verb(
        "distill:distill",
        "Train a student from a teacher and report what it kept.",
        "peftlab distill film-student --seeds 3",
        ranks=True,
    ),
    "eval": Verb(
        "evaluate:evaluate",
        "Compute the metrics of a run or a model on held-out rows.",
        "peftlab eval runs/quickstart data.eval=other.csv",
    ),
    "predict": Verb(
        "predict:predict",
        "Predict labels or answers for texts, a file, or standard input.",
        'peftlab predict runs/quickstart "You won a prize"',
    ),
    "chat": Verb(
        "chat:chat",
        "Chat with a run or a model that has a chat template.",
        "peftlab chat runs/quickstart --temperature 0.7",
    ),
    "merge": Verb(
        "merge:merge",
        "Fold the adapter into the weights and verify the result.",
        "peftlab merge runs/quickstart --base original",
    ),
    "adapters": Group(
        "List the adapter methods; show, shrink, combine, extract and convert adapters.",
        "peftlab adapters shrink runs/quickstart --to runs/small",
        {
            "list": Verb(
                "adapter_methods:list_methods", "List the methods, or the options of one.", "peftlab adapters list vera"
            ),
            "show": Verb(
                "adapters:show",
                "Show what an adapter changes, module by module.",
                "peftlab adapters show runs/quickstart --picture adapter.png",
            ),
            "shrink": Verb(
                "adapters:shrink",
                "Keep the largest singular values, verified.",
                "peftlab adapters shrink runs/quickstart --to runs/small --keep 0.25",
            ),
            "combine": Verb(
                "adapters:combine",
                "Combine adapters of one base into one, verified.",
                "peftlab adapters combine runs/a runs/b --to runs/both --weights 1,0.5",
            ),
            "extract": Verb(
                "adapters:extract",
                "Extract a LoRA adapter from two checkpoints of one model.",
                "peftlab adapters extract models/base models/tuned --rank 16 --to lora",
            ),
            "convert": Verb(
                "adapters:convert",
                "Convert an adapter of another method to LoRA, verified.",
                "peftlab adapters convert runs/loha --rank 0.99 --to runs/lora",
            ),
        },
        alone="list",
    ),
    "recipes": Group(
        "List, show and copy the recipes that ship with peftlab.",
        "peftlab recipes copy quickstart mine.yaml",
        {
            "list": Verb("recipes:list_recipes", "List the shipped recipes.", "peftlab recipes list"),
            "show": Verb(
                "recipes:show", "Print a shipped recipe, comments included.", "peftlab recipes show quickstart"
            ),
            "copy": Verb(
                "recipes:copy", "Copy a shipped recipe to a file.", "peftlab recipes copy quickstart mine.yaml"
            ),
            "schema": Verb(
                "recipes:schema",
                "Print the JSON Schema of a recipe, for editors.",
                "peftlab recipes schema > recipe.schema.json",
            ),
        },
        alone="list",
    ),
    "bench": Group(
        "Benchmark training and generation on this machine.",
        "peftlab bench quickstart --quantize nf4",
        {
            "run": Verb(
                "bench_run:bench_run",
                "Measure a recipe's training and generation over adapters, ranks and weights.",
                "peftlab bench quickstart --ranks 8,64 --batch 1,4",
                more="The word run may be left out: peftlab bench RECIPE.",
            ),
            "compare": Verb(
                "bench_compare:compare",
                "Compare two results of peftlab bench, cell by cell.",
                "peftlab bench compare runs/bench-before runs/bench-after",
            ),
            "tune-kernels": Verb(
                "bench_tuning:tune_kernels",
                "Measure the fastest plans for adapted linears on this machine, for later runs.",
                "peftlab bench tune-kernels --kinds nf4 --rows 2048",
            ),
        },
        default="run",
    ),
    "doctor": Verb("doctor:doctor", "Check the installation and this machine.", "peftlab doctor --json"),
}
