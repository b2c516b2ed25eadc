"""``Chat``: a conversation with a run or a model."""

from __future__ import annotations

import os
import string
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from peftlab.assembly.checks import check_room_to_answer
from peftlab.assembly.process import located, prepare_libraries
from peftlab.assembly.target import RecipeSource, Target, find_target, open_target
from peftlab.errors import RecipeError
from peftlab.specs.tasks import TASKS
from peftlab.tasks import Chats
from peftlab.training.progress import Progress, SilentProgress

_NEW_TOKENS = 256


class Chat:
    """A conversation with a run or a model.

    A message is written into ``data.template`` of the recipe as in training, if its question has one column. With a template
    of prompt and completion, the model reads each message alone; otherwise it reads the conversation in its chat template.

    Args:
        target, recipe, overrides: as for ``evaluate``.
        system: system message; default: that of the recipe's template, if it is constant.
        max_new_tokens: longest answer; default 256, or half of what the model reads if that is less.

    Attributes:
        messages: the conversation so far. max_new_tokens: as used.
        notes: what the user should know, such as settings that overrides replaced, and turns that no longer fit.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        recipe: RecipeSource | None = None,
        overrides: Sequence[str] = (),
        system: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 0.95,
        progress: Progress | None = None,
    ) -> None:
        prepare_libraries()
        resolved = _chat_target(target, recipe, overrides)
        with located(resolved.loaded):
            if not resolved.loaded.recipe.spec.chats:
                raise RecipeError(
                    f"chat needs a language model; this is a {resolved.loaded.recipe.task} run: use predict"
                )
            self._opened = open_target(resolved, progress or SilentProgress())
            self.max_new_tokens = max_new_tokens or min(_NEW_TOKENS, max(1, self._opened.model_limit // 2))
            check_room_to_answer(self.max_new_tokens, self._opened.assembly)
            self._task = cast(Chats, self._opened.task)
            template = resolved.loaded.recipe.data.template
            self._alone = template is not None and template.prompt is not None
            if not self._alone and not self._task.tokenizer.chat_template:
                raise RecipeError("the tokenizer has no chat template; use predict", key="model.chat_template")
        asked = (template.prompt or template.user or "") if template else ""
        columns = {name for _, name, _, _ in string.Formatter().parse(asked) if name is not None}
        self._asked, self._column = (asked, columns.pop()) if len(columns) == 1 else ("{text}", "text")
        constant = template.system if template and template.system and "{" not in template.system else None
        self._start = [{"role": "system", "content": text}] if (text := system or constant) else []
        self._sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
        )
        self.notes = list(resolved.loaded.notes)
        if self._alone:
            self.notes.append(f"the model reads each message alone, as in training: {asked!r}")
            if system:
                self.notes.append("a system message has no effect: the model was trained on text without messages")
        self.messages: list[dict[str, str]] = list(self._start)

    def reset(self) -> None:
        """Forgets the conversation but keeps the system message."""
        self.messages = list(self._start)

    def reply(self, text: str) -> Iterator[str]:
        """Yields the answer piece by piece and adds both turns to ``messages``.

        Closing the generator early (Ctrl-C) stops the model; the text so far is kept as its turn.
        """
        from transformers import StoppingCriteriaList

        opened = self._opened
        turns = [*self.messages, {"role": "user", "content": text}]
        inputs = self._fitting(turns[-1:] if self._alone else turns)
        streamer = _streamer(self._task)
        stop, failure = threading.Event(), []

        def work() -> None:
            try:
                with torch.no_grad():
                    opened.model.generate(
                        **inputs,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([lambda *_: stop.is_set()]),
                        **self._task.generation_kwargs(self.max_new_tokens, self._sampling),
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

    def _fitting(self, turns: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        """The model's inputs [1, T] for the turns that leave room for the answer: the oldest are left out first, then the
        start of the last one is cut. Adds a note about it."""
        room = self._opened.model_limit - self.max_new_tokens
        first = sum(turn["role"] == "system" for turn in turns[:1])
        kept = list(turns)
        ids = whole = self._encoded(kept)
        while ids.shape[1] > room and len(kept) - first > 2:
            del kept[first : first + 2]  # a question and its answer: many templates refuse another order
            ids = self._encoded(kept)
        if kept != turns or ids.shape[1] > room:
            left_out = len(turns) - len(kept)
            what = f"the first {left_out:,} turns are left out" if left_out else "its start is cut"
            ids = ids[:, -room:]
            self.notes.append(
                f"the conversation has {whole.shape[1]:,} tokens, of which the model reads {ids.shape[1]:,} (at most "
                f"{room:,} before an answer of {self.max_new_tokens:,}): {what}"
            )
        ids = ids.to(self._opened.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _encoded(self, turns: list[dict[str, str]]) -> torch.Tensor:
        tokenizer = self._task.tokenizer
        written = [
            {**turn, "content": self._asked.format(**{self._column: turn["content"]})}
            if turn["role"] == "user"
            else turn
            for turn in turns
        ]
        if self._alone:
            prompt = written[-1]["content"]
        else:
            prompt = tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=True)
        ids: torch.Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=self._alone, verbose=False)[
            "input_ids"
        ]
        return ids


def _streamer(task: Chats) -> Any:
    """Streams the text of an answer: the same tokens as in ``task.text_of``."""
    from transformers import TextIteratorStreamer

    class Streamer(TextIteratorStreamer):
        def put(self, value: torch.Tensor) -> None:
            if self.next_tokens_are_prompt:
                cast(Any, super()).put(value)
            elif kept := [i for i in value.reshape(-1).tolist() if i not in task.silent_ids]:
                cast(Any, super()).put(torch.tensor(kept))

    return Streamer(task.tokenizer, skip_prompt=True)


def _chat_target(target: str | os.PathLike[str], recipe: RecipeSource | None, overrides: Sequence[str]) -> Target:
    """The target; a base model gets a minimal recipe, because chat never reads its data section."""
    try:
        return find_target(target, recipe, overrides)
    except RecipeError:
        if recipe is not None or (Path(target).is_dir() and not (Path(target) / "config.json").is_file()):
            raise
        writes = next(name for name, spec in TASKS.items() if spec.chats)
        return find_target(target, {"task": writes, "model": {"name": str(target)}, "data": {"train": "-"}}, overrides)
