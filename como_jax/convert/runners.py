"""Ways to write the shards of a conversion: in this process, in several processes, or on Apache Beam.

All of them call the same code of the builder and write the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import cv2
from etils import epath

from como_jax.convert.report import Progress, SourceOutcome
from como_jax.convert.shards import ShardNotes
from como_jax.convert.sources import Shard
from como_jax.errors import ConversionError, UsageError
from como_jax.staging import Staging

BEAM_RUNNERS = ("DirectRunner", "FlinkRunner", "SparkRunner", "DataflowRunner")
_POLL_SECONDS = 1.0


class ShardBuilder(Protocol):
    """What a runner needs of an `EpisodeBuilder`."""

    staging: Staging

    def write_shard(self, shard: Shard, on_source: Callable[[SourceOutcome], None]) -> None:
        """Writes one shard in this process."""

    def shard_writer(self) -> Any:
        """Returns the writer of shards that Beam uses."""

    def shard_examples(self, shard: Shard) -> Any:
        """Returns the records of a shard."""

    def records_path(self, shard: Shard) -> epath.Path:
        """Returns the file of a shard's records."""


Runner = Callable[[ShardBuilder, Sequence[Shard], Progress], None]


def usable_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_here(builder: ShardBuilder, shards: Sequence[Shard], progress: Progress) -> None:
    """Writes one shard after the other, in this process."""
    for shard in shards:
        builder.write_shard(shard, progress.add)


def run_in_processes(builder: ShardBuilder, shards: Sequence[Shard], progress: Progress, count: int) -> None:
    """Writes shards in several processes, each of which has its own builder and gets one shard after the other.

    The processes end when this one ends, even if it is killed. `concurrent.futures` is not used, because its pool
    does not say which source a killed process was converting, and cannot stop shards that are being written.

    Raises:
      ConversionError: a process was killed, or `count` is not positive.
      Exception: whatever a process raised.
    """
    if count < 1:
        raise ConversionError(f"processes must be 1 or more, got {count}")
    if count == 1 or len(shards) < 2:
        run_here(builder, shards, progress)
        return
    waiting = iter(shards)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_Worker(builder)) for _ in range(min(count, len(shards)))]
        busy = {worker.connection: worker for worker in workers if worker.start_next(waiting)}
        while busy:
            for connection in wait(list(busy)):
                worker = busy[connection]
                if (outcome := worker.receive()) is not None:
                    progress.add(outcome)
                elif not worker.start_next(waiting):
                    del busy[connection]


def run_on_beam(
    builder: ShardBuilder, shards: Sequence[Shard], progress: Progress, runner: str, options: Sequence[str]
) -> None:
    """Writes shards as a Beam pipeline, on one of `BEAM_RUNNERS`, with options such as `--name=value`.

    All workers must reach the staging folder by the same path. Progress shows the shards that appear in it.

    Raises:
      ConversionError: Beam is not installed.
    """
    if not shards:
        return
    try:
        beam = importlib.import_module("apache_beam")
        pipeline_options = importlib.import_module("apache_beam.options.pipeline_options")
    except ImportError as error:
        raise ConversionError(
            f"the runner {runner} needs Apache Beam ({error}); install it with: pip install 'como_jax[beam]'"
        ) from error
    # Without flags, Beam would parse the arguments of this command.
    flags = pipeline_options.PipelineOptions(flags=list(options))
    with _follow(builder, shards, progress), beam.Pipeline(runner=runner, options=flags) as pipeline:
        for index, shard in enumerate(shards):
            builder.shard_writer().write_with_beam(
                functools.partial(builder.shard_examples, shard), builder.records_path(shard), index, pipeline
            )


class _Worker:
    """One process that writes shards, at the other end of a pipe.

    The process receives shards. For each it sends the outcome of every source and then None, or the error that
    stopped it.
    """

    def __init__(self, builder: ShardBuilder):
        context = multiprocessing.get_context("spawn")
        self.connection, self._far_end = context.Pipe()
        self._process: BaseProcess = context.Process(target=_work, args=(builder, self._far_end), daemon=True)
        self._shard: Shard | None = None
        self._num_done = 0

    def __enter__(self) -> _Worker:
        with _interrupts_held_back():
            self._process.start()
        # While this process holds that end open, the death of the other one would not close the pipe.
        self._far_end.close()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.join()
        self.connection.close()

    def start_next(self, shards: Iterator[Shard]) -> bool:
        """Sends the next shard; returns whether there was one."""
        self._shard, self._num_done = next(shards, None), 0
        if self._shard is not None:
            with self._checked():
                self.connection.send(self._shard)
        return self._shard is not None

    def receive(self) -> SourceOutcome | None:
        """Receives the outcome of the next source, or None when the shard is finished."""
        with self._checked():
            message = self.connection.recv()
        if isinstance(message, BaseException):
            raise message
        self._num_done += 1
        return message

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            self._process.join()
            raise ConversionError(self._why_ended()) from None

    def _why_ended(self) -> str:
        assert self._shard is not None
        sources, status = self._shard.sources, self._process.exitcode or 0
        source = sources[self._num_done].name if self._num_done < len(sources) else f"shard {self._shard.name}"
        if status == -signal.SIGKILL:
            return (
                f"a process was killed while it converted {source}, probably because memory ran out; "
                "try fewer `processes`"
            )
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"a process ended {how} while it converted {source}"


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Protects a process that is being started from Ctrl-C, which a terminal sends to all processes of a command.

    The new process inherits the blocked signal; interrupted while it starts, it would end with a traceback. This
    process, which stops the others, raises KeyboardInterrupt afterwards if Ctrl-C was pressed meanwhile. It also sets
    a handler, because another of its threads may get the signal.
    """
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    # The resource tracker would otherwise be started with the first process, and would unblock the signal.
    resource_tracker.ensure_running()
    pressed: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt


def _work(builder: ShardBuilder, connection: Connection) -> None:
    """The main function of a worker process: writes the shards that it receives."""
    # The processes share the cores, so that each of them uses one thread.
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # When the conversion has ended, nobody reads the messages.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            shard = connection.recv()
            try:
                builder.write_shard(shard, connection.send)
            except BaseException as error:
                connection.send(_sendable(error))
                return
            connection.send(None)


def _end_with_parent() -> None:
    """Ends this process when the conversion was killed, so that it does not go on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _sendable(error: BaseException) -> BaseException:
    """Returns the error in a form that can be sent to another process.

    The traceback of a mistake goes along in a note. Errors that the command reports in one line have none.
    """
    try:
        copy = multiprocessing.reduction.ForkingPickler.loads(multiprocessing.reduction.ForkingPickler.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, UsageError | OSError | KeyboardInterrupt):
        copy.add_note(f"in a worker process:\n{''.join(traceback.format_exception(error))}")
    return copy


@contextlib.contextmanager
def _follow(builder: ShardBuilder, shards: Sequence[Shard], progress: Progress) -> Iterator[None]:
    """Counts shards as they appear in the staging folder, whichever machine has written them."""
    stop = threading.Event()

    def watch() -> None:
        unseen = list(shards)
        while unseen:
            stopped = stop.wait(_POLL_SECONDS)
            finished = {shard.name: notes for shard in unseen if (notes := ShardNotes.read(builder.staging, shard))}
            for notes in finished.values():
                for outcome in notes.outcomes:
                    progress.add(outcome)
            unseen = [shard for shard in unseen if shard.name not in finished]
            if stopped:
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
