"""PROTOCOL.md as code: messages, frames, and both ends as state machines without I/O."""
