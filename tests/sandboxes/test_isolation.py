"""Code in a session that tries to get out, as root and as somebody else: each attempt must fail.

Each attempt prints what it got through to, and nothing when all was refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator

import pytest

from apothic import App, Secret
from apothic.backend import use_client
from apothic.errors import SandboxFileError, SandboxPermissionError
from apothic.session import SandboxSession
from ray_backend.sandbox import host
from ray_backend.sandbox.agent.constants import MAGIC, FrameType
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.container import CAPABILITIES, OPEN_FILES
from ray_backend.sandbox.engine.firewall import read_rules
from ray_backend.sandbox.protocol import encode_frame
from tests.docker.support import left_of, new_owner
from tests.sandboxes.direct import DirectEngine
from tests.sandboxes.test_direct import IMAGE
from tests.support import eventually

PYTHON = "/usr/bin/python3"
TOKEN = "hunter2-of-another-session"
SOMEBODY = "1234:1234"


@pytest.fixture(scope="module")
def engine(docker_engine: Engine) -> Iterator[DirectEngine]:
    engine = DirectEngine()
    previous = use_client(engine)
    engine.secrets["other"] = {"OTHER_TOKEN": TOKEN}
    yield engine
    use_client(previous)
    engine.disconnect()
    assert left_of(docker_engine, engine.cluster_id) == []


def opened(name: str, network: str, *secrets: Secret) -> SandboxSession:
    app = App("isolation")
    return app.sandbox(
        name=name,
        image=IMAGE,
        cpu=0,
        memory_mb=256,
        timeout_s=60,
        network=network,  # type: ignore[arg-type]
        secrets=list(secrets),
    ).create()


@pytest.fixture(scope="module")
def alone(engine: DirectEngine) -> Iterator[SandboxSession]:
    """Give a session without a network."""
    with opened("alone", "none") as session:
        yield session


@pytest.fixture(scope="module")
def online(engine: DirectEngine) -> Iterator[SandboxSession]:
    """Give a session on the internet network."""
    with opened("online", "internet") as session:
        yield session


@pytest.fixture(scope="module")
def other(engine: DirectEngine) -> Iterator[SandboxSession]:
    """Give another session on that network, with a secret that a program of it has."""
    with (
        opened("other", "internet", Secret.from_name("other")) as session,
        session.exec_stream(
            [PYTHON, "-c", "print('up', flush=True)\nwhile True: __import__('time').sleep(9)"]
        ) as stream,
    ):
        assert next(stream).text == "up\n"
        yield session


PRELUDE = """
import ctypes, os, platform, resource, socket, stat, sys
libc = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"
LONG = ctypes.c_long

def works(call, *arguments):
    try:
        given = call(*arguments)
    except (OSError, ValueError):
        return None
    print("WORKED", getattr(call, "__name__", call), arguments, given)
    return given

def does(name, *arguments):
    given = getattr(libc, name)(*arguments)
    if given != -1:
        print("WORKED", name, arguments, given)

def asks(x86, arm, *arguments):
    call = arm if ARM else x86
    words = [LONG(one) if isinstance(one, int) else one for one in arguments]
    given = libc.syscall(LONG(call), *words)
    if given != -1:
        print("WORKED system call", call, given)
    return given

def reads(path):
    with open(path, "rb") as file:
        return file.read(1)

def writes(path):
    os.close(os.open(path, os.O_WRONLY))
"""


def attempt(session: SandboxSession, code: str, *arguments: str, user: str | None = None) -> str:
    """Run code inside; gives what it printed, when the agent has answered once more."""
    result = session.exec(
        [PYTHON, "-c", PRELUDE + code, *arguments], user=user, env={"OTHER_TOKEN": None}
    ).check()
    assert session.exec(["echo", "here"]).stdout == "here\n"
    return result.stdout


ATTEMPTS = {
    "attach to the agent and to its keeper as a debugger": """
for pid in (1, os.getppid()):
    for request in (16, 0x4206):
        does("ptrace", request, pid, 0, 0)
""",
    "their memory": """
class Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
room = ctypes.create_string_buffer(64)
for pid in (1, os.getppid()):
    mine, theirs = Piece(ctypes.addressof(room), 8), Piece(0x200000, 8)
    for name in ("process_vm_readv", "process_vm_writev"):
        getattr(libc, name)(pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)
        if ctypes.get_errno() != 1:
            print("WORKED", name, pid, ctypes.get_errno())
    for name in ("mem", "environ", "maps", "auxv", "stack"):
        works(reads, f"/proc/{pid}/{name}")
    works(writes, f"/proc/{pid}/mem")
