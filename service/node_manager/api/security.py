# SPDX-License-Identifier: GPL-3.0-or-later
"""Bearer tokens at the door of each endpoint: deny by default, then by role."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, HTTPException, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from node_manager.access import Identity, Tokens
from node_manager.domain import Role

_bearer = HTTPBearer(auto_error=False, description="A token made by `nodectl token create`")
_ANYBODY = Identity("", "anybody (auth.enabled is false)", Role.ADMIN)
_MAX_TOKEN_CHARACTERS = 256


def require(*roles: Role) -> Callable[..., Awaitable[Identity]]:
    """Give a dependency that lets in the bearers of *roles*; admins are always let in."""
    allowed = {*roles, Role.ADMIN}

    async def let_in(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
    ) -> Identity:
        identity = await _identify(request, credentials)
        request.scope["identity"] = identity
        if identity.role not in allowed:
            needed = " or ".join(sorted(role.value for role in allowed))
            raise HTTPException(403, f"the token {identity.name!r} has the role {identity.role}; this takes {needed}")
        return identity

    return let_in


async def _identify(request: Request, credentials: HTTPAuthorizationCredentials | None) -> Identity:
    if not request.app.state.parts.settings.configuration.auth.enabled:
        return _ANYBODY
    tokens: Tokens = request.app.state.parts.tokens
    if credentials is None or len(credentials.credentials) > _MAX_TOKEN_CHARACTERS:
        raise _unauthenticated("send a token: 'Authorization: Bearer nm_...'; nodectl token create makes one")
    identity = tokens.cached(credentials.credentials) or await run_in_threadpool(
        tokens.authenticate, credentials.credentials
    )
    if identity is None:
        raise _unauthenticated("the token is unknown or revoked; nodectl token create makes a new one")
    return identity


def _unauthenticated(detail: str) -> HTTPException:
    return HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})


Viewer = Annotated[Identity, Depends(require(Role.VIEWER, Role.OPERATOR))]
Operator = Annotated[Identity, Depends(require(Role.OPERATOR))]
Observer = Annotated[Identity, Depends(require(Role.AGENT, Role.OPERATOR))]
