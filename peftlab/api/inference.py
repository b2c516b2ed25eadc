"""``evaluate``, ``predict`` and ``Chat``: using a run, a merged model or a base model."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peftlab.api import build
from peftlab.api.opening import Opened, RecipeSource, Target, find_target, open_target
from peftlab.data import Rows, load_rows
from peftlab.errors import DataError, RecipeError
from peftlab.evaluation.loop import evaluate_examples
from peftlab.evaluation.metrics import check_metrics, default_metrics
from peftlab.training.progress import Progress, SilentProgress, make_progress

# Rows predicted together: enough to group by length, few enough that the first results come soon.
_WINDOW = 256


def evaluate(
    target: str | os.PathLike[str],
    *,
    recipe: RecipeSource | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Metrics of a target on the held-out rows of its recipe.

    Args:
        target: a run folder, its merged/ folder, an adapter folder, or a base model (then ``recipe`` says what on).
        overrides: ``section.key=value``, such as ``data.eval=other.csv``.

    Returns: ``{"target", "kind", "rows", "metrics": {flat name: value}}``.
    Raises: RecipeError, DataError, ArtifactError, ResourceError.
    """
    build.prepare_libraries()
    progress = progress or make_progress()
    found = find_target(target, recipe, overrides)
    with build.located(found.loaded):
        settings = found.loaded.recipe
        if not settings.spec.learns_from_labels:
            raise RecipeError(
                "there are no labels to score vectors with; `peftlab distill` compares a student's with its teacher's",
                key="task",
            )
        if settings.eval.metrics is not None:
            check_metrics(settings.eval.metrics, settings.task, bool(settings.eval.choices))
        progress.stage("reading data")
        data = build.load_data(settings)
        opened = open_target(found, progress, rows=data.labelled)
        encoded = build.encode(settings, opened.task, data.eval, limit=opened.limit, training=False)
        progress.stage(f"evaluating on {len(encoded.examples):,} rows")
        metrics = evaluate_examples(
            opened.model,
            opened.task,
            encoded,
            metrics=settings.eval.metrics or default_metrics(settings.task, bool(settings.eval.choices)),
            batch_tokens=settings.eval.batch_tokens,
            device=opened.device,
            autocast=_autocast(opened),
        )
        progress.stop()
        return {"target": str(target), "kind": found.kind, "rows": len(encoded.examples), "metrics": metrics}


