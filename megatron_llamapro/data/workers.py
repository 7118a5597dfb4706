"""Preprocessing workers: processes whose death is noticed and named, and what they do with a chunk of text.

The standard library's pools wait forever when a worker is killed (`multiprocessing.Pool`), or when it is killed with a
part of an answer in the pipe that all of them share (`ProcessPoolExecutor`). Here every worker has a pipe of its own.
Nothing imported here imports torch or megatron, so that they start at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron_llamapro.config.command import in_one_line
from megatron_llamapro.config.errors import DataError, LlamaProError, RunError
from megatron_llamapro.data.encoding import ChatEncoder, ChatTemplate, EncodedChunk, Encoder, LineChunk, TextEncoder
from megatron_llamapro.data.tokenizer import load_tokenizer
from megatron_llamapro.runtime.stop import children_deaf


@dataclass(frozen=True)
class EncoderOptions:
    """What every worker makes its encoder of."""

    tokenizer: Path
    eod_token: str | None = None
    json_key: str | None = None
    """Without it `text`, or `messages` of conversations."""
    chat: bool = False
    chat_template: Path | None = None

    def make(self) -> Encoder:
        """Raises `DataError` where the tokenizer or the chat template is missing, or cannot be used."""
        if self.chat_template and not self.chat:
            raise DataError("a chat template is for conversations: give --chat too")
        tokenizer = load_tokenizer(self.tokenizer, eod_token=self.eod_token)
        if not self.chat:
            return TextEncoder(tokenizer, self.json_key or "text")
        return ChatEncoder(tokenizer, self.json_key or "messages", ChatTemplate(tokenizer.path, self.chat_template))


def serve(connection: Connection, options: EncoderOptions) -> None:
    """Encode the chunks that come, one after the other; what is wrong with one is the answer to it."""
    encoder = options.make()
    while True:
        chunk: LineChunk = connection.recv()
        try:
            answer = encoder(chunk)
        except LlamaProError as error:
            answer = error
        connection.send(answer)


def encoded(
    chunks: Iterable[LineChunk], encoder: Encoder, options: EncoderOptions, num_workers: int
) -> Iterator[EncodedChunk]:
    """The encoded chunks, in order: by `encoder` here, or by as many workers.

    Raises:
        DataError: of a line.
        RunError: a worker was killed.
    """
    if num_workers <= 1:
        yield from map(encoder, chunks)
        return
    advice = "nothing was written; try again, where memory is short with a smaller --num_workers"
    with contextlib.ExitStack() as stack:
        names = [f"worker {number} of {num_workers}" for number in range(1, num_workers + 1)]
        helpers = [stack.enter_context(Helper(name, serve, options, advice=advice)) for name in names]
        yield from answers_in_order(helpers, chunks)


Function = Callable[..., None]
"""Of the helper's end of the pipe, and what else it is given."""

_AHEAD = 4
"""Answers for each helper that may wait for their turn, so that memory stays bounded."""
_OF_THE_PARENT = {signal.SIGINT, signal.SIGTERM}
"""Signals that a terminal or a scheduler sends to all processes; the parent ends its helpers."""


class Helper:
    """A process that runs `function(connection, *args)`; killed at the end of the `with`."""

    def __init__(self, name: str, function: Function, *args: object, advice: str) -> None:
        """`advice`: what to do where it is killed."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(theirs, function, args), daemon=True)
        self.name, self.advice = name, advice
        resource_tracker.ensure_running()  # its start would unblock the signals
        try:
            with children_deaf(_OF_THE_PARENT):
                self.process.start()
        except BaseException:  # a signal that waited
            self.__exit__()
            raise
        finally:
            theirs.close()

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.pid is not None:
            self.process.kill()
            self.process.join()
        self.connection.close()

    def send(self, item: object) -> None:
        """Raises `RunError` where the helper is dead."""
        try:
            self.connection.send(item)
        except OSError:
            raise self._death() from None

    def receive(self) -> Any:
        """What the helper sends next, an error it met included. Raises `RunError` where it died instead."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):  # OSError: in the middle of an answer
            raise self._death() from None

    def _death(self) -> RunError:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"
        if code == -signal.SIGKILL:
            how = "was killed (SIGKILL), as the system does when memory runs out"
        return RunError(f"{self.name} (process {self.process.pid}) {how}: {self.advice}")


def _main(connection: Connection, function: Function, args: tuple) -> None:
    """In the helper. Errors of the user's go to the parent, which says them; bugs keep their traceback."""
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        try:
            function(connection, *args)
        except LlamaProError as error:
            connection.send(error)
        except MemoryError:
            connection.send(RunError("memory ran out"))
        except OSError as error:  # of a file
            connection.send(RunError(in_one_line(error)))


def answers_in_order(helpers: list[Helper], questions: Iterable[object]) -> Iterator[Any]:
    """What the helpers answer to the questions, in the questions' order, whoever is done first.

    Raises:
        LlamaProError: the first that a helper met, once all answers before it are given; or a helper died.
    """
    idle, numbered = deque(helpers), enumerate(questions)
    asked: dict[Helper, int] = {}
    answers: dict[int, Any] = {}

    def ask() -> None:
        while idle and len(answers) < _AHEAD * len(helpers) and (question := next(numbered, None)):
            helper = idle.popleft()
            helper.send(question[1])
            asked[helper] = question[0]

    turn = 0
    while True:
        ask()
        if not asked:
            return
        ready = wait([helper.connection for helper in asked])
        for helper in [helper for helper in asked if helper.connection in ready]:
            answers[asked.pop(helper)] = helper.receive()
            idle.append(helper)
        ask()  # before what is done here with the answers, which takes its time
        while turn in answers:
            answer = answers.pop(turn)
            turn += 1
            if isinstance(answer, LlamaProError):
                raise answer
            yield answer
