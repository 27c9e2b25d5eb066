"""Which Ray a process connects to, and what to say when it cannot."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from apothic.errors import (
    AuthenticationError,
    ConnectionFailedError,
    InvalidOptionError,
    VersionMismatchError,
)
from ray_backend import ray_api
from ray_backend.names import NAMESPACE

__all__ = ["ORPHAN_CHECK_MS", "ensure_connected"]

ORPHAN_CHECK_MS = 5000
"""How often workers of a cluster that we start look for their raylet. Ray's default of a second would
end them while their exit hooks run, when the process that started the cluster was killed."""

_CLIENT_TIMEOUT_S = 5.0

# What a client says first to a gRPC server, and the type in the head of the frame that answers
# (RFC 9113, sections 3.4, 4.1 and 6.5).
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_HTTP2_FRAME_HEAD_BYTES = 9
_HTTP2_SETTINGS = b"\4"

_GCS_PATIENCE_VARIABLE = "RAY_gcs_server_port_wait_time_s"
_GCS_PATIENCE_S = 5
"""How long Ray may go on asking a GCS that listens and refuses; its default is 20 seconds."""

_CLIENT_UNLUCKY = "starting ray client server failed"
"""What a head says whose process for one more client has ended as it started; the next one's may not."""

_CLIENT_ATTEMPTS = 3


@dataclass(frozen=True)
class _Where:
    """A wanted cluster: an address for ``ray.init``, or None for one of our own."""

    address: str | None
    said_by: str


def ensure_connected(base_url: str | None) -> None:
    """Connect this process to Ray, unless it is.

    In order: a Ray that this process has initialised; ``base_url`` (``ray://host:port``,
    ``host:port``, ``auto``, ``local``); ``RAY_ADDRESS``; a Ray started here, which ends with the
    process, and of which one line on standard error tells.

    Raises:
        InvalidOptionError: when ``base_url`` is malformed, or differs from the connection there is.
        ConnectionFailedError: when the cluster cannot be reached.
        AuthenticationError: when it refuses the token, or this process has none.
        VersionMismatchError: when it runs another Ray or Python version.
    """
    where = _wanted(base_url)
    if ray.is_initialized():
        _check_same(base_url)
        return
    if where.address is None:
        _start_here()
        return
    if where.address != "auto":
        _check_listening(where)
    for attempt in range(_CLIENT_ATTEMPTS):
        try:
            _join(where.address)
        except Exception as error:
            if _CLIENT_UNLUCKY in str(error).lower() and attempt < _CLIENT_ATTEMPTS - 1:
                continue
            raise _translated(error, where) from error
        return


def _join(address: str) -> None:
    if address.startswith("ray://"):
        ray_api.ping_client_server(address.removeprefix("ray://"), _CLIENT_TIMEOUT_S)
    with _impatient():
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=True,
            logging_level=logging.WARNING,
        )


def _wanted(base_url: str | None) -> _Where:
    address, said_by = base_url, "base_url"
    if base_url in (None, "auto") and os.environ.get("RAY_ADDRESS"):
        # Ray itself lets RAY_ADDRESS decide what "auto" is; in a submitted job that is its cluster.
        address, said_by = os.environ["RAY_ADDRESS"], "RAY_ADDRESS"
    if address is None:
        return _Where(None, "default")
    if address == "local":
        return _Where(None, said_by)
    if address != "auto":
        rest = address.removeprefix("ray://")
        host, colon, port = rest.rpartition(":")
        if not colon or not host or not port.isdigit() or "://" in rest:
            raise InvalidOptionError(
                f"{said_by}={address!r} is not valid: it takes 'ray://host:10001' (Ray Client), "
                f"'host:6379' (a node of the cluster), 'auto' (the cluster on this machine) or "
                f"'local' (one started here)."
            )
    return _Where(address, said_by)


@contextmanager
def _impatient() -> Iterator[None]:
    """Have Ray give up soon on a GCS that refuses, unless the user has said how long to wait."""
    if _GCS_PATIENCE_VARIABLE in os.environ:
        yield
        return
    os.environ[_GCS_PATIENCE_VARIABLE] = str(_GCS_PATIENCE_S)
    try:
        yield
    finally:
        del os.environ[_GCS_PATIENCE_VARIABLE]


def _check_same(base_url: str | None) -> None:
    """Refuse a second cluster: Ray has one connection per process."""
    if base_url is None or base_url == "auto":
        return
    if base_url == "local" and ray_api.is_own_cluster():
        return
    if ray_api.is_client_mode():
        current = "a ray:// proxy"
        if base_url.startswith("ray://"):
            return
    else:
        current = ray.get_runtime_context().gcs_address
        host, _, port = base_url.rpartition(":")
        current_host, _, current_port = current.rpartition(":")
        if port == current_port and _same_host(host, current_host):
            return
    raise InvalidOptionError(
        f"base_url={base_url!r}, but this process is connected to Ray at {current} already, and Ray "
        f"has one connection per process. Leave base_url out, or call ray.shutdown() first."
    )


