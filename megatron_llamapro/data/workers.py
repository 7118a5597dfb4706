"""Preprocessing workers: helper processes that encode chunks of text. If one dies, the parent reports it.

`multiprocessing.Pool` waits forever when a worker is killed. `ProcessPoolExecutor` does so if the worker had written
part of an answer to the pipe that all workers share. Here every worker has its own pipe.
Imports neither torch nor megatron, even indirectly, so that workers start at once.
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
    """The options from which every worker makes its encoder."""

    tokenizer: Path
    eod_token: str | None = None
    json_key: str | None = None
    """Without it: `text`, or `messages` for conversations."""
    chat: bool = False
    chat_template: Path | None = None

    def make(self) -> Encoder:
        """Make the encoder. Raise `DataError` if the tokenizer or the chat template is missing or unusable."""
        if self.chat_template and not self.chat:
            raise DataError("a chat template is for conversations: give --chat too")
        tokenizer = load_tokenizer(self.tokenizer, eod_token=self.eod_token)
        if not self.chat:
            return TextEncoder(tokenizer, self.json_key or "text")
        return ChatEncoder(tokenizer, self.json_key or "messages", ChatTemplate(tokenizer.path, self.chat_template))


def serve(connection: Connection, options: EncoderOptions) -> None:
    """Receive chunks and send each one encoded, or the error that it caused."""
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
    """Yield the encoded chunks, in order. One worker means `encoder` in this process; more are processes.

    Raises:
        DataError: a line cannot be encoded.
        RunError: a worker was killed.
    """
    if num_workers <= 1:
        yield from map(encoder, chunks)
        return
    advice = "nothing was written; try again, with a smaller --num_workers if memory is short"
    with contextlib.ExitStack() as stack:
        names = [f"worker {number} of {num_workers}" for number in range(1, num_workers + 1)]
        helpers = [stack.enter_context(Helper(name, serve, options, advice=advice)) for name in names]
        yield from answers_in_order(helpers, chunks)


Function = Callable[..., None]
"""Takes the helper's end of the pipe, then its other arguments."""

_AHEAD = 4
"""Most answers per helper that wait for their turn. This limits memory."""
_OF_THE_PARENT = {signal.SIGINT, signal.SIGTERM}
"""Signals that a terminal or a scheduler sends to all processes. Helpers block them: the parent ends its helpers."""


class Helper:
    """A process that runs `function(connection, *args)`. It is killed at the end of the `with` block."""

    def __init__(self, name: str, function: Function, *args: object, advice: str) -> None:
        """`advice` is the error's advice if the process is killed."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(theirs, function, args), daemon=True)
        self.name, self.advice = name, advice
        resource_tracker.ensure_running()  # starting it below would unblock the signals
        try:
            with children_deaf(_OF_THE_PARENT):
                self.process.start()
        except BaseException:  # a signal that arrived during the block
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
        """Send an item to the helper. Raise `RunError` if it is dead."""
        try:
            self.connection.send(item)
        except OSError:
            raise self._death() from None

    def receive(self) -> Any:
        """Return what the helper sends next, which may be an error. Raise `RunError` if it died instead."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of an answer
            raise self._death() from None

    def _death(self) -> RunError:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"
        if code == -signal.SIGKILL:
            how = "was killed (SIGKILL), as the system does when memory runs out"
        return RunError(f"{self.name} (process {self.process.pid}) {how}: {self.advice}")


def _main(connection: Connection, function: Function, args: tuple) -> None:
    """Run in the helper. A user's mistakes go to the parent, which prints them; bugs keep their traceback."""
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        try:
            function(connection, *args)
        except LlamaProError as error:
            connection.send(error)
        except MemoryError:
            connection.send(RunError("memory ran out"))
        except OSError as error:  # from a file
            connection.send(RunError(in_one_line(error)))


def answers_in_order(helpers: list[Helper], questions: Iterable[object]) -> Iterator[Any]:
    """Yield the helpers' answers in the order of the questions, whichever helper finishes first.

    Raises:
        LlamaProError: the first error that a helper sent, after all answers before it; or a helper died.
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
        ask()  # first, because the caller's work on the answers below takes time
        while turn in answers:
            answer = answers.pop(turn)
            turn += 1
            if isinstance(answer, LlamaProError):
                raise answer
            yield answer
