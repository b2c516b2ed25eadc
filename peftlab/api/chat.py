"""``Chat``: a conversation with a run or a model."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch

from peftlab.assembly.process import located, prepare_libraries
from peftlab.assembly.target import RecipeSource, Target, check_room_to_answer, find_target, open_target
from peftlab.errors import RecipeError
from peftlab.specs.tasks import TASKS
from peftlab.tasks import Generates
from peftlab.training.progress import Progress, SilentProgress


class Chat:
    """A conversation with a run or a model that has a chat template.

    Args:
        target, recipe, overrides: as for ``evaluate``.
        system: system message; default: that of the recipe's template, if it is constant.
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
        prepare_libraries()
        resolved = _chat_target(target, recipe, overrides)
        with located(resolved.loaded):
            if not resolved.loaded.recipe.spec.generates:
                raise RecipeError(
                    f"chat needs a language model; this is a {resolved.loaded.recipe.task} run: use predict"
                )
            self._opened = open_target(resolved, progress or SilentProgress())
            check_room_to_answer(max_new_tokens, self._opened)
            self._task = cast(Generates, self._opened.task)
            if not self._task.tokenizer.chat_template:
                raise RecipeError("the tokenizer has no chat template; use predict", key="model.chat_template")
        template = resolved.loaded.recipe.data.template
        constant = template.system if template and template.system and "{" not in template.system else None
        self._start = [{"role": "system", "content": text}] if (text := system or constant) else []
        self._sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
        )
        self._max_new_tokens = max_new_tokens
        self.messages: list[dict[str, str]] = list(self._start)

    def reset(self) -> None:
        """Forgets the conversation but keeps the system message."""
        self.messages = list(self._start)

    def reply(self, text: str) -> Iterator[str]:
        """Yields the answer piece by piece and adds both turns to ``messages``.

        Closing the generator early (Ctrl-C) stops the model; the text so far is kept as its turn.
        """
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        opened, tokenizer = self._opened, self._task.tokenizer
        turns = [*self.messages, {"role": "user", "content": text}]
        room = opened.limit - self._max_new_tokens
        prompt = torch.as_tensor(self._task.conversation_ids(turns)[None, -room:], dtype=torch.int64).to(opened.device)
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failure = threading.Event(), []

        def work() -> None:
            try:
                with torch.no_grad():
                    opened.model.generate(
                        **inputs,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([lambda *_: stop.is_set()]),
                        **self._task.generation_kwargs(self._max_new_tokens, self._sampling),
                    )
            except BaseException as error:  # raised in the thread that reads the stream
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        pieces: list[str] = []
        try:
            for piece in streamer:
                pieces.append(piece)
                yield piece
        finally:
            stop.set()
            thread.join()
            if not failure:
                self.messages = [*turns, {"role": "assistant", "content": "".join(pieces).strip()}]
        if failure:
            raise failure[0]


def _chat_target(target: str | os.PathLike[str], recipe: RecipeSource | None, overrides: Sequence[str]) -> Target:
    """The target; a base model gets a minimal recipe, because chat never reads its data section."""
    try:
        return find_target(target, recipe, overrides)
    except RecipeError:
        if recipe is not None or (Path(target).is_dir() and not (Path(target) / "config.json").is_file()):
            raise
        writes = next(name for name, spec in TASKS.items() if spec.generates)
        return find_target(target, {"task": writes, "model": {"name": str(target)}, "data": {"train": "-"}}, overrides)
