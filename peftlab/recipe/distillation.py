"""The section ``distill``: teachers, how the student begins, the losses, the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from peftlab.recipe.section import DType, Section, StorageName
from peftlab.specs.losses import LOSSES

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]

SELF = "self"


class TeacherSection(Section):
    name: str = Field(
        description="run folder, or a model as in model.name; self: the student's own backbone without its adapter"
    )
    adapter: str | None = Field(
        None,
        description="folder of a PEFT adapter to load onto that model; with name: self it is loaded alongside the "
        "student's adapter",
    )
    revision: str | None = Field(None, description="commit, branch or tag of a hub model")
    quantize: StorageName | None = Field(
        None,
        description="how the teacher's linear weights are stored; default: as the run was trained, or none for a model",
    )
    dtype: DType = Field("auto", description="dtype of the unquantized teacher weights")
    device: Literal["auto", "cpu"] = Field("auto", description="where the teacher runs; cpu keeps it out of GPU memory")
    weight: float = Field(1.0, gt=0, description="weight of this teacher's loss, when there are several teachers")
    rows: dict[str, str | list[str]] = Field(
        default_factory=dict,
        description="use this teacher only for rows with this value in this column, such as {language: de}",
    )

    @model_validator(mode="after")
    def _self_keys(self) -> Self:
        if self.name == SELF:
            self._reject_unless_default(
                ["revision", "quantize", "dtype", "device"], "with name: self, which is the student's backbone"
            )
        return self


class StudentInitSection(Section):
    layers: list[int] | None = Field(None, description="layers of model.name to keep, counted from 0")
    num_layers: int | None = Field(None, ge=1, description="number of layers to keep, instead of a list")
    choose: Literal["even", "first", "importance"] = Field(
        "even",
        description="which num_layers to keep: evenly spaced, the first ones, or those whose removal changes the "
        "output most",
    )
    search: Literal["greedy", "once"] = Field(
        "greedy",
        description="how importance is measured: again after each removed layer, or once for all layers; needs "
        "choose: importance",
    )
    hidden_size: int | None = Field(None, ge=1, description="width of the hidden states")
    num_heads: int | None = Field(None, ge=1, description="attention heads per layer")
    num_key_value_heads: int | None = Field(None, ge=1, description="key and value heads per layer")
    intermediate_size: int | None = Field(None, ge=1, description="width of the feed-forward blocks")
    weights: Literal["copied", "random"] = Field(
        "copied",
        description="copied: take the weights of model.name; random: the same architecture with random weights from "
        "the run's seed, as a control",
    )
    sample_rows: int = Field(64, ge=1, description="number of training rows to measure importance on")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        widths = (self.hidden_size, self.num_heads, self.num_key_value_heads, self.intermediate_size)
        if self.layers is not None and self.num_layers is not None:
            raise ValueError("set layers or num_layers, not both")
        if self.num_layers is None:
            self._reject_unless_default(["choose"], "without num_layers")
        if self.choose != "importance":
            self._reject_unless_default(["search"], "without choose: importance")
        if self.weights == "random":
            self._reject_unless_default(["choose", "search", "sample_rows"], "with weights: random")
        elif self.layers is None and self.num_layers is None and not any(widths):
            raise ValueError("cuts nothing: set layers, num_layers or a width")
        if self.weights == "copied" and self.choose != "importance" and not any(widths):
            self._reject_unless_default(["sample_rows"], "without a choice by importance")
        return self


class LossSection(Section):
    kind: LossName = Field(description="name of the loss")
    weight: float = Field(1.0, gt=0, description="weight of this loss in the sum")
    layers: dict[int, int] | None = Field(
        None,
        description="which layers to compare, {student layer: teacher layer}, counted from 0, for hidden_*, "
        "attention_* and relation_kl; default: the last layers; without it, hidden_* in task: embedding "
        "compares the embeddings",
    )
    relation_heads: int | None = Field(
        None,
        ge=1,
        description="number of parts that queries, keys and values are split into, for relation_kl; default: their "
        "heads",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "layers" not in LOSSES[self.kind].keys:
            self._reject_unless_default(["layers"], f"for kind: {self.kind}, which compares answers")
        if self.layers == {}:
            raise ValueError("layers: is empty; write {0: 1} for the student's layer 0 and the teacher's layer 1")
        if "relation_heads" not in LOSSES[self.kind].keys:
            self._reject_unless_default(["relation_heads"], f"for kind: {self.kind}")
        return self

    def compares_layers(self, predicts: str) -> bool:
        """Whether it compares layers inside the models, not their outputs. Args: predicts: what the task predicts."""
        return LOSSES[self.kind].compares_layers(predicts, layers_given=self.layers is not None)


class TargetsSection(Section):
    fill: Literal["topk", "sampled", "mixed", "hidden"] = Field(
        "topk",
        description="what to store of the teacher at each position. topk: the k likeliest classes and the mass of "
        "all others; sampled: drawn classes; mixed: the k likeliest and draws from the rest; hidden: the "
        "last hidden state",
    )
    k: int | None = Field(
        None, ge=1, description="classes per position, for topk and mixed; default: 50, or all if there are fewer"
    )
    draws: int = Field(50, ge=1, le=255, description="draws per position, for sampled and mixed")
    values: Literal["float16", "float32"] = Field(
        "float16", description="dtype of the stored log-probabilities, for topk and mixed"
    )
    states: Literal["bfloat16", "int8", "float32"] = Field(
        "bfloat16", description="dtype of the stored states, for hidden"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        used = {"topk": {"k", "values"}, "sampled": {"draws"}, "mixed": {"k", "draws", "values"}, "hidden": {"states"}}
        idle = [name for name in ("k", "draws", "values", "states") if name not in used[self.fill]]
        self._reject_unless_default(idle, f"for fill: {self.fill}")
        return self


class OnPolicySection(Section):
    phases: int = Field(
        2, ge=1, description="number of phases; in each, the current student writes answers and then learns from them"
    )
    rows: int | None = Field(
        None,
        ge=1,
        description="training rows per phase; default: the training rows divided among all phases",
    )
    student_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of those rows whose answer the student writes; the other rows keep their own answer",
    )
    temperature: float = Field(1.0, ge=0, description="sampling temperature of the student while it writes; 0: greedy")
    top_p: float = Field(
        1.0, gt=0, le=1, description="nucleus sampling: smallest set of tokens with this total probability"
    )
    max_new_tokens: int = Field(
        128,
        ge=1,
        description="longest answer in tokens; the student learns no end of turn from an answer that is cut off here",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.temperature == 0:
            self._reject_unless_default(["top_p"], "with temperature: 0, which draws nothing")
        return self


class DistillSection(Section):
    teacher: TeacherSection | None = Field(None, description="the model to learn from; its name alone is enough")
    teachers: list[TeacherSection] = Field(
        default_factory=list, description="several teachers, each with a weight or with its own rows"
    )
    student_init: StudentInitSection | None = Field(
        None, description="cut the student out of model.name; default: model.name is the student"
    )
    losses: list[LossSection] = Field(
        default_factory=list,
        description="losses against the teacher; default: forward_kl; for task: embedding hidden_cosine, or "
        "similarity_kl if the widths differ",
    )
    answers: Literal["data", "teacher"] = Field(
        "data",
        description="whose answers the student learns from; teacher: the teacher writes them before the training, greedily, "
        "and they stand in place of those of the data (sequence distillation; causal_lm, seq2seq); of object_detection the boxes "
        "that it finds with a score of eval.min_score",
    )
    share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the teacher in the mixture of skew_forward_kl and jsd, and of the student in that of "
        "skew_reverse_kl",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="temperature of the teacher's and the student's softmax; 1 for language models, 2 to 8 for a few "
        "classes",
    )
    scale_by_t2: bool = Field(True, description="multiply the divergence by the squared temperature")
    hard_weight: float = Field(0.0, ge=0, le=1, description="share of the labels' cross-entropy in the loss")
    transfer: str | None = Field(
        None, description="rows without labels that the student learns from, instead of data.train"
    )
    cache: str | None = Field(
        None,
        description="folder for the cached teacher outputs; `peftlab teach` fills it, and `peftlab distill` does if "
        "it is missing",
    )
    targets: TargetsSection = Field(default_factory=TargetsSection, description="what the cache stores")
    on_policy: OnPolicySection | None = Field(
        None,
        description="the student writes answers to the training prompts, the teacher scores every token of them into "
        "the cache, and the student learns from that, in phases (causal_lm)",
    )
    cross_tokenizer: Literal["uld"] | None = Field(
        None,
        description="for a teacher with another tokenizer; uld compares sorted probabilities at shared text positions (causal_lm)",
    )
    headline: str | None = Field(
        None,
        description="metric of the verdict, such as f1_macro or recall_spam; default: accuracy, perplexity or "
        "spearman, by task",
    )
    baseline: bool = Field(True, description="also train the same student on the labels alone, with the same budget")
    seeds: int = Field(1, ge=1, description="number of repetitions, with seeds run.seed, run.seed + 1, ...")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.teacher is None and not self.teachers:
            raise ValueError("has no teacher: set teacher, or teachers for several of them")
        if self.teacher is not None and self.teachers:
            raise ValueError("teacher: set either teacher or teachers, not both")
        if self.cache is None:
            self._reject_unless_default(["targets"], "without distill.cache")
        if self.cross_tokenizer is not None:
            self._reject_unless_default(
                ["losses", "scale_by_t2"], "with cross_tokenizer, which compares sorted probabilities in one way"
            )
            if self.cache is not None or self.teachers or self.all_teachers[0].name == SELF:
                raise ValueError("cross_tokenizer: uld needs a single live teacher, not a cache or several teachers")
        if self.on_policy is not None:
            self._check_on_policy()
        if self.answers == "teacher":
            self._check_answers()
        if self.transfer is not None and self.hard_weight and self.answers == "data":
            raise ValueError("hard_weight: the rows of transfer have no labels; remove hard_weight or transfer")
        names = [loss.kind for loss in self.losses]
        if len(set(names)) < len(names):
            raise ValueError(f"losses: contains {next(n for n in names if names.count(n) > 1)} twice")
        needs_all = [name for name in names if LOSSES[name].needs_every_class]
        if self.cache is not None and self.targets.fill != "hidden" and needs_all:
            raise ValueError(
                f"losses: {needs_all[0]} needs the teacher's probability of every class, but the cache stores only some; set "
                "targets: {fill: hidden}, or remove cache"
            )
        if not any("share" in LOSSES[name].keys for name in names):
            self._reject_unless_default(["share"], "without jsd or a skewed divergence among the losses")
        return self

    def _check_on_policy(self) -> None:
        if self.cache is None:
            raise ValueError(
                "on_policy needs cache, a folder for the teacher's scores of the student's answers: teacher and student are "
                "never in memory together"
            )
        self._reject_unless_default(["hard_weight"], "with on_policy: the student's own answers are not labels")
        self._reject_unless_default(
            ["cross_tokenizer"], "with on_policy: the teacher reads the tokens that the student wrote"
        )

    def _check_answers(self) -> None:
        if self.on_policy is not None:
            raise ValueError("answers: with on_policy the student writes the answers; remove one of the two")
        if self.cross_tokenizer is not None:
            raise ValueError("answers: the student learns from the teacher's tokens, so both need one tokenizer")
        if len(self.all_teachers) != 1 or self.all_teachers[0].rows:
            raise ValueError("answers: one teacher writes them; set distill.teacher")
        if self.all_teachers[0].name == SELF:
            raise ValueError("answers: self is the student's own backbone; name its model as the teacher")

    @property
    def all_teachers(self) -> list[TeacherSection]:
        return [self.teacher] if self.teacher is not None else self.teachers


def expand_names(data: Any, lines: dict[str, Any]) -> None:
    """Expands a teacher or a loss that is only a name to its section, in place."""
    section = data.get("distill") if isinstance(data, dict) else None
    if not isinstance(section, dict):
        return
    if isinstance(section.get("teacher"), str):
        section["teacher"] = {"name": section["teacher"]}
        if "distill.teacher" in lines:
            lines["distill.teacher.name"] = lines["distill.teacher"]
    for key, name in (("teachers", "name"), ("losses", "kind")):
        items = section.get(key)
        if isinstance(items, list):
            section[key] = [{name: item} if isinstance(item, str) else item for item in items]