""",
    "their descriptors": """
for pid in (1, os.getppid()):
    for number in range(64):
        works(os.readlink, f"/proc/{pid}/fd/{number}")
        works(reads, f"/proc/{pid}/fd/{number}")
        works(writes, f"/proc/{pid}/fd/{number}")
    held = libc.syscall(LONG(434), LONG(pid), LONG(0))
    for number in range(64):
        if libc.syscall(LONG(438), LONG(held), LONG(number), LONG(0)) != -1:
            print("WORKED pidfd_getfd", pid, number)
    for name in ("root", "cwd", "exe"):
        works(os.readlink, f"/proc/{pid}/{name}")
        works(os.listdir, f"/proc/{pid}/{name}/")
""",
    "their limits and their priority": """
for pid in (1, os.getppid()):
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_CPU, resource.RLIMIT_AS):
        works(resource.prlimit, pid, limit, (1, 1))
    works(os.sched_setscheduler, pid, os.SCHED_FIFO, os.sched_param(1))
works(os.setpriority, os.PRIO_PROCESS, 1, -5)
""",
    "the agent's program": """
for path in ("/.apothic/agent", "/.apothic/new", "/.apothic/x/y"):
    works(os.open, path, os.O_WRONLY | os.O_CREAT)
works(os.unlink, "/.apothic/agent")
works(os.rename, "/.apothic", "/apothic")
works(os.mkdir, "/.apothic/directory")
works(os.chmod, "/.apothic/agent", 0o777)
does("mount", None, b"/.apothic", None, 4096 | 32, None)
does("umount2", b"/.apothic", 2)
""",
    "mount": """
os.makedirs("/tmp/mnt", mode=0o777, exist_ok=True)
for kind in (b"tmpfs", b"proc", b"sysfs", b"overlay", b"cgroup", b"ext4"):
    does("mount", b"none", b"/tmp/mnt", kind, 0, None)
does("mount", b"/proc", b"/tmp/mnt", None, 4096, None)
does("mount", None, b"/proc/sys", None, 32 | 4096, None)
for path in (b"/proc/sys", b"/proc/kcore", b"/sys", b"/dev/shm"):
    does("umount2", path, 2)
works(os.chroot, "/tmp/mnt")
asks(155, 41, b"/tmp/mnt", b"/tmp/mnt") # pivot_root
asks(428, 428, -100, b"/", 1) # open_tree
asks(430, 430, b"tmpfs", 0) # fsopen
asks(304, 265, -100, ctypes.create_string_buffer(128), 0) # open_by_handle_at
""",
    "namespaces": """
for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x08000000, 0x04000000, 0x02000000):
    does("unshare", flag)
    given = asks(56, 220, flag | 17, 0, 0, 0, 0) # clone
    if given == 0:
        os._exit(0)
for name in os.listdir("/proc/self/ns"):
    held = works(os.open, f"/proc/1/ns/{name}", os.O_RDONLY)
    if held is not None:
        does("setns", held, 0)
""",
    "the kernel": """
asks(175, 105, b"x", 1, b"") # init_module
asks(313, 273, 0, b"", 0) # finit_module
asks(176, 106, b"x", 0) # delete_module
asks(246, 104, 0, 0, 0, 0) # kexec_load
asks(169, 142, 0xfee1dead, 672274793, 0x89abcdef, 0) # reboot
asks(321, 280, 0, ctypes.create_string_buffer(128), 128) # bpf
asks(298, 241, ctypes.create_string_buffer(128), 0, -1, -1, 0) # perf_event_open
asks(323, 282, 0) # userfaultfd
asks(163, 89, b"/tmp/account") # acct
asks(167, 224, b"/tmp/swap", 0) # swapon
asks(103, 116, 5, 0, 0) # syslog
if not ARM:
    asks(172, 0, 3) # iopl
works(socket.sethostname, "other")
does("settimeofday", ctypes.create_string_buffer(16), None)
for path in ("/proc/sysrq-trigger", "/proc/kmsg", "/dev/kmsg", "/dev/mem", "/dev/port"):
    works(writes, path)
for path in ("/proc/kmsg", "/proc/kcore", "/proc/timer_list", "/proc/keys", "/proc/sched_debug",
             "/proc/latency_stats", "/dev/kmsg", "/dev/mem"):
    try:
        if reads(path): # nothing is what a masked one gives
            print("WORKED", path)
    except OSError:
        pass
