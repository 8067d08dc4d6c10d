"""Running model-written code: the name that outside code imports; see nanochat/sandbox."""

from nanochat.sandbox import ExecutionResult, execute_code

__all__ = ["ExecutionResult", "execute_code"]
