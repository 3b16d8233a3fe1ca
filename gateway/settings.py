"""What a person can set about the gateway: where it listens, who may come in, and how much one request may cost."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.addresses import is_loopback

__all__ = ["GatewaySettings"]


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """Settings of one gateway, checked by `headrace.gateway.serve` before anything listens.

    Attributes:
        host: address to listen on; others than loopback need `api_keys`.
        port: TCP port; 0 takes a free one.
        api_keys: if any are given, all paths but the page and the health checks need one of them.
        allowed_hosts: names under which browsers may reach the gateway, besides loopback ones.
        allowed_origins: other web sites that may call the API, as scheme://host:port.
        max_body: bytes of a request body.
        max_headers: bytes of all request headers together.
        max_requests: requests in work at once; more get 429.
        header_timeout: seconds in which the headers of a request must arrive.
        body_timeout: seconds in which a request body must arrive.
        request_timeout: seconds that one generation may take; None for no limit.
        ping_interval: seconds of silence after which a stream sends a comment, so that proxies keep it open.
        drain_timeout: seconds that running requests get to finish after a stop signal.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body: int = 8 * 2**20
    max_headers: int = 64 * 2**10
    max_requests: int = 1024
    header_timeout: float = 15.0
    body_timeout: float = 30.0
    request_timeout: float | None = None
    ping_interval: float = 15.0
    drain_timeout: float = 30.0

    def __repr__(self) -> str:
        """All but the keys."""
        return f"GatewaySettings(host={self.host!r}, port={self.port}, api_keys={len(self.api_keys)} given)"

    def host_allowed(self, name: str) -> bool:
        """Whether a browser may call the gateway by this name; guards against DNS rebinding."""
        if is_loopback(name) or name.lower() in (host.lower() for host in self.allowed_hosts):
            return True
        # Reachable from outside it has any number of names; there the API key is the guard.
        return not self.allowed_hosts and not is_loopback(self.host)