""",
    "keys of the kernel": """
asks(250, 219, 0, -3, 1) # keyctl, the session's
asks(250, 219, 11, 1, 0, 0)
asks(248, 217, b"user", b"name", b"value", 5, -3) # add_key
asks(249, 218, b"user", b"name", 0, -3) # request_key
""",
    "settings of the kernel and of its control groups": """
for top in ("/proc/sys", "/sys"):
    for place, below, names in os.walk(top):
        if place == "/sys":
            below.remove("devices") # thousands of nodes, mounted as the rest of it is
        for name in names:
            works(writes, os.path.join(place, name))
""",
    "devices": """
for major, minor in ((8, 0), (252, 0), (253, 0), (254, 0), (259, 0), (7, 0)):
    works(os.mknod, f"/tmp/disk-{major}", stat.S_IFBLK | 0o666, os.makedev(major, minor))
works(os.mknod, "/tmp/mem", stat.S_IFCHR | 0o666, os.makedev(1, 1))
KNOWN = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)} # null, zero, …, tty, ptmx
for place, _, names in os.walk("/dev"):
    for name in names:
        found = os.stat(os.path.join(place, name))
        number = os.major(found.st_rdev), os.minor(found.st_rdev)
        if stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode) and number not in KNOWN:
            print("WORKED", place, name)
""",
    "raw packets": """
for family, kind in ((socket.AF_INET, socket.SOCK_RAW), (socket.AF_PACKET, socket.SOCK_RAW),
                     (socket.AF_PACKET, socket.SOCK_DGRAM), (socket.AF_INET6, socket.SOCK_RAW)):
    works(socket.socket, family, kind, 1)
""",
    "the limit of open files": f"""
works(resource.setrlimit, resource.RLIMIT_NOFILE, ({OPEN_FILES} + 1,) * 2)
works(resource.setrlimit, resource.RLIMIT_CORE, (1, 1))
held = []
try:
    while len(held) < {OPEN_FILES}:
        held.append(os.open("/dev/null", os.O_RDONLY))
    print("WORKED", len(held))
except OSError:
    pass
""",
    "sockets of the host": """
for place, below, names in os.walk("/"):
    if place in ("/proc", "/sys"):
        below.clear()
    for name in names:
        try:
            if stat.S_ISSOCK(os.lstat(os.path.join(place, name)).st_mode):
                print("WORKED", place, name)
        except OSError:
            pass
for path in ("/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock",
             "\\0docker", "\\0/containerd-shim"):
    works(socket.socket(socket.AF_UNIX).connect, path)
for line in open("/proc/net/unix").readlines()[1:]:
    words = line.split()
    if int(words[3], 16) & 0x10000: # it listens
        print("WORKED", line)
    if len(words) > 7:
        works(socket.socket(socket.AF_UNIX).connect, words[7].replace("@", "\\0"))
""",
    "capabilities": f"""
text = open("/proc/self/status").read()
held = {{name: int(text.split(name + ":")[1].split()[0], 16) for name in ("CapBnd", "CapEff")}}
names = "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID".split()
ours = sum(1 << names.index(name) for name in {CAPABILITIES!r} if name in names) | 1 << 10
if any(value & ~ours for value in held.values()) or "NoNewPrivs:\\t1" not in text:
    print("WORKED", text)
for number in range(41):
    if not ours >> number & 1:
        does("prctl", 47, 2, number, 0, 0) # into the ambient set
""",
    "directories of the host": """
for line in open("/proc/self/mountinfo"):
    words = line.split()
    place, kind = words[4], words[words.index("-") + 1]
    if kind in ("proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue", "tmpfs", "overlay"):
        continue
    if place not in ("/etc/resolv.conf", "/etc/hostname", "/etc/hosts"):
        works(writes, place)
        if os.path.isdir(place):
            works(os.mkdir, os.path.join(place, "new"))
            if place != "/.apothic" and os.access(place, os.R_OK):
                for name in os.listdir(place):
                    print("WORKED", place, name)
""",
    "another one's processes": """
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if sys.argv[1].encode() in open(f"/proc/{pid}/environ", "rb").read():
            print("WORKED", pid)
    except OSError:
        pass
