"""The tree of everything that can go wrong by somebody else's hand.

Knows: what kinds of trouble there are and which exit status each one means.
Must not know: anything else of the project.

    MpgptError              exit status 1
    ├── UsageError          exit status 2: the command line, a config or a plan asks for the impossible
    ├── ModelError          a model folder is absent, incomplete, damaged, or of an unsupported kind
    │   └── PullError       a model could not be fetched or converted
    ├── RequestError        one prompt cannot be served; the others go on
    ├── OutputError         what was made cannot be written: a disk is full, standard output is closed
    │   └── ReaderGone      exit status 141, without a word: whoever read has read enough
    ├── WireError           bytes from another rank are not a frame
    └── LinkError           another rank cannot be reached or has gone

Our own mistakes are ``assert``s, never one of these.
"""


class MpgptError(Exception):
    """A sentence for the person at the keyboard: what was wrong, where, what to do."""

    exit_status = 1


class UsageError(MpgptError, ValueError):
    """The command line, a config file or a plan asks for something impossible."""

    exit_status = 2


class ModelError(MpgptError):
    """A model folder is absent, incomplete, damaged, or of an unsupported kind."""


class PullError(ModelError):
    """A model could not be fetched or converted; ``reason`` says why, ``advice`` what else can be done."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(f"{reason} {advice}" if advice else reason)
        self.reason, self.advice = reason, advice


class RequestError(MpgptError, ValueError):
    """One prompt cannot be served: empty, too long, or with impossible sampling parameters."""


class OutputError(MpgptError):
    """What was made cannot be written: a disk is full, standard output is closed."""


class ReaderGone(OutputError):
    """Nobody reads any more what is written, such as ``head`` when it has its lines; there is nothing to say of it."""

    exit_status = 141
    """Of a program that SIGPIPE ends."""


class WireError(MpgptError, ValueError):
    """Bytes that came from another rank are not a frame: cut, damaged, or out of bounds."""


class LinkError(MpgptError):
    """Another rank cannot be reached or has gone."""
