"""`mpgpt generate`: from options to prompts, from prompts to text or records.

Knows: what the options mean together, how a batch is kept full, what a person sees.
Must not know: MPI, models, how steps are made.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from mpgpt import config as configs
from mpgpt import console
from mpgpt.agreement import Behind, Tried, locate, reach, settle, together
from mpgpt.architecture import ModelConfig
from mpgpt.batch import Message, Prompt, Records, read_prompts, record
from mpgpt.core import GREEDY, Request, Sampling, Span
from mpgpt.engine import Engine, Stream
from mpgpt.errors import RequestError, UsageError
from mpgpt.link import World
from mpgpt.plan import Objective
from mpgpt.ring import Ring
from mpgpt.sampler import check
from mpgpt.tokenizer import Tokenizer

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Generate:
    """One run. ``form`` is called on every rank, ``lead`` on rank 0 alone; only rank 0 looks at prompts and files."""

    def __init__(
        self, options: Mapping[str, Any], *, home: Path, config: Path | None, terminal: bool, behind: Behind
    ) -> None:
        """``config`` is the settings file, if there is one; ``terminal`` says that a person sits at standard input;
        ``behind`` reaches for the iPad behind a rank."""
        self._options, self._home, self._file, self._terminal = options, home, config, terminal
        self._behind = behind
        self._config = configs.RunConfig()
        self._prompts: list[Prompt] | None = None
        self._records: Records | None = None

    # -- before the ring

    def form(self, world: World) -> Ring:
        """Agree, load, connect. Whatever is wrong anywhere is raised on every rank."""
        chosen = together(world, lambda: self._prepare() if world.rank == 0 else {})[0]
        report = self._report if world.rank == 0 else lambda line: None
        folder = locate(world, chosen["model"], self._home, report)
        device = reach(world, chosen["ipad"], self._behind)
        settings = settle(
            world, folder, dtype=chosen["dtype"], slots=chosen["slots"], context=chosen["context"],
            threads=chosen["threads"], plan=lambda config: self._spans(world, config),
            objective=self._objective, workload=self._config.workload, report=report, kernel=chosen["kernel"],
            memory=self._home.parent / "kernels.json", explain=self._explain, device=device,
        )  # fmt: skip
        together(world, lambda: self._read_tokenizer(folder) if world.rank == 0 else None)
        return Ring(world, settings, folder, device)

    def _explain(self, tried: Tried) -> None:
        if self._options["explain"]:
            console.explain(tried.trials)

    def _prepare(self) -> dict[str, Any]:
        """Everything that can be found wrong without a model; what every rank must know before it has one."""
        options = self._options
        self._config = configs.load(self._file) if self._file else configs.RunConfig()
        model = options["model"] or self._config.hf_model_name
        if not model:
            raise UsageError("no model: give --model, or a config with hf_model_name")
        self._sampling({}, None)
        self._prompts = self._read_prompts()
        if options["out"]:
            if self._prompts is None:
                raise UsageError("--out needs --prompt or --prompts")
            self._records = Records(options["out"], self._prompts)
        config = self._config
        return {
            "model": model,
            "dtype": options["dtype"] or config.dtype,
            "kernel": options["kernel"] or config.kernel,
            "slots": options["max_sequences"] or config.max_sequences,
            "context": options["context"] or config.ctx_length,
            "threads": options["threads"] or config.threads,
            "ipad": config.device.model_dump() if config.device else None,
        }

    @property
    def _objective(self) -> Objective:
        chosen: Objective = self._options["objective"] or self._config.plan.objective
        return chosen

    def _spans(self, world: World, config: ModelConfig) -> tuple[Span | None, ...] | None:
        if self._options["layers"]:
            spans = configs.parse_layers(self._options["layers"])
            return configs.check_spans(spans, world.size, config.layers, "--layers")
        # A model named on the command line is another than the file's: its layers are not the file's either.
        if self._options["model"] and self._options["model"] != self._config.hf_model_name:
            return None
        return self._config.spans(world.size, config.layers)

    def _read_prompts(self) -> list[Prompt] | None:
        """The prompts of the run; None for a conversation."""
        options = self._options
        if options["prompts"] and options["prompts_file"]:
            raise UsageError("give --prompt or --prompts, not both")
        if options["prompts_file"]:
            return read_prompts(options["prompts_file"])
        if options["prompts"]:
            return [Prompt(id=n, prompt=text) for n, text in enumerate(options["prompts"], 1)]
        return None if self._terminal else [Prompt(id=1, prompt=console.read_all())]

    def _read_tokenizer(self, folder: Path) -> None:
        self._tokenizer = Tokenizer(folder)
        chat = self._options["chat"]
        if chat and not self._tokenizer.can_chat:
            raise UsageError("--chat: this model has no chat template; leave it out, or give --raw")
        self._chat = self._tokenizer.can_chat if chat is None else chat
        system = self._options["system"]
        if system and not self._chat:
            raise UsageError("--system needs a chat, and this is a raw completion")
        self._system = system or self._config.system

    # -- requests

    def _sampling(self, overrides: Mapping[str, float | None], seed: int | None) -> Sampling:
        options = self._options
        given = {key: options[key] for key in SAMPLING if options[key] is not None} | dict(overrides)
        if seed is None:
            seed = options["seed"] if options["seed"] is not None else self._config.seed
        if seed is None:
            seed = secrets.randbits(63)
        sampling = self._config.sampling(options["strategy"], seed, **given)
        check(sampling)
        return GREEDY if sampling == Sampling(seed=seed) else sampling

    def _request(self, prompt: Prompt, ids: list[int]) -> Request:
        stop_ids = frozenset() if self._options["ignore_eos"] else self._tokenizer.stop_ids
        limit = prompt.max_new_tokens or self._options["max_new_tokens"] or self._config.max_new_tokens
        sampling = self._sampling(prompt.overrides, prompt.seed)
        return Request(ids=tuple(ids), max_new_tokens=limit, sampling=sampling, stop_ids=stop_ids)

    def _encode(self, prompt: str | list[Message]) -> list[int]:
        if isinstance(prompt, list):
            return self._tokenizer.encode_chat(prompt)
        if not prompt.strip():
            raise RequestError("the prompt is empty")
        if not self._chat:
            return self._tokenizer.encode(prompt)
        system = [{"role": "system", "content": self._system}] if self._system else []
        return self._tokenizer.encode_chat([*system, {"role": "user", "content": prompt}])

    def _submit(self, engine: Engine, prompt: Prompt, listener: Callable[[Stream, str], None]) -> Stream:
        """Raises ``RequestError`` (or another MpgptError) for a prompt that cannot be served."""
        if prompt.error or prompt.prompt is None:
            raise RequestError(prompt.error)
        stops = self._options["stops"] if prompt.stops is None else prompt.stops
        request = self._request(prompt, self._encode(prompt.prompt))
        return engine.submit(request, self._tokenizer.stream(stops), listener)

    # -- in the ring

    def lead(self, ring: Ring) -> int:
        """Rank 0's part; the exit status."""
        drafts = self._options["drafts"]
        engine = ring.engine(drafts=self._config.drafts if drafts is None else drafts)
        try:
            if self._prompts is None:
                status = self._converse(engine, ring)
            elif len(self._prompts) == 1 and not self._records and not self._options["prompts_file"]:
                status = self._single(engine, ring, self._prompts[0])
            else:
                status = self._batch(engine, ring, self._prompts)
        except (RequestError, UsageError):
            engine.stop()
            raise
        engine.stop()
        return status

    def _single(self, engine: Engine, ring: Ring, prompt: Prompt) -> int:
        stream = self._submit(engine, prompt, console.echo)
        engine.drain()
        click.echo()
        sys.stdout.flush()
        if ring.world.launched:
            time.sleep(0.1)  # mpirun forwards the two outputs apart: the text goes first
        click.echo(console.figures(stream, [(place.node, place.span) for place in ring.places]), err=True)
        self._tell_devices(engine, ring)
        return 0

    def _tell_devices(self, engine: Engine, ring: Ring) -> None:
        if any(place.node.kind == "ipad" for place in ring.places):
            click.echo(console.devices(engine.tally()), err=True)

    def _converse(self, engine: Engine, ring: Ring) -> int:
        """A conversation on the terminal, or single completions where the model knows no roles."""
        # All to standard output: a person reads it, and mpirun would let two outputs overtake one another.
        click.echo("Say something (an empty line or Ctrl-D ends it).")
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages: list[Message] = list(system)
        while True:
            click.echo("> ", nl=False)
            sys.stdout.flush()
            said = sys.stdin.readline().rstrip("\n")
            if not said.strip():
                return 0
            messages.append({"role": "user", "content": said})
            try:
                stream = self._submit(engine, Prompt(id=0, prompt=list(messages) if self._chat else said), console.echo)
            except RequestError as error:
                click.echo(f"({error}; the conversation begins anew)")
                messages = list(system)
                continue
            engine.drain()
            messages.append({"role": "assistant", "content": stream.text})
            click.echo()
            click.echo(console.figures(stream, [(place.node, place.span) for place in ring.places]))

    def _batch(self, engine: Engine, ring: Ring, prompts: list[Prompt]) -> int:
        """Many prompts, as many in flight as there are slots and as many again ready; a record as each is done."""
        done = self._records.done if self._records else frozenset()
        waiting = deque(prompt for prompt in prompts if prompt.id not in done)
        streams: dict[Stream, Prompt] = {}
        failed = 0
        with console.BatchProgress(len(prompts), len(done)) as progress:

            def hear(stream: Stream, piece: str) -> None:
                if stream.finish_reason:
                    self._write(_record_of(streams.pop(stream), stream))
                    progress.done(len(stream.ids))

            while waiting or engine.busy:
                while waiting and len(streams) < 2 * ring.slots:
                    prompt = waiting.popleft()
                    try:
                        streams[self._submit(engine, prompt, hear)] = prompt
                    except (RequestError, UsageError) as error:
                        failed += 1
                        where = f"line {prompt.line}: " if prompt.line and not prompt.error else ""
                        self._write(record(prompt, error=f"{where}{error}"))
                        progress.done(0)
                engine.step()
                progress.running(sum(len(stream.ids) for stream in streams))
        if self._records:
            self._records.close()
        if engine.drafted:
            click.echo(f"[{console.drafts(engine)}]", err=True)
        self._tell_devices(engine, ring)
        if failed:
            click.echo(f"mpgpt: {failed} of {len(prompts)} prompts failed; their records say why", err=True)
        return 1 if failed else 0

    def _write(self, one: dict[str, Any]) -> None:
        if self._records:
            self._records.write(one)
        else:
            click.echo(json.dumps(one, ensure_ascii=False))

    @staticmethod
    def _report(line: str) -> None:
        click.echo(line, err=True)


def _record_of(prompt: Prompt, stream: Stream) -> dict[str, Any]:
    return record(
        prompt, text=stream.text, token_ids=stream.ids, prompt_tokens=len(stream.request.ids),
        finish_reason=stream.finish_reason, ttft_s=stream.ttft_s, seconds=stream.seconds,
    )  # fmt: skip