""",
}


@pytest.mark.parametrize("user", [None, SOMEBODY], ids=["root", "somebody"])
@pytest.mark.parametrize("aim", list(ATTEMPTS))
def test_out_of_reach(alone: SandboxSession, aim: str, user: str | None) -> None:
    assert attempt(alone, ATTEMPTS[aim], TOKEN, user=user) == ""


def test_an_attempt_that_works_is_seen(alone: SandboxSession) -> None:
    code = 'works(reads, "/etc/passwd")\ndoes("getpid")\nasks(39, 172)'
    assert attempt(alone, code).count("WORKED") == 3


def test_signals_do_not_end_the_agent(alone: SandboxSession) -> None:
    code = """
for number in range(1, 65):
    if number not in (17, 32, 33):
        try:
            os.kill(1, number)
        except OSError:
            pass
"""
    before = alone.inspect().container_id
    for user in (None, SOMEBODY):
        assert attempt(alone, code, user=user) == ""
    assert alone.inspect().container_id == before


def test_a_setuid_program_gives_nothing(alone: SandboxSession) -> None:
    alone.exec("cp /usr/bin/python3 /usr/bin/strong && chmod 6755 /usr/bin/strong", shell=True)
    assert stat.S_IMODE(int(alone.exec("stat -c %f /usr/bin/strong").stdout, 16)) == 0o6755
    code = (
        "import os; print(os.getresuid(), os.getresgid(),"
        "open('/proc/self/status').read().split('CapEff:')[1].split()[0])"
    )
    shown = alone.exec(["/usr/bin/strong", "-S", "-c", code], user=SOMEBODY).check().stdout
    assert shown == "(1234, 1234, 1234) (1234, 1234, 1234) 0000000000000000\n"
    # Nor can root give a file capabilities beyond its own.
    code = (
        "import os, struct\n"
        "os.setxattr('/usr/bin/strong', 'security.capability',"
        " struct.pack('<5I', 0x02000001, 1 << 21, 0, 0, 0))"
    )
    assert "Operation not permitted" in alone.exec([PYTHON, "-c", code]).stderr


def test_a_program_has_three_descriptors_and_no_frame_in_them_counts(
    alone: SandboxSession,
) -> None:
    ended = struct.pack("<BBQ", 0, 0, 1)
    forged = b"".join(
        (
            MAGIC,
            encode_frame(FrameType.WELCOME, 0, struct.pack("<H16sII", 1, bytes(16), 0, 1)),
            *(encode_frame(FrameType.EXIT, stream, ended) for stream in range(1, 200)),
            *(encode_frame(FrameType.OUTPUT, stream, b"\1forged") for stream in range(1, 200)),
        )
    )
    code = (
        "import os, sys\n"
        "data = sys.stdin.buffer.read()\n"
        "for number in range(256):\n"
        "    try:\n"
        "        held = os.readlink(f'/proc/self/fd/{number}')\n"
        "        os.write(number, data)\n"
        "    except OSError: continue\n"
        "    if number > 2: sys.exit(f'{number} {held}')\n"
    )
    result = alone.exec([PYTHON, "-S", "-c", code], stdin=forged).check()
    assert (result.stdout_bytes, result.stderr_bytes) == (forged, forged)
    assert alone.exec(["echo", "here"]).stdout == "here\n"


def test_the_agent_s_directory_is_no_place_to_write(alone: SandboxSession) -> None:
    with pytest.raises(SandboxFileError, match=r"/\.apothic/agent"):  # it is read-only, and runs
        alone.write_bytes("/.apothic/agent", b"x")
    with pytest.raises(SandboxPermissionError, match=r"/\.apothic/new"):
        alone.mkdir("/.apothic/new")


def test_secrets_are_in_programs_alone(
    alone: SandboxSession, other: SandboxSession, docker_engine: Engine
) -> None:
    assert other.exec("echo $OTHER_TOKEN", shell=True).stdout == TOKEN + "\n"
    # The probe of `test_out_of_reach` works.
    assert "WORKED" in attempt(other, ATTEMPTS["another one's processes"], TOKEN)
    assert attempt(other, ATTEMPTS["another one's processes"], TOKEN, user=SOMEBODY) == ""
    container = other.inspect().container_id or ""
    api = docker_engine.api
    shown = json.dumps(api.inspect_container(container), default=str)
    assert container in shown
    image = api.inspect_container(container)["Image"]
    shown += json.dumps([api.inspect_image(image), api.history(image), api.top(container)])
    shown += json.dumps(api.diff(container))
    assert TOKEN not in shown
    assert TOKEN not in repr(other) + other.handle_json + str(other.inspect())


@pytest.fixture(scope="module")
def heard() -> Iterator[tuple[int, list[str]]]:
    """Listen on all addresses of the host, as Ray does; give the port, and who came."""
    came: list[str] = []
    with (
        socket.create_server(("0.0.0.0", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as packets,
    ):
        port: int = server.getsockname()[1]
        packets.bind(("0.0.0.0", port))

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, address = server.accept()
                    came.append(f"tcp {address}")
                    connection.close()

        def receive() -> None:
            while (packet := packets.recvfrom(100))[0] != b"end":
                came.append(f"udp {packet}")

        threads = [threading.Thread(target=accept), threading.Thread(target=receive)]
        for thread in threads:
            thread.start()
        yield port, came
        server.shutdown(socket.SHUT_RDWR)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"end", ("127.0.0.1", port))
        for thread in threads:
            thread.join()


REACH = """
import struct, threading
port = int(sys.argv[1])
routes = [line.split() for line in open("/proc/net/route").readlines()[1:]]
gateways = [socket.inet_ntoa(struct.pack("<I", int(words[2], 16))) for words in routes]
def reach(address, port):
    try:
        socket.create_connection((address, port), timeout=2).close()
        print("REACHED", address, port)
    except OSError:
        pass
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"packet", (address, port))
    except OSError:
        pass
