#!/bin/sh
# Create a virtual environment unless it is there, then install into it.
#
# Usage: scripts/venv.sh DIRECTORY PIP_INSTALL_ARGUMENT...
#
# $PYTHON names the interpreter; without it the first suitable one on PATH is taken. On Debian and
# its relatives, root gets a missing Python or venv module from apt-get; others are told what to do.
set -eu

environment=$1
shift

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

# The same range as requires-python in pyproject.toml.
suitable() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        suitable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.10 to 3.13"
        command -v "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if suitable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

apt_install() {
    command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ] || return 1
    say "Installing $* with apt-get ..."
    log=$(apt-get update -qq 2>&1 &&
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" 2>&1) ||
        { say "$log"; return 1; }
}

if ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || {
        [ -z "${PYTHON:-}" ] || exit 1
        apt_install python3 python3-venv && python=$(find_python) ||
            fail "no Python 3.10 to 3.13 on PATH: install one, or name it: make PYTHON=/path/to/python3"
    }
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        apt_install "$package" ||
            fail "$python has no venv module: install it (Debian, Ubuntu: apt-get install $package)"
    fi
    if [ -e "$environment" ]; then
        [ -e "$environment/pyvenv.cfg" ] || fail "$environment is in the way: it is no virtual environment"
        rm -rf "$environment"
    fi
    "$python" -m venv "$environment"
fi

say "Installing into $environment ($("$environment/bin/python" -V)) ..."
# -qq: neither progress nor the warnings of the user's own pip configuration.
"$environment/bin/python" -m pip install -qq --disable-pip-version-check "$@" ||
    fail "pip could not install into $environment: see above; without a network, an existing" \
        "environment keeps working: run its bin/python directly"
