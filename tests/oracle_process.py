"""The oracle in a process of its own: its model shares no lock and no memory with the server that it judges.

Knows peft alone; what was asked of the server, and how, its callers know.
"""

import asyncio
import multiprocessing
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

import torch
from oracle import PeftAlone

CLOSE = 5e-4  # logits nearer than this are a tie, which rounding may decide either way; a batch's is 5e-5 and less


class Expected(NamedTuple):
    """The longest greedy answer to a prompt; a shorter one is its beginning."""

    ids: tuple[int, ...]
    ended: bool  # by the end-of-sequence token, which is not among the ids
    scores: tuple[float, ...]  # logprobs of the prompt's tokens from the second on, the answer's, and what ended it
    firm: int  # so many of the ids were chosen clearly, by more than CLOSE


class Oracle:
    """PeftAlone for many askers; every question is computed once. ``folders`` are the adapters."""

    def __init__(self, base_folder: Path, folders: Iterable[Path], max_tokens: int) -> None:
        self._names = {folder: f"adapter{number}" for number, folder in enumerate(folders)}
        named = {name: folder for folder, name in self._names.items()}
        self._process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _begin, (base_folder, named, max_tokens)
        )
        self._known: dict[tuple[tuple[int, ...], Path | None], asyncio.Future[Expected]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown(cancel_futures=True)

    async def answer(self, prompt_ids: tuple[int, ...], folder: Path | None) -> Expected:
        """What peft alone answers; None is the base."""
        asked = (prompt_ids, folder)
        if asked not in self._known:
            name = None if folder is None else self._names[folder]
            computed = self._process.submit(_answer, prompt_ids, name)
            self._known[asked] = asyncio.wrap_future(computed)
        return await asyncio.shield(self._known[asked])


_alone: PeftAlone
_max_tokens: int


def _begin(base_folder: Path, folders: Mapping[str, Path], max_tokens: int) -> None:
    global _alone, _max_tokens
    torch.set_num_threads(1)
    _alone, _max_tokens = PeftAlone(base_folder, folders), max_tokens


@torch.no_grad()
def _answer(prompt_ids: tuple[int, ...], name: str | None) -> Expected:
    ids = _alone.answer(list(prompt_ids), name, _max_tokens)
    ended = len(ids) < _max_tokens
    whole = torch.tensor([[*prompt_ids, *ids, *([0] if ended else [])]])
    if name is None:
        with _alone.model.disable_adapter():
            logits = _alone.model(whole).logits[0]
    else:
        logits = _alone.model(whole).logits[0]  # answer has made it the active one
    scores = logits[:-1].log_softmax(-1).gather(-1, whole[0, 1:, None])[:, 0]
    best = logits[len(prompt_ids) - 1 : -1].topk(2).values
    close = (best[:, 0] - best[:, 1] < CLOSE).nonzero()
    firm = int(close[0]) if len(close) else len(ids) + ended
    return Expected(tuple(ids), ended, tuple(scores.tolist()), firm)
