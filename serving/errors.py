# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Errors as OpenAI's clients know them."""


class APIError(Exception):
    """
    What a client is told, over HTTP and in a realtime session alike.

    Args:
        message: what is wrong, and what would be right.
        code: for programs.
        status: of the HTTP response.
        param: the name of what is wrong in the request.
    """

    def __init__(self, message: str, code: str, status: int = 400, param: str | None = None):
        super().__init__(message)
        self.message, self.code, self.status, self.param = message, code, status, param

    @property
    def error(self) -> dict:
        """The object that OpenAI calls `error`."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}


def invalid(errors: list[dict]) -> APIError:
    """What pydantic found first in a request, by its `errors()`."""
    first = errors[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return APIError("The request is no JSON.", "invalid_json")
    if first["type"] == "extra_forbidden":
        return APIError(f"`{param}` is unknown, or not supported by this server.", "unknown_parameter", param=param)
    return APIError(f"`{param}`: {first['msg']}." if param else f"{first['msg']}.", "invalid_value", param=param)
