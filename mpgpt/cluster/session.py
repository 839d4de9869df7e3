"""A session: what its options and its settings file say, the ring that is formed of it, and requests as it wants them.

Knows: which option goes before which setting; in which order a ring is formed; how a prompt becomes a request.
Must not know: where prompts come from, or where text goes (a command line, an API).

``start`` is called on every rank; everything else is rank 0's, where the options and the file are read.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mpgpt import config as configs
from mpgpt.cluster.bootstrap import DeviceFactory, TuningResults, connect_device, ensure_model, negotiate
from mpgpt.cluster.ring import Ring
from mpgpt.cluster.ring_config import RingOptions
from mpgpt.core import GREEDY, Request, Sampling, Span
from mpgpt.engine.engine import Engine
from mpgpt.errors import RequestError, UsageError
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.autotune import KernelTiming
from mpgpt.model.sampler import check
from mpgpt.model.tokenizer import Message, Tokenizer
from mpgpt.placement.plan import Objective
from mpgpt.transport.collective import on_rank0
from mpgpt.transport.link import World
from mpgpt.transport.mpirun import SettingsFile

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
Explain = Callable[[Mapping[str, Sequence[KernelTiming]]], None]
"""Shows the kernels that each host tried."""


class Session:
    """``options`` are those of a command that forms a ring; an option that a command does not have is as if not given.

    After ``start``, on rank 0: ``config`` holds the settings, ``tokenizer`` the model's, ``chat`` whether prompts go
    through its chat template, and ``system`` what a chat begins with.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        home: Path,
        file: SettingsFile | None,
        device_factory: DeviceFactory,
        explain: Explain,
    ) -> None:
        """``file`` holds the settings, if there are any; ``device_factory`` reaches for the iPad behind a rank;
        ``explain`` shows which kernels were tried."""
        self._options, self._home, self._file, self._device_factory = options, home, file, device_factory
        self._show_kernels = explain
        self.config = configs.RunConfig()
        self.model = ""

    def start(self, world: World, prepare: Callable[[], None]) -> Ring:
        """Agree, load, connect. Whatever is wrong anywhere is raised on every rank.

        ``prepare`` is called on rank 0 once the settings are read: for whatever can be found wrong without a model.
        """
        chosen = on_rank0(world, lambda: self._prepare(prepare))
        world.heed(*chosen["heartbeat"])
        report = self._report if world.rank == 0 else lambda line: None
        folder = ensure_model(world, chosen["model"], self._home, report)
        device = connect_device(world, chosen["ipad"], self._device_factory)
        options = RingOptions(
            dtype=chosen["dtype"], slots=chosen["slots"], context=chosen["context"], threads=chosen["threads"],
            kernel=chosen["kernel"], memory=self._home.parent / "kernels.json",
            spans=lambda config: self._spans(world, config), objective=self._objective, workload=self.config.workload,
        )  # fmt: skip
        settings = negotiate(world, folder, options, device, report=report, explain=self._explain)
        on_rank0(world, lambda: self._read_tokenizer(folder))
        self.dtype: str = chosen["dtype"]
        return Ring(world, settings, folder, device, report)

    def engine(self, ring: Ring) -> Engine:
        drafts = self._given("drafts")
        return ring.engine(drafts=self.config.drafts if drafts is None else drafts)

    def sampling(
        self, overrides: Mapping[str, float | None], seed: int | None, strategy: str | None = None
    ) -> Sampling:
        """How a request is sampled that wants ``overrides``, a ``seed`` and a ``strategy`` of its own, or the run's.

        ``UsageError`` or ``RequestError`` where it asks for the impossible.
        """
        given = {key: self._given(key) for key in SAMPLING if self._given(key) is not None} | dict(overrides)
        if seed is None:
            seed = self._given("seed") if self._given("seed") is not None else self.config.seed
        if seed is None:
            seed = secrets.randbits(63)
        sampling = self.config.sampling(strategy or self._given("strategy"), seed, **given)
        check(sampling)
        return GREEDY if sampling == Sampling(seed=sampling.seed) else sampling

    @property
    def strategy(self) -> str:
        """The name of what a request is decoded by that does not say."""
        named: str = self._given("strategy") or self.config.active_decoding_strategy
        return named

    @property
    def max_new_tokens(self) -> int:
        """Where a request does not say."""
        most: int = self._given("max_new_tokens") or self.config.max_new_tokens
        return most

    def request(
        self, ids: Sequence[int], sampling: Sampling, *, max_new_tokens: int | None = None, logprobs: int = 0
    ) -> Request:
        stop_ids = frozenset() if self._given("ignore_eos") else self.tokenizer.stop_ids
        return Request(
            ids=tuple(ids), max_new_tokens=max_new_tokens or self.max_new_tokens, sampling=sampling, stop_ids=stop_ids,
            logprobs=logprobs,
        )  # fmt: skip

    def encode(self, prompt: str | list[Message]) -> list[int]:
        """The ids of a prompt, or of a conversation. Raises ``RequestError`` for one that is empty or no text."""
        if isinstance(prompt, list):
            return self.tokenizer.encode_chat(prompt)
        if not prompt.strip():
            raise RequestError("the prompt is empty")
        if not self.chat:
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat([*self.opening, {"role": "user", "content": prompt}])

    @property
    def opening(self) -> list[Message]:
        """What a conversation begins with: the system message, if there is one."""
        return [{"role": "system", "content": self.system}] if self.system else []

    def _given(self, name: str) -> Any:
        return self._options.get(name)

    def _prepare(self, prepare: Callable[[], None]) -> dict[str, Any]:
        """Everything that can be found wrong without a model; what every rank must know before it has one."""
        self.config = config = configs.load(self._file.path, self._file.text) if self._file else configs.RunConfig()
        self.model = self._given("model") or config.hf_model_name or ""
        if not self.model:
            raise UsageError("no model: give --model, or a config with hf_model_name")
        self.sampling({}, None)
        prepare()
        return {
            "model": self.model,
            "dtype": self._given("dtype") or config.dtype,
            "kernel": self._given("kernel") or config.kernel,
            "slots": self._given("max_sequences") or config.max_sequences,
            "context": self._given("context") or config.ctx_length,
            "threads": self._given("threads") or config.threads,
            "heartbeat": (config.heartbeat.interval_s, config.heartbeat.timeout_s),
            "ipad": config.device.model_dump() if config.device else None,
        }

    @property
    def _objective(self) -> Objective:
        chosen: Objective = self._given("objective") or self.config.plan.objective
        return chosen

    def _spans(self, world: World, config: ModelConfig) -> tuple[Span | None, ...] | None:
        if layers := self._given("layers"):
            return configs.check_spans(configs.parse_layers(layers), world.size, config.layers, "--layers")
        # A model named on the command line is another than the file's: its layers are not the file's either.
        model = self._given("model")
        return None if model and model != self.config.hf_model_name else self.config.spans(world.size, config.layers)

    def _read_tokenizer(self, folder: Path) -> None:
        self.tokenizer = Tokenizer(folder)
        chat = self._given("chat")
        if chat and not self.tokenizer.can_chat:
            raise UsageError("--chat: this model has no chat template; leave it out, or give --raw")
        self.chat: bool = self.tokenizer.can_chat if chat is None else chat
        system = self._given("system")
        if system and not self.chat:
            raise UsageError("--system needs a chat, and this is a raw completion")
        self.system: str | None = system or self.config.system

    def _explain(self, tuning: TuningResults) -> None:
        if self._given("explain"):
            self._show_kernels(tuning.timings)

    @staticmethod
    def _report(line: str) -> None:
        click.echo(line, err=True)
