#!/bin/sh
# See to it that a Docker engine answers; build the images that tests and the quickstart start from.
#
# Usage: scripts/docker-engine.sh            an engine: the running one, else an installed one is
#                                            started, else (Debian and relatives, as root) installed
#        scripts/docker-engine.sh images     that, and the images below, built once
#        scripts/docker-engine.sh busybox    that, and the small image alone
#
#   apothic-test-busybox   one static binary, 2 MB
#   apothic-test-debian    Debian with python3 and pytest, 170 MB, about 40 s to build
#
# The images are made from Debian packages, so that no container registry is needed.
# DOCKER_HOST is heeded as the docker command heeds it. LOG names the log of a started dockerd.
set -eu

LOG=${LOG:-/var/log/apothic-dockerd.log}
START_LIMIT_S=60
DEBIAN_SUITE=bookworm
DEBIAN_MIRROR=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
BUSYBOX_IMAGE=apothic-test-busybox
DEBIAN_IMAGE=apothic-test-debian

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }
is_root() { [ "$(id -u)" = 0 ]; }
answers() { docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }

apt_install() {
    command -v apt-get >/dev/null 2>&1 && is_root || return 1
    say "Installing $* with apt-get ..."
    log=$(apt-get update -qq 2>&1 &&
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" 2>&1) ||
        { say "$log"; return 1; }
}

# Start dockerd with the given options; fail when it ends or does not answer in time.
try_dockerd() {
    say "Starting dockerd $*(log: $LOG) ..."
    setsid dockerd "$@" >"$LOG" 2>&1 </dev/null &
    pid=$!
    tries=$((START_LIMIT_S * 5))
    while [ "$tries" -gt 0 ]; do
        answers && return 0
        kill -0 "$pid" 2>/dev/null || return 1
        sleep 0.2
        tries=$((tries - 1))
    done
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    return 1
}

start_engine() {
    if [ -d /run/systemd/system ] && systemctl start docker >/dev/null 2>&1 && answers; then
        return 0
    fi
    # With no options dockerd finds by itself what works on a whole machine: overlay2 on ext4 or xfs,
    # cgroup v1 or v2, the bridge and its iptables rules. Inside another container the file system
    # may lie on an overlay already (then only copies of layers work: vfs), and the kernel may have
    # no iptables at all (then there is no bridge, and sandboxes have network="none" alone).
    try_dockerd ||
        try_dockerd --storage-driver=vfs ||
        try_dockerd --storage-driver=vfs --iptables=false --bridge=none ||
        { tail -n 20 "$LOG" >&2; fail "dockerd did not start; its log is $LOG"; }
}

ensure_engine() {
    answers && return 0
    [ -z "${DOCKER_HOST:-}" ] ||
        fail "no Docker engine answers at DOCKER_HOST=$DOCKER_HOST: correct it, or unset it"
    if ! is_root; then
        if [ -S /var/run/docker.sock ] && [ ! -w /var/run/docker.sock ]; then
            fail "a Docker engine is there, but $(id -un) may not use it: run" \
                "'sudo usermod -aG docker $(id -un)' and log in again"
        fi
        fail "no Docker engine answers: start it ('sudo systemctl start docker'), or install it" \
            "('sudo apt-get install docker.io'), or run this as root"
    fi
    # Debian's docker.io holds the docker command as well.
    if ! command -v dockerd >/dev/null 2>&1 || ! command -v docker >/dev/null 2>&1; then
        apt_install docker.io iptables ||
            fail "Docker is not installed, and apt-get could not do it: see" \
                "https://docs.docker.com/engine/install/"
    fi
    answers || start_engine
}

present() { docker image inspect "$1" >/dev/null 2>&1; }

scratch_dir() {
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    chmod 755 "$scratch" # apt-get downloads as a user of its own
}

build_busybox() {
    present "$BUSYBOX_IMAGE" && return 0
    say "Building $BUSYBOX_IMAGE ..."
    mkdir -p "$scratch/root/bin" "$scratch/root/tmp" "$scratch/root/etc"
    chmod 1777 "$scratch/root/tmp"
    if ! (cd "$scratch" && apt-get download -qq busybox-static >/dev/null 2>&1); then
        apt-get update -qq && (cd "$scratch" && apt-get download -qq busybox-static >/dev/null) ||
            fail "the Debian package busybox-static could not be downloaded"
    fi
    dpkg-deb -x "$scratch"/busybox-static_*.deb "$scratch/package"
    busybox=$(find "$scratch/package" -path '*/bin/busybox' -type f)
    cp "$busybox" "$scratch/root/bin/busybox"
    for applet in $("$busybox" --list); do
        [ "$applet" = busybox ] || ln -s busybox "$scratch/root/bin/$applet"
    done
    echo 'root:x:0:0:root:/:/bin/sh' >"$scratch/root/etc/passwd"
    echo 'nobody:x:65534:65534:nobody:/:/bin/sh' >>"$scratch/root/etc/passwd"
    tar -C "$scratch/root" --owner=0 --group=0 -c . |
        docker import -c 'ENV PATH=/bin' -c 'CMD ["/bin/sh"]' - "$BUSYBOX_IMAGE" >/dev/null
}

build_debian() {
    present "$DEBIAN_IMAGE" && return 0
    is_root || fail "building $DEBIAN_IMAGE needs root (debootstrap): run this once as root"
    command -v debootstrap >/dev/null 2>&1 || apt_install debootstrap ||
        fail "building $DEBIAN_IMAGE needs debootstrap: apt-get install debootstrap"
    say "Building $DEBIAN_IMAGE (about 40 s) ..."
    debootstrap --variant=minbase --include=python3,python3-pytest \
        "$DEBIAN_SUITE" "$scratch/debian" "$DEBIAN_MIRROR" >"$scratch/log" 2>&1 ||
        { tail -n 20 "$scratch/log" >&2; fail "debootstrap could not make $DEBIAN_IMAGE"; }
    rm -rf "$scratch"/debian/var/cache/apt/archives/*.deb "$scratch"/debian/var/lib/apt/lists/*
    tar -C "$scratch/debian" --one-file-system -c . |
        docker import -c 'CMD ["/bin/bash"]' - "$DEBIAN_IMAGE" >/dev/null
}

ensure_engine
case ${1:-} in
    '') ;;
    busybox)
        scratch_dir
        build_busybox
        ;;
    images)
        scratch_dir
        build_busybox
        build_debian
        ;;
    *) fail "unknown argument '$1': it is 'busybox', 'images' or nothing" ;;
esac
