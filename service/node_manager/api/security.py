# SPDX-License-Identifier: GPL-3.0-or-later
"""Bearer tokens at the door of each endpoint: deny by default, then by role."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from anyio import CapacityLimiter, fail_after, to_thread
from fastapi import Depends, HTTPException, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from node_manager.access import Identity, Tokens
from node_manager.domain import Role
from node_manager.store import StoreUnavailableError

_bearer = HTTPBearer(auto_error=False, description="A token made by `nodectl token create`")
_ANYBODY = Identity("", "anybody (auth.enabled is false)", Role.ADMIN)
_MAX_TOKEN_CHARACTERS = 256
# Of the ten that Prometheus waits; the look at the store needs some of them too.
_PATIENCE_SECONDS = 2.0


def require(*roles: Role, without_store: bool = False) -> Callable[..., Awaitable[Identity]]:
    """Give a dependency that lets in the bearers of *roles*; admins are always let in.

    Shapes: *without_store* lets in those of the last hour also while the store can't say whether they still are.
    """
    allowed = {*roles, Role.ADMIN}

    async def let_in(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
    ) -> Identity:
        identity = await _identify(request, credentials, without_store=without_store)
        request.scope["identity"] = identity
        if identity.role not in allowed:
            needed = " or ".join(sorted(role.value for role in allowed))
            raise HTTPException(403, f"the token {identity.name!r} has the role {identity.role}; this takes {needed}")
        return identity

    return let_in


async def _identify(
    request: Request, credentials: HTTPAuthorizationCredentials | None, *, without_store: bool
) -> Identity:
    if not request.app.state.parts.settings.configuration.auth.enabled:
        return _ANYBODY
    tokens: Tokens = request.app.state.parts.tokens
    if credentials is None or len(credentials.credentials) > _MAX_TOKEN_CHARACTERS:
        raise _unauthenticated("send a token: 'Authorization: Bearer nm_...'; nodectl token create makes one")
    identity = tokens.cached(credentials.credentials)
    if identity is None:
        if without_store:
            identity = await _identify_soon(tokens, credentials.credentials, request.app.state.scrapes)
        else:
            identity = await run_in_threadpool(tokens.authenticate, credentials.credentials)
    if identity is None:
        raise _unauthenticated("the token is unknown or revoked; nodectl token create makes a new one")
    return identity


async def _identify_soon(tokens: Tokens, text: str, limiter: CapacityLimiter) -> Identity | None:
    """Ask the store, and memory where it doesn't answer in time.

    Errors: StoreUnavailableError if neither knows.
    """
    try:
        with fail_after(_PATIENCE_SECONDS):
            return await to_thread.run_sync(tokens.authenticate, text, abandon_on_cancel=True, limiter=limiter)
    except (StoreUnavailableError, TimeoutError) as error:
        identity = tokens.remembered(text)
        if identity is None:
            raise StoreUnavailableError(str(error) or "the store doesn't answer") from error
        return identity


def _unauthenticated(detail: str) -> HTTPException:
    return HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})


Viewer = Annotated[Identity, Depends(require(Role.VIEWER, Role.OPERATOR))]
Scraper = Annotated[Identity, Depends(require(Role.VIEWER, Role.OPERATOR, without_store=True))]
Operator = Annotated[Identity, Depends(require(Role.OPERATOR))]
Observer = Annotated[Identity, Depends(require(Role.AGENT, Role.OPERATOR))]
