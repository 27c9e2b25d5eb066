"""Where the engine is, and what is wrong when nothing answers there."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from docker.tls import TLSConfig

from apothic.errors import SandboxEngineError
from ray_backend.sandbox.engine.translate import START_COMMAND

__all__ = ["EngineAddress", "NoEngineError"]

_DEFAULT = "unix:///var/run/docker.sock"


class NoEngineError(SandboxEngineError):
    """Nothing that answers as a Docker engine: another node may have one."""


@dataclass(frozen=True)
class EngineAddress:
    """The address of a Docker engine.

    Attributes:
        url: ``unix:///path`` or ``tcp://host:port``.
        certificates: directory of ``ca.pem``, ``cert.pem`` and ``key.pem``, or None without TLS.
        verify: whether the engine's certificate is checked.
    """

    url: str
    certificates: Path | None = None
    verify: bool = True

    @classmethod
    def find(cls, docker_host: str | None = None) -> EngineAddress:
        """Take the given address, else ``DOCKER_HOST``, else the default socket.

        ``DOCKER_TLS_VERIFY`` and ``DOCKER_CERT_PATH`` mean what they mean to the docker command.

        Raises:
            SandboxEngineError: when the address is of a kind that is not supported.
        """
        url = docker_host or os.environ.get("DOCKER_HOST") or _DEFAULT
        parts = urlsplit(url)
        if parts.scheme == "unix" and parts.path:
            return cls(url)
        if parts.scheme in ("tcp", "http", "https") and parts.hostname:
            verify = os.environ.get("DOCKER_TLS_VERIFY", "")
            given = os.environ.get("DOCKER_CERT_PATH", "")
            if not verify and not given and parts.scheme != "https":
                return cls(url)
            return cls(url, Path(given or Path.home() / ".docker"), bool(verify))
        raise SandboxEngineError(
            f"DOCKER_HOST={url!r} is not supported: it takes unix:///path/to/socket or "
            f"tcp://host:port. For an engine behind ssh, forward its socket: "
            f"'ssh -NL /tmp/docker.sock:/var/run/docker.sock HOST', then "
            f"DOCKER_HOST=unix:///tmp/docker.sock."
        )

    @property
    def socket_path(self) -> str | None:
        """The path of a unix socket, or None."""
        parts = urlsplit(self.url)
        return parts.path if parts.scheme == "unix" else None

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The host and port of a TCP address."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or (2375 if self.certificates is None else 2376)

    def tls_config(self) -> TLSConfig | bool:
        """Give docker-py's TLS settings; False for none."""
        if self.certificates is None:
            return False
        pair = (str(self.certificates / "cert.pem"), str(self.certificates / "key.pem"))
        return TLSConfig(
            client_cert=pair, ca_cert=str(self.certificates / "ca.pem"), verify=self.verify
        )

    def check(self, timeout_s: float) -> None:
        """Connect once.

        Raises:
            NoEngineError: when nothing can be connected to; the message says why and what helps.
        """
        path = self.socket_path
        try:
            if path is None:
                socket.create_connection(self.host_and_port, timeout_s).close()
                return
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(timeout_s)
                probe.connect(path)
        except FileNotFoundError:
            raise NoEngineError(
                f"there is no Docker socket {path} on this node. Install Docker (Debian, Ubuntu: "
                f"sudo apt-get install docker.io) or start it: {START_COMMAND}; if the engine is "
                f"elsewhere, set DOCKER_HOST."
            ) from None
        except PermissionError:
            raise NoEngineError(
                f"user {_user()} may not use the Docker socket {path}. Add it to the socket's "
                f"group: 'sudo usermod -aG docker {_user()}', log in again, and restart Ray there."
            ) from None
        except ConnectionRefusedError:
            raise NoEngineError(
                f"no Docker engine listens at {self.url}. Start it: {START_COMMAND}."
            ) from None
        except OSError as error:
            raise NoEngineError(
                f"the Docker engine at {self.url} cannot be reached: {error}. Check DOCKER_HOST and "
                f"the network, or start the engine: {START_COMMAND}."
            ) from None

    async def open(
        self, loop: asyncio.AbstractEventLoop, protocol: asyncio.Protocol
    ) -> asyncio.BaseTransport:
        """Connect a protocol to the engine."""
        path = self.socket_path
        if path is not None:
            transport, _ = await loop.create_unix_connection(lambda: protocol, path)
            return transport
        host, port = self.host_and_port
        context = self._ssl_context()
        plain, _ = await loop.create_connection(lambda: protocol, host, port, ssl=context)
        return plain

    def _ssl_context(self) -> ssl.SSLContext | None:
        if self.certificates is None:
            return None
        context = ssl.create_default_context(cafile=str(self.certificates / "ca.pem"))
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        context.load_cert_chain(
            str(self.certificates / "cert.pem"), str(self.certificates / "key.pem")
        )
        return context


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
