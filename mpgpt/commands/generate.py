"""`mpgpt generate`: from options to prompts, from prompts to text or records.

Knows: where prompts come from, how a batch is kept full, how a conversation goes.
Must not know: MPI, models, how steps are made.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mpgpt import stdio
from mpgpt.cluster.ring import Ring
from mpgpt.cluster.session import Session
from mpgpt.commands import terminal
from mpgpt.commands.batch_files import Prompt, Records, as_line, read_prompts, record
from mpgpt.engine.engine import Engine, Stream
from mpgpt.errors import OutputError, RequestError, UsageError
from mpgpt.model.tokenizer import Message
from mpgpt.transport.link import World


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """The options of `mpgpt generate` besides the session's."""

    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    out: Path | None = None
    stops: tuple[str, ...] = ()


class Generate:
    """One run. Only rank 0 looks at prompts and files."""

    def __init__(self, session: Session, options: GenerateOptions, *, interactive: bool) -> None:
        """``interactive`` says that a person sits at standard input."""
        self._session, self._options, self._interactive = session, options, interactive
        self._prompts: list[Prompt] | None = None
        self._records: Records | None = None

    # -- before the ring

    def start(self, world: World) -> Ring:
        return self._session.start(world, self._prepare)

    def _prepare(self) -> None:
        options = self._options
        self._prompts = self._read_prompts()
        if options.out:
            if self._prompts is None:
                raise UsageError("--out needs --prompt or --prompts")
            self._records = Records(options.out, self._prompts)

    def _read_prompts(self) -> list[Prompt] | None:
        """The prompts of the run; None for a conversation."""
        options = self._options
        if options.prompts and options.prompts_file:
            raise UsageError("give --prompt or --prompts, not both")
        if options.prompts_file:
            return read_prompts(options.prompts_file)
        if options.prompts:
            return [_argument(n, text) for n, text in enumerate(options.prompts, 1)]
        return None if self._interactive else [Prompt(id=1, prompt=terminal.read_all())]

    def _submit(self, engine: Engine, prompt: Prompt, listener: Callable[[Stream, str], None]) -> Stream:
        """Raises ``RequestError`` (or another MpgptError) for a prompt that cannot be served."""
        if prompt.error or prompt.prompt is None:
            raise RequestError(prompt.error)
        stops = self._options.stops if prompt.stops is None else prompt.stops
        session = self._session
        sampling = session.sampling(prompt.overrides, prompt.seed)
        request = session.request(session.encode(prompt.prompt), sampling, max_new_tokens=prompt.max_new_tokens)
        continued = request.ids if isinstance(prompt.prompt, str) and not session.chat else ()
        return engine.submit(request, session.tokenizer.stream(stops, after=continued), listener)

    # -- in the ring

    def run_rank0(self, ring: Ring) -> int:
        """Rank 0's part; the exit status."""
        engine = self._session.engine(ring)
        try:
            if self._prompts is None:
                status = self._converse(engine, ring)
            elif len(self._prompts) == 1 and not self._records and not self._options.prompts_file:
                status = self._single(engine, ring, self._prompts[0])
            else:
                status = self._batch(engine, ring, self._prompts)
        except (RequestError, UsageError):
            engine.stop()
            raise
        except OutputError as error:  # nothing more can be written
            engine.stop()
            return stdio.parting(error)
        engine.stop()
        return status

    def _single(self, engine: Engine, ring: Ring, prompt: Prompt) -> int:
        stream = self._follow(engine, prompt)
        stdio.put("\n")
        if stream.error:
            raise RequestError(stream.error)
        if ring.world.launched:
            time.sleep(0.1)  # mpirun forwards the two outputs apart: the text goes first
        click.echo(_summary(stream, ring), err=True)
        self._report_devices(engine, ring)
        return 0

    def _follow(self, engine: Engine, prompt: Prompt) -> Stream:
        """Run one prompt to its end, and print its text as it comes."""
        pieces: deque[str] = deque()
        stream = self._submit(engine, prompt, lambda stream, piece: pieces.append(piece))
        while engine.busy:
            engine.step()
            # Not in the listener: output that cannot be written is the run's trouble, not the request's.
            while pieces:
                terminal.echo(stream, pieces.popleft())
        return stream

    def _report_devices(self, engine: Engine, ring: Ring) -> None:
        if any(place.node.kind == "ipad" for place in ring.reports):
            click.echo(terminal.devices(engine.stats_round()), err=True)

    def _converse(self, engine: Engine, ring: Ring) -> int:
        """A conversation on the terminal, or single completions where the model knows no roles."""
        # All to standard output: a person reads it, and mpirun would let two outputs overtake one another.
        stdio.put("Say something (an empty line or Ctrl-D ends it).\n")
        opening = self._session.opening
        messages: list[Message] = list(opening)
        while True:
            stdio.put("> ")
            line = terminal.read_line()
            if not line.strip():
                return 0
            messages.append({"role": "user", "content": line})
            try:
                stream = self._follow(engine, Prompt(id=0, prompt=list(messages) if self._session.chat else line))
            except RequestError as error:
                stdio.put(f"({error}; the conversation begins anew)\n")
                messages = list(opening)
                continue
            if stream.error:
                stdio.put(f"\n({stream.error}; the conversation begins anew)\n")
                messages = list(opening)
                continue
            messages.append({"role": "assistant", "content": stream.text})
            stdio.put(f"\n{_summary(stream, ring)}\n")

    def _batch(self, engine: Engine, ring: Ring, prompts: list[Prompt]) -> int:
        """Many prompts, as many in flight as there are slots and as many again ready; a record as each is done."""
        done = self._records.done if self._records else frozenset()
        waiting = deque(prompt for prompt in prompts if prompt.id not in done)
        streams: dict[Stream, Prompt] = {}
        ended: deque[Stream] = deque()
        failed = 0
        with terminal.BatchProgress(len(prompts), len(done)) as progress:

            def on_text(stream: Stream, piece: str) -> None:
                if stream.finish_reason:
                    ended.append(stream)

            while waiting or engine.busy:
                while waiting and len(streams) < 2 * ring.slots:
                    prompt = waiting.popleft()
                    try:
                        streams[self._submit(engine, prompt, on_text)] = prompt
                    except (RequestError, UsageError) as error:
                        failed += 1
                        where = f"line {prompt.line}: " if prompt.line and not prompt.error else ""
                        self._write(record(prompt, error=f"{where}{error}"))
                        progress.done(0)
                engine.step()
                while ended:
                    stream = ended.popleft()
                    failed += bool(stream.error)
                    self._write(_record_of(streams.pop(stream), stream))
                    progress.done(len(stream.ids))
                progress.running(sum(len(stream.ids) for stream in streams))
        if self._records:
            self._records.close()
        if engine.drafted:
            click.echo(f"[{terminal.drafts(engine)}]", err=True)
        self._report_devices(engine, ring)
        if failed:
            click.echo(f"mpgpt: {failed} of {len(prompts)} prompts failed; their records say why", err=True)
        return 1 if failed else 0

    def _write(self, one: dict[str, Any]) -> None:
        if self._records:
            self._records.write(one)
        else:
            stdio.put(as_line(one, ascii_only=not stdio.is_utf8()))


def _argument(number: int, text: str) -> Prompt:
    """A prompt from the command line; in it, bytes that are no text of the locale are halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            text = os.fsencode(text).decode()
        except UnicodeDecodeError as error:
            return Prompt(id=number, prompt=text, error=f"--prompt is not UTF-8: byte {error.start + 1}")
    return Prompt(id=number, prompt=text)


def _record_of(prompt: Prompt, stream: Stream) -> dict[str, Any]:
    where = f"line {prompt.line}: " if prompt.line else ""
    error = f"{where}{stream.error}" if stream.error else None
    return record(
        prompt, text=stream.text, token_ids=stream.ids, prompt_tokens=len(stream.request.ids),
        finish_reason=stream.finish_reason, error=error, times=(stream.ttft_s, stream.seconds),
    )  # fmt: skip


def _summary(stream: Stream, ring: Ring) -> str:
    """A finished stream's figures, and the ring's layers, in one line."""
    return terminal.stream_summary(stream, [(place.node, place.span) for place in ring.reports])