def _autocast(opened: Opened) -> Any:
    """A callable giving the precision of training, so that a run evaluates to the figures it ended with."""
    import functools

    import torch

    precision = build.precision_of(opened.target.loaded.recipe, opened.device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return functools.partial(torch.autocast, opened.device, dtype=dtype, enabled=precision != "no")


def predict(
    target: str | os.PathLike[str],
    inputs: str | os.PathLike[str] | Sequence[str] | Sequence[dict[str, Any]],
    *,
    recipe: RecipeSource | None = None,
    overrides: Sequence[str] = (),
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields one result per input, in order: a label with probabilities, or generated text.

    Args:
        inputs: a path (file with the recipe's columns), a list of texts, or a list of rows (dicts).
        max_new_tokens, temperature, top_p: for generated text; temperature 0 is greedy.
    Raises: as ``evaluate``.
    """
    build.prepare_libraries()
    progress = progress or make_progress()
    found = find_target(target, recipe, overrides)
    with build.located(found.loaded):
        settings = found.loaded.recipe
        rows = _rows_of_file(inputs, settings.data.encoding) if isinstance(inputs, Path) else None
        opened = open_target(found, progress)
        _check_room_to_answer(max_new_tokens or settings.eval.max_new_tokens, opened)
        rows = rows if rows is not None else _input_rows(inputs, opened.task)
        progress.stop()
        autocast = _autocast(opened)
        for start in range(0, len(rows), _WINDOW):
            window = rows.select(range(start, min(start + _WINDOW, len(rows))))
            with autocast():
                yield from opened.task.predict(
                    opened.model,
                    window,
                    batch_tokens=settings.eval.batch_tokens,
                    max_length=opened.limit,
                    max_new_tokens=max_new_tokens or settings.eval.max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                )


def _rows_of_file(path: Path, encoding: str) -> Rows:
    try:
        return load_rows(str(path), encoding=encoding)
    except DataError as error:
        raise DataError(str(error)) from None  # the fault is in the input, not in a key of the recipe


def _check_room_to_answer(max_new_tokens: int, opened: Opened) -> None:
    if opened.task.spec.generates and max_new_tokens >= opened.limit:
        raise RecipeError(
            f"the model reads at most {opened.limit:,} tokens, which leaves no room for a prompt beside an answer of "
            f"{max_new_tokens:,}",
            key="eval.max_new_tokens",
        )


def _input_rows(inputs: Any, task: Any) -> Rows:
    items = [inputs] if isinstance(inputs, str) else list(inputs)
    if not items:
        raise RecipeError("there is nothing to predict: the input is empty")
    return Rows.from_dicts([i if isinstance(i, dict) else task.row_from_text(i) for i in items], name="input")


class Chat:
    """A conversation with a run or a model that has a chat template.

    Args:
        target, recipe, overrides: as for ``evaluate``.
        system: system message; default: the constant one of the recipe's template, if it has one.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        recipe: RecipeSource | None = None,
        overrides: Sequence[str] = (),
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 0.95,
        progress: Progress | None = None,
    ) -> None:
        build.prepare_libraries()
        found = _chat_target(target, recipe, overrides)
        with build.located(found.loaded):
            if not found.loaded.recipe.spec.generates:
                raise RecipeError(f"chat needs a language model; this is a {found.loaded.recipe.task} run: use predict")
            self._opened = open_target(found, progress or SilentProgress())
            _check_room_to_answer(max_new_tokens, self._opened)
            if not self._opened.tokenizer.chat_template:
                raise RecipeError("the tokenizer has no chat template; use predict", key="model.chat_template")
        template = found.loaded.recipe.data.template
        constant = template.system if template and template.system and "{" not in template.system else None
        self._start = [{"role": "system", "content": text}] if (text := system or constant) else []
        self._sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
        )
        self._max_new_tokens = max_new_tokens
        self.messages: list[dict[str, str]] = list(self._start)

    def reset(self) -> None:
        """Forgets the conversation, keeps the system message."""
        self.messages = list(self._start)

    def reply(self, text: str) -> Iterator[str]:
        """Yields the answer piece by piece and adds both turns to ``messages``.

        Closing the generator early (Ctrl-C) stops the model; what was said so far is kept as its turn.
        """
        import torch
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        opened = self._opened
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = opened.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        inputs = opened.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(opened.device)
        room = opened.limit - self._max_new_tokens
        inputs = {name: value[:, -room:] for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
        streamer = TextIteratorStreamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failure = threading.Event(), []

        def work() -> None:
            try:
                with torch.no_grad():
                    opened.model.generate(
                        **inputs,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([lambda *_: stop.is_set()]),
                        **opened.task.generation_kwargs(self._max_new_tokens, self._sampling),  # type: ignore[attr-defined]
                    )
            except BaseException as error:  # shown by the thread that reads the stream
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        said: list[str] = []
        try:
            for piece in streamer:
                said.append(piece)
                yield piece
        finally:
            stop.set()
            thread.join()
            if not failure:
                self.messages = [*asked, {"role": "assistant", "content": "".join(said).strip()}]
        if failure:
            raise failure[0]


def _chat_target(target: str | os.PathLike[str], recipe: RecipeSource | None, overrides: Sequence[str]) -> Target:
    """A base model needs no recipe to chat: its data section is never read."""
    try:
        return find_target(target, recipe, overrides)
    except RecipeError:
        if recipe is not None or (Path(target).is_dir() and not (Path(target) / "config.json").is_file()):
            raise
        return find_target(
            target, {"task": "causal_lm", "model": {"name": str(target)}, "data": {"train": "-"}}, overrides
        )
