"""The recipe: one frozen pydantic model per section. Unknown keys are errors (contract C1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from peftlab.recipe.adapter import AdapterSection
from peftlab.recipe.data import DataSection, SelfTrainingSection
from peftlab.recipe.distillation import DistillSection
from peftlab.recipe.rules import check_rules
from peftlab.recipe.section import DType, Section, StorageName
from peftlab.specs.kernels import KERNEL_MODES
from peftlab.specs.method_spec import MethodSpec
from peftlab.specs.methods import METHODS
from peftlab.specs.objectives import OBJECTIVES
from peftlab.specs.optimizers import OPTIMIZERS, SCHEDULES
from peftlab.specs.storages import STORAGES
from peftlab.specs.task_spec import TaskSpec
from peftlab.specs.tasks import TASKS, spec_of

if TYPE_CHECKING:
    TaskName = str
    ObjectiveName = str
    OptimizerName = str
    ScheduleName = str
    KernelMode = str
else:
    TaskName = Literal[tuple(TASKS)]
    ObjectiveName = Literal[tuple(OBJECTIVES)]
    OptimizerName, ScheduleName = Literal[tuple(OPTIMIZERS)], Literal[tuple(SCHEDULES)]
    KernelMode = Literal[tuple(KERNEL_MODES)]


class ModelSection(Section):
    name: str = Field(
        description="hub id, local folder, .gguf file, package:IMPORT/PATH, tiny:llama | tiny:bert | tiny:t5 | tiny:vit | "
        "tiny:yolos | tiny:detr | tiny:segformer | tiny:upernet, or shape:NAME (random weights of a known size, such as "
        "shape:llama-3-8b, for benchmarks)"
    )
    revision: str | None = Field(None, description="commit, branch or tag of a hub model")
    adapter: str | None = Field(
        None,
        description="run or folder of an adapter to fold into the model's weights first; what the recipe trains comes on top",
    )
    quantize: StorageName = Field(
        "none", description="how the frozen linear weights are stored (bitsandbytes); nf4 is what QLoRA uses"
    )
    double_quant: bool = Field(True, description="quantize the scales of the blocks as well; needs quantize: nf4")
    compute_dtype: DType = Field(
        "auto", description="dtype that the weights are dequantized to for the matmul; needs quantize: nf4"
    )
    dtype: DType = Field(
        "auto", description="dtype of the weights that are not quantized; auto: bfloat16 on CUDA, float32 on CPU"
    )
    resize_token_embeddings: int | None = Field(
        None,
        ge=1,
        description="rows of embeddings and head, if an adapter was trained with another number than the model has; "
        "training new rows trains both in full",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="attention implementation of transformers"
    )
    chat_template: str | None = Field(
        None, description="path of a Jinja file that replaces the tokenizer's chat template"
    )
    pooling: Literal["mean", "cls", "last"] | None = Field(
        None,
        description="how token vectors become one text vector; default: what the model's files say, else mean (embedding)",
    )
    trust_remote_code: bool = Field(False, description="run Python code that ships with a hub model")

    @model_validator(mode="after")
    def _quantize_keys(self) -> Self:
        used = STORAGES[self.quantize].keys
        for storage in STORAGES.values():
            idle = [key for key in storage.keys if key not in used]
            self._reject_unless_default(idle, f"without quantize: {storage.name}")
        return self


class TrainSection(Section):
    epochs: float | None = Field(None, gt=0, description="passes over the training rows; default 1")
    max_steps: int | None = Field(None, ge=1, description="number of optimizer steps, instead of epochs")
    batch_size: int | None = Field(None, ge=1, description="rows per batch, or sequences with data.packing; default 8")
    batch_tokens: int | None = Field(None, ge=1, description="tokens per batch, instead of batch_size")
    accumulate: int = Field(1, ge=1, description="batches per optimizer step")
    grouping: Literal["none", "step", "epoch"] = Field(
        "step",
        description="step: cut the rows of one optimizer step into micro-batches of similar length (same gradient, "
        "less padding); epoch: put rows of similar length into the same step; none: batch in data order",
    )
    optimizer: OptimizerName = Field(
        "adamw",
        description="optimizer; 8bit: a quarter of its memory, paged: in CPU memory when the GPU is full (CUDA)",
    )
    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    schedule: ScheduleName = Field("linear", description="learning-rate schedule after the warm-up")
    warmup: float = Field(0.03, ge=0, description="warm-up: a share of the steps if below 1, else a number of steps")
    weight_decay: float = Field(0.0, ge=0, description="weight decay")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW betas")
    loraplus_lr_ratio: float = Field(
        1.0, gt=0, description="learning rate of LoRA's B / that of A (LoRA+); 16 is what its authors use"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient norm to this value; 0: no clipping")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, slower"
    )
    precision: DType = Field(
        "auto", description="autocast dtype; auto: bfloat16 on a GPU that supports it, else float32"
    )
    batch_norm: Literal["frozen", "trained"] = Field(
        "frozen",
        description="running statistics of BatchNorm. frozen: as in the model's files; trained: each micro-batch is normalized "
        "by its own, so the loss depends on train.batch_size, for weights that start at random",
    )
    mask_share: float = Field(
        0.15, gt=0, lt=1, description="share of the tokens of a row that are masked and predicted (masked_lm)"
    )
    class_weights: Literal["none", "balanced"] | dict[str, float] = Field(
        "none", description="weight of each class in the loss (seq_cls, image_cls)"
    )
    objective: ObjectiveName | None = Field(
        None, description="the loss of pairs, triplets and scored pairs; default: the first of those for the columns"
    )
    embedding_scale: float = Field(
        20.0, gt=0, description="factor on cosines in the losses in_batch and cosent (1 / temperature)"
    )
    margin: float = Field(
        0.5, gt=0, description="by how much the positive shall be closer to the anchor than the negative, in cosine"
    )
    matryoshka: list[int] = Field(
        default_factory=list,
        description="train vectors that can be cut: the loss is the sum over these numbers of leading dimensions, such as "
        "[384, 192, 96]",
    )

    self_training: SelfTrainingSection | None = Field(
        None, description="learn from rows without labels as well (seq_cls, image_cls)"
    )

    @field_validator("matryoshka")
    @classmethod
    def _widths_differ(cls, value: list[int]) -> list[int]:
        if any(width < 1 for width in value) or len(set(value)) < len(value):
            raise ValueError(f"expected different numbers of dimensions, 1 or more; found {value}")
        return value

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("set epochs or max_steps, not both")
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ValueError("set batch_size or batch_tokens, not both")
        return self


class EvalSection(Section):
    metrics: list[str] | None = Field(None, description="metric names; default: the metrics of the task")
    before: bool = Field(True, description="evaluate the model before training as well")
    every: int | None = Field(None, ge=1, description="evaluate every N steps; the end of training is always evaluated")
    batch_tokens: int = Field(4096, ge=1, description="padded tokens per evaluation batch")
    threshold: float | Literal["tuned"] | None = Field(
        None,
        description="probability from which a row has a label of columns.labels; default 0.5; tuned: for each label the one "
        "with the best F1 on training rows, found after training (seq_cls)",
    )
    choices: list[str] | None = Field(
        None, min_length=2, description="the possible completions; adds accuracy and F1 over them (causal_lm)"
    )
    best: str | None = Field(None, description="keep the checkpoint with the best value of this metric")
    patience: int | None = Field(None, ge=1, description="stop after N evaluations without a better value of eval.best")
    prompts: list[str] = Field(
        default_factory=list,
        description="prompts that the model answers before and after training (causal_lm, seq2seq)",
    )
    max_new_tokens: int = Field(
        64, ge=1, description="longest text that the model writes in evaluation, in tokens (causal_lm, seq2seq)"
    )
    beams: int = Field(
        1, ge=1, description="width of the beam search for texts written in evaluation; 1: greedy (seq2seq)"
    )

    max_answer_tokens: int = Field(30, ge=1, description="longest answer, in tokens (extractive_qa)")
    null_threshold: float | None = Field(
        0.0,
        description="a question gets no answer if the score of having none exceeds that of the best answer by more than "
        "this; null: every question gets an answer (extractive_qa)",
    )
    min_score: float = Field(
        0.5, ge=0, le=1, description="least score of an object that a prediction shows (object_detection)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.choices is not None and len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices: contains {next(c for c in self.choices if self.choices.count(c) > 1)!r} twice")
        if isinstance(self.threshold, float) and not 0 < self.threshold < 1:
            raise ValueError(f"threshold: expected a number between 0 and 1, or tuned; found {self.threshold:g}")
        if not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("prompts: one of them is empty; remove it")
        if self.patience is not None and (self.best is None or self.every is None):
            raise ValueError("patience needs eval.best and eval.every")
        return self


class RunSection(Section):
    dir: str | None = Field(None, description="run folder; default: runs/NAME, with a number if it exists")
    seed: int = Field(0, ge=0, description="seed of the split, the row order, the adapter and the dropout")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device to run on")
    deterministic: bool = Field(
        True, description="use deterministic algorithms: the same machine gives the same adapter bytes"
    )
    kernels: KernelMode = Field(
        "auto",
        description="how adapted layers are computed. auto: fused (Triton on a GPU, PyTorch on a CPU); triton: fail "
        "if Triton does not work; reference: PEFT's own code; cpu-bf16, cpu-int8: fused, with operands "
        "rounded for a CPU's AMX or VNNI units",
    )
    log: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="trackers to log to, in addition to metrics.jsonl"
    )
    save_every: int | None = Field(None, ge=1, description="save a checkpoint every N steps")
    keep: int = Field(2, ge=1, description="number of step checkpoints to keep")
    merge: Literal["none", "original", "dequantized"] = Field(
        "none",
        description="merge the adapter after training, into the original or the dequantized weights, and verify the "
        "result",
    )


class Recipe(Section):
    task: TaskName = Field(description="what the model learns")
    model: ModelSection = Field(description="the frozen backbone")
    adapter: AdapterSection = Field(default_factory=AdapterSection, description="what is trained")
    data: DataSection = Field(description="rows, columns and texts")
    train: TrainSection = Field(default_factory=TrainSection, description="the training loop")
    eval: EvalSection = Field(default_factory=EvalSection, description="metrics and when to compute them")
    distill: DistillSection | None = Field(None, description="teacher and student, for `teach` and `distill`")
    run: RunSection = Field(default_factory=RunSection, description="run folder, device, seed and checkpoints")
    lock: dict[str, Any] | None = Field(
        None, description="written by a run: package versions and fingerprints, checked when the run is repeated"
    )

    @property
    def spec(self) -> TaskSpec:
        """The spec of the task."""
        return spec_of(self.task, self.data.columns)

    @property
    def objective(self) -> str | None:
        """The loss of a task that has several; None if it has one."""
        return self.train.objective or next(iter(self.spec.objectives), None)

    @property
    def method(self) -> MethodSpec:
        """The spec of the adapter method."""
        return METHODS[self.adapter.method]

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        check_rules(self)
        return self