def _same_host(one: str, other: str) -> bool:
    try:
        return socket.gethostbyname(one) == socket.gethostbyname(other) or one in (
            "localhost",
            "127.0.0.1",
        )
    except OSError:
        return False


def _start_here() -> None:
    print(
        "apothic: no Ray cluster was named (base_url, RAY_ADDRESS): starting one in this process; it "
        "ends with it.",
        file=sys.stderr,
    )
    options: dict[str, Any] = {
        "namespace": NAMESPACE,
        "include_dashboard": False,
        "log_to_driver": True,
        "logging_level": logging.WARNING,
        "_system_config": {"raylet_death_check_interval_milliseconds": ORPHAN_CHECK_MS},
    }
    # RAY_ADDRESS may be set for others: "local" makes ray.init start a new cluster regardless.
    _in_lasting_thread(lambda: ray.init(address="local", **options))


def _in_lasting_thread(start: Callable[[], object]) -> None:
    """Call what starts processes from a thread that lives as long as this process.

    Linux ends them when the thread that started them ends, which is before the process for one of a
    pool, such as the async twins': before exit hooks could run.
    """
    if threading.current_thread() is threading.main_thread():
        start()
        return
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(start())
        except BaseException as error:
            done.set_exception(error)
        threading.Event().wait()

    threading.Thread(target=run, name="apothic-ray-start", daemon=True).start()
    done.result()


def _check_listening(where: _Where) -> None:
    """Fail at once where nothing listens, or no gRPC server: Ray would try for a minute and more."""
    assert where.address is not None
    host, _, port = where.address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection(
            (host.strip("[]"), int(port)), _CLIENT_TIMEOUT_S
        ) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(_HTTP2_FRAME_HEAD_BYTES)
    except TimeoutError:
        answer = b""
    except OSError as error:
        raise ConnectionFailedError(
            f"no Ray cluster answers at {where.address} (from {where.said_by}): {error}. Start one "
            f"there with `ray start --head`, correct the address, or use base_url='local'."
        ) from None
    if answer[3:4] != _HTTP2_SETTINGS:
        raise ConnectionFailedError(_other_server(where))


def _other_server(where: _Where) -> str:
    return (
        f"the Ray cluster at {where.address} (from {where.said_by}) cannot be reached: what listens "
        f"there does not answer as a Ray head does. Check the address: 'host:port' takes the GCS "
        f"port (6379), 'ray://host:port' the Ray Client port (10001)."
    )


def _translated(error: Exception, where: _Where) -> ConnectionFailedError:
    text = f"{type(error).__name__}: {error}".strip()
    low = f"{text} {_causes(error)}".lower()
    source = f"{where.address} (from {where.said_by})"
    if "authentication" in low or "unauthenticated" in low or "auth token" in low:
        return AuthenticationError(
            f"the Ray cluster at {source} wants a token, and this process {_own_token()}. Set "
            f"RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a copy of the cluster's token file (on "
            f"the head: ~/.ray/auth_token), or RAY_AUTH_TOKEN to the token."
        )
    if (
        "version mismatch" in low
        or "different versions" in low
        or ("version" in low and "ray" in low)
    ):
        return VersionMismatchError(
            f"the Ray cluster at {source} runs other versions than this process (Ray "
            f"{ray.__version__}, Python {sys.version.split()[0]}). Use the cluster's versions. Ray "
            f"says: {text[:400]}"
        )
    if _CLIENT_UNLUCKY in low:
        return ConnectionFailedError(
            f"the Ray cluster at {source} could not start a process for this client. Look into "
            f"ray_client_server_*.err in the logs of its head, or run the program there with `ray "
            f"job submit`. Ray says: {text[-400:]}"
        )
    if "could not find any running ray" in low:
        return ConnectionFailedError(
            f"no Ray cluster runs on this machine, which {source} asks for. Start one with `ray start "
            f"--head`, or use base_url='local'."
        )
    return ConnectionFailedError(f"{_other_server(where)} Ray says: {text[:400]}")


def _causes(error: BaseException) -> str:
    """Give the texts of what caused an error: Ray's own says no more than that it failed."""
    cause = error.__cause__ or error.__context__
    return "" if cause is None else f"{type(cause).__name__}: {cause} {_causes(cause)}"


def _own_token() -> str:
    """Tell, in words, whether this process sends a token; never the token."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return "sends another one, or none"
    return "sends none: RAY_AUTH_MODE is not 'token'"
