"""A session: a ring formed by a command's options and a settings file, and requests with their defaults.

Knows: which option goes before which setting; in which order a ring is formed; how a prompt becomes a request.
Must not know: where prompts come from, or where text goes (a command line, an API, a terminal).

``start`` is called on every rank; everything else is rank 0's, where the options and the file are read.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpgpt import config as configs
from mpgpt.cluster.bootstrap import DeviceFactory, TuningResults, connect_device, ensure_model, negotiate
from mpgpt.cluster.ring import Ring
from mpgpt.cluster.ring_config import RingOptions, over_settings
from mpgpt.config import CacheDtype, DtypeName, StrategyName
from mpgpt.core import GREEDY, Request, Sampling, Span, check_spans
from mpgpt.display import silent
from mpgpt.engine.engine import Engine
from mpgpt.errors import RequestError, UsageError
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.kernel_timings import KernelTiming
from mpgpt.model.sampler import check
from mpgpt.model.tokenizer import Message, Tokenizer
from mpgpt.placement.plan import Objective
from mpgpt.transport.collective import on_rank0
from mpgpt.transport.link import World
from mpgpt.transport.mpirun import SettingsFile

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
Explain = Callable[[Mapping[str, Sequence[KernelTiming]], Mapping[str, str]], None]
"""Shows, by host, which of torch's kernels were tried, and what computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """The options of a command that forms a ring. None leaves a value to the settings, or to the model."""

    model: str | None = None

    dtype: DtypeName | None = None
    kv_dtype: CacheDtype | None = None
    layers: str | None = None
    """Every rank's layers, such as "0-3,4-7,-"."""
    objective: Objective | None = None
    kernel: str | None = None
    fast: bool | None = None
    explain: bool = False
    """Whether the kernels that each host tried are shown."""
    threads: int | None = None
    max_sequences: int | None = None
    context: int | None = None

    max_new_tokens: int | None = None
    strategy: StrategyName | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    ignore_eos: bool = False
    chat: bool | None = None
    system: str | None = None
    drafts: bool | None = None

    @property
    def sampling(self) -> dict[str, float]:
        """The sampling parameters that are given."""
        return {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}


class Session:
    """A ring and its requests' defaults, by a command's options over a settings file.

    After ``start``, on rank 0: ``config`` holds the settings, ``tokenizer`` the model's, ``chat`` whether prompts go
    through its chat template, and ``system`` the system message that a chat begins with.
    """

    def __init__(
        self,
        options: SessionOptions,
        *,
        home: Path,
        file: SettingsFile | None,
        device_factory: DeviceFactory,
        explain: Explain,
        report: Callable[[str], None],
    ) -> None:
        """``file`` holds the settings, if there are any; ``device_factory`` connects the iPad behind a rank;
        ``explain`` shows which kernels were tried; ``report`` shows a line of progress."""
        self._options, self._home, self._file, self._device_factory = options, home, file, device_factory
        self._show_kernels, self._report = explain, report
        self.config = configs.RunConfig()
        self.model = ""

    def start(self, world: World, prepare: Callable[[], None]) -> Ring:
        """Agree, load, connect. Whatever is wrong anywhere is raised on every rank.

        ``prepare`` is called on rank 0 once the settings are read: for whatever can be found wrong without a model.
        """
        chosen = on_rank0(world, lambda: self._prepare(prepare))
        world.heed(*chosen["heartbeat"])
        report = self._report if world.rank == 0 else silent
        folder = ensure_model(world, chosen["model"], self._home, report)
        device = connect_device(world, chosen["ipad"], self._device_factory)
        options = RingOptions(
            dtype=chosen["dtype"], kv_dtype=chosen["kv_dtype"], slots=chosen["slots"], context=chosen["context"],
            threads=chosen["threads"], kernel=chosen["kernel"], fast=chosen["fast"],
            memory=self._home.parent / "kernels.json",
            spans=lambda config: self._spans(world, config), objective=self._objective, workload=self.config.workload,
        )  # fmt: skip
        settings = negotiate(world, folder, options, device, report=report, explain=self._explain)
        on_rank0(world, lambda: self._read_tokenizer(folder))
        self.dtype: str = chosen["dtype"]
        return Ring(world, settings, folder, device, report)

    def engine(self, ring: Ring) -> Engine:
        drafts = self._options.drafts
        return ring.engine(drafts=self.config.drafts if drafts is None else drafts)

    def sampling(
        self, overrides: Mapping[str, float | None], seed: int | None, strategy: str | None = None
    ) -> Sampling:
        """A request's sampling: its ``overrides``, ``seed`` and ``strategy`` over the session's.

        Raises ``UsageError`` or ``RequestError`` for impossible values.
        """
        options = self._options
        if seed is None:
            seed = self.config.seed if options.seed is None else options.seed
        if seed is None:
            seed = secrets.randbits(63)
        parameters = {**options.sampling, **overrides}
        sampling = self.config.sampling(strategy or options.strategy, seed, **parameters)
        check(sampling)
        return GREEDY if sampling == Sampling(seed=sampling.seed) else sampling

    @property
    def strategy(self) -> str:
        """The default decoding strategy."""
        return self._options.strategy or self.config.active_decoding_strategy

    @property
    def max_new_tokens(self) -> int:
        """The default number of new tokens."""
        return self._options.max_new_tokens or self.config.max_new_tokens

    def request(
        self, ids: Sequence[int], sampling: Sampling, *, max_new_tokens: int | None = None, logprobs: int = 0
    ) -> Request:
        stop_ids = frozenset() if self._options.ignore_eos else self.tokenizer.stop_ids
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
        """The messages that a conversation begins with: the system message, if there is one."""
        return [{"role": "system", "content": self.system}] if self.system else []

    def _prepare(self, prepare: Callable[[], None]) -> dict[str, Any]:
        """The sizes that every rank must know before it has a model, checked as far as none is needed."""
        self.config = config = configs.load(self._file.path, self._file.text) if self._file else configs.RunConfig()
        chosen = over_settings(self._options, config)
        self.model = chosen["model"]
        if not self.model:
            raise UsageError("no model: give --model, or a config with hf_model_name")
        self.sampling({}, None)
        prepare()
        return chosen | {"heartbeat": (config.heartbeat.interval_s, config.heartbeat.timeout_s)}

    @property
    def _objective(self) -> Objective:
        return self._options.objective or self.config.plan.objective

    def _spans(self, world: World, config: ModelConfig) -> tuple[Span | None, ...] | None:
        if layers := self._options.layers:
            return check_spans(configs.parse_layers(layers), world.size, config.layers, "--layers")
        # A model named on the command line is another than the file's: its layers are not the file's either.
        model = self._options.model
        return None if model and model != self.config.hf_model_name else self.config.spans(world.size, config.layers)

    def _read_tokenizer(self, folder: Path) -> None:
        self.tokenizer = Tokenizer(folder)
        chat, system = self._options.chat, self._options.system
        if chat and not self.tokenizer.can_chat:
            raise UsageError("--chat: this model has no chat template; leave it out, or give --raw")
        self.chat: bool = self.tokenizer.can_chat if chat is None else chat
        if system and not self.chat:
            raise UsageError("--system needs a chat, and this is a raw completion")
        self.system: str | None = system or self.config.system

    def _explain(self, tuning: TuningResults) -> None:
        if self._options.explain:
            self._show_kernels(tuning.timings, tuning.computing)
