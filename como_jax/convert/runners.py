"""Ways to write the shards of a conversion: in this process, in several processes, or on Apache Beam.

All of them call the same code of the builder and write the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
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
    lost: dict[str, str]

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

    Another process takes the place of one that dies, and writes its shard anew. The source at which two processes have
    died is left out, with the reason in the report; memory that ran out once costs nothing.

    The processes end when this one ends, even if it is killed. `concurrent.futures` is not used, because its pool
    does not say which source a killed process was converting, and cannot stop shards that are being written.

    Raises:
      ConversionError: processes die before they convert a source or after its shard's last one, or `count` is not
        positive.
      Exception: whatever a process raised.
    """
    if count < 1:
        raise ConversionError(f"processes must be 1 or more, got {count}")
    if count == 1 or len(shards) < 2:
        run_here(builder, shards, progress)
        return
    waiting = (_Job(shard) for shard in shards)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_Worker(builder)) for _ in range(min(count, len(shards)))]
        busy = {worker.connection: worker for worker in workers if worker.start_next(waiting)}
        while busy:
            for connection in wait(list(busy)):
                worker = busy.pop(connection)
                try:
                    goes_on = worker.receive(progress) or worker.start_next(waiting)
                except _Death as death:
                    worker, goes_on = stack.enter_context(worker.successor(death)), True
                if goes_on:
                    busy[worker.connection] = worker


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


@dataclasses.dataclass
class _Job:
    """A shard, and what became of the processes that were to write it.

    Attributes:
      shard: to write.
      num_counted: how many of its sources the progress bar shows.
      deaths: at which of its sources processes have died, "" for none of them.
      lost: the sources to leave out, and why.
    """

    shard: Shard
    num_counted: int = 0
    deaths: list[str] = dataclasses.field(default_factory=list)
    lost: dict[str, str] = dataclasses.field(default_factory=dict)

    def note_death(self, num_done: int, how: str) -> None:
        """Notes that a process died after that many sources of the shard.

        Raises:
          ConversionError: no source can be blamed for it.
        """
        sources = self.shard.sources
        name = sources[num_done].name if num_done < len(sources) else ""
        if name in self.deaths:
            if not name:
                raise ConversionError(f"two processes ended {how} when they had converted shard {self.shard.name}")
            self.lost[name] = f"two processes ended {how} while they converted it"
        self.deaths.append(name)


class _Death(Exception):
    """A process has died; the text says how."""


class _Word(enum.Enum):
    """What a process says of itself."""

    READY = enum.auto()
    FINISHED = enum.auto()


class _Worker:
    """One process that writes shards, at the other end of a pipe.

    The process says that it is ready, and receives shards with the sources to leave out. For each shard it sends the
    outcome of every source and then that it has finished, or the error that stopped it.
    """

    def __init__(self, builder: ShardBuilder, job: _Job | None = None):
        """Prepares a process, which begins with the job, if there is one."""
        context = multiprocessing.get_context("spawn")
        self.connection, self._far_end = context.Pipe()
        self._builder, self._job = builder, job
        self._process: BaseProcess = context.Process(target=_work, args=(builder, self._far_end), daemon=True)
        self._ready = False

    def __enter__(self) -> _Worker:
        with _interrupts_held_back():
            self._process.start()
        # While this process holds that end open, the death of the other one would not close the pipe.
        self._far_end.close()
        if self._job is not None:
            self._send(self._job)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.join()
        self.connection.close()

    def start_next(self, jobs: Iterator[_Job]) -> bool:
        """Sends the next shard; returns whether there was one."""
        job = next(jobs, None)
        if job is not None:
            self._send(job)
        return job is not None

    def receive(self, progress: Progress) -> bool:
        """Receives what the process sends next, and counts sources; returns False when the shard is finished.

        Raises:
          _Death: the process has died.
          Exception: what stopped it.
        """
        try:
            message = self.connection.recv()
        # OSError: it died in the middle of a message.
        except (EOFError, OSError):
            self._process.join()
            raise _Death(_how_ended(self._process.exitcode or 0)) from None
        if isinstance(message, BaseException):
            raise message
        if isinstance(message, SourceOutcome):
            self._count(message, progress)
        self._ready = True
        return message is not _Word.FINISHED

    def successor(self, death: _Death) -> _Worker:
        """A worker for the shard of this one, which has died.

        Raises:
          ConversionError: another one would die as well.
        """
        assert self._job is not None
        if not self._ready:
            raise ConversionError(f"a process ended {death} before it could convert anything")
        self._job.note_death(self._num_done, str(death))
        return _Worker(self._builder, self._job)

    def _send(self, job: _Job) -> None:
        self._job, self._num_done = job, 0
        # Where the process has died, `receive` says so.
        with contextlib.suppress(ConnectionError):
            self.connection.send((job.shard, job.lost))

    def _count(self, outcome: SourceOutcome, progress: Progress) -> None:
        assert self._job is not None
        self._num_done += 1
        # Those that a process which died had converted are counted already.
        if self._num_done > self._job.num_counted:
            self._job.num_counted = self._num_done
            progress.add(outcome)


def _how_ended(status: int) -> str:
    if status == -signal.SIGKILL:
        return "by SIGKILL, probably because memory ran out (fewer processes need less)"
    return f"by signal {-status}" if status < 0 else f"with status {status}"


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
        connection.send(_Word.READY)
        while True:
            shard, lost = connection.recv()
            builder.lost = lost
            try:
                builder.write_shard(shard, connection.send)
            except BaseException as error:
                connection.send(_sendable(error))
                return
            connection.send(_Word.FINISHED)


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