threads = [threading.Thread(target=reach, args=(address, at))
           for address in {*gateways, *sys.argv[2:]} for at in (port, 7777, 6379, 2375)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def own_addresses() -> list[str]:
    """Give the host's addresses but for the loopback."""
    found = [
        word.split("/")[0]
        for line in os.popen("ip -4 -o addr show").read().splitlines()
        for word in line.split()[3:4]
    ]
    return [address for address in found if not address.startswith("127.")]


def address_of(session: SandboxSession, docker_engine: Engine) -> str:
    found = docker_engine.api.inspect_container(session.inspect().container_id or "")
    return str(next(iter(found["NetworkSettings"]["Networks"].values()))["IPAddress"])


def test_neither_the_host_nor_another_session_is_reached(
    alone: SandboxSession,
    online: SandboxSession,
    other: SandboxSession,
    docker_engine: Engine,
    heard: tuple[int, list[str]],
) -> None:
    port, came = heard
    serve = (
        "import socket\n"
        "server = socket.create_server(('0.0.0.0', 7777))\n"
        "print('up', flush=True)\n"
        "while True: server.accept()\n"
    )
    neighbour = address_of(other, docker_engine)
    addresses = own_addresses()
    assert addresses
    with other.exec_stream([PYTHON, "-c", serve]) as listener:
        assert next(listener).text == "up\n"
        # The probes work: from where nothing is between, all is reached.
        assert f"REACHED {neighbour} 7777" in attempt(other, REACH, str(port), neighbour)
        for address in addresses:
            socket.create_connection((address, port), timeout=5).close()
        while len(came) < len(addresses):
            pass
        came.clear()
        for session in (alone, online):
            everywhere = [*addresses, neighbour, "172.17.0.1", "169.254.169.254"]
            assert attempt(session, REACH, str(port), *everywhere) == ""
    # What was sent before comes before: our own packet is the last.
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
        last.sendto(b"last", ("127.0.0.1", port))
    while len(came) < 2:
        pass
    assert sorted(one.split()[0] for one in came) == ["tcp", "udp"], came


def test_nodes_that_join_under_public_addresses_are_out_of_reach(
    engine: DirectEngine, docker_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sessions of the cluster share the rules: others that live on here find the same nodes."""

    def blocked(address: str) -> bool:
        found = read_rules(docker_engine, new_owner())
        return f"-d {address}/32 -j REJECT" in found

    monkeypatch.setattr(host, "NODES_LOOK_S", 0.2)
    monkeypatch.setattr(engine, "node_addresses", ["10.9.9.1", "8.8.8.8"])
    with opened("joined", "internet") as session:
        assert blocked("8.8.8.8")
        assert not blocked("8.8.4.4")
        monkeypatch.setattr(engine, "node_addresses", ["10.9.9.1", "8.8.8.8", "8.8.4.4"])
        eventually(lambda: blocked("8.8.4.4"), 30)
        assert blocked("8.8.8.8")
        assert session.exec(["echo", "here"]).stdout == "here\n"


def test_a_session_without_a_network_has_none(alone: SandboxSession) -> None:
    assert alone.exec("ls /sys/class/net").stdout == "lo\n"
